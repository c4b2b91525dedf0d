"""What a training writes: the repo, its record and card, and its way to the Hub."""

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState

from ..corpora.index import utterance_ids
from ..hub.cards import write_card
from ..hub.repo import BASE_WEIGHTS, Repo
from ..model.adapter_files_s2e import ADAPTER_WEIGHTS
from ..model.atomic_write_s2e import atomic_write
from ..model.modeling_s2e import S2EForAudioClassification
from .arguments import RepoArguments, checkpoint_folder, known_arguments, run_folder
from .checkpoints import finished_checkpoints, refuse_other_checkpoints
from .recipe import Recipe
from .runtime import readable_errors
from .wave_store import WaveStore

_IN_WORDS = ("num_train_epochs", "learning_rate", "lr_scheduler_type", "lr_drop_epochs", "momentum")


def check_output(args: RepoArguments, *, adapter: bool) -> None:
    """Refuse a folder in which the result could not be written, before anything is read or trained.

    A repo of the same kind is written over; checkpoints of the run that made it are not.

    Raises:
        SystemExit: the folder cannot be written to, holds another kind of repo, or checkpoints of another run.
    """
    if PartialState().is_main_process:  # the one that writes; two would remove the folder from under each other
        _probe(Path(args.output_dir))
    other = BASE_WEIGHTS if adapter else ADAPTER_WEIGHTS
    if Path(args.output_dir, other).exists():
        raise SystemExit(f"--output_dir {args.output_dir}: holds {other}, another kind of repo: choose another folder")
    if args.checkpointing_steps:
        with readable_errors():
            refuse_other_checkpoints(checkpoint_folder(args), find_checkpoint(args))


def _probe(folder: Path) -> None:
    """Write there, as what permissions say is not always so; a folder that is not there yet is not left behind."""
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"0")
        if new:  # for all that may yet be refused
            folder.rmdir()
    except OSError as error:
        raise SystemExit(f"--output_dir {folder}: cannot be written to ({error}): choose another") from error


def find_checkpoint(args: RepoArguments) -> Path | None:
    """The checkpoint to resume from.

    Raises:
        SystemExit: there is none where one was asked for.
    """
    if args.resume_from_checkpoint is None:
        return None
    folder = checkpoint_folder(args)
    if args.resume_from_checkpoint == "latest":
        found = finished_checkpoints(folder)
        if not found:
            raise SystemExit(f"--resume_from_checkpoint latest: there is no whole checkpoint in {folder}")
        return found[-1]
    chosen = Path(args.resume_from_checkpoint)
    if not (chosen / "progress.json").is_file():
        raise SystemExit(f"--resume_from_checkpoint {chosen}: not a whole checkpoint of this package")
    return chosen


def write_model(model: S2EForAudioClassification, output_dir: str | os.PathLike, *, adapter: bool) -> None:
    """The adapter, or the full model, as a repo that is never half old and half new.

    `save_adapter` sees to that by itself; a full model is written beside, and its files are then moved into
    place, the weights last: a repo without them is not taken for a whole one.
    """
    folder = Path(output_dir)
    if adapter:
        model.save_adapter(folder, model.active_adapter())
        return
    partial = folder / "run" / "model.part"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        model.save_pretrained(partial)
        (folder / BASE_WEIGHTS).unlink(missing_ok=True)
        for file in sorted(partial.iterdir(), key=lambda file: file.name == BASE_WEIGHTS):
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_record(args: Any, recipe: Recipe, made_by: dict[str, Any], history: list[dict]) -> None:
    """What made the model beside this folder: arguments and recipe, environment and history; no tokens, and no
    scores of a model that was here before."""
    folder = run_folder(args)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("evaluation.json", "predictions.parquet"):
        (folder / name).unlink(missing_ok=True)
    write_json(folder / "arguments.json", {"arguments": known_arguments(args), "recipe": asdict(recipe)})
    write_json(folder / "environment.json", made_by)
    write_json(folder / "history.json", history)


def prediction_table(dataset, utterances: Sequence[int], posteriors: np.ndarray, **columns: Any):
    """One row an utterance, as hf_s2e.evaluation.reports reads them; `columns` (run, fold, method) come first."""
    import pandas as pd

    part = dataset.select(utterances)
    return pd.DataFrame(
        {
            **columns,
            "utterance": np.asarray(utterance_ids(dataset))[list(utterances)],
            "speaker": ["" if speaker is None else str(speaker) for speaker in part["speaker"]],
            "label": np.asarray(part["label"]),
            "prediction": posteriors.argmax(axis=1),
            "posterior": list(posteriors.round(4).astype(np.float32)),
        }
    )


