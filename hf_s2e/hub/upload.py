"""Publishing bases and adapters on the Hugging Face Hub: `push`."""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.utils import validate_repo_id

from ..model.adapter_files_s2e import ADAPTER_WEIGHTS
from .cards import make_card
from .errors import asking_the_hub
from .repo import BASE_WEIGHTS, CARD, CONFIG, PREPROCESSOR, TRAINING, Repo, find_repos

CODE = Path(__file__).parents[1] / "model"  # its modules *_s2e.py are the remote code of every repo
SENT = (CONFIG, PREPROCESSOR, BASE_WEIGHTS, ADAPTER_WEIGHTS, TRAINING, "LICENSE")
NEW_COMMIT = "(the commit that pushing the base makes)"
_COMMIT_ROW = re.compile(r"^\| Base commit \|.*$", re.MULTILINE)


@dataclass
class Upload:
    """What a push sends of one repo."""

    repo: Repo
    repo_id: str
    files: dict[str, bytes | Path] = field(default_factory=dict)  # name in the repo -> content
    substitutions: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file, by its name in the repo."""
        return {
            name: len(content) if isinstance(content, bytes) else content.stat().st_size
            for name, content in self.files.items()
        }


def push(
    repos: Iterable[Repo | str | os.PathLike],
    namespace: str,
    *,
    name: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    dry_run: bool = False,
) -> list[tuple[Upload, str | None]]:
    """Publish repos under a namespace, each under its folder's name: bases first, then the adapters.

    An adapter's config and card get its base's new id and commit; an unpublished base that lies beside an
    adapter goes with it. What is on the Hub already, unchanged, is not sent again. The folders stay as they
    are.

    Args:
        repos: repos, their folders, or folders of repos such as hub_cards/.
        name: another name for the one repo that is given.
        private: of repos that do not exist yet.
        dry_run: prepare everything, and send nothing.

    Returns:
        For each repo what was sent, and the URL of the commit (None in a dry run).

    Raises:
        ValueError: a folder holds no repo, or the namespace cannot be one.
        S2EAdapterError: a repo is damaged, has tensors that its config does not describe, or is an adapter that is
            incompatible with the base beside it.
        S2EHubError: the Hub refused or could not be reached. Each repo is published whole or not at all, and
            none where one of them has another error.
    """
    given = [repo for folder in repos for repo in find_repos(folder)]
    if "/" in namespace:
        raise ValueError(f"{namespace!r} is not a namespace: expected the name of a user or an organisation.")
    if name and len(given) != 1:
        raise ValueError(f"name={name!r} is for one repo, but {len(given)} were given.")
    names = {given[0]: name} if name else {}
    ids = {repo: f"{namespace}/{names.get(repo, repo.name)}" for repo in _with_bases(given, names)}
    published = {repo: (repo_id, NEW_COMMIT) for repo, repo_id in ids.items()}  # a base's new id and commit
    # all of them before the first is sent: an adapter that is refused must not have published its base
    for repo in ids:
        repo.check(repo.base)
    planned = [prepare(repo, repo_id, published.get(repo.base)) for repo, repo_id in ids.items()]
    if dry_run:
        return [(upload, None) for upload in planned]
    api, done = HfApi(token=token), []
    for repo, repo_id in ids.items():
        upload = prepare(repo, repo_id, published.get(repo.base))
        with asking_the_hub(f"cannot push {repo_id}"):
            api.create_repo(repo_id, private=private, exist_ok=True)
            operations = [CommitOperationAdd(file, content) for file, content in upload.files.items()]
            commit = api.create_commit(repo_id, operations, commit_message=f"Upload {repo.name}")
        published[repo] = (repo_id, commit.oid)
        done.append((upload, commit.commit_url))
    return done


def _with_bases(repos: list[Repo], names: Mapping[Repo, str]) -> list[Repo]:
    """These repos and the unpublished bases beside them, bases first; some may have another name."""
    bases = [repo.base for repo in repos if not repo.config.base_model_revision]
    repos = sorted(dict.fromkeys([*repos, *filter(None, bases)]), key=lambda repo: repo.is_adapter)
    count = Counter(names.get(repo, repo.name) for repo in repos)
    if twice := [name for name, times in count.items() if times > 1]:
        raise ValueError(f"several folders are called {', '.join(twice)}, and each would be the same repo.")
    return repos


def prepare(repo: Repo, repo_id: str, base: tuple[str, str] | None = None) -> Upload:
    """What to send of one repo: with remote code added, and ids and commits written in.

    Args:
        base: Hub id and commit of an adapter's base, where the recorded ones are not to stay.
    """
    validate_repo_id(repo_id)
    upload = Upload(repo, repo_id)
    upload.files = {name: repo.folder / name for name in SENT if (repo.folder / name).is_file()}
    upload.files |= {path.name: path for path in sorted(CODE.glob("*_s2e.py"))}
    kept = {*upload.files, CARD}
    upload.left_out = sorted(path.name for path in repo.folder.iterdir() if path.name not in kept)
    upload.files[CARD] = _card(upload, base).encode()
    changes: dict[str, Any] = {"base_local_path": None} if repo.is_adapter else {"repo_id": repo_id}
    if base:
        changes |= {"base_model_name_or_path": base[0], "base_model_revision": base[1]}
    _substitute(upload, CONFIG, repo.raw_config, changes)
    _substitute(upload, TRAINING, repo.training, {"results": None})  # a path of this machine
    return upload


def _substitute(upload: Upload, name: str, old: Mapping[str, Any], changes: Mapping[str, Any]) -> None:
    """Change fields of one of the JSON files that are sent; None takes a field away."""
    new = {key: value for key, value in {**old, **changes}.items() if key not in changes or value is not None}
    if new == old:
        return
    for key, value in changes.items():
        if old.get(key) != value:
            upload.substitutions.append(f"{name}: {key}: {old.get(key)!r} -> {value!r}")
    upload.files[name] = (json.dumps(new, indent=2, ensure_ascii=False) + "\n").encode()


def _card(upload: Upload, base: tuple[str, str] | None) -> str:
    """The card, or one made here, with the repo's own and the base's new id and the base's commit."""
    repo, path = upload.repo, upload.repo.folder / CARD
    if path.is_file():
        card = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True)
    else:
        card = make_card(repo, None)
        upload.substitutions.append(f"{CARD}: there was none, so one that says what the repo is")
    ids = {repo.hub_id: upload.repo_id}
    if base:
        card.data.base_model, card.data.base_model_relation = base[0], "adapter"
        card.data["base_model_revision"] = base[1]
        ids[repo.config.base_model_name_or_path] = base[0]
    text = _COMMIT_ROW.sub(f"| Base commit | {base[1]} |", str(card)) if base else str(card)
    for old, new in ids.items():
        if old and old != new and old in text:
            text = re.sub(rf"(?<![\w./-]){re.escape(old)}(?![\w-])", new, text)
            upload.substitutions.append(f"{CARD}: {old} -> {new}")
    if base:
        upload.substitutions.append(f"{CARD}: base commit -> {base[1]}")
    return text
