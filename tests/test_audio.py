"""Decoding, mixing down, resampling: any source, any rate, any length, and clear refusals."""

import http.server
import io
import math
import threading
import warnings

import numpy as np
import pytest
import soundfile
import soxr
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hf_s2e.audio import AudioError, load_audio, read_blocks, rereadable

RATE = 16_000


def sine(seconds: float, rate: int, frequency: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * frequency * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def noise(*shape: int) -> np.ndarray:
    return (0.1 * np.random.default_rng(0).standard_normal(shape)).astype(np.float32)


def peak_frequency(waveform: np.ndarray) -> float:
    """In Hz, of a 16 kHz waveform."""
    spectrum = np.abs(np.fft.rfft(waveform * np.hanning(len(waveform))))
    return float(np.argmax(spectrum) * RATE / len(waveform))


def encode(samples: np.ndarray, rate: int, **options) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, **{"format": "WAV", **options})
    return file.getvalue()


def encode_m4a(samples: np.ndarray, rate: int) -> bytes:
    av = pytest.importorskip("av")
    file = io.BytesIO()
    with av.open(file, "w", format="ipod") as container:
        stream = container.add_stream("aac", rate=rate)
        stream.layout = "stereo"
        for start in range(0, len(samples), 1024):
            planar = np.stack([samples[start : start + 1024]] * 2)
            frame = av.AudioFrame.from_ndarray(planar, format="fltp", layout="stereo")
            frame.sample_rate, frame.pts = rate, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


@pytest.fixture
def wav(tmp_path):
    path = tmp_path / "tone.wav"
    path.write_bytes(encode(sine(0.5, RATE), RATE, subtype="FLOAT"))
    return path


