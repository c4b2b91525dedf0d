"""The models: segments to embeddings, and utterances to posteriors of whichever domain is asked."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .adapter_files_s2e import check_adapter_name
from .adapter_layers_s2e import ADAPTER_KINDS, BatchNorm
from .campplus_s2e import S2ECampPlus, S2ECampPlusDomain
from .configuration_s2e import S2EConfig
from .resnet20_s2e import S2EResNet20, S2EResNet20Domain
from .save_and_load_s2e import S2ESaveAndLoadMixin

# What all domains share, and what each adds, of every backbone
BACKBONES: dict[str, tuple[type[nn.Module], type[nn.Module]]] = {
    "resnet20": (S2EResNet20, S2EResNet20Domain),
    "campplus": (S2ECampPlus, S2ECampPlusDomain),
}


@dataclass
class S2EModelOutput(ModelOutput):
    """
    Args:
        embeddings: (batch, 256), the mean over the segments.
        segment_embeddings: (batch, segments, 256), zero where `attention_mask` is.
    """

    embeddings: torch.FloatTensor | None = None
    segment_embeddings: torch.FloatTensor | None = None


@dataclass
class S2EClassifierOutput(ModelOutput):
    """
    Args:
        loss: cross entropy of `labels`.
        logits: (batch, classes), the logarithm of the utterance's posterior: softmax gives it exactly.
        segment_logits: (batch, segments, classes), zero where `attention_mask` is.
        embeddings: (batch, 256), the mean over the segments.
        row_labels: the class names of each row, in a batch of mixed domains only; its logits are padded with
            -inf to the widest label set.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    segment_logits: torch.FloatTensor | None = None
    embeddings: torch.FloatTensor | None = None
    row_labels: tuple[tuple[str, ...], ...] | None = None


class S2EHead(nn.Linear):
    """A domain's classifier (FC in Table I), (n, width) -> (n, classes).

    Args:
        standardize: bring what enters to mean 0 and variance 1 over the training data: a batch norm without scale.
    """

    dropout = 0.0  # probability, in training; a recipe's
    keep_statistics = False  # of `norm`, in training

    def __init__(self, width: int, classes: int, *, standardize: bool = False):
        super().__init__(width, classes)
        self.norm = nn.BatchNorm1d(width, affine=False) if standardize else None

    def train(self, mode: bool = True) -> "S2EHead":
        super().train(mode)
        if self.norm is not None and self.keep_statistics:
            self.norm.eval()
        return self

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        if self.norm is not None:
            embeddings = self.norm(embeddings)
        return super().forward(F.dropout(embeddings, self.dropout, self.training))


class S2EPreTrainedModel(S2ESaveAndLoadMixin, PreTrainedModel):
    config_class = S2EConfig
    base_model_prefix = "s2e"
    main_input_name = "input_values"
    input_modalities = ("audio",)
    _no_split_modules = ("S2EModel",)  # a block and its adapters belong on one device
    keep_statistics = False  # of batch norms, in training
    accepts_loss_kwargs = False  # the loss is the batch's mean: Trainer divides it where it accumulates

    def __init__(self, config: S2EConfig, *inputs, **kwargs):
        # a copy, because it says which adapters are loaded: another model of the same config has its own
        super().__init__(copy.deepcopy(config), *inputs, **kwargs)

    def _new_head(self, spec: dict[str, Any], labels: Sequence[str]) -> "S2EHead":
        parts = 2 if spec.get("pooling") == "mean_std" else 1
        standardize = spec.get("head") == "standardized"
        return S2EHead(parts * self.config.embedding_size, len(labels), standardize=standardize)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, tuple(ADAPTER_KINDS.values())):
            module.reset("kaiming")
        elif isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            init.kaiming_uniform_(module.weight, a=5**0.5)
            init.zeros_(module.bias)
        elif isinstance(module, BatchNorm):
            if module.affine:
                init.ones_(module.weight)
                init.zeros_(module.bias)
            init.zeros_(module.running_mean)
            init.ones_(module.running_var)
            init.zeros_(module.num_batches_tracked)

    def train(self, mode: bool = True) -> "S2EPreTrainedModel":
        """As in torch, but what is frozen stays in evaluation mode: frozen means a batch norm's statistics too.

        With `keep_statistics` those of the network's batch norms stay where they learn, too.
        """
        super().train(mode)
        for module in self.modules():
            norm = isinstance(module, BatchNorm) and module.affine
            learns = isinstance(module, S2EHead) or norm
            if learns and (not module.weight.requires_grad or (norm and self.keep_statistics)):
                module.eval()
        return self


