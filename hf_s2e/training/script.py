"""What every training script does around its work: arguments, corpus, environment, trackers."""

import json
import os
import platform
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, InitProcessGroupKwargs, set_seed
from safetensors import SafetensorError
from transformers import HfArgumentParser

from ..adapter_files_s2e import S2EAdapterError
from ..feature_extraction_s2e import S2EFrontEnd
from ..protocols import Protocol, make_protocol
from ..utterances import few, text_column, utterance_ids
from ..whole_s2e import written_whole
from .data import WaveStore
from .engine import Task
from .lazy import LazyStore
from .progress import TrainingError, finished_checkpoints
from .recipe import Recipe, read_recipe

TRACKERS = ("tensorboard", "trackio")


@dataclass
class CorpusArguments:
    """The corpus, and where it is."""

    corpus: str = field(default="folder", metadata={"help": "a name of hf_s2e.corpora, e.g. emodb, folder, hub"})
    data_dir: str | None = field(default=None, metadata={"help": "where its recordings are"})
    labels: str | None = field(default=None, metadata={"help": "keep only these classes: a,b,c"})
    corpus_options: str = field(default="{}", metadata={"help": "further options of load_corpus, as JSON"})
    cache_dir: str | None = field(default=None, metadata={"help": "for the corpus index and the decoded audio"})
    not_strict: bool = field(default=False, metadata={"help": "an incomplete corpus is a warning, not an error"})
    decode: str = field(
        default="once",
        metadata={"help": "once, into --cache_dir (115 MB an hour), or lazily, in workers, at every use"},
    )
    dataloader_num_workers: int | None = field(
        default=None,
        metadata={
            "help": "processes that decode, with --decode lazily; by default the cores of each process' share. "
            "Without effect with --decode once, which decodes by all cores beforehand"
        },
    )


@dataclass
class ProtocolArguments(CorpusArguments):
    """What the corpus is divided by."""

    protocol: str = field(default="loso", metadata={"help": "loso, 5fold, emobox6, session or split"})
    protocol_seed: int = 0
    no_speaker_ids: bool = field(default=False, metadata={"help": "accept a split that may share speakers"})


@dataclass
class RunArguments(CorpusArguments):
    """The run itself."""

    output_dir: str = field(default="out", metadata={"help": "what is written"})
    recipe: str | None = field(default=None, metadata={"help": "a YAML file with settings of the recipe"})
    seed: int = 0
    max_train_steps: int | None = field(default=None, metadata={"help": "stop after so many batches"})
    max_train_samples: int | None = field(
        default=None, metadata={"help": "train on so many utterances only, drawn from all speakers by --seed"}
    )
    gradient_accumulation_steps: int = field(
        default=1,
        metadata={"help": "batches for one optimiser step; epochs and steps are counted in batches"},
    )


@dataclass
class RepoArguments(RunArguments):
    """A run whose result is a repo."""

    checkpointing_steps: int | None = field(default=None, metadata={"help": "keep a checkpoint every N steps"})
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "a checkpoint's folder, or `latest`; without it --checkpointing_steps refuses an --output_dir "
            "that holds checkpoints of an earlier run"
        },
    )
    with_tracking: bool = False
    report_to: str = field(default="tensorboard", metadata={"help": "tensorboard or trackio"})
    push_to_hub: bool = field(default=False, metadata={"help": "publish the repo, and its base if need be"})
    hub_model_id: str | None = field(default=None, metadata={"help": "by default the name of --output_dir"})
    hub_token: str | None = None
    hub_private_repo: bool = False


def parse_arguments(arguments: type, recipe: dict[str, Any], argv: Sequence[str] | None = None) -> tuple[Any, Recipe]:
    """The script's arguments and its recipe: `recipe` are the script's own defaults, then come the YAML
    file's settings, then what the command line says.

    Raises:
        SystemExit: a setting cannot be meant; one line on stderr names it.
    """
    parser = HfArgumentParser((arguments, Recipe), allow_abbrev=False)
    parser.set_defaults(**recipe)
    argv = sys.argv[1:] if argv is None else list(argv)
    file = parser.parse_known_args(argv)[0].recipe
    try:
        if file:
            parser.set_defaults(**read_recipe(file))
        return parser.parse_args_into_dataclasses(args=argv)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {' '.join(str(error).split())}\n")


