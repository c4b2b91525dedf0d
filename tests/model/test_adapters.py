"""Adapters in memory: what is trained and what stays, choosing among them, and batches of mixed domains."""

import pytest
import torch
from tiny import LABELS, add_scrambled_adapter, segments, tiny_config, tiny_model
from torch import nn

from hf_s2e import S2EAdapterError, S2EForAudioClassification


def snapshot(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(model, before: dict[str, torch.Tensor]) -> set[str]:
    after = model.state_dict()
    assert after.keys() == before.keys()
    return {name for name in after if not torch.equal(after[name], before[name])}


def train(model, steps: int = 3) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-3)
    for step in range(steps):
        optimizer.zero_grad()
        classes = model.config.num_labels
        model(segments(6, seed=step), labels=torch.arange(6) % classes).loss.backward()
        optimizer.step()


# ---- add ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_new_adapter_starts_as_the_shared_network():
    """Alpha of zero and the base's batch norm: BN(w * x)."""
    model = tiny_model()
    model.add_adapter("emo", labels=LABELS)
    domain, source = model.s2e.domains["emo"], model.s2e.domains["speaker"]
    for name, tensor in domain.state_dict().items():
        expected = torch.zeros_like(tensor) if "alpha" in name else source.state_dict()[name]
        assert torch.equal(tensor, expected), name
    assert model.active_adapters() == ["emo"] and model.active_adapter() == "emo"
    assert model.config.id2label == dict(enumerate(LABELS)) and model.config.num_labels == 3
    assert model(segments(2)).logits.shape == (2, 3)


@torch.no_grad()
def test_other_initial_alphas():
    model, x = tiny_model(), segments(2)
    base = model(x).embeddings
    model.add_adapter("copy", labels=LABELS, init="source")
    assert torch.equal(model(x).embeddings, base)
    torch.manual_seed(0)
    model.add_adapter("random", labels=LABELS, init="kaiming")
    alpha = model.s2e.domains["random"].stages[0][0].conv1.alpha.weight
    assert alpha.abs().max() > 0
    assert not torch.equal(alpha, model.s2e.domains["copy"].stages[0][0].conv1.alpha.weight)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"adapter_name": "speaker"}, "already"),
        ({"adapter_name": "../up"}, "cannot be an adapter's name"),
        ({"adapter_name": "a.b"}, "cannot be an adapter's name"),
        ({"adapter_name": ""}, "cannot be an adapter's name"),
        ({"adapter_name": "x" * 65}, "1 to 64"),
        ({"adapter_name": None}, "cannot be an adapter's name"),
        ({"adapter_name": "keys"}, "torch uses it"),
        ({"labels": None}, "must be a list of class names"),
        ({"labels": "angry"}, "must be a list of class names"),
        ({"labels": []}, "1 to 10000 non-empty strings"),
        ({"labels": ["a", ""]}, "non-empty"),
        ({"labels": ["a", "b", "a"]}, r"come twice: \['a'\]"),
        ({"init": "ones"}, "init is 'ones'"),
        ({"pooling": "max"}, "pooling is 'max'"),
        ({"use_shared": False}, "alpha would get no gradient"),
    ],
)
def test_an_impossible_adapter_is_refused_and_nothing_changes(arguments, says):
    model = tiny_model()
    before, config = snapshot(model), model.config.to_dict()
    with pytest.raises(S2EAdapterError, match=says):
        model.add_adapter(**({"adapter_name": "emo", "labels": LABELS} | arguments))
    assert not changed(model, before) and model.config.to_dict() == config


def test_a_fused_model_takes_no_adapters():
    with pytest.raises(S2EAdapterError, match="This model is fused"):
        tiny_model().fuse().add_adapter("emo", labels=LABELS)


@torch.no_grad()
def test_a_new_adapter_of_a_plain_base_is_the_same_function(tmp_path):
    """With alpha at zero; and it is saved, loaded, mixed and fused as those of a base with adapters are."""
    model, x = tiny_model(adapters=False, repo_id="me/plain"), segments(2, 3)
    expected = model(x).embeddings
    model.add_adapter("emo", labels=LABELS)
    assert torch.equal(model(x).embeddings, expected)
    add_scrambled_adapter(model, "other", init="kaiming")
    model.disable_adapters()
    assert torch.equal(model(x).embeddings, expected)
    model.save_pretrained(tmp_path / "plain")
    again = S2EForAudioClassification.from_pretrained(tmp_path / "plain")
    assert again.adapter_names == ["emo", "other"] and not again.config.adapters
    again.save_adapter(tmp_path / "other", "other")
    loaded = S2EForAudioClassification.from_pretrained(tmp_path / "other")
    mixed = model(x, adapter_names=["other", None])
    torch.testing.assert_close(loaded(x[:1]).logits, mixed.logits[:1, :3])
    torch.testing.assert_close(loaded.fuse()(x).logits, loaded(x).logits, atol=1e-4, rtol=0)
    with pytest.raises(S2EAdapterError, match="base domain has no adapters of this kind"):
        model.add_adapter("source", labels=LABELS, init="source")


