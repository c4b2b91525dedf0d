"""Fetching and finding bases and adapters on the Hugging Face Hub; publishing them is in push.py.

Tokens come from where huggingface_hub looks for them (`hf auth login`, HF_TOKEN) or from a `token=` argument;
they are handed on to it and neither printed nor written.
"""

import argparse
import contextlib
import json
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..model.adapter_files_s2e import (
    ADAPTER_WEIGHTS,
    BAD_CONFIG,
    S2EAdapterError,
    check_revision,
    find_base,
    httpx,
    tensors_sha256,
)
from ..model.configuration_s2e import S2EConfig
from .cards import BASE_WEIGHTS, fingerprint_of, is_adapter

PULLED = ("*.json", "*.safetensors", "*.md", "*.py", "LICENSE")  # no pickle, whatever a repo holds
_FAILURES = (HfHubHTTPError, EntryNotFoundError, OfflineModeIsEnabled, httpx.HTTPError)
BASE_FILES = ("config.json", "preprocessor_config.json", BASE_WEIGHTS)


class S2EHubError(OSError):
    """The Hub refused, or could not be reached; one line that says what to do."""


@contextlib.contextmanager
def asking_the_hub(doing: str):
    """Turn what huggingface_hub raises inside into one line that begins with `doing`."""
    try:
        yield
    except (*_FAILURES, RuntimeError) as error:  # an upload's failure comes wrapped in a RuntimeError
        failure = error.__cause__ if isinstance(error, RuntimeError) else error
        if not isinstance(failure, _FAILURES):
            raise
        raise S2EHubError(f"{doing}: {_reason(failure)}") from error


def _reason(error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, GatedRepoError):
        return "the repo is gated; ask for access on its page, and log in with `hf auth login`."
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such repo, or it is private; `hf auth login` as one who may see it."
    if isinstance(error, RevisionNotFoundError):
        return "the repo has no such branch, tag or commit."
    if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
        return "the Hub cannot be reached, or HF_HUB_OFFLINE is set, and the cache does not hold it."
    if status == 401:
        return "the Hub does not accept the token, or there is none: `hf auth login`, or set HF_TOKEN."
    if status == 403:
        return "the token may not do that: log in with one that may write to this namespace."
    said = " ".join(str(error).split())[:300] or type(error).__name__
    return f"{said.rstrip('.')}; try again, what is finished is not sent twice."


# ---- repos on disk