def make_accelerator(args: RunArguments) -> Accelerator:
    """The accelerator, with seeds set; says where it runs."""
    tracking = {}
    if getattr(args, "with_tracking", False):
        if args.report_to not in TRACKERS or find_spec(args.report_to) is None:
            raise SystemExit(f"--report_to {args.report_to}: must be one of {TRACKERS}, and installed")
        tracking = {"log_with": args.report_to, "project_dir": str(run_folder(args))}
    # the first process of each machine decodes the corpus while the others wait
    patience = InitProcessGroupKwargs(timeout=timedelta(days=1))
    accelerator = Accelerator(
        gradient_accumulation_steps=getattr(args, "gradient_accumulation_steps", 1),
        kwargs_handlers=[patience],
        dataloader_config=DataLoaderConfiguration(non_blocking=True),
        **tracking,
    )
    set_seed(args.seed)
    accelerator.print(
        f"{accelerator.num_processes} process(es) on {accelerator.device}, "
        f"mixed precision {accelerator.mixed_precision}"
    )
    return accelerator


def start_trackers(accelerator: Accelerator, args: RepoArguments, recipe: Recipe) -> Callable[[dict], None]:
    """Start what `--report_to` names; returns what notes an epoch of the history there."""
    settings = _known(args) | asdict(recipe)
    simple = {k: v if isinstance(v, int | float | str) else str(v) for k, v in settings.items()}
    accelerator.init_trackers("s2e", simple)
    return lambda row: accelerator.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])


@contextmanager
def readable_errors(doing: str = "") -> Iterator[None]:
    """End the script with the message alone where it is about something that its user can mend."""
    try:
        yield
    except (ValueError, OSError, S2EAdapterError, SafetensorError, TrainingError) as error:
        raise SystemExit(f"{doing}{error}") from error


def run_folder(args: RunArguments) -> Path:
    """Checkpoints, logs and environment: inside the repo that is written, and never pushed."""
    return Path(args.output_dir, "run")


def checkpoint_folder(args: RunArguments) -> Path:
    return run_folder(args) / "checkpoints"


def read_corpus(accelerator: Accelerator, args: CorpusArguments):
    """The corpus as a `datasets.Dataset`, and its audio, decoded once.

    Several corpora, `--corpus a,b --data_dir x,y`, are united; speakers of different corpora stay apart.

    Raises:
        SystemExit: the corpus or a recording cannot be read; the message says why.
    """
    from ..corpora import load_corpus, unite

    names = args.corpus.split(",")
    folders = (args.data_dir or "").split(",") if len(names) > 1 else [args.data_dir or ""]  # one may have a comma
    options = _corpus_options(args, names)
    if len(folders) != len(names):
        raise SystemExit(f"--corpus names {len(names)} corpora, but --data_dir {len(folders)} folders")
    common = {"cache_dir": args.cache_dir, "strict": not args.not_strict}
    with readable_errors(), accelerator.local_main_process_first():  # of each machine: caches may be its own
        loaded = [
            load_corpus(name, data_dir=folder or None, **common, **options[name])
            for name, folder in zip(names, folders)
        ]
        keys = [f"{name}{i}" if names.count(name) > 1 else name for i, name in enumerate(names)]
        dataset = loaded[0] if len(names) == 1 else unite(dict(zip(keys, loaded)))
        store = build_store(dataset, accelerator, args)
    return dataset, store


def _corpus_options(args: CorpusArguments, names: list[str]) -> dict[str, dict[str, Any]]:
    """Each corpus' own entry of `--corpus_options`, or all of them where it has none; `--labels` goes with both."""
    with readable_errors("--corpus_options: "):
        options = json.loads(args.corpus_options)
    of_each = {name: options.get(name, options) if isinstance(options, dict) else options for name in names}
    for name, found in of_each.items():
        if not isinstance(found, dict):
            raise SystemExit(
                f"--corpus_options: {json.dumps(found)} for {name}, but expected options in JSON, "
                'like {"OPTION": VALUE}, or {"CORPUS": {"OPTION": VALUE}}'
            )
    labels = {"labels": split_names(args.labels)} if args.labels else {}
    return {name: found | labels for name, found in of_each.items()}


