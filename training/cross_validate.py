"""Cross-validate methods on a corpus: the paper's Table II, with confidence intervals and paired tests.

    accelerate launch training/cross_validate.py --corpus emodb --data_dir DIR --protocol loso --runs 3 \
        --methods plain,fine_tune,residual_adapter --model_name_or_path hub_cards/s2e-resnet20-adapter \
        --plain_model_name_or_path hub_cards/s2e-resnet20-plain --output_dir OUT

The processes share the fold-runs out. Each is kept in OUT/running as soon as it is finished; when the call ends they
are merged into OUT/predictions.parquet and OUT/runs.json. Started again, the job resumes with those that are missing.
OUT/settings.json guards the folder and holds the commands that made it: another corpus, protocol, recipe or base is
refused, further methods and runs are added, and the tables show all runs that are whole. With `--candidates
a.yaml,b.yaml` each fold chooses its recipe by the UA on validation speakers, without its test speakers; those runs
are kept in OUT/validation.parquet. OUT/audit.json has the trivial baselines: what a model may score by without hearing
the emotion.
"""

import hashlib
import json
import shlex
import sys
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import pandas as pd
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import Dataset

from hf_s2e.evaluation.audit import audit
from hf_s2e.evaluation.protocols import Protocol, choice_protocol
from hf_s2e.evaluation.reports import latex_table, markdown_table, summarize
from hf_s2e.model.adapter_files_s2e import tensors_sha256
from hf_s2e.training.arguments import ProtocolArguments, RunArguments, domain_of, parse_arguments, split_names
from hf_s2e.training.fold_runs import (
    Job,
    choose_recipes,
    collect,
    finish_jobs,
    list_choice_jobs,
    list_jobs,
    refuse_other_recipes,
)
from hf_s2e.training.inputs import draw, make_task, read_corpus, read_protocol
from hf_s2e.training.lazy_store import LazyStore
from hf_s2e.training.loop import train
from hf_s2e.training.methods import MAIN_METHODS, METHODS, build_model
from hf_s2e.training.output import prediction_table, write_json
from hf_s2e.training.predict import predict
from hf_s2e.training.recipe import Recipe, read_recipe
from hf_s2e.training.result_folder import ResultFolder, portable
from hf_s2e.training.runtime import environment, make_accelerator, readable_errors
from hf_s2e.training.wave_store import WaveStore

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Arguments(RunArguments, ProtocolArguments):
    methods: str = field(default=",".join(MAIN_METHODS), metadata={"help": ", ".join(METHODS)})
    runs: int = 5
    model_name_or_path: str | None = field(default=None, metadata={"help": "the speaker-trained base"})
    plain_model_name_or_path: str | None = field(
        default=None, metadata={"help": "another base for the methods that make no adapter"}
    )
    candidates: str | None = field(
        default=None,
        metadata={"help": "a.yaml,b.yaml: each fold takes the recipe that is best on validation speakers"},
    )
    recipe_name: str | None = field(
        default=None, metadata={"help": "by default the recipe's file name or `paper`; `-changed` where flags differ"}
    )
    per_device_eval_batch_size: int = 128
    report_only: bool = field(default=False, metadata={"help": "write the tables of the runs that are finished"})
    command: str | None = field(
        default=None, metadata={"help": "what settings.json says that it was run by; by default this command line"}
    )


@dataclass
class Study:
    """What all fold-runs of one call share."""

    args: Arguments
    recipes: dict[str, Recipe]  # by name; several where folds choose
    accelerator: Accelerator
    dataset: Dataset
    store: WaveStore | LazyStore
    protocol: Protocol
    made_by: dict = field(init=False)

    def __post_init__(self) -> None:
        self.made_by = {"environment": environment(self.accelerator)}  # now: files may change while it trains
        self.folder = ResultFolder(self.args.output_dir)
        self.methods = split_names(self.args.methods)
        self.classes = self.dataset.features["label"].names


def check_numbers(args: Arguments) -> None:
    methods = split_names(args.methods)
    if unknown := set(methods) - set(METHODS):
        raise SystemExit(f"--methods: unknown {sorted(unknown)}; known are {', '.join(METHODS)}")
    if not methods or args.runs < 1:
        raise SystemExit(f"--methods {args.methods} --runs {args.runs}: at least one of each is needed")


