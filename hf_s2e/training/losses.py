"""What training minimises: a function of logits and targets, chosen by name (`recipe.loss`).

A new loss is a function and a row in `LOSSES`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from .recipe import Recipe

Loss = Callable[[torch.Tensor, torch.Tensor, Recipe], torch.Tensor]


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """The paper's loss (section III), with the recipe's label smoothing.

    Args:
        logits, targets: (n, classes); a target is the probability of each class.
    """
    return F.cross_entropy(logits, targets, label_smoothing=recipe.label_smoothing)


def focal(logits: torch.Tensor, targets: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """Cross entropy in which what is recognised already counts less, by `(1 - p) ** 2` (Lin et al. 2017)."""
    log_posteriors = F.log_softmax(logits, dim=-1)
    smooth = recipe.label_smoothing
    targets = targets * (1 - smooth) + smooth / targets.shape[-1]
    return -(targets * (1 - log_posteriors.exp()).square() * log_posteriors).sum(dim=-1).mean()


def loss_by_name(name: str) -> Loss:
    """A row of `LOSSES`; ValueError where there is none of this name."""
    if name not in LOSSES:
        raise ValueError(f"loss is {name!r}, but must be one of {', '.join(map(repr, LOSSES))}.")
    return LOSSES[name]


def none(logits: torch.Tensor, targets: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """No loss of its own: what is learnt, teachers say."""
    return logits.sum() * 0


LOSSES: dict[str, Loss] = {"cross_entropy": cross_entropy, "focal": focal, "none": none}
