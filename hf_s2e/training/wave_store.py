"""A corpus decoded once into int16, and segments cut out of it on any device."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..audio import AudioError, load_audio
from ..corpora.index import audio_paths
from ..model.atomic_write_s2e import beside

FULL_SCALE = 32768.0


MOST_WORKERS = 16


DEVICE_LIMIT = 4 << 30  # bytes of audio that are kept on the accelerator (4 GiB: 37 h)


@dataclass
class WaveStore:
    """Utterances of a corpus as one long row of int16 samples.

    waves: int16 (samples of all utterances,), memory-mapped or on the accelerator.
    offsets, lengths: int64 (utterances,), in samples.
    """

    waves: torch.Tensor
    offsets: torch.Tensor
    lengths: torch.Tensor
    workers = 0  # processes that a DataLoader needs: there is nothing to decode

    @classmethod
    def of_pieces(cls, pieces: torch.Tensor) -> "WaveStore":
        """Each row of int16 (n, samples) as an utterance."""
        count, samples = pieces.shape
        lengths = torch.full((count,), samples, device=pieces.device)
        return cls(pieces.flatten(), lengths.cumsum(0) - lengths, lengths)

    @classmethod
    def build(cls, dataset, cache_dir: str | os.PathLike, *, progress: bool = True) -> "WaveStore":
        """Decode a corpus (column `audio`, `Audio(decode=False)`) into `cache_dir`, or open what is there.

        The store is keyed by the files' paths, sizes and times, written beside and then renamed: a killed run
        leaves nothing that a later one would take for whole.

        Raises:
            AudioError: a file cannot be read; the message names it.
        """
        paths = audio_paths(dataset)
        folder = Path(cache_dir, corpus_key(paths))
        if not (folder / "index.json").is_file():
            folder.parent.mkdir(parents=True, exist_ok=True)
            partial = beside(folder)
            partial.mkdir()
            try:
                lengths = _decode_all(paths, partial / "waves.i16", progress)
                (partial / "index.json").write_text(json.dumps({"lengths": lengths}))
                os.replace(partial, folder)
            except OSError:
                if not (folder / "index.json").is_file():  # another process or machine may have been faster
                    raise
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        return cls.open(folder)

    @classmethod
    def open(cls, folder: str | os.PathLike) -> "WaveStore":
        lengths = torch.tensor(json.loads(Path(folder, "index.json").read_text())["lengths"])
        total = int(lengths.sum())
        waves = torch.from_file(str(Path(folder, "waves.i16")), shared=False, size=total, dtype=torch.int16)
        return cls(waves, lengths.cumsum(0) - lengths, lengths)

    def to(self, device: torch.device) -> "WaveStore":
        """On the accelerator where it is small enough; otherwise segments are cut here and sent."""
        if device.type == "cpu" or self.waves.numel() * 2 > DEVICE_LIMIT:
            return self
        return WaveStore(self.waves.to(device), self.offsets.to(device), self.lengths.to(device))

    def cut(
        self,
        utterances: torch.Tensor,
        starts: torch.Tensor,
        samples: int,
        speed: torch.Tensor | None = None,
        *,
        repeat: bool = False,
    ) -> torch.Tensor:
        """Pieces of `samples` samples: float32 (n, samples), full scale 1.

        Outside the utterance there is zero, or with `repeat` the utterance again.

        Args:
            utterances, starts: int64 (n,); a start may be negative.
            speed: float (n,); 1.1 plays a piece 10 % faster (linear interpolation: the front end stops at
                4 kHz, far below where that would be heard).
        """
        device = self.waves.device
        utterances, starts = utterances.to(device), starts.to(device)
        time = torch.arange(samples, device=device)
        if speed is None:
            return self._read(utterances, starts[:, None] + time, repeat)
        exact = time * speed.to(device)[:, None]
        whole = exact.floor()
        part, whole = exact - whole, starts[:, None] + whole.long()
        first, second = (self._read(utterances, positions, repeat) for positions in (whole, whole + 1))
        return first * (1 - part) + second * part

    def _read(self, utterances: torch.Tensor, positions: torch.Tensor, repeat: bool) -> torch.Tensor:
        lengths = self.lengths[utterances][:, None]
        positions = positions % lengths if repeat else positions
        inside = (positions >= 0) & (positions < lengths)
        index = torch.where(inside, positions + self.offsets[utterances][:, None], 0)
        return self.waves[index].float().mul_(inside).div_(FULL_SCALE)


def corpus_key(paths: Sequence[str]) -> str:
    """Of these files as they are now: paths, sizes and times. AudioError where one is missing."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            stat = os.stat(path)
        except OSError as error:
            raise AudioError(f"{path}: cannot be opened ({error.strerror}); the corpus has changed.") from error
        digest.update(f"{os.path.abspath(path)}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:24]


def decode(path: str) -> np.ndarray:
    """int16 (samples,) at 16 kHz."""
    return np.clip(np.round(load_audio(path) * FULL_SCALE), -32768, 32767).astype(np.int16)


def map_files(function: Callable, paths: Sequence[str], doing: str, progress: bool) -> Iterator:
    """What `function` makes of each file, in their order, by all cores."""
    from tqdm import tqdm

    workers = min(os.cpu_count() or 1, MOST_WORKERS)
    with ProcessPoolExecutor(workers) as pool:
        results = pool.map(function, paths, chunksize=8)
        yield from tqdm(results, total=len(paths), desc=doing, unit="file", disable=not progress)


def _decode_all(paths: Sequence[str], target: Path, progress: bool) -> list[int]:
    lengths = []
    with open(target, "wb") as file:
        for wave in map_files(decode, paths, "decoding", progress):
            file.write(wave.tobytes())
            lengths.append(len(wave))
    return lengths
