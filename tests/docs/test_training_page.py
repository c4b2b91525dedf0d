"""docs/training.md: its commands can be read by their scripts, its figures are the measurement's."""

import json
import re
import shlex
import sys

import pytest
from conftest import ROOT
from training_tools import BENCHMARKS, script

from hf_s2e.training.arguments import parse_arguments

pytestmark = pytest.mark.usefixtures("one_thread")  # and accelerate forgets the precisions measured
PAGE = ROOT / "docs" / "training.md"
TEXT = PAGE.read_text(encoding="utf-8")
LINES = "".join(re.findall(r"```bash\n(.*?)```", TEXT, re.S)).replace("\\\n", " ").splitlines()
COMMANDS = [shlex.split(line) for line in LINES]


@pytest.mark.parametrize("command", [c for c in COMMANDS if c[0] == "accelerate"], ids=lambda c: c[2])
def test_the_scripts_take_what_is_shown(command):
    first = next(i for i, word in enumerate(command) if word.startswith("training/"))
    module = script(command[first].removeprefix("training/").removesuffix(".py"))
    args, _ = parse_arguments(module.Arguments, {}, command[first + 1 :])
    for file in (getattr(args, "candidates", None) or args.recipe).split(","):
        assert (ROOT / file).is_file()
    assert (ROOT / args.model_name_or_path / "config.json").is_file()


def test_the_other_commands_exist():
    others = [command for command in COMMANDS if command[0] != "accelerate"]
    assert [command[:2] for command in others] == [
        ["make", "results"],
        ["make", "experiments"],
        ["make", "base-campplus"],
        ["python", "benchmarks/training_speed.py"],
    ]
    for target in ("results", "experiments", "base-campplus"):
        assert re.search(f"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_the_trainer_trains(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    settings = 'use_cpu=True, max_steps=1, per_device_train_batch_size=2, save_strategy="no", report_to=[], '
    code = code.replace('"out/trainer", ', f'"out/trainer", {settings}')
    base = ROOT / "hub_cards" / "s2e-resnet20-adapter"
    monkeypatch.chdir(tmp_path)
    exec(code.replace("hub_cards/s2e-resnet20-adapter", str(base)), {})
    assert (tmp_path / "out" / "s2e-mine" / "adapter.safetensors").is_file()


def test_links_lead_somewhere():
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", TEXT)
    assert targets and all((PAGE.parent / target).exists() for target in targets)


def test_the_speeds_are_those_that_were_measured():
    measured = json.loads((ROOT / "results" / "training_speed" / "cpu.json").read_text())
    assert script("training_speed", BENCHMARKS).markdown(measured) in TEXT
    speed = {(row["method"], row["precision"], row["variant"]): row for row in measured["rows"]}
    assert speed["residual_adapter", "fp32", "kept memory"]["loop"] >= 8  # the goal on two cores
    for precision in ("fp32", "bf16"):  # adapting is cheaper than training everything
        adapter, plain = (speed[method, precision, "kept memory"] for method in ("residual_adapter", "plain"))
        assert adapter["network"] > 1.1 * plain["network"]


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path, monkeypatch, capsys):
    out = tmp_path / "speed.json"
    flags = ["--batch_size", "1", "--steps", "1", "--methods", "bn_only", "--loop", "--output", str(out)]
    monkeypatch.setattr(sys, "argv", ["training_speed.py", *flags])
    module = script("training_speed", BENCHMARKS)
    module.main()
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) >= 3 and rows[0]["ratio"] == 1 and all(row["both"] > 0 for row in rows)
    assert rows[-1]["loop"] > 0 and module.markdown(json.loads(out.read_text())) in capsys.readouterr().out
