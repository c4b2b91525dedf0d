"""The arguments of the training scripts: each field is a flag; a recipe's settings are flags too."""

import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from .recipe import Recipe, read_recipe


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


def split_names(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def domain_of(corpus: str) -> str:
    """The domain of a corpus: its name, or of `module:Class` what a domain may be called."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", corpus).strip("-_")


def run_folder(args: RunArguments) -> Path:
    """Checkpoints, logs and environment: inside the repo that is written, and never pushed."""
    return Path(args.output_dir, "run")


def checkpoint_folder(args: RunArguments) -> Path:
    return run_folder(args) / "checkpoints"


def known_arguments(args: Any) -> dict[str, Any]:
    """The arguments that may be written down: tokens may not."""
    return {key: value for key, value in asdict(args).items() if "token" not in key}
