"""Emotion from sounds of any kind and length: `S2EPipeline`, the task "speech-emotion-recognition"."""

import itertools
import math
from array import array
from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import IterableDataset
from transformers import AudioClassificationPipeline, AutoModelForAudioClassification
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.utils import logging

from .audio import AudioError, describe, read_blocks, rereadable
from .model.feature_extraction_s2e import S2EFeatureExtractor, S2EFrontEnd
from .model.modeling_s2e import S2EClassifierOutput, aggregate_segments

logger = logging.get_logger(__name__)

TASK = "speech-emotion-recognition"
# Segments in one forward pass. On a CPU more only costs memory: a layer's output has 10 MB a segment.
SEGMENTS_ON_CPU = 8
SEGMENTS_ON_ACCELERATOR = 64
_APPLY = ("softmax", "sigmoid", "none")


class S2EPipeline(AudioClassificationPipeline):
    """Audio classification that reads, mixes down and resamples by itself, in bounded memory.

    Made by `pipeline("audio-classification", model=X, pipeline_class=S2EPipeline)`, by
    `pipeline("speech-emotion-recognition", model=X)` once the package is imported, or directly from a model.
    A sound is cut into blocks of segments, each with the context that its outer frames need, so that an hour
    is answered with the same posterior as if it were held at once.

    Args:
        feature_extractor: by default the one that belongs to the model's config.
        top_k: number of classes in an answer, most probable first; None for all. Also for each call.
        batch_size: sounds of a list, generator or dataset that share forward passes. Does not change answers.
        **kwargs: as in transformers' pipelines, and the parameters of a call.

    Example:
        >>> import numpy as np
        >>> from hf_s2e import S2EConfig, S2EForAudioClassification
        >>> model = S2EForAudioClassification(S2EConfig(id2label={0: "calm", 1: "upset"}))
        >>> classify = S2EPipeline(model)
        >>> noise = np.random.default_rng(0).normal(scale=0.1, size=3 * 44_100)  # or "speech.wav", or a URL
        >>> answer = classify(noise, sampling_rate=44_100, return_timestamps=True)
        >>> sorted(entry["label"] for entry in answer["scores"])
        ['calm', 'upset']
        >>> [chunk["timestamp"] for chunk in answer["chunks"]]
        [(0.0, 2.0), (1.0, 3.0)]
    """

    def __init__(self, model, feature_extractor=None, **kwargs):
        if feature_extractor is None:
            feature_extractor = S2EFeatureExtractor.from_model_config(model.config)
        kwargs.setdefault("top_k", None)  # the parent would set 5, and forget it in every call
        super().__init__(model=model, feature_extractor=feature_extractor, **kwargs)

    def __call__(self, inputs: Any, **kwargs) -> Any:
        """Classify one sound, or the sounds of a list, generator or dataset.

        Args:
            inputs: what :func:`hf_s2e.audio.read_blocks` takes, or several of it.
            sampling_rate: in Hz, of arrays that do not come in a dict with theirs.
            top_k: see the class.
            function_to_apply: `"softmax"` (posteriors), `"none"` (their logarithms) or `"sigmoid"`.
            return_timestamps: answer with a timeline, see below.
            batch_size: see the class.

        Returns:
            For one sound `[{"score": float, "label": str}, ...]`. With `return_timestamps`
            `{"scores": [...], "chunks": [{"timestamp": (start, end), "scores": [...]}, ...]}`, one chunk a
            segment, times in seconds. For a list a list of these, for a generator or dataset an iterator;
            there a sound that cannot be used gives `{"file": ..., "error": ...}` and the others are answered.

        Raises:
            AudioError: a single sound cannot be used.
        """
        if hasattr(inputs, "column_names"):
            raise TypeError(f"A {type(inputs).__name__} is not a sound: give its column of sounds, dataset['audio'].")
        if isinstance(inputs, (list, tuple)):
            inputs = list(inputs)
            if not inputs:  # transformers looks at the first one
                return []
        elif isinstance(inputs, Sequence) and not isinstance(inputs, (str, bytes, bytearray, memoryview, array)):
            inputs = (sound for sound in inputs)  # a column of datasets, read sound by sound
        return super().__call__(inputs, **kwargs)

    def check_model_type(self, supported_models) -> None:
        if getattr(self.model.config, "model_type", None) != "s2e" or not hasattr(self.model, "heads"):
            raise TypeError(
                f"S2EPipeline got a {type(self.model).__name__}; expected an S2EForAudioClassification. For "
                'other models use pipeline("audio-classification").'
            )

    def _sanitize_parameters(self, **parameters):
        parameters.pop("local_files_only", None)  # of from_pretrained; transformers hands it on
        known = {"sampling_rate", "top_k", "function_to_apply", "return_timestamps"}
        if unknown := set(parameters) - known:
            raise TypeError(f"S2EPipeline does not know {sorted(unknown)}; it takes {sorted(known)}.")
        top_k = parameters.get("top_k")
        if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
            raise ValueError(f"top_k is {top_k!r}; expected a number of classes from 1 up, or None for all.")
        apply = parameters.get("function_to_apply")
        if apply is not None and apply not in _APPLY:
            raise ValueError(f"function_to_apply is {apply!r}; expected one of {', '.join(_APPLY)}.")
        preprocess = {name: parameters.pop(name) for name in ("sampling_rate",) if name in parameters}
        return preprocess, {}, parameters

    def postprocess(self, model_outputs, samples, top_k=None, function_to_apply=None, return_timestamps=False):
        """Scores of one sound of so many samples."""
        classes = self.model.config.num_labels

        def scores(logits):
            return super(S2EPipeline, self).postprocess(
                S2EClassifierOutput(logits=logits), min(top_k or classes, classes), function_to_apply or "softmax"
            )

        if not return_timestamps:
            return scores(model_outputs.logits)
        front_end = self.feature_extractor.front_end
        rate, length = front_end.sampling_rate, front_end.segment_length
        log_posteriors = F.log_softmax(model_outputs.segment_logits[0], dim=-1)
        chunks = [
            {
                "timestamp": (start / rate, min(start + length, samples) / rate),
                "scores": scores(row[None]),
            }
            for start, row in zip(front_end.segment_starts(samples), log_posteriors)
        ]
        return {"scores": scores(model_outputs.logits), "chunks": chunks}

    def run_single(self, inputs, preprocess_params, forward_params, postprocess_params):
        (answer,) = self._answers([inputs], preprocess_params, postprocess_params)
        if isinstance(answer, AudioError):
            raise answer
        return answer

    def get_iterator(self, inputs, num_workers, batch_size, preprocess_params, forward_params, postprocess_params):
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected a number of sounds from 1 up.")
        if num_workers:
            logger.warning_once("S2EPipeline decodes in this process: num_workers has no effect.")
        indexed = isinstance(inputs, Sized) and not isinstance(inputs, IterableDataset)
        sources = (inputs[i] for i in range(len(inputs))) if indexed else iter(inputs)
        return self._iterate(sources, batch_size, preprocess_params, postprocess_params)

    def _iterate(self, sources, batch_size, preprocess_params, postprocess_params) -> Iterator[Any]:
        while group := list(itertools.islice(sources, batch_size)):
            answers = self._answers(group, preprocess_params, postprocess_params)
            for source, answer in zip(group, answers):
                failed = isinstance(answer, AudioError)
                yield {"file": describe(source), "error": str(answer)} if failed else answer

    def _answers(self, sources: list, preprocess_params: dict, postprocess_params: dict) -> list[Any]:
        """One answer, or the AudioError, for each of the sounds, which share forward passes."""
        self.model.eval()  # one in training would answer by a sound's neighbours, and learn from them
        # One growing buffer a sound: many small tensors among the large ones would hold on to the whole heap.
        logits = [array("f") for _ in sources]
        samples: list[int] = [0] * len(sources)
        errors: dict[int, AudioError] = {}
        waiting: list[tuple[int, torch.Tensor]] = []
        for index, source in enumerate(sources):
            try:
                for segments, samples[index] in self._segments(source, **preprocess_params):
                    waiting.append((index, segments))
                    if sum(len(segments) for _, segments in waiting) >= self._segments_at_once:
                        self._classify(waiting, logits)
            except AudioError as error:
                errors[index] = error
        self._classify(waiting, logits)
        return [
            errors[index]
            if index in errors
            else self.postprocess(self._utterance(logits[index]), samples[index], **postprocess_params)
            for index in range(len(sources))
        ]

    @property
    def _segments_at_once(self) -> int:
        return SEGMENTS_ON_CPU if self.device.type == "cpu" else SEGMENTS_ON_ACCELERATOR

    def _classify(self, waiting: list[tuple[int, torch.Tensor]], logits: list[array]) -> None:
        """Run the network over the waiting segments and add each sound's to `logits`."""
        if not waiting:
            return
        segments = torch.cat([segments for _, segments in waiting]).to(self.model.dtype)
        found = self.forward({"input_values": segments}).segment_logits.squeeze(1)  # (segments, classes)
        for (index, _), part in zip(waiting, found.split([len(segments) for _, segments in waiting])):
            logits[index].frombytes(part.numpy().tobytes())
        waiting.clear()

    def _utterance(self, logits: array) -> S2EClassifierOutput:
        """The logits of all segments of one sound to what the model returns for a batch of it alone."""
        segment_logits = torch.frombuffer(logits, dtype=torch.float32).view(-1, self.model.config.num_labels)
        mask = torch.ones(1, len(segment_logits), dtype=torch.bool)
        posterior = aggregate_segments(F.log_softmax(segment_logits, dim=-1), mask, self.model.config.aggregation)
        return S2EClassifierOutput(logits=posterior, segment_logits=segment_logits[None])

    def _segments(self, source, sampling_rate=None) -> Iterator[tuple[torch.Tensor, int]]:
        """Spectrograms (n, bins, frames) block by block, and the number of samples read until then."""
        front_end = self.feature_extractor.front_end

        def chunks():
            blocks = read_blocks(source, sampling_rate=sampling_rate)
            for start, waveform, *margins in _chunks(blocks, front_end, self._segments_at_once):
                yield start, torch.from_numpy(waveform).to(self.device), *margins

        maximum = None
        if front_end.normalization == "utterance":
            source = rereadable(source)
            maximum = max(_peak(front_end, *chunk) for _, *chunk in chunks())
        for start, waveform, left, right in chunks():
            segments = front_end(waveform, maximum)
            yield segments[left : len(segments) - right], start + len(waveform)