@torch.no_grad()
def test_the_bases_own_alpha_can_become_part_of_its_filters():
    model, x = tiny_model(adapt_stem=True, repo_id="me/base"), segments(2, 3)
    expected = model(x).logits
    model.add_adapter("emo", labels=LABELS)
    with pytest.raises(S2EAdapterError, match="delete_adapter"):
        model.merge_base_adapter()
    model.delete_adapter("emo")
    before = model.base_fingerprint
    model.merge_base_adapter()
    torch.testing.assert_close(model(x).logits, expected, atol=1e-5, rtol=1e-5)
    assert not model.config.adapters and model.config.repo_id is None and model.base_fingerprint != before
    assert not any(".alpha." in name for name in model.state_dict())
    model.merge_base_adapter()  # nothing left to do
    torch.testing.assert_close(model(x).logits, expected, atol=1e-5, rtol=1e-5)


# ---- train -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "options"),
    [
        (("alpha", "bn", "fc"), {}),
        (("alpha", "bn", "fc"), {"init": "source", "use_shared": False}),
        (("bn", "fc"), {"init": "source"}),
        (("fc",), {}),
        (("alpha",), {}),
    ],
)
def test_training_one_adapter_changes_nothing_else(parts, options):
    model = tiny_model(adapt_stem=True, shortcut="projection")
    add_scrambled_adapter(model, "other", ["x", "y"])
    add_scrambled_adapter(model, "emo", **options)
    model.train_adapter("emo", parts=parts)
    before = snapshot(model)
    train(model)
    model.eval()

    def part(name: str) -> str | None:
        if name.startswith("heads.emo."):
            return "fc"
        if not name.startswith("s2e.domains.emo."):
            return None
        return "alpha" if ".alpha." in name else "bn"

    # batch norm's statistics and counter are buffers, which move without a gradient
    moved = changed(model, before)
    assert moved == {name for name in before if part(name) in parts}
    assert moved  # and something was learnt
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (part(name) in parts), name
        assert (parameter.grad is not None) == (part(name) in parts), name
        if parameter.grad is not None and parameter.numel() > 4:
            assert parameter.grad.abs().max() > 0, name


@torch.no_grad()
def test_frozen_statistics_stay_after_train_is_called_again():
    model = tiny_model()
    model.add_adapter("emo", labels=LABELS)
    model.train_adapter("emo", parts=("alpha", "fc"))
    before = snapshot(model)
    model.eval()
    model.train()  # what every training loop does after an evaluation
    assert model.training
    model(segments(4))
    assert not changed(model, before)


@torch.no_grad()
def test_an_adapter_without_its_shared_filters_does_not_see_them():
    model, x = tiny_model(), segments(2)
    add_scrambled_adapter(model, "emo", init="source", use_shared=False)
    before = model(x).logits
    for name, parameter in model.s2e.shared.named_parameters():
        if not name.startswith("stem"):  # the 7x7 stays
            parameter.normal_()
    assert torch.equal(model(x).logits, before)
    model.s2e.shared.stem.weight.normal_()
    assert not torch.equal(model(x).logits, before)


@pytest.mark.parametrize("parts", [(), ("gamma",), ("bn", "head")])
def test_unknown_parts_are_refused(parts):
    model = tiny_model()
    model.add_adapter("emo", labels=LABELS)
    with pytest.raises(S2EAdapterError, match="some of"):
        model.train_adapter("emo", parts=parts)


def test_a_plain_network_trains_as_its_own_domain():
    """The paper's feature_extractor: FC only, batch norm's statistics frozen."""
    model = tiny_model(adapters=False)
    model.replace_base_domain("emotion", LABELS)
    model.train_adapter("emotion", parts=("fc",))
    before = snapshot(model)
    train(model)
    assert changed(model, before) == {"heads.emotion.weight", "heads.emotion.bias"}


# ---- replace the base's task -------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", ["emotion", "speaker"])
def test_the_base_gets_another_task(name):
    model, x = tiny_model(repo_id="me/base"), segments(2)
    embeddings = model(x).embeddings
    model.replace_base_domain(name, LABELS)
    assert torch.equal(model(x).embeddings, embeddings) and model(x).logits.shape == (2, 3)
    assert model.config.id2label == dict(enumerate(LABELS)) and model.adapter_names == []
    assert model.config.base_domain == model.config.active_domain == name
    assert list(model.config.domains) == [name] == list(model.heads)
    assert model.config.repo_id is None  # it is another base now


