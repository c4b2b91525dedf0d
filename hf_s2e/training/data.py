"""The data path of training: which segments make a batch, and their spectrograms on the accelerator."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ..model.feature_extraction_s2e import S2EFrontEnd
from .augment import Augment
from .checkpoints import TrainingError
from .lazy_store import LazyStore
from .recipe import Recipe
from .wave_store import WaveStore


@dataclass
class Task:
    """What is trained on: audio, its labels, and which utterances."""

    store: WaveStore | LazyStore
    labels: Sequence[int]
    utterances: Sequence[int]
    front_end: S2EFrontEnd


class SegmentDataset(Dataset):
    """The training segments of some utterances: which utterance, where it begins, which class.

    From a [`WaveStore`] it reads no audio: `cut` does, on the store's device, once a batch is known. From a
    [`LazyStore`] it reads the samples (`waves`), in a worker.

    Args:
        store: a `WaveStore` or a `LazyStore`.
        random_crop: each segment begins anywhere in its utterance, by seed, epoch and batch.
        speed_perturbation: lazily read pieces are so much longer, to be played faster.
        speeds: every utterance comes at each of these speeds, with segments of its own.
    """

    def __init__(
        self,
        store,
        labels: Sequence[int],
        utterances: Sequence[int],
        front_end: S2EFrontEnd,
        *,
        random_crop: bool = False,
        speed_perturbation: float = 0.0,
        speeds: Sequence[float] = (1.0,),
        seed: int = 0,
    ):
        self.store, self.front_end, self.random_crop, self.seed, self.epoch = store, front_end, random_crop, seed, 0
        self.samples = math.ceil(front_end.segment_samples * (1 + speed_perturbation) * max(speeds)) + 1
        utterances = torch.as_tensor(utterances, dtype=torch.int64).repeat(len(speeds))
        played = torch.tensor(speeds, dtype=torch.float64).repeat_interleave(len(utterances) // len(speeds))
        lengths = (store.lengths[utterances] / played).ceil().long().tolist()
        starts = [front_end.segment_starts(length) for length in lengths]
        # how many segments each of the utterances has, in their order
        self.counts = torch.tensor([len(of_one) for of_one in starts], dtype=torch.int64)
        self.utterances = utterances.repeat_interleave(self.counts)
        self.speeds = played.repeat_interleave(self.counts).float()
        first = torch.tensor([start for of_one in starts for start in of_one], dtype=torch.float64)
        self.starts = (first * self.speeds).long()  # in the recording, which is played at that speed
        self.labels = torch.as_tensor(np.asarray(labels, dtype=np.int64))[self.utterances]

    def __len__(self) -> int:
        return len(self.utterances)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        index = torch.as_tensor(indices)
        utterances, starts = self.utterances[index], self.starts[index]
        if self.random_crop:
            draw = np.random.default_rng([self.seed % 2**32, self.epoch, *indices])
            length = (self.front_end.segment_length * self.speeds[index]).long()
            free = (self.store.lengths[utterances] - length).clamp(min=0)
            starts = (torch.from_numpy(draw.random(len(indices))) * (free + 1)).long()
        batch = {"index": index, "utterance": utterances, "start": starts, "labels": self.labels[index]}
        batch["speed"] = self.speeds[index]
        if not isinstance(self.store, WaveStore):
            begin = (starts - (self.front_end.context * self.speeds[index]).long()).tolist()
            repeat = self.front_end.fill == "repeat"
            batch["waves"] = self.store.read(utterances.tolist(), begin, self.samples, repeat=repeat)
        return batch


def segments_of(task: Task, recipe: Recipe, seed: int) -> SegmentDataset:
    """The segments that a recipe trains on."""
    return SegmentDataset(
        task.store,
        task.labels,
        task.utterances,
        task.front_end,
        random_crop=recipe.random_crop,
        speed_perturbation=recipe.speed_perturbation,
        speeds=recipe.speeds,
        seed=seed,
    )


class ShuffledBatches(Sampler):
    """Batches in an order that depends on the seed and the epoch alone, so that a resumed run sees the same.

    The last, incomplete batch of an epoch is left out (batch norm on a handful of segments harms), unless it
    is the only one. With `balance`, every class gives the same number of segments, drawn with replacement.
    """

    def __init__(self, labels: torch.Tensor, batch_size: int, seed: int, *, balance: bool = False):
        self.labels, self.batch_size, self.seed, self.balance = (
            labels,
            min(batch_size, len(labels)),
            seed,
            balance,
        )
        # no set_epoch(): accelerate's loader would call it with a count of its own, 0 after a resumption
        self.epoch = 0
        self.drop_last = True

    def __len__(self) -> int:
        return len(self.labels) // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        if self.balance:
            weight = 1.0 / torch.bincount(self.labels)[self.labels].double()
            order = torch.multinomial(weight, len(self.labels), replacement=True, generator=generator)
        else:
            order = torch.randperm(len(self.labels), generator=generator)
        for first in range(0, len(self) * self.batch_size, self.batch_size):
            yield order[first : first + self.batch_size].tolist()


class Features:
    """Batches of segments -> features, on the accelerator or where the audio is, augmented if asked."""

    def __init__(self, task: Task, recipe: Recipe, device: torch.device):
        self.front_end, self.recipe, self.device = task.front_end, recipe, device
        self.store = task.store.to(device)
        self.peaks = _peaks(task, self.store, device)

    @torch.no_grad()
    def __call__(
        self,
        utterances: torch.Tensor,
        starts: torch.Tensor,
        augment: Augment | None = None,
        waves: torch.Tensor | None = None,
        speeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """int64 (n,), int64 (n,) -> float32 (n, bins, frames)

        Args:
            speeds: float32 (n,), at which the pieces are played; None is as they were recorded.
            waves: int16 (n, samples), from half a window before each start, where a worker has read them.
        """
        front_end, store = self.front_end, self.store
        to = {"device": self.device, "non_blocking": True}  # from pinned memory: nothing waits
        utterances, starts = utterances.to(**to), starts.to(**to)
        speed = None if speeds is None or bool((speeds == 1).all()) else speeds.to(**to)
        context = front_end.context if speed is None else (front_end.context * speed).long()
        rows, begin = utterances, starts - context
        if waves is not None:
            store = WaveStore.of_pieces(waves.to(**to))
            rows, begin = torch.arange(len(rows), device=rows.device), torch.zeros_like(starts)
        drawn = None if augment is None else augment.speed(len(starts))
        speed = drawn if speed is None else speed if drawn is None else speed * drawn
        repeat = front_end.fill == "repeat"
        waves = store.cut(rows, begin, front_end.segment_samples, speed, repeat=repeat).to(**to)
        if front_end.remove_dc:
            waves = front_end.centred(waves, self._inside(utterances, starts, waves.shape[-1], speed))
        if augment is not None:
            waves = augment.waveforms(waves)
        spectrum = front_end.spectrum(waves).transpose(-2, -1)
        if augment is not None:
            spectrum = augment.channel(spectrum, power=front_end.features == "fbank")
        maximum = None if self.peaks is None else self.peaks[utterances][:, None, None]
        features = front_end.compress(spectrum, maximum)
        return features if augment is None else augment.masks(features)

    def _inside(
        self, utterances: torch.Tensor, starts: torch.Tensor, samples: int, speed: torch.Tensor | None
    ) -> torch.Tensor:
        """Which samples of the pieces are of their utterance: bool (n, samples)."""
        time = torch.arange(samples, device=self.device)
        time = time if speed is None else time * speed[:, None]
        positions = (starts - self.front_end.context)[:, None] + time
        lengths = self.store.lengths.to(self.device)[utterances][:, None]
        return (positions >= 0) & (positions < lengths)


def segment_loader(data: SegmentDataset, device: torch.device, **batches) -> DataLoader:
    return DataLoader(
        data,
        collate_fn=_as_it_is,
        num_workers=data.store.workers,
        pin_memory=device.type == "cuda",
        **batches,
    )


def _as_it_is(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return batch


def _peaks(task: Task, store: WaveStore, device: torch.device) -> torch.Tensor | None:
    """Each utterance's largest magnitude, where `normalization="utterance"` needs it."""
    if task.front_end.normalization != "utterance":
        return None
    if not isinstance(store, WaveStore):
        raise TrainingError("normalization='utterance' needs whole utterances: decode them once, not lazily.")
    peaks = torch.zeros(len(store.lengths), device=device)
    zero = torch.zeros(1, dtype=torch.int64)
    for utterance in set(task.utterances):
        wave = store.cut(torch.tensor([utterance]), zero, int(store.lengths[utterance]))[0]
        peaks[utterance] = task.front_end.peak(wave.to(device))
    return peaks
