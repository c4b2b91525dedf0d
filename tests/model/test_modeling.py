"""The network: its counts, its numbers against a literal implementation, and what a batch may not change."""

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import LABELS, SHAPE, add_scrambled_adapter, segments, tiny_config, tiny_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hf_s2e import S2EAdapterError, S2EConfig, S2EForAudioClassification, S2EModel
from hf_s2e.model.adapter_layers_s2e import S2EAlpha, S2EDomainConv, adapted_conv
from hf_s2e.model.modeling_s2e import pool

# ---- counts of the paper's network -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        ({"adapters": False, "num_labels": 4}, 1_360_548),
        ({"adapters": False, "num_labels": 8}, 1_361_576),
        ({"adapters": False, "num_labels": 50}, 1_372_370),
        ({"num_labels": 4}, 1_511_076),
        ({"num_labels": 8}, 1_512_104),
        ({"num_labels": 50}, 1_522_898),
        ({"num_labels": 4, "adapt_stem": True}, 1_511_076 + 32),
        ({"adapters": False, "num_labels": 4, "shortcut": "projection"}, 1_404_452),
        ({"num_labels": 4, "shortcut": "projection"}, 1_554_980),
    ],
)
def test_parameters(options, parameters):
    with torch.device("meta"):
        model = S2EForAudioClassification(S2EConfig(**options))
    assert model.num_parameters() == parameters


def test_parameters_by_part():
    with torch.device("meta"):
        model = S2EForAudioClassification(S2EConfig(num_labels=4))
    shared, domain = model.s2e.shared, model.s2e.domains["speaker"]

    def count(module, kind):
        return sum(p.numel() for m in module.modules() if isinstance(m, kind) for p in m.parameters())

    assert sum(p.numel() for p in shared.parameters()) == 1_356_320
    assert sum(m.weight.numel() for m in shared.modules() if getattr(m, "kernel_size", 0) == (3, 3)) == 1_354_752
    assert count(domain, S2EAlpha) == 150_528 == 1_354_752 // 9
    assert count(domain, nn.BatchNorm2d) == 3_200
    assert sum(p.numel() for m in (domain, model.heads["speaker"]) for p in m.parameters()) == 154_756


def macs(model: nn.Module, *inputs) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs)
    return counter.get_total_flops() // 2  # a multiplication and an addition


class TwoBranches(nn.Module):
    """The paper's network with its adapters as Fig. 2 draws them: two convolutions, then their sum."""

    def __init__(self, model: S2EForAudioClassification):
        super().__init__()
        self.model = model

    def forward(self, x):
        shared, domain = self.model.s2e.shared, self.model.s2e.domains[self.model.config.active_domain]

        def conv(x, w, d):
            y = F.conv2d(x, w.weight, stride=w.stride, padding=w.padding)
            if d.alpha is not None:
                y = y + F.conv2d(x, d.alpha.weight, stride=w.stride)
            return d.bn(y)

        x = F.max_pool2d(F.relu(conv(x[:, None], shared.stem, domain.stem)), 3, 2, 1)
        for block, d in zip((b for s in shared.stages for b in s), (b for s in domain.stages for b in s)):
            y = F.relu(conv(x, block.conv1, d.conv1))
            x = F.relu(conv(y, block.conv2, d.conv2) + block.shortcut(x, d))
        return self.model.heads[self.model.config.active_domain](x.mean(dim=(2, 3)))


def test_multiplications_of_a_2_s_piece():
    piece = torch.zeros(1, 400, 200)
    plain = S2EForAudioClassification(S2EConfig(adapters=False, num_labels=4)).eval()
    adapted = S2EForAudioClassification(S2EConfig(num_labels=4)).eval()
    assert macs(plain, piece) == 3_170_407_424
    assert macs(adapted, piece) == 3_170_407_424  # alpha is added to the filters, not applied beside them
    assert macs(adapted.fuse(), piece) == 3_170_407_424
    assert macs(TwoBranches(adapted), piece) == 3_508_737_024


