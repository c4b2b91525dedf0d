"""Bases and adapters on disk and on the Hub: load, save, push.

An adapter is a light folder or Hub repo of its own, which names the base it belongs to.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import SAFE_WEIGHTS_NAME, logging
from transformers.utils.hub import extract_commit_hash

from .adapter_files_s2e import (
    ADAPTER_WEIGHTS,
    BAD_CONFIG,
    FETCH_KEYWORDS,
    HUB_FAILURES,
    PLACE_KEYWORDS,
    S2EAdapterError,
    check_adapter_name,
    fetch,
    find_base,
    fingerprint,
    first_names,
    how_to_get,
    one_line,
    place_of,
    read_adapter_config,
    read_tensors,
    tensors_sha256,
    write_tensors,
    wrong_base,
)
from .adapter_layers_s2e import part_of
from .adapters_s2e import S2EAdapterMixin
from .configuration_s2e import DOMAIN_FIELDS, label_maps
from .feature_extraction_s2e import S2EFeatureExtractor

logger = logging.get_logger(__name__)

_HEAD = "classifier."  # the head's tensors in an adapter's file
_COUNTER = "num_batches_tracked"


class S2ESaveAndLoadMixin(S2EAdapterMixin):
    """Reads and writes bases and adapters, and knows which base this model is."""

    _base_source: str | None = None  # where the base was loaded from: a folder (absolute) or a Hub id
    _base_revision: str | None = None  # its commit, where it came from the Hub
    _stored_fingerprint: str | None = None  # the base's, as it is stored there
    _loaded_id: str | None = None  # the Hub id that its config had there

    @property
    def base_fingerprint(self) -> str:
        """SHA-256 of the shared filters, as stored in fp32, and of the front end's settings."""
        shared = without_counters(self.base_model.shared.state_dict())
        if all(tensor.dtype == torch.float32 for tensor in shared.values()):
            return fingerprint(shared, self.config)
        if self._stored_fingerprint is None:
            raise S2EAdapterError(
                "The shared filters are not in float32 and were never loaded from a base, so this model has "
                "no fingerprint; adapters need a base made and stored in float32."
            )
        return self._stored_fingerprint

    def _remember_base(self, source: str, revision: str | None) -> None:
        """Note where this base is stored, and its fingerprint while its weights are as stored there."""
        self._base_source, self._base_revision = source, revision
        if not self.config.fused:
            self._stored_fingerprint = self.base_fingerprint

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *model_args,
        config: Any = None,
        base_model: Any = None,
        dtype: Any = None,
        **kwargs,
    ):
        """Load a base, a fused model, or an adapter repo together with the base it belongs to.

        Args:
            pretrained_model_name_or_path: a folder or a Hub id.
            config: as in transformers.
            base_model: for an adapter repo: its base, as a folder, a Hub id or a model in memory (to which
                the adapter is then added). By default the repo says where its base is.
            dtype: of the parameters. Weights are read and the base's fingerprint is taken in fp32; then
                comes the cast. A model in memory keeps its own.
            **kwargs: as in transformers, and `adapter_name`, as of `load_adapter`.

        Raises:
            S2EAdapterError: an adapter does not fit its base or its base cannot be found; weights are
                damaged; or the repo's config and feature extractor disagree about the front end. A model in
                memory is then as it was.
        """
        source = str(pretrained_model_name_or_path)
        dtype = kwargs.pop("torch_dtype", None) if dtype is None else dtype
        where = place_of(kwargs)
        # also those that are None: what records a base's revision gives it again
        options = {key: value for key, value in kwargs.items() if key not in FETCH_KEYWORDS + PLACE_KEYWORDS}
        if not hasattr(config, "to_dict"):  # not isinstance: remote code has a class of its own
            try:
                config, options = cls.config_class.from_pretrained(
                    config or source, return_unused_kwargs=True, **where, **options
                )
            except HUB_FAILURES as error:  # whose words do not always name the repo
                raise OSError(f"{source!r} cannot be loaded: {one_line(error)}") from error
        _check_front_end(config, source, where)
        if config.is_adapter:
            return cls._adapter_from_pretrained(source, config, base_model, where, options, dtype)
        if base_model is not None:
            raise S2EAdapterError(f"{source!r} is not an adapter repo: base_model= has no meaning for it.")
        return cls._base_from_pretrained(source, model_args, config, where, options, dtype)

    @classmethod
    def _base_from_pretrained(cls, source: str, model_args: tuple, config: Any, where: dict, options: dict, dtype: Any):
        """A base with the adapters saved in it, or a fused model."""
        options["use_safetensors"] = True  # nothing here ever unpickles
        wanted, options["output_loading_info"] = options.get("output_loading_info", False), True
        try:
            model, info = super().from_pretrained(
                source, *model_args, config=config, dtype=torch.float32, **where, **options
            )
        except SafetensorError as error:
            raise S2EAdapterError(
                f"{source!r}: {SAFE_WEIGHTS_NAME} is not a whole safetensors file ({error}); fetch it again."
            ) from error
        except RuntimeError as error:
            if "ignore_mismatched_sizes" not in str(error):
                raise
            raise S2EAdapterError(
                f"{source!r}: the tensors of {SAFE_WEIGHTS_NAME} do not have the shapes that config.json and the "
                "arguments ask for: fetch it again, or pass ignore_mismatched_sizes=True for new ones instead."
            ) from error
        _check_loaded(info, source, new_heads=bool(options.get("ignore_mismatched_sizes")))
        if os.path.isdir(source):
            model._remember_base(os.path.abspath(Path(source, where.get("subfolder", ""))), None)
        else:
            config_file = fetch(source, "config.json", required=False, **where)
            model._remember_base(source, extract_commit_hash(config_file, None))
        model._loaded_id = model.config.repo_id
        model._cast(dtype)
        return (model, info) if wanted else model

    @classmethod
    def _adapter_from_pretrained(
        cls, source: str, config: Any, base_model: Any, where: dict, options: dict, dtype: Any
    ):
        """An adapter repo with its base."""
        adapter = read_adapter_config(cls.config_class, source, where)
        if config.num_labels != adapter.num_labels:
            raise S2EAdapterError(
                f"Adapter {source!r} has {adapter.num_labels} classes, but {config.num_labels} were "
                "asked for: its classes are its own; add_adapter() a new one for others."
            )
        adapter.aggregation, name = config.aggregation, config.adapter_name  # where the caller gave others
        if in_memory := isinstance(base_model, PreTrainedModel):
            model, info = base_model, ()
        else:
            model = cls._base_of_adapter(source, config, base_model, where, options)
            model, *info = model if isinstance(model, tuple) else (model,)  # output_loading_info=True
            model.config.aggregation = adapter.aggregation
            if name in model.adapter_names:  # saved in the base too, as a checkpoint has it
                model.delete_adapter(name)
        model._load_adapter(adapter, source, name, where)
        model.config.update({"id2label": config.id2label, "label2id": config.label2id})
        if not in_memory:
            model._cast(dtype)
        return (model, *info) if info else model

    @classmethod
    def _base_of_adapter(cls, source: str, config: Any, base_model: Any, where: dict, options: dict):
        fetching = {name: value for name, value in where.items() if name in FETCH_KEYWORDS}
        if base_model is None:
            place = find_base(config, source, where.get("subfolder", ""))
        else:
            place = {"pretrained_model_name_or_path": str(base_model)}
        base = place["pretrained_model_name_or_path"]
        try:
            base_config = cls.config_class.from_pretrained(**place, **fetching)
            if base_config.is_adapter:
                raise S2EAdapterError(
                    f"Adapter {source!r} names {base!r} as its base, but that is an adapter too; pass base_model=BASE."
                )
            return cls.from_pretrained(**place, config=base_config, **fetching, **options)
        except HUB_FAILURES as error:
            named = config.base_model_name_or_path or base  # not what the caller may have given instead
            raise S2EAdapterError(
                f"Adapter {source!r} needs the base {named!r} (fingerprint "
                f"{str(config.base_fingerprint)[:12]}), but {base!r} cannot be loaded "
                f"({one_line(error)[:200]}): {how_to_get(config, named)}, or pass base_model= a copy of it."
            ) from error

    def _cast(self, dtype: Any) -> "S2ESaveAndLoadMixin":
        if dtype in (None, "auto"):  # stored in fp32, so that is what "auto" means
            return self
        return self.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        *args,
        push_to_hub: bool = False,
        **kwargs,
    ) -> None:
        """As in transformers: the base, all resident adapters, and `preprocessor_config.json` beside them.

        With half precision or trained shared filters it is another base, of which the adapters of this one know
        nothing: it is saved without this one's id, with a warning. Give it another, `model.config.repo_id`.

        Raises:
            S2EAdapterError: the folder holds an adapter, of which config.json would be lost.
        """
        if Path(save_directory, ADAPTER_WEIGHTS).exists():
            raise S2EAdapterError(
                f"{str(save_directory)!r} holds an adapter ({ADAPTER_WEIGHTS}): save the whole model elsewhere, or "
                "save_adapter() there."
            )
        if push_to_hub:
            hub_names = ("repo_id", "commit_message", "create_pr", "private")
            hub = {name: kwargs.pop(name) for name in hub_names if name in kwargs}
            hub.setdefault("repo_id", Path(save_directory).name)
            if is_main_process:  # saves to a folder of its own, and so uploads the feature extractor too
                self.push_to_hub(**hub, token=kwargs.get("token"))
        known_as = self.config.repo_id
        if self._is_another_base(known_as):
            logger.warning(
                f"This is another base than {known_as or self.name_or_path!r} ({self.dtype}, or trained): adapters "
                "of that one will be refused. To keep them, save the base as it was loaded in float32, or fuse()."
            )
            self.config.repo_id = None
        try:
            super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        finally:
            if self.dtype != torch.float32:  # in memory it still answers for that one
                self.config.repo_id = known_as
        if not is_main_process:
            return
        S2EFeatureExtractor.from_model_config(self.config).save_pretrained(save_directory)
        if not self.config.fused and self.dtype == torch.float32 and not self._stored_somewhere():
            self._remember_base(os.path.abspath(save_directory), None)

    def _is_another_base(self, known_as: str | None) -> bool:
        """Whether adapters of the base that this model was loaded as would be refused by what is saved now."""
        if self.config.fused:
            return False
        if self.dtype != torch.float32:
            return self.config.adapters or known_as is not None
        trained = self._stored_fingerprint not in (None, self.base_fingerprint)
        return trained and known_as is not None and known_as == self._loaded_id

    def _stored_somewhere(self) -> bool:
        """Whether the base that this model is can still be had where it was loaded from or saved to."""
        source = self._base_source
        gone = source is None or (os.path.isabs(source) and not os.path.isdir(source))
        return not gone and self._stored_fingerprint == self.base_fingerprint

    def get_adapter_state_dict(self, adapter_name: str | None = None, **kwargs) -> dict[str, torch.Tensor]:
        """The tensors of one adapter by their names in `adapter.safetensors`; `classifier.*` are its head."""
        name = self._known_domain(adapter_name or self.config.active_domain)
        head = self.heads[name] if hasattr(self, "heads") else None
        return adapter_tensors(self.base_model.domains[name], head)

    def load_adapter(
        self,
        peft_model_id: str | os.PathLike,
        adapter_name: str | None = None,
        revision: str | None = None,
        **kwargs,
    ) -> str:
        """Load an adapter repo onto this base and make it the active one.

        How segments are put together is one setting of the model, for all its domains: an adapter that was
        saved with another `aggregation` is refused.

        Args:
            peft_model_id: a folder or a Hub id (the name is that of transformers' own method).
            adapter_name: the name in this model; by default the one it was saved with.
            revision: branch, tag or commit of the adapter repo.
            **kwargs: `cache_dir`, `force_download`, `local_files_only`, `token`, `subfolder`; others are
                ignored.

        Returns:
            The adapter's name in this model.

        Raises:
            S2EAdapterError: another base or aggregation is needed, the files are missing or damaged, or the
                name is taken. The model is then as it was.
        """
        source = str(peft_model_id)
        where = place_of(kwargs | {"revision": revision})
        return self._load_adapter(read_adapter_config(self.config_class, source, where), source, adapter_name, where)

    def _load_adapter(self, config: Any, source: str, adapter_name: str | None, where: dict[str, Any]) -> str:
        """Load the tensors of an adapter with this config, after everything was checked."""
        self._check_base(config, source)
        name = check_adapter_name(adapter_name or config.adapter_name)
        if name in self.config.domains:
            raise S2EAdapterError(
                f"There is an adapter {name!r} already: pass another adapter_name=, or delete_adapter() it first."
            )
        labels = config.labels_of(config.active_domain)
        spec = config.domains[config.active_domain] | {"labels": labels}
        try:
            with torch.device("meta"):  # shapes only, until the file is known to have them
                domain, head = self.base_model._new_domain(spec, adapted=True), self._new_head(spec, labels)
        except ValueError as error:
            raise S2EAdapterError(f"Adapter {source!r}: its config.json cannot be followed here: {error}") from error
        expected = {key: tuple(tensor.shape) for key, tensor in adapter_tensors(domain, head).items()}
        tensors = read_tensors(fetch(source, ADAPTER_WEIGHTS, **where), expected, source)
        if tensors_sha256(tensors) != config.adapter_sha256:
            raise S2EAdapterError(
                f"Adapter {source!r}: the tensors of {ADAPTER_WEIGHTS} are not those its config.json "
                "describes (adapter_sha256 differs): the download is damaged or the file was changed; fetch "
                "it again."
            )
        _fill(domain.to_empty(device="cpu"), head.to_empty(device="cpu"), tensors)
        self._attach(name, spec, domain, head if hasattr(self, "heads") else None)
        return name

    def _check_base(self, config: Any, source: str) -> None:
        """Raise unless an adapter with this config belongs to this base."""
        if self.config.fused:
            raise S2EAdapterError(
                f"Adapter {source!r} needs its base {config.base_model_name_or_path!r}, but this model is fused and "
                "takes no adapters; load that base, or call from_pretrained on the adapter repo itself."
            )
        if config.backbone != self.config.backbone:
            raise S2EAdapterError(
                f"Adapter {source!r} is for the backbone {config.backbone!r}, but this model is a "
                f"{self.config.backbone!r}: load its base {config.base_model_name_or_path!r}."
            )
        if config.base_fingerprint != self.base_fingerprint:
            raise wrong_base(config, source, self.base_fingerprint)
        if config.front_end != self.config.front_end:
            raise S2EAdapterError(
                f"Adapter {source!r}: its config.json has another front end ({config.front_end}) than its "
                f"base ({self.config.front_end}): the file was changed; fetch it again."
            )
        if config.aggregation != self.config.aggregation:
            raise S2EAdapterError(
                f"Adapter {source!r} was saved with aggregation={config.aggregation!r}, but this model has "
                f"{self.config.aggregation!r}, for all its domains: set model.config.aggregation first, or load the "
                "adapter with a base of its own, by from_pretrained."
            )

    def save_adapter(self, save_directory: str | os.PathLike, adapter_name: str | None = None) -> None:
        """Write one adapter as a complete repo folder: config, tensors, feature extractor, code and a card.

        An existing README.md is kept. The tensors are written after the config that has their hash, so that a
        half-written repo is never taken for a whole one.
        """
        name = self._known_domain(adapter_name or self.config.active_domain)
        if name == self.config.base_domain:
            raise S2EAdapterError(f"{name!r} is the base domain, not an adapter: use save_pretrained().")
        if not hasattr(self, "heads"):
            raise S2EAdapterError(
                f"{type(self).__name__} has no classifiers, and an adapter consists of one, too: save it "
                "from S2EForAudioClassification."
            )
        if self._stored_fingerprint not in (None, self.base_fingerprint):
            raise S2EAdapterError(
                "The shared filters have changed since this base was loaded, so nobody else has the base "
                "that this adapter needs: save_pretrained() it first."
            )
        folder = Path(save_directory)
        if (folder / SAFE_WEIGHTS_NAME).exists():
            raise S2EAdapterError(f"{str(folder)!r} holds a base ({SAFE_WEIGHTS_NAME}): save the adapter elsewhere.")
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {key: value.float() for key, value in self.get_adapter_state_dict(name).items()}
        config = self._config_of_adapter(name, folder)
        config.adapter_sha256 = tensors_sha256(tensors)
        custom_object_save(self, folder, config=config)
        config.save_pretrained(folder)
        S2EFeatureExtractor.from_model_config(self.config).save_pretrained(folder)
        write_tensors(folder / ADAPTER_WEIGHTS, tensors)
        card = folder / "README.md"
        if not card.exists():
            card.write_text(_minimal_card(config), encoding="utf-8")

    def _config_of_adapter(self, name: str, folder: Path) -> Any:
        spec, source = self.config.domains[name], self._base_source
        local = source is not None and os.path.isabs(source)
        fields = self.config.to_dict() | {
            "adapter_name": name,
            "base_model_name_or_path": self.config.repo_id if local or source is None else source,
            "base_model_revision": self._base_revision,
            "base_local_path": None,
            "base_fingerprint": self.base_fingerprint,
            "use_shared": True,
            "pooling": "mean",
            **{key: spec[key] for key in DOMAIN_FIELDS if key in spec},
            **label_maps(self.config.labels_of(name)),
        }
        if local and os.path.isdir(source):
            fields["base_local_path"] = Path(os.path.relpath(source, folder.resolve())).as_posix()
        for key in ("architectures", "dtype"):  # of a file with the whole model
            fields.pop(key, None)
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
        with tempfile.TemporaryDirectory() as folder:
            self.save_adapter(folder, name)
            config_file = Path(folder, "config.json")
            config = self.config_class.from_json_file(config_file)
            if config.base_model_name_or_path is None:
                raise S2EAdapterError(
                    "The base of this adapter has no Hub id, so nobody could load the adapter: push_to_hub() "
                    "the base first and set model.config.repo_id to its id."
                )
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            place = {"repo_id": repo_id, "revision": kwargs.get("revision")}
            _refuse_repo_with(SAFE_WEIGHTS_NAME, "a base", api, place)
            config.base_local_path = None  # means nothing elsewhere
            config.to_json_file(config_file, use_diff=True)
            if api.file_exists(filename="README.md", **place) and not self._is_minimal_card(api, place):
                Path(folder, "README.md").unlink()  # its owner's card says more than the minimal one
            message = kwargs.pop("commit_message", f"Upload adapter {name}")
            commit = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message, **kwargs)
        return commit.pr_url or commit.commit_url

    def _is_minimal_card(self, api: HfApi, place: dict[str, Any]) -> bool:
        """Whether the card of a repo is, to the letter, the one that was written for the adapter there."""
        card, file = (api.hf_hub_download(filename=name, **place) for name in ("README.md", "config.json"))
        try:
            return Path(card).read_text(encoding="utf-8") == _minimal_card(self.config_class.from_json_file(file))
        except BAD_CONFIG:
            return False

    def push_to_hub(self, repo_id: str, **kwargs) -> str:
        """As in transformers: the base and all resident adapters, as one repo.

        Raises:
            S2EAdapterError: the repo is an adapter's: see [`push_adapter_to_hub`].
        """
        api = HfApi(token=kwargs.get("token"))
        repo_id = api.create_repo(repo_id, private=kwargs.get("private"), exist_ok=True).repo_id
        place = {"repo_id": repo_id, "revision": kwargs.get("revision")}
        _refuse_repo_with(ADAPTER_WEIGHTS, "an adapter", api, place)
        return super().push_to_hub(repo_id, **kwargs)