def write_json(path: Path, content: Any) -> None:
    """An atomic write: a reader sees the old file or the whole new one."""
    with atomic_write(path) as file:
        file.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def write_facts(
    args: RepoArguments, recipe: Recipe, dataset, store: WaveStore, rows: Sequence[int], **facts: Any
) -> Repo:
    """Write training.json and the card, from what is in --output_dir and these facts; the repo is then finished.

    Args:
        rows: of the utterances that were trained on.
        **facts: further fields of training.json, see hf_s2e/hub/cards.py.
    """
    training = {"corpora": _corpora(args, dataset, store, rows), "settings": _settings(args, recipe), **facts}
    repo = Repo(args.output_dir)
    repo.write_training(training)
    write_card(repo)
    return repo


def _corpora(args: RepoArguments, dataset, store: WaveStore, rows: Sequence[int]) -> list[dict[str, Any]]:
    part, seconds = dataset.select(rows), (store.lengths[list(rows)] / 16_000).tolist()
    names = list(part["corpus"]) if "corpus" in dataset.column_names else [args.corpus] * len(part)
    used: dict[str, dict[str, Any]] = {}
    for name, speaker, length in zip(names, part["speaker"], seconds):
        entry = used.setdefault(name, {"speakers": set(), "utterances": 0, "hours": 0.0})
        entry["speakers"].add(speaker)
        entry["utterances"] += 1
        entry["hours"] += length / 3600
    return [
        {
            "name": name,
            "speakers": None if None in entry["speakers"] else len(entry["speakers"]),
            "utterances": entry["utterances"],
            "hours": round(entry["hours"], 2),
        }
        for name, entry in used.items()
    ]


def _settings(args: RepoArguments, recipe: Recipe) -> dict[str, Any]:
    """The recipe in words; of what the paper leaves out only what differs from it."""
    drops = " and ".join(str(epoch) for epoch in recipe.lr_drop_epochs if epoch <= recipe.num_train_epochs)
    schedule = f", divided by 10 at epoch {drops}" if drops else ""
    if recipe.lr_scheduler_type != "step":
        schedule = f", {recipe.lr_scheduler_type} schedule"
    settings = {
        "epochs": recipe.num_train_epochs,
        "optimiser": f"SGD, Nesterov momentum {recipe.momentum}",
        "learning rate": f"{recipe.learning_rate}{schedule}",
        "weight decay": recipe.weight_decay,
        "batch size": recipe.per_device_train_batch_size,
    }
    if (parts := PartialState().num_processes * args.gradient_accumulation_steps) > 1:
        settings["batch size"] = f"{parts} x {recipe.per_device_train_batch_size}"
    if args.max_train_steps:
        settings["epochs"] = f"{recipe.num_train_epochs}, but {args.max_train_steps} batches at most"
    named = {*_IN_WORDS, "weight_decay", "per_device_train_batch_size"}
    standard = asdict(Recipe())
    others = {f.name: getattr(recipe, f.name) for f in fields(recipe) if f.name not in named}
    return settings | {name: value for name, value in others.items() if value != standard[name]}


def find_namespace(args: RepoArguments) -> None:
    """Make `--hub_model_id` complete, which asks the Hub whose token this is: before training, not after.

    Raises:
        SystemExit: there is no token, or the Hub cannot be reached.
    """
    if not args.push_to_hub:
        return
    from huggingface_hub import HfApi

    from ..hub.errors import asking_the_hub

    name = args.hub_model_id or Path(args.output_dir).resolve().name
    with readable_errors("--push_to_hub: "), asking_the_hub("cannot log in"):
        user = HfApi(token=args.hub_token).whoami()["name"]
    args.hub_model_id = name if "/" in name else f"{user}/{name}"


def push_to_hub(args: RepoArguments, repo: Repo) -> None:
    """Publish a finished repo as `--hub_model_id`, without run/; an unpublished base goes with its adapter."""
    from ..hub import push

    namespace, _, name = args.hub_model_id.partition("/")
    with readable_errors(f"{repo.folder} is written, but not published: "):
        done = push([repo], namespace, name=name, private=args.hub_private_repo or None, token=args.hub_token)
    for upload, url in done:
        print(f"published: {upload.repo_id} {url}")
