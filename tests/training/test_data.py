"""The data path of training: audio decoded once, segments cut out of it, batches in a seeded order."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass

import numpy as np
import pytest
import soundfile
import torch
from datasets import Audio, Dataset

from hf_s2e import S2EFeatureExtractor, S2EFrontEnd
from hf_s2e.audio import AudioError, load_audio
from hf_s2e.corpora import load_corpus
from hf_s2e.model.atomic_write_s2e import atomic_write
from hf_s2e.training import wave_store
from hf_s2e.training.data import Features, SegmentDataset, ShuffledBatches
from hf_s2e.training.predict import predict
from hf_s2e.training.recipe import Recipe
from hf_s2e.training.wave_store import WaveStore

RATE = 16_000


def corpus_of(folder, waves, subtype="PCM_16"):
    """A corpus of these int16 waveforms as files."""
    paths = [str(folder / f"{i}.wav") for i in range(len(waves))]
    for path, wave in zip(paths, waves):
        soundfile.write(path, wave, RATE, subtype=subtype)
    return Dataset.from_dict({"audio": paths}).cast_column("audio", Audio(decode=False))


def random_waves(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(-32768, 32768, length).astype(np.int16) for length in lengths]


@pytest.fixture
def waves():
    return random_waves(1000, 17, 4000)


@pytest.fixture
def store(tmp_path, waves):
    return WaveStore.build(corpus_of(tmp_path, waves), tmp_path / "cache", progress=False)


# ---- the store


def test_int16_samples_come_back_bit_by_bit(store, waves):
    assert store.lengths.tolist() == [1000, 17, 4000]
    for i, wave in enumerate(waves):
        piece = store.cut(torch.tensor([i]), torch.tensor([0]), len(wave))[0]
        assert torch.equal((piece * 32768).to(torch.int16), torch.from_numpy(wave))


def test_full_scale_is_not_wrapped_around(tmp_path):
    corpus = corpus_of(tmp_path, [np.array([1.5, -1.5, 1.0, 0.5], np.float32)], subtype="FLOAT")
    store = WaveStore.build(corpus, tmp_path / "cache", progress=False)
    assert store.waves.tolist() == [32767, -32768, 32767, 16384]


def test_cut_is_a_slice_of_the_zero_padded_utterance(store, waves):
    rng = np.random.default_rng(1)
    utterances = rng.integers(3, size=200)
    starts = rng.integers(-300, 4300, size=200)
    pieces = store.cut(torch.from_numpy(utterances), torch.from_numpy(starts), 250)
    assert pieces.dtype == torch.float32 and pieces.shape == (200, 250)
    for piece, utterance, start in zip(pieces, utterances, starts):
        padded = np.pad(waves[utterance], (300, 5000))  # neighbours in the store must not show
        expected = padded[start + 300 : start + 550].astype(np.float32) / 32768
        assert np.array_equal(piece.numpy(), expected)


def test_cut_at_another_speed_interpolates(store, waves):
    utterances, starts = torch.tensor([0, 2, 1, 2]), torch.tensor([-20, 100, 3, 3900])
    speeds = torch.tensor([1.1, 0.9, 1.0, 1.05])
    pieces = store.cut(utterances, starts, 200, speeds).numpy()
    for piece, utterance, start, speed in zip(pieces, utterances, starts, speeds):
        padded = np.pad(waves[utterance].astype(np.float64) / 32768, 1000)
        at = 1000 + int(start) + np.arange(200) * float(speed)
        assert np.allclose(piece, np.interp(at, np.arange(len(padded)), padded), atol=2e-3)
    assert np.array_equal(pieces[2], store.cut(utterances[2:3], starts[2:3], 200)[0].numpy())


def test_the_store_is_built_once_and_again_when_a_file_changes(tmp_path, waves, monkeypatch):
    corpus = corpus_of(tmp_path, waves)
    first = WaveStore.build(corpus, tmp_path / "cache", progress=False)
    monkeypatch.setattr(wave_store, "_decode_all", lambda *args: pytest.fail("decoded again"))
    assert torch.equal(WaveStore.build(corpus, tmp_path / "cache", progress=False).waves, first.waves)
    monkeypatch.undo()
    other = random_waves(1000, seed=9)[0]
    soundfile.write(tmp_path / "0.wav", other, RATE)
    os.utime(tmp_path / "0.wav", (time.time() + 5,) * 2)
    again = WaveStore.build(corpus, tmp_path / "cache", progress=False)
    assert again.waves[:1000].tolist() == other.tolist() != first.waves[:1000].tolist()


@pytest.mark.parametrize("damage", ["missing", "cut off", "text"])
def test_a_bad_file_is_named_and_leaves_no_store(tmp_path, waves, damage):
    corpus, bad = corpus_of(tmp_path, waves), tmp_path / "1.wav"
    if damage == "missing":
        bad.unlink()
    else:
        bad.write_bytes(b"" if damage == "cut off" else b"this is no sound" * 20)
    with pytest.raises(AudioError, match=r"1\.wav"):
        WaveStore.build(corpus, tmp_path / "cache", progress=False)
    assert not list((tmp_path / "cache").glob("*"))


@pytest.mark.slow
def test_a_killed_build_leaves_nothing_that_counts(tmp_path, waves):
    """SIGKILL while decoding; then another process builds the store as if nothing had been."""
    corpus = corpus_of(tmp_path, waves)
    code = f"""
