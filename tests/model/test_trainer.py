"""transformers' own Trainer: it divides, pads and predicts as with any other model."""

import numpy as np
import pytest
import torch
from tiny import FRONT_END, LABELS, tiny_model
from transformers import Trainer, TrainingArguments

from hf_s2e import S2EFeatureExtractor

pytestmark = pytest.mark.usefixtures("one_thread")
EXTRACTOR = S2EFeatureExtractor(**FRONT_END)


@pytest.fixture
def model():
    model = tiny_model()
    model.add_adapter("emo", labels=LABELS)
    model.train_adapter("emo")
    return model


def utterances(*lengths: int) -> list[dict]:
    """What a `datasets.map` of the feature extractor leaves of each utterance."""
    rows = []
    for seed, samples in enumerate(lengths):
        wave = np.random.default_rng(seed).standard_normal(samples).astype(np.float32)
        inputs = EXTRACTOR(wave, sampling_rate=EXTRACTOR.sampling_rate)
        rows.append({name: values[0] for name, values in inputs.items()} | {"labels": seed % len(LABELS)})
    return rows


def trainer(model, folder, rows, **options):
    flags = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "optim": "sgd", "learning_rate": 0.1}
    metrics = options.pop("compute_metrics", None)
    flags |= {"remove_unused_columns": False, "num_train_epochs": 1, "save_strategy": "no", **options}
    arguments = TrainingArguments(folder, **flags)
    given = {"train_dataset": rows, "eval_dataset": rows, "processing_class": EXTRACTOR}
    return Trainer(model, arguments, **given, compute_metrics=metrics)


def test_what_cannot_be_padded_is_named():
    rows = utterances(160, 400)
    assert EXTRACTOR.pad(rows, return_tensors="pt")["input_values"].shape[:2] == (2, 4)
    with pytest.raises(ValueError, match="Column 'path' holds no numbers"):
        EXTRACTOR.pad([row | {"path": "a.wav"} for row in rows])
    with pytest.raises(ValueError, match="nothing to pad"):
        EXTRACTOR.pad([])
    with pytest.raises(ValueError, match="in no other way"):
        EXTRACTOR.pad(rows, padding="max_length", max_length=9)


def test_accumulated_batches_make_the_step_of_one_batch(model, tmp_path):
    model.train_adapter("emo", parts=("alpha", "fc"))  # the statistics of a batch are not those of its parts
    rows, before = utterances(*[160] * 8), {name: p.clone() for name, p in model.named_parameters()}
    steps = []
    for size in (8, 2):
        model.load_state_dict(before, strict=False)
        flags = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
        trainer(model, tmp_path, rows, **flags, max_steps=1).train()
        steps.append(torch.cat([(p - before[name]).detach().flatten() for name, p in model.named_parameters()]))
    assert steps[0].abs().max() > 1e-3
    torch.testing.assert_close(steps[0], steps[1], rtol=1e-3, atol=1e-6)


def test_utterances_of_different_lengths_are_padded_and_predictions_are_the_logits(model, tmp_path):
    rows = utterances(100, 400, 160, 900)
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction.predictions)
        return {"wa": float((prediction.predictions.argmax(axis=-1) == prediction.label_ids).mean())}

    train = trainer(model, tmp_path, rows, compute_metrics=compute_metrics, per_device_eval_batch_size=4)
    assert train.train().training_loss > 0
    assert 0 <= train.evaluate()["eval_wa"] <= 1
    assert seen[0].shape == (4, len(LABELS))
    model.eval()
    for row, logits in zip(rows, seen[0]):
        alone = model(**{name: torch.as_tensor(row[name])[None] for name in EXTRACTOR.model_input_names}).logits
        np.testing.assert_allclose(logits, alone[0].detach().numpy(), atol=1e-5)