def read_candidates(args: Arguments, argv: list[str] | None) -> dict[str, Recipe]:
    """The recipes of `--candidates` by their files' names; flags change all of them."""
    files = split_names(args.candidates or "")
    if files and args.recipe:
        raise SystemExit("--candidates and --recipe: name the recipes that compete, or the one that is used")
    argv = sys.argv[1:] if argv is None else argv
    recipes = {Path(file).stem: parse_arguments(Arguments, {}, [*argv, "--recipe", file])[1] for file in files}
    if len(recipes) < len(files) or len(files) == 1:
        raise SystemExit(f"--candidates {args.candidates}: give two or more recipes, each of another name")
    return recipes


def name_of(recipe: Recipe, file: str | None) -> str:
    """The file's name, or `paper`; a flag that changed a setting shows."""
    name, unchanged = (Path(file).stem, Recipe(**read_recipe(file))) if file else ("paper", Recipe())
    return name if recipe == unchanged else f"{name}-changed"


def launch_command(accelerator: Accelerator, argv: list[str]) -> str:
    """The command that started this, as it may be published."""
    state, backend = accelerator.state, accelerator.state.dynamo_plugin.backend
    flags = {"num_processes": state.num_processes, "mixed_precision": state.mixed_precision}
    flags["dynamo_backend"] = backend.value.lower()
    launch = [f"--{name}={value}" for name, value in flags.items() if value not in (1, "no")]
    return shlex.join(["accelerate", "launch", *launch, "training/cross_validate.py", *portable(argv, ROOT)])


def base_of(method: str, args: Arguments) -> str | None:
    """One base for all, or `--plain_model_name_or_path` for the methods that make no adapter, where it is given."""
    plain = None if METHODS[method].makes_adapter else args.plain_model_name_or_path
    return plain or args.model_name_or_path


def check_settings(
    folder: ResultFolder, settings: dict, starts: dict[str, dict], bases: dict[str, str], commands: list[str]
) -> None:
    """Write what all results in the folder share; where there are some, compare it, and add further methods.

    Args:
        settings: the same for every method.
        starts: for each method, the network that it starts from.
        bases: as `bases_by_kind` names them; noted and not compared, as `commands` are.

    Raises:
        SystemExit: the folder holds results made with other settings; the message says which differ.
    """
    file = folder.path / "settings.json"
    found, runs = json.loads(file.read_text()) if file.is_file() else {}, folder.finished().values()
    trained = {facts["method"] for facts in runs}
    if found:
        found["recipe"] = with_defaults(found["recipe"])
    differing = [key for key in settings if found.get(key) != settings[key]]
    choosing = "candidates" in found and "candidates" in settings
    if choosing and all(facts["part"] == "validation" for facts in runs):
        # nothing rests on the choice yet: other recipes may join or leave, while those of one name are the same
        kept = {name: one for name, one in found["recipe"].items() if name in {facts["recipe"] for facts in runs}}
        settings["recipe"] = kept | settings["recipe"]
        same = all(settings["recipe"][name] == recipe for name, recipe in kept.items())
        differing = [key for key in differing if key != "candidates" and not (key == "recipe" and same)]
    before = found.get("starts", {})
    others = [name for name in starts if before.get(name, starts[name]) != starts[name]]
    wrong = differing if trained else []
    wrong += [f"start of {name}" for name in others if name.partition(",")[0] in trained]
    if wrong:
        raise SystemExit(f"{folder.path} holds results with another {', '.join(wrong)}: choose another --output_dir")
    if differing:
        found = {}
        (folder.path / "audit.json").unlink(missing_ok=True)  # of another corpus or protocol
    noted = {name: found.get(name, {}) | new for name, new in (("starts", starts), ("bases", bases))}
    noted["commands"] = list(dict.fromkeys([*found.get("commands", ()), *commands]))
    write_json(file, {**settings, **noted})