import os, sys, time
from datasets import Audio, Dataset
from hf_s2e.training import wave_store
def decode_and_die(paths, target, progress):
    target.write_bytes(b"half" * 10)
    print("now", flush=True)
    os.kill(os.getpid(), 9)
wave_store._decode_all = decode_and_die
paths = {audio_files(corpus)!r}
corpus = Dataset.from_dict({{"audio": paths}}).cast_column("audio", Audio(decode=False))
wave_store.WaveStore.build(corpus, {str(tmp_path / "cache")!r}, progress=False)
"""
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert killed.returncode == -9 and "now" in killed.stdout
    left = [path.name for path in (tmp_path / "cache").iterdir()]
    assert left and all(name.endswith(".part") for name in left)
    store = WaveStore.build(corpus, tmp_path / "cache", progress=False)
    assert store.lengths.tolist() == [1000, 17, 4000]


def test_a_store_that_another_machine_has_finished_meanwhile_is_taken(work, tmp_path, monkeypatch):
    decode_all = wave_store._decode_all

    def decode_while_another_is_faster(*args):
        with monkeypatch.context() as other:
            other.setattr(wave_store, "_decode_all", decode_all)
            WaveStore.build(work.corpus, tmp_path, progress=False)
        return decode_all(*args)

    monkeypatch.setattr(wave_store, "_decode_all", decode_while_another_is_faster)
    store = WaveStore.build(work.corpus, tmp_path, progress=False)
    assert torch.equal(store.lengths, work.store.lengths) and len(list(tmp_path.iterdir())) == 1


def test_a_store_that_cannot_be_put_into_place_is_an_error(work, tmp_path):
    (folder,) = WaveStore.build(work.corpus, tmp_path, progress=False) and tmp_path.iterdir()
    (folder / "index.json").unlink()
    with pytest.raises(OSError, match=folder.name):
        WaveStore.build(work.corpus, tmp_path, progress=False)


# ---- segments and batches


def test_segments_of_lengths_around_the_borders():
    lengths = torch.tensor([1, 32000, 32001, 48000, 48001, 100_000])
    store = WaveStore(torch.zeros(int(lengths.sum()), dtype=torch.int16), lengths.cumsum(0) - lengths, lengths)
    segments = SegmentDataset(store, [5, 4, 3, 2, 1, 0], [5, 0, 2, 3, 4, 1], S2EFrontEnd())
    assert segments.counts.tolist() == [6, 1, 2, 2, 3, 1]
    assert segments.starts.tolist() == [16000 * i for count in (6, 1, 2, 2, 3, 1) for i in range(count)]
    assert segments.utterances.tolist() == [5] * 6 + [0] + [2] * 2 + [3] * 2 + [4] * 3 + [1]
    assert segments[7]["labels"].tolist() == [3]


def test_emodb_has_1211_segments(s2e_data, tmp_path):
    corpus = load_corpus("emodb", data_dir=s2e_data / "emodb", cache_dir=str(tmp_path))
    lengths = torch.tensor(
        [round(info.frames * RATE / info.samplerate) for info in map(soundfile.info, audio_files(corpus))]
    )
    store = WaveStore(torch.zeros(0, dtype=torch.int16), lengths.cumsum(0) - lengths, lengths)
    counts = {}
    for drop_tail in (False, True):
        front_end = S2EFrontEnd(drop_tail=drop_tail)
        counts[drop_tail] = len(SegmentDataset(store, corpus["label"], range(len(corpus)), front_end))
    assert counts == {False: 1211, True: 802}


def audio_files(corpus):
    return [row["path"] for row in corpus["audio"]]


def batches(sampler, epoch):
    sampler.epoch = epoch
    return list(sampler)


def test_order_depends_on_seed_and_epoch_alone():
    labels = torch.arange(103) % 4
    first, second = ShuffledBatches(labels, 10, seed=7), ShuffledBatches(labels, 10, seed=7)
    batches(second, 4)
    assert batches(first, 2) == batches(second, 2) != batches(first, 3)
    assert batches(first, 2) != batches(ShuffledBatches(labels, 10, seed=8), 2)
    drawn = [i for batch in batches(first, 0) for i in batch]
    assert len(drawn) == len(set(drawn)) == 100  # without the incomplete batch
    assert len(batches(ShuffledBatches(labels[:3], 10, seed=0), 0)[0]) == 3  # unless it is the only one


def test_balanced_batches_draw_every_class_alike():
    labels = torch.tensor([0] * 900 + [1] * 90 + [2] * 10)
    drawn = torch.tensor(batches(ShuffledBatches(labels, 100, seed=0, balance=True), 0)).flatten()
    shares = torch.bincount(labels[drawn], minlength=3) / len(drawn)
    assert torch.allclose(shares, torch.full((3,), 1 / 3), atol=0.05)


# ---- the same spectrograms and answers as everywhere else


@dataclass
class OneUtterance:
    store: WaveStore
    labels: list
    utterances: list
    front_end: S2EFrontEnd


@pytest.mark.parametrize("normalization", ["segment", "utterance", "none"])
def test_segments_are_those_of_the_feature_extractor(tmp_path, normalization):
    front_end = S2EFrontEnd(normalization=normalization)
    corpus = corpus_of(tmp_path, random_waves(500, 9_000, 32_000, 70_123))
    store = WaveStore.build(corpus, tmp_path / "cache", progress=False)
    for utterance in range(4):
        task = OneUtterance(store, [0] * 4, [utterance], front_end)
        segments = SegmentDataset(store, [0] * 4, [utterance], front_end)
        mine = Features(task, Recipe(), torch.device("cpu"))(segments.utterances, segments.starts)
        theirs = front_end(torch.from_numpy(load_audio(tmp_path / f"{utterance}.wav")))
        assert mine.shape == theirs.shape
        assert torch.allclose(mine, theirs, atol=1e-5)


@pytest.mark.parametrize("aggregation", ["mean", "geometric", "max"])
def test_prediction_is_that_of_the_whole_utterance(work, aggregation):
    model = work.model("residual_adapter", seed=3).eval()
    model.config.aggregation = aggregation
    extractor = S2EFeatureExtractor.from_model_config(model.config)
    rows = [5, 20, 11]
    found = predict(model, work.task(model, rows), device=torch.device("cpu"), batch_size=4)
    for row, posterior in zip(rows, found):
        wave = load_audio(work.corpus[row]["audio"]["path"])
        inputs = extractor(wave, sampling_rate=RATE, return_tensors="pt")
        with torch.no_grad():
            expected = model(**inputs).logits.softmax(-1)[0].numpy()
        assert np.abs(posterior - expected).max() < 1e-4


def test_a_file_is_there_whole_or_not_at_all(tmp_path):
    for text in ("old", "new"):
        with atomic_write(tmp_path / "file") as partial:
            partial.write_text(text)
    with pytest.raises(OSError), atomic_write(tmp_path / "file") as partial:
        partial.write_text("half")
        raise OSError("No space left on device")
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "new"
