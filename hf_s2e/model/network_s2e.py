"""The layers of the residual-adapter ResNet20 (Xi et al. 2019, section III and Table I).

What all domains share and what each adds are two trees of modules of the same shape, which meet in `forward`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_s2e import S2EConfig

BatchNorm = nn.modules.batchnorm._BatchNorm  # nn.SyncBatchNorm too


class _FrozenFilterConv(torch.autograd.Function):
    """`(F + alpha) * x` where only alpha and x get a gradient.

    The gradient of alpha is that of a 1x1 convolution: a ninth of what the 3x3 filters' own would cost.
    """

    @staticmethod
    def forward(ctx, x, weight, alpha, stride, padding):
        ctx.save_for_backward(x, weight, alpha)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(x, weight, stride=stride, padding=padding)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight, alpha = ctx.saved_tensors
        x, grad_x = x.to(grad.dtype), None
        if ctx.needs_input_grad[0]:
            stride, padding, ones, only_x = [ctx.stride] * 2, [ctx.padding] * 2, [1, 1], [True, False, False]
            grad_x = torch.ops.aten.convolution_backward(
                grad, x, weight.to(grad.dtype), None, stride, padding, ones, False, [0, 0], 1, only_x
            )[0]
        # a matrix product over all positions: oneDNN's backward pass crashes on narrow strided 1x1 filters
        seen = x[:, :, :: ctx.stride, :: ctx.stride].permute(0, 2, 3, 1).flatten(0, 2)
        grad_alpha = grad.permute(0, 2, 3, 1).flatten(0, 2).T @ seen
        return grad_x, None, grad_alpha.reshape(alpha.shape).to(alpha.dtype), None, None


def adapted_conv(x: torch.Tensor, shared: nn.Conv2d, alpha: torch.Tensor | None, use_shared: bool) -> torch.Tensor:
    """`w * x + alpha * x` (eq. 3), computed as `(w + alpha) * x` (eq. 1): alpha is the filters' centre tap.

    Args:
        x: (batch, in, height, width).
        shared: the domain-agnostic convolution w.
        alpha: (out, in, 1, 1), or None where this domain has no adapter here.
        use_shared: False leaves w out (the paper's `adapter_only`).
    """
    stride, padding, frozen = shared.stride[0], shared.padding[0], not shared.weight.requires_grad
    if alpha is None:
        weight = shared.weight.contiguous(memory_format=torch.channels_last)
        return F.conv2d(x, weight, shared.bias, stride=stride, padding=padding)
    if not use_shared:
        # a 1x1 convolution as the linear map it is: oneDNN crashes on narrow strided 1x1 filters
        return F.linear(x[:, :, ::stride, ::stride].movedim(1, -1), alpha.flatten(1)).movedim(-1, 1)
    centre = F.pad(alpha, (padding,) * 4)
    weight = (shared.weight + centre).contiguous(memory_format=torch.channels_last)
    if frozen and alpha.requires_grad and torch.is_grad_enabled():
        return _FrozenFilterConv.apply(x, weight.detach(), alpha, stride, padding)
    return F.conv2d(x, weight, stride=stride, padding=padding)


def _stem_pool(x: torch.Tensor) -> torch.Tensor:
    return F.max_pool2d(x, 3, stride=2, padding=1)


class S2EAlpha(nn.Conv2d):
    """A domain's 1x1 convolution alpha; it only holds the weight, [`adapted_conv`] applies it."""

    def __init__(self, shared: nn.Conv2d):
        super().__init__(shared.in_channels, shared.out_channels, 1, stride=shared.stride, bias=False)


class S2EDomainConv(nn.Module):
    """What a domain adds to one shared convolution: `BN_d(w * x + alpha_d * x)` (Fig. 2)."""

    def __init__(self, config: S2EConfig, shared: nn.Conv2d, *, adapted: bool, use_shared: bool = True):
        super().__init__()
        self.use_shared = use_shared
        self.alpha = S2EAlpha(shared) if adapted else None
        self.bn = (
            nn.Identity()
            if config.fused
            else nn.BatchNorm2d(shared.out_channels, eps=config.batch_norm_eps, momentum=config.batch_norm_momentum)
        )

    def forward(self, x: torch.Tensor, shared: nn.Conv2d) -> torch.Tensor:
        alpha = None if self.alpha is None else self.alpha.weight
        return self.bn(adapted_conv(x, shared, alpha, self.use_shared))

    def pooled(self, x: torch.Tensor, shared: nn.Conv2d) -> torch.Tensor:
        """`forward` and the stem's max pooling (Table I), which is the same before a ReLU as after it.

        Where nothing below the batch norm gets a gradient, it scales and shifts what is pooled already, a quarter
        of the positions: the maxima of the normalised values, or where the scale is negative of their negatives.
        """
        bn, fixed = self.bn, self.alpha is None and not (x.requires_grad or shared.weight.requires_grad)
        if not (fixed and isinstance(bn, nn.BatchNorm2d) and bn.training):
            return _stem_pool(self(x, shared))
        sign = torch.ones_like(bn.weight).copysign(bn.weight.detach())
        with torch.no_grad():
            bn.num_batches_tracked.add_(1)
            x = adapted_conv(x, shared, None, self.use_shared)
            x = F.batch_norm(x, bn.running_mean, bn.running_var, sign, None, True, bn.momentum, bn.eps)
            x = _stem_pool(x)
        return F.batch_norm(x, torch.zeros_like(sign), torch.ones_like(sign), bn.weight * sign, bn.bias, eps=0.0)


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

    def __init__(self, config: S2EConfig, block: S2EBlock, use_shared: bool):
        super().__init__()
        options = {"adapted": config.adapters, "use_shared": use_shared}
        self.conv1 = S2EDomainConv(config, block.conv1, **options)
        self.conv2 = S2EDomainConv(config, block.conv2, **options)
        self.projection = block.projection and S2EDomainConv(config, block.projection, adapted=False)


class S2ESharedNetwork(nn.Module):
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

    def forward(self, spectrograms: torch.Tensor, domain: "S2EDomain") -> torch.Tensor:
        """(n, bins, frames) -> (n, embedding_size, bins / 16, frames / 16)"""
        # channels last from the start: what .contiguous() makes of one channel would be taken for channels first
        x = spectrograms.contiguous().unsqueeze(-1).movedim(-1, 1)
        x = F.relu(domain.stem.pooled(x, self.stem), inplace=True)
        for stage, domain_stage in zip(self.stages, domain.stages):
            for block, domain_block in zip(stage, domain_stage):
                x = block(x, domain_block)
        return x


class S2EDomain(nn.Module):
    """Everything in the network that belongs to one domain: alpha and batch norm of every convolution."""

    def __init__(self, config: S2EConfig, shared: S2ESharedNetwork, spec: dict[str, Any]):
        super().__init__()
        use_shared = spec.get("use_shared", True)
        self.pooling = spec.get("pooling", "mean")
        self.stem = S2EDomainConv(config, shared.stem, adapted=config.adapters and config.adapt_stem)
        self.stages = nn.ModuleList(
            nn.ModuleList(S2EDomainBlock(config, block, use_shared) for block in stage) for stage in shared.stages
        )

    def pool(self, features: torch.Tensor) -> torch.Tensor:
        """(n, channels, height, width) -> (n, channels), or twice as many with `pooling="mean_std"`."""
        mean = features.mean(dim=(2, 3))
        if self.pooling == "mean":
            return mean
        variance = features.float().var(dim=(2, 3), correction=0)  # half precision has no 1e-8
        return torch.cat([mean, variance.clamp(min=1e-8).sqrt().to(mean.dtype)], dim=1)
