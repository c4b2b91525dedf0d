"""`make results`: from nothing but a corpus to its table, one command after another."""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT
from training_tools import SCRIPTS, script

from hf_s2e.training.methods import TABLE_METHODS
from hf_s2e.training.result_folder import ResultFolder

results = script("results")


def make(*variables: str) -> list[str]:
    """What `make results` would run, without its installing anything."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    command = ["make", "-n", "-o", ".venv/installed", "-o", ".venv/bench", "results", *variables]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    (line,) = [line for line in done.stdout.splitlines() if "training/results.py" in line]
    return shlex.split(line)[2:]


@pytest.fixture
def commands(monkeypatch):
    """The commands that the script runs, none of them really; those whose script is in `failing` fail."""
    ran, failing = [], {}

    def run(command, **options):
        if "-c" in command:  # whether the references' packages can be imported
            said = failing.get("import", "")
            return subprocess.CompletedProcess(command, bool(said), "", said)
        name = next(Path(part).stem for part in command if part.endswith(".py"))
        ran.append((name, list(command)))
        return subprocess.CompletedProcess(command, failing.get(name, 0))

    monkeypatch.setattr(results, "subprocess", SimpleNamespace(run=run))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return ran, failing


def value(command: list[str], flag: str) -> str:
    return command[len(command) - 1 - command[::-1].index(flag) + 1]


@pytest.mark.slow
def test_a_toy_result_end_to_end(work, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "out"
    results.main(work.flags(base=work.adapter, plain_base=work.plain, out=out, num_train_epochs=1))
    said = capfd.readouterr().out
    assert "6 fold-runs, 0 finished before" in said and len(ResultFolder(out).finished()) == 6
    assert (out / "table.md").read_text() in said
    assert "The references were left out" in said and "the numbers mean nothing" in said
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary["methods"]) == {"fine_tune", "residual_adapter"} and summary["recipe"] == "few-steps"
    (command,) = json.loads((out / "settings.json").read_text())["commands"]
    assert command.startswith("make results CORPUS=toy DATA_DIR=DIR BASE=adapter PLAIN_BASE=plain OUT=out CV_FLAGS=")
    assert str(tmp_path) not in command


@pytest.mark.slow
def test_a_wrong_folder_is_one_sentence_and_an_exit_code(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with pytest.raises(SystemExit) as ended:
        results.main(["--corpus", "emodb", "--data_dir", "/nowhere", "--out", str(tmp_path / "out")])
    said = capfd.readouterr()
    assert ended.value.code == 1
    assert said.err.startswith("/nowhere is not a folder") and said.err.count("\n") == 1
    assert "The table is" not in said.out and not (tmp_path / "out").exists()


def test_another_recipe_asks_for_another_folder(commands):
    with pytest.raises(SystemExit, match="--learning_rate: not the recipe paper, so --out must name a folder"):
        results.main(make("CORPUS=emodb", "DATA_DIR=data", "CV_FLAGS=--learning_rate 0.1"))
    results.main(make("CORPUS=emodb", "DATA_DIR=data", "OUT=mine", "CV_FLAGS=--learning_rate 0.1"))
    assert commands[0]


def test_everything_in_its_order(commands):
    ran, _ = commands
    results.main(make("CORPUS=ravdess", "DATA_DIR=/some where/ravdess"))
    assert [name for name, _ in ran] == ["cross_validate", "references", "cross_validate", "results_page"]
    first, references, second, _ = (command for _, command in ran)
    assert second == [*first, "--report_only"]
    assert value(first, "--command") == "make results CORPUS=ravdess DATA_DIR=DIR"
    for command in (first, references):
        assert value(command, "--data_dir") == "/some where/ravdess" and value(command, "--protocol") == "emobox6"
        assert value(command, "--output_dir") == str(ROOT / "results" / "ravdess-emobox6-paper")
    assert value(first, "--methods") == ",".join(TABLE_METHODS) and value(first, "--runs") == "3"
    assert Path(value(first, "--model_name_or_path"), "model.safetensors").is_file()
    assert Path(value(first, "--plain_model_name_or_path"), "model.safetensors").is_file()


def test_variables_reach_the_scripts_that_know_them(commands, tmp_path):
    ran, _ = commands
    given = {
        "METHODS": "plain",
        "PROTOCOL": "5fold",
        "RUNS": "2",
        "LABELS": "sad,happy",
        "RECIPE": "training/recipes/emodb.yaml",
        "BASE": "my base",
        "PLAIN_BASE": "other",
        "OUT": str(tmp_path),
        "ACCELERATE": "--mixed_precision bf16 --dynamo_backend inductor",
        "CV_FLAGS": "--max_train_steps 3 --protocol_seed 7 --not_strict --corpus_options '{\"a\": 1}'",
    }
    results.main(make("CORPUS=emodb", *(f"{name}={text}" for name, text in given.items())))
    assert [name for name, _ in ran] == ["cross_validate", "references", "cross_validate"]  # no page: not in results/
    validate, references = ran[0][1], ran[1][1]
    launch = validate[: validate.index(str(SCRIPTS / "cross_validate.py"))]
    assert launch[-4:] == ["--mixed_precision", "bf16", "--dynamo_backend", "inductor"]
    flags = {"--protocol": "5fold", "--labels": "sad,happy", "--protocol_seed": "7", "--corpus_options": '{"a": 1}'}
    for command in (validate, references):
        assert {flag: value(command, flag) for flag in flags} == flags
        assert value(command, "--output_dir") == str(tmp_path) and "--not_strict" in command
    only = {"--methods": "plain", "--runs": "2", "--recipe": "training/recipes/emodb.yaml", "--max_train_steps": "3"}
    only |= {"--model_name_or_path": "my base", "--plain_model_name_or_path": "other"}
    assert {flag: value(validate, flag) for flag in only} == only and not set(only) & set(references)


@pytest.mark.parametrize(
    "variables, name",
    [
        ([], "out/toy-loso-few-steps"),
        (["CORPUS=emodb"], "results/emodb-loso-paper"),
        (["CORPUS=emodb", "LABELS=sad,happy"], "results/emodb2-loso-paper"),
        (["CORPUS=emodb", "RECIPE=my/plus.yaml", "PROTOCOL=5fold"], "results/emodb-5fold-plus"),
        (["CORPUS=emodb", "CV_FLAGS=--candidates a.yaml,b.yaml"], "results/emodb-loso-chosen"),
    ],
)
def test_the_folders_name_says_what_is_in_it(commands, variables, name):
    results.main(make(*variables))
    assert value(commands[0][0][1], "--output_dir") == str(ROOT / name)


def test_without_opensmile_there_is_a_table_all_the_same(commands, capsys):
    ran, failing = commands
    failing["import"] = "Traceback\nModuleNotFoundError: No module named 'opensmile'\n"
    results.main(["--corpus", "emodb"])
    assert [name for name, _ in ran] == ["cross_validate", "results_page"]
    said = capsys.readouterr().out
    assert (
        "references were left out: ModuleNotFoundError: No module named 'opensmile'" in said and "hf-s2e[bench]" in said
    )


@pytest.mark.parametrize("name, code, after", [("cross_validate", 3, 1), ("references", 5, 2)])
def test_the_first_failure_ends_it_with_its_code(commands, name, code, after):
    ran, failing = commands
    failing[name] = code
    with pytest.raises(SystemExit) as ended:
        results.main(["--corpus", "emodb"])
    assert ended.value.code == code and len(ran) == after


@pytest.mark.parametrize(
    "given, said",
    [
        (["LABELS=sad,happy", "RUNS=5"], "RUNS=5 LABELS=sad,happy"),
        (["OUT={root}/results/mine", "BASE={root}/out/base"], "BASE=out/base OUT=results/mine"),
        (["RECIPE=/home/me/plus.yaml", "OUT=out"], "RECIPE=plus.yaml OUT=out"),
        (["ACCELERATE=--mixed_precision bf16"], "ACCELERATE='--mixed_precision bf16'"),
        (["CV_FLAGS=--protocol_seed 2 --cache_dir /scratch"], "CV_FLAGS='--protocol_seed 2'"),
        (
            ["OUT=out", "CV_FLAGS=--lr_drop_epochs 2 3 --weight_decay 0.0 --candidates {root}/a.yaml,b.yaml"],
            "OUT=out CV_FLAGS='--lr_drop_epochs 2 3 --weight_decay 0.0 --candidates a.yaml,b.yaml'",
        ),
    ],
)
def test_the_command_is_the_one_that_was_given(commands, given, said):
    results.main(make("CORPUS=emodb", "DATA_DIR=data", *(text.format(root=ROOT) for text in given)))
    assert value(commands[0][0][1], "--command") == f"make results CORPUS=emodb DATA_DIR=DIR {said}"


def test_the_command_survives_make(commands):
    """$ is make's own sign, and what a shell needs quoted, make hands on."""
    options = json.dumps({"speaker_pattern": r"_(\w+)\.wav$"})
    results.main(["--corpus", "folder", "--corpus_options", options, "--not_strict"])
    said = value(commands[0][0][1], "--command")
    commands[0].clear()
    results.main(make(*shlex.split(said)[2:]))
    validate = commands[0][0][1]
    assert value(validate, "--corpus_options") == options and "--not_strict" in validate
    assert value(validate, "--command") == said


def test_the_commands_of_the_committed_page_make_its_folders(commands):
    ran, _ = commands
    sections = (ROOT / "docs" / "results.md").read_text(encoding="utf-8").split("\n## ")[1:]
    shown = [(s, shlex.split(line)) for s in sections for line in re.findall(r"^make results .*$", s, re.M)]
    assert shown
    for section, words in shown:
        ran.clear()
        results.main(make(*words[2:]))
        folder = Path(value(ran[0][1], "--output_dir"))
        assert f"/{folder.name}/bars.png" in section and (folder / "summary.json").is_file()
