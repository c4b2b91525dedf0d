"""Residual adapters beside convolutions (Xi et al. 2019, eq. 1 to 3): their kinds, and what a domain learns.

A new kind is a class like [`S2EAlpha`] and a row in `ADAPTER_KINDS`.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

BatchNorm = nn.modules.batchnorm._BatchNorm  # nn.SyncBatchNorm too
ADAPTER_PARTS = ("alpha", "bn", "fc")
ADAPTER_INITS = ("zero", "source", "kaiming")
_CONVOLUTIONS = {3: F.conv1d, 4: F.conv2d}  # by the dimensions of their filters


def part_of(name: str) -> str:
    """Which part of a model a parameter is: "alpha", "bn", "fc" (the classifier) or "shared".

    Args:
        name: in a model, or in a domain.
    """
    tree, *path = name.removeprefix("s2e.").split(".")
    if tree in ("heads", "regressors", "shared"):
        return "shared" if tree == "shared" else "fc"
    return "alpha" if "alpha" in (path[1:] if tree == "domains" else path) else "bn"


class S2EAlpha(nn.Module):
    """The paper's adapter: a 1x1 convolution alpha parallel to shared filters (Fig. 2).

    A kind whose `kernel()` is None is called with the convolution's input instead, and cannot be fused.

    Args:
        shared: the convolution it stands beside.
    """

    def __init__(self, shared: nn.Module):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(_kernel_shape(shared)))

    def kernel(self) -> torch.Tensor:
        """(out, in, 1, ...): what is added to the shared filters' centre tap, as a function of the parameters."""
        return self.weight

    @torch.no_grad()
    def reset(self, start: str) -> None:
        """Parameters for a start at `"zero"`, where [`kernel`] is zero, or at random values (`"kaiming"`)."""
        if start == "zero":
            init.zeros_(self.weight)
        else:
            init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")


PAPERS_KIND = "conv1x1"
ADAPTER_KINDS: dict[str, type[nn.Module]] = {PAPERS_KIND: S2EAlpha}


def new_adapter(shared: nn.Module, spec: Mapping[str, Any]) -> nn.Module:
    """The adapter that a domain's `spec` (`adapter_kind`, `adapter_options`) asks for beside a convolution.

    Raises:
        ValueError: a kind that is not known, or options that it does not take.
    """
    kind, options = spec.get("adapter_kind", PAPERS_KIND), spec.get("adapter_options", {})
    if kind not in ADAPTER_KINDS:
        raise ValueError(f"adapter_kind is {kind!r:.100}, but must be one of {', '.join(map(repr, ADAPTER_KINDS))}.")
    try:
        return ADAPTER_KINDS[kind](shared, **options)
    except TypeError as error:
        raise ValueError(f"adapters of kind {kind!r} do not take the options {options!r:.200}: {error}.") from error


def _kernel_shape(shared: nn.Module) -> tuple[int, ...]:
    return (shared.out_channels, shared.in_channels, *(1 for _ in shared.kernel_size))


