"""Recipes: how a network is trained. The defaults are the paper's for emotion corpora (section IV-B)."""

import contextlib
import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

import torch
from torch.optim.lr_scheduler import LambdaLR

from ..model.adapter_layers_s2e import part_of
from ..model.configuration_s2e import ADAPT_FROM, HEADS, POOLINGS

SCHEDULES = ("step", "cosine")
HEAD_STARTS = ("random", "probe")
BN_STATISTICS = ("batch", "source")
OPTIMIZERS = ("sgd", "adamw")
_NOT_NEGATIVE = ("0 or more", lambda value: value >= 0)
_FROM_ONE = ("1 or more", lambda value: value >= 1)
_RANGES = {  # of the numbers that are not just 0 or more
    "num_train_epochs": _FROM_ONE,
    "per_device_train_batch_size": _FROM_ONE,
    "momentum": ("between 0 and 1", lambda value: 0 < value < 1),  # Nesterov's takes none of the ends
    "label_smoothing": ("from 0 to 1", lambda value: 0 <= value <= 1),
    "speed_perturbation": ("0 or more and less than 1", lambda value: 0 <= value < 1),
    "dropout": ("0 or more and less than 1", lambda value: 0 <= value < 1),
    "noise_snr": ("of any size", lambda value: True),
}
_CHOICES = {
    "lr_scheduler_type": SCHEDULES,
    "pooling": POOLINGS,
    "optimizer": OPTIMIZERS,
    "head": HEADS,
    "head_start": HEAD_STARTS,
    "bn_statistics": BN_STATISTICS,
    "adapt_from": ADAPT_FROM,
}


@dataclass
class Recipe:
    """Optimiser, schedule and augmentation.

    The paper fixes SGD with Nesterov momentum 0.9, 30 epochs, learning rate 0.01 divided by 10 at the 11th
    and 21st epoch and cross entropy for emotion corpora; the rest is off by default.
    """

    optimizer: str = "sgd"  # the paper's, or adamw
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
    loss: str = "cross_entropy"  # a row of losses.py
    teacher_weight: float = 1.0  # of what teachers say, beside the loss
    label_smoothing: float = 0.0
    balance_classes: bool = False
    random_crop: bool = False
    # widest band (bins of 10 Hz) and stretch (frames of 10 ms) that SpecAugment hides, and how many of each
    freq_mask: int = 0
    time_mask: int = 0
    num_masks: int = 1
    # each utterance comes at all of these speeds, with segments of its own; 1 is among them
    speeds: list[float] = field(default_factory=lambda: [1.0])
    # 0.1: each segment is played at a speed between 0.9 and 1.1
    speed_perturbation: float = 0.0
    # white noise at a signal-to-noise ratio between this many dB and 20 dB more; None is no noise
    noise_snr: float | None = None
    # spectral tilt and ripple of up to this many dB: another microphone, another room
    channel_db: float = 0.0
    mixup: float = 0.0
    # probability with which what enters the classifier is left out
    dropout: float = 0.0
    # where alpha starts; None is the method's own: "zero" for residual_adapter, "source" for adapter_only
    adapter_init: str | None = None
    pooling: str = "mean"
    # "standardized": what enters the classifier has mean 0 and variance 1 over the training data
    head: str = "linear"
    # "probe": the classifier is fitted to the frozen network first, as logistic regression with this much L2
    head_start: str = "random"
    probe_l2: float = 100.0
    # "source": batch norms keep the statistics of the network that training starts from
    bn_statistics: str = "batch"
    # of CAM++: "head" adapts its first part, too
    adapt_from: str | None = None

    def __post_init__(self):
        """Raises ValueError: a setting of another type or out of its range; the message names it."""
        for name, kind in Recipe.__annotations__.items():  # HfArgumentParser changes the types in fields()
            value, (words, fits) = getattr(self, name), _expected(name, kind)
            may_be_none = type(None) in get_args(kind)
            if not (fits(value) or (value is None and may_be_none)):
                raise ValueError(f"{name} is {value!r}, but must be {words}{' or left out' * may_be_none}.")


def _expected(name: str, kind: Any) -> tuple[str, Any]:
    """What a setting must be, in words and as a test; `kind` is its type in [`Recipe`]."""
    if type(None) in get_args(kind):  # `float | None`
        kind = next(part for part in get_args(kind) if part is not type(None))
    if name in _CHOICES:
        return f"one of {_CHOICES[name]}", lambda value: value in _CHOICES[name]
    if kind == list[int]:
        return (
            "a list of epochs, whole numbers from 1",
            lambda value: isinstance(value, list) and all(_is_number(epoch, int) and epoch >= 1 for epoch in value),
        )
    if kind == list[float]:
        return (
            "a list of numbers from 0.5 to 2, 1.0 among them",
            lambda value: isinstance(value, list) and 1 in value and all(_is_speed(one) for one in value),
        )
    if kind in (bool, str):
        return {bool: "true or false", str: "a name"}[kind], lambda value: isinstance(value, kind)
    words, inside = _RANGES.get(name, _NOT_NEGATIVE)
    what = "a whole number" if kind is int else "a number"
    return f"{what}, {words}", lambda value: _is_number(value, kind) and inside(value)


def _is_speed(value: Any) -> bool:
    return _is_number(value, float) and 0.5 <= value <= 2


def _is_number(value: Any, kind: type) -> bool:
    """Whether it is a finite int, or where `kind` is float an int or float; True and False are neither."""
    kinds = int if kind is int else int | float
    return isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)


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
        raise ValueError(f"{path}: unknown settings {sorted(map(str, unknown))}; known are {sorted(known)}.")
    return {name: _number_in(value, Recipe.__annotations__[name]) for name, value in values.items()}


def _number_in(value: Any, kind: Any) -> Any:
    """What YAML 1.1 takes for text is meant as a number: 1e-3, without a point."""
    if isinstance(value, str) and float in (kind, *get_args(kind)):
        with contextlib.suppress(ValueError):
            return float(value)
    return value


def make_optimizer(model: torch.nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's over what is trained, one parameter group for each part (alpha, bn, fc, shared)."""
    groups: dict[str, list] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(part_of(name), []).append(parameter)
    settings = [
        {
            "params": parameters,
            "part": part,
            "lr": _first(getattr(recipe, f"{part}_learning_rate", None), recipe.learning_rate),
            "weight_decay": _first(getattr(recipe, f"{part}_weight_decay", None), recipe.weight_decay),
        }
        for part, parameters in groups.items()
    ]
    common = {"lr": recipe.learning_rate, "fused": next(model.parameters()).device.type == "cuda"}
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(settings, **common)
    return torch.optim.SGD(settings, momentum=recipe.momentum, nesterov=True, **common)


def _first(*values):
    return next(value for value in values if value is not None)


def make_scheduler(optimizer: torch.optim.Optimizer, recipe: Recipe, steps_per_epoch: int) -> LambdaLR:
    """The learning rate's factor, stepped once per batch, also where several batches make one optimiser step.

    Args:
        steps_per_epoch: the batches of an epoch.
    """
    warmup, total = recipe.warmup_epochs * steps_per_epoch, recipe.num_train_epochs * steps_per_epoch

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if recipe.lr_scheduler_type == "step":
            epoch = step // steps_per_epoch + 1
            return 0.1 ** sum(epoch >= drop for drop in recipe.lr_drop_epochs)
        progress = min(1.0, (step - warmup) / max(1, total - warmup))
        return 0.5 * (1 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, factor)
