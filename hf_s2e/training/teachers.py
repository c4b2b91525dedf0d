"""Distillation: a network that has heard much more speech says what it hears in each segment, and a base learns it.

What a teacher says is computed once, kept on disk in half precision and standardised over the training segments; the
student's last map, by its mean and deviation over frequency, is regressed to it at each of its steps in time by a
linear layer that is thrown away afterwards.
"""

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..audio import SAMPLING_RATE
from ..corpora.index import canonical
from ..model.adapter_files_s2e import HUB_FAILURES, S2EAdapterError, one_line, tensors_sha256
from ..model.atomic_write_s2e import atomic_write
from ..model.feature_extraction_s2e import S2EFrontEnd
from ..model.modeling_s2e import S2EForAudioClassification, S2EModel, pool
from .data import SegmentDataset
from .wave_store import WaveStore

SEGMENTS_AT_ONCE = 64
SAVE_EVERY = 50  # batches after which what was computed is safe
_STATE, _VALUES = "targets.json", "targets.f16"


class TeacherError(ValueError):
    """This teacher cannot be had or used; one sentence that says why."""


class Teacher:
    """Hidden states of a speech network for pieces of sound of one length.

    Args:
        name: `NAME[:LAYER]`, a folder or a Hub id: an audio encoder of transformers with hidden states (Whisper,
            wav2vec2, HuBERT, WavLM), of which LAYER counts the blocks passed (by default half of them), or a base of
            this package, of which LAYER counts the maps from 1 (by default the last).

    Raises:
        TeacherError: there is no such network, or it has no such layer.
    """

    def __init__(self, name: str):
        self.name = name
        self.source, self.layer = _split(name)
        try:
            self._load()
        except (*HUB_FAILURES, S2EAdapterError, ValueError, KeyError) as error:
            if isinstance(error, TeacherError):
                raise
            raise TeacherError(f"--teacher {name}: cannot be loaded ({one_line(error)}).") from error
        self.network.eval().requires_grad_(False)
        self.sha256 = tensors_sha256(self.network.state_dict())

    def _load(self) -> None:
        from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, WhisperForAudioClassification

        config = AutoConfig.from_pretrained(self.source)
        self.kind = config.model_type
        if self.kind == "s2e":
            self.network = S2EModel.from_pretrained(self.source)
            self.front_end = S2EFrontEnd(**config.front_end)
            self.layer = self._checked(len(config.depths) if config.backbone == "campplus" else 1, default_last=True)
            return
        loader = WhisperForAudioClassification if self.kind == "whisper" else AutoModel
        network, info = loader.from_pretrained(
            self.source, use_safetensors=True, output_loading_info=True, dtype=torch.float32
        )
        parts = ("encoder.", "feature_extractor.", "feature_projection.")
        needed = [n for n in info["missing_keys"] if n.startswith(parts) and not n.startswith("encoder.layer_norm.")]
        if needed:
            raise TeacherError(f"--teacher {self.name}: {len(needed)} of its tensors are missing, such as {needed[0]}.")
        self.extractor = AutoFeatureExtractor.from_pretrained(self.source)
        encoder = network.encoder
        self.layer = self._checked(len(encoder.layers))
        # no work for what is not asked, but one block more: what leaves the last one may be normalised
        encoder.layers = encoder.layers[: self.layer + 1]
        self.network = encoder if self.kind == "whisper" else network

    def _checked(self, layers: int, *, default_last: bool = False) -> int:
        layer = self.layer if self.layer is not None else (layers if default_last else max(1, layers // 2))
        if not 1 <= layer <= layers:
            raise TeacherError(f"--teacher {self.name}: layer {layer} was asked for, but it has 1 to {layers}.")
        return layer

    @torch.inference_mode()
    def __call__(self, waves: torch.Tensor, steps: int) -> torch.Tensor:
        """(n, samples) at 16 kHz -> (n, steps, width), frames averaged to so many steps in time."""
        frames = self.hidden_states(waves)
        return F.adaptive_avg_pool1d(frames.float().transpose(1, 2), steps).transpose(1, 2)

    def hidden_states(self, waves: torch.Tensor) -> torch.Tensor:
        """(n, samples) at 16 kHz -> (n, frames, width), of the layer that was asked for."""
        if self.kind == "s2e":
            features = torch.cat([self.front_end(wave) for wave in waves])
            domain = self.network.domains[self.network.config.base_domain]
            return self.network.shared(features, domain)[self.layer - 1].flatten(2).transpose(1, 2)
        inputs = self.extractor(
            list(waves.numpy()), sampling_rate=SAMPLING_RATE, return_tensors="pt", **self._unpadded()
        )
        if self.kind == "whisper":
            self._cut_positions(inputs["input_features"].shape[-1] // 2)
        return self.network(**inputs, output_hidden_states=True).hidden_states[self.layer]

    def _unpadded(self) -> dict[str, Any]:
        return {"padding": "do_not_pad", "truncation": False} if self.kind == "whisper" else {}

    def _cut_positions(self, count: int) -> None:
        """Whisper takes 30 s; of shorter pieces, without padding, the first positions."""
        if self.network.config.max_source_positions != count:
            weight = self.network.embed_positions.weight[:count]
            self.network.embed_positions = nn.Embedding.from_pretrained(weight)
            self.network.config.max_source_positions = count


def _split(name: str) -> tuple[str, int | None]:
    source, colon, layer = name.rpartition(":")
    if colon and layer.isdigit():
        return source, int(layer)
    return name, None


@dataclass
class TeacherTargets:
    """What one teacher says of every segment of a [`SegmentDataset`].

    key: of the audio, the segments and the teacher.
    values: float16 (segments, steps, width), on disk.
    mean, deviation: float32 (width,), over all of them.
    """

    name: str
    key: str
    values: np.ndarray
    mean: torch.Tensor
    deviation: torch.Tensor

    @property
    def width(self) -> int:
        return self.values.shape[2]

    def of(self, segments: torch.Tensor) -> torch.Tensor:
        """int64 (n,) -> standardised float32 (n, steps, width)."""
        values = torch.from_numpy(self.values[segments.cpu().numpy()].astype(np.float32))
        return (values - self.mean) / self.deviation

    @classmethod
    def build(
        cls, teacher: Teacher, data: SegmentDataset, steps: int, folder: str | os.PathLike, *, progress: bool = True
    ) -> "TeacherTargets":
        """Compute them, or go on where a run was stopped, or open what is there.

        They are keyed by the audio itself, the segments, and the teacher's weights and layer.
        """
        place = Path(folder, _key(teacher, data, steps))
        state = json.loads((place / _STATE).read_text()) if (place / _STATE).is_file() else {"done": 0}
        if state["done"] < len(data):
            state = _compute(teacher, data, steps, place, state["done"], progress)
        shape = (len(data), steps, state["width"])
        values = np.memmap(place / _VALUES, np.float16, "r", shape=shape)
        return cls(teacher.name, place.name, values, torch.tensor(state["mean"]), torch.tensor(state["deviation"]))


def _key(teacher: Teacher, data: SegmentDataset, steps: int) -> str:
    store = data.store
    digest = hashlib.sha256()
    for utterance in sorted(set(data.utterances.tolist())):
        first, length = int(store.offsets[utterance]), int(store.lengths[utterance])
        digest.update(store.waves[first : first + length].numpy())
    segments = {"utterances": data.utterances, "starts": data.starts, "speeds": data.speeds}
    facts = [digest.hexdigest(), tensors_sha256(segments), teacher.sha256, teacher.kind, teacher.layer, steps]
    return hashlib.sha256(canonical([*facts, data.front_end.settings]).encode()).hexdigest()[:24]


def _compute(teacher: Teacher, data: SegmentDataset, steps: int, place: Path, done: int, progress: bool) -> dict:
    from tqdm import tqdm

    place.mkdir(parents=True, exist_ok=True)
    width = teacher(torch.zeros(1, data.front_end.segment_length), steps).shape[2]
    size = len(data) * steps * width * 2
    if progress:
        print(f"{teacher.name}: targets of {len(data):,} segments, {size / 1e9:.2f} GB in {place}", flush=True)
    mode = "r+" if (place / _VALUES).is_file() and (place / _VALUES).stat().st_size == size else "w+"
    done = done if mode == "r+" else 0
    values = np.memmap(place / _VALUES, np.float16, mode, shape=(len(data), steps, width))
    bar = tqdm(total=len(data), initial=done, desc=f"teacher {teacher.name}", unit="segment", disable=not progress)
    for batch, first in enumerate(range(done, len(data), SEGMENTS_AT_ONCE), start=1):
        rows = torch.arange(first, min(first + SEGMENTS_AT_ONCE, len(data)))
        values[first : first + len(rows)] = teacher(segment_waves(data, rows), steps).numpy()
        bar.update(len(rows))
        if batch % SAVE_EVERY == 0:
            values.flush()
            _write_state(place, {"done": first + len(rows)})
    bar.close()
    values.flush()
    mean, deviation = _moments(values)
    state = {"done": len(data), "width": width, "mean": mean, "deviation": deviation, "teacher": teacher.name}
    _write_state(place, state)
    return state


def _write_state(place: Path, state: dict) -> None:
    with atomic_write(place / _STATE) as partial:
        partial.write_text(json.dumps(state), encoding="utf-8")


def _moments(values: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and deviation of each number, over segments and steps."""
    total, squares, count = 0.0, 0.0, values.shape[0] * values.shape[1]
    for first in range(0, len(values), 4096):
        part = values[first : first + 4096].astype(np.float64)
        total, squares = total + part.sum((0, 1)), squares + np.square(part).sum((0, 1))
    mean = total / count
    return mean.tolist(), np.sqrt(np.maximum(squares / count - mean**2, 1e-8)).tolist()


def segment_waves(data: SegmentDataset, rows: torch.Tensor) -> torch.Tensor:
    """What the student hears of these segments, without context: float32 (n, segment_length).

    At another speed the piece is resampled by soxr: a teacher hears up to 8 kHz.
    """
    import soxr

    store, length = data.store, data.front_end.segment_length
    pieces = torch.zeros(len(rows), length)
    for piece, row in zip(pieces, rows.tolist()):
        speed, start = float(data.speeds[row]), int(data.starts[row])
        wanted = math.ceil(length * speed)
        wave = store.cut(
            data.utterances[row : row + 1], torch.tensor([start]), wanted, repeat=data.front_end.fill == "repeat"
        )[0].numpy()
        if speed != 1:
            wave = soxr.resample(wave, SAMPLING_RATE * speed, SAMPLING_RATE)
        piece[: min(length, len(wave))] = torch.from_numpy(wave[:length])
    return pieces


class S2EStudent(S2EForAudioClassification):
    """A base in training with teachers: beside its logits it says what each teacher would.

    Args:
        config: the base's.
        widths: of each teacher's hidden states.
    """

    def __init__(self, config: Any, widths: Sequence[int] = ()):
        super().__init__(config)
        heard = 2 * config.embedding_size
        self.regressors = nn.ModuleList(nn.Linear(heard, width) for width in widths)

    def forward(self, input_values: torch.Tensor, **kwargs) -> "StudentOutput":
        """(n, bins, frames) -> `logits` (n, speakers) and `taught`, for each teacher (n, steps, width)."""
        domain = self.config.active_domain
        last = self.s2e.shared(input_values, self.s2e.domains[domain])[-1]
        logits = self.heads[domain](pool(last, self.config.domains[domain].get("pooling", "mean")))
        deviation = last.float().var(dim=2, correction=0).clamp(min=1e-8).sqrt().to(last.dtype)
        heard = torch.cat([last.mean(dim=2), deviation], dim=1).transpose(1, 2)
        return StudentOutput(logits=logits, taught=tuple(regressor(heard) for regressor in self.regressors))

    def base(self) -> S2EForAudioClassification:
        """The network without what was only there to learn by."""
        model = S2EForAudioClassification(self.config)
        model.load_state_dict({n: t for n, t in self.state_dict().items() if not n.startswith("regressors.")})
        return model


@dataclass
class StudentOutput:
    """What [`S2EStudent`] returns."""

    logits: torch.Tensor
    taught: tuple[torch.Tensor, ...]


def steps_of(config: Any) -> int:
    """Steps in time of the last map (13 of the paper's)."""
    with torch.no_grad():
        model, silence = S2EModel(config).eval(), torch.zeros(1, config.num_bins, config.frames_per_segment)
        maps = model.shared(silence, model.domains[config.base_domain])
    return maps[-1].shape[-1]


def distillation(taught: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> torch.Tensor:
    """Smooth L1, averaged over the teachers."""
    return torch.stack([F.smooth_l1_loss(own.float(), said) for own, said in zip(taught, targets)]).mean()


def needs_decoded(store: Any) -> None:
    """Raise TeacherError where audio is decoded lazily: targets are keyed by the audio itself."""
    if not isinstance(store, WaveStore):
        raise TeacherError("--teacher needs the corpus decoded once: leave --decode lazily out.")
