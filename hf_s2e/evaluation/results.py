"""What belongs into a folder of results/: its name, its methods and runs, and the command that makes it.

training/results.py makes such a folder and training/results_page.py shows it; here is what both have to know.
"""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .protocols import Protocol

TABLE_METHODS = ("plain", "feature_extractor", "fine_tune", "residual_adapter", "adapter_only", "bn_only")
TABLE_RUNS = 3
DEFAULT_BASES = {kind: f"hub_cards/s2e-resnet20-{kind}" for kind in ("adapter", "plain")}


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


def environments(folder: Path) -> list[tuple[dict[str, Any], int]]:
    """What the fold-runs in folds/ were made on and by, each with the number of them; those that do not say are
    left out."""
    known: dict[str, int] = {}
    for file in sorted((folder / "folds").glob("*.json")):
        if environment := json.loads(file.read_text(encoding="utf-8")).get("environment"):
            key = json.dumps(environment, sort_keys=True)
            known[key] = known.get(key, 0) + 1
    return [(json.loads(key), count) for key, count in known.items()]


def make_command(folder: Path, summary: Mapping[str, Any], settings: Mapping[str, Any], protocol_seed: int = 0) -> str:
    """The `make results` line that makes this folder, as far as its files tell; defaults are left out."""
    sources = settings.get("sources", {})
    corpus, protocol = summary["corpus"], summary["protocol"]["name"]
    named = Path(sources["recipe"]).stem if "recipe" in sources else "chosen" if "choice" in summary else "paper"
    usual = [folder_name(corpus, protocol, named, labels) for labels in ((), summary["classes"])]
    variables = {"CORPUS": corpus, "DATA_DIR": "DIR"}
    if folder.name != usual[0]:
        variables["LABELS"] = ",".join(summary["classes"])
    if folder.name not in usual or sources.get("recipe_changes"):
        variables["OUT"] = f"results/{folder.name}"
    if protocol != default_protocol(corpus):
        variables["PROTOCOL"] = protocol
    if set(summary["methods"]) - set(TABLE_METHODS):
        variables["METHODS"] = ",".join(dict.fromkeys([*TABLE_METHODS, *summary["methods"]]))
    if (runs := max(row["runs"] for row in summary["methods"].values())) > TABLE_RUNS:
        variables["RUNS"] = str(runs)
    variables["RECIPE"] = sources.get("recipe", "")
    for variable, kind in (("BASE", "adapter"), ("PLAIN_BASE", "plain")):
        variables[variable] = "" if sources.get(kind) == DEFAULT_BASES[kind] else sources.get(kind, "")
    precision = settings.get("mixed_precision", "no")
    variables["ACCELERATE"] = "" if precision == "no" else f"--mixed_precision {precision}"
    further = {key: settings.get(key) for key in ("seed", "max_train_steps", "max_train_samples")}
    further["not_strict"] = sources.get("not_strict")
    further |= {"protocol_seed": protocol_seed, "no_speaker_ids": not summary["protocol"]["speaker_disjoint"]}
    if (accumulated := settings.get("gradient_accumulation_steps", 1)) > 1:
        further["gradient_accumulation_steps"] = accumulated
    if "choice" in summary:
        further["candidates"] = ",".join(summary["choice"]["files"])
    further |= {name: shlex.quote(sources[name]) for name in ("recipe_name", "corpus_options") if name in sources}
    variables["CV_FLAGS"] = " ".join([*_flags(further), *_settings(sources.get("recipe_changes", {}))])
    said = {name: shlex.quote(value.replace("$", "$$")) for name, value in variables.items() if value}  # $ is make's
    return " ".join(["make results", *(f"{name}={value}" for name, value in said.items())])


def _flags(values: Mapping[str, Any]) -> list[str]:
    return [f"--{name}" if value is True else f"--{name} {value}" for name, value in values.items() if value]


def _settings(values: Mapping[str, Any]) -> list[str]:
    """Of a recipe, where 0 and False are said too, and a list is its items."""
    items = {name: value if isinstance(value, list) else [value] for name, value in values.items()}
    return [f"--{name} {' '.join(map(str, values))}" for name, values in items.items()]
