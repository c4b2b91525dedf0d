"""The audit finds each planted fault, and nothing in a corpus without one."""

import json
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile

from hf_s2e.cli import main
from hf_s2e.evaluation import audit as audit_module
from hf_s2e.evaluation.audit import audit
from hf_s2e.evaluation.protocols import make_protocol
from hf_s2e.evaluation.reports import audit_text

CLASSES = ["neutral", "angry", "sad"]


def sound(seed, seconds=None, rate=16_000, level=0.1):
    rng = np.random.default_rng(seed)
    seconds = rng.uniform(0.2, 0.6) if seconds is None else seconds
    return (level * rng.standard_normal(int(seconds * rate))).clip(-0.99, 0.99).astype(np.float32)


class Corpus:
    """Files and table of a small corpus: 6 speakers x 3 classes x 4 utterances of noise, free of faults."""

    def __init__(self, folder, speakers=6, each=4):
        self.folder, self.rows = folder, []
        for number in range(speakers * len(CLASSES) * each):
            speaker, label = number % speakers, number // speakers % len(CLASSES)
            self.add(f"{number:03d}.wav", label, f"s{speaker}", sound(number))

    def add(self, name, label, speaker, samples, rate=16_000, **how):
        path = self.folder / name
        if samples is not None:
            soundfile.write(path, samples, rate, **how)
        self.rows.append({"audio": str(path), "label": label, "speaker": speaker})

    def rewrite(self, row, samples, rate=16_000):
        soundfile.write(self.rows[row]["audio"], samples, rate)

    def dataset(self, **columns):
        table = {key: [row[key] for row in self.rows] for key in self.rows[0]} | columns
        data = datasets.Dataset.from_dict(table).cast_column("audio", datasets.Audio(decode=False))
        return data.cast_column("label", datasets.ClassLabel(names=CLASSES))


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "with blank ü"
    folder.mkdir()
    return Corpus(folder)


def found(report, kind):
    return [finding for finding in report["findings"] if finding["kind"] == kind]


def only(report, kind):
    """The one finding, and no other kind beside it."""
    assert [finding["kind"] for finding in report["findings"]] == [kind], report["findings"]
    return report["findings"][0]


def test_nothing_is_found_where_nothing_is_wrong(corpus):
    data = corpus.dataset()
    report = audit(data, protocol=make_protocol("loso", data))
    assert report["findings"] == []
    counts = report["counts"]
    assert counts["files"] == 72 and counts["unreadable"] == 0
    assert counts["classes"] == dict.fromkeys(CLASSES, 24)
    assert counts["speakers"]["s0"] == dict.fromkeys(CLASSES, 4) and len(counts["speakers"]) == 6
    assert counts["sampling_rates"] == {"16000": 72}
    assert counts["ua_by_speaker"] == counts["chance_ua"] == pytest.approx(100 / 3, abs=0.01)
    seconds = [len(soundfile.read(row["audio"])[0]) / 16_000 for row in corpus.rows]
    assert counts["hours"] == pytest.approx(sum(seconds) / 3600, abs=0.001)
    assert counts["duration_s"]["max"] == pytest.approx(max(seconds), abs=0.001)
    assert sum(map(sum, counts["duration_s"]["histogram"].values())) == 72
    assert json.loads(json.dumps(report)) == report


def test_unreadable_files_are_named_with_the_reason(corpus):
    (corpus.folder / "003.wav").write_bytes(b"no sound")
    (corpus.folder / "004.wav").write_bytes(b"")
    (corpus.folder / "005.wav").unlink()
    report = audit(corpus.dataset())
    finding = only(report, "unreadable")
    assert finding["files"] == ["003.wav", "004.wav", "005.wav"] and finding["severity"] == "error"
    assert "; 003.wav: " in finding["message"] and str(corpus.folder) not in finding["message"]
    assert report["counts"]["unreadable"] == 3


def test_silent_and_clipped_files(corpus):
    corpus.rewrite(0, np.zeros(5000, np.float32))
    corpus.rewrite(1, sound(1, level=1e-5))
    corpus.rewrite(2, (20 * sound(2)).clip(-1, 1))
    short_peak = sound(3)
    short_peak[100] = 1.0  # one sample at full scale is no clipping
    corpus.rewrite(3, short_peak)
    report = audit(corpus.dataset())
    silent, clipped = report["findings"]
    assert silent["kind"] == "silent" and silent["files"] == ["000.wav", "001.wav"]
    assert clipped["kind"] == "clipped" and clipped["files"] == ["002.wav"]


