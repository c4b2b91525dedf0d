"""Fold-runs of a cross-validation: each is trained, tested and kept by itself, so that none is lost or redone."""

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from ..evaluation.metrics import scores
from ..evaluation.protocols import Fold, Protocol
from ..model.atomic_write_s2e import atomic_write
from .output import write_json
from .runtime import readable_errors

CHOICE_RULE = (
    "For each method and fold the recipe with the highest UA on a validation part (of equals the first), in one run "
    "that trained neither on it nor on the fold's test part."
)


@dataclass(frozen=True)
class Job:
    """One training: a method, a recipe, and the folds that share its training part (one, or both of a session).

    part: what it is tested on, "test" or "validation".
    folder: where its predictions are kept.
    """

    method: str
    folds: tuple[Fold, ...]
    run: int
    recipe: str
    part: str
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.method}--{'+'.join(fold.name for fold in self.folds)}--run{self.run}".replace("/", "_")

    @property
    def predictions(self) -> Path:
        return self.folder / f"{self.name}.parquet"

    @property
    def facts(self) -> Path:
        return self.folder / f"{self.name}.json"

    def keep(self, rows: pd.DataFrame, facts: dict) -> None:
        """The predictions come last and in one step: where they are, the fold-run is whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.facts, facts)
        with atomic_write(self.predictions) as file:
            rows.to_parquet(file)


def list_jobs(
    methods: list[str], protocol: Protocol, runs: int, recipe: str | dict[str, dict[str, str]], folder: Path
) -> list[Job]:
    """Run by run, so that a job that is cut short has whole runs of every method first.

    Args:
        recipe: the recipe's name, or one for each method and fold.
    """

    def together(method: str, folds: list[Fold]) -> dict[str, list[Fold]]:
        groups: dict[str, list[Fold]] = {}
        for fold in folds:
            groups.setdefault(recipe if isinstance(recipe, str) else recipe[method][fold.name], []).append(fold)
        return groups

    return [
        Job(method, tuple(same), run, name, "test", folder)
        for run in range(runs)
        for method in methods
        for folds in protocol.by_training_part()
        for name, same in together(method, folds).items()
    ]


def list_choice_jobs(methods: list[str], protocol: Protocol, recipes: Iterable[str], folder: Path) -> list[Job]:
    """One run of every recipe on the training parts of a `choice_protocol`, tested on its validation parts."""
    return [
        Job(method, tuple(folds), 0, recipe, "validation", folder / recipe)
        for method in methods
        for recipe in recipes
        for folds in protocol.by_training_part()
    ]


def finish_jobs(jobs: list[Job], accelerator, run_job: Callable[[Job], tuple[pd.DataFrame, dict]], what: str) -> None:
    """Run those that are missing, spread over the processes.

    Raises:
        SystemExit: one cannot be run; the message names it.
    """
    if not jobs:
        return
    missing = [job for job in jobs if not job.predictions.is_file()]
    accelerator.print(f"{len(jobs)} {what}, {len(jobs) - len(missing)} finished before")
    accelerator.wait_for_everyone()  # all have looked before the first writes
    for job in missing[accelerator.process_index :: accelerator.num_processes]:
        with readable_errors(f"{job.name}: "):
            started = time.perf_counter()
            rows, facts = run_job(job)
            job.keep(rows, facts | {"job": job.name, "seconds": round(time.perf_counter() - started, 2)})
    accelerator.wait_for_everyone()


def refuse_other_recipes(jobs: list[Job]) -> None:
    """Where folds choose: SystemExit if a kept fold-run was trained by another recipe than is chosen now."""
    for job in jobs:
        used = json.loads(job.facts.read_text())["recipe"] if job.predictions.is_file() else job.recipe
        if used != job.recipe:
            raise SystemExit(
                f"{job.predictions} was trained by the recipe {used}, but {job.recipe} is chosen now: "
                "delete it to train it again"
            )


def collect(jobs: list[Job]) -> tuple[pd.DataFrame, dict[str, int]]:
    """The predictions of every whole run (a method on all folds), and the largest number of trained parameters.

    Raises:
        SystemExit: there is none.
    """
    runs: dict[tuple[str, int], list[Job]] = {}
    for job in jobs:
        runs.setdefault((job.method, job.run), []).append(job)
    done = [job for run in runs.values() if all(job.predictions.is_file() for job in run) for job in run]
    if not done:
        raise SystemExit(f"{jobs[0].folder}: no run is finished on all folds yet")
    trained: dict[str, int] = {}
    for job in done:
        count = json.loads(job.facts.read_text())["trained_parameters"]
        trained[job.method] = max(trained.get(job.method, 0), count)
    return pd.concat([pd.read_parquet(job.predictions) for job in done]), trained


def choose_recipes(jobs: list[Job], num_classes: int) -> dict:
    """For each method and fold the recipe with the highest UA on the validation part; of equals the first.

    Returns:
        {"rule", "candidates": [names], "chosen": {method: {fold: name}},
        "validation_ua": {method: {fold: {name: UA in %}}}}

    Raises:
        SystemExit: some are not finished.
    """
    if missing := [job.name for job in jobs if not job.predictions.is_file()]:
        raise SystemExit(f"{len(missing)} of the {len(jobs)} runs that choose a recipe are not finished: {missing[0]}")
    found: dict[str, dict[str, dict[str, float]]] = {}
    for job in jobs:
        for fold, rows in pd.read_parquet(job.predictions).groupby("fold"):
            ua = scores(rows["label"].to_numpy(), rows["prediction"].to_numpy(), num_classes)["ua"]
            found.setdefault(job.method, {}).setdefault(fold, {})[job.recipe] = round(100 * ua, 4)
    return {
        "rule": CHOICE_RULE,
        "candidates": list(dict.fromkeys(job.recipe for job in jobs)),
        "chosen": {m: {fold: max(ua, key=ua.get) for fold, ua in folds.items()} for m, folds in found.items()},
        "validation_ua": found,
    }
