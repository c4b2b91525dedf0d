"""CAM++, a convolutional speaker network, as a second backbone (Wang et al., Interspeech 2023).

Cut after its second transition layer, in the middle, where emotion is still heard. Its convolutions over time are
two-dimensional ones of height 1 here, so that adapters, mixed batches and fusing are those of the paper's ResNet20.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .adapter_layers_s2e import S2EConvBN, S2EDomainConv, batch_norm
from .configuration_s2e import S2EConfig

FRONT_STRIDES = (2, 2)  # over frequency, of the two pairs of blocks in the first part; its last convolution halves too
KERNELS = {"tdnn": 5, "local": 3}  # frames
CONTEXT_FRAMES = 100  # of the pieces that the mask hears beside the whole


class S2EFrontBlock(nn.Module):
    """A basic block of the first part: two 3x3 convolutions and the shortcut."""

    def __init__(self, config: S2EConfig, channels: int, stride: int):
        super().__init__()
        self.conv1 = S2EConvBN(config, channels, channels, 3, stride=(stride, 1), padding=1)
        self.conv2 = S2EConvBN(config, channels, channels, 3, padding=1)
        self.shortcut = S2EConvBN(config, channels, channels, 1, stride=(stride, 1)) if stride > 1 else None

    def forward(self, x: torch.Tensor, own: nn.Module | None) -> torch.Tensor:
        y = F.relu(self.conv1(x, own and own.conv1))
        shortcut = x if self.shortcut is None else self.shortcut(x, own and own.shortcut)
        return F.relu(self.conv2(y, own and own.conv2) + shortcut)


class S2EFront(nn.Module):
    """The first part (FCM): convolutions over frequency and time, (n, 1, bins, frames) -> (n, features, 1, frames).

    `own` is a domain's half of it, where it has one.
    """

    def __init__(self, config: S2EConfig):
        super().__init__()
        channels = config.hidden_sizes[0]
        self.conv1 = S2EConvBN(config, 1, channels, 3, padding=1)
        self.blocks = nn.ModuleList(
            S2EFrontBlock(config, channels, step) for stride in FRONT_STRIDES for step in (stride, 1)
        )
        self.conv2 = S2EConvBN(config, channels, channels, 3, stride=(2, 1), padding=1)

    def forward(self, x: torch.Tensor, own: nn.Module | None) -> torch.Tensor:
        x = F.relu(self.conv1(x, own and own.conv1))
        for i, block in enumerate(self.blocks):
            x = block(x, own and own.blocks[i])
        x = F.relu(self.conv2(x, own and own.conv2))
        return x.flatten(1, 2).unsqueeze(2)  # channels and frequency become one


class S2EDenseLayer(nn.Module):
    """The shared half of a layer of a dense block, which adds `growth` channels: squeezed to four times as many, then
    a convolution over time, times the context-aware mask."""

    def __init__(self, config: S2EConfig, in_channels: int, growth: int, dilation: int):
        super().__init__()
        reach = dilation * (KERNELS["local"] // 2)
        taps = {"padding": (0, reach), "dilation": (1, dilation), "bias": False}
        self.squeeze = nn.Conv2d(in_channels, 4 * growth, 1, bias=config.fused)
        self.local = nn.Conv2d(4 * growth, growth, (1, KERNELS["local"]), **taps)
        self.context1 = nn.Conv2d(4 * growth, 2 * growth, 1)
        self.context2 = nn.Conv2d(2 * growth, growth, 1)

    def forward(self, x: torch.Tensor, domain: "S2EDomainLayer") -> torch.Tensor:
        h = F.relu(domain.squeeze(F.relu(domain.bn(x)), self.squeeze))
        return domain.local(h, self.local) * self.mask(h)

    def mask(self, h: torch.Tensor) -> torch.Tensor:
        """(n, channels, 1, frames) -> (n, growth, 1, frames), or one frame where the whole is a single piece."""
        context, frames = h.mean(dim=3, keepdim=True), h.shape[3]
        if frames <= CONTEXT_FRAMES:
            context = context + context  # the only piece is the whole
        else:
            size = (1, CONTEXT_FRAMES)
            pieces = F.avg_pool2d(h, size, size, ceil_mode=True)  # a last, shorter piece by its own length
            context = context + pieces.repeat_interleave(CONTEXT_FRAMES, dim=3)[..., :frames]
        return torch.sigmoid(self.context2(F.relu(self.context1(context))))


class S2EDomainLayer(nn.Module):
    """The domain's half of a dense layer."""

    def __init__(self, config: S2EConfig, layer: S2EDenseLayer, spec: Mapping[str, Any] | None):
        super().__init__()
        self.bn = batch_norm(layer.squeeze.in_channels, config)  # before a ReLU: no convolution can take it in
        self.squeeze = S2EDomainConv(config, layer.squeeze, None)
        self.local = S2EDomainConv(config, layer.local, spec, norm=False)


