"""Cards: what they must say, and that every number in them is that of the results file."""

import json
import re
import tomllib

import pytest
import torch
from conftest import ROOT
from huggingface_hub import ModelCard

from hf_s2e import S2EConfig, S2EForAudioClassification
from hf_s2e.cli import main
from hf_s2e.hub.cards import TEMPLATES, about_corpus, write_card
from hf_s2e.hub.repo import Repo, find_repos

HUB_CARDS = find_repos(ROOT / "hub_cards")
TINY = {"hidden_sizes": [2, 4], "depths": [1, 1]}
CLASSES = ["neutral", "angry", "sad"]


@pytest.fixture
def repos(tmp_path):
    """A base, and an adapter that says that it was trained on EmoDB."""
    torch.manual_seed(0)
    model = S2EForAudioClassification(S2EConfig(**TINY, num_labels=5, repo_id="lab/base"))
    model.save_pretrained(tmp_path / "base")
    model = S2EForAudioClassification.from_pretrained(tmp_path / "base")
    model.add_adapter("emodb", labels=CLASSES, method="residual_adapter")
    model.save_adapter(tmp_path / "s2e-emodb", "emodb")
    trained_on(tmp_path / "s2e-emodb", "emodb", speakers=10, utterances=535)
    return tmp_path


def trained_on(folder, corpus, **more):
    facts = {"corpora": [{"name": corpus, **more}], "settings": {"epochs": 30}}
    (folder / "training.json").write_text(json.dumps(facts))


def summary(**more):
    """A summary.json with numbers that are all different, so that a card can be searched for each."""
    confusion = [[211, 13, 14], [15, 371, 16], [17, 18, 151]]
    methods = {
        "plain": {"ua_mean": 61.11, "ua_std": 2.22, "wa_mean": 63.33, "wa_std": 1.44, "macro_f1_mean": 60.55,
                  "ua_ci95": [55.66, 66.77], "runs": 3, "trained_parameters": 1361317},
        "residual_adapter": {"ua_mean": 74.21, "ua_std": 0.83, "wa_mean": 75.94, "wa_std": 0.67,
                             "macro_f1_mean": 73.45, "ua_ci95": [68.12, 79.91], "runs": 3,
                             "trained_parameters": 155527, "confusion": confusion},
    }  # fmt: skip
    return {
        "corpus": "emodb",
        "protocol": {"name": "loso", "hash": "c0ffee42", "speaker_disjoint": True},
        "recipe": "paper",
        "base": "lab/base",
        "utterances": 535,
        "speakers": 10,
        "methods": methods,
        "references": {"ComParE + SVM": {"ua": 77.1, "wa": 78.3}},
        "classes": CLASSES,
        "paired": [
            {"a": "residual_adapter", "b": "plain", "ua_diff": 13.1, "ci95": [4.4, 21.9], "p": 0.0123,
             "test": "permutation over 10 speakers, exact"},
        ],
        "audit": {"findings": [{"kind": "clipped", "severity": "warning", "message": "clipped samples",
                                "files": ["a", "b"]}]},
        **more,
    }  # fmt: skip


def numbers_of(text):
    return set(re.findall(r"\d+(?:\.\d+)?", text))


# ---- the cards that are committed


@pytest.mark.parametrize("repo", HUB_CARDS, ids=lambda repo: repo.name)
def test_committed_cards_are_what_config_facts_and_results_give(repo, tmp_path):
    copy = tmp_path / "hub_cards" / repo.name
    copy.mkdir(parents=True)
    for file in repo.folder.iterdir():
        if file.is_file() and file.name != "README.md":
            (copy / file.name).symlink_to(file)
    if (ROOT / "results").is_dir():
        (tmp_path / "results").symlink_to(ROOT / "results")
    fresh = write_card(copy).read_text()
    assert (repo.folder / "README.md").read_text() == fresh, f"run: s2e card {repo.folder.relative_to(ROOT)}"


