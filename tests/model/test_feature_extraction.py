"""The front end against scipy, the paper's segment counts on real corpora, and what is refused."""

import numpy as np
import pytest
import scipy.signal
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FRONT_END

from hf_s2e import S2EConfig, S2EFeatureExtractor, S2EFrontEnd

SECOND = 16_000


def voice(seconds: float, seed: int = 0) -> np.ndarray:
    """Harmonics of 120 Hz that swell, and some noise: float32 (samples,)."""
    generator = np.random.default_rng(seed)
    t = np.arange(round(seconds * SECOND)) / SECOND
    tone = sum(np.sin(2 * np.pi * 120 * k * t) / k for k in range(1, 20)) * (1 + np.sin(2 * np.pi * 3 * t))
    return (0.1 * tone + 0.003 * generator.standard_normal(len(t))).astype(np.float32)


def scipy_segments(waveform: np.ndarray) -> np.ndarray:
    """Section IV-A once more, with scipy: (segments, 400, 200)."""
    count = 1 if len(waveform) <= 2 * SECOND else 1 + -(-(len(waveform) - 2 * SECOND) // SECOND)
    padded = np.pad(waveform.astype(np.float64), (0, (count + 1) * SECOND - len(waveform)))
    stft = scipy.signal.ShortTimeFFT(
        scipy.signal.windows.hamming(640, sym=True), hop=160, fs=SECOND, mfft=1600, fft_mode="onesided"
    )
    frames = len(padded) // 160
    magnitude = np.abs(stft.stft(padded, p0=0, p1=frames, padding="zeros"))[:400]
    pieces = np.stack([magnitude[:, 100 * i : 100 * i + 200] for i in range(count)])
    maxima = np.maximum(pieces.max(axis=(1, 2), keepdims=True), 1e-5)
    return np.log(1 + 255 * pieces / maxima) / np.log(256)


@pytest.mark.parametrize("seconds", [0.4, 2.0, 2.3, 5.01])
def test_spectrogram_is_scipys(seconds):
    waveform = voice(seconds)
    ours = S2EFrontEnd()(torch.from_numpy(waveform)).numpy()
    expected = scipy_segments(waveform)
    assert ours.shape == expected.shape and ours.shape[1:] == (400, 200)
    np.testing.assert_allclose(ours, expected, atol=2e-5)


def test_a_tone_is_in_its_10_hz_bin():
    tone = np.sin(2 * np.pi * 1000 * np.arange(2 * SECOND) / SECOND).astype(np.float32)
    segment = S2EFrontEnd()(torch.from_numpy(tone))[0]
    assert segment[:, 100].argmax() == 100 and segment.max() == 1


@pytest.mark.parametrize(
    ("samples", "whole", "dropped"),
    [(1, 1, 1), (32_000, 1, 1), (32_001, 2, 1), (48_000, 2, 2), (48_001, 3, 2), (64_000, 3, 3)],
)
def test_segment_counts(samples, whole, dropped):
    assert S2EFrontEnd().num_segments(samples) == whole
    assert S2EFrontEnd(drop_tail=True).num_segments(samples) == dropped
    for drop_tail, count in ((False, whole), (True, dropped)):
        assert len(S2EFrontEnd(drop_tail=drop_tail)(torch.zeros(samples))) == count


@pytest.mark.parametrize(
    ("corpus", "whole", "dropped"), [("emodb/wav/*.flac", 1211, 802), ("ravdess/**/*.ogg", 4576, 3136)]
)
def test_segment_counts_of_real_corpora(s2e_data, corpus, whole, dropped):
    files = sorted(s2e_data.glob(corpus))
    if not files:
        pytest.skip(f"no {corpus} in {s2e_data}")
    lengths = [soundfile.info(file).frames for file in files]
    assert sum(map(S2EFrontEnd().num_segments, lengths)) == whole
    assert sum(map(S2EFrontEnd(drop_tail=True).num_segments, lengths)) == dropped


def test_segments_cut_out_by_the_caller_are_the_utterances():
    """Training cuts its own segments; with the samples around them they are those of the whole utterance."""
    front_end, waveform = S2EFrontEnd(), torch.from_numpy(voice(4.2))
    whole = front_end(waveform)
    padded = front_end.pad(waveform)
    rows = [padded[i * SECOND :][: front_end.segment_samples] for i in range(len(whole))]
    torch.testing.assert_close(front_end.compress(front_end.spectrum(torch.stack(rows)).mT), whole)


@pytest.mark.parametrize("seconds", [0.7, 2.0, 4.2])
def test_without_its_mean_a_constant_offset_changes_nothing(seconds):
    """Off by default: 0.5 % of full scale then changes the features, because bin 0 is kept."""
    waveform = torch.from_numpy(voice(seconds))
    moved = waveform + 0.005
    front_end = S2EFrontEnd(remove_dc=True)
    torch.testing.assert_close(front_end(moved), front_end(waveform), atol=2e-4, rtol=0)
    assert (S2EFrontEnd()(moved) - S2EFrontEnd()(waveform)).abs().max() > 0.1


def test_normalization_of_the_utterance():
    waveform = torch.from_numpy(np.concatenate([0.1 * voice(2), voice(2)]))
    by_segment, front_end = S2EFrontEnd()(waveform), S2EFrontEnd(normalization="utterance")
    by_utterance = front_end(waveform)
    assert by_segment[0].max() == 1 and 0.3 < by_utterance[0].max() < 0.9 and by_utterance.max() == 1
    torch.testing.assert_close(front_end(waveform, front_end.peak(waveform)), by_utterance)
    rows = front_end.pad(waveform)[: front_end.segment_samples][None]
    cut = front_end.compress(front_end.spectrum(rows).mT, front_end.peak(waveform))
    torch.testing.assert_close(cut, by_utterance[:1], atol=1e-6, rtol=0)


def test_the_peak_is_of_frames_that_are_in_a_segment():
    """The frame after the last segment's last reaches into it, but belongs to none."""
    waveform = torch.zeros(2 * SECOND)
    waveform[-1] = 1.0
    front_end = S2EFrontEnd(normalization="utterance")
    assert front_end(waveform).max() == 1
    torch.testing.assert_close(front_end(waveform, front_end.peak(waveform)), front_end(waveform))


def test_without_normalization_loudness_stays():
    waveform = torch.from_numpy(voice(1.0))
    front_end = S2EFrontEnd(normalization="none")
    assert front_end(waveform).max() > front_end(0.1 * waveform).max()
    torch.testing.assert_close(S2EFrontEnd()(waveform), S2EFrontEnd()(0.1 * waveform), atol=1e-4, rtol=0)


def test_silence_is_zero():
    assert S2EFrontEnd()(torch.zeros(40_000)).abs().max() == 0


def test_batches_are_padded_and_masked():
    short, long = voice(1.0), voice(4.5)
    batch = S2EFeatureExtractor()([short, long], sampling_rate=SECOND, return_tensors="pt")
    assert batch["input_values"].shape == (2, 4, 400, 200) and batch["input_values"].dtype == torch.float32
    assert batch["attention_mask"].tolist() == [[1, 0, 0, 0], [1, 1, 1, 1]]
    alone = S2EFeatureExtractor()(short, return_tensors="pt")
    assert torch.equal(alone["input_values"][0], batch["input_values"][0, :1])
    assert batch["input_values"][0, 1:].abs().max() == 0


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(1, 900),
    dtype=st.sampled_from(["float16", "float32", "float64"]),
    kind=st.sampled_from(["array", "tensor", "list", "batch of one"]),
    normalization=st.sampled_from(["segment", "utterance", "none"]),
    drop_tail=st.booleans(),
)
def test_any_length_and_float_type(length, dtype, kind, normalization, drop_tail):
    extractor = S2EFeatureExtractor(**FRONT_END, normalization=normalization, drop_tail=drop_tail)
    waveform = np.random.default_rng(length).uniform(-1, 1, length).astype(dtype)
    given_as = {
        "array": waveform,
        "tensor": torch.from_numpy(waveform),
        "list": waveform.tolist(),
        "batch of one": waveform[None],
    }[kind]
    output = extractor(given_as, sampling_rate=SECOND)
    count = 1 + (max(0, length - 160) // 80 if drop_tail else -(-max(0, length - 160) // 80))
    assert output["input_values"].shape == (1, count, 20, 16) and output["attention_mask"].shape == (1, count)
    assert np.isfinite(output["input_values"]).all() and output["input_values"].min() >= 0
    reference = extractor(waveform.astype("float32"))["input_values"]
    np.testing.assert_allclose(output["input_values"], reference, atol=1e-5)


@pytest.mark.parametrize(
    ("audio", "says"),
    [
        (np.zeros(0, np.float32), "no samples"),
        ([], "Empty audio"),
        ([[0.1, 0.2], []], "no samples"),
        (np.array([0.1, np.nan], np.float32), "NaN or infinite"),
        (np.array([0.1, -np.inf], np.float32), "NaN or infinite"),
        (np.ones(500, np.int16), "/ 32768"),
        ([0, 12, -7], "/ 32768"),
        (np.zeros((1, 2, 500), np.float32), r"expected \(samples,\)"),
        ([np.zeros((2, 500), np.float32)], "one channel"),
        ("speech.wav", "is a str"),
        (["speech.wav", "other.wav"], r"<U10 samples.*S2EPipeline takes .* files"),
        ([None], "object samples"),
        (np.full(500, 1e38, np.float32), "beyond 1e\\+20"),
        (np.full(500, 1e300), "infinite"),
        (None, "NoneType"),
    ],
)
def test_bad_audio_is_refused(audio, says):
    with pytest.raises(ValueError, match=says):
        S2EFeatureExtractor(**FRONT_END)(audio)


def test_every_kind_of_float_is_taken():
    extractor, waveform = S2EFeatureExtractor(**FRONT_END), np.linspace(-1, 1, 500, dtype=np.float32)
    expected = extractor(waveform, sampling_rate=SECOND)["input_values"]
    kinds = [list(waveform), tuple(waveform.tolist()), waveform.astype(">f4"), waveform.astype(np.longdouble)]
    for other in kinds:
        np.testing.assert_array_equal(extractor(other, sampling_rate=SECOND)["input_values"], expected)


def test_silence_and_a_missing_sampling_rate_warn(caplog, monkeypatch):
    import hf_s2e.model.feature_extraction_s2e as module

    with pytest.warns(UserWarning, match="all 500 samples of a waveform are zero"):
        assert not S2EFeatureExtractor(**FRONT_END)(np.zeros(500), sampling_rate=SECOND)["input_values"].any()
    said = []
    monkeypatch.setattr(module.logger, "warning_once", said.append, raising=False)
    S2EFeatureExtractor(**FRONT_END)(np.ones(500))
    S2EFeatureExtractor(**FRONT_END)(np.ones(500), sampling_rate=SECOND)
    assert len(said) == 1 and "16000 Hz; pass sampling_rate=" in said[0]


def test_the_largest_samples_that_are_taken_give_finite_spectrograms():
    for normalization in ("segment", "utterance", "none"):
        extractor = S2EFeatureExtractor(**FRONT_END, normalization=normalization)
        output = extractor(np.full(500, 1e20, np.float32), sampling_rate=SECOND)
        assert np.isfinite(output["input_values"]).all()


def test_another_sampling_rate_is_refused():
    with pytest.raises(ValueError, match=r"8000 Hz.*takes 16000 Hz.*S2EPipeline"):
        S2EFeatureExtractor()(voice(1.0), sampling_rate=8000)


def test_what_a_call_cannot_do_is_refused():
    extractor, wave = S2EFeatureExtractor(), np.ones(16_000, np.float32)
    with pytest.raises(ValueError, match="in no other way"):
        extractor(wave, sampling_rate=16_000, max_length=8_000, truncation=True, padding="max_length")
    with pytest.raises(TypeError, match="do_normalize"):
        extractor(wave, sampling_rate=16_000, do_normalize=True)
    extractor(wave, sampling_rate=16_000, padding=True)


def test_the_extractor_is_the_models(tmp_path):
    config = S2EConfig(**FRONT_END, mu=100.0, normalization="utterance", drop_tail=True)
    extractor = S2EFeatureExtractor.from_model_config(config)
    assert extractor.front_end.settings == config.front_end
    extractor.save_pretrained(tmp_path)
    again = S2EFeatureExtractor.from_pretrained(tmp_path)
    assert again.front_end.settings == config.front_end and again.feature_size == 20


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="hop_length"):
        S2EFeatureExtractor(hop_length=161)
    with pytest.raises(TypeError, match="unknown front-end settings"):
        S2EFrontEnd(hop=160)