class S2ECampPlus(nn.Module):
    """What all domains share: the filters, and the batch norms of the first part.

    Of a config's `hidden_sizes` the first are the channels of the first part, the second those of the convolution
    after it, the third what each layer of a dense block adds; `depths` are the layers of each dense block, whose
    channels are halved after it.
    """

    def __init__(self, config: S2EConfig):
        super().__init__()
        channels, width, growth = config.hidden_sizes
        self.front = S2EFront(config)
        features, kernel = channels * (config.num_bins // front_stride()), KERNELS["tdnn"]
        taps = {"stride": (1, 2), "padding": (0, kernel // 2)}
        self.tdnn = nn.Conv2d(features, width, (1, kernel), bias=config.fused, **taps)
        self.blocks, self.transits = nn.ModuleList(), nn.ModuleList()
        for number, depth in enumerate(config.depths):
            layers = [S2EDenseLayer(config, width + growth * i, growth, 1 + (number > 0)) for i in range(depth)]
            width += growth * depth
            self.blocks.append(nn.ModuleList(layers))
            self.transits.append(nn.Conv2d(width, width // 2, 1, bias=False))
            width //= 2

    def forward(self, features: torch.Tensor, domain: "S2ECampPlusDomain") -> list[torch.Tensor]:
        """(n, bins, frames) -> the map after each transition layer, (n, channels, 1, frames / 2)"""
        # channels last from the start: what .contiguous() makes of one channel would be taken for channels first
        x = self.front(features.contiguous().unsqueeze(-1).movedim(-1, 1), domain.front)
        x = F.relu(domain.tdnn(x.contiguous(memory_format=torch.channels_last), self.tdnn))
        maps = []
        for layers, transit, own_layers, bn in zip(self.blocks, self.transits, domain.blocks, domain.transits):
            for layer, own in zip(layers, own_layers):
                x = torch.cat([x, layer(x, own)], dim=1)
            x = transit(F.relu(bn(x)))
            maps.append(x)
        return maps


class S2ECampPlusDomain(nn.Module):
    """Everything in the network that belongs to one domain: adapters beside all filters of more than one tap, and
    batch norms.

    Args:
        spec: the domain's settings. With `adapt_from="head"` the first part has adapters and batch norms of this
            domain too; by default it is everybody's.
        adapted: whether there are adapters; a plain network's own domain has none.
    """

    def __init__(self, config: S2EConfig, shared: S2ECampPlus, spec: Mapping[str, Any], *, adapted: bool):
        super().__init__()
        adapters = spec if adapted else None
        self.front = S2EDomainFront(config, shared.front, adapters) if spec.get("adapt_from") == "head" else None
        self.tdnn = S2EDomainConv(config, shared.tdnn, adapters)
        self.blocks = nn.ModuleList(
            nn.ModuleList(S2EDomainLayer(config, layer, adapters) for layer in layers) for layers in shared.blocks
        )
        self.transits = nn.ModuleList(batch_norm(transit.in_channels, config) for transit in shared.transits)


class S2EDomainFront(nn.Module):
    """A domain's half of the first part."""

    def __init__(self, config: S2EConfig, front: S2EFront, spec: Mapping[str, Any] | None):
        super().__init__()
        self.conv1 = S2EDomainConv(config, front.conv1.conv, spec)
        self.blocks = nn.ModuleList(_DomainBlock(config, block, spec) for block in front.blocks)
        self.conv2 = S2EDomainConv(config, front.conv2.conv, spec)


class _DomainBlock(nn.Module):
    def __init__(self, config: S2EConfig, block: S2EFrontBlock, spec: Mapping[str, Any] | None):
        super().__init__()
        self.conv1 = S2EDomainConv(config, block.conv1.conv, spec)
        self.conv2 = S2EDomainConv(config, block.conv2.conv, spec)
        self.shortcut = block.shortcut and S2EDomainConv(config, block.shortcut.conv, None)


def front_stride() -> int:
    """By how much the first part divides the frequencies (8)."""
    stride = 2
    for one in FRONT_STRIDES:
        stride *= one
    return stride


def channels_of(config: S2EConfig) -> Iterator[int]:
    """Channels of the map after each transition layer (256 and 512)."""
    _, width, growth = config.hidden_sizes
    for depth in config.depths:
        width = (width + growth * depth) // 2
        yield width
