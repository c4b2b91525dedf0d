"""What every training script does around its work: arguments, corpus, environment, trackers."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import HfArgumentParser

from ..feature_extraction_s2e import S2EFrontEnd
from .data import WaveStore
from .engine import Task
from .progress import finished_checkpoints
from .recipe import Recipe, read_recipe


@dataclass
class CorpusArguments:
    """The corpus, and where it is."""

    corpus: str = field(
        default="folder", metadata={"help": "a name of hf_s2e.corpora, e.g. emodb, folder, hub"}
    )
    data_dir: str | None = field(default=None, metadata={"help": "where its recordings are"})
    labels: str | None = field(default=None, metadata={"help": "keep only these classes: a,b,c"})
    corpus_options: str = field(default="{}", metadata={"help": "further options of load_corpus, as JSON"})
    cache_dir: str | None = field(
        default=None, metadata={"help": "for the corpus index and the decoded audio"}
    )
    not_strict: bool = field(
        default=False, metadata={"help": "an incomplete corpus is a warning, not an error"}
    )


@dataclass
class RunArguments(CorpusArguments):
    """The run itself."""

    output_dir: str = field(default="out", metadata={"help": "the repo that is written"})
    recipe: str | None = field(default=None, metadata={"help": "a YAML file with settings of the recipe"})
    seed: int = 0
    max_train_steps: int | None = field(default=None, metadata={"help": "stop after so many optimiser steps"})
    max_train_samples: int | None = field(default=None, metadata={"help": "train on so many utterances only"})
    gradient_accumulation_steps: int = 1
    checkpointing_steps: int | None = field(
        default=None, metadata={"help": "keep a checkpoint every N steps"}
    )
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "a checkpoint's folder, or `latest`"}
    )
    with_tracking: bool = False
    report_to: str = field(default="tensorboard", metadata={"help": "tensorboard or trackio"})
    push_to_hub: bool = False
    hub_model_id: str | None = None
    hub_token: str | None = None
    hub_private_repo: bool = False


def parse_arguments(
    arguments: type, recipe: dict[str, Any], argv: Sequence[str] | None = None
) -> tuple[Any, Recipe]:
    """The script's arguments and its recipe: `recipe` are the script's own defaults, then come the YAML
    file's settings, then what the command line says."""
    parser = HfArgumentParser((arguments, Recipe), allow_abbrev=False)
    parser.set_defaults(**recipe)
    argv = sys.argv[1:] if argv is None else list(argv)
    file = parser.parse_known_args(argv)[0].recipe
    try:
        if file:
            parser.set_defaults(**read_recipe(file))
        return parser.parse_args_into_dataclasses(args=argv)
    except (ValueError, OSError) as error:
        parser.error(str(error))


def make_accelerator(args: RunArguments) -> Accelerator:
    """The accelerator, with seeds set and trackers started; says where it runs."""
    tracking = (
        {"log_with": args.report_to, "project_dir": str(run_folder(args))} if args.with_tracking else {}
    )
    accelerator = Accelerator(gradient_accumulation_steps=args.gradient_accumulation_steps, **tracking)
    set_seed(args.seed)
    accelerator.print(
        f"{accelerator.num_processes} process(es) on {accelerator.device}, "
        f"mixed precision {accelerator.mixed_precision}"
    )
    return accelerator


def run_folder(args: RunArguments) -> Path:
    """Checkpoints, logs and environment: inside the repo that is written, and never pushed."""
    return Path(args.output_dir, "run")


def read_corpus(accelerator: Accelerator, args: CorpusArguments):
    """The corpus as a `datasets.Dataset`, and its audio, decoded once.

    Several corpora, `--corpus a,b --data_dir x,y`, are united; speakers of different corpora stay apart.

    Raises:
        SystemExit: the corpus or a recording cannot be read; the message says why.
    """
    from ..audio import AudioError
    from ..corpora import CorpusError, load_corpus, unite

    options = json.loads(args.corpus_options)
    if args.labels:
        options["labels"] = split_names(args.labels)
    names, folders = args.corpus.split(","), (args.data_dir or "").split(",")
    if len(folders) != len(names):
        raise SystemExit(f"--corpus names {len(names)} corpora, but --data_dir {len(folders)} folders")
    common = {"cache_dir": args.cache_dir, "strict": not args.not_strict}
    try:
        with accelerator.main_process_first():
            loaded = [
                load_corpus(name, data_dir=folder or None, **common, **options.get(name, options))
                for name, folder in zip(names, folders)
            ]
            keys = [f"{name}{i}" if names.count(name) > 1 else name for i, name in enumerate(names)]
            dataset = loaded[0] if len(names) == 1 else unite(dict(zip(keys, loaded)))
            store = WaveStore.build(
                dataset, store_folder(args.cache_dir), progress=accelerator.is_main_process
            )
    except (CorpusError, AudioError) as error:
        raise SystemExit(str(error)) from error
    return dataset, store


def split_names(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def store_folder(cache_dir: str | None) -> Path:
    from huggingface_hub.constants import HF_HOME

    return Path(cache_dir or Path(HF_HOME, "s2e"), "waves")


def make_task(dataset, store: WaveStore, utterances: Sequence[int], config: Any) -> Task:
    return Task(store, list(dataset["label"]), list(utterances), S2EFrontEnd(**config.front_end))


def find_checkpoint(args: RunArguments) -> Path | None:
    """The checkpoint to go on from.

    Raises:
        SystemExit: there is none where one was asked for.
    """
    if args.resume_from_checkpoint is None:
        return None
    folder = run_folder(args) / "checkpoints"
    if args.resume_from_checkpoint == "latest":
        found = finished_checkpoints(folder)
        if not found:
            raise SystemExit(f"--resume_from_checkpoint latest: there is no whole checkpoint in {folder}")
        return found[-1]
    chosen = Path(args.resume_from_checkpoint)
    if not (chosen / "progress.json").is_file():
        raise SystemExit(f"--resume_from_checkpoint {chosen}: not a whole checkpoint of this package")
    return chosen


def write_environment(args: Any, recipe: Recipe, accelerator: Accelerator, **facts: Any) -> None:
    """Arguments, recipe, versions and revision, into the run's folder. Tokens are left out."""
    if not accelerator.is_main_process:
        return
    folder = run_folder(args)
    folder.mkdir(parents=True, exist_ok=True)
    known = {key: value for key, value in asdict(args).items() if "token" not in key}
    write_json(folder / "arguments.json", {"arguments": known, "recipe": asdict(recipe)})
    write_json(folder / "environment.json", environment(accelerator) | facts)


def environment(accelerator: Accelerator) -> dict[str, Any]:
    import accelerate
    import torch
    import transformers

    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else platform.processor() or "cpu"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "device": device,
        "processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        "git_revision": _git_revision(),
    }


def _git_revision() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def write_json(path: Path, content: Any) -> None:
    """In one step: a reader sees the old file or the whole new one."""
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(partial, path)
