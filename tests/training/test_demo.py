"""`make demo` without data: it adapts the committed base and classifies unseen voices, or fails loudly."""

import re
import subprocess
import sys

from conftest import ROOT


def demo(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "training" / "demo.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def test_toy_voices_are_told_apart(tmp_path):
    result = demo("--output_dir", str(tmp_path), "--data_dir", str(tmp_path / "toy"))
    assert result.returncode == 0, result.stderr[-3000:]
    clips = re.findall(r"^(spk0[45]_(\w+?)_\d+) +(\w+)  [+-]  \w+ \d\.\d\d", result.stdout, re.M)
    assert len({name for name, _, _ in clips}) == 48
    assert all(said == label for _, said, label in clips)
    ua = float(re.search(r"^UA (\d+\.\d) %", result.stdout, re.M)[1])
    assert ua > 40  # chance is 25; 75 where this was written
    assert (tmp_path / "s2e-toy" / "adapter.safetensors").is_file()
    assert "synthetic" in result.stdout


def test_a_failing_step_is_an_error_code():
    missing = demo("--corpus", "emodb", "--data_dir", "/nowhere")
    assert missing.returncode != 0 and "/nowhere is not a folder" in missing.stderr
    assert "Traceback" not in missing.stderr
