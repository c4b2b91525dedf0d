"""The front end: waveform -> mu-law spectrogram segments (section IV-A).

One implementation in torch serves the feature extractor, the pipeline and training on the accelerator.
"""

import functools
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

from .configuration_s2e import FRONT_END_DEFAULTS, frames_of, front_end_settings, validate_front_end

logger = logging.get_logger(__name__)

MAX_SAMPLE = 1e20  # of a sample's size; far beyond it spectrograms overflow float32, and answers are NaN
SILENCE = 1e-5  # floor of the maximum that spectrograms are divided by: silence gives zeros, not noise
# Of Kaldi's log mel energies
PRE_EMPHASIS = 0.97
POVEY_POWER = 0.85
LOWEST_BAND = 20.0  # Hz
ENERGY_FLOOR = 1.19e-7


class S2EFrontEnd:
    """Features of 2 s segments, on whatever device the waveform is on.

    With `features="mu_law_spectrogram"` magnitude spectrograms under the mu-law curve (section IV-A), with `"fbank"`
    80 log mel energies as Kaldi defines them, their mean over the segment taken away.

    Args:
        **settings: the front-end settings of [`S2EConfig`]; those left out have the defaults of the features.

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
        self.settings = front_end_settings(settings)
        validate_front_end(self.settings)
        for name, value in self.settings.items():
            setattr(self, name, value)
        self.frames = frames_of(self.settings)
        # Samples that the first and last frame of a segment reach beyond it: spectrograms are centred.
        self.context = 0 if self.features == "fbank" else self.window_length // 2
        self.segment_samples = (self.frames - 1) * self.hop_length + self.window_length

    def num_segments(self, num_samples: int) -> int:
        """Segments that an utterance of so many samples is cut into: 2 s with 1 s overlap, at least one."""
        beyond = max(0, num_samples - self.segment_length) / self.segment_hop
        return 1 + (math.floor(beyond) if self.drop_tail else math.ceil(beyond))

    def segment_starts(self, num_samples: int) -> list[int]:
        """The first sample of each segment. With `fill="repeat"` the last one ends where the utterance does."""
        starts = [self.segment_hop * i for i in range(self.num_segments(num_samples))]
        if self.fill == "repeat" and num_samples > self.segment_length:  # on a frame
            starts[-1] = min(starts[-1], (num_samples - self.segment_length) // self.hop_length * self.hop_length)
        return starts

    def pad(self, waveform: torch.Tensor) -> torch.Tensor:
        """An utterance (samples,) as long as its segments need, and longer by `context` at either end.

        What is missing are zeros, or with `fill="repeat"` the utterance again, from its start.
        """
        total = self.segment_starts(waveform.shape[-1])[-1] + self.segment_length
        if self.fill == "repeat" and waveform.shape[-1] < total:
            waveform = waveform.repeat(math.ceil(total / waveform.shape[-1]))
        waveform = waveform[..., :total]
        return F.pad(waveform, (self.context, total - waveform.shape[-1] + self.context))

    def spectrum(self, padded: torch.Tensor) -> torch.Tensor:
        """Magnitudes, or with `"fbank"` mel energies: (..., samples) with context -> (..., frames, bins).

        Frame j is centred on sample `j * hop_length` of the waveform without its context, or with `"fbank"` begins
        there.
        """
        frames = padded.unfold(-1, self.window_length, self.hop_length)
        if self.features == "fbank":
            return self._mel_energies(frames)
        window = torch.hamming_window(
            self.window_length, periodic=False, dtype=padded.dtype, device=padded.device
        )  # symmetric
        return torch.fft.rfft(frames * window, n=self.n_fft).abs()[..., : self.num_bins]

    def _mel_energies(self, frames: torch.Tensor) -> torch.Tensor:
        """As Kaldi: of each frame the mean is taken away, then pre-emphasis, Povey's window, power, mel bands."""
        frames = frames - frames.mean(dim=-1, keepdim=True)
        before = torch.cat([frames[..., :1], frames[..., :-1]], dim=-1)
        options = {"dtype": frames.dtype, "device": frames.device}
        window = torch.hann_window(self.window_length, periodic=False, **options).pow(POVEY_POWER)
        spectrum = torch.fft.rfft((frames - PRE_EMPHASIS * before) * window, n=self.n_fft)
        power = spectrum.real.square() + spectrum.imag.square()
        return power @ _mel_bands(self.num_bins, self.n_fft, self.sampling_rate).to(**options)

    def compress(self, spectrum: torch.Tensor, maximum: torch.Tensor | float | None = None) -> torch.Tensor:
        """The features of segments from their spectra, both (..., bins, frames).

        `ln(1 + mu x / xmax) / ln(1 + mu)`, with xmax by default over the last two dimensions; of mel energies the
        natural logarithm, without its mean over the frames.
        """
        if self.features == "fbank":
            logarithm = spectrum.clamp(min=ENERGY_FLOOR).log()
            return logarithm - logarithm.mean(dim=-1, keepdim=True) if self.normalization == "segment" else logarithm
        if self.normalization != "none":
            if maximum is None:
                maximum = spectrum.amax(dim=(-2, -1), keepdim=True)
            maximum = torch.as_tensor(maximum, dtype=spectrum.dtype, device=spectrum.device)
            spectrum = spectrum / maximum.clamp(min=SILENCE)
        return torch.log1p(self.mu * spectrum) / math.log1p(self.mu)

    def centred(self, waveforms: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
        """Segments with context (batch, segment_samples), each without its mean; what is not `inside` the utterance
        stays zero."""
        count = inside.sum(dim=-1, keepdim=True).clamp(min=1)
        return torch.where(inside, waveforms - (waveforms * inside).sum(dim=-1, keepdim=True) / count, 0.0)

    def peak(self, waveform: torch.Tensor) -> float:
        """The largest magnitude of an utterance (samples,): what `normalization="utterance"` divides by."""
        return float(self.spectra(waveform).amax())

    def __call__(self, waveform: torch.Tensor, maximum: float | None = None) -> torch.Tensor:
        """One utterance (samples,) -> (segments, bins, frames).

        `maximum` replaces the utterance's own largest magnitude where `normalization="utterance"`.
        """
        spectra = self.spectra(waveform)
        if self.normalization == "utterance" and maximum is None:
            maximum = spectra.amax()
        return self.compress(spectra.transpose(-2, -1), maximum)

    def spectra(self, waveform: torch.Tensor) -> torch.Tensor:
        """The spectrum of an utterance (samples,), segment by segment: (segments, frames, bins)."""
        padded, starts = self.pad(waveform), self.segment_starts(waveform.shape[-1])
        if self.remove_dc:  # each segment has its own mean
            inside = self.pad(torch.ones_like(waveform)).bool()
            rows, valid = (
                torch.stack([of[start : start + self.segment_samples] for start in starts]) for of in (padded, inside)
            )
            return self.spectrum(self.centred(rows, valid))
        spectrum = self.spectrum(padded)
        first = [start // self.hop_length for start in starts]
        return torch.stack([spectrum[frame : frame + self.frames] for frame in first])


@functools.lru_cache(maxsize=4)
def _mel_bands(count: int, n_fft: int, sampling_rate: int) -> torch.Tensor:
    """Weights (bins, bands) of triangles that are equally wide on the mel scale, from 20 Hz to half the rate."""

    def mel(frequency):
        return 1127.0 * torch.log1p(torch.as_tensor(frequency, dtype=torch.float64) / 700.0)

    edges = torch.linspace(float(mel(LOWEST_BAND)), float(mel(sampling_rate / 2)), count + 2, dtype=torch.float64)
    bins = mel(torch.arange(n_fft // 2 + 1, dtype=torch.float64) * sampling_rate / n_fft)[:, None]
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    weights = torch.minimum((bins - left) / (centre - left), (right - bins) / (right - centre)).clamp(min=0)
    weights[-1] = 0  # Kaldi leaves the highest bin out
    return weights.float()


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
        settings = front_end_settings(kwargs)
        for name in (*settings, "feature_size"):
            kwargs.pop(name, None)
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