def test_sizes_of_table_1():
    sizes = []
    model = S2EModel(S2EConfig()).eval()
    for stage in model.shared.stages:
        stage[-1].register_forward_hook(lambda m, i, out: sizes.append(tuple(out.shape[1:])))
    model.shared.stages[0][0].register_forward_hook(lambda m, i, out: sizes.append(tuple(out.shape[1:])))
    with torch.no_grad():
        output = model(torch.zeros(1, 400, 200))
    assert sizes == [(32, 200, 100), (64, 100, 50), (128, 50, 25), (256, 25, 13)]
    assert output.embeddings.shape == (1, 256) and output.segment_embeddings.shape == (1, 1, 256)


# ---- equations (1) to (3), one multiplication at a time ----------------------------------------------------


def literal_conv(x, weight, stride, padding):
    """(in, h, w), (out, in, k, k) -> (out, h', w')"""
    channels_out, channels_in, size, _ = weight.shape
    height = (x.shape[1] + 2 * padding - size) // stride + 1
    width = (x.shape[2] + 2 * padding - size) // stride + 1
    y = np.zeros((channels_out, height, width))
    for o in range(channels_out):
        for i in range(height):
            for j in range(width):
                for c in range(channels_in):
                    for a in range(size):
                        for b in range(size):
                            row, column = i * stride + a - padding, j * stride + b - padding
                            if 0 <= row < x.shape[1] and 0 <= column < x.shape[2]:
                                y[o, i, j] += weight[o, c, a, b] * x[c, row, column]
    return y


