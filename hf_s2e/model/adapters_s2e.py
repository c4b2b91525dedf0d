"""Adapters in memory: add, train, choose, delete, fuse.

The names are those that every `PreTrainedModel` has with PEFT's meaning; here they act on domains, that is on
alpha, batch norm and classifier together, and need no `peft`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .adapter_files_s2e import S2EAdapterError, check_adapter_name, check_labels
from .adapter_layers_s2e import (
    ADAPTER_INITS,
    ADAPTER_PARTS,
    PAPERS_KIND,
    adapters_in,
    convolutions,
    fold_batch_norm,
    merged_filters,
    part_of,
)
from .configuration_s2e import ADAPT_FROM, HEADS, MAX_DOMAINS, POOLINGS, label_maps

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
        adapter_kind: str = PAPERS_KIND,
        adapter_options: dict[str, Any] | None = None,
        adapt_from: str | None = None,
        head: str = "linear",
        method: str | None = None,
        **kwargs,
    ) -> None:
        """Add a domain and make it the active one. It is frozen until [`train_adapter`].

        Batch norm, statistics included, starts as the base domain's. The base may have adapters of its own or be
        plain: with alpha at zero both are the function that the base is.

        Args:
            adapter_name: letters, digits, `-`, `_`.
            labels: the class names, in the order of the logits.
            init: alpha starts as `"zero"` (so that training begins with the shared network), `"source"` (the
                base domain's, which must have one of the same kind) or `"kaiming"`.
            use_shared: False leaves the 3x3 filters out (the paper's `adapter_only`; alpha from zero would
                then never get a gradient and is refused).
            pooling: `"mean"` (Table I) or `"mean_std"`.
            adapter_kind: a key of `ADAPTER_KINDS`; by default the paper's 1x1 convolution.
            adapter_options: what adapters of this kind take.
            adapt_from: of CAM++: `"tdnn"` (the default) leaves its first part to the base, with `"head"` that is
                adapted too.
            head: `"linear"` (Table I), or `"standardized"`: with what enters it at mean 0 and variance 1.
            method: recorded in the adapter's config.

        Raises:
            S2EAdapterError: the name is taken or impossible, the labels, the kind or its options are, or the base is
                fused.
        """
        self._check_new_adapter(adapter_name, init, use_shared, pooling)
        _check_choice("head", head, HEADS)
        if adapt_from is not None and (self.config.backbone != "campplus" or adapt_from not in ADAPT_FROM):
            raise S2EAdapterError(
                f"adapt_from is {adapt_from!r}, but must be one of {ADAPT_FROM}, and is of campplus alone; this is a "
                f"{self.config.backbone}."
            )
        spec = {
            "labels": check_labels(labels),
            "use_shared": use_shared,
            "pooling": pooling,
            "method": method,
        }
        usual = {"adapter_kind": PAPERS_KIND, "adapter_options": None, "adapt_from": None, "head": "linear"}
        given = (adapter_kind, adapter_options, adapt_from, head)
        spec |= {name: value for (name, default), value in zip(usual.items(), given) if value != default}
        try:
            domain = self.base_model._new_domain(spec, adapted=True)
        except ValueError as error:
            raise S2EAdapterError(str(error)) from error
        self._start(domain, init)
        head = self._new_head(spec, spec["labels"]) if hasattr(self, "heads") else None
        if head is not None:
            self._init_weights(head)
        self._attach(adapter_name, spec, domain, head)

    def _start(self, domain: nn.Module, init: str) -> None:
        """Give a new domain the base domain's batch norms, and its alpha where training begins."""
        source = self.base_model.shared.state_dict()  # of which batch norms have the names that a domain gives its own
        source |= self.base_model.domains[self.config.base_domain].state_dict()
        own = domain.state_dict()
        adapters = {name for name in own if part_of(name) == "alpha"}
        if init == "source" and any(name not in source or source[name].shape != own[name].shape for name in adapters):
            raise S2EAdapterError(
                "init='source', but the base domain has no adapters of this kind to start from: use init='zero', or a "
                "base that was trained with them."
            )
        for adapter in adapters_in(domain.modules()):
            adapter.reset("zero" if init == "source" else init)
        taken = {name for name in own if name in source and (init == "source" or name not in adapters)}
        domain.load_state_dict(own | {name: source[name] for name in taken})

    def _check_new_adapter(self, adapter_name: str, init: str, use_shared: bool, pooling: str) -> None:
        check_adapter_name(adapter_name)
        if self.config.fused:
            raise S2EAdapterError(
                "This model is fused: its batch norms are part of its convolutions, and it takes no adapters. Start "
                "from the base that it was made of."
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
        for path, parameter in self.base_model.domains[name].named_parameters():
            parameter.requires_grad_(part_of(path) in parts)
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

    def replace_base_domain(
        self, name: str, labels: Sequence[str], pooling: str = "mean", head: str = "linear"
    ) -> None:
        """Give the network itself another task: a base domain of this name, with a new classifier.

        Alpha and batch norm stay. This is how a plain network is fine-tuned: it becomes another base, so
        adapters must be deleted first, and it forgets where it came from.

        Args:
            pooling, head: as of `add_adapter`.

        Raises:
            S2EAdapterError: adapters are loaded, or a bad name, label, pooling or head.
        """
        check_adapter_name(name)
        labels = check_labels(labels)
        _check_choice("pooling", pooling, POOLINGS)
        _check_choice("head", head, HEADS)
        if self.adapter_names:
            raise S2EAdapterError(f"delete_adapter() these first: {self.adapter_names}.")
        old = self.config.base_domain
        spec = self.config.domains.pop(old)
        spec.pop("method", None)
        spec |= {"pooling": pooling, "head": head}
        self.base_model.domains[name] = self.base_model.domains.pop(old)
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

    def _attach(self, name: str, spec: dict[str, Any], domain: nn.Module, head: nn.Module | None) -> None:
        """Add a finished domain; nothing of the model has changed before this."""
        if len(self.config.domains) >= MAX_DOMAINS:
            raise S2EAdapterError(
                f"This base has {MAX_DOMAINS} domains and would not load with more: delete_adapter() one first."
            )
        reference = next(self.base_model.shared.parameters())
        for module in filter(None, (domain, head)):
            module.requires_grad_(False).eval().to(reference.device, reference.dtype)
        self.base_model.domains[name] = domain
        if head is not None:
            self.heads[name] = head
        self.config.domains[name] = spec
        self.set_adapter(name)

    @torch.no_grad()
    def merge_base_adapter(self) -> None:
        """Add the base domain's alpha to the shared filters and drop it: the same function as a plain network.

        It becomes another base, so adapters must be deleted first, and it forgets where it came from. A network that
        is plain already stays as it is.

        Raises:
            S2EAdapterError: other adapters are loaded, or alpha is of a kind that no filter can stand for.
        """
        if self.adapter_names:
            raise S2EAdapterError(f"delete_adapter() these first: {self.adapter_names}.")
        if not self.config.adapters:
            return
        domain = self.base_model.domains[self.config.base_domain]
        for _, shared, own in convolutions(self.base_model.shared, domain):
            if getattr(own, "alpha", None) is not None:
                shared.weight.copy_(merged_filters(shared, _foldable(own), own.use_shared))
                own.alpha, own.use_shared = None, True
        self.config.adapters = False
        self.config.domains[self.config.base_domain].pop("use_shared", None)
        self.config.repo_id = self._base_source = self._base_revision = self._stored_fingerprint = None

    @torch.no_grad()
    def fuse(self, adapter_name: str | None = None) -> nn.Module:
        """A copy that answers for one domain only, with alpha and batch norm folded into the convolutions.

        `W = (F + alpha) gamma / sqrt(var + eps)`, `b = beta - gamma mean / sqrt(var + eps)`: the same logits,
        computed by a plain network without batch norm.

        Raises:
            S2EAdapterError: it is fused already, or its adapters are of a kind that no filter can stand for.
        """
        if self.config.fused:
            raise S2EAdapterError("This model is fused already.")
        name = self._known_domain(adapter_name or self.config.active_domain)
        spec = {key: value for key, value in self.config.domains[name].items() if not key.startswith("adapter_")}
        fields = self.config.to_dict() | {
            "fused": True,
            "adapters": False,
            "domains": {name: spec | {"use_shared": True}},
            "base_domain": name,
            "active_domain": name,
            "repo_id": None,
            **label_maps(self.config.labels_of(name)),
        }
        fused = type(self)(self.config_class(**fields))
        domain, shared, target = self.base_model.domains[name], self.base_model.shared, fused.base_model
        filters = shared.state_dict()
        for path, conv, own in convolutions(shared, domain):
            weight, bias = fold_batch_norm(merged_filters(conv, _foldable(own), own.use_shared), own.bn)
            filters |= {f"{path}.weight": weight} | ({} if bias is None else {f"{path}.bias": bias})
        target.shared.load_state_dict({key: filters[key] for key in target.shared.state_dict()})
        kept = domain.state_dict()  # batch norms that no convolution can take in
        target.domains[name].load_state_dict({key: kept[key] for key in target.domains[name].state_dict()})
        if hasattr(self, "heads"):
            fused.heads[name].load_state_dict(self.heads[name].state_dict())
        return fused.to(self.device, self.dtype).train(self.training)


def _foldable(own: nn.Module) -> torch.Tensor | None:
    if getattr(own, "alpha", None) is not None and own.kernel() is None:
        raise S2EAdapterError(
            f"Adapters of the class {type(own.alpha).__name__} are no filters (their kernel() is None), so that they "
            "cannot be folded into the convolutions: use the model as it is."
        )
    return own.kernel()


def _check_choice(what: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise S2EAdapterError(f"{what} is {value!r}, but must be one of {', '.join(map(repr, allowed))}.")
