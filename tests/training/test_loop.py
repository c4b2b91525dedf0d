"""The training loop can be trusted: repeatable, nothing frozen moves, and it stops where something is wrong."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from training_tools import AUGMENTED, fresh_accelerator, same_tensors
from transformers import pipeline

from hf_s2e import S2EAdapterError, S2EForAudioClassification, S2EPipeline
from hf_s2e.training.augment import Augment
from hf_s2e.training.checkpoints import TrainingError
from hf_s2e.training.data import SegmentDataset
from hf_s2e.training.loop import train
from hf_s2e.training.methods import METHODS
from hf_s2e.training.predict import predict, run_segments
from hf_s2e.training.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


def recipe(epochs=3, **options) -> Recipe:
    return Recipe(num_train_epochs=epochs, per_device_train_batch_size=5, **options)


# ---- repeatable


@pytest.mark.parametrize("augmentation", [{}, AUGMENTED], ids=["as in the paper", "augmented"])
def test_same_seed_same_run(work, augmentation):
    settings = recipe(2, **augmentation)
    first, losses = work.train(recipe=settings, seed=3)
    second, again = work.train(recipe=settings, seed=3)
    assert losses == again and same_tensors(first, second)
    assert [row["step"] for row in losses] == [7, 14]
    third, other = work.train(recipe=settings, seed=4)
    assert other != losses and not same_tensors(first, third)


def test_the_history_says_what_was_learned_at_which_rate(work):
    settings = recipe(3, lr_drop_epochs=[2, 3])
    rows = work.train(recipe=settings)[1]
    assert [row["learning_rate"] for row in rows] == pytest.approx([1e-2, 1e-3, 1e-4])
    assert all(math.isfinite(row["loss"]) and 0 <= row["accuracy"] <= 1 for row in rows)


def test_it_learns(work):
    """Alpha, batch norm and classifier of a tiny random network fit the toy corpus better than chance."""
    settings = recipe(20, learning_rate=0.1, weight_decay=0.0, lr_drop_epochs=[15])
    rows = work.train(recipe=settings)[1]
    assert rows[-1]["loss"] < 0.75 * rows[0]["loss"]
    assert rows[-1]["accuracy"] > 0.5


def test_alone_is_the_same_as_one_process(work):
    together, losses = work.train(seed=2)
    alone, others = work.train(seed=2, independent=True)
    assert losses == others and same_tensors(together, alone)


def test_alone_or_not_the_last_batches_of_an_epoch_are_learned_from(work):
    """38 segments are 7 batches, so that the last accumulates alone."""
    trained = []
    for alone in (False, True):
        model = work.model()
        accelerator = fresh_accelerator(gradient_accumulation_steps=4)
        train(accelerator, model, work.task(model), recipe(1), seed=1, independent=alone)
        trained.append(model)
    assert same_tensors(*trained)


def test_after_mixed_precision_the_network_answers_in_full(work):
    model = work.model()
    task, plain = work.task(model), work.model()
    accelerator = fresh_accelerator(mixed_precision="bf16")
    train(accelerator, model, task, recipe(1), seed=0)
    plain.load_state_dict(model.state_dict())
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert (predict(model, task, device=CPU) == predict(plain, task, device=CPU)).all()


COMPILED = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from torch._dynamo.utils import counters
from training_tools import Workbench
from hf_s2e.training.recipe import Recipe

work = Workbench(Path(sys.argv[1]))
recipe = Recipe(num_train_epochs=1, per_device_train_batch_size=5)
for seed in range(3):
    work.train(recipe=recipe, seed=seed, independent=True, max_train_steps=2)
    print(counters["stats"]["unique_graphs"])
"""


