"""One folder with a base, a fused model or an adapter: what it is, read once, and whether it is whole."""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_NAME as BASE_WEIGHTS

from ..model.adapter_files_s2e import (
    ADAPTER_WEIGHTS,
    BAD_CONFIG,
    S2EAdapterError,
    find_base,
    fingerprint,
    read_adapter_config,
    read_tensors,
    tensors_sha256,
)
from ..model.atomic_write_s2e import atomic_write
from ..model.configuration_s2e import S2EConfig
from ..model.feature_extraction_s2e import S2EFeatureExtractor
from ..model.modeling_s2e import S2EForAudioClassification

CONFIG, PREPROCESSOR, TRAINING, CARD = "config.json", "preprocessor_config.json", "training.json", "README.md"
OWN_NAMESPACE = "your-name"  # of a repo whose base has no Hub id yet
SHOWN = 3  # names in a message or in a line of a card
_COUNTER = "num_batches_tracked"
_STATISTICS = ("running_mean", "running_var", _COUNTER)  # of batch norm: measured, not trained
_SHARED = "s2e.shared."


class Repo:
    """A base, a fused model or an adapter in a folder. What is read is kept: make a new one where files changed.

    >>> repo = Repo("hub_cards/s2e-emodb")
    >>> repo.kind, repo.labels[:2], repo.base.kind
    ('adapter', ['neutral', 'angry'], 'base')
    >>> repo.check(repo.base)  # raises where one of them is not whole, or they are incompatible

    Its properties raise S2EAdapterError where a file is damaged or of another kind of model, and ValueError where
    there is no config.json.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self._resolved = self.folder.resolve()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.folder)!r})"

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Repo) and self._resolved == other._resolved

    def __hash__(self) -> int:
        return hash(self._resolved)

    # ---- what it is

    @property
    def name(self) -> str:
        return self._resolved.name

    @property
    def is_adapter(self) -> bool:
        return (self.folder / ADAPTER_WEIGHTS).is_file()

    @property
    def kind(self) -> str:
        """`base`, `plain base`, `fused` or `adapter`."""
        if self.is_adapter:
            return "adapter"
        return "fused" if self.config.fused else "base" if self.config.adapters else "plain base"

    @cached_property
    def raw_config(self) -> dict[str, Any]:
        """config.json as it stands there."""
        path = self.folder / CONFIG
        if not path.is_file():
            raise ValueError(f"{self.folder}: no {CONFIG} in this folder; expected that of a base or of an adapter.")
        return _read_object(path)

    @cached_property
    def config(self) -> S2EConfig:
        """The config, checked; transformers itself would take any model's."""
        found = self.raw_config.get("model_type")
        if found != S2EConfig.model_type:
            raise S2EAdapterError(f"{self.folder}: a model of type {found!r}; expected 's2e', made with this package.")
        try:
            return S2EConfig.from_json_file(self.folder / CONFIG)
        except BAD_CONFIG as error:
            raise _damaged(self.folder / CONFIG, error) from error

    @property
    def labels(self) -> list[str]:
        """The classes of the active domain, in the order of the logits."""
        return self.config.labels_of(self.config.active_domain)

    @property
    def fingerprint(self) -> str | None:
        """Of a base its own, of an adapter that of the base it needs; a fused model has none."""
        if self.is_adapter:
            return self.config.base_fingerprint
        return None if self.config.fused else self._own_fingerprint

    @cached_property
    def _own_fingerprint(self) -> str:
        with self._opened("pt") as file:
            names = [n for n in file.keys() if n.startswith(_SHARED) and not n.endswith(_COUNTER)]  # noqa: SIM118
            shared = {name.removeprefix(_SHARED): file.get_tensor(name) for name in names}
        return fingerprint(shared, self.config)

    @cached_property
    def base(self) -> "Repo | None":
        """An adapter's base, where there is one on this machine.

        Raises:
            S2EAdapterError: there is none, and config.json does not say which it needs.
        """
        if not self.is_adapter:
            return None
        folder = Path(find_base(self.config, str(self.folder))["pretrained_model_name_or_path"])
        return Repo(folder) if folder.is_absolute() and folder.is_dir() else None

    @property
    def hub_id(self) -> str:
        """The Hub id by which its card names it until a push gives it another."""
        base = self.config.repo_id or self.config.base_model_name_or_path or ""
        return f"{base.rpartition('/')[0] or OWN_NAMESPACE}/{self.name}"

    # ---- its weights

    @property
    def weights(self) -> Path:
        return self.folder / (ADAPTER_WEIGHTS if self.is_adapter else BASE_WEIGHTS)

    @property
    def weights_bytes(self) -> int:
        return self.weights.stat().st_size

    @property
    def parameters(self) -> int:
        """Numbers in the file that a training may change: all but the statistics of batch norm."""
        return sum(math.prod(shape) for name, shape in self._header.items() if not name.endswith(_STATISTICS))

    @cached_property
    def _header(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of each tensor in the file."""
        with self._opened("np") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118

    @contextmanager
    def _opened(self, framework: str) -> Iterator[Any]:
        try:
            with safe_open(self.weights, framework=framework) as file:
                yield file
        except (SafetensorError, OSError) as error:
            raise S2EAdapterError(
                f"{self.weights} is not a whole safetensors file ({error}); fetch it again."
            ) from error

    def check(self, base: "Repo | None" = None) -> None:
        """Compare the weights with what config.json says of them; no network is loaded.

        Args:
            base: an adapter's base, to be checked with it.

        Raises:
            S2EAdapterError: a tensor is missing, unexpected or of another shape, the checksum differs, the two JSON
                files disagree about the front end, or the base is incompatible with the adapter.
        """
        if self.config.is_adapter != self.is_adapter:
            found, described = ("holds", "a base") if self.is_adapter else ("lacks", "an adapter")
            raise S2EAdapterError(f"{self.folder} {found} {ADAPTER_WEIGHTS}, but its {CONFIG} describes {described}.")
        self._check_front_end()
        if self.is_adapter:
            self._check_adapter()
        else:
            self._check_network()
        if base is not None:
            self._check_base(base)

    def _check_front_end(self) -> None:
        if not (self.folder / PREPROCESSOR).is_file():
            return
        try:
            extractor = S2EFeatureExtractor.from_pretrained(self.folder)
        except BAD_CONFIG as error:
            raise _damaged(self.folder / PREPROCESSOR, error) from error
        if differing := [name for name, value in self.config.front_end.items() if getattr(extractor, name) != value]:
            raise S2EAdapterError(
                f"{self.folder}: {PREPROCESSOR} and {CONFIG} disagree about the front end ({first_of(differing)}); "
                "write both from one config with S2EFeatureExtractor.from_model_config(config)."
            )

    def _check_adapter(self) -> None:
        config = read_adapter_config(S2EConfig, str(self.folder), {})
        tensors = read_tensors(self.weights, self._described(), str(self.folder))
        if tensors_sha256(tensors) != config.adapter_sha256:
            raise S2EAdapterError(
                f"{self.weights}: the tensors are not those that {CONFIG} describes (adapter_sha256 differs): the "
                "file is damaged or was changed; fetch it again."
            )

    def _check_network(self) -> None:
        described, found = self._described(), self._header
        wrong = {
            "missing": described.keys() - found.keys(),
            "unexpected": found.keys() - described.keys(),
            "of another shape": {name for name, shape in described.items() if found.get(name, shape) != shape},
        }
        if problems := [f"{what} {first_of(sorted(names))}" for what, names in wrong.items() if names]:
            raise S2EAdapterError(
                f"{self.weights}: the tensors are not those that {CONFIG} describes ({'; '.join(problems)}): fetch it "
                "again, or save it anew from the whole model."
            )

    def _described(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of each tensor that config.json asks for."""
        try:
            with torch.device("meta"):  # allocates nothing
                model = S2EForAudioClassification(self.config)
        except BAD_CONFIG as error:
            raise _damaged(self.folder / CONFIG, error) from error
        tensors = model.get_adapter_state_dict() if self.is_adapter else model.state_dict()
        return {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def _check_base(self, base: "Repo") -> None:
        if base.is_adapter:
            raise S2EAdapterError(f"{self.folder} names {base.folder} as its base, but that is an adapter too.")
        base.check()
        if base.fingerprint != self.fingerprint:
            raise S2EAdapterError(
                f"{self.folder} is incompatible with the base {base.folder}: expected the fingerprint "
                f"{str(self.fingerprint)[:12]}, found {str(base.fingerprint)[:12]}; that base was changed or is "
                "another one."
            )

    # ---- its training and results

    @cached_property
    def training(self) -> dict[str, Any]:
        """What training.json says, see cards.py; empty where there is none."""
        path = self.folder / TRAINING
        return _read_object(path) if path.is_file() else {}

    def write_training(self, facts: Mapping[str, Any]) -> None:
        text = json.dumps(dict(facts), indent=2, ensure_ascii=False)
        with atomic_write(self.folder / TRAINING) as partial:
            partial.write_text(text + "\n", encoding="utf-8")
        self.training = dict(facts)

    @property
    def results(self) -> Path | None:
        """The summary.json that training.json names; what was published or copied goes without it."""
        named = self.training.get("results")
        return self.folder / named if named else None


def as_repo(repo: Repo | str | os.PathLike) -> Repo:
    return repo if isinstance(repo, Repo) else Repo(repo)


def find_repos(folder: Repo | str | os.PathLike) -> list[Repo]:
    """The folder itself, if it is a repo, or the repos right inside it: bases first, then adapters, by name.

    Raises:
        ValueError: neither.
    """
    given = as_repo(folder)
    places = [given] if (given.folder / CONFIG).is_file() else [Repo(path) for path in given.folder.glob("*/")]
    repos = [repo for repo in places if repo.weights.is_file()]
    if not repos:
        raise ValueError(
            f"{given.folder}: no repo here; expected {CONFIG} beside {BASE_WEIGHTS} (a base) or {ADAPTER_WEIGHTS} "
            "(an adapter), in this folder or in those inside it."
        )
    return sorted(repos, key=lambda repo: (repo.is_adapter, repo.name))


def first_of(names: Iterable[str]) -> str:
    """The first of them, in words: a message is one line."""
    names = list(names)
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _read_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, error) from error
    if not isinstance(found, dict):
        raise _damaged(path, "it holds no object")
    return found


def _damaged(path: Path, why: Any) -> S2EAdapterError:
    return S2EAdapterError(f"{path.parent}: {path.name} is damaged ({' '.join(str(why).split())}); fetch it again.")