def test_equal_samples_in_other_files_and_formats(corpus):
    samples, _ = soundfile.read(corpus.rows[0]["audio"], dtype="float32")
    corpus.add("same label.flac", 0, "s0", samples)
    other, _ = soundfile.read(corpus.rows[1]["audio"], dtype="float32")
    corpus.add("other label.wav", 2, "s4", other, subtype="FLOAT")
    same, different = found(audit(corpus.dataset()), "duplicate_audio")
    assert same["files"] == ["000.wav", "same label.flac"] and same["severity"] == "warning"
    assert different["files"] == ["001.wav", "other label.wav"] and different["severity"] == "error"
    assert "different labels and different speakers" in different["message"]


def test_silent_files_are_no_duplicates_of_each_other(corpus):
    corpus.rewrite(0, np.zeros(5000, np.float32))
    corpus.rewrite(1, np.zeros(5000, np.float32))
    assert not found(audit(corpus.dataset()), "duplicate_audio")


def test_a_row_twice(corpus):
    corpus.rows.append(corpus.rows[5])
    assert only(audit(corpus.dataset()), "duplicate_row")["files"] == ["005.wav"]


def test_constant_durations(corpus):
    for row in range(0, 72, 3):
        corpus.rewrite(row, sound(row, seconds=0.5))
    finding = only(audit(corpus.dataset()), "constant_duration")
    assert len(finding["files"]) == 24 and "24 of 72 files last exactly 0.500 s" in finding["message"]


def test_durations_that_give_the_label_away(corpus):
    for row, entry in enumerate(corpus.rows):
        corpus.rewrite(row, sound(row, seconds=0.2 + 0.2 * entry["label"] + 0.0005 * row))
    report = audit(corpus.dataset())
    assert only(report, "duration_predicts_label")["severity"] == "error"
    assert report["counts"]["ua_by_duration"] > 90


def test_speakers_of_one_emotion_each(corpus):
    for row in corpus.rows:
        row["speaker"] = f"{CLASSES[row['label']]}{row['speaker']}"
    report = audit(corpus.dataset())
    finding = only(report, "speaker_predicts_label")
    assert finding["severity"] == "error" and "18 of 18 speakers have one label only" in finding["message"]
    assert report["counts"]["ua_by_speaker"] == 100


def test_a_label_of_one_speaker(corpus):
    corpus.rows = [row for row in corpus.rows if row["label"] != 2 or row["speaker"] == "s3"]
    finding = found(audit(corpus.dataset()), "label_with_one_speaker")[0]
    assert "'sad' has the one speaker 's3'" in finding["message"] and len(finding["files"]) == 4
    for row in corpus.rows:
        row["speaker"] = None if row["label"] == 1 else row["speaker"]
    (finding,) = found(audit(corpus.dataset()), "label_with_one_speaker")  # of whom nothing is known is no one
    assert "'sad'" in finding["message"]


def test_shared_speakers_in_the_corpus_own_split(corpus):
    test_rows = {0, 1, 2, 3, 4} | {row for row, entry in enumerate(corpus.rows) if entry["speaker"] == "s5"}
    split = ["test" if row in test_rows else "train" for row in range(72)]
    finding = found(audit(corpus.dataset(split=split)), "speaker_overlap")[0]
    assert finding["severity"] == "error" and "5 speakers" in finding["message"]
    assert finding["files"] == [f"00{row}.wav" for row in range(5)]


def test_speakers_of_validation_and_test_in_the_corpus_own_split(corpus):
    parts = {"s4": "validation", "s5": "test"}
    split = [parts.get(entry["speaker"], "train") for entry in corpus.rows]
    assert not found(audit(corpus.dataset(split=split)), "speaker_overlap")
    split[next(row for row, part in enumerate(split) if part == "test")] = "validation"
    finding = found(audit(corpus.dataset(split=split)), "speaker_overlap")[0]
    assert "fold 'test': 1 speakers are in training or validation, and in test (s5)" in finding["message"]


def test_shared_speakers_in_a_protocol(corpus):
    data = corpus.dataset()
    report = audit(data, protocol=make_protocol("5fold", data, speaker_disjoint=False))
    assert [finding["kind"] for finding in report["findings"]] == ["speaker_overlap"] * 5
    assert not audit(data, protocol=make_protocol("5fold", data))["findings"]


