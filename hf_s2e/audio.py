"""Sound from anywhere to what the network hears: 16 kHz, mono, float32.

soundfile decodes (wav, flac, ogg/opus, mp3, ...), PyAV what soundfile does not know (m4a/AAC, mp4, webm),
soxr resamples; neither the ffmpeg program nor torchaudio is needed. Everything is read in blocks, so that a
recording of any length fits into bounded memory.
"""

import contextlib
import io
import itertools
import math
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

SAMPLING_RATE = 16_000  # Hz; the one that S2EConfig takes
MAX_SAMPLE = 1e20  # what the feature extractor refuses too: far beyond it spectrograms overflow float32
BLOCK_SECONDS = 10  # of one block; 31 MB for 8 channels at 96 kHz
MAX_CHANNELS = 16  # an array's axis up to this size may be the channels, a longer one is time
MAX_RATE = 10_000_000  # Hz; ultrasound has less
MIN_RATE = 1_000  # Hz; below it the number is a mistake, most often kilohertz
URL_TIMEOUT = 10.0  # seconds without an answer
AUDIO_EXTENSIONS = (
    *(".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".au", ".caf", ".w64"),
    *(".m4a", ".aac", ".mp4", ".webm"),  # these need PyAV
)

# What PyAV may open. Playlists are left out on purpose: they would make it read other files and addresses.
_AV_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,aac,matroska,webm,asf,amr,flv,avi,mpegts,mp3"
# Full range of integer samples: value = (sample - offset) / scale
_INTEGER_RANGE = {"uint8": (128, 2.0**7), "int8": (0, 2.0**7), "int16": (0, 2.0**15), "int32": (0, 2.0**31)}
_BYTES = (bytes, bytearray, memoryview)
_PLACES = ("raw", "array", "bytes", "path")  # of a sound in a dict; the first that is there counts
_ACCEPTED = (
    "a path, an http(s) URL, bytes, a binary file object, a numpy or torch array with `sampling_rate`, "
    'or a dict with "array" (or "raw") and "sampling_rate", or with "bytes" or "path"'
)


class AudioError(ValueError):
    """This sound cannot be used: the message says what was found, what was expected and what to do."""


def load_audio(source: Any, *, sampling_rate: float | None = None) -> np.ndarray:
    """The whole sound as a waveform, float32 of shape (samples,) at 16 kHz.

    Takes, and refuses, what :func:`read_blocks` does; `sampling_rate` in Hz is that of an array.

    Example:
        >>> import soundfile
        >>> stereo = np.random.default_rng(0).normal(scale=0.1, size=(44_100, 2))  # 1 s
        >>> soundfile.write("noise.flac", stereo, 44_100)
        >>> load_audio("noise.flac").shape
        (16000,)
        >>> load_audio(stereo, sampling_rate=44_100).shape
        (16000,)
    """
    return np.concatenate(list(read_blocks(source, sampling_rate=sampling_rate)))


def read_blocks(source: Any, *, sampling_rate: float | None = None) -> Iterator[np.ndarray]:
    """Read a sound of any length in bounded memory.

    Yields float32 blocks of shape (samples,) at 16 kHz, of about 10 s each. Joined, they have
    ceil(frames * 16000 / rate) samples: what resampling the whole at once gives.

    `source` is a path, an http(s) URL, bytes, a binary file object (read from its start), a numpy or torch
    array, or a dict as `datasets` and the transformers pipelines have it. A file brings its own rate;
    an array needs `sampling_rate` in Hz. It is (frames,), (frames, channels) or (channels, frames): the axis
    of at most 16 entries is the channels, and they are averaged. Integers are scaled by their full range,
    uint8 around 128.

    Raises:
        AudioError: nothing to read, not sound, empty, NaN or infinite samples, no or an impossible sampling
            rate, a shape that leaves open which axis is time.
    Warns:
        UserWarning: at the end of a sound in which every sample is zero.

    Example:
        >>> recording = np.random.default_rng(0).integers(-9_000, 9_000, 25 * 8_000, np.int16)  # 25 s at 8 kHz
        >>> lengths = [len(block) for block in read_blocks(recording, sampling_rate=8_000)]
        >>> max(lengths) <= 160_000, sum(lengths) / 16_000
        (True, 25.0)
    """
    name = describe(source)
    with contextlib.ExitStack() as stack:
        rate, blocks = _decode(source, sampling_rate, name, stack)
        yield from _resample(_checked_mono(blocks, name), rate)


def describe(source: Any) -> str:
    """What messages call this source: its path or URL, else its kind."""
    if isinstance(source, Mapping):
        source = source.get("path") or source
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    name = getattr(source, "name", None)  # of a file object
    return name if isinstance(name, str) and name else f"<{type(source).__name__}>"


def rereadable(source: Any) -> Any:
    """The source itself, or, where it can be read only once (URL, pipe), a file object with its content."""
    if isinstance(source, Mapping) and [key for key in _PLACES if source.get(key) is not None] == ["path"]:
        return {**source, "bytes": rereadable(source["path"])}
    if _is_url(source):
        return _fetch(source)
    if isinstance(source, (str, os.PathLike)) and (Path(source).is_fifo() or Path(source).is_char_device()):
        with _open_path(source, describe(source)) as file:
            return io.BytesIO(file.read())
    if hasattr(source, "read") and not (hasattr(source, "seekable") and source.seekable()):
        return io.BytesIO(_bytes_of(source))
    return source


def _decode(source, sampling_rate, name, stack) -> tuple[float, Iterator[np.ndarray]]:
    """Sampling rate in Hz and blocks of shape (frames, channels), float32; files are closed with `stack`."""
    source, sampling_rate = _unpack(source, sampling_rate, name)
    if isinstance(source, np.ndarray):
        rate = _checked_rate(sampling_rate, name)
        return rate, _array_blocks(_frames_first(source, name), rate, name)
    rate, blocks = _open_decoder(_open(source, name, stack), name, stack)
    if sampling_rate is not None and _checked_rate(sampling_rate, name) != rate:
        raise AudioError(
            f"{name}: the file says {rate} Hz, but sampling_rate={sampling_rate} was given; leave it out for "
            "files, they bring their own (it is not the rate to resample to)."
        )
    return _checked_rate(rate, name), blocks


def _unpack(source, sampling_rate, name):
    """Dicts, torchcodec decoders and torch tensors to (array, path, bytes or file) and a sampling rate."""
    if hasattr(source, "get_all_samples"):  # what `datasets` decodes to where torchcodec is installed
        samples = source.get_all_samples()
        source, sampling_rate = samples.data, samples.sample_rate
    elif isinstance(source, Mapping):
        keys = [key for key in _PLACES if source.get(key) is not None]
        if not keys:
            raise AudioError(f"a dict with keys {sorted(map(str, source))} is no sound: expected {_ACCEPTED}")
        rate = source.get("sampling_rate")
        source, sampling_rate = source[keys[0]], sampling_rate if rate is None else rate
    if hasattr(source, "is_floating_point"):  # a torch tensor
        source = source.detach().cpu()
        source = (source.float() if source.is_floating_point() else source).numpy()
    if isinstance(source, (np.ndarray, str, os.PathLike, *_BYTES)) or hasattr(source, "read"):
        return source, sampling_rate
    raise AudioError(f"{name}: a {type(source).__name__} is not a sound; expected {_ACCEPTED}.")


def _checked_rate(rate, name) -> float:
    if rate is None:
        raise AudioError(f"{name}: an array without a sampling rate; pass `sampling_rate` in Hz.")
    try:
        value = float(rate)
    except (TypeError, ValueError):
        value = math.nan
    if not MIN_RATE <= value <= MAX_RATE:
        raise AudioError(f"{name}: sampling rate {rate!r}; expected {MIN_RATE} to {MAX_RATE:,} Hz, like 16000.")
    return value


# -- arrays


def _frames_first(array: np.ndarray, name: str) -> np.ndarray:
    """A view of shape (frames, channels): an axis of at most `MAX_CHANNELS` entries is the channels."""
    if array.ndim == 1:
        return array[:, None]
    if array.ndim == 2 and 0 in array.shape:
        return np.zeros((0, 1), array.dtype)
    if array.ndim == 2:
        few = [size <= MAX_CHANNELS for size in array.shape]
        if 1 in array.shape:  # one channel; nobody records several channels of one frame
            return array.reshape(-1, 1)
        if few == [True, False]:
            return array.T
        if few == [False, True]:
            return array
    raise AudioError(
        f"{name}: the shape {array.shape} leaves open which axis is time; expected (frames,), or two axes of "
        f"which one has at most {MAX_CHANNELS} entries, the channels. Average them and pass (frames,)."
    )


def _array_blocks(array: np.ndarray, rate: float, name: str) -> Iterator[np.ndarray]:
    dtype = array.dtype
    offset, scale = _INTEGER_RANGE.get(dtype.name, (0, 1.0))
    if dtype.kind != "f" and dtype.name not in _INTEGER_RANGE:
        raise AudioError(
            f"{name}: samples of type {dtype} have no agreed full range; expected floats within -1 and 1, "
            f"or {', '.join(_INTEGER_RANGE)}. Convert them first."
        )
    size = int(rate * BLOCK_SECONDS)
    for start in range(0, len(array), size):
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes inf and is refused as such
            block = array[start : start + size].astype(np.float32)
        yield (block - np.float32(offset)) / np.float32(scale)


# -- files


def _open(source, name, stack):
    """A seekable binary file object at its start."""
    source = rereadable(source)
    if isinstance(source, _BYTES):
        source = io.BytesIO(source)
    elif not hasattr(source, "read"):
        source = stack.enter_context(_open_path(source, name))
    if isinstance(source, io.TextIOBase):
        raise AudioError(f'{name}: a file object in text mode; open it in binary mode, open(path, "rb").')
    if source.seek(0, os.SEEK_END) == 0:
        raise AudioError(f"{name}: the file is empty (0 bytes); expected a sound. Copy or record it again.")
    source.seek(0)
    return source


def _open_path(path, name):
    try:
        return open(path, "rb")
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        reason = getattr(error, "strerror", None) or error
        raise AudioError(f"{name}: cannot be opened ({reason}); expected a sound file's path.") from error


def _open_decoder(file, name, stack) -> tuple[float, Iterator[np.ndarray]]:
    import soundfile

    try:
        sound = stack.enter_context(soundfile.SoundFile(file))
    except (soundfile.LibsndfileError, TypeError) as error:  # TypeError: a headerless .raw file
        return _open_av(file, name, stack, reason=str(error).rpartition(": ")[2].rstrip("."))
    return sound.samplerate, _soundfile_blocks(sound, name)


def _soundfile_blocks(sound, name) -> Iterator[np.ndarray]:
    import soundfile

    size = sound.samplerate * BLOCK_SECONDS
    try:
        while len(block := sound.read(size, dtype="float32", always_2d=True)):
            yield block
    except soundfile.LibsndfileError as error:
        raise AudioError(f"{name}: damaged or cut off ({error}); expected a whole sound file.") from error


def _open_av(file, name, stack, *, reason) -> tuple[float, Iterator[np.ndarray]]:
    try:
        import av
    except ImportError as error:
        raise AudioError(
            f"{name}: nothing that soundfile reads ({reason}); if it is m4a/AAC: pip install 'hf-s2e[av]'."
        ) from error
    file.seek(0)
    try:
        container = stack.enter_context(av.open(file, options={"format_whitelist": _AV_CONTAINERS}))
    except av.FFmpegError as error:
        raise AudioError(
            f"{name}: not a sound file ({reason}); expected wav, flac, ogg/opus, mp3, m4a or the like, "
            "whatever its name ends in. Check where it comes from or convert it."
        ) from error
    if not container.streams.audio or not container.streams.audio[0].rate:
        raise AudioError(f"{name}: a {container.format.name} file without sound; expected a sound track.")
    return container.streams.audio[0].rate, _av_blocks(container, name)


def _av_blocks(container, name) -> Iterator[np.ndarray]:
    import av

    track = container.streams.audio[0]
    to_float = av.AudioResampler(format="fltp", rate=track.rate)  # changes the sample type; the rate stays
    frames, count = [], 0
    try:
        for packed in itertools.chain(container.decode(track), [None]):  # None: give back the rest
            for frame in to_float.resample(packed):
                frames.append(frame.to_ndarray().T)
                count += frame.samples
            if count >= track.rate * BLOCK_SECONDS:
                yield np.concatenate(frames)
                frames, count = [], 0
    except av.FFmpegError as error:
        raise AudioError(f"{name}: damaged or cut off ({error}); expected a whole sound file.") from error
    if frames:
        yield np.concatenate(frames)


def _is_url(source) -> bool:
    return isinstance(source, str) and source.startswith(("http://", "https://"))


def _fetch(url: str):
    """The content behind a URL in a temporary file, which goes when it is closed."""
    from .model.adapter_files_s2e import httpx

    file = tempfile.TemporaryFile()  # noqa: SIM115 (handed to the caller)
    try:
        with httpx.stream("GET", url, follow_redirects=True, timeout=URL_TIMEOUT) as response:
            response.raise_for_status()
            for chunk in response.iter_bytes():
                file.write(chunk)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        file.close()
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise AudioError(f"{url}: could not be fetched ({reason}); expected a sound file there.") from error
    file.seek(0)
    return file


def _bytes_of(file) -> bytes:
    content = file.read()
    if not isinstance(content, bytes):
        raise AudioError(f"{describe(file)}: a file object in text mode; open it in binary mode.")
    return content


# -- blocks


def _checked_mono(blocks: Iterator[np.ndarray], name: str) -> Iterator[np.ndarray]:
    """(frames, channels) to (frames,), refusing what is empty or not finite."""
    frames, peak = 0, 0.0
    for block in blocks:
        with np.errstate(over="ignore", invalid="ignore"):  # found by the check that follows
            mono = block.mean(axis=1, dtype=np.float32)
        usable = np.abs(mono) <= MAX_SAMPLE  # NaN is not, either
        if not usable.all():
            first = int(np.argmin(usable))
            raise AudioError(
                f"{name}: sample {frames + first} is NaN or infinite, or beyond {MAX_SAMPLE:g}; expected "
                "finite samples of full scale 1. Repair the recording or replace such samples by zeros."
            )
        frames += len(mono)
        peak = max(peak, float(np.abs(mono).max(initial=0.0)))
        yield mono
    if frames == 0:
        raise AudioError(f"{name}: the sound is empty (0 samples); expected at least one sample.")
    if peak == 0.0:
        warnings.warn(f"{name}: silence, all {frames} samples are zero", stacklevel=4)


def _resample(blocks: Iterator[np.ndarray], rate: float) -> Iterator[np.ndarray]:
    """To 16 kHz in a stream; the length is rounded up, so that no sound becomes empty."""
    if rate == SAMPLING_RATE:
        yield from blocks
        return
    import soxr

    stream = soxr.ResampleStream(rate, SAMPLING_RATE, num_channels=1, dtype="float32")
    read = written = 0
    for block in blocks:
        read += len(block)
        resampled = stream.resample_chunk(block)
        written += len(resampled)
        if len(resampled):
            yield resampled
    rest = stream.resample_chunk(np.zeros(0, np.float32), last=True)
    missing = math.ceil(read * SAMPLING_RATE / rate) - written
    yield np.pad(rest, (0, max(0, missing - len(rest))))[:missing]
