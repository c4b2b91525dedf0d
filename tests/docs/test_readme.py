"""What the README shows works: its Python runs, its flags exist, its numbers are the results'."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import ROOT
from training_tools import script
from transformers import HfArgumentParser

from hf_s2e.cli import main
from hf_s2e.training.recipe import Recipe

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def commands() -> list[list[str]]:
    lines = "".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where a reader would stand: beside hub_cards/, with a recording."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "hub_cards").symlink_to(ROOT / "hub_cards")
    (folder / "recordings").mkdir()
    time = np.arange(5 * 22_050) / 22_050
    voice = 0.3 * np.sin(2 * np.pi * 150 * time) * (1 + np.sin(2 * np.pi * 3 * time))
    soundfile.write(folder / "speech.wav", np.stack([voice, voice], axis=1), 22_050)
    shutil.copy(folder / "speech.wav", folder / "recordings")
    return folder


@pytest.mark.slow
def test_python_runs(folder):
    """Each block by itself: nothing that another one imported is there."""
    assert len(blocks("python")) >= 3
    for code in blocks("python"):
        result = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, f"{code}\n{result.stderr[-2000:]}"


def test_s2e_commands_run(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    shown = [command for command in commands() if command[0] == "s2e"]
    assert {command[1] for command in shown} >= {"predict", "info"}
    for command in shown:
        assert main(command[1:]) == 0 and capsys.readouterr().out, command


@pytest.mark.parametrize("command", [c for c in commands() if c[0] == "accelerate"], ids=lambda c: Path(c[2]).stem)
def test_training_scripts_take_what_is_shown(command):
    module = script(Path(command[2]).stem)
    assert Path(module.__file__) == ROOT / command[2]
    parts = (module.Arguments, Recipe) if hasattr(module, "parse_arguments") else module.Arguments
    args, *_ = HfArgumentParser(parts, allow_abbrev=False).parse_args_into_dataclasses(command[3:])
    assert args.output_dir.startswith("out/")


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for command in commands():
        if command[0] == "make":
            assert re.search(rf"^{command[1]}:", makefile, re.M)


def test_results_are_those_of_the_committed_run():
    table = (ROOT / "results/emodb-loso-paper/table.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| [a-z_*]+(?: \(measured\)\*)? \| \d.*$", README, re.M)
    assert len(shown) == 6
    assert [row for row in shown if row not in table] == []


def test_links_lead_somewhere():
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []
