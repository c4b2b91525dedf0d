"""Corpora decoded lazily, in workers, train exactly as those decoded once."""

import math

import numpy as np
import pytest
import soundfile
import torch
from datasets import Audio, Dataset
from training_tools import (
    AUGMENTED,
    fresh_accelerator,
    same_tensors,
    script,
    without_speed,
)

from hf_s2e.audio import AudioError, load_audio
from hf_s2e.training import lazy_store as lazy_module
from hf_s2e.training.checkpoints import TrainingError, finished_checkpoints
from hf_s2e.training.inputs import make_task
from hf_s2e.training.lazy_store import LazyStore
from hf_s2e.training.loop import train
from hf_s2e.training.predict import predict
from hf_s2e.training.recipe import Recipe
from hf_s2e.training.wave_store import WaveStore

pytestmark = pytest.mark.usefixtures("one_thread")


def lazy_store(work, workers=1):
    return LazyStore.build(work.corpus, work.folder / "cache", progress=False, workers=workers)


def learn(work, store, settings, **options):
    model = work.model(recipe=settings)
    task = make_task(work.corpus, store, range(24), model.config)
    return model, without_speed(train(fresh_accelerator(), model, task, settings, seed=3, **options))


def test_pieces_are_slices_of_the_padded_sound(work):
    store, rng = lazy_store(work), np.random.default_rng(0)
    utterances, starts = rng.integers(24, size=30), rng.integers(-900, 60_000, size=30)
    pieces = store.read(utterances, starts, 700)
    assert pieces.dtype == torch.int16 and pieces.shape == (30, 700)
    for piece, utterance, start in zip(pieces, utterances, starts):
        wave = np.round(load_audio(work.corpus[int(utterance)]["audio"]["path"]) * 32768).astype(np.int16)
        assert np.array_equal(piece.numpy(), np.pad(wave, (900, 70_000))[900 + start : 1600 + start])
    assert torch.equal(store.lengths, work.store.lengths)


@pytest.mark.parametrize(
    "augmentation, workers", [({}, 1), (AUGMENTED, 2)], ids=["as in the paper, 1 worker", "augmented, 2 workers"]
)
def test_it_learns_what_the_store_teaches(work, augmentation, workers):
    settings = Recipe(num_train_epochs=2, per_device_train_batch_size=5, **augmentation)
    once, losses = learn(work, work.store, settings)
    lazily, others = learn(work, lazy_store(work, workers), settings)
    assert others == losses and same_tensors(once, lazily)


def test_it_answers_what_the_store_answers(work):
    model = work.model()
    found = [
        predict(model, make_task(work.corpus, store, range(24), model.config), device=torch.device("cpu"), batch_size=7)
        for store in (work.store, lazy_store(work))
    ]
    assert np.array_equal(*found)


def test_resumed_with_random_crops(work, tmp_path):
    settings = Recipe(num_train_epochs=2, per_device_train_batch_size=5, random_crop=True)
    whole, losses = learn(work, lazy_store(work), settings)
    learn(work, lazy_store(work), settings, max_train_steps=9, checkpoint_dir=tmp_path, checkpointing_steps=9)
    resumed, rest = learn(work, lazy_store(work), settings, resume_from=finished_checkpoints(tmp_path)[-1])
    assert rest == losses and same_tensors(whole, resumed)


def corpus_of(paths):
    return Dataset.from_dict({"audio": [str(p) for p in paths]}).cast_column("audio", Audio(decode=False))


def test_lengths_are_those_after_decoding_and_looked_up_once(tmp_path, monkeypatch):
    rng, paths = np.random.default_rng(0), []
    for i, (rate, ending) in enumerate(
        [(16_000, "wav"), (44_100, "flac"), (8_000, "wav"), (22_050, "ogg"), (48_000, "mp3")]
    ):
        paths.append(tmp_path / f"{i}.{ending}")
        soundfile.write(paths[-1], rng.normal(scale=0.1, size=20_011), rate)
    corpus = corpus_of(paths)
    store = LazyStore.build(corpus, tmp_path / "cache", progress=False)
    assert store.lengths.tolist() == WaveStore.build(corpus, tmp_path / "cache", progress=False).lengths.tolist()
    assert store.lengths[1] == math.ceil(20_011 * 16_000 / 44_100)
    monkeypatch.setattr(lazy_module, "map_files", lambda *args: pytest.fail("measured again"))
    assert torch.equal(LazyStore.build(corpus, tmp_path / "cache", progress=False).lengths, store.lengths)


def test_a_bad_file_is_named_before_training(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"no sound at all" * 9)
    with pytest.raises(AudioError, match=r"a\.wav"):
        LazyStore.build(corpus_of([tmp_path / "a.wav"]), tmp_path / "cache", progress=False)
    assert not list((tmp_path / "cache").glob("*"))


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])  # a broken worker takes 5 s to end
def test_a_file_that_goes_missing_in_the_middle_of_an_epoch(work, tmp_path, workers):
    paths = []
    for row in work.corpus:
        wave, rate = soundfile.read(row["audio"]["path"])
        paths.append(tmp_path / f"{len(paths)}.wav")
        soundfile.write(paths[-1], wave, rate)
    corpus = corpus_of(paths).add_column("label", work.corpus["label"][:])
    store = LazyStore.build(corpus, tmp_path / "cache", progress=False, workers=workers)
    model, settings = work.model(), Recipe(num_train_epochs=3, per_device_train_batch_size=5)
    task = make_task(corpus, store, range(24), model.config)

    def lose(row):
        paths[11].unlink(missing_ok=True)

    lazy_module._decode.cache_clear()
    options = {"checkpoint_dir": tmp_path / "run", "checkpointing_steps": 3, "on_epoch": lose}
    with pytest.raises(
        TrainingError, match=r"11\.wav: cannot be opened.* The last good checkpoint is .*step_"
    ) as error:
        train(fresh_accelerator(), model, task, settings, **options)
    assert len(str(error.value).splitlines()) == 1
    assert finished_checkpoints(tmp_path / "run")


def test_utterance_normalization_is_refused(work):
    settings, model = Recipe(num_train_epochs=1), work.model()
    task = make_task(work.corpus, lazy_store(work), range(24), model.config)
    task.front_end.normalization = "utterance"
    with pytest.raises(TrainingError, match="decode them once"):
        train(fresh_accelerator(), model, task, settings)


def test_the_scripts_decode_as_they_are_told(work, tmp_path):
    flags = {"method": "residual_adapter", "model_name_or_path": work.adapter, "num_train_epochs": 1}
    flags |= {"per_device_train_batch_size": 5, "cache_dir": tmp_path / "cache"}
    script("adapt").main(work.flags(output_dir=tmp_path / "out", decode="lazily", dataloader_num_workers=1, **flags))
    assert (tmp_path / "out" / "adapter.safetensors").is_file()
    assert not list((tmp_path / "cache").rglob("waves.i16"))
    with pytest.raises(SystemExit, match="--decode is 'never', but must be once or lazily"):
        script("adapt").main(work.flags(output_dir=tmp_path / "other", decode="never", **flags))
