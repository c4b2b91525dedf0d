"""Every block of docs/hub.md runs, from top to bottom, against a Hub on localhost."""

import json
import os
import re
import shutil
import subprocess
import sys

from conftest import ROOT
from local_hub import LocalHub

TEXT = (ROOT / "docs" / "hub.md").read_text(encoding="utf-8").replace("your-team", "me")
RUN = """
import json, shlex, sys
from hf_s2e.cli import main
for language, block in json.load(sys.stdin):
    if language == "python":
        exec(compile(block, block, "exec"), {})
        continue
    for line in block.splitlines():
        command = shlex.split(line, comments=True)
        print("$", line, flush=True)
        if command and main(command[1:]):
            raise SystemExit(f"failed: {line}")
"""


def test_all_blocks_run_in_their_order(tmp_path):

    blocks = re.findall(r"```(python|bash)\n(.*?)```", TEXT, re.S)
    assert [language for language, _ in blocks] == ["bash", "python", "python", "bash", "python", "python"]
    shutil.copytree(ROOT / "hub_cards", tmp_path / "hub_cards")  # `s2e card` writes there
    (tmp_path / "results").symlink_to(ROOT / "results")  # and reads what cards report
    with LocalHub() as hub:
        environment = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": hub.token}
        environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
        for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN_PATH", "HF_HUB_OFFLINE"):
            environment.pop(name, None)
        done = subprocess.run(
            [sys.executable, "-c", RUN], input=json.dumps(blocks), cwd=tmp_path, env=environment,
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        published = {name for name in hub.repos if hub.repos[name].private}
        assert {"me/s2e-emodb", "me/s2e-resnet20-adapter", "me/s2e-calls"} == published
        assert any(ref.startswith("refs/pr/") for ref in hub.repos["me/s2e-calls"].refs)
        adapter = hub.repos["me/s2e-emodb"].trees[hub.repos["me/s2e-emodb"].resolve("main")]
        assert sum(len(blob.data) for blob in adapter.values()) < 0.8e6  # the size that the page states
    assert "not sent: dry run" in done.stdout and "me/s2e-emodb  neutral, angry, bored" in done.stdout
    assert "'neutral', 'angry', 'bored'" in done.stdout and "'calm', 'upset'" in done.stdout
    assert {path.name for path in (tmp_path / "models").iterdir()} == {"s2e-emodb", "s2e-resnet20-adapter"}