def test_unknown_speakers_and_labels_and_empty_classes(corpus):
    corpus.rows = [row for row in corpus.rows if row["label"] != 1]
    corpus.rows[0]["label"], corpus.rows[1]["speaker"] = None, None
    report = audit(corpus.dataset())
    assert found(report, "unlabelled")[0]["files"] == ["000.wav"]
    assert found(report, "no_speaker")[0]["files"] == ["001.wav"]
    assert found(report, "empty_class")[0]["message"] == "'angry' has no utterance"
    report = audit(corpus.dataset().remove_columns("speaker"))
    assert len(found(report, "no_speaker")[0]["files"]) == 48 and "ua_by_speaker" not in report["counts"]


def test_mixed_and_low_rates(corpus):
    corpus.rewrite(0, sound(0, rate=44_100), 44_100)
    corpus.rewrite(1, sound(1, rate=4_000), 4_000)
    mixed, low = found(audit(corpus.dataset()), "sampling_rate")
    assert mixed["files"] == ["000.wav", "001.wav"] and low["files"] == ["001.wav"]


def test_a_corpus_of_speakers_has_no_labels_to_leak(corpus):
    data = corpus.dataset()
    speakers = sorted(set(data["speaker"]))
    data = data.remove_columns("label").add_column("label", [speakers.index(s) for s in data["speaker"]])
    report = audit(data.cast_column("label", datasets.ClassLabel(names=speakers)))
    assert report["findings"] == [] and "ua_by_speaker" not in report["counts"]


def test_audio_within_the_table(corpus):
    paths = [Path(row["audio"]) for row in corpus.rows]
    rows = [{"path": path.name, "bytes": path.read_bytes()} for path in paths]
    data = corpus.dataset().remove_columns("audio").add_column("audio", rows)
    assert audit(data.cast_column("audio", datasets.Audio(decode=False)))["findings"] == []


def test_an_empty_corpus_is_an_error(corpus):
    with pytest.raises(ValueError, match="no utterances"):
        audit(corpus.dataset().select([]))


def test_text_names_kinds_and_first_files(corpus):
    for row in range(0, 72, 3):
        corpus.rewrite(row, sound(row, seconds=0.5))
    text = audit_text(audit(corpus.dataset()), "my corpus")
    assert text.startswith("my corpus: 72 files") and "warning  constant_duration" in text
    assert "000.wav" in text and "and 19 more" in text
    assert "chance 33.3 %" in text


@pytest.fixture
def command(corpus, monkeypatch):
    loaded = {}

    def load_corpus(name, data_dir=None, **options):
        loaded.update(name=name, data_dir=data_dir, **options)
        if data_dir == "missing":
            raise ValueError("missing is not a folder")
        return corpus.dataset()

    monkeypatch.setattr("hf_s2e.corpora.load_corpus", load_corpus)
    return lambda *words: s2e("mine", *words), loaded


def test_command_line(command, corpus, capsys, tmp_path):
    audit_command, loaded = command
    assert audit_command("--data-dir", "somewhere", "--fail-on-findings", "--protocol", "loso") == 0
    assert "0 findings" in capsys.readouterr().out and loaded["strict"] is False
    corpus.rewrite(0, np.zeros(5000, np.float32))
    assert audit_command("--data-dir", "somewhere", "--json", "--labels", "a,b") == 0
    report = json.loads(capsys.readouterr().out)
    assert only(report, "silent")["files"] == ["000.wav"] and loaded["labels"] == ["a", "b"]
    plot = tmp_path / "audit.png"
    assert audit_command("--data-dir", "somewhere", "--fail-on-findings", "--plot", str(plot)) == 1
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert audit_command("--data-dir", "missing") == 2
    assert "missing is not a folder" in capsys.readouterr().err
    assert audit_command("--data-dir", "somewhere", "--protocol", "session") == 2


def test_command_line_with_a_protocol_file(command, corpus, capsys, tmp_path):
    audit_command, _ = command
    make_protocol("5fold", corpus.dataset(), speaker_disjoint=False).save(tmp_path / "p.json")
    assert audit_command("--protocol", str(tmp_path / "p.json"), "--json") == 0
    assert len(found(json.loads(capsys.readouterr().out), "speaker_overlap")) == 5


