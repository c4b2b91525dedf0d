"""What is kept of fold-runs: nothing is lost or there twice, whoever is killed and whoever writes at once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from hf_s2e.training.result_folder import ResultFolder, portable

UTTERANCES = 3
KEPT_BY_HELPERS = """
import os, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_result_folder import ResultFolder, check, keep
path = Path(sys.argv[1])
"""
KILLED_AT_EVERY_STEP = """
def main(step):
    # a fold-run that was merged, one that was kept, and a call that keeps two and merges them
    folder = ResultFolder(path / str(step))
    keep(folder, "merged")
    folder.merge()
    keep(folder, "kept")
    keep(folder, "chosen", part="validation")
    if (child := os.fork()) == 0:
        done = [0]
        def killed_before(function):
            def counted(*args, **options):
                done[0] += 1
                if done[0] == step:
                    os._exit(9)
                return function(*args, **options)
            return counted
        os.replace, os.unlink = killed_before(os.replace), killed_before(os.unlink)
        folder = ResultFolder(folder.path)
        keep(folder, "new")
        keep(folder, "kept")  # twice, as by two calls
        folder.merge()
        os._exit(0)
    killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    known = check(folder)  # before anybody has cleared up
    known |= {"merged", "kept", "chosen", *(file.stem for file in folder.running.glob("*.parquet"))}
    folder.merge()
    assert check(folder) == known, step
    assert ("new" in known) == (step > 1), step
    assert {file.name for file in folder.path.iterdir()} >= {"running", "predictions.parquet", "validation.parquet"}
    assert not [file for file in folder.path.rglob("*") if file.name.endswith(".part")], step
    assert [file.name for file in folder.running.iterdir()] == ["lock"], step
    return killed

step = 1
while main(step):
    step += 1
assert step > 12, step  # replaced: two kept files, two tables and runs.json; then the kept ones are deleted
"""
SEVERAL_AT_ONCE = """
folder = ResultFolder(path)
for number in range(12):
    keep(folder, f"{sys.argv[2]}-{number}")
    folder.merge()
    check(folder)
