"""The configuration: what it refuses, what it says about each domain, and what survives JSON."""

import json

import pytest
from conftest import ROOT
from tiny import LABELS, tiny_config
from transformers import AutoConfig

from hf_s2e import S2EConfig, S2EForAudioClassification
from hf_s2e.hub import Repo


def through_json(config: S2EConfig, tmp_path) -> S2EConfig:
    config.save_pretrained(tmp_path)
    return AutoConfig.from_pretrained(tmp_path)


def test_defaults_are_the_papers():
    config = S2EConfig()
    assert (config.frames_per_segment, config.num_bins, config.embedding_size) == (200, 400, 256)
    assert config.window_length / config.sampling_rate == 0.040
    assert config.hop_length / config.sampling_rate == 0.010
    assert config.sampling_rate / config.n_fft == 10
    assert config.adapters and not config.adapt_stem and config.shortcut == "pool"


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"normalization": "peak"}, "'segment', 'utterance', 'none'"),
        ({"shortcut": "conv"}, "'pool', 'projection'"),
        ({"aggregation": "vote"}, "'mean'"),
        ({"hop_length": 0}, "hop_length is 0"),
        ({"hop_length": "160"}, "hop_length is '160'"),
        ({"sampling_rate": 8000}, "sampling_rate is 8000, but must be 16000 Hz"),
        ({"hop_length": 7}, "multiples of hop_length"),
        ({"n_fft": 32}, "n_fft=32 is too small"),
        ({"num_bins": 34}, "too small"),
        ({"segment_hop": 320}, "no sample may be skipped"),
        ({"segment_length": 10**12}, "at most"),
        ({"mu": 0}, "mu is 0"),
        ({"mu": float("nan")}, "mu is nan"),
        ({"drop_tail": "yes"}, "drop_tail"),
        ({"hidden_sizes": [4, 4]}, "twice as wide"),
        ({"hidden_sizes": 5}, "hidden_sizes is 5, but must be a list"),
        ({"hidden_sizes": [4]}, "one entry a stage"),
        ({"depths": [2, 0]}, "depths"),
        ({"depths": [2, 10**6]}, "100 blocks at most"),
        ({"domains": {f"d{i}": {"labels": ["a"]} for i in range(1001)}, "base_domain": "d0"}, "1000 at most"),
        ({"stem_kernel_size": 4}, "odd"),
        ({"fused": True, "adapters": True}, "adapters=False"),
        ({"num_labels": 10**9}, "num_labels"),
        ({"num_labels": 0}, "num_labels"),
        ({"active_domain": "nobody"}, "'nobody' is not among"),
        ({"domains": {"../x": {}}, "base_domain": "../x"}, "cannot be a domain"),
        ({"domains": {"speaker": {"pooling": "max"}}}, "pooling"),
        ({"domains": {"speaker": {}, "other": {}}}, "'other' has no labels"),
        ({"domains": ["speaker"]}, "domains"),
        ({"base_local_path": 3, "adapter_sha256": "0"}, "base_local_path is 3"),
    ],
)
def test_impossible_settings_are_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        tiny_config(**wrong)


def test_id2label_describes_the_active_domain(tmp_path):
    config = tiny_config(domains={"speaker": {"labels": ["s1", "s2"]}, "emo": {"labels": LABELS}})
    assert config.num_labels == 2 and config.labels_of("emo") == LABELS
    config.activate("emo")
    assert config.num_labels == 3 and config.label2id["sad"] == 2 and config.labels_of("speaker") == ["s1", "s2"]
    again = through_json(config, tmp_path)
    assert again.active_domain == "emo" and again.labels_of("speaker") == ["s1", "s2"]
    assert [again.id2label[i] for i in range(3)] == LABELS
    again.activate("speaker")
    assert list(again.id2label.values()) == ["s1", "s2"] and again.labels_of("emo") == LABELS


def test_each_label_is_written_once(tmp_path):
    """Two lists of the same labels could contradict each other."""
    config = tiny_config(domains={"speaker": {"labels": ["s1", "s2"]}, "emo": {"labels": LABELS}})
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert "labels" not in written["domains"]["speaker"] and list(written["id2label"].values()) == [
        "s1",
        "s2",
    ]
    assert not {"adapter_sha256", "base_fingerprint", "method"} & set(written)  # an adapter's fields


def test_changing_labels_reaches_the_active_domain(tmp_path):
    config = through_json(tiny_config(num_labels=4), tmp_path)
    changed = AutoConfig.from_pretrained(tmp_path, num_labels=7)
    assert changed.num_labels == 7 and len(changed.labels_of("speaker")) == 7
    config.id2label = dict(enumerate("abcd"))
    assert config.labels_of("speaker") == list("abcd")


def test_an_adapters_config_is_one_domain(tmp_path):
    config = tiny_config(
        adapter_name="emo",
        adapter_sha256="0" * 64,
        base_fingerprint="1" * 64,
        base_model_name_or_path="me/base",
        use_shared=False,
        pooling="mean_std",
        method="adapter_only",
        id2label=dict(enumerate(LABELS)),
    )
    again = through_json(config, tmp_path)
    assert again.is_adapter and again.labels_of("emo") == LABELS
    assert again.domains == {"emo": {"use_shared": False, "pooling": "mean_std", "method": "adapter_only"}}
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["method"] == "adapter_only" and written["use_shared"] is False and "domains" not in written


def test_the_callers_domains_are_not_changed():
    domains = {"speaker": {"labels": ["s1"]}, "emo": {"labels": LABELS}}
    config = tiny_config(domains=domains)
    config.activate("emo")
    assert domains == {"speaker": {"labels": ["s1"]}, "emo": {"labels": LABELS}}


# ---- what identifies a base


def test_a_setting_that_came_later_is_in_the_fingerprint_only_where_it_is_used():
    """Otherwise every adapter in existence would stop fitting its base with the next setting."""
    first = {
        "sampling_rate": 16_000, "window_length": 640, "hop_length": 160, "n_fft": 1600, "num_bins": 400,
        "segment_length": 32_000, "segment_hop": 16_000, "mu": 255.0, "normalization": "segment", "drop_tail": False,
    }  # fmt: skip
    assert S2EConfig().fingerprinted == first
    assert S2EConfig(remove_dc=True).fingerprinted == first | {"remove_dc": True}
    assert S2EConfig(batch_norm_eps=1e-3).fingerprinted == first | {"batch_norm_eps": 1e-3}
    assert S2EConfig(drop_tail=True).fingerprinted == first | {"drop_tail": True}
    assert set(S2EConfig(backbone="campplus").fingerprinted) == {*first, "features", "fill"}


@pytest.mark.parametrize("eps", [0, -1e-5, float("nan"), float("inf"), "1e-5", True, 10**400])
def test_an_eps_that_cannot_be(eps):
    with pytest.raises(ValueError, match="batch_norm_eps"):
        S2EConfig(batch_norm_eps=eps)


@pytest.mark.parametrize(
    "name, fingerprint",
    [
        ("s2e-resnet20-adapter", "d6206cd3fe3a442ea686b4ff04bd7d78111e8bc9f5ecb4d8d0515067633f80a9"),
        ("s2e-resnet20-plain", "76acbae241e708030054e7a087dfe313d907a674b71ebb17062f6be23b1168f3"),
    ],
)
def test_the_bases_of_the_repository_keep_their_fingerprints(name, fingerprint):
    """Written down once: what was published by it must fit for ever."""
    folder = ROOT / "hub_cards" / name
    assert S2EForAudioClassification.from_pretrained(folder).base_fingerprint == fingerprint == Repo(folder).fingerprint