def read_config(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise S2EAdapterError(f"{folder}: config.json holds a {type(config).__name__}, but must hold an object.")
    return config


def local_base(folder: Path) -> Path | None:
    """The folder of an adapter's base, where there is one on this machine."""
    if not is_adapter(folder):
        return None
    place = find_base(S2EConfig.from_json_file(folder / "config.json"), str(folder))
    base = Path(place["pretrained_model_name_or_path"])
    return base if base.is_absolute() and base.is_dir() else None


def check_repo(folder: Path, base: Path | None = None) -> None:
    """Raise S2EAdapterError where a repo's weights are not what its config says.

    Args:
        base: the folder of an adapter's base, which must have the fingerprint that the adapter asks for.
    """
    weights = folder / (ADAPTER_WEIGHTS if is_adapter(folder) else BASE_WEIGHTS)
    try:
        tensors = load_file(weights)
    except (SafetensorError, OSError) as error:
        raise S2EAdapterError(f"{weights} is not a whole safetensors file ({error}).") from error
    if not is_adapter(folder):
        return
    config = read_config(folder)
    if tensors_sha256(tensors) != config.get("adapter_sha256"):
        raise S2EAdapterError(
            f"{weights}: the tensors are not those that config.json describes (adapter_sha256 differs): the "
            "file is damaged or was changed."
        )
    if base is not None:
        found = fingerprint_of(base / BASE_WEIGHTS, S2EConfig.from_json_file(base / "config.json"))
        if found != config.get("base_fingerprint"):
            raise S2EAdapterError(
                f"{folder} needs a base with the fingerprint {str(config.get('base_fingerprint'))[:12]}, "
                f"but {base} has {found[:12]}: that base was changed or is damaged."
            )


# ---- pull


def pull(
    repo_id: str,
    *,
    revision: str | None = None,
    to: str | os.PathLike | None = None,
    token: str | None = None,
) -> Path:
    """Download a base, or an adapter together with its base at the revision recorded in the adapter.

    Args:
        revision: branch, tag or commit of `repo_id`; never handed on to the base.
        to: a folder that gets one folder for each repo, which then work without the Hub and its cache. By
            default they go to the Hub's cache, from where `from_pretrained(repo_id)` takes them, offline too;
            a base that is there already is not asked for again.

    Returns:
        The folder of `repo_id`.

    Raises:
        S2EHubError: the Hub refused or could not be reached. A pull that broke off can be repeated.
        S2EAdapterError: what arrived is damaged (twice: it is fetched again once), or no adapter's.
        FileExistsError: the base's folder in `to` holds another base, which other adapters there may need.
    """
    validate_repo_id(repo_id)
    check_revision(revision)
    try:
        return _pull(repo_id, revision, to, token, force=False)
    except S2EAdapterError:  # a damaged file would stay in the cache
        return _pull(repo_id, revision, to, token, force=True)


def _pull(repo_id: str, revision: str | None, to, token: str | None, *, force: bool) -> Path:
    folder, base = _download(repo_id, revision, to, token, force), None
    if is_adapter(folder):
        config = read_config(folder)
        base_id, commit = config.get("base_model_name_or_path"), config.get("base_model_revision")
        if not isinstance(base_id, str) or base_id == repo_id:
            raise S2EAdapterError(f"Adapter {repo_id!r} names the base {base_id!r}: that cannot be one.")
        check_revision(commit)
        if to is not None:
            _check_place(_place(base_id, to), folder, str(config.get("base_fingerprint")))
        base = (None if force or to else _in_cache(base_id, commit)) or _download(base_id, commit, to, token, force)
    check_repo(folder, base)
    return folder


def _place(repo_id: str, to: str | os.PathLike) -> Path:
    return Path(to, repo_id.rpartition("/")[2])


def _check_place(place: Path, adapter: Path, fingerprint: str) -> None:
    """Raise FileExistsError where an adapter's base would be written over another base, or over the adapter."""
    try:
        found = fingerprint_of(place / BASE_WEIGHTS, S2EConfig.from_json_file(place / "config.json"))
    except (*BAD_CONFIG, SafetensorError):  # nothing there, or not whole
        found = fingerprint
    if place.resolve() == adapter.resolve() or found != fingerprint:
        what = "the adapter itself" if found == fingerprint else f"another base (fingerprint {found[:12]})"
        raise FileExistsError(f"{place} holds {what}, not the base of {adapter.name}: pull into another folder.")


def _in_cache(base_id: str, commit: str | None) -> Path | None:
    """The folder of a base that is wholly in the cache; only a commit names something that cannot change."""
    found = commit and [try_to_load_from_cache(base_id, name, revision=commit) for name in BASE_FILES]
    return Path(found[0]).parent if found and all(isinstance(path, str) for path in found) else None


def _download(repo_id: str, revision: str | None, to, token: str | None, force: bool) -> Path:
    with asking_the_hub(f"cannot pull {repo_id}" + (f" at {revision}" if revision else "")):
        found = snapshot_download(
            repo_id,
            revision=revision,
            local_dir=None if to is None else _place(repo_id, to),
            token=token,
            allow_patterns=list(PULLED),
            force_download=force,
        )
    if not Path(found, "config.json").is_file():
        raise S2EHubError(f"cannot pull {repo_id}: it has no config.json, so it is no base and no adapter.")
    return Path(found)


# ---- list


@dataclass
class AdapterEntry:
    """One adapter on the Hub, by its card and config; `problem` says why some of it is missing."""

    repo_id: str
    commit: str
    base: str | None
    base_revision: str | None = None
    method: str | None = None
    labels: list[str] = field(default_factory=list)
    results: dict[str, float] = field(default_factory=dict)  # "dataset metric" -> percent
    problem: str | None = None


def list_adapters(
    base: str | os.PathLike | None = None, *, token: str | None = None, limit: int | None = None
) -> list[AdapterEntry]:
    """The adapters on the Hub whose cards name this base (a Hub id, or a base's folder), or any base.

    Raises:
        ValueError: a folder whose config has no repo_id.
        S2EHubError: the Hub refused or could not be reached.
    """
    if base is not None and os.path.isdir(base):
        folder, base = base, read_config(Path(base)).get("repo_id")
        if base is None:
            raise ValueError(f"{folder}: its config.json has no repo_id, so no adapter on the Hub can name it.")
    tag = "s2e" if base is None else f"base_model:adapter:{base}"
    with asking_the_hub("cannot list the adapters" + (f" of {base}" if base else "")):
        found = list(HfApi(token=token).list_models(filter=tag, cardData=True, full=True, limit=limit))
    adapters = [info for info in found if (info.card_data or {}).get("base_model_relation") == "adapter"]
    return [_entry(info, token) for info in adapters]


def _entry(info: Any, token: str | None) -> AdapterEntry:
    card = info.card_data
    results = {
        f"{result.dataset_name} {result.metric_name or result.metric_type}": result.metric_value
        for result in card.eval_results or []
    }
    entry = AdapterEntry(info.id, info.sha, card.base_model, results=results)
    try:
        with asking_the_hub("config.json"):
            file = hf_hub_download(info.id, "config.json", revision=info.sha, token=token)
        config = S2EConfig.from_json_file(file)
        entry.labels = [config.id2label[i] for i in range(config.num_labels)]
    except (*BAD_CONFIG, S2EAdapterError) as error:  # anybody's config: one must not hide the others
        entry.problem = f"config.json cannot be read ({type(error).__name__}: {error})"
        return entry
    entry.base_revision, entry.method = config.base_model_revision, config.method
    return entry


# ---- s2e pull, s2e adapters


def add_pull_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("repo", metavar="REPO", help="Hub id of a base or an adapter")
    parser.add_argument("--revision", help="branch, tag or commit")
    parser.add_argument("--to", metavar="DIR", help="folder that gets one folder for each repo; by default the cache")


def run_pull(args: argparse.Namespace) -> int:
    print(pull(args.repo, revision=args.revision, to=args.to))
    return 0


def add_adapters_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", nargs="?", metavar="BASE", help="Hub id or folder of a base; by default any")
    parser.add_argument("--json", action="store_true", help="print a JSON list")


def run_adapters(args: argparse.Namespace) -> int:
    adapters = list_adapters(args.base)
    if args.json:
        print(json.dumps([asdict(adapter) for adapter in adapters], indent=2, ensure_ascii=False))
        return 0
    for adapter in adapters:
        results = ", ".join(f"{name} {value}" for name, value in adapter.results.items()) or "not evaluated"
        print(f"{adapter.repo_id}  {', '.join(adapter.labels)}  {results}  (base {adapter.base})")
        if adapter.problem:
            print(f"  {adapter.problem}", file=sys.stderr)
    if not adapters:
        print("no adapters found", file=sys.stderr)
    return 0
