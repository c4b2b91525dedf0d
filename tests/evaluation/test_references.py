"""Ready-made features with an SVM: nothing of the test speakers is used, and the report is what others read."""

import json

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from training_tools import BENCHMARKS, script

from hf_s2e.evaluation.protocols import Protocol
from hf_s2e.evaluation.reports import summarize
from hf_s2e.training.result_folder import ResultFolder
from hf_s2e.training.wave_store import WaveStore

pytest.importorskip("sklearn", reason="needs scikit-learn (extra bench or dev)")

SPEAKERS = [f"s{row // 20}" for row in range(120)]  # six, 20 utterances each
LABELS = np.arange(120) % 3
TRAIN, TEST = np.arange(100), np.arange(100, 120)
NAMES = {"majority_class", "duration_svm", "own_svm"}


@pytest.fixture(scope="module")
def references():
    return script("references", BENCHMARKS)


@pytest.fixture(scope="module")
def features():
    """The class in the first three features, the speaker in further ones, and noise."""
    random = np.random.default_rng(0)
    speaker = np.array([int(name[1:]) for name in SPEAKERS])
    values = np.concatenate([np.eye(3)[LABELS], np.eye(6)[speaker], np.zeros((120, 20))], axis=1)
    return values * 2 + random.normal(size=values.shape)


def test_classes_are_learnt(references, features):
    predictions, c = references.svm_predictions(features, LABELS, SPEAKERS, TRAIN, TEST)
    assert np.mean(predictions == LABELS[TEST]) > 0.7 and c in references.C_GRID
    shuffled = np.random.default_rng(1).permutation(LABELS)
    predictions, _ = references.svm_predictions(features, shuffled, SPEAKERS, TRAIN, TEST)
    assert np.mean(predictions == shuffled[TEST]) < 0.6


def test_scale_and_offset_of_a_feature_do_not_matter(references, features):
    first = references.svm_predictions(features, LABELS, SPEAKERS, TRAIN, TEST)
    scaled = features * np.geomspace(1e-3, 1e3, features.shape[1]) + 7
    second = references.svm_predictions(scaled, LABELS, SPEAKERS, TRAIN, TEST)
    assert (first[0] == second[0]).all() and first[1] == second[1]


def test_nothing_of_the_test_part_is_used(references, features):
    """Neither its labels nor, by way of standardisation, other test utterances change a prediction."""
    first, c = references.svm_predictions(features, LABELS, SPEAKERS, TRAIN, TEST)
    changed, labels = features.copy(), LABELS.copy()
    changed[TEST[10:]] = changed[TEST[10:]] * 100 + 1000
    labels[TEST] = (labels[TEST] + 1) % 3
    second, c_again = references.svm_predictions(changed, labels, SPEAKERS, TRAIN, TEST)
    assert (first[:10] == second[:10]).all() and c == c_again
    assert (first[10:] != second[10:]).any()


def test_c_is_the_best_on_speakers_left_out(references, features, monkeypatch):
    def only_one_c_works(features, labels, train, test, grid):
        assert not {SPEAKERS[row] for row in train} & {SPEAKERS[row] for row in test}
        assert set(test) <= set(TRAIN) or (set(train), set(test)) == (set(TRAIN), set(TEST))
        return np.stack([labels[test] if c in (0.01, 0.1) else np.zeros(len(test), int) for c in grid])

    monkeypatch.setattr(references, "_fit_predict", only_one_c_works)
    _, c = references.svm_predictions(features, LABELS, SPEAKERS, TRAIN, TEST)
    assert c == 0.01  # the smaller of two equally good ones


@pytest.mark.parametrize("speakers", [2, 4, 9, 23])
def test_inner_folds_leave_each_speaker_out_once(references, speakers):
    of_row = [f"s{row % speakers}" for row in range(100)]
    folds = references.inner_folds(of_row)
    assert len(folds) == min(speakers, references.INNER_FOLDS)
    assert sorted(np.concatenate(folds)) == list(range(100))
    of_fold = [{of_row[row] for row in fold} for fold in folds]
    assert sum(map(len, of_fold)) == speakers
    assert max(map(len, of_fold)) - min(map(len, of_fold)) <= 1