@pytest.mark.parametrize("repo", HUB_CARDS, ids=lambda repo: repo.name)
def test_committed_cards_say_what_they_must(repo):
    text = (repo.folder / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "audio-classification"
    assert card.data.license and card.data.language and card.data.metrics
    assert card.data.datasets or not repo.training.get("corpora")
    for needed in (
        "2024/1689",
        "at work and in education",
        "## Training data",
        "## Results",
        "@inproceedings",
    ):
        assert needed in text
    if not repo.results:
        assert "Not evaluated" in text and card.data.eval_results is None


# ---- numbers


def test_every_number_of_the_results_is_in_the_card(repos):
    results = summary()
    text = write_card(repos / "s2e-emodb", results).read_text().partition("## Results")[2]
    found = numbers_of(text)
    for method in results["methods"].values():
        for key in ("ua_mean", "ua_std", "wa_mean", "wa_std", "macro_f1_mean"):
            assert f"{method[key]:.1f}" in found, key
        assert {f"{end:.1f}" for end in method["ua_ci95"]} <= found
        assert f"{method['trained_parameters']:,}" in text
    assert {"77.1", "78.3", "13.1", "4.4", "21.9", "0.0123", "535"} <= found
    assert {str(count) for row in results["methods"]["residual_adapter"]["confusion"] for count in row} <= found
    assert f"{100 * 211 / (211 + 13 + 14):.1f} %" in text
    for words in (
        "leave one speaker out (protocol `loso`)",
        "c0ffee42",
        "speaker-disjoint",
        "10 speakers",
        "warning, clipped: clipped samples (a, b)",
    ):
        assert words in text


def test_no_number_of_the_results_section_comes_from_elsewhere(repos):
    """Every number there is one of the JSON's, rounded, or one of the few that the template has itself."""
    results = summary()
    text = write_card(repos / "s2e-emodb", results).read_text()
    text = text.partition("## Results")[2].partition("## Citation")[0]
    allowed = {"95", "3", "2", "1"}  # the level of the intervals, the runs, files; macro-F1

    def walk(value):
        if isinstance(value, dict):
            for inner in value.values():
                walk(inner)
        elif isinstance(value, list):
            for inner in value:
                walk(inner)
        elif isinstance(value, (int, float)):
            allowed.update({f"{value:.1f}", f"{value:.3g}", str(value)} | numbers_of(f"{value:,}"))
        else:
            allowed.update(numbers_of(str(value)))

    walk(results)
    for row, label in zip(results["methods"]["residual_adapter"]["confusion"], range(3)):
        allowed.add(f"{100 * row[label] / sum(row):.1f}")
    assert numbers_of(text) <= allowed, numbers_of(text) - allowed


def test_model_index_is_the_results(repos):
    write_card(repos / "s2e-emodb", summary())
    card = ModelCard.load(repos / "s2e-emodb" / "README.md")
    values = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert values == {"recall": 74.21, "accuracy": 75.94, "f1": 73.45}
    assert card.data.base_model == "lab/base" and card.data.base_model_relation == "adapter"
    assert card.data.datasets == ["emodb"] and card.data.language == ["de"]
    assert card.data.eval_results[0].dataset_name == "EmoDB"


def test_the_audit_beside_the_results_is_summed_up(repos):
    file = repos / "summary.json"
    file.write_text(json.dumps({key: value for key, value in summary().items() if key != "audit"}))
    assert "Not recorded." in write_card(repos / "s2e-emodb", file).read_text()
    (repos / "audit.json").write_text(json.dumps({"findings": []}))
    assert "No findings" in write_card(repos / "s2e-emodb", file).read_text()
    counts = {"ua_by_speaker": 36.4, "ua_by_duration": 41.2, "chance_ua": 33.33}
    many = {"kind": "silent", "severity": "error", "message": "5 files are silent", "files": list("abcde")}
    none = {"kind": "empty_class", "severity": "warning", "message": "'sad' has no utterance", "files": []}
    (repos / "audit.json").write_text(json.dumps({"findings": [many, none], "counts": counts}))
    text = write_card(repos / "s2e-emodb", file).read_text()
    assert "- error, silent: 5 files are silent (a, b, c and 2 more)\n" in text
    assert "- warning, empty_class: 'sad' has no utterance\n" in text
    assert "36.4 % from the speaker alone" in text and "chance is 33.3 %" in text


def test_a_card_claims_no_training_that_it_does_not_know(repos):
    """The results may be of another recipe than the one that this repo was trained with."""
    text = write_card(repos / "s2e-emodb", summary(recipe="other")).read_text()
    assert "not itself tested" in text and "same recipe" not in text


def test_a_base_shows_what_its_training_measured(repos):
    facts = {"held_out_accuracy": 0.9876, "held_out_utterances": 1250, "equal_error_rate": 0.0432,
             "unseen_speakers": 30}  # fmt: skip
    (repos / "base" / "training.json").write_text(json.dumps({"evaluation": facts}))
    text = write_card(repos / "base").read_text()
    assert "98.8 % of 1,250 held-out utterances" in text and "30 unseen speakers: equal error rate 4.3 %" in text
    assert "Not evaluated" not in text


def test_references_say_whether_they_were_measured(repos):
    measured = {"ua": 71.23, "wa": 72.34, "macro_f1": 70.45, "ua_ci95": [64.5, 78.6], "measured": True}
    references = {"eGeMAPS + SVM": measured, "ComParE + SVM": {"ua": 77.1}}
    text = write_card(repos / "s2e-emodb", summary(references=references)).read_text()
    assert "| *eGeMAPS + SVM* (measured, loso) | 71.2 | [64.5, 78.6] | 72.3 | 70.5 | | |" in text
    assert "| *ComParE + SVM* (as reported elsewhere) | 77.1 |  |  |  | | |" in text


def test_changed_results_change_the_card(repos):
    results = summary()
    before = write_card(repos / "s2e-emodb", results).read_text()
    results["methods"]["residual_adapter"]["ua_mean"] += 1
    assert write_card(repos / "s2e-emodb", results).read_text() != before


def test_without_results_the_card_says_not_evaluated(repos):
    text = write_card(repos / "s2e-emodb").read_text()
    results = text.partition("## Results")[2].partition("## Citation")[0]
    assert "Not evaluated" in results and not numbers_of(results)
    assert ModelCard(text).data.eval_results is None
    assert "Not evaluated" in write_card(repos / "base").read_text()


def test_results_are_remembered_and_found_again(repos):
    file = repos / "results" / "summary.json"
    file.parent.mkdir()
    file.write_text(json.dumps(summary()))
    assert main(["card", str(repos / "s2e-emodb"), "--results", str(file)]) == 0
    with_results = (repos / "s2e-emodb" / "README.md").read_text()
    assert Repo(repos / "s2e-emodb").training["results"] == "../results/summary.json"
    assert main(["card", str(repos)]) == 0  # all of them, as from `make`
    assert (repos / "s2e-emodb" / "README.md").read_text() == with_results
    file.unlink()
    with pytest.raises(FileNotFoundError, match="--results FILE"):
        write_card(repos / "s2e-emodb")


def test_a_summary_of_the_reports_module_fits(repos):
    """The card takes what the project itself writes."""
    pandas = pytest.importorskip("pandas")
    reports = pytest.importorskip("hf_s2e.evaluation.reports")
    rows = [
        {"run": run, "fold": f"f{i % 2}", "method": method, "utterance": f"u{i}", "speaker": f"s{i % 2}",
         "label": i % 3, "prediction": (i + (i % 5 == run)) % 3}
        for run in (0, 1)
        for method in ("plain", "residual_adapter")
        for i in range(30)
    ]  # fmt: skip
    made = reports.summarize(
        pandas.DataFrame(rows),
        corpus="emodb",
        protocol={"name": "5fold", "hash": "abc", "speaker_disjoint": True},
        recipe="paper",
        base="lab/base",
        classes=CLASSES,
        trained_parameters={"plain": 10, "residual_adapter": 5},
    )
    text = write_card(repos / "s2e-emodb", json.loads(json.dumps(made))).read_text()
    assert f"{made['methods']['residual_adapter']['ua_mean']:.1f} (" in text
    assert "Rows: the label" in text and "n = 30 utterances of 2 speakers" in text


# ---- what does not fit, and licences


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"corpus": "ravdess"}, "results are of 'ravdess'"),
        ({"classes": ["angry", "neutral", "sad"]}, "for the classes"),
        ({"methods": {"plain": summary()["methods"]["plain"]}}, "no method 'residual_adapter'"),
    ],
)
def test_results_of_something_else_are_refused(repos, change, message):
    with pytest.raises(ValueError, match=message):
        write_card(repos / "s2e-emodb", summary(**change))
    with pytest.raises(ValueError, match="lack"):
        write_card(repos / "s2e-emodb", {"ua": 99.9})


