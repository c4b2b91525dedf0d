"""Fetching from the Hugging Face Hub: one repo, or an adapter with its base (`pull`)."""

import os
from pathlib import Path

from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..model.adapter_files_s2e import S2EAdapterError, check_revision
from .errors import S2EHubError, asking_the_hub
from .repo import BASE_WEIGHTS, CONFIG, PREPROCESSOR, Repo

READ = ("*.json", "*.safetensors", "*.md")  # no pickle, whatever a repo holds
PULLED = (*READ, "*.py", "LICENSE")
BASE_FILES = (CONFIG, PREPROCESSOR, BASE_WEIGHTS)


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
        S2EAdapterError: what arrived is damaged (twice: it is fetched again once), has tensors that its config does
            not describe, or is no adapter's.
        FileExistsError: the base's folder in `to` holds another repo, which other adapters there may need.
    """
    validate_repo_id(repo_id)
    check_revision(revision)
    try:
        return _pull(repo_id, revision, to, token, force=False).folder
    except S2EAdapterError:  # a damaged file would stay in the cache
        return _pull(repo_id, revision, to, token, force=True).folder


def fetch_repo(source: str) -> Repo:
    """The repo in a folder, or the one at a Hub id, which is fetched into the cache without its code and its base.

    Raises:
        ValueError: there is no such folder, and this cannot be a Hub id.
        S2EHubError: there is no such folder, and the Hub refused or could not be reached.
    """
    if os.path.isdir(source):
        return Repo(source)
    try:
        validate_repo_id(source)
    except HFValidationError as error:
        raise ValueError(f"{source}: no such folder, and no Hub id, which is 'name' or 'namespace/name'.") from error
    with asking_the_hub(f"{source}: no such folder, and it cannot be fetched"):
        return Repo(snapshot_download(source, allow_patterns=list(READ)))


def _pull(repo_id: str, revision: str | None, to, token: str | None, *, force: bool) -> Repo:
    repo, base = _download(repo_id, revision, to, token, force), None
    if repo.is_adapter:
        base_id, commit = repo.config.base_model_name_or_path, repo.config.base_model_revision
        if base_id in (None, repo_id):
            raise S2EAdapterError(f"Adapter {repo_id!r} names the base {base_id!r}: that cannot be one.")
        check_revision(commit)
        if to is not None:
            _check_place(_place(base_id, to), repo)
        base = (None if force or to else _in_cache(base_id, commit)) or _download(base_id, commit, to, token, force)
    repo.check(base)
    return repo


def _place(repo_id: str, to: str | os.PathLike) -> Repo:
    return Repo(Path(to, repo_id.rpartition("/")[2]))


def _check_place(place: Repo, adapter: Repo) -> None:
    """Raise FileExistsError where an adapter's base would be written over another repo."""
    wanted = adapter.fingerprint
    try:
        found = place.fingerprint
    except (S2EAdapterError, ValueError):  # nothing there, or not whole
        found = wanted
    if place.is_adapter:
        what = "the adapter itself" if place == adapter else "an adapter"
    elif found != wanted:
        what = f"another base (fingerprint {str(found)[:12]})"
    else:
        return
    raise FileExistsError(f"{place.folder} holds {what}, not the base of {adapter.name}: pull into another folder.")


def _in_cache(base_id: str, commit: str | None) -> Repo | None:
    """A base that is wholly in the cache; only a commit names something that cannot change."""
    found = commit and [try_to_load_from_cache(base_id, name, revision=commit) for name in BASE_FILES]
    return Repo(Path(found[0]).parent) if found and all(isinstance(path, str) for path in found) else None


def _download(repo_id: str, revision: str | None, to, token: str | None, force: bool) -> Repo:
    with asking_the_hub(f"cannot pull {repo_id}" + (f" at {revision}" if revision else "")):
        found = snapshot_download(
            repo_id,
            revision=revision,
            local_dir=None if to is None else _place(repo_id, to).folder,
            token=token,
            allow_patterns=list(PULLED),
            force_download=force,
        )
    if not Path(found, CONFIG).is_file():
        raise S2EHubError(f"cannot pull {repo_id}: it has no {CONFIG}, so it is no base and no adapter.")
    return Repo(found)