def with_defaults(recipe: dict) -> dict:
    """A kept recipe, or several by name, with the settings that the package has had since then at their defaults."""
    if all(isinstance(value, dict) for value in recipe.values()):
        return {name: with_defaults(one) for name, one in recipe.items()}
    return asdict(Recipe()) | recipe


def bases_by_kind(args: Arguments) -> dict[str, str]:
    """The names of the bases: "adapter" for all methods, "plain" where those that make no adapter have another."""
    given = {"adapter": args.model_name_or_path, "plain": args.plain_model_name_or_path}
    return {kind: Path(base).name for kind, base in given.items() if base}


def starts_by_name(folder: ResultFolder) -> dict:
    """What each method starts from, and the base with adapters, or else the plain one, by name."""
    names = json.loads((folder.path / "settings.json").read_text())["bases"]
    base, plain = names.get("adapter"), names.get("plain", names.get("adapter"))
    starts = {
        name: "random weights" if one.from_scratch else base if one.makes_adapter else plain
        for name, one in METHODS.items()
    }
    return {"base": base or plain, "starts": starts}


def start_of(method: str, args: Arguments, labels: list[str], recipe: Recipe) -> dict:
    """What identifies the network that a method starts from: all its tensors, and its front end."""
    set_seed(args.seed)
    with readable_errors():
        model = build_model(method, base_of(method, args), domain_of(args.corpus), labels, recipe)
    return {"tensors": tensors_sha256(model.state_dict()), "front_end": model.config.front_end}


def guard(study: Study) -> None:
    """Build every network once, so that what cannot be built is refused now; then note what is common to all."""
    args, choosing = study.args, bool(study.args.candidates)
    starts = {
        f"{method}, {name}" if choosing else method: start_of(method, args, study.classes, recipe)
        for method in study.methods
        for name, recipe in study.recipes.items()
    }
    settings = {"corpus": args.corpus, "protocol": study.protocol.hash}
    settings["mixed_precision"] = study.accelerator.mixed_precision
    settings |= {name: getattr(args, name) for name in ("seed", "max_train_steps", "max_train_samples")}
    settings["gradient_accumulation_steps"] = args.gradient_accumulation_steps
    settings["audio"] = hashlib.sha256(study.store.lengths.numpy().tobytes()).hexdigest()  # in samples, by utterance
    named = {name: asdict(recipe) for name, recipe in study.recipes.items()}
    settings["recipe"] = named if choosing else next(iter(named.values()))
    if choosing:
        settings["candidates"] = list(study.recipes)  # of equals the first is taken
    path = study.folder.path
    path.mkdir(parents=True, exist_ok=True)
    check_settings(study.folder, settings, starts, bases_by_kind(args), [] if args.report_only else [args.command])
    study.protocol.save(path / "protocol.json")
    if not (path / "audit.json").is_file():  # what the numbers may be due to; cards sum it up
        write_json(path / "audit.json", audit(study.dataset, protocol=study.protocol))


def run_job(study: Study, protocol: Protocol, job: Job) -> tuple[pd.DataFrame, dict]:
    """Train once, test on each fold's part: the rows of predictions, and the facts of the training."""
    args, recipe, dataset = study.args, study.recipes[job.recipe], study.dataset
    seed = args.seed + 1000 * job.run
    set_seed(seed)
    model = build_model(job.method, base_of(job.method, args), domain_of(args.corpus), study.classes, recipe)
    training = draw(protocol.indices(dataset, job.folds[0])[0], args.max_train_samples, args.seed)
    history = train(
        study.accelerator,
        model,
        make_task(dataset, study.store, training, model.config),
        recipe,
        seed=seed,
        max_train_steps=args.max_train_steps,
        description=job.name,
        independent=True,
    )
    rows = []
    for fold in job.folds:
        _, validation, test = protocol.indices(dataset, fold)
        tested = {"validation": validation, "test": test}[job.part]
        task = make_task(dataset, study.store, tested, model.config)
        device, batch_size = study.accelerator.device, args.per_device_eval_batch_size
        posteriors = predict(model, task, device=device, batch_size=batch_size)
        where = {"run": job.run, "fold": fold.name, "method": job.method}
        where |= {"recipe": job.recipe} if job.part == "validation" else {}
        rows.append(prediction_table(dataset, tested, posteriors, **where))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return pd.concat(rows), {"trained_parameters": trained, "history": in_columns(history)} | study.made_by