def s2e(*words):
    """The command as a user calls it, in this process."""
    return main(["audit", *map(str, words)])


@pytest.fixture
def own(corpus, monkeypatch, tmp_path):
    """The corpus with a table whose columns have names of their own, and a cache of its own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    lines = [f"{Path(row['audio']).name},{CLASSES[row['label']]},{row['speaker']}" for row in corpus.rows]
    (corpus.folder / "list.csv").write_text("\n".join(["path,emotion,who", *lines]))
    return corpus


def test_the_command_takes_a_table_with_any_columns(own, capsys):
    options = json.dumps({"label": "emotion", "speaker": "who"})
    words = ("manifest", "--data-dir", own.folder / "list.csv", "--corpus-options", options)
    assert s2e(*words, "--json", "--protocol", "loso") == 0
    assert json.loads(capsys.readouterr().out)["counts"]["files"] == 72
    for wrong in ("label=emotion", "[1]"):
        with pytest.raises(SystemExit):
            s2e("manifest", "--corpus-options", wrong)
    assert s2e(*words[:3]) == 2 and "no column 'label', only path, emotion, who" in capsys.readouterr().err


def test_what_a_strict_load_refuses_is_a_finding(own, capsys):
    (own.folder / "000.wav").write_bytes(b"")
    options = json.dumps({"label": "emotion", "speaker": "who"})
    words = ("manifest", "--data-dir", own.folder / "list.csv", "--corpus-options", options)
    assert s2e(*words, "--json", "--fail-on-findings") == 1
    finding = only(json.loads(capsys.readouterr().out), "faulty_copy")
    assert "empty files or broken links: 1" in finding["message"] and "000.wav" in finding["message"]
    assert s2e(*words, "--fail-on-findings") == 1 and "faulty_copy" in capsys.readouterr().out


def emodb(folder, ending="flac"):
    paths = sorted(folder.glob(f"*.{ending}"))
    letters = sorted({path.stem[5] for path in paths})
    table = {
        "audio": [str(path) for path in paths],
        "label": [letters.index(path.stem[5]) for path in paths],
        "speaker": [path.stem[:2] for path in paths],
    }
    data = datasets.Dataset.from_dict(table).cast_column("label", datasets.ClassLabel(names=letters))
    return data.cast_column("audio", datasets.Audio(decode=False))


def test_emodb_is_clean_and_quick(s2e_data):
    data = emodb(s2e_data / "emodb" / "wav")
    start = time.perf_counter()
    report = audit(data, protocol=make_protocol("loso", data))
    assert time.perf_counter() - start < 10
    assert report["findings"] == [] and report["counts"]["files"] == 535
    assert 15 < report["counts"]["ua_by_duration"] < 35  # sad speech is slow


def test_emodb_cut_to_two_seconds(s2e_data, tmp_path):
    for path in sorted((s2e_data / "emodb" / "wav").glob("*.flac"))[::3]:
        samples, rate = soundfile.read(path, dtype="float32")
        soundfile.write(tmp_path / f"{path.stem}.wav", samples[: 2 * rate], rate)
    finding = found(audit(emodb(tmp_path, "wav")), "constant_duration")[0]
    assert "last exactly 2.000 s" in finding["message"] and len(finding["files"]) > 100


def test_the_pair_of_equal_recordings_in_ravdess(s2e_data):
    paths = sorted((s2e_data / "ravdess" / "Actor_07").glob("03-01-03-*.ogg"))
    paths += sorted((s2e_data / "ravdess" / "Actor_08").glob("03-01-04-*.ogg"))
    labels = [int(path.parent.name == "Actor_08") for path in paths]
    table = {"audio": list(map(str, paths)), "label": labels, "speaker": [path.stem[-2:] for path in paths]}
    data = datasets.Dataset.from_dict(table).cast_column("label", datasets.ClassLabel(names=["happy", "sad"]))
    report = audit(data.cast_column("audio", datasets.Audio(decode=False)))
    (finding,) = found(report, "duplicate_audio")
    names = ["Actor_07/03-01-03-01-02-01-07.ogg", "Actor_07/03-01-03-01-02-02-07.ogg"]
    assert finding["files"] == names and finding["severity"] == "warning"


def test_constants_are_those_of_the_documentation():
    assert pytest.approx(10 ** (-60 / 20)) == audit_module.SILENT_PEAK
