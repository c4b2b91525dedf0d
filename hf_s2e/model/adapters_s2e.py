"""Adapters in memory: add, train, choose, delete, fuse.

The names are those that every `PreTrainedModel` has with PEFT's meaning; here they act on domains, that is on
alpha, batch norm and classifier together, and need no `peft`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .adapter_files_s2e import S2EAdapterError, check_adapter_name, check_labels
from .configuration_s2e import MAX_DOMAINS, POOLINGS, label_maps
from .network_s2e import BatchNorm

ADAPTER_INITS = ("zero", "source", "kaiming")
ADAPTER_PARTS = ("alpha", "bn", "fc")
_BASE_NAMES = ("__base__",)  # what PEFT calls the base in a mixed batch


class S2EAdapterMixin:
    """The domains of a model, of which all but the base domain are adapters."""

    _last_adapter: str | None = None

    @property
    def adapter_names(self) -> list[str]:
        """The names of the adapters in memory, the base domain left out."""
        return [name for name in self.config.domains if name != self.config.base_domain]

    def active_adapters(self) -> list[str]:
        """The active adapter, in a list; empty where the base domain is active."""
        active = self.config.active_domain
        return [] if active == self.config.base_domain else [active]

    def active_adapter(self) -> str | None:
        return next(iter(self.active_adapters()), None)

    def add_adapter(
        self,
        adapter_name: str,
        labels: Sequence[str] | None = None,
        *,
        init: str = "zero",
        use_shared: bool = True,
        pooling: str = "mean",
        method: str | None = None,
        **kwargs,
    ) -> None:
        """Add a domain and make it the active one. It is frozen until [`train_adapter`].

        Batch norm, statistics included, starts as the base domain's.

        Args:
            adapter_name: letters, digits, `-`, `_`.
            labels: the class names, in the order of the logits.
            init: alpha starts as `"zero"` (so that training begins with the shared network), `"source"` (the
                base domain's) or `"kaiming"`.
            use_shared: False leaves the 3x3 filters out (the paper's `adapter_only`; alpha from zero would
                then never get a gradient and is refused).
            pooling: `"mean"` (Table I) or `"mean_std"`.
            method: recorded in the adapter's config.

        Raises:
            S2EAdapterError: the name is taken or impossible, the labels are, or the base is plain or fused.
        """
        self._check_new_adapter(adapter_name, init, use_shared, pooling)
        spec = {
            "labels": check_labels(labels),
            "use_shared": use_shared,
            "pooling": pooling,
            "method": method,
        }
        domain, head = self._new_adapter(spec)
        source = self.base_model.domains[self.config.base_domain].state_dict()
        if init != "source":
            source |= {key: torch.zeros_like(value) for key, value in source.items() if "alpha" in key}
        domain.load_state_dict(source)
        if init == "kaiming":
            for module in domain.modules():
                if isinstance(module, nn.Conv2d):
                    self._init_weights(module)
        if head is not None:
            self._init_weights(head)
        self._attach(adapter_name, spec, domain, head)

    def _check_new_adapter(self, adapter_name: str, init: str, use_shared: bool, pooling: str) -> None:
        check_adapter_name(adapter_name)
        if not self.config.adapters:
            kind = "fused" if self.config.fused else "plain"
            raise S2EAdapterError(
                f"This base is {kind}: its convolutions have no adapters. Start from one trained with "
                "adapters (S2EConfig(adapters=True), for example hf-s2e/s2e-resnet20-adapter)."
            )
        if adapter_name in self.config.domains:
            raise S2EAdapterError(
                f"There is an adapter {adapter_name!r} already: choose another name, or delete_adapter() it first."
            )
        _check_choice("init", init, ADAPTER_INITS)
        _check_choice("pooling", pooling, POOLINGS)
        if not use_shared and init == "zero":
            raise S2EAdapterError(
                "use_shared=False with init='zero': without the 3x3 filters every activation would be zero "
                "and alpha would get no gradient; use init='source' or 'kaiming'."
            )

    def train_adapter(self, adapter_name: str, parts: Sequence[str] = ADAPTER_PARTS) -> None:
        """Make one domain the active one and the only one that learns, and put the model into training mode.

        Args:
            parts: which of `"alpha"`, `"bn"` and `"fc"` learn. A batch norm that does not learn keeps its
                statistics.
        """
        unknown = set(parts) - set(ADAPTER_PARTS)
        if unknown or not parts:
            raise S2EAdapterError(f"parts is {tuple(parts)!r}, but must be some of {ADAPTER_PARTS}.")
        name = self._known_domain(adapter_name)
        self.set_adapter(name)
        self.requires_grad_(False)
        for module in self.base_model.domains[name].modules():
            if isinstance(module, nn.Conv2d):
                module.requires_grad_("alpha" in parts)
            elif isinstance(module, BatchNorm):
                module.requires_grad_("bn" in parts)
        if hasattr(self, "heads"):
            self.heads[name].requires_grad_("fc" in parts)
        self.train()

    def set_adapter(self, adapter_name: str | Sequence[str], **kwargs) -> None:
        """Make a domain the active one: `forward` answers with it, and `config.id2label` describes it."""
        if not isinstance(adapter_name, str):
            if len(adapter_name) != 1:
                raise S2EAdapterError(
                    f"One adapter is active at a time, but {len(adapter_name)} were given: "
                    f"{list(adapter_name)}. For several in one batch use forward(adapter_names=[...])."
                )
            adapter_name = adapter_name[0]
        self.config.activate(self._known_domain(adapter_name))
        self._last_adapter = self.active_adapter() or self._last_adapter

    def disable_adapters(self) -> None:
        """Return to the base domain."""
        self.set_adapter(self.config.base_domain)

    def enable_adapters(self) -> None:
        """Return to the adapter that was active last."""
        if self._last_adapter not in self.config.domains:
            raise S2EAdapterError(
                "No adapter has been active, or it was deleted: add_adapter(), load_adapter() or set_adapter() one."
            )
        self.set_adapter(self._last_adapter)

    def delete_adapter(self, adapter_names: str | Sequence[str], **kwargs) -> None:
        """Forget adapters; where the active one is among them, the base domain becomes active."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(dict.fromkeys(adapter_names))
        for name in names:
            if self._known_domain(name) == self.config.base_domain:
                raise S2EAdapterError(f"{name!r} is the base domain, not an adapter: it cannot be deleted.")
        for name in names:
            if name == self.config.active_domain:
                self.disable_adapters()
            del self.config.domains[name]
            del self.base_model.domains[name]
            if hasattr(self, "heads"):
                del self.heads[name]

    def replace_base_domain(self, name: str, labels: Sequence[str], pooling: str = "mean") -> None:
        """Give the network itself another task: a base domain of this name, with a new classifier.

        Alpha and batch norm stay. This is how a plain network is fine-tuned: it becomes another base, so
        adapters must be deleted first, and it forgets where it came from.

        Args:
            pooling: as of `add_adapter`.

        Raises:
            S2EAdapterError: adapters are loaded, or a bad name, label or pooling.
        """
        check_adapter_name(name)
        labels = check_labels(labels)
        _check_choice("pooling", pooling, POOLINGS)
        if self.adapter_names:
            raise S2EAdapterError(f"delete_adapter() these first: {self.adapter_names}.")
        old = self.config.base_domain
        spec = self.config.domains.pop(old)
        spec.pop("method", None)
        spec["pooling"] = pooling
        domain = self.base_model.domains.pop(old)
        domain.pooling = pooling
        self.base_model.domains[name] = domain
        if hasattr(self, "heads"):
            del self.heads[old]
            self.heads[name] = self._new_head(spec, labels).to(self.device, self.dtype)
        self.config.domains[name] = spec
        self.config.base_domain = self.config.active_domain = name
        self.config.update(label_maps(labels))
        self.config.repo_id = self._base_source = self._base_revision = self._last_adapter = None

    def _known_domain(self, name: Any) -> str:
        if name in _BASE_NAMES:
            return self.config.base_domain
        if name not in self.config.domains:
            known = ", ".join(self.config.domains)
            raise S2EAdapterError(f"There is no adapter {name!r}; loaded are: {known}.")
        return name

    def _new_adapter(self, spec: dict[str, Any]) -> tuple[nn.Module, nn.Module | None]:
        domain = self.base_model._new_domain(spec)
        head = self._new_head(spec, spec["labels"]) if hasattr(self, "heads") else None
        return domain, head

    def _attach(self, name: str, spec: dict[str, Any], domain: nn.Module, head: nn.Module | None) -> None:
        """Add a finished domain; nothing of the model has changed before this."""
        if len(self.config.domains) >= MAX_DOMAINS:
            raise S2EAdapterError(
                f"This base has {MAX_DOMAINS} domains and would not load with more: delete_adapter() one first."
            )
        reference = self.base_model.shared.stem.weight
        for module in filter(None, (domain, head)):
            module.requires_grad_(False).eval().to(reference.device, reference.dtype)
        self.base_model.domains[name] = domain
        if head is not None:
            self.heads[name] = head
        self.config.domains[name] = spec
        self.set_adapter(name)

    @torch.no_grad()
    def fuse(self, adapter_name: str | None = None) -> nn.Module:
        """A copy that answers for one domain only, with alpha and batch norm folded into the convolutions.

        `W = (F + alpha) gamma / sqrt(var + eps)`, `b = beta - gamma mean / sqrt(var + eps)`: the same logits,
        computed by a plain network without batch norm.
        """
        if self.config.fused:
            raise S2EAdapterError("This model is fused already.")
        name = self._known_domain(adapter_name or self.config.active_domain)
        fields = self.config.to_dict() | {
            "fused": True,
            "adapters": False,
            "domains": {name: self.config.domains[name] | {"use_shared": True}},
            "base_domain": name,
            "active_domain": name,
            "repo_id": None,
            **label_maps(self.config.labels_of(name)),
        }
        fused = type(self)(self.config_class(**fields))
        domain, target = self.base_model.domains[name], dict(fused.base_model.shared.named_modules())
        for path, conv in self.base_model.shared.named_modules():
            if isinstance(conv, nn.Conv2d):
                weight, bias = _fold(conv, domain.get_submodule(path))
                target[path].weight.copy_(weight)
                target[path].bias.copy_(bias)
        if hasattr(self, "heads"):
            fused.heads[name].load_state_dict(self.heads[name].state_dict())
        return fused.to(self.device, self.dtype).train(self.training)


def _check_choice(what: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise S2EAdapterError(f"{what} is {value!r}, but must be one of {', '.join(map(repr, allowed))}.")


def _fold(conv: nn.Conv2d, domain_conv: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of one convolution that stands for shared filters, alpha and batch norm."""
    weight = conv.weight.double() if domain_conv.use_shared else torch.zeros_like(conv.weight).double()
    if domain_conv.alpha is not None:
        weight = weight + nn.functional.pad(domain_conv.alpha.weight.double(), (conv.padding[0],) * 4)
    bn = domain_conv.bn
    scale = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
    bias = bn.bias.double() - bn.running_mean.double() * scale
    return (weight * scale[:, None, None, None]).float(), bias.float()