def build_store(dataset, accelerator: Accelerator, args: CorpusArguments) -> WaveStore | LazyStore:
    """The audio as `--decode` says."""
    folder, progress = store_folder(args.cache_dir), accelerator.is_main_process
    if args.decode == "once":
        try:
            return WaveStore.build(dataset, folder, progress=progress)
        except OSError as error:
            raise OSError(
                f"the decoded audio cannot be kept in {folder} ({error}): choose another --cache_dir or --decode lazily"
            ) from error
    if args.decode != "lazily":
        raise ValueError(f"--decode is {args.decode!r}, but must be once or lazily")
    workers = args.dataloader_num_workers
    if workers is None:
        workers = max(1, (os.cpu_count() or 1) // accelerator.num_processes)
    return LazyStore.build(dataset, folder, progress=progress, workers=workers)


def domain_of(corpus: str) -> str:
    """The domain of a corpus: its name, or of `module:Class` what a domain may be called."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", corpus).strip("-_")


def split_names(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def speakers_of(dataset) -> list[str]:
    """Every utterance's speaker; SystemExit where one has none, so that nobody is learnt or left out unseen."""
    speakers = text_column(dataset, "speaker") or [""] * len(dataset)
    if "" in speakers:
        nameless = [name for name, speaker in zip(utterance_ids(dataset), speakers) if not speaker]
        raise SystemExit(
            f"{len(nameless)} of {len(dataset)} utterances have no speaker ({few(nameless)}), which is needed here: "
            "name them, or leave these utterances out"
        )
    return speakers


def rows_by_speaker(dataset, names: str | None, flag: str) -> tuple[list[int], list[int]]:
    """Row numbers of the other speakers, and of those that `names` (a,b) has; all and none where it has none."""
    if not (chosen := set(split_names(names or ""))):
        return list(range(len(dataset))), []
    speakers = speakers_of(dataset)
    if unknown := chosen - set(speakers):
        raise SystemExit(f"{flag}: no {sorted(unknown)} in the corpus, only {sorted(set(speakers))}")
    others = [row for row, speaker in enumerate(speakers) if speaker not in chosen]
    return others, [row for row, speaker in enumerate(speakers) if speaker in chosen]


def store_folder(cache_dir: str | None) -> Path:
    from huggingface_hub.constants import HF_HOME

    return Path(cache_dir or Path(HF_HOME, "s2e"), "waves")


def read_protocol(args: ProtocolArguments, dataset) -> Protocol:
    """The folds. Raises ValueError where the corpus has not what the protocol needs."""
    disjoint = not args.no_speaker_ids
    return make_protocol(args.protocol, dataset, corpus=args.corpus, seed=args.protocol_seed, speaker_disjoint=disjoint)


def draw(rows: Sequence[int], count: int | None, seed: int) -> list[int]:
    """So many of these rows by seed, in their order; all of them where `count` is None."""
    if count is None or count >= len(rows):
        return list(rows)
    return sorted(random.Random(seed).sample(list(rows), count))


def make_task(dataset, store: WaveStore, utterances: Sequence[int], config: Any) -> Task:
    return Task(store, list(dataset["label"]), list(utterances), S2EFrontEnd(**config.front_end))


def find_checkpoint(args: RepoArguments) -> Path | None:
    """The checkpoint to go on from.

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


def write_record(args: Any, recipe: Recipe, made_by: dict[str, Any], history: list[dict]) -> None:
    """What made the model beside this folder: arguments and recipe, environment and history; no tokens, and no
    scores of a model that was here before."""
    folder = run_folder(args)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("evaluation.json", "predictions.parquet"):
        (folder / name).unlink(missing_ok=True)
    write_json(folder / "arguments.json", {"arguments": _known(args), "recipe": asdict(recipe)})
    write_json(folder / "environment.json", made_by)
    write_json(folder / "history.json", history)


def _known(args: Any) -> dict[str, Any]:
    """The arguments that may be written down: tokens may not."""
    return {key: value for key, value in asdict(args).items() if "token" not in key}


def environment(accelerator: Accelerator) -> dict[str, Any]:
    """Versions, device and, where the package is run from its repository, revision and whether it was changed."""
    import accelerate
    import torch
    import transformers

    from .. import __version__

    used = accelerator.device
    device = torch.cuda.get_device_name(used) if used.type == "cuda" else platform.processor() or used.type
    return {
        "hf_s2e": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "device": device,
        "processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        **_git(),
    }


def _git() -> dict[str, Any]:
    """`git_revision` and `git_changed` of the repository that this file is tracked in, nulls where it is in none.

    A package installed below another repository is no part of it, though git would answer with its revision.
    """

    def ask(*command: str) -> str:
        git = ["git", "--no-optional-locks", "-C", str(Path(__file__).parent), *command]
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()

    try:
        ask("ls-files", "--error-unmatch", Path(__file__).name)
        changed = ask("status", "--porcelain", "--untracked-files=no", "--", "..", "../../training")
        return {"git_revision": ask("rev-parse", "HEAD"), "git_changed": bool(changed)}
    except (OSError, subprocess.CalledProcessError):
        return {"git_revision": None, "git_changed": None}


def prediction_table(dataset, utterances: Sequence[int], posteriors: np.ndarray, **columns: Any):
    """One row an utterance, as hf_s2e.reports reads them; `columns` (run, fold, method) come first."""
    import pandas as pd

    part = dataset.select(utterances)
    return pd.DataFrame(
        {
            **columns,
            "utterance": np.asarray(utterance_ids(dataset))[list(utterances)],
            "speaker": ["" if speaker is None else str(speaker) for speaker in part["speaker"]],
            "label": np.asarray(part["label"]),
            "prediction": posteriors.argmax(axis=1),
            "posterior": [row.round(6).tolist() for row in posteriors],
        }
    )


def write_json(path: Path, content: Any) -> None:
    """In one step: a reader sees the old file or the whole new one."""
    with written_whole(path) as file:
        file.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