def without_counters(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All but batch norm's counts of batches, which nothing reads."""
    return {key: value for key, value in tensors.items() if not key.endswith(_COUNTER)}


def adapter_tensors(domain: nn.Module, head: nn.Module | None) -> dict[str, torch.Tensor]:
    """What `adapter.safetensors` holds. Batch norm's counters are left out: nothing reads them."""
    tensors = without_counters(domain.state_dict())
    own = without_counters(head.state_dict()) if head else {}
    return tensors | {_HEAD + key: value for key, value in own.items()}


def _fill(domain: nn.Module, head: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """The inverse of `adapter_tensors`."""
    of_head = {key.removeprefix(_HEAD): value for key, value in tensors.items() if key.startswith(_HEAD)}
    of_domain = {key: value for key, value in tensors.items() if not key.startswith(_HEAD)}
    for module, own in ((domain, of_domain), (head, of_head)):
        counters = {key: torch.tensor(0) for key in module.state_dict() if key.endswith(_COUNTER)}
        module.load_state_dict(own | counters)


def _refuse_repo_with(weights: str, what: str, api: HfApi, place: dict[str, Any]) -> None:
    """One repo holds a base or an adapter: the other's config.json would take the place of its own."""
    if api.file_exists(filename=weights, **place):
        raise S2EAdapterError(f"{place['repo_id']!r} holds {what} ({weights}): push to another repo.")


def _minimal_card(config: Any) -> str:
    """A card that says what the repo is and claims nothing; `hf_s2e.hub.cards` writes fuller ones."""
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
            f"A residual adapter for a speaker-trained ResNet20{f' (`{base}`)' if base else ''}.",
            f"Classes: {labels}.",
            "",
            "Not evaluated.",
            "",
        ]
    )