def test_shared_speakers_are_said_aloud(repos):
    protocol = {"name": "5fold", "hash": "abc", "speaker_disjoint": False}
    text = write_card(repos / "s2e-emodb", summary(protocol=protocol)).read_text()
    assert "(bootstrap over speakers)" in text
    unknown = write_card(repos / "s2e-emodb", summary(speakers=None)).read_text()
    assert "(bootstrap over utterances (no speaker ids))" in unknown
    assert "**not speaker-disjoint" in text and "no speaker is in training and test" not in text


@pytest.mark.parametrize(
    ("corpus", "license", "said"),
    [
        ("emodb", "apache-2.0", "CC0-1.0"),
        ("ravdess", "cc-by-nc-sa-4.0", "no commercial use"),
        ("iemocap", "other", "by agreement"),
        ("cremad", "apache-2.0", "Open Database License"),
        ("our calls", None, "not stated"),  # a corpus of one's own: nothing is claimed about it
    ],
)
def test_the_licence_of_the_training_data_is_carried(repos, corpus, license, said):
    trained_on(repos / "s2e-emodb", corpus)
    text = write_card(repos / "s2e-emodb").read_text()
    assert ModelCard(text).data.license == license and said in text
    assert ("these weights included" in text) == (license in ("cc-by-nc-sa-4.0", "other"))


