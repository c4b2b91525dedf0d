"""A network and a front end so small that a test can afford hundreds of them."""

import torch
from torch import nn

from hf_s2e import S2EConfig, S2EForAudioClassification
from hf_s2e.model.adapter_layers_s2e import S2EAlpha

LABELS = ["neutral", "angry", "sad"]
FRONT_END = {  # 20 bins and 16 frames a segment: 10x8, 5x4, 3x2, which needs ceil_mode as the paper's 25 do
    "window_length": 40,
    "hop_length": 10,
    "n_fft": 64,
    "num_bins": 20,
    "segment_length": 160,
    "segment_hop": 80,
}
SHAPE = (FRONT_END["num_bins"], FRONT_END["segment_length"] // FRONT_END["hop_length"])  # bins, frames


def tiny_config(**options) -> S2EConfig:
    sizes = {"hidden_sizes": [2, 4], "depths": [2, 1], "stem_kernel_size": 3}
    if not {"domains", "id2label", "num_labels"} & set(options):
        options["num_labels"] = 5
    return S2EConfig(**(FRONT_END | sizes | options))


def tiny_model(seed: int = 0, **options) -> S2EForAudioClassification:
    """A model in evaluation mode, in which no weight, and no statistic of a batch norm, is trivial."""
    torch.manual_seed(seed)
    model = S2EForAudioClassification(tiny_config(**options))
    scramble(model)
    return model.eval()


@torch.no_grad()
def scramble(module: nn.Module) -> None:
    """Random weights and batch-norm statistics everywhere."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(std=0.3)
            part.running_var.uniform_(0.5, 2)
            part.weight.uniform_(0.5, 2)
            part.bias.normal_(std=0.3)
        elif isinstance(part, (nn.Conv2d, nn.Linear, S2EAlpha)):
            for parameter in part.parameters():
                parameter.normal_(std=0.4)


def add_scrambled_adapter(model, name: str, labels=LABELS, **options) -> None:
    """An adapter in which no tensor is as add_adapter made it."""
    model.add_adapter(name, labels=labels, **options)
    scramble(model.s2e.domains[name])
    scramble(model.heads[name])


def segments(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random spectrograms (*shape, bins, frames)."""
    return torch.rand(*shape, *SHAPE, generator=torch.Generator().manual_seed(seed))