def at_centre(kernel: torch.Tensor, shared: nn.Module) -> torch.Tensor:
    """A (out, in, 1, ...) kernel as filters of the shared convolution's size, at their centre tap."""
    return F.pad(kernel, [size // 2 for size in reversed(shared.kernel_size) for _ in range(2)])


class _FrozenFilterConv(torch.autograd.Function):
    """`(F + alpha) * x` where only alpha and x get a gradient.

    The gradient of alpha is that of a 1x1 convolution: a ninth of what the 3x3 filters' own would cost.
    """

    @staticmethod
    def forward(ctx, x, weight, alpha, stride, padding, dilation):
        ctx.save_for_backward(x, weight, alpha)
        ctx.geometry = stride, padding, dilation
        return F.conv2d(x, weight, None, stride, padding, dilation)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight, alpha = ctx.saved_tensors
        x, grad_x = x.to(grad.dtype), None
        if ctx.needs_input_grad[0]:
            geometry, only_x = [list(pair) for pair in ctx.geometry], [True, False, False]
            grad_x = torch.ops.aten.convolution_backward(
                grad, x, weight.to(grad.dtype), None, *geometry, False, [0, 0], 1, only_x
            )[0]
        # a matrix product over all positions: oneDNN's backward pass crashes on narrow strided 1x1 filters
        seen = _strided(x, ctx.geometry[0]).permute(0, 2, 3, 1).flatten(0, 2)
        grad_alpha = grad.permute(0, 2, 3, 1).flatten(0, 2).T @ seen
        return grad_x, None, grad_alpha.reshape(alpha.shape).to(alpha.dtype), None, None, None


def _strided(x: torch.Tensor, stride: tuple[int, int]) -> torch.Tensor:
    """The positions at which a convolution that keeps the size has its centre tap."""
    return x[:, :, :: stride[0], :: stride[1]]


def adapted_conv(x: torch.Tensor, shared: nn.Conv2d, alpha: torch.Tensor | None, use_shared: bool) -> torch.Tensor:
    """`w * x + alpha * x` (eq. 3), computed as `(w + alpha) * x` (eq. 1): alpha is the filters' centre tap.

    Args:
        x: (batch, in, height, width).
        shared: the domain-agnostic convolution w.
        alpha: (out, in, 1, 1), or None where this domain has no adapter here.
        use_shared: False leaves w out (the paper's `adapter_only`).
    """
    geometry, frozen = (shared.stride, shared.padding, shared.dilation), not shared.weight.requires_grad
    if alpha is None:
        weight = shared.weight.contiguous(memory_format=torch.channels_last)
        return F.conv2d(x, weight, shared.bias, *geometry)
    if not use_shared:
        # a 1x1 convolution as the linear map it is: oneDNN crashes on narrow strided 1x1 filters
        return F.linear(_strided(x, shared.stride).movedim(1, -1), alpha.flatten(1)).movedim(-1, 1)
    weight = (shared.weight + at_centre(alpha, shared)).contiguous(memory_format=torch.channels_last)
    if frozen and alpha.requires_grad and torch.is_grad_enabled():
        return _FrozenFilterConv.apply(x, weight.detach(), alpha, *geometry)
    return F.conv2d(x, weight, None, *geometry)


class S2EDomainConv(nn.Module):
    """What a domain adds to one shared convolution: `BN_d(w * x + alpha_d * x)` (Fig. 2).

    Args:
        config: the model's.
        shared: the convolution w.
        spec: the domain's settings; None where it has no adapter here.
        norm: False where the network has no batch norm after w.
    """

    def __init__(self, config: Any, shared: nn.Conv2d, spec: Mapping[str, Any] | None, *, norm: bool = True):
        super().__init__()
        self.use_shared = spec is None or spec.get("use_shared", True)
        self.alpha = None if spec is None else new_adapter(shared, spec)
        self.bn = batch_norm(shared.out_channels, config) if norm and not config.fused else nn.Identity()

    def kernel(self) -> torch.Tensor | None:
        """Alpha's kernel (out, in, 1, 1); None where there is no adapter, or one that no filter can stand for."""
        return None if self.alpha is None else self.alpha.kernel()

    def forward(self, x: torch.Tensor, shared: nn.Conv2d) -> torch.Tensor:
        kernel = self.kernel()
        if self.alpha is None or kernel is not None:
            return self.bn(adapted_conv(x, shared, kernel, self.use_shared))
        y = self.alpha(x)  # not linear: it runs beside the filters
        return self.bn(y + adapted_conv(x, shared, None, True) if self.use_shared else y)


class S2EConvBN(nn.Module):
    """A shared convolution with a batch norm of its own, for the domains that have none here.

    Args:
        config, **options: the model's config, and those of `nn.Conv2d`.
    """

    use_shared = True

    def __init__(self, config: Any, *args, **options):
        super().__init__()
        self.conv = nn.Conv2d(*args, bias=config.fused, **options)
        self.bn = nn.Identity() if config.fused else batch_norm(self.conv.out_channels, config)

    def kernel(self) -> None:
        return None

    def forward(self, x: torch.Tensor, own: S2EDomainConv | None) -> torch.Tensor:
        """`own` is the domain's half, if it has one."""
        return self.bn(adapted_conv(x, self.conv, None, True)) if own is None else own(x, self.conv)


def convolutions(shared: nn.Module, domain: nn.Module) -> Iterator[tuple[str, nn.Conv2d, nn.Module]]:
    """The path of each shared convolution that a domain or the base has something to add to, itself, and what
    adds: an [`S2EDomainConv`] or [`S2EConvBN`]."""
    of_domain = {path: own for path, own in domain.named_modules() if isinstance(own, S2EDomainConv)}
    with_own = {path: one for path, one in shared.named_modules() if isinstance(one, S2EConvBN)}
    for path, one in with_own.items():
        yield f"{path}.conv", one.conv, of_domain.pop(path, one)
    for path, own in of_domain.items():
        yield path, shared.get_submodule(path), own


def batch_norm(channels: int, config: Any) -> nn.BatchNorm2d:
    """A batch norm with the config's eps and momentum."""
    return nn.BatchNorm2d(channels, eps=config.batch_norm_eps, momentum=config.batch_norm_momentum)


def merged_filters(shared: nn.Module, kernel: torch.Tensor | None, use_shared: bool = True) -> torch.Tensor:
    """Shared filters and alpha as one, (out, in, ...) in double precision."""
    weight = shared.weight.double() if use_shared else torch.zeros_like(shared.weight).double()
    return weight if kernel is None else weight + at_centre(kernel.double(), shared)


def fold_batch_norm(weight: torch.Tensor, bn: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias, float32, of a convolution that stands for filters and the batch norm after them, if any.

    `W = w gamma / sqrt(var + eps)`, `b = beta - gamma mean / sqrt(var + eps)`.
    """
    if isinstance(bn, nn.Identity):
        return weight.float(), None
    scale = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
    bias = bn.bias.double() - bn.running_mean.double() * scale
    return (weight.double() * scale.view(-1, *(1,) * (weight.ndim - 1))).float(), bias.float()


def adapters_in(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """The adapters among these modules, of whatever kind."""
    kinds = tuple(ADAPTER_KINDS.values())
    return [module for module in modules if isinstance(module, kinds)]
