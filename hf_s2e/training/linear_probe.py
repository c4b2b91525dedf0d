"""The classifier alone, fitted to the frozen network before anything else learns (linear probing, then fine-tuning:
Kumar et al., ICLR 2022): from random weights it would send noise into what it stands on."""

import torch
import torch.nn.functional as F

from ..model.modeling_s2e import S2EForAudioClassification
from .data import Task
from .predict import run_segments
from .recipe import Recipe

ITERATIONS = 200  # of L-BFGS; it stops before where nothing is gained


def fit_head(model: S2EForAudioClassification, task: Task, recipe: Recipe, device: torch.device) -> float:
    """Fit the active domain's classifier to the segments of a task; returns the mean cross entropy at the end.

    Logistic regression on the segments' embeddings, which are standardised where the head does that: the sum of the
    cross entropies, and `probe_l2 / 2` times the squared weights.
    """
    head = model.heads[model.config.active_domain]
    segments = run_segments(model, task, device=device, output="embeddings", speeds=recipe.speeds)
    labels = torch.tensor([task.labels[row] for row in task.utterances]).repeat(len(recipe.speeds))
    labels = labels.repeat_interleave(torch.tensor([len(one) for one in segments])).to(device)
    embeddings = torch.cat(segments).to(device)
    if head.norm is not None:
        variance, mean = torch.var_mean(embeddings, dim=0, correction=0)
        head.norm.running_mean.copy_(mean)
        head.norm.running_var.copy_(variance)
        head.keep_statistics = True  # which the weights are fitted to
        embeddings = (embeddings - mean) / (variance + head.norm.eps).sqrt()
    # on its own leaves, so that no gradient stays behind
    weight, bias = (torch.zeros_like(p, requires_grad=True) for p in (head.weight, head.bias))
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        scores = F.linear(embeddings, weight, bias)
        error = F.cross_entropy(scores, labels, label_smoothing=recipe.label_smoothing)
        total = error + recipe.probe_l2 / (2 * len(labels)) * weight.square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)
        return float(F.cross_entropy(F.linear(embeddings, weight, bias), labels))
