"""Augmentation in the batch, on the accelerator; every kind is off in the paper's recipe."""

import numpy as np
import torch

from .recipe import Recipe

CHANNEL_RIPPLES = 4  # half periods of cosine over the band


class Augment:
    """Draws for one step, from a generator of its own: a resumed run draws the same.

    Args:
        recipe: which kinds, and how strong.
        seed: of this step and process.
        device: where the batch is.
    """

    def __init__(self, recipe: Recipe, seed: int, device: torch.device):
        self.recipe, self.seed, self.device = recipe, seed, device
        self.generator = torch.Generator(device=device).manual_seed(seed)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        return torch.rand(*shape, generator=self.generator, device=self.device) * (high - low) + low

    def speed(self, count: int) -> torch.Tensor | None:
        width = self.recipe.speed_perturbation
        return self.uniform(count, low=1 - width, high=1 + width) if width else None

    def waveforms(self, waveforms: torch.Tensor) -> torch.Tensor:
        """White noise at a random level: (n, samples)."""
        if self.recipe.noise_snr is None:
            return waveforms
        snr = self.recipe.noise_snr + 20 * self.uniform(len(waveforms), 1)
        power = waveforms.square().mean(dim=1, keepdim=True)
        noise = torch.randn(waveforms.shape, generator=self.generator, device=self.device)
        return waveforms + noise * (power / 10 ** (snr / 10)).sqrt()

    def channel(self, spectrum: torch.Tensor, *, power: bool) -> torch.Tensor:
        """A random smooth frequency response, on magnitudes or on `power`: (n, bins, frames)."""
        if not self.recipe.channel_db:
            return spectrum
        count, bins = spectrum.shape[:2]
        frequency = torch.linspace(0, torch.pi, bins, device=self.device)
        order = torch.arange(1, CHANNEL_RIPPLES + 1, device=self.device)
        curves = torch.cos(frequency[:, None] * order) / order  # (bins, ripples)
        weights = self.uniform(count, CHANNEL_RIPPLES, low=-1, high=1) * self.recipe.channel_db
        return spectrum * 10 ** ((weights @ curves.T) / (10 if power else 20))[:, :, None]

    def masks(self, spectrograms: torch.Tensor) -> torch.Tensor:
        """Hide bands of frequency and stretches of time: (n, bins, frames)."""
        for dim, widest in ((1, self.recipe.freq_mask), (2, self.recipe.time_mask)):
            for _ in range(self.recipe.num_masks if widest else 0):
                count, size = len(spectrograms), spectrograms.shape[dim]
                width = self.uniform(count) * widest
                first = self.uniform(count) * (size - width)
                position = torch.arange(size, device=self.device)
                hidden = (position >= first[:, None]) & (position < (first + width)[:, None])
                spectrograms = spectrograms.masked_fill(hidden[:, :, None] if dim == 1 else hidden[:, None], 0.0)
        return spectrograms

    def mix(self, spectrograms: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mixup: each segment and its target with another's, in a proportion from Beta(mixup, mixup)."""
        share = np.random.default_rng(self.seed).beta(self.recipe.mixup, self.recipe.mixup, len(targets))
        share = torch.from_numpy(share).to(spectrograms)
        other = torch.randperm(len(targets), generator=self.generator, device=self.device)
        mixed = share[:, None, None] * spectrograms + (1 - share[:, None, None]) * spectrograms[other]
        return mixed, share[:, None] * targets + (1 - share[:, None]) * targets[other]