def _check_loaded(info: dict[str, Any], source: str, *, new_heads: bool) -> None:
    """Raise where a file did not have exactly the tensors of the network: transformers would draw those that it lacks.

    Args:
        info: transformers' loading info.
        new_heads: classifiers of another size were asked for, and begin anew.
    """
    missing = sorted(name for name in info["missing_keys"] if not name.endswith(_COUNTER))
    if new_heads:
        missing = [name for name in missing if part_of(name) != "fc"]
    unexpected = sorted(info["unexpected_keys"])
    changed = [name for name, *_ in info["mismatched_keys"] if part_of(name) != "fc"]
    if missing or unexpected or changed:
        raise S2EAdapterError(
            f"{source!r}: {SAFE_WEIGHTS_NAME} does not hold the network that config.json describes: missing tensors "
            f"{first_names(missing)}, unknown tensors {first_names(unexpected)}, tensors of another shape "
            f"{first_names(changed)}; fetch it again."
        )


def _check_front_end(config: Any, source: str, where: dict) -> None:
    if fetch(source, "preprocessor_config.json", required=False, **where) is None:
        return
    extractor = S2EFeatureExtractor.from_pretrained(source, **where)
    differing = [
        f"{name} is {getattr(extractor, name)!r} there and {value!r} here"
        for name, value in config.front_end.items()
        if getattr(extractor, name) != value
    ]
    if differing:
        raise S2EAdapterError(
            f"{source!r}: preprocessor_config.json and config.json disagree about the front end "
            f"({'; '.join(differing)})"
            "; write both from one config with S2EFeatureExtractor.from_model_config(config)."
        )