def _chunks(
    blocks: Iterable[np.ndarray], front_end: S2EFrontEnd, count: int
) -> Iterator[tuple[int, np.ndarray, int, int]]:
    """Cut a stream of samples into chunks that overlap so much that every segment is whole in one of them.

    The spectrogram is centred: the first and last frames of a segment reach half a window beyond it. So a
    chunk of `count` segments comes with neighbours, which are left out of its result.

    Yields:
        first sample, waveform (samples,), and how many segments to leave out at its start and at its end.
    """
    hop, length = front_end.segment_hop, front_end.segment_length
    # segments: one, unless they overlap almost wholly; the last one may begin before its turn
    margin = max(math.ceil(front_end.context / hop), int(front_end.fill == "repeat"))
    start, left, held = 0, 0, np.zeros(0, np.float32)
    for block in blocks:
        held = np.concatenate([held, block])
        while len(held) >= (size := length + hop * (left + count + margin - 1)):
            yield start, held[:size], left, margin
            step = hop * (left + count - margin)
            start, left, held = start + step, margin, held[step:]
    yield start, held, left, 0


def _peak(front_end: S2EFrontEnd, waveform: torch.Tensor, left: int, right: int) -> float:
    """The largest magnitude in the segments of a chunk that are not left out."""
    spectra = front_end.spectra(waveform)
    return float(spectra[left : len(spectra) - right].amax())


PIPELINE_REGISTRY.register_pipeline(
    TASK, pipeline_class=S2EPipeline, pt_model=AutoModelForAudioClassification, type="audio"
)
# Registering marks the class so that save_pretrained writes `custom_pipelines` into the model's config, which
# would ask everyone for trust_remote_code, also where this package is installed.
del S2EPipeline._registered_impl