def in_columns(history: list[dict]) -> dict[str, list]:
    """The rows of a history, one an epoch, as columns; six digits of what is not a whole number."""
    columns = {name: [row[name] for row in history] for row in history[:1] for name in row}
    return {
        name: [value if isinstance(value, int) else float(f"{value:.6g}") for value in column]
        for name, column in columns.items()
    }


def choose(study: Study, inner: Protocol, wanted: list[str], known: list[str]) -> dict:
    """Each fold's recipe by UA on the validation speakers of a `choice_protocol`; the runs of the `wanted`
    methods are finished first."""
    jobs, chosen_by = (list_choice_jobs(methods, inner, study.recipes) for methods in (wanted, known))
    finish_jobs(jobs, study.folder, study.accelerator, partial(run_job, study, inner), "runs that choose a recipe")
    return choose_recipes(chosen_by, study.folder, len(study.classes))


def write_report(folder: Path, predictions: pd.DataFrame, protocol: Protocol, **facts) -> str:
    """summary.json, the tables and, where matplotlib is there, the plots."""
    known = folder / "references.json"  # written by benchmarks/references.py
    references = json.loads(known.read_text()) if known.is_file() else {}
    if stale := [name for name, one in references.items() if one.get("protocol", protocol.hash) != protocol.hash]:
        print(f"references measured under another protocol, left out: {', '.join(stale)}")
    references = {name: one for name, one in references.items() if name not in stale}
    summary = summarize(predictions, protocol=protocol, references=references, **facts)
    write_json(folder / "summary.json", summary)
    (folder / "table.md").write_text(markdown_table(summary), encoding="utf-8")
    (folder / "table.tex").write_text(latex_table(summary), encoding="utf-8")
    try:
        from hf_s2e.evaluation.plots import plot_bars, plot_confusion

        plot_bars(summary, folder / "bars.png")
        for method, row in summary["methods"].items():
            plot_confusion(row["confusion"], summary["classes"], folder / f"confusion-{method}.png", title=method)
    except ImportError:
        print("no plots: pip install 'hf-s2e[plots]'")
    return markdown_table(summary)


def main(argv: list[str] | None = None) -> None:
    args, recipe = parse_arguments(Arguments, {}, argv)
    recipes = read_candidates(args, argv) or {name_of(recipe, args.recipe): recipe}
    check_numbers(args)
    accelerator = make_accelerator(args)
    args.command = args.command or launch_command(accelerator, sys.argv[1:] if argv is None else argv)
    dataset, store = read_corpus(accelerator, args)
    with readable_errors():
        protocol = read_protocol(args, dataset)
        inner = choice_protocol(protocol, dataset) if args.candidates else None
    study = Study(args, recipes, accelerator, dataset, store, protocol)
    if accelerator.is_main_process:
        with readable_errors():
            study.folder.merge()  # what a call has left that was killed
        guard(study)
    accelerator.wait_for_everyone()
    wanted = [] if args.report_only else study.methods
    before = {method for method, _ in study.folder.folds_by_run()}
    known = [name for name in METHODS if name in {*wanted, *before}] or study.methods
    choice = choose(study, inner, wanted, known) if inner else None
    recipe_of = choice["chosen"] if choice else next(iter(recipes))
    if choice:
        refuse_other_recipes(study.folder, recipe_of)
    jobs = list_jobs(wanted, protocol, args.runs, recipe_of)
    finish_jobs(jobs, study.folder, accelerator, partial(run_job, study, protocol), "fold-runs")
    if accelerator.is_main_process:
        predictions, trained = collect(study.folder, protocol)
        facts = {"corpus": args.corpus, "recipe": args.recipe_name or ("chosen" if choice else recipe_of)}
        facts |= starts_by_name(study.folder) | {"classes": study.classes, "trained_parameters": trained}
        print(write_report(study.folder.path, predictions, protocol, **facts, choice=choice))
    accelerator.end_training()


if __name__ == "__main__":
    main()
