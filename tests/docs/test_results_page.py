"""docs/results.md: it is what the files in results/ say, and says what they do not hold."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT
from training_tools import script

from hf_s2e.evaluation.protocols import Fold, Protocol
from hf_s2e.evaluation.reports import summarize
from hf_s2e.training.methods import TABLE_METHODS

page = script("results_page")
SPEAKERS = ("a", "b", "c")
CLASSES = ("calm", "upset")
PROTOCOL = Protocol(
    name="loso",
    corpus="emodb",
    column="speaker",
    folds=tuple(Fold(name, tuple(s for s in SPEAKERS if s != name), (), (name,)) for name in SPEAKERS),
    speaker_disjoint=True,
    seed=0,
    classes=CLASSES,
    utterances=12,
    corpus_sha256="0" * 64,
)
CHOICE = {
    "rule": "By the UA on validation speakers.",
    "candidates": ["paper", "plus"],
    "chosen": {"fine_tune": {"a": "paper", "b": "paper", "c": "plus"}, "plain": dict.fromkeys(SPEAKERS, "plus")},
    "validation_ua": {
        "fine_tune": {
            "a": {"paper": 70.0, "plus": 60.0},
            "b": {"paper": 70.0, "plus": 70.0},
            "c": {"paper": 50.0, "plus": 80.0},
        },
        "plain": {name: {"paper": 50.125, "plus": 60.5} for name in SPEAKERS},
    },
}


ENVIRONMENT = {"device": "some GPU", "mixed_precision": "bf16", "git_revision": "a1" * 20, "git_changed": True}
ENVIRONMENT |= dict.fromkeys(["python", "torch", "transformers", "accelerate"], "9.9")


def summary(runs: dict[str, int], **others) -> dict:
    """fine_tune makes one mistake, the others two, among 12 utterances of three speakers."""
    wrong = {"fine_tune": 1}
    rows = [
        (run, speaker, method, f"{speaker}{i}", speaker, i % 2, 1 - i % 2 if speaker == "a" and i < mistakes else i % 2)
        for method, number in runs.items()
        for mistakes in [wrong.get(method, 2)]
        for run in range(number)
        for speaker in SPEAKERS
        for i in range(4)
    ]
    table = pd.DataFrame(rows, columns=["run", "fold", "method", "utterance", "speaker", "label", "prediction"])
    facts = {"corpus": "emodb", "protocol": PROTOCOL, "recipe": "paper", "base": "a-base", "classes": CLASSES}
    return summarize(table, **facts, trained_parameters=dict.fromkeys(runs, 1000)) | others


def write(folder: Path, **files) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def fold_runs(folder: Path, *names: str, **facts) -> None:
    """runs.json, with these fold-runs among others: method--folds--runN."""
    runs, file = {}, folder / "runs.json"
    for name in names:
        method, folds, run = name.split("--")
        runs[name] = {"method": method, "folds": folds.split("+"), "run": int(run.removeprefix("run")), "part": "test"}
        runs[name] |= {"environment": ENVIRONMENT, **facts}
    file.write_text(json.dumps((json.loads(file.read_text()) if file.is_file() else {}) | runs))


def written(results: Path, output: Path) -> str:
    page.main(["--results", str(results), "--output", str(output)])
    return output.read_text(encoding="utf-8")


def test_the_committed_page_is_what_the_results_say(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    committed = ROOT / "docs" / "results.md"
    assert page.results_page(Path("results"), committed) == committed.read_text(encoding="utf-8"), (
        "run `python training/results_page.py` and commit docs/results.md"
    )


def test_images_and_links_of_the_committed_page_exist():
    targets = re.findall(r"\]\((?!http)([^)]+)\)", (ROOT / "docs" / "results.md").read_text(encoding="utf-8"))
    assert any(target.endswith("bars.png") for target in targets)
    assert [target for target in targets if not (ROOT / "docs" / target).exists()] == []


def test_what_was_not_run_is_named(tmp_path):
    folder = write(tmp_path / "results" / "emodb-loso-paper", summary=summary({"fine_tune": 2, "bn_only": 3}))
    PROTOCOL.save(folder / "protocol.json")
    whole = [f"fine_tune--{speaker}--run{run}" for speaker in SPEAKERS for run in (0, 1)]
    fold_runs(folder, *whole, "fine_tune--b--run2", "plain--a--run0", "plain--c--run0")
    text = written(tmp_path / "results", tmp_path / "page.md")
    listed = text.partition("Not run:")[2]
    assert "plain, feature_extractor, residual_adapter, adapter_only: no whole run" in listed
    assert "fine_tune: 2 of 3 runs" in listed and "bn_only: " not in listed
    assert "fine_tune, run 3: begun, 1 of 3 folds, not in the table" in listed
    assert "plain, run 1: begun, 2 of 3 folds, not in the table" in listed
    assert "references" in listed

    fold_runs(folder, "fine_tune--a--run2", "fine_tune--c--run2")  # finished since the table was made
    assert "3 runs are whole and 2 in the one above" in written(tmp_path / "results", tmp_path / "page.md")


def test_nothing_is_missing_where_all_was_run(tmp_path):
    whole = summary(dict.fromkeys(TABLE_METHODS, 3), references={"other": {"ua": 99.0, "wa": 98.0}})
    write(tmp_path / "results" / "emodb-loso-paper", summary=whole)
    text = written(tmp_path / "results", tmp_path / "page.md")
    assert text.endswith("Not run:\n\n- nothing; every method has 3 runs or more\n")
    assert "99.00, other (reported)" in text


def test_the_numbers_are_the_summarys_in_the_papers_order(tmp_path):
    made = summary({"residual_adapter": 1, "fine_tune": 1, "plain": 3})
    write(tmp_path / "results" / "emodb-loso-paper", summary=made)
    text = written(tmp_path / "results", tmp_path / "page.md")
    assert re.findall(r"^\| (\w+) \| \d", text, re.M) == ["plain", "fine_tune", "residual_adapter"]
    shown = [f"{made['methods'][name]['ua_mean']:.2f}" for name in ("plain", "fine_tune", "residual_adapter")]
    assert shown == ["83.33", "91.67", "83.33"]  # the adapter loses, and that is shown
    assert "| 83.33 (0.00) | – | 91.67, 1 run | 83.33, 1 run | – | – | none |" in text
    assert "../" not in text  # no plots, no audit, no environment: left out


def test_the_choice_of_recipes_is_shown(tmp_path):
    made = summary({"fine_tune": 3, "plain": 3}, choice=CHOICE, recipe="chosen")
    write(tmp_path / "results" / "emodb-loso-chosen", summary=made)
    text = written(tmp_path / "results", tmp_path / "page.md")
    assert CHOICE["rule"] in text
    head = "| mean UA on validation speakers, folds that took it | fine_tune | plain |\n|---|---|---|\n"
    assert head + "| paper | 63.33, 2 | 50.12, 0 |\n| plus | 70.00, 1 | 60.50, 3 |\n" in text


def test_where_it_ran_and_what_the_audit_found(tmp_path):
    audit = {"findings": [{"severity": "warning", "kind": "silent", "message": "3 files", "files": []}]}
    audit["counts"] = {
        "chance_ua": 50.0,
        "ua_by_speaker": 50.0,
        "ua_by_duration": 61.04,
        "sampling_rates": {"8000": 1200},
    }
    limited = {"mixed_precision": "bf16", "max_train_steps": 7}
    folder = tmp_path / "results" / "emodb-loso-paper"
    write(folder, summary=summary({"plain": 1}), audit=audit, settings=limited)
    fold_runs(folder, "plain--a--run0", "plain--b--run0")
    fold_runs(folder, "plain--c--run0", part="validation")  # by which a fold chose its recipe
    for name in ("bars", "confusion-plain"):
        (folder / f"{name}.png").touch()
    (tmp_path / "docs").mkdir()
    text = written(tmp_path / "results", tmp_path / "docs" / "page.md")
    versions = "python 9.9, torch 9.9, transformers 9.9, accelerate 9.9"
    assert f"too: 2 on some GPU, mixed precision bf16, {versions}, revision a1a1a1a1a1a1 with changes." in text
    assert "(1,200 files at 8000 Hz) found warning, silent: 3 files." in text
    assert "61.0 % from the duration alone (chance 50.0 %)" in text
    assert "no more than chance from the speaker alone" in text
    assert "no training had more than 7 batches" in text
    images = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert len(images) == 2 and all((tmp_path / "docs" / image).is_file() for image in images)


def test_references_alone_are_a_table(tmp_path):
    known = {"my_svm": {"measured": True, "ua": 61.234, "wa": 60.0, "ua_ci95": [50.0, 70.0], "features": 6373}}
    folder = write(tmp_path / "results" / "emodb-loso-references", references=known)
    PROTOCOL.save(folder / "protocol.json")
    text = written(tmp_path / "results", tmp_path / "page.md")
    assert "| *my_svm (measured)* | 61.23 | 60.00 |  | 50.0 to 70.0 | 6,373 |" in text
    assert "--protocol loso --output_dir results/emodb-loso-references" in text
    assert "plain, feature_extractor, fine_tune" in text.partition("Not run:")[2]


def test_the_commands_are_those_that_were_written_down(tmp_path):
    made, folder = summary({"plain": 3}), tmp_path / "results" / "emodb-loso-paper"
    write(folder, summary=made, settings={"commands": ["make results CORPUS=emodb"]})
    text = written(tmp_path / "results", tmp_path / "page.md")
    assert "This command makes it, where DIR" in text and "```bash\nmake results CORPUS=emodb\n```" in text
    write(folder, settings={"commands": ["make results METHODS=plain", "accelerate launch it"]})
    text = written(tmp_path / "results", tmp_path / "page.md")
    assert "These commands made it" in text and "```bash\nmake results METHODS=plain\naccelerate launch it\n```" in text
    write(folder, settings={})
    assert "```bash" not in written(tmp_path / "results", tmp_path / "page.md")


def test_folds_that_share_a_training_are_counted_apart(tmp_path):
    folder = write(tmp_path / "results" / "emodb-loso-paper", summary=summary({"fine_tune": 1}))
    PROTOCOL.save(folder / "protocol.json")
    fold_runs(folder, "plain--a+b--run0", "plain--c--run0", "plain--a+c--run1")
    text = written(tmp_path / "results", tmp_path / "page.md")
    assert "plain, run 2: begun, 2 of 3 folds" in text and "plain, run 1" not in text
    assert "plain: a new table (`--report_only`), 1 runs are whole and 0 in the one above" in text


def test_a_missing_folder_is_one_sentence(tmp_path):
    with pytest.raises(SystemExit, match="nowhere is not a folder"):
        page.main(["--results", str(tmp_path / "nowhere"), "--output", str(tmp_path / "page.md")])