class S2EModel(S2EPreTrainedModel):
    """The network without its classifier: spectrogram segments -> embeddings.

    Example:
        >>> model = S2EModel(S2EConfig()).eval()  # random; from_pretrained(REPO) is trained
        >>> with torch.inference_mode():
        ...     output = model(torch.rand(1, 3, 400, 200))  # one utterance of three segments
        >>> output.embeddings.shape, output.segment_embeddings.shape
        (torch.Size([1, 256]), torch.Size([1, 3, 256]))
    """

    _auto_class = "AutoModel"
    _keys_to_ignore_on_load_unexpected = (r"^heads\.",)  # those of a file that has classifiers too

    def __init__(self, config: S2EConfig):
        super().__init__(config)
        self.shared = BACKBONES[config.backbone][0](config)
        self.domains = nn.ModuleDict(
            {
                check_adapter_name(name): self._new_domain(spec, adapted=config.adapted(name))
                for name, spec in config.domains.items()
            }
        )
        self.post_init()

    def _new_domain(self, spec: dict[str, Any], *, adapted: bool) -> nn.Module:
        return BACKBONES[self.config.backbone][1](self.config, self.shared, spec, adapted=adapted)

    def embed_segments(self, spectrograms: torch.Tensor, domain: str) -> torch.Tensor:
        """(n, bins, frames) -> (n, 256), or (n, 512) where the domain pools by `"mean_std"`, each by itself."""
        maps = self.shared(spectrograms, self.domains[domain])
        return pool(maps[-1], self.config.domains[domain].get("pooling", "mean"))

    def forward(
        self,
        input_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> S2EModelOutput | tuple:
        """
        Args:
            input_values: (batch, segments, bins, frames), or (batch, bins, frames) for one segment a row.
            attention_mask: (batch, segments), 1 where there is a segment.

        Raises:
            ValueError: a shape that the network does not take, or a row without any segment.
        """
        segments, mask = self._valid_segments(input_values, attention_mask)
        embedded = _scatter(self.embed_segments(segments, self.config.active_domain), mask)
        output = S2EModelOutput(
            embeddings=embedded.sum(dim=1) / mask.sum(dim=1, keepdim=True), segment_embeddings=embedded
        )
        return _as_asked(output, return_dict, self.config)

    def _valid_segments(self, input_values, attention_mask) -> tuple[torch.Tensor, torch.Tensor]:
        """The segments that are there, (n, bins, frames), and where they were: bool (batch, segments)."""
        shape = (self.config.num_bins, self.config.frames_per_segment)
        if input_values.ndim not in (3, 4) or tuple(input_values.shape[-2:]) != shape:
            raise ValueError(
                f"input_values has shape {tuple(input_values.shape)}, expected (batch, segments, {shape[0]}, "
                f"{shape[1]}) or (batch, {shape[0]}, {shape[1]}), as S2EFeatureExtractor makes them."
            )
        if input_values.ndim == 3:
            input_values = input_values.unsqueeze(1)
        if attention_mask is None:
            mask = torch.ones(input_values.shape[:2], dtype=torch.bool, device=input_values.device)
            return input_values.flatten(0, 1), mask
        mask = attention_mask.to(torch.bool)
        if mask.shape != input_values.shape[:2]:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, expected (batch, segments) = "
                f"{tuple(input_values.shape[:2])}."
            )
        if not mask.any(dim=1).all():
            raise ValueError("A row of attention_mask has no segment: every utterance needs at least one.")
        return input_values[mask], mask


