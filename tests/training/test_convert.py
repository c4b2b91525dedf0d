"""The bases in the repository: converted without loss, whole, and able to tell real speakers apart."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

from hf_s2e import S2EFeatureExtractor, S2EForAudioClassification
from hf_s2e.audio import load_audio

BASES = {"s2e-resnet20-adapter": True, "s2e-resnet20-plain": False}  # with adapters?


def checkpoint(adapters: bool) -> dict[str, torch.Tensor]:
    """Random tensors of the paper's network, by the names that training/convert.py describes."""
    tensors = {"stem.conv7x7.weight": torch.randn(32, 1, 7, 7), "fc.weight": torch.randn(3, 256)}
    tensors["fc.bias"] = torch.randn(3)
    norms = {"stem.bn": 32}
    for stage, width in enumerate((32, 64, 128), start=1):
        for block in (1, 2, 3):
            for conv in (1, 2):
                name, out = (
                    f"stage{stage}.block{block}.conv{conv}",
                    2 * width if block == 3 and conv == 2 else width,
                )
                tensors[f"{name}.shared3x3.weight"] = torch.randn(out, width, 3, 3)
                if adapters:
                    tensors[f"{name}.alpha1x1.weight"] = torch.randn(out, width, 1, 1)
                norms[f"{name}.bn"] = out
    for name, width in norms.items():
        tensors |= {f"{name}.{part}": torch.rand(width) for part in ("weight", "bias", "running_mean", "running_var")}
    return tensors


@pytest.fixture
def convert(monkeypatch):
    """Runs `python training/convert.py ARGUMENTS` in this process."""

    def run(*arguments) -> None:
        monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, arguments)])
        runpy.run_path(str(ROOT / "training" / "convert.py"), run_name="__main__")

    return run


@pytest.mark.parametrize("adapters", [True, False])
def test_nothing_is_changed_but_the_names(adapters, convert, tmp_path, capsys):
    tensors, labels = checkpoint(adapters), tmp_path / "labels.txt"
    save_file(tensors, tmp_path / "checkpoint.safetensors")
    labels.write_text("anna\nben\ncarl\n")
    convert(
        "resnet20", tmp_path / "checkpoint.safetensors", tmp_path / "base", "--repo_id", "me/base", "--labels", labels
    )
    model = S2EForAudioClassification.from_pretrained(tmp_path / "base")
    assert model.config.adapters is adapters and model.config.labels_of("speaker") == ["anna", "ben", "carl"]
    assert model.config.repo_id == "me/base" and model.base_fingerprint in capsys.readouterr().out

    def multiset(tensors):
        return sorted((tuple(t.shape), t.double().sum().item()) for t in tensors)

    kept = [t for name, t in model.state_dict().items() if not name.endswith("num_batches_tracked")]
    assert multiset(kept) == multiset(tensors.values())
    third = model.s2e.shared.stages[2][1].conv2.weight  # the one place where positions could be off by one
    assert torch.equal(third, tensors["stage3.block2.conv2.shared3x3.weight"])
    first = model.s2e.domains["speaker"].stages[0][2].conv1.bn.running_var
    assert torch.equal(first, tensors["stage1.block3.conv1.bn.running_var"])


@pytest.mark.parametrize(
    ("change", "arguments", "says"),
    [
        (lambda tensors: tensors.update(extra=torch.zeros(1)), [], "unknown tensor 'extra'"),
        (lambda tensors: tensors.pop("stem.bn.bias"), [], "Missing key"),
        (
            lambda tensors: None,
            ["--labels", ROOT / ".gitattributes"],
            "labels were given, but the checkpoint has 3",
        ),
    ],
)
def test_another_checkpoint_is_refused(change, arguments, says, convert, tmp_path):
    tensors = checkpoint(True)
    change(tensors)
    save_file(tensors, tmp_path / "checkpoint.safetensors")
    with pytest.raises((SystemExit, RuntimeError), match=says):
        convert("resnet20", tmp_path / "checkpoint.safetensors", tmp_path / "base", "--repo_id", "me/base", *arguments)
    assert not (tmp_path / "base").exists()


@pytest.mark.parametrize(("name", "adapters"), BASES.items())
def test_committed_bases_are_whole(name, adapters):
    model, info = S2EForAudioClassification.from_pretrained(ROOT / "hub_cards" / name, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.adapters is adapters and model.config.repo_id.endswith(f"/{name}")
    assert {t.dtype for t in load_file(ROOT / "hub_cards" / name / "model.safetensors").values()} <= {
        torch.float32,
        torch.int64,
    }
    fewer_speakers = 1_522_898 if adapters else 1_372_370  # the paper's 50, not 250
    assert model.num_parameters() == fewer_speakers + 200 * 257


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", BASES)
def test_committed_bases_know_their_speakers(name, s2e_data: Path):
    """95 % of these recordings were trained on: this shows that weights and front end belong together."""
    clips = sorted((s2e_data / "speechocean762").rglob("*.ogg"))[::400]
    if not clips:
        pytest.skip(f"no speechocean762 in {s2e_data}")
    model = S2EForAudioClassification.from_pretrained(ROOT / "hub_cards" / name)
    extractor = S2EFeatureExtractor.from_pretrained(ROOT / "hub_cards" / name)
    inputs = extractor([load_audio(clip) for clip in clips], sampling_rate=16_000, return_tensors="pt")
    said = [model.config.id2label[int(k)] for k in model(**inputs).logits.argmax(-1)]
    right = sum(label in (clip.parent.name, clip.stem) for label, clip in zip(said, clips))
    print(f"{name}: {right} of {len(clips)} speakers named rightly, of {model.config.num_labels}")
    assert right >= 0.9 * len(clips)