def test_a_single_training_speaker_is_refused(references):
    with pytest.raises(ValueError, match="single speaker"):
        references.inner_folds(["a"] * 10)


def test_majority_is_that_of_the_training_part(references):
    labels = np.array([0, 0, 0, 0, 1, 2, 2])
    guesses = references.majority_predictions(labels, np.array([3, 4, 5, 6]), np.array([0, 1]))
    assert guesses.tolist() == [2, 2]


def loudness_and_pitch(wave):
    """Something that the toy corpus' emotions differ in."""
    crossings = np.mean(np.diff(np.sign(wave)) != 0)
    return np.array([np.log(np.mean(wave**2) + 1e-9), crossings, np.abs(np.diff(wave)).mean(), 1.0])


@pytest.fixture
def run(references, toy_folder, monkeypatch, tmp_path):
    """The script on the toy corpus, with the function above in place of the extra's."""

    def run_on_toy(function, output=tmp_path / "out", protocol="loso"):
        monkeypatch.setattr(references, "EXTRACTORS", {"own_svm": ("numpy", lambda: function)})
        monkeypatch.setattr(references, "C_GRID", (0.01, 1.0))
        arguments = ["--corpus", "toy", "--data_dir", toy_folder, "--cache_dir", tmp_path / "cache"]
        references.main([*map(str, arguments), "--protocol", protocol, "--output_dir", str(output)])
        return output

    return run_on_toy


def test_the_script_writes_what_reports_read(run, capsys):
    folder = run(loudness_and_pitch)
    printed = capsys.readouterr().out
    written = json.loads((folder / "references.json").read_text())
    table = pd.read_parquet(folder / "references.parquet")
    assert set(written) == set(table["method"]) == NAMES
    assert (table["fold"] == table["speaker"]).all()  # the test speaker of each fold
    assert (table.groupby("method")["utterance"].nunique() == 144).all() and len(table) == 3 * 144
    for name, reference in written.items():
        part = table[table["method"] == name]
        right = part["label"] == part["prediction"]
        assert reference["wa"] == pytest.approx(100 * right.mean(), abs=1e-3)
        assert reference["ua"] == pytest.approx(100 * right.groupby(part["label"]).mean().mean(), abs=1e-3)
        assert reference["measured"] is True and reference["versions"]["numpy"] == np.__version__
        assert reference["ua_ci95"][0] <= reference["ua"] <= reference["ua_ci95"][1]
        assert f"| {name} | {reference['ua']:.2f} |" in printed
    assert written["own_svm"]["ua"] > 50 > written["majority_class"]["ua"] == 25
    assert set(written["own_svm"]["C"]) == set(table["fold"]) and written["own_svm"]["features"] == 4
    assert (folder / "references.md").read_text().strip() in printed


def test_features_are_kept_and_the_same_come_out(run, tmp_path):
    first = run(loudness_and_pitch, tmp_path / "first")
    second = run(lambda wave: pytest.fail("computed again"), tmp_path / "second")
    tables = [(folder / "references.parquet").read_bytes() for folder in (first, second)]
    assert tables[0] == tables[1]


def test_other_audio_of_the_same_length_is_not_taken_for_the_kept(references, monkeypatch, tmp_path):
    monkeypatch.setattr(references, "EXTRACTORS", {"own_svm": ("numpy", lambda: lambda wave: wave[:1])})
    for value in (0, 16384):
        store = WaveStore(torch.full((50,), value).short(), torch.tensor([0]), torch.tensor([50]))
        features, _ = references.extract("own_svm", store, ["a.wav"], tmp_path)
        assert features.tolist() == [[value / 32768]]


