"""Cross-validate methods on a corpus: the paper's Table II, with confidence intervals and paired tests.

    accelerate launch training/cross_validate.py --corpus emodb --data_dir DIR --protocol loso --runs 3 \
        --methods plain,fine_tune,residual_adapter --model_name_or_path hub_cards/s2e-resnet20-adapter \
        --plain_model_name_or_path hub_cards/s2e-resnet20-plain --output_dir OUT

Each fold-run is kept in OUT/folds when it is finished, and the processes share them out; started again, the
job goes on with those that are missing. OUT/settings.json guards the folder: another corpus, protocol, recipe
or base is refused, further methods and runs are added. OUT/audit.json says what a model may score by without
hearing the emotion.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pandas as pd
from accelerate.utils import set_seed

from hf_s2e.adapter_files_s2e import tensors_sha256
from hf_s2e.audit import audit
from hf_s2e.protocols import Fold, Protocol, make_protocol
from hf_s2e.reports import latex_table, markdown_table, summarize
from hf_s2e.training.engine import predict, train
from hf_s2e.training.methods import METHODS, build_model
from hf_s2e.training.recipe import Recipe
from hf_s2e.training.script import (
    RunArguments,
    draw,
    environment,
    make_accelerator,
    make_task,
    parse_arguments,
    prediction_table,
    read_corpus,
    readable_errors,
    split_names,
    write_json,
)


@dataclass
class Arguments(RunArguments):
    methods: str = field(default="plain,fine_tune,residual_adapter", metadata={"help": ", ".join(METHODS)})
    protocol: str = field(default="loso", metadata={"help": "loso, 5fold, emobox6, session or split"})
    protocol_seed: int = 0
    no_speaker_ids: bool = field(default=False, metadata={"help": "accept a split that may share speakers"})
    runs: int = 5
    model_name_or_path: str | None = field(default=None, metadata={"help": "the base with adapters"})
    plain_model_name_or_path: str | None = field(default=None, metadata={"help": "the plain base"})
    recipe_name: str | None = field(default=None, metadata={"help": "by default the recipe's file name, or `paper`"})
    per_device_eval_batch_size: int = 128
    report_only: bool = field(default=False, metadata={"help": "write the tables of the runs that are finished"})


@dataclass(frozen=True)
class Job:
    """One training: a method, and the folds that share its training part (one, or both of a session)."""

    method: str
    folds: tuple[Fold, ...]
    run: int

    @property
    def name(self) -> str:
        return f"{self.method}--{'+'.join(fold.name for fold in self.folds)}--run{self.run}".replace("/", "_")


def list_jobs(methods: list[str], protocol: Protocol, runs: int) -> Iterator[Job]:
    """Run by run, so that a job that is cut short has whole runs of every method first."""
    for run in range(runs):
        for method in methods:
            for folds in protocol.by_training_part():
                yield Job(method, tuple(folds), run)


def base_of(method: str, args: Arguments) -> str | None:
    return args.model_name_or_path if METHODS[method].base == "adapter" else args.plain_model_name_or_path


def check_settings(folder: Path, settings: dict, starts: dict[str, dict]) -> None:
    """Write what all results in the folder share; from then on compare it, and add further methods.

    Args:
        settings: the same for every method.
        starts: for each method, the network that it starts from.

    Raises:
        SystemExit: the folder holds results made with other settings; the message says which differ.
    """
    file = folder / "settings.json"
    found = json.loads(file.read_text()) if file.is_file() else {**settings, "starts": starts}
    differing = [key for key in settings if found.get(key) != settings[key]]
    differing += [f"start of {name}" for name in starts if found["starts"].get(name, starts[name]) != starts[name]]
    if differing:
        raise SystemExit(f"{folder} holds results with another {', '.join(differing)}: choose another --output_dir")
    write_json(file, {**settings, "starts": {**found["starts"], **starts}})


def start_of(method: str, args: Arguments, labels: list[str], recipe: Recipe) -> dict:
    """What identifies the network that a method starts from: all its tensors, and its front end."""
    set_seed(args.seed)
    with readable_errors():
        model = build_model(method, base_of(method, args), args.corpus, labels, recipe)
    return {"tensors": tensors_sha256(model.state_dict()), "front_end": model.config.front_end}


def run_job(job: Job, accelerator, dataset, store, protocol: Protocol, args: Arguments, recipe: Recipe) -> tuple:
    """Train once, test on each fold's test part: the rows of predictions, and the facts of the training."""
    names = dataset.features["label"].names
    seed = args.seed + 1000 * job.run
    set_seed(seed)
    model = build_model(job.method, base_of(job.method, args), args.corpus, names, recipe)
    training = draw(protocol.indices(dataset, job.folds[0])[0], args.max_train_samples, args.seed)
    started = time.perf_counter()
    history = train(
        accelerator,
        model,
        make_task(dataset, store, training, model.config),
        recipe,
        seed=seed,
        max_train_steps=args.max_train_steps,
        description=job.name,
        alone=True,
    )
    facts = {
        "job": job.name,
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "seconds": round(time.perf_counter() - started, 2),
        "history": history,
    }
    rows = []
    for fold in job.folds:
        testing = protocol.indices(dataset, fold)[2]
        task = make_task(dataset, store, testing, model.config)
        posteriors = predict(model, task, device=accelerator.device, batch_size=args.per_device_eval_batch_size)
        where = {"run": job.run, "fold": fold.name, "method": job.method}
        rows.append(prediction_table(dataset, testing, posteriors, **where))
    return pd.concat(rows), facts


