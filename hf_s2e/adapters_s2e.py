"""The adapter API of the models: add, train, set, load, save, push, delete, fuse.

The names are those that every `PreTrainedModel` has with PEFT's meaning; here they act on domains, that is on alpha,
batch norm and classifier together, and need no `peft`.
"""

import copy
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from torch import nn
from transformers.dynamic_module_utils import custom_object_save

from .adapter_files_s2e import (
    ADAPTER_WEIGHTS,
    FETCH_KEYWORDS,
    PLACE_KEYWORDS,
    S2EAdapterError,
    check_adapter_name,
    check_labels,
    fetch,
    fingerprint,
    read_tensors,
    tensors_sha256,
    wrong_base,
    write_tensors,
)
from .configuration_s2e import POOLINGS
from .feature_extraction_s2e import S2EFeatureExtractor

ADAPTER_INITS = ("zero", "source", "kaiming")
ADAPTER_PARTS = ("alpha", "bn", "fc")
_BASE_NAMES = ("__base__",)  # what PEFT calls the base in a mixed batch
# Config fields that a base has and an adapter's config does not repeat
_BASE_ONLY = ("domains", "repo_id", "active_domain", "architectures", "dtype")


class S2EAdapterMixin:
    """Adapters of [`S2EModel`] and [`S2EForAudioClassification`]."""

    _base_source: str | None = None  # folder or Hub id the base was loaded from
    _base_revision: str | None = None  # its commit, where it came from the Hub
    _stored_fingerprint: str | None = None  # taken in fp32 at loading
    _last_adapter: str | None = None

    # ---- what is there -------------------------------------------------------------------------------------------

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

    @property
    def base_fingerprint(self) -> str:
        """SHA-256 of the shared filters, as stored in fp32, and the front end's settings (see `fingerprint`)."""
        shared = self.base_model.shared.state_dict()
        if all(tensor.dtype == torch.float32 for tensor in shared.values()):
            return fingerprint(shared, self.config.front_end)
        if self._stored_fingerprint is None:
            raise S2EAdapterError(
                "The shared filters are not in float32 and were never loaded from a base, so this model has no "
                "fingerprint; adapters need a base made and stored in float32."
            )
        return self._stored_fingerprint

    def get_adapter_state_dict(self, adapter_name: str | None = None, **kwargs) -> dict[str, torch.Tensor]:
        """The tensors of one adapter, named as in `adapter.safetensors`: relative to it, `classifier.*` its head."""
        name = self._known_domain(adapter_name or self.config.active_domain)
        tensors = {
            key: tensor
            for key, tensor in self.base_model.domains[name].state_dict().items()
            if not key.endswith("num_batches_tracked")
        }
        if hasattr(self, "heads"):
            tensors |= {f"classifier.{key}": tensor for key, tensor in self.heads[name].state_dict().items()}
        return tensors

    # ---- add, train, choose --------------------------------------------------------------------------------------

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
            init: alpha starts as `"zero"` (so that training begins with the shared network), `"source"` (the base
                domain's) or `"kaiming"`.
            use_shared: False leaves the 3x3 filters out (the paper's `adapter_only`; alpha from zero would then never
                get a gradient and is refused).
            pooling: `"mean"` (Table I) or `"mean_std"`.
            method: recorded in the adapter's config.

        Raises:
            S2EAdapterError: the name is taken or impossible, the labels are, or the base is plain or fused.
        """
        check_adapter_name(adapter_name)
        if not self.config.adapters:
            kind = "fused" if self.config.fused else "plain"
            raise S2EAdapterError(
                f"This base is {kind}: its convolutions have no adapters. Start from one trained with adapters "
                "(S2EConfig(adapters=True), for example hf-s2e/s2e-resnet20-adapter)."
            )
        if adapter_name in self.config.domains:
            raise S2EAdapterError(
                f"There is an adapter {adapter_name!r} already: choose another name, or delete_adapter() it first."
            )
        for what, value, allowed in (("init", init, ADAPTER_INITS), ("pooling", pooling, POOLINGS)):
            if value not in allowed:
                raise S2EAdapterError(f"{what} is {value!r}, but must be one of {', '.join(map(repr, allowed))}.")
        if not use_shared and init == "zero":
            raise S2EAdapterError(
                "use_shared=False with init='zero': without the 3x3 filters every activation would be zero and alpha "
                "would get no gradient; use init='source' or 'kaiming'."
            )
        spec = {"labels": check_labels(labels), "use_shared": use_shared, "pooling": pooling, "method": method}
        domain, head = self._build_domain(spec)
        source = self.base_model.domains[self.config.base_domain].state_dict()
        if init != "source":
            source |= {key: torch.zeros_like(value) for key, value in source.items() if "alpha" in key}
        domain.load_state_dict(source)
        if init == "kaiming":
            for module in domain.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if head is not None:
            nn.init.kaiming_uniform_(head.weight, a=5**0.5)
            nn.init.zeros_(head.bias)
        self._attach(adapter_name, spec, domain, head)

    def train_adapter(self, adapter_name: str, parts: Sequence[str] = ADAPTER_PARTS) -> None:
        """Make one domain the active one and the only one that learns, and put the model into training mode.

        Args:
            parts: which of `"alpha"`, `"bn"` and `"fc"` learn. A batch norm that does not learn keeps its statistics.
        """
        unknown = set(parts) - set(ADAPTER_PARTS)
        if unknown or not parts:
            raise S2EAdapterError(f"parts is {tuple(parts)!r}, but must be some of {ADAPTER_PARTS}.")
        self.set_adapter(adapter_name)
        self.requires_grad_(False)
        for module in self.base_model.domains[adapter_name].modules():
            if isinstance(module, nn.Conv2d):
                module.requires_grad_("alpha" in parts)
            elif isinstance(module, nn.BatchNorm2d):
                module.requires_grad_("bn" in parts)
        if hasattr(self, "heads"):
            self.heads[adapter_name].requires_grad_("fc" in parts)
        self.train()

    def set_adapter(self, adapter_name: str | Sequence[str], **kwargs) -> None:
        """Make a domain the active one: `forward` answers with it, and `config.id2label` describes it."""
        if not isinstance(adapter_name, str):
            if len(adapter_name) != 1:
                raise S2EAdapterError(
                    f"One adapter is active at a time, but {len(adapter_name)} were given: {list(adapter_name)}. For "
                    "several in one batch use forward(adapter_names=[...])."
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
                "No adapter has been active: add_adapter(), load_adapter() or set_adapter() one first."
            )
        self.set_adapter(self._last_adapter)

    def delete_adapter(self, adapter_names: str | Sequence[str], **kwargs) -> None:
        """Forget adapters; where the active one is among them, the base domain becomes active."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
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

    def replace_base_domain(self, name: str, labels: Sequence[str]) -> None:
        """Give the network itself another task: the base domain gets this name, these labels and a new classifier.

        Alpha and batch norm stay. This is how a plain network is fine-tuned; the resident adapters must be deleted
        first, since the filters they rely on are about to change.
        """
        check_adapter_name(name)
        if self.adapter_names:
            raise S2EAdapterError(f"delete_adapter() these first: {self.adapter_names}.")
        old = self.config.base_domain
        spec = {**self.config.domains[old], "labels": check_labels(labels)}
        domain = self.base_model.domains[old]
        del self.base_model.domains[old]
        self.base_model.domains[name] = domain
        if hasattr(self, "heads"):
            del self.heads[old]
            head = self._new_head(spec, spec["labels"]).to(self.device, self.dtype)
            self.heads[name] = head
        self.config.domains[name] = spec
        self.config.activate(name)
        self.config.base_domain = name
        del self.config.domains[old]

    def _known_domain(self, name: Any) -> str:
        if name in _BASE_NAMES:
            return self.config.base_domain
        if name not in self.config.domains:
            known = ", ".join(self.config.domains)
            raise S2EAdapterError(f"There is no adapter {name!r}; loaded are: {known}.")
        return name

    def _build_domain(self, spec: dict[str, Any]) -> tuple[nn.Module, nn.Module | None]:
        domain = self.base_model._new_domain(spec)
        head = self._new_head(spec, spec["labels"]) if hasattr(self, "heads") else None
        return domain, head

    def _attach(self, name: str, spec: dict[str, Any], domain: nn.Module, head: nn.Module | None) -> None:
        """Add a finished domain; nothing of the model has changed before this."""
        reference = self.base_model.shared.stem.weight
        for module in filter(None, (domain, head)):
            module.requires_grad_(False).eval().to(reference.device, reference.dtype)
        self.base_model.domains[name] = domain
        if head is not None:
            self.heads[name] = head
        self.config.domains[name] = spec
        self.set_adapter(name)

    # ---- files and the Hub ---------------------------------------------------------------------------------------

    def load_adapter(
        self,
        peft_model_id: str | os.PathLike,
        adapter_name: str | None = None,
        revision: str | None = None,
        **kwargs,
    ) -> str:
        """Load an adapter repo onto this base and make it the active one.

        Args:
            peft_model_id: a folder or a Hub id (the name is that of transformers' own method).
            adapter_name: the name in this model; by default the one it was saved with.
            revision: branch, tag or commit of the adapter repo.
            **kwargs: `cache_dir`, `force_download`, `local_files_only`, `token`, `subfolder`; others are ignored.

        Returns:
            The adapter's name in this model.

        Raises:
            S2EAdapterError: another base is needed, the files are missing or damaged, or the name is taken. The model
                is then as it was.
        """
        source = str(peft_model_id)
        where = {"revision": revision} | {
            key: kwargs[key] for key in (*FETCH_KEYWORDS, *PLACE_KEYWORDS) if kwargs.get(key) is not None
        }
        where = {key: value for key, value in where.items() if value is not None}
        config = self._adapter_config(source, where)
        name = check_adapter_name(adapter_name or config.adapter_name)
        if name in self.config.domains:
            raise S2EAdapterError(
                f"There is an adapter {name!r} already: pass another adapter_name=, or delete_adapter() it first."
            )
        spec = {
            "labels": check_labels([config.id2label.get(i) for i in range(config.num_labels)]),
            "use_shared": config.use_shared is not False,
            "pooling": config.pooling or "mean",
            "method": config.method,
        }
        with torch.device("meta"):
            domain, head = self._build_domain(spec)
        expected = {
            key: tuple(tensor.shape)
            for key, tensor in _with_head(domain.state_dict(), head).items()
            if not key.endswith("num_batches_tracked")
        }
        # a headless model reads the classifier's tensors too: adapter_sha256 covers the whole file
        if head is None:
            width = self.config.embedding_size * (2 if spec["pooling"] == "mean_std" else 1)
            classes = len(spec["labels"])
            expected |= {"classifier.weight": (classes, width), "classifier.bias": (classes,)}
        tensors = read_tensors(fetch(source, ADAPTER_WEIGHTS, **where), expected, source)
        if tensors_sha256(tensors) != config.adapter_sha256:
            raise S2EAdapterError(
                f"Adapter {source!r}: the tensors of {ADAPTER_WEIGHTS} are not those its config.json describes "
                "(adapter_sha256 differs): the download is damaged or the file was changed; fetch it again."
            )
        domain, head = domain.to_empty(device="cpu"), head and head.to_empty(device="cpu")
        _fill(domain, head, tensors)
        self._attach(name, spec, domain, head)
        return name

    def _adapter_config(self, source: str, where: dict[str, Any]) -> Any:
        """The config of an adapter repo, once it is clear that it is one and belongs to this base."""
        path = fetch(source, "config.json", **where)
        try:
            config = self.config_class.from_json_file(path)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise S2EAdapterError(f"Adapter {source!r}: config.json cannot be read ({error!s:.200}).") from error
        if not isinstance(config.adapter_sha256, str) or not isinstance(config.base_fingerprint, str):
            raise S2EAdapterError(
                f"{source!r} is not an adapter repo: its config.json has no adapter_sha256 and base_fingerprint."
            )
        if not self.config.adapters:
            kind = "fused" if self.config.fused else "plain"
            raise S2EAdapterError(
                f"Adapter {source!r} needs its base {config.base_model_name_or_path!r}, but this model is {kind} and "
                "takes no adapters; load that base, or call from_pretrained on the adapter repo itself."
            )
        if config.base_fingerprint != self.base_fingerprint:
            raise wrong_base(config, source, self.base_fingerprint)
        return config

    def save_adapter(self, save_directory: str | os.PathLike, adapter_name: str | None = None) -> None:
        """Write one adapter as a complete repo folder: config, tensors, feature extractor, code and a card.

        An existing README.md is kept. The tensors are written last but for the card and in one step.
        """
        name = self._known_domain(adapter_name or self.config.active_domain)
        if name == self.config.base_domain:
            raise S2EAdapterError(f"{name!r} is the base domain, not an adapter: use save_pretrained().")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {key: value.float() for key, value in self.get_adapter_state_dict(name).items()}
        config = self._config_of_adapter(name, folder, tensors_sha256(tensors))
        custom_object_save(self, folder, config=config)
        config.save_pretrained(folder)
        S2EFeatureExtractor.from_model_config(self.config).save_pretrained(folder)
        write_tensors(folder / ADAPTER_WEIGHTS, tensors, {"adapter_name": name})
        card = folder / "README.md"
        if not card.exists():
            card.write_text(_minimal_card(config), encoding="utf-8")

    def _config_of_adapter(self, name: str, folder: Path, sha256: str) -> Any:
        labels, spec = self.config.labels_of(name), self.config.domains[name]
        fields = copy.deepcopy(self.config.to_dict())
        for key in _BASE_ONLY:
            fields.pop(key, None)
        source = self._base_source
        local = source is not None and os.path.isdir(source)
        fields |= {
            "id2label": dict(enumerate(labels)),
            "label2id": {label: i for i, label in enumerate(labels)},
            "base_domain": name,
            "adapter_name": name,
            "adapter_sha256": sha256,
            "base_fingerprint": self.base_fingerprint,
            "base_model_name_or_path": self.config.repo_id if local else source or self.config.repo_id,
            "base_model_revision": self._base_revision,
            "base_local_path": Path(os.path.relpath(source, folder.resolve())).as_posix() if local else None,
            "use_shared": spec.get("use_shared", True),
            "pooling": spec.get("pooling", "mean"),
            "method": spec.get("method"),
        }
        return self.config_class(**fields)

    def push_adapter_to_hub(self, repo_id: str, adapter_name: str | None = None, **kwargs) -> str:
        """Publish one adapter as its own Hub repo, with everything [`save_adapter`] writes.

        Args:
            repo_id: `namespace/name`; made if it is not there.
            **kwargs: `private`, `token`, and those of `HfApi.upload_folder` (`revision`, `create_pr`,
                `commit_message`).

        Returns:
            The URL of the commit, or of the pull request.
        """
        api = HfApi(token=kwargs.pop("token", None))
        private = kwargs.pop("private", None)
        name = self._known_domain(adapter_name or self.config.active_domain)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_adapter(folder, name)
            config_file = Path(folder, "config.json")
            config = self.config_class.from_json_file(config_file)
            config.base_local_path = None  # means nothing elsewhere
            config.to_json_file(config_file, use_diff=True)
            message = kwargs.pop("commit_message", f"Upload adapter {name}")
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message=message, **kwargs
            )
        return commit.pr_url or commit.commit_url

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """As in transformers: the base with all resident adapters, and `preprocessor_config.json` beside it."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            S2EFeatureExtractor.from_model_config(self.config).save_pretrained(save_directory)

    # ---- fuse ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def fuse(self, adapter_name: str | None = None) -> nn.Module:
        """A copy that answers for one domain only, with alpha and batch norm folded into the convolutions.

        `W = (F + alpha) gamma / sqrt(var + eps)`, `b = beta - gamma mean / sqrt(var + eps)`: the same logits, computed
        by a plain network without batch norm.
        """
        if self.config.fused:
            raise S2EAdapterError("This model is fused already.")
        name = self._known_domain(adapter_name or self.config.active_domain)
        labels = self.config.labels_of(name)
        fields = self.config.to_dict() | {
            "fused": True,
            "adapters": False,
            "domains": {name: {**self.config.domains[name], "use_shared": True, "labels": labels}},
            "base_domain": name,
            "active_domain": name,
            "id2label": dict(enumerate(labels)),
            "label2id": {label: i for i, label in enumerate(labels)},
            "repo_id": None,
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


def _fold(conv: nn.Conv2d, domain_conv: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of one convolution that stands for shared filters, alpha and batch norm."""
    weight = conv.weight.double() if domain_conv.use_shared else torch.zeros_like(conv.weight).double()
    if domain_conv.alpha is not None:
        weight = weight + nn.functional.pad(domain_conv.alpha.weight.double(), (conv.padding[0],) * 4)
    bn = domain_conv.bn
    scale = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
    bias = bn.bias.double() - bn.running_mean.double() * scale
    return (weight * scale[:, None, None, None]).float(), bias.float()


