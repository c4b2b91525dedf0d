"""Fold-runs of a cross-validation: each is trained, tested and kept by itself, so that none is lost or redone."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pandas as pd

from ..evaluation.metrics import scores
from ..evaluation.protocols import Fold, Protocol
from .methods import METHODS
from .result_folder import RUNS, ResultFolder
from .runtime import readable_errors

CHOICE_RULE = (
    "For each method and fold the recipe with the highest UA on a validation part (of equals the first), in one run "
    "that trained neither on it nor on the fold's test part."
)


@dataclass(frozen=True)
class Job:
    """One training: a method, a recipe, and the folds that share its training part (one, or both of a session).

    part: what it is tested on, "test" or "validation".
    """

    method: str
    folds: tuple[Fold, ...]
    run: int
    recipe: str
    part: str

    @property
    def name(self) -> str:
        """What it is kept by; the recipe is in it where it is one of several that compete."""
        name = f"{self.method}--{'+'.join(fold.name for fold in self.folds)}--run{self.run}"
        return name if self.part == "test" else f"{name}--{self.recipe}"

    @property
    def facts(self) -> dict:
        facts = {"method": self.method, "run": self.run, "recipe": self.recipe, "part": self.part}
        return facts | {"folds": [fold.name for fold in self.folds]}


def list_jobs(methods: list[str], protocol: Protocol, runs: int, recipe: str | dict[str, dict[str, str]]) -> list[Job]:
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
        Job(method, tuple(same), run, name, "test")
        for run in range(runs)
        for method in methods
        for folds in protocol.by_training_part()
        for name, same in together(method, folds).items()
    ]


def list_choice_jobs(methods: list[str], protocol: Protocol, recipes: Iterable[str]) -> list[Job]:
    """One run of every recipe on the training parts of a `choice_protocol`, tested on its validation parts."""
    return [
        Job(method, tuple(folds), 0, recipe, "validation")
        for method in methods
        for recipe in recipes
        for folds in protocol.by_training_part()
    ]


def finish_jobs(
    jobs: list[Job],
    folder: ResultFolder,
    accelerator,
    run_job: Callable[[Job], tuple[pd.DataFrame, dict]],
    what: str,
) -> None:
    """Run those that are missing, spread over the processes, and merge them into the folder.

    Raises:
        SystemExit: one cannot be run; the message names it.
    """
    known = folder.finished()
    missing = [job for job in jobs if job.name not in known]
    if jobs:
        accelerator.print(f"{len(jobs)} {what}, {len(jobs) - len(missing)} finished before")
    accelerator.wait_for_everyone()  # all have looked before the first writes
    for job in missing[accelerator.process_index :: accelerator.num_processes]:
        with readable_errors(f"{job.name}: "):
            started = time.perf_counter()
            rows, facts = run_job(job)
            folder.keep(job.name, job.facts | facts | {"seconds": round(time.perf_counter() - started, 2)}, rows)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        with readable_errors():
            folder.merge()
    accelerator.wait_for_everyone()


def refuse_other_recipes(folder: ResultFolder, chosen: dict[str, dict[str, str]]) -> None:
    """Where folds choose: SystemExit if a fold-run was trained by another recipe than is chosen now."""
    for name, facts in folder.finished().items():
        recipes = {chosen[facts["method"]][fold] for fold in facts["folds"]} if facts["part"] == "test" else set()
        if others := recipes - {facts["recipe"]}:
            raise SystemExit(
                f"{folder.path}: {name} was trained by the recipe {facts['recipe']}, but {others.pop()} is chosen now: "
                f"delete its line in {RUNS}, so that it runs again"
            )


def collect(folder: ResultFolder, protocol: Protocol) -> tuple[pd.DataFrame, dict[str, int]]:
    """The predictions of every whole run (a method on all folds), and the largest number of trained parameters.

    Raises:
        SystemExit: there is none.
    """
    order = {name: place for place, name in enumerate(METHODS)}
    with readable_errors():
        rows = folder.whole_runs(len(protocol.folds))
    if not len(rows):
        raise SystemExit(f"{folder.path}: no run is finished on all folds yet")
    rows = rows.sort_values(["run", "method"], key=lambda c: c.map(order) if c.name == "method" else c, kind="stable")
    whole, trained = set(zip(rows["method"], rows["run"])), dict.fromkeys(rows["method"], 0)
    for facts in folder.finished().values():
        if facts["part"] == "test" and (facts["method"], facts["run"]) in whole:
            trained[facts["method"]] = max(trained[facts["method"]], facts["trained_parameters"])
    return rows.reset_index(drop=True), trained


def choose_recipes(jobs: list[Job], folder: ResultFolder, num_classes: int) -> dict:
    """For each method and fold the recipe with the highest UA on the validation part; of equals the first.

    Returns:
        {"rule", "candidates": [names], "chosen": {method: {fold: name}},
        "validation_ua": {method: {fold: {name: UA in %}}}}

    Raises:
        SystemExit: some are not finished.
    """
    known = folder.finished()
    if missing := [job.name for job in jobs if job.name not in known]:
        raise SystemExit(f"{len(missing)} of the {len(jobs)} runs that choose a recipe are not finished: {missing[0]}")
    with readable_errors():
        rows = dict(list(folder.rows("validation").groupby(["method", "fold", "recipe"])))
    found: dict[str, dict[str, dict[str, float]]] = {}
    for job in jobs:
        for fold in job.folds:
            part = rows[job.method, fold.name, job.recipe]
            ua = scores(part["label"].to_numpy(), part["prediction"].to_numpy(), num_classes)["ua"]
            found.setdefault(job.method, {}).setdefault(fold.name, {})[job.recipe] = round(100 * ua, 4)
    return {
        "rule": CHOICE_RULE,
        "candidates": list(dict.fromkeys(job.recipe for job in jobs)),
        "chosen": {m: {fold: max(ua, key=ua.get) for fold, ua in folds.items()} for m, folds in found.items()},
        "validation_ua": found,
    }
