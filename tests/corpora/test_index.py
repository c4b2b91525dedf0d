"""The index: listing folders, the cache and its recovery, corpora of one's own, the toy corpus."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import soundfile
from conftest import ROOT
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import LeaveOneGroupOut, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from hf_s2e.corpora import CorpusError, CorpusWarning, load_corpus
from hf_s2e.corpora.files import walk
from hf_s2e.corpora.toy import Toy

DOCS = ROOT / "docs" / "corpora.md"


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"RIFF")
    return folder


def listed(folder, **options):
    return [os.path.relpath(path, folder) for path, _ in walk(folder, **options)]


# Listing


def test_walk_sorts_skips_litter_and_counts_depth(tmp_path):
    touch(tmp_path, "b/2.wav", "b/._2.wav", ".git/x.wav", "a.wav", "b/c/3.wav")
    assert listed(tmp_path) == ["a.wav", "b/2.wav", "b/c/3.wav"]
    assert listed(tmp_path, depth=2) == ["a.wav", "b/2.wav"]
    assert listed(tmp_path, depth=1) == ["a.wav"]


def test_walk_survives_links_in_circles(tmp_path):
    touch(tmp_path, "real/one/a.wav", "other/b.wav")
    (tmp_path / "real/one/up").symlink_to(tmp_path / "real")
    (tmp_path / "real/one/self").symlink_to(tmp_path / "real/one/self")
    (tmp_path / "real/aside").symlink_to(tmp_path / "other")
    (tmp_path / "other/back").symlink_to(tmp_path / "real")
    found = dict(walk(tmp_path / "real"))
    names = [os.path.relpath(path, tmp_path / "real") for path in found]
    assert names == ["aside/b.wav", "one/a.wav", "one/self"]
    assert found[str(tmp_path / "real/one/self")] == 0


def test_broken_links_and_empty_files_are_named(tmp_path):
    touch(tmp_path, "c/sad/a.wav")
    (tmp_path / "c/sad/b.wav").symlink_to(tmp_path / "gone.wav")
    (tmp_path / "c/sad/c.wav").touch()
    with pytest.raises(CorpusError, match=r"empty files or broken links: 2\n.*sad/b.wav\n.*sad/c.wav\n"):
        load_corpus("folder", tmp_path / "c", cache_dir=tmp_path / "cache")
    with pytest.warns(CorpusWarning):
        corpus = load_corpus("folder", tmp_path / "c", cache_dir=tmp_path / "cache", strict=False)
    assert len(corpus) == 1
    (tmp_path / "c/sad/c.wav").write_bytes(b"RIFF")  # repaired in place: the index follows
    with pytest.warns(CorpusWarning, match="broken links: 1"):
        assert len(load_corpus("folder", tmp_path / "c", cache_dir=tmp_path / "cache", strict=False)) == 2
    (tmp_path / "c/sad/b.wav").unlink()
    assert len(load_corpus("folder", tmp_path / "c", cache_dir=tmp_path / "cache")) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="only here can a file name be anything but UTF-8")
def test_names_that_are_not_utf8_are_named(tmp_path):
    touch(tmp_path, "c/sad/a.wav")
    with open(os.fsencode(tmp_path) + b"/c/sad/\xe4.wav", "wb") as file:
        file.write(b"RIFF")
    with pytest.raises(CorpusError, match="not valid UTF-8; rename them: 1"):
        load_corpus("folder", tmp_path / "c", cache_dir=tmp_path / "cache")


def test_a_class_without_utterances_is_an_error(tmp_path):
    touch(tmp_path, "c/sad/a.wav")
    (tmp_path / "c/list.csv").write_text("path,label\nsad/a.wav,sad\n")
    options = {"cache_dir": tmp_path / "cache", "label_map": {"sad": "sad", "mad": "angry"}}
    with pytest.raises(CorpusError, match=r"classes without an utterance: 1\n +angry"):
        load_corpus("manifest", tmp_path / "c", **options)


# Cache


def test_cache_is_reused_until_a_file_comes_or_goes(tmp_path):
    folder, cache = touch(tmp_path / "own", "sad/a.wav", "mad/b.wav"), tmp_path / "cache"

    def load(**options):
        return load_corpus("folder", folder, cache_dir=cache, **options)

    first = load()
    index = Path(first.cache_files[0]["filename"])
    written = index.stat().st_mtime_ns
    assert load().cache_files == first.cache_files and index.stat().st_mtime_ns == written
    assert len(load(labels=["sad"])) == 1
    touch(folder, "sad/c.wav")
    assert len(load()) == 3
    (folder / "sad/c.wav").rename(folder / "mad/c.wav")
    corpus = load()
    assert corpus.features["label"].int2str(corpus["label"]) == ["mad", "mad", "sad"]


def test_same_names_in_another_folder_are_another_corpus(tmp_path):
    for copy in ("one", "two"):
        touch(tmp_path / copy, "sad/a.wav")
        corpus = load_corpus("folder", tmp_path / copy, cache_dir=tmp_path / "cache")
        assert corpus[0]["audio"]["path"] == str(tmp_path / copy / "sad/a.wav")


@pytest.mark.slow
def test_next_run_recovers_from_a_killed_one(tmp_path):
    folder, cache = tmp_path / "own", tmp_path / "cache"
    touch(folder, *(f"sad/{n}.wav" for n in range(50)))
    script = (
        "import time, sys\n"
        "from hf_s2e.corpora import base, load_corpus\n"
        "base.ROWS_PER_BATCH = 10\n"
        "table = base.Corpus._table\n"
        "def slow(self, rows):\n"
        "    print('batch', flush=True)\n"
        "    time.sleep(0.3)\n"
        "    return table(self, rows)\n"
        "base.Corpus._table = slow\n"
        "load_corpus('folder', sys.argv[1], cache_dir=sys.argv[2])\n"
    )
    command = [sys.executable, "-c", script, folder, cache]
    run = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE)
    for _ in range(3):
        assert run.stdout.readline() == b"batch\n"
    run.send_signal(signal.SIGKILL)
    run.wait()
    run.stdout.close()
    left = list(cache.rglob("*.incomplete"))
    assert left, "the build was not killed half way"
    corpus = load_corpus("folder", folder, cache_dir=cache)
    assert len(corpus) == 50 and len({audio["path"] for audio in corpus["audio"]}) == 50
    assert not list(cache.rglob("*.incomplete"))


@pytest.mark.parametrize("keep", [0, 40, 0.5])
def test_damaged_cache_is_built_anew(tmp_path, keep):
    folder, cache = tmp_path / "own", tmp_path / "cache"
    touch(folder, *(f"sad/{n:03d}.wav" for n in range(300)))
    index = Path(load_corpus("folder", folder, cache_dir=cache).cache_files[0]["filename"])
    content = index.read_bytes()
    index.write_bytes(content[: keep if keep in (0, 40) else int(len(content) * keep)])
    corpus = load_corpus("folder", folder, cache_dir=cache)
    assert len(corpus) == 300 and corpus[299]["audio"]["path"].endswith("299.wav")


def test_cache_cut_between_two_batches_is_built_anew(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_s2e.corpora.base.ROWS_PER_BATCH", 100)
    folder, cache = tmp_path / "own", tmp_path / "cache"
    touch(folder, *(f"sad/{n:03d}.wav" for n in range(300)))
    index = Path(load_corpus("folder", folder, cache_dir=cache).cache_files[0]["filename"])
    with pa.ipc.open_stream(index.read_bytes()) as stream:
        first = stream.read_next_batch()
    assert len(first) < 300
    with pa.ipc.new_stream(index, first.schema) as stream:
        stream.write_batch(first)
    assert len(load_corpus("folder", folder, cache_dir=cache)) == 300


def test_missing_index_is_built_anew(tmp_path):
    folder, cache = touch(tmp_path / "own", "sad/a.wav"), tmp_path / "cache"
    Path(load_corpus("folder", folder, cache_dir=cache).cache_files[0]["filename"]).unlink()
    assert len(load_corpus("folder", folder, cache_dir=cache)) == 1


# One's own corpus: the example in the documentation


def test_example_of_the_documentation(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    example = next(block for block in blocks if "Corpus)" in block)
    assert len(example.splitlines()) <= 25
    module = tmp_path / "urdu.py"
    module.write_text(example)
    monkeypatch.syspath_prepend(tmp_path)
    names = ("Angry/SM1_F19_A019.wav", "Sad/SM2_M02_S001.wav", "Sad/SM2_M02_S002.wav")
    folder = touch(tmp_path / "URDU", *names)
    options = {"cache_dir": tmp_path / "cache", "strict": False}
    with pytest.warns(CorpusWarning, match="label angry +100 +1"):
        corpus = load_corpus("urdu:Urdu", folder, **options)
    assert corpus["speaker"][:] == ["F19", "M02", "M02"]
    assert corpus["gender"][:] == ["female", "male", "male"]
    assert corpus.features["label"].names == ["angry", "happy", "neutral", "sad"]
    assert corpus.features["label"].int2str(corpus["label"]) == ["angry", "sad", "sad"]
    with pytest.raises(CorpusError, match="cannot load corpus 'urdu:Urd'"):
        load_corpus("urdu:Urd", folder)
    # An edited module never meets the index of the old one.
    module.write_text(example.replace('"Sad": "sad"', '"Sad": "happy"'))
    with pytest.warns(CorpusWarning):
        edited = load_corpus("urdu:Urdu", folder, **options)
    assert len(edited) == 3 and edited.cache_files != corpus.cache_files


def test_documented_options_are_the_real_ones():
    from hf_s2e.corpora import _CORPORA, _find

    text = DOCS.read_text()
    for name in set(_CORPORA) - {"hub"}:
        for option in _find(name).OPTIONS:
            assert f"`{option}`" in text, f"docs/corpora.md does not mention {name}'s option {option}"


# Toy corpus


@pytest.fixture(scope="module")
def toy(toy_folder, tmp_path_factory):
    start = time.monotonic()
    corpus = load_corpus("toy", toy_folder, cache_dir=tmp_path_factory.mktemp("cache"))
    assert time.monotonic() - start < 20  # about 1.5 s on one core
    return corpus


def test_toy_is_a_corpus_of_short_wav_files(toy):
    assert toy.features["label"].names == ["neutral", "happy", "sad", "angry"]
    assert len(toy) == 6 * 4 * 6 and len(set(toy["speaker"])) == 6
    for audio in toy["audio"]:
        info = soundfile.info(audio["path"])
        assert (info.samplerate, info.channels, info.subtype) == (16_000, 1, "PCM_16")
        assert 1.4 < info.duration < 3.1


def test_toy_is_the_same_for_the_same_seed(tmp_path):
    options = {"num_speakers": 1, "utterances_per_label": 1}

    def content(where, **more):
        corpus = load_corpus("toy", tmp_path / where, cache_dir=tmp_path / "cache", **options, **more)
        return [Path(audio["path"]).read_bytes() for audio in corpus["audio"]]

    assert content("a") == content("b") != content("a", seed=1)
    path = load_corpus("toy", cache_dir=tmp_path / "cache", **options)[0]["audio"]["path"]
    assert path.startswith(str(tmp_path / "cache"))


def test_two_processes_make_the_toy_at_once(tmp_path, monkeypatch):
    options, module = {"num_speakers": 1, "utterances_per_label": 1}, sys.modules[Toy.__module__]
    write = module.write_toy

    def overtaken(folder, *sizes):
        monkeypatch.setattr(module, "write_toy", write)
        load_corpus("toy", tmp_path, cache_dir=tmp_path / "other", **options)
        write(folder, *sizes)

    monkeypatch.setattr(module, "write_toy", overtaken)
    assert len(load_corpus("toy", tmp_path, cache_dir=tmp_path / "cache", **options)) == 4
    assert not list(tmp_path.glob("*.part"))


def features(path):
    """Mean and spread of pitch (octaves), level (dB), and spectral tilt (dB) over frames of 40 ms."""
    samples, _ = soundfile.read(path)
    frames = samples[: len(samples) // 640 * 640].reshape(-1, 640)
    power = np.abs(np.fft.rfft(frames * np.hanning(640))) ** 2
    correlation = np.fft.irfft(np.abs(np.fft.rfft(frames, 1280)) ** 2)[:, 45:230]
    periods = 45 + correlation.argmax(1)
    pitch = np.log2(16_000 / periods[correlation.max(1) > 0.5 * (frames**2).sum(1)])
    level = 10 * np.log10(power.sum(1) + 1e-9)
    tilt = 10 * np.log10(power[:, :40].sum() / power[:, 40:160].sum())
    return [pitch.mean(), pitch.std(), level.mean(), level.std(), tilt]


def test_toy_emotions_can_be_told_on_unseen_speakers_but_not_perfectly(toy):
    inputs = np.array([features(audio["path"]) for audio in toy["audio"]])
    labels, speakers = np.array(toy["label"]), np.array(toy["speaker"])
    classifier = make_pipeline(StandardScaler(), LogisticRegression())
    guesses = cross_val_predict(classifier, inputs, labels, groups=speakers, cv=LeaveOneGroupOut())
    assert 0.55 < balanced_accuracy_score(labels, guesses) < 0.95  # chance is 0.25
    pitch = cross_val_predict(classifier, inputs[:, :1], labels, groups=speakers, cv=LeaveOneGroupOut())
    assert balanced_accuracy_score(labels, pitch) < 0.55
