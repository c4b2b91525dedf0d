"""The front end: waveform -> mu-law spectrogram segments (section IV-A).

One implementation in torch serves the feature extractor, the pipeline and training on the accelerator.
"""

import math
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import SequenceFeatureExtractor
from transformers.feature_extraction_utils import BatchFeature
from transformers.utils import logging

from .configuration_s2e import FRONT_END_DEFAULTS, validate_front_end

logger = logging.get_logger(__name__)

MAX_SAMPLE = 1e20  # of a sample's size; far beyond it spectrograms overflow float32, and answers are NaN
SILENCE = 1e-5  # floor of the maximum that spectrograms are divided by: silence gives zeros, not noise


class S2EFrontEnd:
    """Mu-law magnitude spectrograms of 2 s segments, on whatever device the waveform is on.

    Args:
        **settings: the front-end settings of [`S2EConfig`]; those left out have their defaults.

    Example:
        >>> front_end = S2EFrontEnd()
        >>> waveform = torch.sin(2 * torch.pi * 220 * torch.arange(56_000) / 16_000)  # 3.5 s of 220 Hz
        >>> spectrograms = front_end(waveform)  # from 0, 1 and 2 s, the last one padded
        >>> spectrograms.shape  # segments, bins of 10 Hz, frames of 10 ms
        torch.Size([3, 400, 200])
        >>> spectrograms[0, :, 100].argmax()
        tensor(22)
    """

    def __init__(self, **settings):
        unknown = set(settings) - set(FRONT_END_DEFAULTS)
        if unknown:
            raise TypeError(f"unknown front-end settings {sorted(unknown)}; known are {sorted(FRONT_END_DEFAULTS)}")
        self.settings = FRONT_END_DEFAULTS | settings
        validate_front_end(self.settings)
        for name, value in self.settings.items():
            setattr(self, name, value)
        self.frames = self.segment_length // self.hop_length
        # Samples of one segment with the half windows that its first and last frame reach beyond it.
        self.context = self.window_length // 2
        self.segment_samples = (self.frames - 1) * self.hop_length + self.window_length

    def num_segments(self, num_samples: int) -> int:
        """Segments that an utterance of so many samples is cut into: 2 s with 1 s overlap, at least one."""
        beyond = max(0, num_samples - self.segment_length) / self.segment_hop
        return 1 + (math.floor(beyond) if self.drop_tail else math.ceil(beyond))

    def pad(self, waveform: torch.Tensor) -> torch.Tensor:
        """Zero-pad an utterance (samples,) to whole segments, and by half a window at either end."""
        total = self.segment_length + self.segment_hop * (self.num_segments(waveform.shape[-1]) - 1)
        waveform = waveform[..., :total]
        return F.pad(waveform, (self.context, total - waveform.shape[-1] + self.context))

    def magnitude(self, padded: torch.Tensor) -> torch.Tensor:
        """Magnitude spectrogram: (..., samples) with context on both sides -> (..., frames, bins).

        Frame j is centred on sample `j * hop_length` of the waveform without its context.
        """
        window = torch.hamming_window(
            self.window_length, periodic=False, dtype=padded.dtype, device=padded.device
        )  # symmetric
        frames = padded.unfold(-1, self.window_length, self.hop_length) * window
        return torch.fft.rfft(frames, n=self.n_fft).abs()[..., : self.num_bins]

    def mu_law(self, magnitude: torch.Tensor, maximum: torch.Tensor | float | None = None) -> torch.Tensor:
        """`ln(1 + mu x / xmax) / ln(1 + mu)` of (..., bins, frames); xmax by default over the last two."""
        if self.normalization != "none":
            if maximum is None:
                maximum = magnitude.amax(dim=(-2, -1), keepdim=True)
            maximum = torch.as_tensor(maximum, dtype=magnitude.dtype, device=magnitude.device)
            magnitude = magnitude / maximum.clamp(min=SILENCE)
        return torch.log1p(self.mu * magnitude) / math.log1p(self.mu)

    def segments(self, waveforms: torch.Tensor, maximum: torch.Tensor | float | None = None) -> torch.Tensor:
        """Spectrograms of segments cut out by the caller: (batch, segment_samples) -> (batch, bins, frames).

        Each row has `context` samples before the segment; training makes its batches by the same steps. With
        `normalization="utterance"` the caller gives the [`peak`] of each row's utterance as `maximum`,
        (batch, 1, 1).
        """
        if self.normalization == "utterance" and maximum is None:
            raise ValueError(
                "normalization='utterance' needs maximum=, the largest magnitude of each row's utterance (see peak)."
            )
        return self.mu_law(self.magnitude(waveforms).transpose(-2, -1), maximum)

    def peak(self, waveform: torch.Tensor) -> float:
        """The largest magnitude of an utterance (samples,): what `normalization="utterance"` divides by."""
        return float(self.magnitudes(waveform).amax())

    def __call__(self, waveform: torch.Tensor, maximum: float | None = None) -> torch.Tensor:
        """One utterance (samples,) -> (segments, bins, frames).

        `maximum` replaces the utterance's own largest magnitude where `normalization="utterance"`.
        """
        magnitude = self.magnitudes(waveform)
        if self.normalization == "utterance" and maximum is None:
            maximum = magnitude.amax()
        # (frames, bins) -> (segments, bins, frames of the segment)
        return self.mu_law(magnitude.unfold(0, self.frames, self.segment_hop // self.hop_length), maximum)

    def magnitudes(self, waveform: torch.Tensor) -> torch.Tensor:
        """Magnitude spectrogram (samples,) -> (frames, bins) of just the frames that are in segments."""
        count = self.num_segments(waveform.shape[-1])
        frames = self.frames + self.segment_hop // self.hop_length * (count - 1)
        return self.magnitude(self.pad(waveform))[:frames]


class S2EFeatureExtractor(SequenceFeatureExtractor):
    """Makes `input_values` (batch, segments, 400, 200) and `attention_mask` (batch, segments) from waveforms.

    Args:
        **kwargs: the front-end settings of [`S2EConfig`], of which this is the mirror in
            `preprocessor_config.json`.

    Example:
        >>> extract = S2EFeatureExtractor()
        >>> noise = np.random.default_rng(0).normal(scale=0.1, size=56_000)
        >>> batch = extract([noise, noise[:32_000]], sampling_rate=16_000, return_tensors="pt")  # 3.5 and 2 s
        >>> batch["input_values"].shape
        torch.Size([2, 3, 400, 200])
        >>> batch["attention_mask"].tolist()
        [[1, 1, 1], [1, 0, 0]]
    """

    model_input_names = ["input_values", "attention_mask"]  # noqa: RUF012
    _auto_class = "AutoFeatureExtractor"

    def __init__(self, *, padding_value: float = 0.0, **kwargs):
        settings = {name: kwargs.pop(name, default) for name, default in FRONT_END_DEFAULTS.items()}
        kwargs.pop("feature_size", None)
        super().__init__(
            feature_size=settings["num_bins"],
            sampling_rate=settings["sampling_rate"],
            padding_value=padding_value,
            **kwargs,
        )
        validate_front_end(settings)
        for name, value in settings.items():
            setattr(self, name, value)

    @classmethod
    def from_model_config(cls, config: Any) -> "S2EFeatureExtractor":
        """The extractor that a model with this configuration was trained with."""
        return cls(**config.front_end)

    @property
    def front_end(self) -> S2EFrontEnd:
        return S2EFrontEnd(**{name: getattr(self, name) for name in FRONT_END_DEFAULTS})

    def __call__(
        self,
        raw_speech: Any,
        sampling_rate: int | None = None,
        return_tensors: str | None = None,
        **kwargs,
    ) -> BatchFeature:
        """Spectrogram segments of one waveform or a list of them.

        Args:
            raw_speech: 1-D float waveform(s), full scale 1: an array, a tensor, a list of floats, or a list
                of these. A 2-D array is a batch of waveforms.
            sampling_rate: Hz. Must be this extractor's (16000); give it, so that a wrong rate is noticed:
                without it there is a warning.
            return_tensors: `"pt"` or `"np"` (the default).
            **kwargs: as of [`pad`].

        Returns:
            `input_values` float32 (batch, segments, bins, frames), zero-padded to the longest utterance, and
            `attention_mask` int64 (batch, segments), 1 where there is a segment.

        Raises:
            ValueError: another sampling rate, empty audio, more than one channel, integers, NaN or infinite
                samples, a kind of padding other than to the longest.
            TypeError: a keyword that is not known.

        Warns:
            UserWarning: a waveform in which every sample is zero.
        """
        if sampling_rate is None:
            logger.warning_once(
                f"S2EFeatureExtractor got audio without its sampling rate and takes it for "
                f"{self.sampling_rate} Hz; pass sampling_rate=, so that a wrong rate is noticed."
            )
        elif sampling_rate != self.sampling_rate:
            raise ValueError(
                f"The audio has a sampling rate of {sampling_rate} Hz, but this feature extractor takes "
                f"{self.sampling_rate} Hz. Resample it first, or use S2EPipeline, which does."
            )
        front_end = self.front_end
        return self.pad(
            {"input_values": [front_end(_waveform(item)) for item in _as_list(raw_speech)]},
            return_tensors=return_tensors,
            **kwargs,
        )

    def pad(
        self,
        processed_features: Any,
        padding: bool | str = True,
        max_length: int | None = None,
        truncation: bool = False,
        pad_to_multiple_of: int | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
    ) -> BatchFeature:
        """Utterances of different numbers of segments as one batch; what `DataCollatorWithPadding` calls.

        Args:
            processed_features: a list of dicts, or a dict of lists, with `input_values` (segments, bins,
                frames), where there is one `attention_mask` (segments,), and anything else that has one
                value for each utterance.
            padding, max_length, truncation, pad_to_multiple_of, return_attention_mask: of transformers;
                only padding to the longest utterance, and with a mask, is known.
            return_tensors: `"pt"` or `"np"` (the default).

        Returns:
            What a call returns, and the other values.

        Raises:
            ValueError: there is nothing to pad, another kind of padding is asked for, or other values are no
                numbers.
        """
        if padding not in (True, "longest") or max_length or truncation or pad_to_multiple_of:
            raise ValueError("S2EFeatureExtractor pads to the longest utterance of a batch, and in no other way.")
        items = processed_features
        if not isinstance(items, Mapping):
            items = {name: [item[name] for item in items] for name in (items[0] if items else ())}
        if not len(items.get("input_values", ())):
            raise ValueError("There is nothing to pad: no utterance with input_values.")
        spectrograms = [torch.as_tensor(item) for item in items["input_values"]]
        masks = items.get("attention_mask")
        masks = [torch.ones(len(item)) for item in spectrograms] if masks is None else masks
        longest = max(len(item) for item in spectrograms)
        values = torch.full((len(spectrograms), longest, *spectrograms[0].shape[1:]), float(self.padding_value))
        mask = torch.zeros(len(spectrograms), longest, dtype=torch.long)
        for row, (item, known) in enumerate(zip(spectrograms, masks)):
            values[row, : len(item)] = item
            mask[row, : len(item)] = torch.as_tensor(known)
        data = {"input_values": values, "attention_mask": mask}
        for name in [name for name in items if name not in data]:
            column = np.asarray(items[name])
            if column.dtype.kind not in "biuf":
                raise ValueError(f"Column {name!r} holds no numbers, so it has no place in a batch: remove it before.")
            data[name] = torch.as_tensor(column)
        if return_tensors != "pt":
            data = {name: tensor.numpy() for name, tensor in data.items()}
        return BatchFeature(data, tensor_type=return_tensors)


def _as_list(raw_speech: Any) -> list:
    if isinstance(raw_speech, (np.ndarray, torch.Tensor)):
        if raw_speech.ndim not in (1, 2):
            raise ValueError(f"Audio of shape {tuple(raw_speech.shape)}: expected (samples,) or (batch, samples).")
        return [raw_speech] if raw_speech.ndim == 1 else list(raw_speech)
    if not isinstance(raw_speech, (list, tuple)):
        raise ValueError(f"Audio is a {type(raw_speech).__name__}: expected an array, a tensor or a list of these.")
    if not raw_speech:
        raise ValueError("Empty audio: a list with no waveform in it.")
    if np.ndim(raw_speech[0]) == 0:  # one waveform, sample by sample
        return [np.asarray(raw_speech)]
    return list(raw_speech)


def _waveform(item: Any) -> torch.Tensor:
    is_tensor = isinstance(item, torch.Tensor)
    waveform = item.detach() if is_tensor else np.array(item)
    if not (waveform.is_floating_point() if is_tensor else waveform.dtype.kind == "f"):
        raise ValueError(
            f"A waveform of {waveform.dtype} samples: expected floats of full scale 1 (int16 samples / "
            "32768). S2EPipeline takes integers and files too."
        )
    if not is_tensor:
        with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused below
            waveform = torch.from_numpy(waveform.astype(np.float32))
    if waveform.ndim != 1:
        raise ValueError(
            f"A waveform of shape {tuple(waveform.shape)}: expected one channel, (samples,). Mix the "
            "channels down first, or use S2EPipeline, which does."
        )
    if not waveform.numel():
        raise ValueError("Empty audio: the waveform has no samples; at least one is needed.")
    waveform = waveform.to(torch.float32)
    if not (waveform.abs() <= MAX_SAMPLE).all():
        raise ValueError(
            f"The waveform has NaN or infinite samples, or some beyond {MAX_SAMPLE:g}: expected finite "
            "samples of full scale 1. Repair or leave out this recording."
        )
    if not waveform.any():
        warnings.warn(f"Silence: all {waveform.numel()} samples of a waveform are zero.", stacklevel=3)
    return waveform