@pytest.fixture
def server(wav):
    """The address of a folder with tone.wav, served on this machine only."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(wav.parent))

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


# -- where sound comes from


def test_every_kind_of_source_gives_the_same_waveform(wav, server):
    expected = sine(0.5, RATE)
    content = wav.read_bytes()
    with wav.open("rb") as file:
        file.read(10)  # it is read from its start all the same
        sources = [
            (wav, None),
            (str(wav), None),
            (f"{server}/tone.wav", None),
            (content, None),
            (bytearray(content), None),
            (io.BytesIO(content), None),
            (file, None),
            (expected, RATE),
            (torch.from_numpy(expected).requires_grad_(), RATE),
            (torch.from_numpy(expected).double(), np.int64(RATE)),
            ({"array": expected, "sampling_rate": RATE, "path": "elsewhere.wav"}, None),
            ({"raw": expected, "sampling_rate": RATE}, None),
            ({"bytes": content, "path": None}, None),
            ({"bytes": None, "path": str(wav)}, None),
        ]
        for source, rate in sources:
            waveform = load_audio(source, sampling_rate=rate)
            assert waveform.dtype == np.float32
            np.testing.assert_allclose(waveform, expected, atol=1e-7, err_msg=str(type(source)))


def test_what_datasets_decodes_with_torchcodec_is_taken():
    class Samples:
        data, sample_rate = torch.from_numpy(noise(2, 22050)), 22050

    class Decoder:
        def get_all_samples(self):
            return Samples

    expected = load_audio(Samples.data.numpy(), sampling_rate=22050)
    np.testing.assert_array_equal(load_audio(Decoder()), expected)


def test_one_way_stream(wav):
    class Pipe(io.RawIOBase):
        def __init__(self):
            self.inner = io.BytesIO(wav.read_bytes())

        def readable(self):
            return True

        def readinto(self, buffer):
            return self.inner.readinto(buffer)

    np.testing.assert_allclose(load_audio(Pipe()), sine(0.5, RATE), atol=1e-7)
    again = rereadable(Pipe())
    np.testing.assert_array_equal(load_audio(again), load_audio(again))


@pytest.mark.parametrize(("container", "subtype", "tolerance"), [
    ("WAV", "PCM_U8", 1 / 128), ("WAV", "PCM_16", 1e-4), ("WAV", "PCM_24", 1e-6), ("WAV", "PCM_32", 1e-6),
    ("WAV", "FLOAT", 1e-7), ("WAV", "DOUBLE", 1e-7), ("FLAC", "PCM_16", 1e-4),
])  # fmt: skip
def test_sample_formats(container, subtype, tolerance):
    content = encode(sine(0.3, RATE), RATE, format=container, subtype=subtype)
    np.testing.assert_allclose(load_audio(content), sine(0.3, RATE), atol=tolerance)


@pytest.mark.parametrize(("container", "subtype"), [("OGG", "OPUS"), ("OGG", "VORBIS"), ("MP3", "MPEG_LAYER_III")])
def test_lossy_formats_keep_frequency_and_level(container, subtype):
    waveform = load_audio(encode(sine(1.0, 48000), 48000, format=container, subtype=subtype))
    assert peak_frequency(waveform[:RATE]) == pytest.approx(440, abs=2)
    assert np.sqrt(np.mean(waveform[4000:12000] ** 2)) == pytest.approx(0.5 / math.sqrt(2), rel=0.05)


def test_m4a_without_ffmpeg(tmp_path):
    path = tmp_path / "tone.m4a"
    path.write_bytes(encode_m4a(sine(12.0, 44100), 44100))  # longer than a block
    waveform = load_audio(path)
    assert len(waveform) / RATE == pytest.approx(12.0, abs=0.1)
    assert peak_frequency(waveform) == pytest.approx(440, abs=1)
    np.testing.assert_array_equal(waveform, load_audio(path.read_bytes()))


def test_m4a_without_pyav_says_what_to_install(monkeypatch):
    content = encode_m4a(sine(0.1, 44100), 44100)
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(AudioError, match=r"hf-s2e\[av\]"):
        load_audio(content)


# -- resampling


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000, 96000])
@pytest.mark.parametrize("frequency", [300.0, 3500.0])
def test_resampling_keeps_frequency_and_level(rate, frequency):
    waveform = load_audio(sine(2.0, rate, frequency), sampling_rate=rate)
    assert len(waveform) == 2 * RATE
    assert peak_frequency(waveform) == pytest.approx(frequency, abs=0.5)
    middle = waveform[RATE // 2 : -RATE // 2]
    assert np.sqrt(np.mean(middle**2)) == pytest.approx(0.5 / math.sqrt(2), rel=1e-3)


def test_resampling_lets_no_alias_through():
    waveform = load_audio(sine(2.0, 44100, 12_000.0), sampling_rate=44100)  # above the new Nyquist frequency
    assert np.abs(waveform[RATE // 2 : -RATE // 2]).max() < 1e-4


@pytest.mark.parametrize("rate", [8000, 16000, 44100, 96000])
def test_blocks_of_a_long_file_join_to_the_whole(tmp_path, rate):
    stereo = noise(int(25.3 * rate), 2)
    path = tmp_path / "long.wav"
    soundfile.write(path, stereo, rate, subtype="FLOAT")
    blocks = list(read_blocks(path))
    assert len(blocks) >= 3
    assert max(map(len, blocks)) <= 11 * RATE
    mono = stereo.mean(axis=1)
    whole = mono if rate == RATE else soxr.resample(mono, rate, RATE)
    joined = np.concatenate(blocks)
    assert len(joined) == math.ceil(len(mono) * RATE / rate)
    np.testing.assert_allclose(joined[: len(whole)], whole, atol=1e-4)


def test_reading_a_block_does_not_read_the_file(tmp_path):
    """The first block comes before the damage behind it is met."""
    path = tmp_path / "broken.wav"
    samples = noise(RATE * 30)
    samples[-1] = np.nan
    soundfile.write(path, samples, RATE, subtype="FLOAT")
    blocks = read_blocks(path)
    assert np.isfinite(next(blocks)).all()
    with pytest.raises(AudioError, match=f"sample {len(samples) - 1} is NaN"):
        list(blocks)


@settings(max_examples=60, deadline=None)
@given(
    frames=st.integers(1, 3000),
    rate=st.one_of(st.integers(1000, 200_000), st.floats(1000, 200_000)),
    channels=st.integers(1, 8),
    dtype=st.sampled_from(["float16", "float32", "float64", ">f4", "int8", "uint8", "int16", ">i2", "int32"]),
    channels_first=st.booleans(),
)
def test_any_length_rate_type_and_layout(frames, rate, channels, dtype, channels_first):
    dtype = np.dtype(dtype)
    full = 1.0 if dtype.kind == "f" else float(np.iinfo(dtype).max - (128 if dtype == "uint8" else 0))
    values = np.linspace(-0.9, 0.9, frames * channels).reshape(frames, channels)
    array = (values * full + (128 if dtype == "uint8" else 0)).astype(dtype)
    source = array.T if channels_first else array
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # few samples of 0 are silence
        if channels > 1 and frames != 1 and frames <= 16:
            with pytest.raises(AudioError, match="which axis is time"):
                load_audio(source, sampling_rate=rate)
            return
        if frames == 1:  # (1, channels) is taken as one channel
            source = array[:, 0]
        waveform = load_audio(source, sampling_rate=rate)
        mono = values.mean(axis=1) if frames > 1 else values[:, 0]
        expected = load_audio(mono.astype(np.float32), sampling_rate=rate)
    assert waveform.shape == (math.ceil(frames * RATE / rate),)
    step = {"float16": 2e-3, "int8": 2e-2, "uint8": 2e-2}.get(dtype.name, 1e-3)
    np.testing.assert_allclose(waveform, expected, atol=2 * step)


@settings(max_examples=40, deadline=None)
@given(hnp.arrays(np.float64, st.integers(0, 40)), st.sampled_from([8000, 16000, 44100]))
def test_floats_are_answered_with_finite_samples_or_refused(samples, rate):
    usable = len(samples) > 0 and bool((np.abs(samples) <= 1e20).all())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        if not usable:
            with pytest.raises(AudioError, match=r"empty|NaN or infinite"):
                load_audio(samples, sampling_rate=rate)
        else:
            assert len(load_audio(samples, sampling_rate=rate)) == math.ceil(len(samples) * RATE / rate)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=400), st.sampled_from([b"", b"RIFF$\0\0\0WAVEfmt ", b"fLaC", b"OggS", b"ID3"]))
def test_no_bytes_do_anything_but_sound_or_audio_error(content, start):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            waveform = load_audio(start + content)
        except AudioError as error:
            assert "expected" in str(error)
        else:
            assert np.isfinite(waveform).all()


def test_integers_are_scaled_by_their_full_range():
    def first(values, dtype):
        return load_audio(np.array(values, dtype), sampling_rate=RATE)[:2].tolist()

    assert first([-32768, 16384], "int16") == [-1.0, 0.5]
    assert first([-(2**31), 2**30], "int32") == [-1.0, 0.5]
    assert first([0, 192], "uint8") == [-1.0, 0.5]
    assert first([-128, 64], "int8") == [-1.0, 0.5]


def test_both_layouts_and_eight_channels():
    samples = noise(48_000, 8)
    expected = load_audio(samples.mean(axis=1), sampling_rate=96000)
    np.testing.assert_allclose(load_audio(samples, sampling_rate=96000), expected, atol=1e-6)
    np.testing.assert_allclose(load_audio(samples.T, sampling_rate=96000), expected, atol=1e-6)
    np.testing.assert_allclose(load_audio(encode(samples, 96000, subtype="FLOAT")), expected, atol=1e-6)


# -- the edge of what is answered


@pytest.mark.parametrize("rate", [8000, 16000, 44100, 96000])
def test_one_sample_is_answered(rate):
    assert len(load_audio(np.array([0.5], np.float32), sampling_rate=rate)) == math.ceil(RATE / rate)
    assert len(load_audio(encode(np.array([0.5]), rate))) == math.ceil(RATE / rate)


def test_silence_warns():
    with pytest.warns(UserWarning, match="silence"):
        assert not load_audio(np.zeros(1000), sampling_rate=RATE).any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_audio(np.array([0.0, 1e-9]), sampling_rate=RATE)


@pytest.mark.parametrize(("source", "rate", "found"), [
    (np.zeros(0, np.float32), RATE, "empty"),
    (np.zeros((2, 0), np.float32), RATE, "empty"),
    (encode(np.zeros((0, 1)), RATE), None, "empty"),
    (b"", None, "0 bytes"),
    (io.BytesIO(), None, "0 bytes"),
    (np.array([0.0, np.inf]), RATE, "sample 1 is NaN or infinite"),
    (np.array([np.nan]), 44100, "NaN"),
    (np.array([1e300]), RATE, "infinite"),
    (np.full(100, 1e38, np.float32), RATE, "sample 0 is .* beyond"),
    (encode(np.array([0.0, np.nan]), RATE, subtype="DOUBLE"), None, "NaN"),
    (b"dear diary, this is not a sound\n" * 40, None, "not a sound file"),
    (b"#EXTM3U\n#EXTINF:10,\nhttp://127.0.0.1:9/x.aac\n", None, "not a sound file"),
    (noise(100), None, "without a sampling rate"),
    ({"array": noise(100)}, None, "without a sampling rate"),
    (noise(100), 0, "sampling rate 0"),
    (noise(100), -16000, "sampling rate -16000"),
    (noise(100), math.nan, "sampling rate nan"),
    (noise(100), math.inf, "sampling rate inf"),
    (noise(100), "fast", "sampling rate 'fast'"),
    (noise(100), 16, "1000 to 10,000,000 Hz"),
    (noise(100), 1e300, "10,000,000 Hz"),
    (noise(100, 100), RATE, "which axis is time"),
    (noise(2, 2), RATE, "which axis is time"),
    (noise(1, 2, 100), RATE, "which axis is time"),
    (np.ones(()), RATE, "which axis is time"),
    (np.arange(100), RATE, "int64"),
    (np.ones(10, bool), RATE, "bool"),
    (np.ones(10, complex), RATE, "complex"),
    ([0.1, 0.2], RATE, "list"),
    (None, None, "NoneType"),
    (3, None, "int"),
    ({}, None, "keys"),
    ({"label": 1, "bytes": None}, None, "bytes"),
    (io.StringIO("x"), None, "binary mode"),
    ("no/such/file.wav", None, "No such file"),
    ("a\0b.wav", None, "cannot be opened"),
    ("http://127.0.0.1:9/x.wav", None, "could not be fetched"),
    (encode(noise(100), 8000), RATE, "8000 Hz"),
])  # fmt: skip
def test_refusals_say_what_was_found(source, rate, found):
    with pytest.raises(AudioError, match=found):
        load_audio(source, sampling_rate=rate)


def test_refused_files(tmp_path, server):
    text = tmp_path / "note.wav"
    text.write_text("this is no sound")
    with pytest.raises(AudioError, match=r"note\.wav: not a sound file"):
        load_audio(text)
    with pytest.raises(AudioError, match="directory"):
        load_audio(tmp_path)
    (tmp_path / "none.flac").touch()
    with pytest.raises(AudioError, match="0 bytes"):
        load_audio(tmp_path / "none.flac")
    (tmp_path / "headerless.raw").write_bytes(bytes(1000))
    with pytest.raises(AudioError, match="not a sound file"):
        load_audio(tmp_path / "headerless.raw")
    with pytest.raises(AudioError, match="404"):
        load_audio(f"{server}/absent.wav")
    with text.open() as file, pytest.raises(AudioError, match="binary mode"):
        load_audio(file)


def test_cut_off_flac_is_refused(tmp_path):
    content = encode(noise(RATE * 5), RATE, format="FLAC")
    (tmp_path / "cut.flac").write_bytes(content[: len(content) // 2])
    with pytest.raises(AudioError, match=r"damaged|not a sound file"):
        load_audio(tmp_path / "cut.flac")


def test_files_are_closed(tmp_path, wav, recwarn):
    for _ in range(3):
        load_audio(wav)
    own = io.BytesIO(wav.read_bytes())
    load_audio(own)
    assert not own.closed  # a file object stays its owner's
    assert not [w for w in recwarn if issubclass(w.category, ResourceWarning)]


def test_real_speech_is_read(s2e_data):
    files = sorted((s2e_data / "emodb").rglob("*.flac"))[:3]
    if not files:
        pytest.skip(f"no flac files under {s2e_data}/emodb")
    for path in files:
        frames = soundfile.info(path).frames
        assert len(load_audio(path)) == frames
