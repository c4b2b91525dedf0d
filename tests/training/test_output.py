"""What a training leaves: a repo that is whole or the one before, and which code made it."""

import subprocess
from pathlib import Path

import pytest
from safetensors import SafetensorError
from training_tools import forget_accelerator, fresh_accelerator, same_tensors, script

import hf_s2e
from hf_s2e import S2EForAudioClassification
from hf_s2e.model import adapter_files_s2e as files
from hf_s2e.training import runtime
from hf_s2e.training.output import write_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("method", ["fine_tune", "residual_adapter"])
@pytest.mark.parametrize("error", [SafetensorError("No space left on device"), OSError(28, "No space left on device")])
def test_a_full_disk_at_the_end_leaves_the_old_repo_and_says_so(work, tmp_path, monkeypatch, method, error):
    adapt, base = script("adapt"), work.base(method)
    flags = {"method": method, "model_name_or_path": base, "output_dir": tmp_path, "max_train_steps": 1}
    adapt.main(work.flags(**flags))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.suffix == ".safetensors"}
    module = "transformers.modeling_utils.safe_save_file" if method == "fine_tune" else f"{files.__name__}.save_file"

    def fail(tensors, path, **options):
        Path(path).write_bytes(b"half")
        raise error

    monkeypatch.setattr(module, fail)
    forget_accelerator()
    with pytest.raises(SystemExit, match=r"trained, but .* is not whole: .*No space left"):
        adapt.main(work.flags(**flags, seed=1))
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.safetensors")} == before
    assert not list(tmp_path.rglob("*.part"))


def test_a_full_model_that_is_written_over_is_the_new_one(work, tmp_path):
    for seed in (0, 1):
        model = work.model("fine_tune", seed=seed)
        write_model(model, tmp_path, adapter=False)
    assert same_tensors(S2EForAudioClassification.from_pretrained(tmp_path), model)
    assert (tmp_path / "preprocessor_config.json").is_file() and not list(tmp_path.rglob("*.part"))


def test_the_environment_says_which_code_ran(tmp_path, monkeypatch):
    def git(*command):
        setup = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(tmp_path), *setup, *command], check=True, capture_output=True)

    def said():
        found = runtime.environment(fresh_accelerator())
        assert found["hf_s2e"] == hf_s2e.__version__
        return found["git_revision"], found["git_changed"]

    package = tmp_path / "hf_s2e" / "training"
    package.mkdir(parents=True)
    (package / "runtime.py").write_text("one")
    (tmp_path / "notes.md").write_text("another's repository")
    monkeypatch.setattr(runtime, "__file__", str(package / "runtime.py"))
    assert said() == (None, None)
    git("init", "-q")
    git("add", "notes.md")
    git("commit", "-q", "-m", "another's")
    assert said() == (None, None)  # installed there, but no part of it
    git("add", "hf_s2e")
    git("commit", "-q", "-m", "ours")
    revision, changed = said()
    assert len(revision) == 40 and changed is False
    (package / "runtime.py").write_text("two")
    assert said() == (revision, True)