def test_paired_tests_with_the_networks_of_the_folder(run, tmp_path):
    folder = run(loudness_and_pitch)
    table = pd.read_parquet(folder / "references.parquet")
    network = table[table["method"] == "own_svm"].assign(method="residual_adapter")
    network["prediction"] = network["label"]  # a perfect one
    protocol = {"name": "loso", "speaker_disjoint": True}
    protocol["hash"] = json.loads((folder / "references.json").read_text())["own_svm"]["protocol"]
    facts = {"corpus": "toy", "recipe": "paper", "base": "b", "classes": ["neutral", "happy", "sad", "angry"]}
    summary = summarize(network, protocol=protocol, trained_parameters={"residual_adapter": 5}, **facts)
    kept = ResultFolder(folder)
    for fold, rows in network.groupby("fold"):
        facts = {"method": "residual_adapter", "run": 0, "folds": [fold], "recipe": "paper", "part": "test"}
        kept.keep(fold, facts | {"trained_parameters": 5}, rows)
    kept.keep("begun", facts | {"run": 1, "trained_parameters": 5}, rows.assign(run=1))  # one fold of a further run
    kept.merge()
    (folder / "summary.json").write_text(json.dumps(summary))
    run(loudness_and_pitch)
    text = (folder / "references.md").read_text()
    ua = json.loads((folder / "references.json").read_text())["own_svm"]["ua"]
    assert f"| own_svm | residual_adapter | {ua - 100:+.2f} |" in text
    assert "| residual_adapter | 100.00 | 100.00 | 100.00 | 100.0 to 100.0 | 1 | 5 |" in text
    assert "not corrected for 3 comparisons" in text and "| majority_class | own_svm |" not in text
    assert set(pd.read_parquet(folder / "references.parquet")["method"]) == NAMES
    assert Protocol.load(folder / "protocol.json").hash == protocol["hash"]
    with pytest.raises(SystemExit, match="choose another --output_dir"):
        run(loudness_and_pitch, protocol="3fold")


@pytest.mark.parametrize("wrong", ["not finite", "an error"])
def test_a_file_without_features_is_named(references, monkeypatch, tmp_path, wrong):
    def function(wave):
        if wave.any():
            return np.ones(3)
        if wrong == "an error":
            raise RuntimeError("an error")
        return np.array([1.0, np.nan, 1.0])

    monkeypatch.setattr(references, "EXTRACTORS", {"own_svm": ("numpy", lambda: function)})
    waves = torch.cat([torch.ones(50), torch.zeros(50)]).short()
    store = WaveStore(waves, torch.tensor([0, 50]), torch.tensor([50, 50]))
    with pytest.raises(ValueError, match=f"silent.wav: own_svm .*{wrong}"):
        references.extract("own_svm", store, ["good.wav", "silent.wav"], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_extra_is_said(references, toy_folder, monkeypatch, tmp_path):
    monkeypatch.setattr(references, "EXTRACTORS", {"own_svm": ("no-such-distribution", None)})
    folders = {"--data_dir": toy_folder, "--cache_dir": tmp_path, "--output_dir": tmp_path}
    with pytest.raises(SystemExit, match="pip install 'hf-s2e"):
        references.main(["--corpus", "toy", *(str(part) for pair in folders.items() for part in pair)])


@pytest.mark.parametrize(
    ("name", "size"),
    [("opensmile_egemaps_svm", 88), ("opensmile_compare_svm", 6373), ("resemblyzer_svm", 256)],
)
def test_real_features_hear_the_sound_and_not_its_neighbour(references, tmp_path, name, size):
    package = references.EXTRACTORS[name][0]
    pytest.importorskip(package, reason=f"needs {package} (extra bench)")
    from hf_s2e.corpora import load_corpus

    corpus = load_corpus("toy", data_dir=tmp_path, cache_dir=tmp_path).select([0, 40, 80])
    paths = [row["path"] for row in corpus["audio"]]
    waves = [torch.from_numpy(soundfile.read(path, dtype="int16")[0].copy()) for path in paths]
    lengths = torch.tensor([len(wave) for wave in waves])
    store = WaveStore(torch.cat(waves), lengths.cumsum(0) - lengths, lengths)
    features, seconds = references.extract(name, store, paths, tmp_path / "three")
    assert features.shape == (3, size) and np.isfinite(features).all() and seconds > 0
    alone = WaveStore(waves[1], torch.tensor([0]), lengths[1:2])
    np.testing.assert_array_equal(references.extract(name, alone, paths[1:2], tmp_path)[0][0], features[1])
    assert not np.allclose(features[0], features[1])
