"""Every block of docs/hub.md runs, from top to bottom, against a Hub on localhost."""

import re
import shlex
import shutil

from conftest import ROOT
from local_hub import head

from hf_s2e.cli import main

TEXT = (ROOT / "docs" / "hub.md").read_text(encoding="utf-8").replace("your-team", "me")


def run(language: str, block: str) -> None:
    if language == "python":
        exec(compile(block, block, "exec"), {})
        return
    for line in block.splitlines():
        if command := shlex.split(line, comments=True):
            assert main(command[1:]) == 0, line


def test_all_blocks_run_in_their_order(hub, tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"```(python|bash)\n(.*?)```", TEXT, re.S)
    assert [language for language, _ in blocks] == ["bash", "python", "python", "bash", "python", "python", "python"]
    shutil.copytree(ROOT / "hub_cards", tmp_path / "hub_cards")  # `s2e card` writes there
    (tmp_path / "results").symlink_to(ROOT / "results")  # and reads what cards report
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        run(*block)
    said = capsys.readouterr().out
    published = {name for name in hub.repos if hub.repos[name].private}
    assert {"me/s2e-emodb", "me/s2e-resnet20-adapter", "me/s2e-calls"} == published
    assert any(ref.startswith("refs/pr/") for ref in hub.repos["me/s2e-calls"].refs)
    assert sum(map(len, head(hub, "me/s2e-emodb").values())) < 0.8e6  # the size that the page states
    assert "adapter ['neutral', 'angry', 'bored'" in said and "s2e-resnet20-adapter\n" in said
    assert "not sent: dry run" in said and "me/s2e-emodb  neutral, angry, bored" in said
    assert "'neutral', 'angry', 'bored'" in said and "'calm', 'upset'" in said
    assert {path.name for path in (tmp_path / "models").iterdir()} == {"s2e-emodb", "s2e-resnet20-adapter"}
