"""What belongs into a folder of results/: its name, its methods and runs, and the command that makes it.

training/results.py makes such a folder and training/results_page.py shows it; here is what both have to know.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .protocols import Protocol

TABLE_METHODS = ("plain", "feature_extractor", "fine_tune", "residual_adapter", "adapter_only", "bn_only")
TABLE_RUNS = 3
DEFAULT_BASE = "s2e-resnet20-adapter"  # in hub_cards/


def default_protocol(corpus: str) -> str:
    """EmoBox's folds where the package has them, else leave one speaker out."""
    return "emobox6" if corpus == "ravdess" else "loso"


def folder_name(corpus: str, protocol: str, recipe: str, labels: Sequence[str] = ()) -> str:
    """E.g. emodb-loso-paper, or emodb4-loso-paper where four labels were named."""
    name = f"{corpus}{len(labels) or ''}-{protocol}-{recipe}"
    return re.sub(r"[^\w.-]+", "_", name)  # a corpus may be called module:Class


def finished_folds(folder: Path, protocol: Protocol) -> dict[tuple[str, int], set[str]]:
    """For each method and run, the folds whose predictions lie in folds/."""
    names = {fold.name.replace("/", "_") for fold in protocol.folds}
    found: dict[tuple[str, int], set[str]] = {}
    for file in sorted((folder / "folds").glob("*--*--run*.parquet")):
        method, _, rest = file.stem.partition("--")
        part, _, run = rest.rpartition("--run")
        tested = {part} & names or set(part.split("+")) & names  # folds that share a training share a file
        if tested:
            found.setdefault((method, int(run)), set()).update(tested)
    return found


def make_command(
    folder: Path,
    summary: Mapping[str, Any],
    settings: Mapping[str, Any],
    environment: Mapping[str, Any],
    protocol_seed: int = 0,
) -> str:
    """The `make results` line that makes this folder, as far as its files tell; defaults are left out."""
    corpus, protocol, recipe = summary["corpus"], summary["protocol"]["name"], summary["recipe"]
    variables = {"CORPUS": corpus, "DATA_DIR": "DIR"}
    if folder.name != folder_name(corpus, protocol, recipe):
        variables["LABELS"] = ",".join(summary["classes"])
        if folder.name != folder_name(corpus, protocol, recipe, summary["classes"]):
            variables["OUT"] = f"results/{folder.name}"
    if protocol != default_protocol(corpus):
        variables["PROTOCOL"] = protocol
    if set(summary["methods"]) - set(TABLE_METHODS):
        variables["METHODS"] = ",".join(dict.fromkeys([*TABLE_METHODS, *summary["methods"]]))
    if (runs := max(row["runs"] for row in summary["methods"].values())) > TABLE_RUNS:
        variables["RUNS"] = str(runs)
    if recipe != "paper" and "choice" not in summary:
        variables["RECIPE"] = f"training/recipes/{recipe}.yaml"
    if summary["base"] not in (DEFAULT_BASE, DEFAULT_BASE.replace("adapter", "plain"), None):
        variables["BASE"] = summary["base"]  # its folder's name: where it lies, and the plain base, is not noted
    launch = {"mixed_precision": settings.get("mixed_precision"), "num_processes": environment.get("processes")}
    variables["ACCELERATE"] = _flags({key: value for key, value in launch.items() if value not in ("no", 1)})
    further = {key: settings.get(key) for key in ("seed", "max_train_steps", "max_train_samples")}
    further |= {"protocol_seed": protocol_seed, "no_speaker_ids": not summary["protocol"]["speaker_disjoint"]}
    if "choice" in summary:
        further["candidates"] = ",".join(summary["choice"]["files"])
    variables["CV_FLAGS"] = _flags(further)
    return " ".join(["make results", *(f"{name}={shlex.quote(value)}" for name, value in variables.items() if value)])


def _flags(values: Mapping[str, Any]) -> str:
    return " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in values.items() if value)
