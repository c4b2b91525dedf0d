"""The paper's backbone: ResNet20 (Xi et al. 2019, section III and Table I).

What all domains share and what each adds are two trees of modules of the same shape, which meet in `forward`.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .adapter_layers_s2e import S2EDomainConv, adapted_conv
from .configuration_s2e import S2EConfig


class S2EDomainStem(S2EDomainConv):
    """The domain's half of the 7x7 convolution, with the max pooling after it (Table I)."""

    def forward(self, x: torch.Tensor, shared: nn.Conv2d) -> torch.Tensor:
        """Pooled before the ReLU, which is the same as after it.

        Where nothing below the batch norm gets a gradient, it scales and shifts what is pooled already, a quarter
        of the positions: the maxima of the normalised values, or where the scale is negative of their negatives.
        """
        bn, fixed = self.bn, self.alpha is None and not (x.requires_grad or shared.weight.requires_grad)
        if not (fixed and isinstance(bn, nn.BatchNorm2d) and bn.training):
            return _max_pool(super().forward(x, shared))
        sign = torch.ones_like(bn.weight).copysign(bn.weight.detach())
        with torch.no_grad():
            bn.num_batches_tracked.add_(1)
            x = adapted_conv(x, shared, None, self.use_shared)
            x = F.batch_norm(x, bn.running_mean, bn.running_var, sign, None, True, bn.momentum, bn.eps)
            x = _max_pool(x)
        return F.batch_norm(x, torch.zeros_like(sign), torch.ones_like(sign), bn.weight * sign, bn.bias, eps=0.0)


def _max_pool(x: torch.Tensor) -> torch.Tensor:
    return F.max_pool2d(x, 3, stride=2, padding=1)


class S2EBlock(nn.Module):
    """The shared half of a basic block: two 3x3 convolutions and the shortcut (eq. 2)."""

    def __init__(self, config: S2EConfig, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        conv = {"kernel_size": 3, "padding": 1, "bias": config.fused}
        self.conv1 = nn.Conv2d(in_channels, in_channels, **conv)
        self.conv2 = nn.Conv2d(in_channels, out_channels, stride=stride, **conv)
        projected = stride != 1 and config.shortcut == "projection"
        self.projection = (
            nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=config.fused) if projected else None
        )

    def forward(self, x: torch.Tensor, domain: "S2EDomainBlock") -> torch.Tensor:
        y = F.relu(domain.conv1(x, self.conv1))
        return F.relu(domain.conv2(y, self.conv2) + self.shortcut(x, domain))

    def shortcut(self, x: torch.Tensor, domain: "S2EDomainBlock") -> torch.Tensor:
        if self.projection is not None:
            return domain.projection(x, self.projection)
        if self.conv2.stride[0] == 1:
            return x
        new_channels = self.conv2.out_channels - x.shape[1]
        x = F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)  # 25x25 -> 13, like the stride-2 conv
        return F.pad(x, (0, 0, 0, 0, 0, new_channels))


class S2EDomainBlock(nn.Module):
    """The domain's half of a basic block."""

    def __init__(self, config: S2EConfig, block: S2EBlock, spec: Mapping[str, Any] | None):
        super().__init__()
        self.conv1 = S2EDomainConv(config, block.conv1, spec)
        self.conv2 = S2EDomainConv(config, block.conv2, spec)
        self.projection = block.projection and S2EDomainConv(config, block.projection, None)


class S2EResNet20(nn.Module):
    """The domain-agnostic filters: the 7x7 and 3x3 convolutions of Table I."""

    def __init__(self, config: S2EConfig):
        super().__init__()
        size, widths = config.stem_kernel_size, config.hidden_sizes
        self.stem = nn.Conv2d(1, widths[0], size, padding=size // 2, bias=config.fused)
        self.stages = nn.ModuleList(
            nn.ModuleList(
                # the last convolution of a stage halves the size and doubles the width
                S2EBlock(config, width, *((2 * width, 2) if last else (width, 1)))
                for last in [False] * (depth - 1) + [True]
            )
            for width, depth in zip(widths, config.depths)
        )

    def forward(self, spectrograms: torch.Tensor, domain: "S2EResNet20Domain") -> list[torch.Tensor]:
        """(n, bins, frames) -> the last stage's map, (n, embedding_size, bins / 16, frames / 16), alone in a list"""
        # channels last from the start: what .contiguous() makes of one channel would be taken for channels first
        x = spectrograms.contiguous().unsqueeze(-1).movedim(-1, 1)
        x = F.relu(domain.stem(x, self.stem), inplace=True)
        for stage, domain_stage in zip(self.stages, domain.stages):
            for block, domain_block in zip(stage, domain_stage):
                x = block(x, domain_block)
        return [x]


class S2EResNet20Domain(nn.Module):
    """Everything in the network that belongs to one domain: adapter and batch norm of every convolution.

    Args:
        spec: the domain's settings.
        adapted: whether its convolutions have adapters; a plain network's own domain has none.
    """

    def __init__(self, config: S2EConfig, shared: S2EResNet20, spec: Mapping[str, Any], *, adapted: bool):
        super().__init__()
        stem = {**spec, "use_shared": True} if adapted and config.adapt_stem else None  # `adapter_only` keeps the 7x7
        self.stem = S2EDomainStem(config, shared.stem, stem)
        self.stages = nn.ModuleList(
            nn.ModuleList(S2EDomainBlock(config, block, spec if adapted else None) for block in stage)
            for stage in shared.stages
        )