def test_facts_of_ones_own_corpus_go_into_the_card(repos):
    facts = {
        "title": "Our calls",
        "language": "fr",
        "license": "cc-by-4.0",
        "terms": "CC BY 4.0",
        "hours": 3.5,
    }
    trained_on(repos / "s2e-emodb", "manifest", **facts)
    text = write_card(repos / "s2e-emodb").read_text()
    assert "| Our calls | fr | CC BY 4.0 | 3.5 h |" in text
    assert ModelCard(text).data.language == ["fr"] and ModelCard(text).data.datasets is None


def test_every_corpus_of_the_package_has_facts():
    from hf_s2e.corpora import list_corpora

    for name in set(list_corpora()) - {"folder", "manifest", "hub"}:
        facts = about_corpus({"name": name})
        assert facts["known"] and facts["license"] and facts["terms"] != "not stated", name


def test_folds_of_a_corpus_are_named_by_its_module(repos):
    trained_on(repos / "s2e-emodb", "ravdess")
    protocol = {"name": "emobox6", "hash": "c0ffee42", "speaker_disjoint": True}
    text = write_card(repos / "s2e-emodb", summary(corpus="ravdess", protocol=protocol)).read_text()
    assert "RAVDESS, speech part, EmoBox's folds of speakers (protocol `emobox6`)" in text


def test_a_repo_has_no_module_imported_by_naming_it(repos, tmp_path, monkeypatch):
    (tmp_path / "sly.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    trained_on(repos / "s2e-emodb", "sly:Corpus")
    assert "| sly:Corpus | not stated |" in write_card(repos / "s2e-emodb").read_text()


def test_three_lines_of_use_work_for_every_kind(repos):
    for repo in (repos / "base", repos / "s2e-emodb"):
        code = re.search(r"```python\n(.*?)```", write_card(repo).read_text(), re.DOTALL)[1]
        assert len(code.strip().splitlines()) == 3
        compile(code, "card", "exec")
        assert f"lab/{repo.name}" in code


def test_a_whole_network_trained_on_emotion_has_results_too(repos):
    model = S2EForAudioClassification(S2EConfig(**TINY, adapters=False))
    model.replace_base_domain("emodb", CLASSES)
    model.save_pretrained(repos / "tuned")
    facts = {"corpora": [{"name": "ravdess"}, {"name": "emodb"}], "method": "plain"}
    (repos / "tuned" / "training.json").write_text(json.dumps(facts))
    text = write_card(repos / "tuned", summary()).read_text()
    assert "recognises 3 emotions: neutral, angry, sad" in text and "| **plain** | 61.1 (2.2)" in text
    assert ModelCard(text).data.license == "cc-by-nc-sa-4.0"  # the stricter of the two


def test_a_fused_network_is_not_called_a_speaker_network(repos):
    model = S2EForAudioClassification(S2EConfig(**TINY))
    model.add_adapter("emodb", CLASSES)
    model.fuse("emodb").save_pretrained(repos / "fused")
    text = write_card(repos / "fused").read_text()
    assert "recognises 3 emotions: neutral, angry, sad" in text and "tell" not in text.partition("## ")[0]


def test_recipes_that_folds_chose_are_said(repos):
    chosen = {"rule": "By validation.", "candidates": ["paper", "plus"], "chosen": {}}
    text = write_card(repos / "s2e-emodb", summary() | {"choice": chosen}).read_text()
    assert "Recipes, chosen among paper, plus. By validation." in text


def test_a_folder_that_is_no_repo(tmp_path):
    with pytest.raises(ValueError, match="no repo here"):
        find_repos(tmp_path)
    with pytest.raises(ValueError, match=r"no config\.json"):
        write_card(tmp_path)


def test_the_templates_travel_in_the_wheel():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = setuptools["package-data"]["hf_s2e.hub"]
    taken = {file for pattern in patterns for file in TEMPLATES.parent.glob(pattern)}
    assert taken == set(TEMPLATES.iterdir())
