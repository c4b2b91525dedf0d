"""Corpora that are too large to be decoded into a store: what a batch needs is decoded in workers."""

import functools
import math
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from ..audio import SAMPLING_RATE, load_audio
from ..corpora.index import audio_paths
from ..model.atomic_write_s2e import atomic_write
from .wave_store import corpus_key, decode, map_files

EXACT_HEADERS = ("WAV", "WAVEX", "FLAC")  # their headers say how many samples there are, others' about how many


class LazyStore:
    """Utterances of a corpus that stay in their files; only their lengths are in memory.

    lengths: int64 (utterances,), in samples at 16 kHz.
    workers: processes that decode.
    """

    def __init__(self, dataset, lengths: torch.Tensor, workers: int):
        self.audio, self.lengths, self.workers = dataset.select_columns("audio"), lengths, workers

    @classmethod
    def build(cls, dataset, cache_dir: str | os.PathLike, *, progress: bool = True, workers: int = 1):
        """Look how long every recording is, or read it from `cache_dir`, keyed as [`WaveStore.build`] does.

        Raises:
            AudioError: a file cannot be read; the message names it.
        """
        paths = audio_paths(dataset)
        file = Path(cache_dir, f"{corpus_key(paths)}.lengths.npy")
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            lengths = np.fromiter(map_files(_length, paths, "measuring", progress), np.int64, len(paths))
            with atomic_write(file) as partial, open(partial, "wb") as target:
                np.save(target, lengths)
        return cls(dataset, torch.from_numpy(np.load(file)), workers)

    def to(self, device: torch.device) -> "LazyStore":
        return self

    def read(
        self, utterances: Iterable[int], starts: Iterable[int], samples: int, *, repeat: bool = False
    ) -> torch.Tensor:
        """Pieces of `samples` samples: int16 (n, samples); a start may be negative.

        Outside the utterance there is zero, or with `repeat` the utterance again.

        Raises:
            AudioError: a file cannot be read any more; the message names it.
        """
        pieces = []
        for utterance, start in zip(utterances, starts):
            wave = _decode(self.audio[int(utterance)]["audio"]["path"])
            if repeat:
                pieces.append(np.take(wave, np.arange(start, start + samples), mode="wrap"))
                continue
            wave = wave[max(0, start) : max(0, start + samples)]
            before = min(samples, max(0, -start))
            pieces.append(np.pad(wave, (before, samples - before - len(wave))))
        return torch.from_numpy(np.stack(pieces))


# one after the other, the segments of an utterance are decoded once
_decode = functools.lru_cache(maxsize=2)(decode)


def _length(path: str) -> int:
    import soundfile

    try:
        header = soundfile.info(path)
    except soundfile.LibsndfileError:
        header = None
    if header is None or header.format not in EXACT_HEADERS or not header.frames:  # an empty one is refused
        return len(load_audio(path))
    return math.ceil(header.frames * SAMPLING_RATE / header.samplerate)