def test_another_task_may_have_another_pooling(tmp_path):
    model, x = tiny_model(adapters=False), segments(2)
    model.replace_base_domain("emotion", LABELS, pooling="mean_std")
    logits = model(x).logits
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.heads["emotion"].in_features == 2 * model.config.hidden_sizes[-1] * 2
    assert torch.allclose(again(x).logits, logits, atol=1e-6)
    with pytest.raises(S2EAdapterError, match="pooling is 'max'"):
        model.replace_base_domain("emotion", LABELS, pooling="max")


def test_the_base_keeps_its_task_while_adapters_rely_on_it():
    model = tiny_model()
    model.add_adapter("emo", labels=LABELS)
    with pytest.raises(S2EAdapterError, match=r"delete_adapter.*'emo'"):
        model.replace_base_domain("emotion", LABELS)


# ---- choose and delete -------------------------------------------------------------------------------------


@torch.no_grad()
def test_choosing():
    model, x = tiny_model(), segments(2)
    speaker = model(x).logits
    add_scrambled_adapter(model, "one")
    one = model(x).logits
    add_scrambled_adapter(model, "two", ["x", "y"], pooling="mean_std")
    two = model(x).logits
    assert model.adapter_names == ["one", "two"] and two.shape == (2, 2)
    model.set_adapter("one")
    assert torch.equal(model(x).logits, one) and model.config.num_labels == 3
    model.set_adapter(["two"])
    assert torch.equal(model(x).logits, two) and model.config.label2id == {"x": 0, "y": 1}
    model.disable_adapters()
    assert torch.equal(model(x).logits, speaker) and model.active_adapters() == [] and model.config.num_labels == 5
    model.enable_adapters()
    assert model.active_adapters() == ["two"] and torch.equal(model(x).logits, two)
    for wrong, says in (
        ("three", "no adapter 'three'; loaded are: speaker, one, two"),
        (["one", "two"], "One adapter"),
    ):
        with pytest.raises(S2EAdapterError, match=says):
            model.set_adapter(wrong)
    assert model.active_adapters() == ["two"]


def test_models_of_one_config_have_adapters_of_their_own():
    config = tiny_config()
    one, other = S2EForAudioClassification(config), S2EForAudioClassification(config)
    one.add_adapter("emo", labels=LABELS)
    other.add_adapter("emo", labels=["a", "b"])
    one.add_adapter("more", labels=LABELS)
    assert other.adapter_names == ["emo"] and config.domains.keys() == {"speaker"}
    assert one.s2e.config is one.config and other(segments(1)).logits.shape == (1, 2)


def test_batch_norms_of_several_gpus_freeze_and_learn_as_others():
    model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(tiny_model())
    model.add_adapter("emo", labels=LABELS)
    model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.train_adapter("emo", parts=("fc",))
    assert not any(bn.training for bn in model.modules() if isinstance(bn, torch.nn.SyncBatchNorm))
    model.train_adapter("emo", parts=("bn",))
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning and all(".domains.emo." in name and ".bn." in name for name in learning)


def test_nothing_to_enable():
    with pytest.raises(S2EAdapterError, match="No adapter has been active"):
        tiny_model().enable_adapters()


@torch.no_grad()
def test_deleting():
    model, x = tiny_model(), segments(2)
    speaker, parameters = model(x).logits, model.num_parameters()
    for name in ("one", "two", "three"):
        add_scrambled_adapter(model, name)
    model.delete_adapter("two")
    assert model.active_adapters() == ["three"] and model.adapter_names == ["one", "three"]
    with pytest.raises(S2EAdapterError, match="no adapter 'two'"):
        model.delete_adapter(["one", "two"])
    assert model.adapter_names == ["one", "three"]  # all or none
    with pytest.raises(S2EAdapterError, match="base domain"):
        model.delete_adapter("speaker")
    model.delete_adapter(["one", "three", "one"])
    assert model.active_adapters() == [] and torch.equal(model(x).logits, speaker)
    assert model.num_parameters() == parameters and list(model.config.domains) == ["speaker"]
    with pytest.raises(S2EAdapterError, match="No adapter has been active"):
        model.enable_adapters()
    model.add_adapter("two", labels=LABELS)  # the name is free again


# ---- mixed batches -----------------------------------------------------------------------------------------


def three_domains(**options):
    model = tiny_model(**options)
    add_scrambled_adapter(model, "two", ["x", "y"])
    add_scrambled_adapter(model, "seven", list("abcdefg"), pooling=options.pop("pooling", "mean"))
    add_scrambled_adapter(model, "only", init="source", use_shared=False)
    return model


