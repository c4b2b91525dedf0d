"""Scores against scikit-learn, intervals and tests against what is known about them."""

import pickle
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_s2e.evaluation import metrics
from hf_s2e.evaluation.evaluate_metric import SpeechEmotionMetric


@st.composite
def _runs(draw):
    num_classes = draw(st.integers(2, 8))
    size = draw(st.integers(1, 60))
    classes = st.lists(st.integers(0, num_classes - 1), min_size=size, max_size=size)
    return draw(classes), draw(classes), num_classes


@given(_runs())
@settings(max_examples=60, deadline=None)
@pytest.mark.filterwarnings("ignore")
def test_scores_equal_scikit_learn(run):
    from sklearn import metrics as sk

    labels, predictions, num_classes = run
    expected = sk.confusion_matrix(labels, predictions, labels=range(num_classes))
    np.testing.assert_array_equal(metrics.confusion_matrix(labels, predictions, num_classes), expected)
    assert metrics.weighted_accuracy(labels, predictions, num_classes) == pytest.approx(
        sk.accuracy_score(labels, predictions)
    )
    assert metrics.unweighted_accuracy(labels, predictions, num_classes) == pytest.approx(
        sk.balanced_accuracy_score(labels, predictions)
    )
    assert metrics.macro_f1(labels, predictions, num_classes) == pytest.approx(
        sk.f1_score(labels, predictions, average="macro", zero_division=0)
    )
    every = range(num_classes)
    recalls = sk.recall_score(labels, predictions, labels=every, average=None, zero_division=np.nan)
    np.testing.assert_allclose(metrics.class_recalls(labels, predictions, num_classes), recalls)


@pytest.mark.parametrize(
    ("labels", "predictions", "message"),
    [
        ([0, 1], [0], "one prediction per label"),
        ([], [], "at least one"),
        ([0, 4], [0, 1], "labels hold 4"),
        ([0, 1], [0, -1], "predictions hold -1"),
        ([0.5, 1], [0, 1], "labels are float64"),
    ],
)
def test_bad_input_is_named(labels, predictions, message):
    with pytest.raises(ValueError, match=message):
        metrics.scores(labels, predictions, 4)


def test_mean_std_over_runs():
    assert metrics.mean_std([0.5, 0.7]) == pytest.approx((0.6, np.std([0.5, 0.7], ddof=1)))
    assert metrics.mean_std([0.5]) == (0.5, None)