def _with_head(tensors: dict[str, torch.Tensor], head: nn.Module | None) -> dict[str, torch.Tensor]:
    head_tensors = {} if head is None else head.state_dict()
    return dict(tensors) | {f"classifier.{key}": tensor for key, tensor in head_tensors.items()}


def _fill(domain: nn.Module, head: nn.Module | None, tensors: dict[str, torch.Tensor]) -> None:
    state = {key: value for key, value in tensors.items() if not key.startswith("classifier.")}
    for key in domain.state_dict():
        if key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(0)
    domain.load_state_dict(state)
    if head is not None:
        head.load_state_dict({key: tensors[f"classifier.{key}"] for key in ("weight", "bias")})


def _minimal_card(config: Any) -> str:
    """A card that says what the repo is and claims nothing; `hf_s2e.hub` writes fuller ones."""
    base = config.base_model_name_or_path
    metadata = ["library_name: transformers", "pipeline_tag: audio-classification"]
    if base:
        metadata += [f"base_model: {base}", "base_model_relation: adapter"]
    metadata += ["tags:", "- s2e", "- speech-emotion-recognition"]
    labels = ", ".join(config.id2label.values())
    return "\n".join(
        [
            "---",
            *metadata,
            "---",
            f"# Adapter {config.adapter_name}",
            "",
            f"A residual adapter for the speaker-trained ResNet20 `{base}`. Classes: {labels}.",
            "",
            "Not evaluated.",
            "",
        ]
    )
