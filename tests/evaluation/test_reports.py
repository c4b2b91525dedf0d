"""Tables and figures: that the numbers are the right ones, whole, and say what they must say."""

import json

import numpy as np
import pandas as pd
import pytest

from hf_s2e.evaluation import metrics, plots, reports
from hf_s2e.evaluation.protocols import Fold, Protocol

CLASSES = ["neutral", "angry", "sad"]
PROTOCOL = {"name": "loso", "hash": "0123456789abcdef", "speaker_disjoint": True}
PARAMETERS = {"plain": 1_360_548, "residual_adapter": 154_756}


def predictions(runs=3, seed=0, size=120):
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(size) % 3)
    speakers = [f"s{i % 6}" for i in range(size)]
    utterances = {"utterance": [f"u{i}" for i in range(size)], "speaker": speakers, "fold": speakers}
    parts = []
    for method, accuracy in (("plain", 0.5), ("residual_adapter", 0.7)):
        for run in range(runs):
            right = rng.random(size) < accuracy
            guesses = np.where(right, labels, (labels + 1) % 3)
            columns = {"run": run, "method": method, "label": labels, "prediction": guesses}
            parts.append(pd.DataFrame(utterances | columns))
    return pd.concat(parts, ignore_index=True).sample(frac=1, random_state=seed)  # rows come in any order


def summary_of(table, **changes):
    arguments = {
        "corpus": "emodb",
        "protocol": PROTOCOL,
        "recipe": "paper",
        "base": "me/s2e_base",
        "classes": CLASSES,
        "trained_parameters": PARAMETERS,
    }
    return reports.summarize(table, **(arguments | changes))


@pytest.fixture(scope="module")
def table():
    return predictions()


@pytest.fixture(scope="module")
def summary(table):
    return summary_of(table, references={"HuBERT_base": {"ua": 65.4, "wa": 66.2}, "only UA": {"ua": 77.1}})


def test_summary_has_the_agreed_form(summary):
    keys = {"corpus", "protocol", "recipe", "base", "methods", "references", "classes", "paired"}
    assert keys <= set(summary)
    assert summary["protocol"] == PROTOCOL and summary["classes"] == CLASSES
    agreed = {"ua_mean", "ua_std", "wa_mean", "wa_std", "macro_f1_mean", "ua_ci95", "runs"}
    assert set(summary["methods"]) == set(PARAMETERS)
    for name, method in summary["methods"].items():
        assert agreed <= set(method)
        assert method["trained_parameters"] == PARAMETERS[name] and method["runs"] == 3
    assert [set(pair) for pair in summary["paired"]] == [{"a", "b", "ua_diff", "ci95", "p", "test"}]
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_scores_are_pooled_over_folds_and_averaged_over_runs(table, summary):
    for name, method in summary["methods"].items():
        runs = [run for _, run in table[table["method"] == name].groupby("run")]
        pooled = [metrics.scores(run["label"], run["prediction"], 3) for run in runs]
        for key in ("ua", "wa"):
            values = [100 * score[key] for score in pooled]
            assert method[f"{key}_mean"] == pytest.approx(np.mean(values), abs=1e-3)
            assert method[f"{key}_std"] == pytest.approx(np.std(values, ddof=1), abs=1e-3)
            assert method[f"{key}_ci95"][0] < method[f"{key}_mean"] < method[f"{key}_ci95"][1]
        by_fold = [
            metrics.scores(part["label"], part["prediction"], 3)["ua"]
            for run in runs
            for _, part in run.groupby("fold")
        ]
        assert method["ua_fold_mean"] == pytest.approx(100 * np.mean(by_fold), abs=1e-3)
        assert np.sum(method["confusion"]) == 3 * 120
        recalls = [method["recall"][name] for name in CLASSES]
        assert np.mean(recalls) == pytest.approx(method["ua_mean"], abs=1e-3)


def test_paired_difference_is_that_of_the_table(summary):
    (pair,) = summary["paired"]
    methods = summary["methods"]
    difference = methods[pair["a"]]["ua_mean"] - methods[pair["b"]]["ua_mean"]
    assert pair["ua_diff"] == pytest.approx(difference, abs=1e-3)
    assert pair["ci95"][0] < pair["ua_diff"] < pair["ci95"][1] and 0 < pair["p"] <= 1
    assert pair["test"] == "permutation over 6 speakers, exact"


def test_names_for_labels_and_parquet_give_the_same(table, summary, tmp_path):
    named = table.assign(**{c: table[c].map(dict(enumerate(CLASSES))) for c in ("label", "prediction")})
    path = tmp_path / "predictions.parquet"
    named.to_parquet(path)
    again = summary_of(path, references=summary["references"])
    assert again == summary


def test_the_order_of_rows_and_utterances_does_not_matter(table):
    first, second = (summary_of(table.sample(frac=1, random_state=seed)) for seed in (1, 2))
    for name in PARAMETERS:
        for key in ("ua_mean", "ua_std", "wa_mean", "confusion", "recall"):
            assert first["methods"][name][key] == second["methods"][name][key]


def test_one_run_has_no_deviation():
    summary = summary_of(predictions(runs=1))
    assert summary["methods"]["plain"]["ua_std"] is None
    row = next(line for line in reports.markdown_table(summary).splitlines() if line.startswith("| plain |"))
    assert "None" not in row and "(" not in row