def _corpus(rng, speakers=20, each=60, num_classes=4, spread=0.0, accuracy=0.7):
    """Labels, predictions and speakers; speaker s is right with probability accuracy + spread * N(0, 1)."""
    ids = np.repeat(np.arange(speakers), each)
    labels = np.tile(np.arange(num_classes), speakers * each // num_classes)
    chance = np.clip(accuracy + spread * rng.standard_normal(speakers), 0, 1)
    right = rng.random(len(labels)) < chance[ids]
    return labels, np.where(right, labels, (labels + 1) % num_classes), ids


def test_interval_of_independent_utterances_is_the_binomial_one():
    labels, predictions, _ = _corpus(np.random.default_rng(0))
    low, high = metrics.bootstrap_ci(labels, predictions, 4, metric="wa")
    wa = metrics.weighted_accuracy(labels, predictions, 4)
    expected = 1.96 * np.sqrt(wa * (1 - wa) / len(labels))
    assert (high - low) / 2 == pytest.approx(expected, rel=0.08)
    assert (high + low) / 2 == pytest.approx(wa, abs=0.005)


@pytest.mark.parametrize("speakers", [3, 10, 24])
@pytest.mark.parametrize("spread", [0.0, 0.1])
def test_the_interval_covers_the_truth_as_often_as_it_says(speakers, spread):
    rng, covered, trials = np.random.default_rng(1), 0, 300
    for _ in range(trials):
        labels, predictions, ids = _corpus(rng, speakers, spread=spread)
        low, high = metrics.bootstrap_ci(labels, predictions, 4, ids, resamples=300)
        covered += low <= 0.7 <= high
    assert 0.92 <= covered / trials <= 0.98  # 0.95 would be outside once in 60 times


def test_the_interval_widens_with_the_spread_of_speakers():
    rng, widths = np.random.default_rng(1), {0.0: [], 0.1: []}
    for spread, found in widths.items():
        for _ in range(20):
            labels, predictions, speakers = _corpus(rng, spread=spread)
            low, high = metrics.bootstrap_ci(labels, predictions, 4, speakers, resamples=300)
            plain = metrics.bootstrap_ci(labels, predictions, 4, resamples=300)
            found.append((high - low) / (plain[1] - plain[0]))
    assert np.mean(widths[0.0]) == pytest.approx(1, abs=0.12)
    # a speaker's accuracy has the variance 0.1**2 + 0.7 * 0.3 / 60 instead of 0.7 * 0.3 / 60
    assert np.mean(widths[0.1]) == pytest.approx(np.sqrt(1 + 0.01 / (0.21 / 60)), rel=0.12)


def test_the_interval_of_a_difference_covers_it_as_often_as_it_says():
    rng, covered, trials = np.random.default_rng(2), 0, 300
    for _ in range(trials):
        labels, a, ids = _corpus(rng, 10, spread=0.05)
        _, b, _ = _corpus(rng, 10, spread=0.05, accuracy=0.6)
        low, high = metrics.paired_test(labels, a, b, 4, ids, resamples=300)["ci95"]
        covered += low <= 0.1 <= high
    assert 0.91 <= covered / trials <= 0.985


def test_one_speaker_is_an_interval_over_utterances():
    labels, predictions, ids = _corpus(np.random.default_rng(0), speakers=1)
    alone = metrics.bootstrap_ci(labels, predictions, 4, ids)
    assert alone == metrics.bootstrap_ci(labels, predictions, 4) and alone[0] < alone[1]
    assert metrics.bootstrap_ci([0], [0], 2) == (1.0, 1.0)
    paired = metrics.paired_test(labels, labels, predictions, 4, ids)
    assert paired == metrics.paired_test(labels, labels, predictions, 4) and paired["p"] < 0.01


def test_an_interval_ends_where_scores_end():
    labels = np.array([0, 1] * 3)
    low, high = metrics.bootstrap_ci(labels, [0, 0, 0, 1, 0, 1], 2, speakers=["x", "x", "y", "y", "z", "z"])
    assert (low, high) != (0, 1) and 0 <= low < high == 1


def test_interval_of_ua_differs_from_wa_when_classes_are_uneven():
    labels = np.array([0] * 90 + [1] * 10)
    predictions = np.zeros(100, int)
    assert metrics.bootstrap_ci(labels, predictions, 2, metric="ua") == (0.5, 0.5)
    assert metrics.bootstrap_ci(labels, predictions, 2, metric="wa")[0] < 0.9
    with pytest.raises(ValueError, match="expected 'ua' or 'wa'"):
        metrics.bootstrap_ci(labels, predictions, 2, metric="f1")


def test_runs_are_averaged_per_utterance():
    rng = np.random.default_rng(2)
    labels = np.arange(200) % 4
    runs = rng.integers(0, 4, (3, 200))
    other = rng.integers(0, 4, (2, 200))
    result = metrics.paired_test(labels, runs, other, 4)
    expected = np.mean([metrics.unweighted_accuracy(labels, r, 4) for r in runs]) - np.mean(
        [metrics.unweighted_accuracy(labels, r, 4) for r in other]
    )
    assert result["ua_diff"] == pytest.approx(expected)
    assert result["ci95"][0] < result["ua_diff"] < result["ci95"][1]


def test_exact_permutation_p_by_hand():
    # a is right on everything and b on nothing, three speakers: only +++ and --- reach the observed sum
    labels = np.array([0, 1] * 3)
    result = metrics.paired_test(labels, labels, 1 - labels, 2, speakers=["x", "x", "y", "y", "z", "z"])
    assert result["p"] == pytest.approx(2 / 8)
    assert result["ua_diff"] == pytest.approx(1) and result["ci95"] == pytest.approx([1, 1])
    assert result["test"] == "permutation over 3 speakers, exact"


def test_paired_test_is_antisymmetric_and_one_for_equal_methods():
    labels, a, speakers = _corpus(np.random.default_rng(3))
    _, b, _ = _corpus(np.random.default_rng(4))
    forward = metrics.paired_test(labels, a, b, 4, speakers)
    backward = metrics.paired_test(labels, b, a, 4, speakers)
    assert forward["ua_diff"] == pytest.approx(-backward["ua_diff"])
    assert forward["p"] == backward["p"]
    assert metrics.paired_test(labels, a, a, 4, speakers)["p"] == 1


@pytest.mark.parametrize("speakers", [12, 20])
def test_p_is_uniform_when_the_methods_are_alike(speakers):
    rng = np.random.default_rng(5)
    p = []
    for _ in range(150):
        labels, a, ids = _corpus(rng, speakers=speakers, each=20)
        _, b, _ = _corpus(rng, speakers=speakers, each=20)
        p.append(metrics.paired_test(labels, a, b, 4, ids, resamples=2)["p"])
    assert np.mean(np.array(p) < 0.05) < 0.12
    assert 0.4 < np.mean(p) < 0.6


def test_a_real_difference_is_found():
    labels, a, speakers = _corpus(np.random.default_rng(6), accuracy=0.75)
    _, b, _ = _corpus(np.random.default_rng(7), accuracy=0.65)
    result = metrics.paired_test(labels, a, b, 4, speakers)
    assert result["p"] < 0.01 and result["ci95"][0] > 0


def test_the_bootstrap_is_fast():
    rng = np.random.default_rng(8)
    labels = rng.integers(0, 8, 1500)
    a, b = rng.integers(0, 8, (2, 3, 1500))
    start = time.perf_counter()
    metrics.paired_test(labels, a, b, 8, np.arange(1500) % 24)
    assert time.perf_counter() - start < 5  # measured: 0.3 s; generous for a busy machine


def test_evaluate_metric_offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_EVALUATE_OFFLINE", "1")
    evaluate = pytest.importorskip("evaluate")
    metric = SpeechEmotionMetric(cache_dir=str(tmp_path))
    assert isinstance(metric, evaluate.Metric)
    labels, predictions = [0, 0, 1, 2], [0, 1, 1, 2]
    metric.add_batch(predictions=predictions[:2], references=labels[:2])
    metric.add_batch(predictions=predictions[2:], references=labels[2:])
    result = metric.compute(label_names=["angry", "happy", "sad", "calm"])
    assert result["ua"] == pytest.approx(2.5 / 3) and result["wa"] == 0.75
    assert result["recall"] == {"angry": 0.5, "happy": 1.0, "sad": 1.0, "calm": None}
    assert result["confusion_matrix"][0] == [1, 1, 0, 0]
    direct = metric.compute(predictions=predictions, references=labels)
    assert direct["ua"] == result["ua"] and list(direct["recall"]) == ["0", "1", "2"]
    assert pickle.loads(pickle.dumps(SpeechEmotionMetric)) is SpeechEmotionMetric


NUMPY_ONLY = """
import sys
for name in "torch transformers datasets evaluate soundfile soxr av matplotlib sklearn scipy pandas pyarrow".split():
    sys.modules[name] = None
from hf_s2e.evaluation import audit, metrics, plots, protocols, reports
assert metrics.scores([0, 1], [0, 1], 2)["ua"] == 1
"""


def test_imports_with_numpy_alone():
    result = subprocess.run([sys.executable, "-c", NUMPY_ONLY], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