@pytest.mark.slow
def test_a_second_network_is_not_compiled_anew(tmp_path):
    """Networks trained one after the other share what torch.compile made of the first."""
    environment = os.environ | {"ACCELERATE_DYNAMO_BACKEND": "EAGER", "ACCELERATE_MIXED_PRECISION": "bf16"}
    result = subprocess.run(
        [sys.executable, "-c", COMPILED, str(tmp_path), str(ROOT / "tests"), str(ROOT)],
        env=environment | {"ACCELERATE_USE_CPU": "true"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    graphs = [int(line) for line in result.stdout.split() if line.isdigit()]
    assert len(graphs) == 3 and graphs[0] >= 1
    assert graphs[0] == graphs[1] == graphs[2]


# ---- what is frozen


@pytest.mark.parametrize("method", METHODS)
def test_only_what_the_method_trains_moves(work, method):
    before = work.model(method).state_dict()
    model, _ = work.train(method)
    learned = {name.rsplit(".", 1)[0] for name, p in model.named_parameters() if p.requires_grad}
    for name, tensor in model.state_dict().items():
        moved = not torch.equal(tensor, before[name])
        assert moved == (name.rsplit(".", 1)[0] in learned), name
    statistics = [name for name in before if name.endswith(("running_mean", "running_var"))]
    moving = {name for name in statistics if not torch.equal(model.state_dict()[name], before[name])}
    if METHODS[method].makes_adapter:  # of the two domains in memory only the active one's
        assert moving == {name for name in statistics if ".toy." in name}
    else:
        assert moving == (set() if method == "feature_extractor" else set(statistics))


@pytest.mark.parametrize("name", ["shared", "statistics of another domain"])
def test_a_frozen_tensor_that_moves_is_noticed(work, name):
    model = work.model()
    domain = model.s2e.domains[model.config.base_domain]
    frozen = model.s2e.shared.stem.weight if name == "shared" else domain.stem.bn.running_var

    def tamper(row):
        with torch.no_grad():
            frozen.view(-1)[0] += 1e-6

    with pytest.raises(TrainingError, match="frozen tensor changed"):
        work.train(model=model, on_epoch=tamper)


# ---- what goes wrong


def test_a_learning_rate_that_explodes(work):
    with pytest.raises(TrainingError, match=r"The loss is nan by step .*lower the learning rate"):
        work.train(recipe=recipe(learning_rate=1e38))


@pytest.mark.parametrize("buffer", [False, True], ids=["weights", "batch norm statistics"])
def test_a_last_step_that_spoils_the_network_is_noticed_without_checkpoints(work, buffer):
    model, options = work.model(), {"recipe": recipe(learning_rate=1e38, weight_decay=1e3), "max_train_steps": 1}
    if buffer:

        def spoil(row):
            model.s2e.domains["toy"].stem.bn.running_var.fill_(torch.inf)

        options = {"recipe": recipe(), "max_train_steps": 1, "on_epoch": spoil}
    named = "running_var" if buffer else r"\S+"
    with pytest.raises(TrainingError, match=rf"not finite by step 1 \(\S*{named}; .*lower the learning rate"):
        work.train(model=model, **options)


def test_no_utterances(work):
    model = work.model()
    with pytest.raises(TrainingError, match="nothing to train on"):
        train(fresh_accelerator(), model, work.task(model, []), recipe())


# ---- the loss


def first_loss(work, **options) -> tuple[float, torch.Tensor, torch.Tensor]:
    """The loss of one step over all segments, with the posteriors before it and the labels."""
    settings = Recipe(num_train_epochs=1, per_device_train_batch_size=1000, **options)
    model = work.model(recipe=settings)
    model.s2e.requires_grad_(False)  # so that batch norm, too, answers as at evaluation
    task = work.task(model)
    rows = train(fresh_accelerator(), model, task, settings, seed=0)
    before = work.model(recipe=settings)
    data = SegmentDataset(task.store, task.labels, task.utterances, task.front_end)
    return rows[0]["loss"], torch.cat(run_segments(before, task, device=CPU)), data.labels


def test_label_smoothing_stays_within_the_domain(work):
    loss, log_posteriors, labels = first_loss(work, label_smoothing=0.2)
    assert log_posteriors.shape[1] == 4  # not the speaker domain's five classes, nor both
    right = log_posteriors[torch.arange(len(labels)), labels].mean()
    assert loss == pytest.approx(float(-0.8 * right - 0.2 * log_posteriors.mean()), abs=1e-5)


def test_without_smoothing_it_is_cross_entropy(work):
    loss, log_posteriors, labels = first_loss(work)
    assert loss == pytest.approx(float(F.nll_loss(log_posteriors, labels)), abs=1e-5)


def test_mixup_mixes_targets_as_it_mixes_segments():
    augment = Augment(Recipe(mixup=0.4), seed=0, device=CPU)
    spectrograms = torch.eye(6)[:, :, None].expand(6, 6, 3)  # segment i has only bin i
    mixed, targets = augment.mix(spectrograms, torch.eye(6))
    assert torch.allclose(mixed[:, :, 0], targets)
    assert torch.allclose(targets.sum(dim=1), torch.ones(6))
    assert ((targets > 0.01) & (targets < 0.99)).any()


def test_mixups_share_is_a_beta_variable():
    augment = Augment(Recipe(mixup=0.3), seed=0, device=CPU)
    augment.generator.manual_seed(1)
    mixed, _ = augment.mix(torch.arange(2.0).repeat(10_000)[:, None, None], torch.zeros(20_000, 1))
    share = mixed.flatten()[mixed.flatten().frac() != 0]  # of a 1 with a 0, or of a 0 with a 1
    assert len(share) > 8_000
    assert float(share.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(share.var()) == pytest.approx(0.25 / 1.6, abs=0.01)  # 1 / (4 (2 c + 1))


# ---- results


@pytest.mark.parametrize("method", METHODS)
def test_every_method_makes_a_repo_that_answers(work, tmp_path, method):
    model, _ = work.train(method)
    if METHODS[method].makes_adapter:
        model.save_adapter(tmp_path, "toy")
        config = json.loads((tmp_path / "config.json").read_text())
        assert config["method"] == method
        assert config["use_shared"] is (method != "adapter_only")
    else:
        model.save_pretrained(tmp_path)
    expected = predict(model, work.task(model), device=CPU)
    again = S2EForAudioClassification.from_pretrained(tmp_path)
    assert [again.config.id2label[i] for i in range(4)] == work.labels
    found = predict(again, work.task(again), device=CPU)
    assert abs(found - expected).max() < 1e-5
    classify = pipeline("audio-classification", model=str(tmp_path), pipeline_class=S2EPipeline, device="cpu")
    answer = classify(work.corpus[7]["audio"]["path"])
    assert {a["label"]: a["score"] for a in answer} == pytest.approx(
        dict(zip(work.labels, expected[7].tolist())), abs=1e-4
    )


def test_an_adapter_of_a_changed_base_cannot_be_saved(work, tmp_path):
    model = work.model()
    with torch.no_grad():
        model.s2e.shared.stem.weight += 1
    with pytest.raises(S2EAdapterError, match="changed since"):
        model.save_adapter(tmp_path, "toy")
