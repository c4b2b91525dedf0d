"""The code that every repo carries: what it may import, and that it works where the package is not."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import LABELS, add_scrambled_adapter, segments, tiny_model
from transformers.dynamic_module_utils import get_imports, get_relative_import_files

import hf_s2e
from hf_s2e import S2EFeatureExtractor, S2EForAudioClassification

PACKAGE = Path(hf_s2e.__file__).parent / "model"
SHIPPED = sorted(PACKAGE.glob("*_s2e.py"))
ALLOWED = {"numpy", "torch", "safetensors", "transformers", "huggingface_hub"}


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.name)
def test_imports_of_shipped_code(file):
    """What get_imports finds beyond the standard library, everyone who loads a repo must have installed."""
    assert set(get_imports(file)) - set(sys.stdlib_module_names) <= ALLOWED
    source = file.read_text()
    assert "hf_s2e." not in source.replace("`hf_s2e.", "") and "import hf_s2e" not in source
    assert "\nfrom . import" not in source  # whose files transformers does not copy


def test_every_file_is_reached_from_the_model():
    reached = {Path(file).name for file in get_relative_import_files(PACKAGE / "modeling_s2e.py")}
    assert reached | {"modeling_s2e.py"} == {file.name for file in SHIPPED}


@pytest.fixture(scope="module")
def repos(tmp_path_factory) -> tuple[Path, np.ndarray, dict[str, list[float]]]:
    """A base, an adapter and a fused model on disk; a sound; and each one's posterior for it."""
    folder = tmp_path_factory.mktemp("repos")
    model = tiny_model(repo_id="me/base")
    model.save_pretrained(folder / "base")
    add_scrambled_adapter(model, "emo", LABELS)
    model.save_adapter(folder / "adapter")
    model.fuse("emo").save_pretrained(folder / "fused")
    sound = np.random.default_rng(0).uniform(-1, 1, 700).astype(np.float32)
    np.save(folder / "sound.npy", sound)
    inputs = S2EFeatureExtractor.from_model_config(model.config)(sound, return_tensors="pt")
    posteriors = {}
    with torch.no_grad():
        for name in ("adapter", "base"):
            posteriors[name] = model(**inputs).logits[0].exp().tolist()
            model.disable_adapters()
    return folder, sound, posteriors | {"fused": posteriors["adapter"]}


# The environment's packages without its .pth files: an editable installation of this package is one of these.
SCRIPT = """
import importlib.util, json, sys
sys.path.append(sys.argv[1])
assert importlib.util.find_spec("hf_s2e") is None, "the package is importable: this would prove nothing"
import numpy as np
from transformers import AutoFeatureExtractor, AutoModel, AutoModelForAudioClassification, pipeline
sound, answers = np.load("sound.npy"), {}
for name in ("base", "adapter", "fused"):
    pipe = pipeline("audio-classification", model=name, trust_remote_code=True)
    scores = {entry["label"]: entry["score"] for entry in pipe(sound, top_k=None)}
    model = AutoModelForAudioClassification.from_pretrained(name, trust_remote_code=True)
    network = AutoModel.from_pretrained(name, trust_remote_code=True)
    inputs = AutoFeatureExtractor.from_pretrained(name, trust_remote_code=True)(sound, return_tensors="pt")
    assert network(**inputs).embeddings.equal(model(**inputs).embeddings)
    answers[name] = {
        "pipeline": [scores[model.config.id2label[i]] for i in range(model.config.num_labels)],
        "model": model(**inputs).logits[0].softmax(-1).tolist(),
        "class": type(model).__module__,
    }
model = AutoModelForAudioClassification.from_pretrained("base", trust_remote_code=True)
model.load_adapter("adapter", adapter_name="again")
model.save_adapter("saved/again")
answers["saved"] = sorted(path.name for path in __import__("pathlib").Path("saved/again").iterdir())
assert importlib.util.find_spec("hf_s2e") is None
print(json.dumps(answers))
"""


def run_without_the_package(folder: Path, script: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "modules")}
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", script, sysconfig.get_path("purelib")],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_repos_work_without_the_package(repos):
    folder, _, posteriors = repos
    result = run_without_the_package(folder, SCRIPT)
    assert result.returncode == 0, result.stderr[-3000:]
    answers = json.loads(result.stdout.splitlines()[-1])
    for name, posterior in posteriors.items():
        assert answers[name]["class"].startswith("transformers_modules.")
        np.testing.assert_allclose(answers[name]["model"], posterior, atol=1e-4)
        np.testing.assert_allclose(answers[name]["pipeline"], posterior, atol=1e-4)
    assert set(answers["saved"]) >= {file.name for file in SHIPPED} | {"adapter.safetensors", "config.json"}
    one, other = (S2EForAudioClassification.from_pretrained(folder / name) for name in ("adapter", "saved/again"))
    with torch.no_grad():  # what remote code saved loads here
        assert torch.equal(one(segments(2)).logits, other(segments(2)).logits)


@pytest.mark.slow
def test_code_runs_only_where_it_is_trusted(repos):
    script = """
import sys
sys.path.append(sys.argv[1])
from transformers import AutoModelForAudioClassification
AutoModelForAudioClassification.from_pretrained("adapter", trust_remote_code=False)
"""
    result = run_without_the_package(repos[0], script)
    assert result.returncode != 0 and "trust_remote_code" in result.stderr


def test_with_the_package_its_own_code_runs(repos):
    """Even where remote code was allowed: a repo cannot replace what is installed."""
    from transformers import AutoModelForAudioClassification

    model = AutoModelForAudioClassification.from_pretrained(repos[0] / "adapter", trust_remote_code=True)
    assert type(model) is S2EForAudioClassification