def literal_pool(x, size, stride, padding, reduce):
    """Pools what of each window lies inside; one begins at every stride, however little is left."""
    height, width = -(-x.shape[1] // stride), -(-x.shape[2] // stride)
    y = np.zeros((x.shape[0], height, width))
    for c in range(x.shape[0]):
        for i in range(height):
            for j in range(width):
                top, left = i * stride - padding, j * stride - padding
                y[c, i, j] = reduce(x[c, max(0, top) : top + size, max(0, left) : left + size])
    return y


def literal_batch_norm(x, bn):
    mean, var, gamma, beta = (
        t.detach().double().numpy()[:, None, None] for t in (bn.running_mean, bn.running_var, bn.weight, bn.bias)
    )
    return gamma * (x - mean) / np.sqrt(var + bn.eps) + beta


def literal_network(model: S2EForAudioClassification, spectrogram: np.ndarray, name: str) -> np.ndarray:
    """Posterior of one segment (bins, frames), in float64 numpy."""
    shared, domain = model.s2e.shared, model.s2e.domains[name]
    use_3x3 = model.config.domains[name].get("use_shared", True)

    def adapted(x, w, d):  # BN_d(w * x + alpha_d * x)
        stride, padding = w.stride[0], w.padding[0]
        y = 0.0
        if use_3x3 or d.alpha is None or w is shared.stem:
            y = literal_conv(x, w.weight.detach().double().numpy(), stride, padding)
        if d.alpha is not None:
            y = y + literal_conv(x, d.alpha.weight.detach().double().numpy(), stride, 0)
        return literal_batch_norm(y, d.bn)

    def shortcut(x, block, d):
        if block.projection is not None:
            return adapted(x, block.projection, d.projection)
        if block.conv2.stride[0] == 1:
            return x
        pooled = literal_pool(x, 2, 2, 0, np.mean)
        return np.concatenate([pooled, np.zeros_like(pooled)])

    x = np.maximum(adapted(spectrogram[None], shared.stem, domain.stem), 0)
    x = literal_pool(x, 3, 2, 1, np.max)
    for stage, stage_domain in zip(shared.stages, domain.stages):
        for block, d in zip(stage, stage_domain):
            y = np.maximum(adapted(x, block.conv1, d.conv1), 0)
            x = np.maximum(adapted(y, block.conv2, d.conv2) + shortcut(x, block, d), 0)
    features = x.mean(axis=(1, 2))
    if model.config.domains[name].get("pooling") == "mean_std":
        features = np.concatenate([features, np.sqrt(np.maximum(x.var(axis=(1, 2)), 1e-8))])
    head = model.heads[name]
    scores = head.weight.detach().double().numpy() @ features + head.bias.detach().double().numpy()
    exponentials = np.exp(scores - scores.max())
    return exponentials / exponentials.sum()


@pytest.mark.parametrize(
    ("options", "adapter"),
    [
        ({}, {}),
        ({}, {"init": "source", "use_shared": False}),
        ({}, {"pooling": "mean_std"}),
        ({"shortcut": "projection"}, {}),
        ({"adapt_stem": True}, {}),
        ({"adapt_stem": True, "shortcut": "projection"}, {"init": "source", "use_shared": False}),
        ({"adapters": False}, None),
        ({"adapters": False, "shortcut": "projection"}, None),
    ],
)
def test_network_is_the_equations(options, adapter):
    model = tiny_model(**options)
    if adapter is not None:
        add_scrambled_adapter(model, "emo", **adapter)
    x = segments(1)
    with torch.no_grad():
        posterior = model(x).logits.exp()[0].numpy()
    expected = literal_network(model, x[0].double().numpy(), model.config.active_domain)
    np.testing.assert_allclose(posterior, expected, atol=1e-5)
    assert expected.max() < 0.999  # a saturated posterior would show nothing


# ---- utterances and batches --------------------------------------------------------------------------------


@torch.no_grad()
def test_posterior_of_an_utterance_is_the_mean():
    model, x = tiny_model(), segments(1, 4)
    output = model(x)
    by_hand = sum(model(x[:, i]).logits.exp() for i in range(4)) / 4
    torch.testing.assert_close(output.logits.exp(), by_hand, atol=1e-6, rtol=0)
    torch.testing.assert_close(output.logits.softmax(-1), by_hand, atol=1e-6, rtol=0)
    torch.testing.assert_close(output.segment_logits.softmax(-1).mean(1), by_hand, atol=1e-6, rtol=0)
    torch.testing.assert_close(output.embeddings, model.s2e(x).embeddings)


@torch.no_grad()
@pytest.mark.parametrize("aggregation", ["geometric", "max"])
def test_other_aggregations(aggregation):
    model, x = tiny_model(aggregation=aggregation), segments(1, 4)
    posteriors = torch.cat([tiny_model()(x[:, i]).logits.exp() for i in range(4)])
    expected = posteriors.log().mean(0).exp() if aggregation == "geometric" else posteriors.amax(0)
    torch.testing.assert_close(model(x).logits[0].exp(), expected / expected.sum(), atol=1e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("aggregation", ["mean", "geometric", "max"])
@pytest.mark.parametrize("rubbish", [0.0, 1e4, float("nan")])
def test_neighbours_and_padding_change_nothing(aggregation, rubbish):
    model, lengths = tiny_model(aggregation=aggregation), [3, 1, 5]
    utterances = [segments(n, seed=n) for n in lengths]
    batch = torch.full((3, 5, *SHAPE), rubbish)
    mask = torch.zeros(3, 5, dtype=torch.long)
    for row, utterance in enumerate(utterances):
        batch[row, : len(utterance)], mask[row, : len(utterance)] = utterance, 1
    together = model(batch, mask)
    for row, utterance in enumerate(utterances):
        alone = model(utterance[None])
        torch.testing.assert_close(together.logits[row], alone.logits[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(together.embeddings[row], alone.embeddings[0], atol=1e-5, rtol=1e-5)
        assert together.segment_logits[row, len(utterance) :].abs().sum() == 0


@torch.no_grad()
def test_long_utterances_do_not_underflow():
    model = tiny_model()
    for parameter in model.heads["speaker"].parameters():
        parameter.mul_(200)  # posteriors of exactly 0 and 1 in float32
    logits = model(segments(1, 50)).logits
    assert torch.isfinite(logits).all()
    torch.testing.assert_close(logits.logsumexp(-1), torch.zeros(1), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("values", "mask", "says"),
    [
        (torch.zeros(2, 400, 200), None, r"expected \(batch, segments, 20, 16\)"),
        (torch.zeros(20, 16), None, "input_values has shape"),
        (segments(2, 3), torch.ones(2, 2), r"attention_mask has shape \(2, 2\)"),
        (segments(2, 3), torch.tensor([[1, 1, 1], [0, 0, 0]]), "at least one"),
    ],
)
def test_wrong_shapes_are_refused(values, mask, says):
    for model in (tiny_model(), tiny_model().s2e):
        with pytest.raises(ValueError, match=says):
            model(values, mask)


# ---- loss --------------------------------------------------------------------------------------------------


def test_loss_is_cross_entropy_of_the_posterior():
    model, x = tiny_model(), segments(4, 2)
    labels = torch.tensor([0, 4, -100, 2])
    output = model(x, labels=labels)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, labels))
    assert output.to_tuple()[0] is output.loss
    assert model(x, labels=labels, return_dict=False)[0] == output.loss
    model.config.return_dict = False
    assert model(x, labels=labels)[0] == output.loss and model.s2e(x)[0].shape == output.embeddings.shape
    with pytest.raises(ValueError, match="row 1 is 5, but its domain has 5 classes"):
        model(x, labels=torch.tensor([0, 5, 0, 0]))


def test_a_training_step_lowers_the_loss():
    model = tiny_model().train()
    x, labels = segments(8), torch.arange(8) % 5
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = model(x, labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.grad is not None for p in model.parameters())


def test_channels_are_last_from_the_first_convolution_on():
    """Also of what the feature extractor makes; channels first, inference takes 1.4 times as long."""
    model, seen = tiny_model(), []
    model.s2e.shared.stages[0][0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    for x in (segments(2), segments(2).mT.contiguous().mT):
        model(x)
        assert seen[-1].stride(1) == 1


def test_the_deviation_of_a_constant_channel_has_a_gradient_in_half_precision():
    features = torch.zeros(1, 4, 3, 2, dtype=torch.float16, requires_grad=True)
    pooled = pool(features, "mean_std")
    pooled.sum().backward()
    assert pooled.dtype == torch.float16 and features.grad.isfinite().all()


# ---- the convolution with frozen filters -------------------------------------------------------------------


def convolution(seed: int, stride: int, size: int, dtype) -> tuple[nn.Conv2d, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shared = nn.Conv2d(3, 2, size, stride=stride, padding=size // 2, bias=False, dtype=dtype)
    shared.requires_grad_(False)
    alpha = torch.randn(2, 3, 1, 1, generator=generator, dtype=dtype, requires_grad=True)
    x = torch.randn(1, 3, 5, 4, generator=generator, dtype=dtype, requires_grad=True)
    return shared, alpha, x


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [3, 7])
def test_frozen_filters_give_the_two_branches_gradients(stride, size):
    """A hand-written backward pass: it must be the one of w * x + alpha * x, to float64's precision."""
    shared, alpha, x = convolution(0, stride, size, torch.float64)
    output = adapted_conv(x, shared, alpha, use_shared=True)
    literal = F.conv2d(x, shared.weight, stride=stride, padding=size // 2) + F.conv2d(x, alpha, stride=stride)
    torch.testing.assert_close(output, literal)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours = torch.autograd.grad((output * weights).sum(), [x, alpha])
    expected = torch.autograd.grad((literal * weights).sum(), [x, alpha])
    torch.testing.assert_close(ours, expected)
    assert torch.autograd.gradcheck(lambda x, a: adapted_conv(x, shared, a, True), (x, alpha))


def test_unfrozen_filters_learn_too():
    shared, alpha, x = convolution(0, 2, 3, torch.float64)
    shared.requires_grad_(True)
    literal = F.conv2d(x, shared.weight, stride=2, padding=1) + F.conv2d(x, alpha, stride=2)
    wanted = [x, alpha, shared.weight]
    ours = torch.autograd.grad(adapted_conv(x, shared, alpha, True).square().sum(), wanted)
    torch.testing.assert_close(ours, torch.autograd.grad(literal.square().sum(), wanted))


def frozen_step(model, x, labels, **context) -> dict[str, torch.Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=context.get("autocast", False)):
        loss = model(x, labels=labels).loss
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def adapter_in_training(**options):
    model = tiny_model()
    add_scrambled_adapter(model, "emo", **options)
    model.train_adapter("emo")
    return model


def test_bf16_autocast_gives_about_the_same_gradients():
    model, x, labels = adapter_in_training(), segments(6), torch.arange(6) % 3
    exact, rough = frozen_step(model, x, labels), frozen_step(model, x, labels, autocast=True)
    assert set(exact) == set(rough)
    assert all(gradient.dtype == torch.float32 for gradient in rough.values())
    exact, rough = (torch.cat([g.flatten() for g in gradients.values()]) for gradients in (exact, rough))
    assert (rough - exact).norm() < 0.3 * exact.norm()  # batch norm of few numbers; a wrong branch gives over 1


@pytest.mark.slow
def test_a_compiled_training_step_is_the_eager_one():
    model, x, labels = adapter_in_training(), segments(4), torch.arange(4) % 3
    eager = frozen_step(copy.deepcopy(model), x, labels)
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager")  # traces without a C++ compiler
    gradients = frozen_step(compiled, x, labels)
    for name, gradient in eager.items():
        torch.testing.assert_close(gradients[f"_orig_mod.{name}"], gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("why", ["nothing below learns", "filters learn", "input wants a gradient", "evaluation"])
def test_pooling_before_the_scale_is_pooling_after_it(why):
    """Also where scales are negative: there the pooled value is that of the smallest input."""
    model = adapter_in_training().double()
    stem, filters = model.s2e.domains["emo"].stem, model.s2e.shared.stem
    with torch.no_grad():
        stem.bn.weight.copy_(torch.tensor([-1.5, 0.7]))
    stem.train(why != "evaluation")
    filters.requires_grad_(why == "filters learn")
    x = segments(3).double().unsqueeze(1).requires_grad_(why == "input wants a gradient")
    literal = S2EDomainConv(model.config, filters, None).double()
    literal.load_state_dict(stem.state_dict())
    literal.train(stem.training)
    ours, expected = stem(x, filters), F.max_pool2d(F.relu(literal(x, filters)), 3, stride=2, padding=1)
    torch.testing.assert_close(F.relu(ours), expected)
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    below = {"filters learn": [filters.weight], "input wants a gradient": [x]}.get(why, [])
    found = torch.autograd.grad((F.relu(ours) * weights).sum(), [*stem.parameters(), *below])
    wanted = torch.autograd.grad((expected * weights).sum(), [*literal.parameters(), *below])
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(stem.state_dict(), literal.state_dict())  # statistics and their count


# ---- fusing ------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    ("options", "adapter"),
    [
        ({}, {}),
        ({}, {"init": "source", "use_shared": False}),
        ({}, {"pooling": "mean_std"}),
        ({"shortcut": "projection"}, {}),
        ({"adapt_stem": True, "shortcut": "projection"}, {"init": "source", "use_shared": False}),
    ],
)
def test_fused_is_unfused(options, adapter, tmp_path):
    model, x = tiny_model(**options), segments(3, 4)
    add_scrambled_adapter(model, "emo", **adapter)
    fused = model.fuse("emo")
    expected = model(x).logits
    torch.testing.assert_close(fused(x).logits, expected, atol=1e-4, rtol=0)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    assert fused.config.fused and not fused.config.adapters and fused.config.labels_of("emo") == LABELS
    fused.save_pretrained(tmp_path)
    for cls, output in ((S2EForAudioClassification, "logits"), (S2EModel, "embeddings")):
        again = cls.from_pretrained(tmp_path)
        torch.testing.assert_close(again(x)[output], model(x)[output], atol=1e-4, rtol=1e-4)
    assert again.config.id2label == dict(enumerate(LABELS))


@torch.no_grad()
def test_the_base_and_a_plain_network_fuse_too():
    for options in ({}, {"adapters": False}):
        model, x = tiny_model(**options), segments(3)
        torch.testing.assert_close(model.fuse()(x).logits, model(x).logits, atol=1e-4, rtol=0)


@torch.no_grad()
def test_the_papers_network_fuses():
    torch.manual_seed(0)
    model, x = S2EForAudioClassification(S2EConfig(num_labels=4)).eval(), torch.rand(2, 400, 200)
    torch.testing.assert_close(model.fuse()(x).logits, model(x).logits, atol=1e-4, rtol=0)


# ---- as a module and as a PreTrainedModel ------------------------------------------------------------------


@torch.no_grad()
def test_copies_answer_alike():
    model, x = tiny_model(), segments(2)
    add_scrambled_adapter(model, "emo")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x).logits, model(x).logits) and twin.active_adapters() == ["emo"]
        assert twin.base_fingerprint == model.base_fingerprint
        twin.disable_adapters()
    assert model.active_adapters() == ["emo"]


def test_initial_weights_follow_the_seed_and_pass_a_signal():
    torch.manual_seed(3)
    one = S2EForAudioClassification(tiny_config())
    torch.manual_seed(3)
    two = S2EForAudioClassification(tiny_config())
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values()))
    assert one.s2e.domains["speaker"].stages[0][0].conv1.alpha.weight.abs().max() > 0.1
    assert one.train()(segments(4)).embeddings.std() > 1e-2


@torch.no_grad()
def test_the_network_without_classifiers_reads_the_same_file(tmp_path):
    model, x = tiny_model(), segments(2, 3)
    model.save_pretrained(tmp_path)
    bare, info = S2EModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(bare(x).embeddings, model(x).embeddings)
    bare.save_pretrained(tmp_path / "bare")
    with pytest.raises(S2EAdapterError, match=r"missing tensors heads\.speaker\.bias, heads\.speaker\.weight"):
        S2EForAudioClassification.from_pretrained(tmp_path / "bare")
    again = S2EForAudioClassification.from_pretrained(tmp_path / "bare", ignore_mismatched_sizes=True)  # a new one
    assert torch.equal(again(x).embeddings, model(x).embeddings)


@torch.no_grad()
def test_new_labels_for_a_base(tmp_path):
    model, x = tiny_model(), segments(2)
    model.save_pretrained(tmp_path)
    names = dict(enumerate("abcdefg"))
    changed = S2EForAudioClassification.from_pretrained(
        tmp_path, id2label=names, label2id={v: k for k, v in names.items()}, ignore_mismatched_sizes=True
    )
    assert changed(x).logits.shape == (2, 7) and changed.config.id2label[6] == "g"
    assert torch.equal(changed(x).embeddings, model(x).embeddings)
    assert S2EForAudioClassification.from_pretrained(
        tmp_path, num_labels=2, ignore_mismatched_sizes=True
    ).config.labels_of("speaker") == ["LABEL_0", "LABEL_1"]


@pytest.mark.parametrize("dtype", ["auto", None, torch.float16, "bfloat16"])
def test_dtypes(dtype, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    loaded = S2EForAudioClassification.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.dtype == {torch.float16: torch.float16, "bfloat16": torch.bfloat16}.get(dtype, torch.float32)
    assert loaded.base_fingerprint == model.base_fingerprint  # that of the base as it is stored
    half = loaded.to(torch.bfloat16)
    logits = half(segments(2).to(torch.bfloat16)).logits
    assert logits.dtype == torch.float32 and (logits.exp() - model(segments(2)).logits.exp()).abs().max() < 0.1


def test_pickled_weights_are_never_read(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    for options in ({}, {"use_safetensors": False}):
        with pytest.raises(OSError, match="safetensors"):
            S2EForAudioClassification.from_pretrained(tmp_path, **options)
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "model.safetensors")
    with pytest.raises(S2EAdapterError, match="not a whole safetensors file"):
        S2EForAudioClassification.from_pretrained(tmp_path)