def keep(folder: Path, job: Job, rows: pd.DataFrame, facts: dict) -> None:
    """The predictions come last and in one step: where they are, the fold-run is whole."""
    write_json(folder / f"{job.name}.json", facts)
    partial = folder / f"{job.name}.part"
    rows.to_parquet(partial)
    partial.replace(folder / f"{job.name}.parquet")


def collect(folder: Path, jobs: list[Job]) -> tuple[pd.DataFrame, dict[str, int]]:
    """The predictions of every whole run (a method on all folds), and the number of trained parameters."""
    runs: dict[tuple[str, int], list[Job]] = {}
    for job in jobs:
        runs.setdefault((job.method, job.run), []).append(job)
    whole = [run for run in runs.values() if all((folder / f"{job.name}.parquet").is_file() for job in run)]
    if not whole:
        raise SystemExit(f"{folder}: no run is finished on all folds yet")
    done = [job for run in whole for job in run]
    trained = {job.method: json.loads((folder / f"{job.name}.json").read_text())["trained_parameters"] for job in done}
    return pd.concat([pd.read_parquet(folder / f"{job.name}.parquet") for job in done]), trained


def write_report(folder: Path, predictions: pd.DataFrame, **facts) -> str:
    """predictions.parquet, summary.json, the tables and, where matplotlib is there, the plots."""
    predictions.to_parquet(folder / "predictions.parquet", index=False)
    known = folder / "references.json"  # written by benchmarks/references.py
    references = json.loads(known.read_text()) if known.is_file() else None
    summary = summarize(predictions, references=references, **facts)
    write_json(folder / "summary.json", summary)
    (folder / "table.md").write_text(markdown_table(summary), encoding="utf-8")
    (folder / "table.tex").write_text(latex_table(summary), encoding="utf-8")
    try:
        from hf_s2e.plots import plot_bars, plot_confusion

        plot_bars(summary, folder / "bars.png")
        for method, row in summary["methods"].items():
            plot_confusion(row["confusion"], summary["classes"], folder / f"confusion-{method}.png", title=method)
    except ImportError:
        print("no plots: pip install 'hf-s2e[plots]'")
    return markdown_table(summary)


def main(argv: list[str] | None = None) -> None:
    args, recipe = parse_arguments(Arguments, {}, argv)
    accelerator = make_accelerator(args)
    dataset, store = read_corpus(accelerator, args)
    methods, folder = split_names(args.methods), Path(args.output_dir)
    if unknown := set(methods) - set(METHODS):
        raise SystemExit(f"--methods: unknown {sorted(unknown)}; known are {', '.join(METHODS)}")
    with readable_errors():
        protocol = make_protocol(
            args.protocol,
            dataset,
            corpus=args.corpus,
            seed=args.protocol_seed,
            speaker_disjoint=not args.no_speaker_ids,
        )
    if accelerator.is_main_process:
        (folder / "folds").mkdir(parents=True, exist_ok=True)
        settings = {"corpus": args.corpus, "protocol": protocol.hash, "recipe": asdict(recipe)}
        settings |= {name: getattr(args, name) for name in ("seed", "max_train_steps", "max_train_samples")}
        settings["mixed_precision"] = accelerator.mixed_precision
        classes = dataset.features["label"].names
        check_settings(folder, settings, {m: start_of(m, args, classes, recipe) for m in methods})
        protocol.save(folder / "protocol.json")
        if not (folder / "audit.json").is_file():  # what the numbers may be due to; cards sum it up
            write_json(folder / "audit.json", audit(dataset, protocol=protocol))
    accelerator.wait_for_everyone()
    jobs = list(list_jobs(methods, protocol, args.runs))
    missing = [job for job in jobs if not (folder / "folds" / f"{job.name}.parquet").is_file()]
    accelerator.print(f"{len(jobs)} fold-runs, {len(jobs) - len(missing)} finished before")
    if args.report_only:
        missing = []
    elif accelerator.is_main_process:
        write_json(folder / "environment.json", environment(accelerator))
    for job in missing[accelerator.process_index :: accelerator.num_processes]:
        with readable_errors(f"{job.name}: "):
            keep(folder / "folds", job, *run_job(job, accelerator, dataset, store, protocol, args, recipe))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        predictions, trained = collect(folder / "folds", jobs)
        name = args.recipe_name or (Path(args.recipe).stem if args.recipe else "paper")
        base = args.model_name_or_path or args.plain_model_name_or_path
        print(
            write_report(
                folder,
                predictions,
                corpus=args.corpus,
                protocol=protocol,
                recipe=name,
                base=base and Path(base).name,
                classes=dataset.features["label"].names,
                trained_parameters=trained,
            )
        )
    accelerator.end_training()


if __name__ == "__main__":
    main()
