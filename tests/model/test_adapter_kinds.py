"""A new kind of adapter is one class and one row: everything else works on it as on the paper's."""

import pytest
import torch
from tiny import LABELS, segments, tiny_model
from torch import nn

from hf_s2e import S2EAdapterError, S2EForAudioClassification
from hf_s2e.model.adapter_layers_s2e import ADAPTER_KINDS


class LowRank(nn.Module):
    """alpha = B A, of rank r."""

    def __init__(self, shared: nn.Conv2d, rank: int = 1):
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, shared.in_channels))
        self.up = nn.Parameter(torch.empty(shared.out_channels, rank))

    def kernel(self) -> torch.Tensor:
        return (self.up @ self.down)[:, :, None, None]

    @torch.no_grad()
    def reset(self, start: str) -> None:
        nn.init.normal_(self.down)
        nn.init.zeros_(self.up) if start == "zero" else nn.init.normal_(self.up)


class Bottleneck(nn.Module):
    """Not linear, so no filter can stand for it; it runs beside the convolution."""

    def __init__(self, shared: nn.Conv2d):
        super().__init__()
        self.down = nn.Conv2d(shared.in_channels, 1, 1, stride=shared.stride)
        self.up = nn.Conv2d(1, shared.out_channels, 1, bias=False)

    def kernel(self) -> None:
        return None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.down(x).relu())

    @torch.no_grad()
    def reset(self, start: str) -> None:
        nn.init.normal_(self.down.weight)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight) if start == "zero" else nn.init.normal_(self.up.weight)


@pytest.fixture(autouse=True)
def kinds(monkeypatch):
    monkeypatch.setitem(ADAPTER_KINDS, "low_rank", LowRank)
    monkeypatch.setitem(ADAPTER_KINDS, "bottleneck", Bottleneck)


KINDS = pytest.mark.parametrize(
    "kind", [{"adapter_kind": "low_rank", "adapter_options": {"rank": 2}}, {"adapter_kind": "bottleneck"}]
)


def trained(kind: dict, tmp_path, adapters: bool = False) -> S2EForAudioClassification:
    """A base, loaded from disk, and an adapter "emo" of this kind after three steps."""
    tiny_model(adapters=adapters, repo_id="me/base").save_pretrained(tmp_path / "base")
    model = S2EForAudioClassification.from_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    model.add_adapter("emo", labels=LABELS, **kind)
    model.train_adapter("emo")
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learning, lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        model(segments(6, seed=step), labels=torch.arange(6) % 3).loss.backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.any() for p in learning)
    return model.eval()


@KINDS
def test_it_begins_as_the_shared_network_and_learns(kind, tmp_path):
    plain, x = tiny_model(adapters=False), segments(2)
    expected = plain(x).embeddings
    plain.add_adapter("emo", labels=LABELS, **kind)
    torch.testing.assert_close(plain(x).embeddings, expected)
    model = trained(kind, tmp_path)
    domain = model.s2e.domains["emo"]
    assert any(name.endswith(".alpha.up") or ".alpha.up." in name for name, p in domain.named_parameters() if p.any())
    assert not any(p.requires_grad for p in model.s2e.shared.parameters())


@KINDS
@torch.no_grad()
def test_it_saves_loads_and_mixes(kind, tmp_path):
    with torch.enable_grad():
        model = trained(kind, tmp_path)
    x = segments(2, 3)
    expected = model(x).logits
    model.save_adapter(tmp_path / "emo")
    loaded = S2EForAudioClassification.from_pretrained(tmp_path / "emo")
    assert torch.equal(loaded(x).logits, expected)
    loaded.add_adapter("paper", labels=LABELS, init="kaiming")  # the two kinds over one base
    mixed = loaded(x, adapter_names=["paper", "emo"]).logits
    torch.testing.assert_close(mixed[1:], loaded(x[1:], adapter_names=["emo"]).logits)
    loaded.save_pretrained(tmp_path / "both")
    again = S2EForAudioClassification.from_pretrained(tmp_path / "both")
    assert torch.equal(again(x, adapter_names=["emo", "emo"]).logits, expected)


@torch.no_grad()
def test_it_fuses_where_a_filter_can_stand_for_it(tmp_path):
    with torch.enable_grad():
        low_rank = trained({"adapter_kind": "low_rank"}, tmp_path / "low_rank", adapters=True)
        bottleneck = trained({"adapter_kind": "bottleneck"}, tmp_path / "bottleneck")
    x = segments(2, 3)
    low_rank.fuse().save_pretrained(tmp_path / "fused")
    fused = S2EForAudioClassification.from_pretrained(tmp_path / "fused")
    torch.testing.assert_close(fused(x).logits, low_rank(x).logits, atol=1e-4, rtol=0)
    with pytest.raises(S2EAdapterError, match="Bottleneck are no filters"):
        bottleneck.fuse()


def test_what_cannot_be_meant_is_refused(tmp_path, monkeypatch):
    model = tiny_model()
    for kind, said in (
        ({"adapter_kind": "lora"}, "adapter_kind is 'lora', but must be one of 'conv1x1', 'low_rank'"),
        ({"adapter_kind": "low_rank", "adapter_options": {"alpha": 2}}, "do not take the options {'alpha': 2}"),
    ):
        with pytest.raises(S2EAdapterError, match=said):
            model.add_adapter("emo", labels=LABELS, **kind)
    with pytest.raises(S2EAdapterError, match="no adapters of this kind to start from"):
        model.add_adapter("emo", labels=LABELS, adapter_kind="low_rank", init="source")
    assert model.adapter_names == []
    trained({"adapter_kind": "low_rank"}, tmp_path).save_adapter(tmp_path / "emo")
    monkeypatch.delitem(ADAPTER_KINDS, "low_rank")
    with pytest.raises(S2EAdapterError, match="cannot be followed here: adapter_kind is 'low_rank'"):
        S2EForAudioClassification.from_pretrained(tmp_path / "emo")
