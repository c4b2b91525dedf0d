"""The `s2e` command: output, exit codes and errors in one line."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file

import hf_s2e
from hf_s2e import S2EConfig, S2EForAudioClassification, S2EPipeline
from hf_s2e.cli import COMMANDS, main
from hf_s2e.hub.info import describe_repo

CARD = """---
model-index:
- name: phone
  results:
  - task: {type: audio-classification}
    dataset: {name: EmoDB, type: emodb}
    metrics:
    - {type: recall, name: UA, value: 73.7}
---
# phone
"""


@pytest.fixture(scope="module")
def repos(tmp_path_factory):
    """A base, an adapter `phone` for it, a fused model and a plain base, side by side."""
    folder = tmp_path_factory.mktemp("repos")
    torch.manual_seed(0)
    sizes = {"hidden_sizes": [2, 4], "depths": [1, 1]}
    model = S2EForAudioClassification(S2EConfig(**sizes, num_labels=20, repo_id="someone/base")).eval()
    model.save_pretrained(folder / "base")
    model = S2EForAudioClassification.from_pretrained(folder / "base")
    model.add_adapter("phone", labels=["calm", "upset", "glad"])
    model.save_adapter(folder / "phone", "phone")
    (folder / "phone" / "README.md").write_text(CARD)
    model.fuse("phone").save_pretrained(folder / "fused")
    S2EForAudioClassification(S2EConfig(**sizes, adapters=False)).save_pretrained(folder / "plain")
    return folder


@pytest.fixture
def sounds(tmp_path):
    """A folder of three sounds, one of them in a subfolder, and things that are none."""
    folder = tmp_path / "sounds"
    (folder / "deep").mkdir(parents=True)
    (folder / "folder.wav").mkdir()
    rng = np.random.default_rng(0)
    for name, kind in (("a.wav", "WAV"), ("b.FLAC", "FLAC"), ("deep/c.ogg", "OGG")):
        soundfile.write(folder / name, 0.1 * rng.standard_normal(8000), 16000, format=kind)
    (folder / "notes.txt").write_text("not a sound")
    (folder / "._a.wav").write_text("what some file systems leave behind")
    return folder


def test_predict_a_file(repos, sounds, capsys):
    file = str(sounds / "a.wav")
    assert main(["predict", file, "--model", str(repos / "phone")]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"{file}: ")
    assert all(label in out for label in ("calm", "upset", "glad"))
    assert "file/s" not in err


def test_predict_json_is_what_the_pipeline_says(repos, sounds, capsys):
    assert main(["predict", str(sounds), "--model", str(repos / "phone"), "--json", "--top-k", "2"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    files = [str(sounds / name) for name in ("a.wav", "b.FLAC", "deep/c.ogg")]
    assert [result["file"] for result in found] == files
    pipe = S2EPipeline(S2EForAudioClassification.from_pretrained(repos / "phone"), top_k=2)
    assert [result["scores"] for result in found] == pipe(files)
    assert "3/3" in err  # the progress bar


def test_one_bad_file_leaves_the_others(repos, sounds, capsys):
    bad = sounds / "bad.wav"
    bad.write_text("not a sound")
    arguments = ["predict", str(sounds), "absent.wav", "--model", str(repos / "phone")]
    assert main([*arguments, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [result["file"] for result in found if "error" in result] == [str(bad), "absent.wav"]
    assert sum("scores" in result for result in found) == 3
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 3
    assert "bad.wav: not a sound file" in err
    assert "No such file" in err


def test_silence_is_answered_with_a_plain_warning(repos, tmp_path, capsys):
    soundfile.write(tmp_path / "silence.wav", np.zeros(8000), 16000)
    assert main(["predict", str(tmp_path / "silence.wav"), "--model", str(repos / "phone")]) == 0
    _, err = capsys.readouterr()
    assert "silence" in err
    assert "warnings.warn" not in err


@pytest.mark.parametrize("arguments", [
    [], ["sing"], ["predict"], ["predict", "a.wav"], ["predict", "--model", "x"], ["info"],
    ["predict", "a.wav", "--model", "x", "--top-k", "0"],
    ["predict", "a.wav", "--model", "x", "--top-k", "two"],
])  # fmt: skip
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: s2e" in capsys.readouterr().err


def test_failures_are_one_sentence(repos, sounds, tmp_path, capsys):
    def refused(*arguments) -> str:
        assert main([str(argument) for argument in arguments]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert len(err.splitlines()) == 1, err
        assert err.startswith(f"s2e {arguments[0]}: ")
        return err

    (tmp_path / "empty").mkdir()
    file, phone = sounds / "a.wav", repos / "phone"
    assert "no sound files" in refused("predict", tmp_path / "empty", "--model", phone)
    for command in (("predict", file, "--model"), ("info",)):
        assert "no config.json" in refused(*command, tmp_path / "empty")
        assert "no such folder" in refused(*command, tmp_path / "absent" / "base")
        (tmp_path / "config.json").write_text('{"model_type": "wav2vec2"}')
        assert "'wav2vec2'" in refused(*command, tmp_path)
        (tmp_path / "config.json").write_text("{")
        assert "damaged" in refused(*command, tmp_path)
        (tmp_path / "config.json").write_text("[]")
        assert "damaged" in refused(*command, tmp_path)
        (tmp_path / "config.json").write_text('{"model_type": "s2e", "hidden_sizes": 5}')
        assert "damaged" in refused(*command, tmp_path)
        for file in (repos / "base").glob("*.json"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
        (tmp_path / "model.safetensors").write_text("not tensors")
        assert "model.safetensors is not a whole safetensors file" in refused(*command, tmp_path)
        (tmp_path / "model.safetensors").unlink()
        assert "model.safetensors" in refused(*command, tmp_path)


def test_adapter_without_its_base_or_with_a_damaged_file(repos, sounds, tmp_path, capsys):
    lonely = tmp_path / "lonely"
    lonely.mkdir()
    for file in (repos / "phone").iterdir():
        (lonely / file.name).write_bytes(file.read_bytes())
    config = json.loads((lonely / "config.json").read_text())
    config.update(base_model_name_or_path="../escape", base_local_path=None)
    (lonely / "config.json").write_text(json.dumps(config))
    assert main(["predict", str(sounds / "a.wav"), "--model", str(lonely)]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    (lonely / "adapter.safetensors").write_bytes(b"\x80\x04not tensors")
    assert main(["info", str(lonely)]) == 1
    assert "safetensors" in capsys.readouterr().err


def test_info_of_an_adapter_needs_no_base(repos, tmp_path, capsys):
    alone = tmp_path / "alone"
    alone.mkdir()
    for file in (repos / "phone").iterdir():
        (alone / file.name).write_bytes(file.read_bytes())
    assert main(["info", str(alone), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    base = S2EForAudioClassification.from_pretrained(repos / "base")
    base.add_adapter("phone", labels=["calm", "upset", "glad"])
    base.train_adapter("phone")
    assert found == {
        "source": str(alone),
        "kind": "adapter",
        "name": "phone",
        "labels": ["calm", "upset", "glad"],
        "base": "someone/base",
        "base_revision": None,
        "method": None,
        "fingerprint": base.base_fingerprint,
        "parameters": sum(p.numel() for p in base.parameters() if p.requires_grad),
        "weights_bytes": (repos / "phone" / "adapter.safetensors").stat().st_size,
        "results": [{"dataset": "EmoDB", "metric": "UA", "value": 73.7}],
    }


def test_info_of_bases(repos, tmp_path):
    base = describe_repo(str(repos / "base"))
    assert (base["kind"], base["repo_id"], base["adapters"]) == ("base", "someone/base", {})
    assert len(base["labels"]) == 20
    assert base["fingerprint"] == describe_repo(str(repos / "phone"))["fingerprint"]
    plain, fused = describe_repo(str(repos / "plain")), describe_repo(str(repos / "fused"))
    assert (plain["kind"], fused["kind"], fused["fingerprint"]) == ("plain base", "fused", None)
    assert fused["labels"] == ["calm", "upset", "glad"]
    model = S2EForAudioClassification.from_pretrained(repos / "base")
    model.load_adapter(repos / "phone")
    model.save_pretrained(tmp_path / "both")
    assert describe_repo(str(tmp_path / "both"))["adapters"] == {"phone": ["calm", "upset", "glad"]}
    assert describe_repo(str(tmp_path / "both"))["parameters"] == model.num_parameters()


def test_info_of_what_is_not_whole(repos, tmp_path, capsys):
    """The tensors must be those that the config describes; from which side they differ is said."""
    for change, said in {
        "drop": "(missing heads.speaker.bias)",
        "add": "(unexpected more)",
        "reshape": "(of another shape heads.speaker.bias)",
    }.items():
        folder = shutil.copytree(repos / "base", tmp_path / change)
        tensors = load_file(folder / "model.safetensors")
        if change == "add":
            tensors["more"] = torch.zeros(2)
        else:
            bias = tensors.pop("heads.speaker.bias")
        if change == "reshape":
            tensors["heads.speaker.bias"] = bias[:-1].clone()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        assert main(["info", str(folder)]) == 1
        out, err = capsys.readouterr()
        assert out == "" and f"model.safetensors: the tensors are not those that config.json describes {said}" in err


def test_info_as_text(repos, capsys):
    for repo, found in (("base", "(20 in all)"), ("phone", "EmoDB  UA  73.7"), ("fused", "fused")):
        assert main(["info", str(repos / repo)]) == 0
        assert found in capsys.readouterr().out


HELP = """
import sys, time
from hf_s2e.cli import main
try:
    main(sys.argv[1:])
finally:
    heavy = {"torch", "transformers", "huggingface_hub", "datasets", "numpy"} & set(sys.modules)
    print(time.process_time(), *heavy, file=sys.stderr)
"""


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_costs_nothing(command):
    arguments = [command, "--help"] if command else ["--help"]
    done = subprocess.run([sys.executable, "-c", HELP, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and f"usage: s2e {command}" in done.stdout
    seconds, *heavy = done.stderr.split()
    assert float(seconds) < 0.5 and heavy == []


def test_as_a_program():
    def run(argument):
        command = [sys.executable, "-m", "hf_s2e.cli", argument]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout

    assert all(name in run("--help") for name in COMMANDS)
    assert run("--version") == f"s2e {hf_s2e.__version__}\n"