"""


def keep(folder: ResultFolder, name: str, *, method="plain", run=0, folds=None, part="test", **facts) -> None:
    """A fold-run by its name, which is that of its fold unless folds are given."""
    folds, recipe = folds or [name], facts.setdefault("recipe", "paper")
    rows = pd.DataFrame(
        [(run, fold, method, f"{fold}{i}", fold, 0, i % 2, [0.25, 0.75]) for fold in folds for i in range(UTTERANCES)],
        columns=["run", "fold", "method", "utterance", "speaker", "label", "prediction", "posterior"],
    )
    if part == "validation":
        rows.insert(0, "recipe", recipe)
    folder.keep(name, {"method": method, "run": run, "folds": folds, "part": part, **facts}, rows)


def check(folder: ResultFolder) -> set[str]:
    """The names of what is finished, of which every row must be there once."""
    runs = folder.finished()
    for part in ("test", "validation"):
        rows = folder.rows(part)
        known = [fold for facts in folder.finished().values() if facts["part"] == part for fold in facts["folds"]]
        assert not rows.duplicated(["method", "run", "fold", "utterance"]).any()
        assert set(rows.get("fold", ())) <= set(known)
        assert len(rows) >= UTTERANCES * sum(len(facts["folds"]) for facts in runs.values() if facts["part"] == part)
    return set(runs)


def start(script: str, *arguments: str) -> subprocess.Popen:
    code = KEPT_BY_HELPERS.format(tests=str(Path(__file__).parent)) + script
    return subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=subprocess.PIPE, text=True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_at_any_step_loses_nothing_and_doubles_nothing(tmp_path):
    process = start(KILLED_AT_EVERY_STEP, str(tmp_path))
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 0, errors


def test_several_processes_keep_and_merge_at_once(tmp_path):
    processes = [start(SEVERAL_AT_ONCE, str(tmp_path), name) for name in "abc"]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], errors
    assert check(ResultFolder(tmp_path)) == {f"{name}-{number}" for name in "abc" for number in range(12)}


def test_rows_and_facts_come_back(tmp_path):
    folder = ResultFolder(tmp_path / "new")
    assert folder.finished() == {} and not len(folder.rows("test")) and not len(folder.whole_runs(2))
    folder.merge()
    assert not folder.path.exists()
    keep(folder, "a+b, run 0", folds=["a", "b"], environment={"device": "cpu"})
    keep(folder, "a, run 1", folds=["a"], run=1, environment={"device": "gpu"})
    keep(folder, "a/c", folds=["a"], part="validation", recipe="quick")
    keep(folder, "a/c, other", folds=["a"], part="validation", recipe="long")
    assert folder.finished() == {}  # not before they are merged
    folder.merge()
    assert folder.finished()["a, run 1"]["environment"] == {"device": "gpu"}
    assert folder.folds_by_run() == {("plain", 0): {"a", "b"}, ("plain", 1): {"a"}}
    assert folder.environments() == [({"device": "cpu"}, 1), ({"device": "gpu"}, 1)]
    whole = folder.whole_runs(2)
    assert set(whole["run"]) == {0} and set(whole["fold"]) == {"a", "b"} and "recipe" not in whole
    assert [row.tolist() for row in whole["posterior"]] == [[0.25, 0.75]] * 2 * UTTERANCES
    assert set(folder.rows("validation")["recipe"]) == {"quick", "long"}
    text = (folder.path / "runs.json").read_text()
    assert [line[:6] for line in text.splitlines()] == ["{", '"a+b, ', '"a, ru', '"a/c":', '"a/c, ', "}"]


def test_the_files_do_not_depend_on_who_was_first(tmp_path):
    names = ["a", "b", "c"]
    for place, order in (("one", names), ("other", names[::-1])):
        for name in order:
            keep(ResultFolder(tmp_path / place), name)
            ResultFolder(tmp_path / place).merge()
    for file in ("predictions.parquet", "runs.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "other" / file).read_bytes()


def test_what_is_taken_out_of_runs_json_runs_again(tmp_path):
    folder = ResultFolder(tmp_path)
    for name in ("a", "b"):
        keep(folder, name)
    folder.merge()
    runs = folder.finished()
    del runs["a"]
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    assert set(folder.finished()) == set(folder.rows("test")["fold"]) == {"b"}
    keep(folder, "a", seconds=7)
    folder.merge()
    assert check(folder) == {"a", "b"} and folder.finished()["a"]["seconds"] == 7
    assert len(folder.rows("test")) == 2 * UTTERANCES


def test_rows_that_are_missing_are_named(tmp_path):
    folder = ResultFolder(tmp_path)
    keep(folder, "plain--a--run0", folds=["a"])
    folder.merge()
    (tmp_path / "predictions.parquet").unlink()
    with pytest.raises(ValueError, match=r"no rows of plain--a--run0, .*bring back the predictions.parquet"):
        folder.rows("test")


def test_a_command_names_nothing_of_this_machine(tmp_path):
    root = tmp_path / "checkout"
    given = ["--data_dir", "/corpora/my emodb", "--cache-dir", "/scratch", "--not_strict", "--cache_dir=/scratch"]
    given += [f"--recipe={root}/training/a.yaml", "--model_name_or_path", "lab/base", "--output_dir", "/elsewhere/out"]
    given += ["--candidates", f"{root}/a.yaml,b.yaml", "--corpus_options", '{"label": "x, y"}', "--data-dir=/corpora"]
    said = ["--data_dir", "DIR", "--not_strict"]
    said += ["--recipe=training/a.yaml", "--model_name_or_path", "lab/base", "--output_dir", "out"]
    said += ["--candidates", "a.yaml,b.yaml", "--corpus_options", '{"label": "x, y"}', "--data-dir=DIR"]
    assert portable(given, root) == said
