"""Prediction over whole utterances."""

from collections.abc import Sequence

import numpy as np
import torch

from ..model.modeling_s2e import S2EForAudioClassification, aggregate_segments
from .data import Features, SegmentDataset, Task, segment_loader
from .recipe import Recipe


def predict(model: S2EForAudioClassification, task: Task, **options) -> np.ndarray:
    """Posteriors of whole utterances by the active domain: float32 (utterances of the task, classes).

    Args:
        **options: as of `run_segments`.
    """
    whole = []
    for log_posteriors in run_segments(model, task, **options):
        mask = torch.ones(1, len(log_posteriors), dtype=torch.bool)
        whole.append(aggregate_segments(log_posteriors, mask, model.config.aggregation))
    return torch.cat(whole).exp().numpy()


@torch.inference_mode()
def run_segments(
    model: S2EForAudioClassification,
    task: Task,
    *,
    device: torch.device,
    batch_size: int = 64,
    progress: bool = False,
    output: str = "logits",
    speeds: Sequence[float] = (1.0,),
) -> tuple[torch.Tensor, ...]:
    """What the network says of each segment: one float32 (segments, width) for each utterance of the task.

    Args:
        batch_size: segments at a time, across utterances.
        output: "logits" (log posteriors) or "embeddings".
        speeds: each utterance is played at; all of them at the first speed come first.
    """
    from tqdm import tqdm

    model.to(device).eval()
    data = SegmentDataset(task.store, task.labels, task.utterances, task.front_end, speeds=speeds)
    spectrograms = Features(task, Recipe(), device)
    rows = []
    loader = segment_loader(data, device, batch_size=batch_size)
    for batch in tqdm(loader, desc="recognising", unit="batch", disable=not progress):
        inputs = spectrograms(batch["utterance"], batch["start"], waves=batch.get("waves"), speeds=batch["speed"])
        rows.append(model(input_values=inputs)[output].float().cpu())
    return torch.cat(rows).split(data.counts.tolist())
