"""The wheel, installed in an environment of its own outside the checkout, does its work there."""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import ROOT

pytestmark = pytest.mark.slow
SCRIPT = """
import sys, hf_s2e, numpy
from pathlib import Path
from transformers import pipeline
assert str(Path(hf_s2e.__file__).resolve()).startswith(sys.prefix), hf_s2e.__file__
noise = numpy.random.randn(20000).astype("float32")
print(pipeline("audio-classification", model=sys.argv[1])(noise)[0]["label"])
"""


def run(*command, cwd: Path, **environment: str) -> str:
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=clean | environment,
        timeout=600,
    )
    assert result.returncode == 0, f"{command}\n{result.stdout[-1500:]}\n{result.stderr[-3000:]}"
    return result.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The bin/ of a new environment with the wheel in it; its dependencies are those of this environment."""
    folder = tmp_path_factory.mktemp("package")
    run(sys.executable, "-m", "build", "--outdir", folder / "dist", ROOT, cwd=folder)
    assert {path.suffix for path in (folder / "dist").iterdir()} == {".whl", ".gz"}
    venv.create(folder / "env", with_pip=True)
    python = folder / "env" / "bin" / "python"
    # The wheel is installed as a user would; torch and the like are not downloaded a second time, but
    # linked from this environment, whose editable install of the package is left out.
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", *(folder / "dist").glob("*.whl"), cwd=folder)
    site = next((folder / "env").glob("lib/python*/site-packages"))
    here = Path(np.__file__).parents[1]
    for package in here.iterdir():
        if (
            not package.name.startswith(("hf_s2e", "__editable__", "hf-s2e", "pip", "setuptools", "_distutils"))
            and not (site / package.name).exists()
        ):
            (site / package.name).symlink_to(package)
    return folder / "env" / "bin"


def test_wheel_holds_the_package_and_its_templates(installed):
    from zipfile import ZipFile

    (wheel,) = (installed.parents[1] / "dist").glob("*.whl")
    names = ZipFile(wheel).namelist()
    for wanted in ("hf_s2e/model/modeling_s2e.py", "hf_s2e/corpora/emodb.py", "hf_s2e/training/loop.py"):
        assert wanted in names
    assert any(name.startswith("hf_s2e/hub/templates/") and name.endswith(".md") for name in names)
    assert not [name for name in names if name.startswith(("tests/", "training/", "hub_cards/"))]


def test_pipeline_predict_info_and_card_from_the_wheel(installed, tmp_path):
    adapter = ROOT / "hub_cards" / "s2e-emodb"
    label = run(installed / "python", "-c", SCRIPT, adapter, cwd=tmp_path).strip()
    assert label in json.loads((adapter / "config.json").read_text())["label2id"]

    soundfile.write(tmp_path / "noise.wav", np.random.default_rng(0).normal(0, 0.1, 30_000), 44_100)
    answer = json.loads(run(installed / "s2e", "predict", "noise.wav", "--model", adapter, "--json", cwd=tmp_path))
    assert answer[0]["file"] == "noise.wav"

    info = json.loads(run(installed / "s2e", "info", adapter, "--json", cwd=tmp_path))
    assert "s2e-resnet20-adapter" in json.dumps(info)

    copy = tmp_path / "s2e-emodb"
    copy.mkdir()
    for file in adapter.iterdir():
        if file.is_file() and file.name != "README.md":
            (copy / file.name).write_bytes(file.read_bytes())
    results = ROOT / "results" / "emodb-loso-paper" / "summary.json"
    run(installed / "s2e", "card", copy, "--results", results, cwd=tmp_path)
    assert "base_model: " in (copy / "README.md").read_text()