@torch.no_grad()
@pytest.mark.parametrize("aggregation", ["mean", "geometric", "max"])
def test_a_mixed_batch_is_its_rows_alone(aggregation):
    model = three_domains(aggregation=aggregation)
    x = segments(6, 3)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1], [0, 1, 1], [1, 0, 1]])
    names = ["seven", "two", None, "seven", "only", "__base__"]
    model.set_adapter("two")
    output = model(x, mask, adapter_names=names)
    assert output.logits.shape == (6, 7) and output.segment_logits.shape == (6, 3, 7)
    for row, name in enumerate(names):
        name = name if name in model.adapter_names else "speaker"
        model.set_adapter(name)
        alone = model(x[row : row + 1][:, mask[row].bool()])
        classes = model.config.num_labels
        torch.testing.assert_close(output.logits[row, :classes], alone.logits[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(output.embeddings[row], alone.embeddings[0], atol=1e-5, rtol=1e-5)
        assert (output.logits[row, classes:] == -torch.inf).all()
        assert output.row_labels[row] == tuple(model.config.labels_of(name))
        assert output.logits[row].softmax(-1).sum() == pytest.approx(1, abs=1e-5)


@torch.no_grad()
def test_mixed_poolings():
    model, x = tiny_model(), segments(2)
    add_scrambled_adapter(model, "std", pooling="mean_std")
    output = model(x, adapter_names=["speaker", "std"])
    assert output.embeddings is None  # of different width
    torch.testing.assert_close(output.logits[1, :3], model(x[1:]).logits[0], atol=1e-5, rtol=0)


def test_labels_of_a_mixed_batch():
    model, x = three_domains(), segments(3)
    names = ["two", "seven", "speaker"]
    output = model(x, labels=torch.tensor([1, 6, -100]), adapter_names=names)
    by_hand = -(output.logits[0, 1] + output.logits[1, 6]) / 2
    torch.testing.assert_close(output.loss, by_hand)
    with pytest.raises(ValueError, match="row 0 is 2, but its domain has 2 classes"):
        model(x, labels=torch.tensor([2, 0, 0]), adapter_names=names)


def test_several_adapters_learn_in_one_batch():
    model, x = three_domains(), segments(4)
    model.requires_grad_(True).train()
    model(x, labels=torch.tensor([0, 1, 2, 0]), adapter_names=["two", "two", "seven", "seven"]).loss.backward()
    for name in ("two", "seven"):
        assert model.s2e.domains[name].stages[0][0].conv1.alpha.weight.grad.isfinite().all()
    assert model.s2e.domains["speaker"].stages[0][0].conv1.alpha.weight.grad is None


def test_wrong_names_in_a_mixed_batch():
    model = three_domains()
    with pytest.raises(S2EAdapterError, match="no adapter 'nobody'"):
        model(segments(2), adapter_names=["two", "nobody"])
    with pytest.raises(ValueError, match="3 entries, but the batch has 2 rows"):
        model(segments(2), adapter_names=["two"] * 3)


# ---- the names that every PreTrainedModel has --------------------------------------------------------------


def test_all_of_transformers_adapter_methods_are_ours():
    """One that came from transformers would act on PEFT layers, which are not there."""
    from transformers.integrations.peft import PeftAdapterMixin

    theirs = {name for name in vars(PeftAdapterMixin) if not name.startswith("_") and "adapter" in name}
    model = tiny_model()
    inherited = {name for name in theirs if getattr(type(model), name, None) is vars(PeftAdapterMixin)[name]}
    assert not inherited, inherited


@torch.no_grad()
def test_state_dict_of_one_adapter():
    model = tiny_model()
    add_scrambled_adapter(model, "emo")
    tensors = model.get_adapter_state_dict("emo")
    assert {name.split(".")[0] for name in tensors} == {"stem", "stages", "classifier"}
    assert not any("num_batches_tracked" in name or "emo" in name for name in tensors)
    assert torch.equal(tensors["classifier.weight"], model.heads["emo"].weight)


def test_new_adapters_follow_the_models_dtype():
    model = tiny_model().to(torch.bfloat16)
    model.add_adapter("emo", labels=LABELS)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(segments(2).to(torch.bfloat16)).logits.shape == (2, 3)


def test_adapters_are_frozen_until_they_are_trained():
    model = tiny_model()
    model.add_adapter("emo", labels=LABELS)
    assert not any(p.requires_grad for p in model.s2e.domains["emo"].parameters())
    assert not any(p.requires_grad for p in model.heads["emo"].parameters())
    assert not any(m.training for m in model.s2e.domains["emo"].modules() if isinstance(m, nn.BatchNorm2d))


def test_no_more_adapters_than_could_be_loaded_again(monkeypatch):
    model = tiny_model()
    monkeypatch.setattr("hf_s2e.model.adapters_s2e.MAX_DOMAINS", 2)
    model.add_adapter("one", labels=["a"])
    with pytest.raises(S2EAdapterError, match="has 2 domains"):
        model.add_adapter("two", labels=["a"])
    assert set(model.config.domains) == {"speaker", "one"} == set(model.s2e.domains)
