"""Where a training runs: accelerate, trackers, environment, memory, and errors in one line."""

import ctypes
import platform
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, InitProcessGroupKwargs, set_seed
from safetensors import SafetensorError

from ..model.adapter_files_s2e import S2EAdapterError
from .arguments import RepoArguments, RunArguments, known_arguments, run_folder
from .checkpoints import TrainingError
from .recipe import Recipe

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's mallopt


TRACKERS = ("tensorboard", "trackio")


def make_accelerator(args: RunArguments) -> Accelerator:
    """The accelerator, with seeds set; says where it runs."""
    tracking = {}
    if getattr(args, "with_tracking", False):
        if args.report_to not in TRACKERS or find_spec(args.report_to) is None:
            raise SystemExit(f"--report_to {args.report_to}: must be one of {TRACKERS}, and installed")
        tracking = {"log_with": args.report_to, "project_dir": str(run_folder(args))}
    # the first process of each machine decodes the corpus while the others wait
    timeout = InitProcessGroupKwargs(timeout=timedelta(days=1))
    accelerator = Accelerator(
        gradient_accumulation_steps=getattr(args, "gradient_accumulation_steps", 1),
        kwargs_handlers=[timeout],
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
    settings = known_arguments(args) | asdict(recipe)
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


def environment(accelerator: Accelerator) -> dict[str, Any]:
    """Versions, device and, where the package is run from its repository, revision and whether it was changed."""
    import accelerate
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


def keep_freed_memory() -> None:
    """Let glibc keep what is freed: by default every activation's pages go back to the kernel and are faulted
    in again at the next step: half of the time (benchmarks/training_speed.py measures it)."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)
