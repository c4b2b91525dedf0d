"""Adapter repos: load, save, push. Each is one light folder or Hub repo that names the base it belongs to."""

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from torch import nn
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import SAFE_WEIGHTS_NAME, logging

from .adapter_files_s2e import (
    ADAPTER_WEIGHTS,
    BAD_CONFIG,
    S2EAdapterError,
    check_adapter_name,
    fetch,
    fingerprint,
    place_of,
    read_adapter_config,
    read_tensors,
    tensors_sha256,
    write_tensors,
    wrong_base,
)
from .adapters_s2e import S2EAdapterMixin
from .configuration_s2e import label_maps
from .feature_extraction_s2e import S2EFeatureExtractor

logger = logging.get_logger(__name__)

_HEAD = "classifier."  # the head's tensors in an adapter's file
_COUNTER = "num_batches_tracked"


class S2EAdapterReposMixin(S2EAdapterMixin):
    """Reads and writes adapters, and knows which base this model is."""

    _base_source: str | None = None  # where the base was loaded from: a folder (absolute) or a Hub id
    _base_revision: str | None = None  # its commit, where it came from the Hub
    _stored_fingerprint: str | None = None  # the base's, as it is stored there
    _loaded_id: str | None = None  # the Hub id that its config had there

    @property
    def base_fingerprint(self) -> str:
        """SHA-256 of the shared filters, as stored in fp32, and of the front end's settings."""
        shared = self.base_model.shared.state_dict()
        if all(tensor.dtype == torch.float32 for tensor in shared.values()):
            return fingerprint(shared, self.config.front_end)
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
        with torch.device("meta"):  # shapes only, until the file is known to have them
            domain = self.base_model._new_domain(spec)
            head = self._new_head(spec, labels)
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
        if not self.config.adapters:
            kind = "fused" if self.config.fused else "plain"
            raise S2EAdapterError(
                f"Adapter {source!r} needs its base {config.base_model_name_or_path!r}, but this model is "
                f"{kind} and takes no adapters; load that base, or call from_pretrained on the adapter repo "
                "itself."
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
            "use_shared": spec.get("use_shared", True),
            "pooling": spec.get("pooling", "mean"),
            "method": spec.get("method"),
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
        if self.config.adapters and self.dtype == torch.float32 and not self._stored_somewhere():
            self._remember_base(os.path.abspath(save_directory), None)

    def _is_another_base(self, known_as: str | None) -> bool:
        """Whether adapters of the base that this model was loaded as would be refused by what is saved now."""
        if not self.config.adapters or self.dtype != torch.float32:
            return self.config.adapters
        trained = self._stored_fingerprint not in (None, self.base_fingerprint)
        return trained and known_as is not None and known_as == self._loaded_id

    def _stored_somewhere(self) -> bool:
        """Whether the base that this model is can still be had where it was loaded from or saved to."""
        source = self._base_source
        gone = source is None or (os.path.isabs(source) and not os.path.isdir(source))
        return not gone and self._stored_fingerprint == self.base_fingerprint


def adapter_tensors(domain: nn.Module, head: nn.Module | None) -> dict[str, torch.Tensor]:
    """What `adapter.safetensors` holds. Batch norm's counters are left out: nothing reads them."""
    tensors = {key: value for key, value in domain.state_dict().items() if not key.endswith(_COUNTER)}
    return tensors | {_HEAD + key: value for key, value in (head.state_dict() if head else {}).items()}


def _fill(domain: nn.Module, head: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """The inverse of `adapter_tensors`."""
    counters = {key: torch.tensor(0) for key in domain.state_dict() if key.endswith(_COUNTER)}
    own = {key: value for key, value in tensors.items() if not key.startswith(_HEAD)}
    domain.load_state_dict(own | counters)
    head.load_state_dict({key.removeprefix(_HEAD): value for key, value in tensors.items() if key.startswith(_HEAD)})


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