def test_a_protocol_object_is_taken():
    fold = Fold("a", ("s1",), (), ("s2",))
    protocol = Protocol("loso", "emodb", "speaker", (fold,), False, 0, tuple(CLASSES), 2, "0")
    summary = summary_of(predictions(), protocol=protocol)
    assert summary["protocol"] == {"name": "loso", "hash": protocol.hash, "speaker_disjoint": False}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop(columns="speaker"), "lack the columns speaker"),
        (lambda t: t.iloc[:0], "empty"),
        (lambda t: pd.concat([t, t.iloc[:1]]), "more than once"),
        (lambda t: t.drop(index=0), "119 of 120 utterances"),
        (lambda t: t.assign(prediction=t["prediction"] + 1), "prediction holds numbers outside 0..2"),
        (lambda t: t.assign(label="bored"), "label holds bored; the classes are neutral"),
        (lambda t: t.assign(speaker=t["run"].astype(str)), "different values of 'speaker'"),
        (lambda t: t.assign(method="new"), "more than once"),
        (lambda t: t[t["method"] == "plain"].assign(method="new"), "trained_parameters lacks new"),
    ],
)
def test_incomplete_and_contradictory_tables(table, change, message):
    with pytest.raises(ValueError, match=message):
        summary_of(change(table))


def test_markdown(summary):
    text = reports.markdown_table(summary)
    method = summary["methods"]["residual_adapter"]
    assert f"| residual_adapter | {method['ua_mean']:.2f} ({method['ua_std']:.2f}) |" in text
    assert "154,756" in text and "| *HuBERT_base (reported)* | 65.40 | 66.20 |" in text
    assert "(speaker-disjoint, 0123456789ab)" in text and "NOT" not in text and "inflated" not in text
    assert "not corrected for 1 comparison." in text and "standard deviation" in text
    widths = {line.count("|") for line in text.split("\n\n")[1].splitlines()}
    assert widths == {8}


def test_latex(summary):
    text = reports.latex_table(summary)
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 2
    assert r"residual\_adapter" in text and "154,756" in text and r"HuBERT\_base (reported)" in text
    assert text.count("{") == text.count("}")
    assert r"me/s2e\_base" in text and "inflated" not in text
    for line in text.splitlines():
        assert "%" not in line.replace(r"\%", "")
    body = text.split(r"\midrule")[1].strip().splitlines()
    assert all(line.count("&") == 5 for line in body)


def test_measured_references_are_called_so_and_keep_their_interval(table, tmp_path):
    pytest.importorskip("matplotlib")
    measured = {"ua": 70.0, "wa": 72.5, "macro_f1": 69.0, "ua_ci95": [61.2, 78.9], "wa_ci95": [63.0, 80.0]}
    references = {"svm (own)": {**measured, "measured": True, "features": 88}, "HuBERT": {"ua": 65.4}}
    summary = summary_of(table, references=references)
    assert summary["references"] == references
    markdown, latex = reports.markdown_table(summary), reports.latex_table(summary)
    assert "| *svm (own) (measured)* | 70.00 | 72.50 | 69.00 | 61.2 to 78.9 | | |" in markdown
    assert "| *HuBERT (reported)* | 65.40 |  |  |  | | |" in markdown
    assert r"svm (own) (measured) & 70.00 & 72.50 & 69.00 & 61.2 to 78.9 & \\" in latex
    assert r"HuBERT (reported) & 65.40 &" in latex
    plots.plot_bars(summary, tmp_path / "bars.svg")
    figure = (tmp_path / "bars.svg").read_text()
    assert figure.count("<!-- (measured) -->") == figure.count("<!-- (reported) -->") == 1
    plots.plot_bars(summary | {"references": {}}, tmp_path / "none.svg")


def test_shared_speakers_are_said_in_every_table(table):
    summary = summary_of(table, protocol=PROTOCOL | {"speaker_disjoint": False})
    for text in (reports.markdown_table(summary), reports.latex_table(summary)):
        assert "NOT speaker-disjoint" in text and "may be inflated" in text


def test_unknown_speakers_are_said(table):
    summary = summary_of(table.assign(speaker=None))
    assert summary["speakers"] is None
    assert "utterances (no speaker ids)" in reports.markdown_table(summary)
    assert "over 120 utterances" in summary["paired"][0]["test"]


def test_figures(summary, tmp_path):
    pytest.importorskip("matplotlib")
    matrix = summary["methods"]["plain"]["confusion"]
    for number, kind in enumerate(("png", "pdf", "svg")):
        plots.plot_bars(summary, tmp_path / f"bars.{kind}")
        plots.plot_confusion(matrix, CLASSES, tmp_path / f"c.{kind}", title="t")
        magic = (b"\x89PNG", b"%PDF", b"<?xml")[number]
        for name in ("bars", "c"):
            assert (tmp_path / f"{name}.{kind}").read_bytes().startswith(magic)
    with pytest.raises(ValueError, match="shape"):
        plots.plot_confusion(np.eye(2), CLASSES, tmp_path / "x.png")


def test_a_confusion_figure_shows_shares_of_the_true_class(tmp_path):
    pytest.importorskip("matplotlib")
    plots.plot_confusion([[3, 1], [0, 0]], ["angry", "sad"], tmp_path / "c.svg")
    text = (tmp_path / "c.svg").read_text()
    assert "<!-- 75 -->" in text and "<!-- 25 -->" in text and "<!-- sad (0) -->" in text