class S2EForAudioClassification(S2EPreTrainedModel):
    """The network with one classifier per domain; the utterance's posterior is the mean of its segments'.

    Example:
        >>> model = S2EForAudioClassification(S2EConfig(num_labels=250))  # random; from_pretrained(REPO) is trained
        >>> model.add_adapter("calls", labels=["calm", "upset"])
        >>> model.train_adapter("calls")  # exactly its alpha, batch norms and classifier learn
        >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
        154242
        >>> extract = S2EFeatureExtractor.from_model_config(model.config)
        >>> waveforms = [torch.rand(32_000) - 0.5, torch.rand(20_000) - 0.5]  # 2 s and 1.25 s
        >>> batch = extract(waveforms, sampling_rate=16_000, return_tensors="pt")
        >>> model(**batch, labels=torch.tensor([0, 1])).loss.backward()
        >>> with torch.inference_mode():
        ...     output = model.eval()(**batch, adapter_names=["calls", None])  # a domain for each row
        >>> output.logits.shape, output.row_labels[0]  # log posteriors, -inf beyond a row's label set
        (torch.Size([2, 250]), ('calm', 'upset'))
    """

    _auto_class = "AutoModelForAudioClassification"

    def __init__(self, config: S2EConfig):
        super().__init__(config)
        self.s2e = S2EModel(self.config)
        self.s2e.config = self.config  # one for both, as everywhere in transformers
        self.heads = nn.ModuleDict(
            {name: self._new_head(spec, config.labels_of(name)) for name, spec in config.domains.items()}
        )
        self.post_init()

    def forward(
        self,
        input_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        adapter_names: Sequence[str | None] | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> S2EClassifierOutput | tuple:
        """
        Args:
            input_values: (batch, segments, bins, frames), or (batch, bins, frames) for one segment a row.
            attention_mask: (batch, segments), 1 where there is a segment.
            labels: (batch,) class indices within the row's domain; -100 is ignored.
            adapter_names: the domain of each row, for a batch of mixed domains; None or the base domain's
                name is the base. By default the active domain answers for all rows.

        Raises:
            ValueError: a shape that the network does not take, a row without any segment, a label outside its
                row's label set.
            S2EAdapterError: a domain that is not loaded.
        """
        segments, mask = self.s2e._valid_segments(input_values, attention_mask)
        if adapter_names is None:
            output = self._classify(segments, mask, self.config.active_domain)
        else:
            output = self._classify_mixed(segments, mask, adapter_names)
        if labels is not None:  # a new output, because the loss comes first in its tuple
            output = S2EClassifierOutput(loss=self._loss(output, labels), **output)
        return _as_asked(output, return_dict, self.config)

    def _classify(self, segments: torch.Tensor, mask: torch.Tensor, domain: str) -> S2EClassifierOutput:
        embedded = self.s2e.embed_segments(segments, domain)
        scores = self.heads[domain](embedded).float()
        embedded = _scatter(embedded, mask)
        return S2EClassifierOutput(
            logits=aggregate_segments(F.log_softmax(scores, dim=-1), mask, self.config.aggregation),
            segment_logits=_scatter(scores, mask),
            embeddings=embedded.sum(dim=1) / mask.sum(dim=1, keepdim=True),
        )

    def _classify_mixed(
        self, segments: torch.Tensor, mask: torch.Tensor, adapter_names: Sequence[str | None]
    ) -> S2EClassifierOutput:
        """Each domain's rows by themselves, so that a row's neighbours cannot change its answer."""
        if len(adapter_names) != len(mask):
            raise ValueError(f"adapter_names has {len(adapter_names)} entries, but the batch has {len(mask)} rows.")
        names = [self._known_domain(name or self.config.base_domain) for name in adapter_names]
        row_of_segment = mask.nonzero()[:, 0]
        widest = max(len(self.config.labels_of(name)) for name in names)
        rows_of = {name: [i for i, other in enumerate(names) if other == name] for name in dict.fromkeys(names)}
        parts: list[S2EClassifierOutput] = []
        for name, rows in rows_of.items():
            rows = torch.tensor(rows, device=mask.device)
            part = self._classify(segments[torch.isin(row_of_segment, rows)], mask[rows], name)
            missing = widest - part.logits.shape[-1]
            part.logits = F.pad(part.logits, (0, missing), value=-torch.inf)
            part.segment_logits = F.pad(part.segment_logits, (0, missing), value=-torch.inf)
            parts.append(part)
        back = torch.tensor([row for rows in rows_of.values() for row in rows], device=mask.device).argsort()
        widths = {part.embeddings.shape[-1] for part in parts}
        return S2EClassifierOutput(
            logits=torch.cat([part.logits for part in parts])[back],
            segment_logits=torch.cat([part.segment_logits for part in parts])[back],
            # domains that pool differently have embeddings of different width
            embeddings=torch.cat([part.embeddings for part in parts])[back] if len(widths) == 1 else None,
            row_labels=tuple(tuple(self.config.labels_of(name)) for name in names),
        )

    def _loss(self, output: S2EClassifierOutput, labels: torch.Tensor) -> torch.Tensor:
        """Cross entropy; the logits are log posteriors already, and -inf stays outside a row's label set."""
        mixed = output.row_labels is not None
        # where one domain answers, the check would only stall an accelerator at every step
        if mixed or labels.device.type == "cpu":
            sizes = torch.tensor(
                [len(row) for row in output.row_labels] if mixed else output.logits.shape[-1],
                device=labels.device,
            )
            wrong = ((labels < 0) | (labels >= sizes)) & (labels != -100)
            if wrong.any():
                row = int(wrong.nonzero()[0])
                raise ValueError(
                    f"The label of row {row} is {int(labels[row])}, but its domain has "
                    f"{int(sizes.expand(len(labels))[row])} classes, counted from 0."
                )
        return F.nll_loss(output.logits, labels)


def pool(features: torch.Tensor, pooling: str) -> torch.Tensor:
    """(n, channels, ...) -> (n, channels), or twice as many with `pooling="mean_std"`."""
    features = features.flatten(2)
    mean = features.mean(dim=2)
    if pooling == "mean":
        return mean
    variance = features.float().var(dim=2, correction=0)  # half precision has no 1e-8
    return torch.cat([mean, variance.clamp(min=1e-8).sqrt().to(mean.dtype)], dim=1)


def _as_asked(output: ModelOutput, return_dict: bool | None, config: S2EConfig) -> ModelOutput | tuple:
    return output if (config.return_dict if return_dict is None else return_dict) else output.to_tuple()


def _scatter(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(n, d) of the valid segments -> (batch, segments, d), zero elsewhere."""
    if mask.shape[1] == 1:
        return values.unsqueeze(1)
    dense = values.new_zeros(*mask.shape, values.shape[-1])
    dense[mask] = values
    return dense


def aggregate_segments(log_posteriors: torch.Tensor, mask: torch.Tensor, aggregation: str) -> torch.Tensor:
    """Log posteriors of the valid segments (n, classes) -> of the utterances (batch, classes).

    Args:
        mask: bool (batch, segments), where the n segments belong.
        aggregation: `S2EConfig.aggregation`.
    """
    if mask.shape[1] == 1:
        return log_posteriors
    count = mask.sum(dim=1, keepdim=True)
    if aggregation == "geometric":
        return F.log_softmax(_scatter(log_posteriors, mask).sum(dim=1) / count, dim=-1)
    dense = log_posteriors.new_full((*mask.shape, log_posteriors.shape[-1]), -torch.inf)
    dense[mask] = log_posteriors
    if aggregation == "max":
        return F.log_softmax(dense.amax(dim=1), dim=-1)
    return torch.logsumexp(dense, dim=1) - count.log()
