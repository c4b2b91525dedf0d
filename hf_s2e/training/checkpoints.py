"""How far a run is: loss and speed of its epochs, and checkpoints to resume from."""

import json
import math
import os
import pickle
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError

KEPT_CHECKPOINTS = 2
STATE_FILE = "progress.json"  # written last: a folder without it is no checkpoint
_UNWRITABLE = (OSError, RuntimeError, SafetensorError)  # what full disks make of torch and safetensors
_UNREADABLE = (*_UNWRITABLE, ValueError, KeyError, EOFError, pickle.UnpicklingError)


class TrainingError(RuntimeError):
    """Training cannot go on; the last good checkpoint is where the message says."""


class Meter:
    """Loss, accuracy and speed of one epoch.

    Args:
        bar: a tqdm bar that shows them.
        accelerator: the sums are taken over its processes, but not in an `independent` run.
        before: the `totals` of the epoch so far, where a resumed run begins in its middle.
    """

    def __init__(self, bar, accelerator: Accelerator, independent: bool, before: list[float] | None = None):
        self.bar, self.accelerator = bar, accelerator
        self.shared = accelerator.num_processes > 1 and not independent
        self.before = torch.tensor(before or [0.0] * 4, dtype=torch.float64)
        # of this process since the start or the resumption: loss, batches, right answers, segments
        self.sums = torch.zeros(4, dtype=torch.float64)
        self.unread: list[tuple[torch.Tensor, torch.Tensor, int]] = []
        self.started = _now()

    def update(self, loss: torch.Tensor, right: torch.Tensor, segments: int) -> None:
        """Note one batch, whose loss and number of right answers are still on the device."""
        self.unread.append((loss, right, segments))

    def check(self, step: int, last_good: str) -> None:
        """Read what was noted; raise TrainingError where the loss is not finite."""
        if self.unread:
            losses, right, segments = zip(*self.unread)
            read = [torch.stack(losses).double().sum(), len(losses), torch.stack(right).sum(), sum(segments)]
            self.sums += torch.tensor([float(value) for value in read], dtype=torch.float64)
            self.unread.clear()
        loss, batches, _, segments = (self.sums + self.before).tolist()
        if not math.isfinite(loss):
            raise TrainingError(
                f"The loss is {loss / batches} by step {step}: lower the learning rate or look for damaged "
                f"audio (s2e audit). {last_good}"
            )
        speed = self.sums[3] / (_now() - self.started)
        self.bar.set_postfix_str(f"loss {loss / batches:.3f}, {speed:.0f} segments/s")

    def totals(self) -> list[float]:
        """The sums over all processes, from the epoch's beginning. Every process must ask."""
        return (self.before + self._everywhere()).tolist()

    def row(self) -> dict[str, float]:
        """The epoch as a row of the history. Every process must ask."""
        sums = self._everywhere()
        loss, batches, right, segments = (self.before + sums).tolist()
        return {
            "loss": loss / batches,
            "accuracy": right / segments,
            "segments_per_second": float(sums[3]) / (_now() - self.started),
        }

    def _everywhere(self) -> torch.Tensor:
        if not self.shared:
            return self.sums
        return self.accelerator.reduce(self.sums.to(self.accelerator.device), "sum").cpu()


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Checkpoints:
    """Whole checkpoints only: written beside, then renamed; the older ones go.

    Args:
        folder: where they lie; None writes none.
        every: steps from one to the next; None writes none.
        settings: what two runs must have in common for one to resume from the other's checkpoint.
    """

    def __init__(self, accelerator: Accelerator, folder: Path | None, every: int | None, settings: dict[str, Any]):
        self.accelerator, self.folder, self.every, self.settings = accelerator, folder, every, settings
        self.last_step = 0
        self.last: Path | None = None  # of this run: others may lie in the folder

    def due(self, step: int) -> bool:
        """Whether this step ends with a checkpoint; never between the batches of one optimiser step."""
        if self.folder is None or not self.every:
            return False
        return step - self.last_step >= self.every and self.accelerator.sync_gradients

    def save(self, step: int, **progress: Any) -> None:
        """Write everything that the run needs to go on, and `progress`, which `load` gives back.

        Raises:
            TrainingError: it cannot be written; nothing of it is left.
        """
        target = self.folder / f"step_{step:07d}"
        partial = self.folder / f"{target.name}.part"
        try:
            if self.accelerator.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            self.accelerator.save_state(str(partial))
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                content = json.dumps({"step": step, "settings": self.settings, **progress})
                (partial / STATE_FILE).write_text(content)
                shutil.rmtree(target, ignore_errors=True)
                os.replace(partial, target)
        except _UNWRITABLE as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise TrainingError(
                f"The checkpoint of step {step} cannot be written ({error}). {self.last_good()}"
            ) from error
        self.last_step, self.last = step, target
        if self.accelerator.is_main_process:
            # resumed from an earlier one, a run has later ones still before it
            older = [path for path in finished_checkpoints(self.folder) if path.name <= target.name]
            for old in older[:-KEPT_CHECKPOINTS]:
                shutil.rmtree(old)

    def load(self, folder: Path) -> dict[str, Any]:
        """Put everything back as it was; returns what `save` was given, and the `step`.

        Raises:
            TrainingError: the checkpoint is damaged, or of a run with other settings.
        """
        try:
            progress = json.loads((folder / STATE_FILE).read_text())
            found = progress["settings"]
            differing = [name for name, value in self.settings.items() if found.get(name) != value]
            if not differing:
                self.accelerator.load_state(str(folder))
        except _UNREADABLE as error:
            raise TrainingError(
                f"The checkpoint {folder} cannot be read ({error}): remove it, and resume from the one before."
            ) from error
        if differing:
            pairs = "; ".join(f"{n} {_brief(found.get(n))}, not {_brief(self.settings[n])}" for n in differing)
            raise TrainingError(
                f"The checkpoint {folder} is of a run with other settings ({pairs}): resume with those, or start "
                "anew in another folder."
            )
        self.last_step, self.last = progress["step"], folder
        return progress

    def last_good(self) -> str:
        """This run's, in a sentence; the one that it was resumed from counts."""
        return f"The last good checkpoint is {self.last}." if self.last else "There is no checkpoint yet."


def _brief(value: Any) -> Any:
    return value[:12] if isinstance(value, str) else value  # hashes are long


def refuse_other_checkpoints(folder: Path | None, resume_from: Path | None) -> None:
    """Checkpoints of two runs never share a folder: the newest would be taken for this run's, and none is lost
    without its owner's word.

    Args:
        folder: where this run is to write its own.
        resume_from: the checkpoint that it resumes from; those beside it are of the same run.

    Raises:
        TrainingError: there are some of an earlier run.
    """
    found = finished_checkpoints(folder) if folder else []
    if found and (resume_from is None or resume_from.resolve().parent != found[-1].resolve().parent):
        raise TrainingError(
            f"{folder} holds checkpoints of an earlier run, the newest {found[-1].name}: resume from it with "
            "--resume_from_checkpoint latest, choose another --output_dir, or delete that folder to start anew."
        )


def finished_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted(path.parent for path in Path(folder).glob(f"step_*/{STATE_FILE}") if path.parent.suffix != ".part")
