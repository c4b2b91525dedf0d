"""Recipes: how a network is trained. The defaults are the paper's for emotion corpora (section IV-B)."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

SCHEDULES = ("step", "cosine")


@dataclass
class Recipe:
    """Optimiser, schedule and augmentation.

    The paper fixes SGD with Nesterov momentum 0.9, 30 epochs, learning rate 0.01 divided by 10 at the 11th
    and 21st epoch and cross entropy for emotion corpora; the rest is off by default.
    """

    num_train_epochs: int = 30
    per_device_train_batch_size: int = 32
    learning_rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-3
    lr_scheduler_type: str = "step"
    # epochs (counted from 1) that begin with a ten times smaller learning rate
    lr_drop_epochs: list[int] = field(default_factory=lambda: [11, 21])
    warmup_epochs: float = 0.0
    # alpha, batch norm and classifier may have their own; None is the common value
    alpha_learning_rate: float | None = None
    bn_learning_rate: float | None = None
    fc_learning_rate: float | None = None
    alpha_weight_decay: float | None = None
    bn_weight_decay: float | None = None
    fc_weight_decay: float | None = None
    label_smoothing: float = 0.0
    balance_classes: bool = False
    random_crop: bool = False
    # widest band (bins of 10 Hz) and stretch (frames of 10 ms) that SpecAugment hides, and how many of each
    freq_mask: int = 0
    time_mask: int = 0
    num_masks: int = 1
    # 0.1: each segment is played at a speed between 0.9 and 1.1
    speed_perturbation: float = 0.0
    # white noise at a signal-to-noise ratio between this many dB and 20 dB more; None is no noise
    noise_snr: float | None = None
    # spectral tilt and ripple of up to this many dB: another microphone, another room
    channel_db: float = 0.0
    mixup: float = 0.0
    # where alpha starts; None is the method's own: "zero" for residual_adapter, "source" for adapter_only
    adapter_init: str | None = None
    pooling: str = "mean"

    def __post_init__(self):
        if self.lr_scheduler_type not in SCHEDULES:
            raise ValueError(f"lr_scheduler_type is {self.lr_scheduler_type!r}, but must be one of {SCHEDULES}.")
        if self.num_train_epochs < 1 or self.per_device_train_batch_size < 1:
            raise ValueError("num_train_epochs and per_device_train_batch_size must be at least 1.")


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The settings of a YAML recipe.

    Raises:
        ValueError: no settings, or one that no recipe has; the message lists those there are.
    """
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not a YAML file ({error}).") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds no settings; expected lines like `learning_rate: 0.01`.")
    known = {setting.name for setting in fields(Recipe)}
    if unknown := set(values) - known:
        raise ValueError(f"{path}: unknown settings {sorted(unknown)}; known are {sorted(known)}.")
    return values


def part_of(name: str) -> str:
    """Which part of a domain a parameter is: "alpha", "bn", "fc", or "shared" for the common filters."""
    if name.startswith("heads."):
        return "fc"
    return "alpha" if ".alpha." in name else "bn" if ".bn." in name else "shared"


def make_optimizer(model: torch.nn.Module, recipe: Recipe) -> torch.optim.SGD:
    """SGD over what is trained, one parameter group for each part (alpha, bn, fc, shared)."""
    groups: dict[str, list] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(part_of(name), []).append(parameter)
    return torch.optim.SGD(
        [
            {
                "params": parameters,
                "part": part,
                "lr": _first(getattr(recipe, f"{part}_learning_rate", None), recipe.learning_rate),
                "weight_decay": _first(getattr(recipe, f"{part}_weight_decay", None), recipe.weight_decay),
            }
            for part, parameters in groups.items()
        ],
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        nesterov=True,
        fused=next(model.parameters()).device.type == "cuda",
    )


def _first(*values):
    return next(value for value in values if value is not None)


def make_scheduler(optimizer: torch.optim.Optimizer, recipe: Recipe, steps_per_epoch: int) -> LambdaLR:
    """The learning rate's factor, stepped once per optimiser step."""
    warmup, total = recipe.warmup_epochs * steps_per_epoch, recipe.num_train_epochs * steps_per_epoch

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if recipe.lr_scheduler_type == "step":
            epoch = step // steps_per_epoch + 1
            return 0.1 ** sum(epoch >= drop for drop in recipe.lr_drop_epochs)
        progress = min(1.0, (step - warmup) / max(1, total - warmup))
        return 0.5 * (1 + torch.cos(torch.tensor(torch.pi * progress)).item())

    return LambdaLR(optimizer, factor)
