"""Publishing bases and adapters on the Hugging Face Hub: `push` and the command `s2e push`."""

import argparse
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
from ..model.configuration_s2e import S2EConfig
from .cards import (
    BASE_WEIGHTS,
    TRAINING_FACTS,
    card_repo_id,
    find_repos,
    is_adapter,
    make_card,
    read_training,
)
from .download import asking_the_hub, check_repo, local_base, read_config

CODE = Path(__file__).parents[1] / "model"  # its modules *_s2e.py are the remote code of every repo
SENT = ("config.json", "preprocessor_config.json", BASE_WEIGHTS, ADAPTER_WEIGHTS, TRAINING_FACTS, "LICENSE")
NEW_COMMIT = "(the commit that pushing the base makes)"
_COMMIT_ROW = re.compile(r"^\| Base commit \|.*$", re.MULTILINE)


@dataclass
class Upload:
    """What a push sends to one repo."""

    folder: Path
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
    folders: Iterable[str | os.PathLike],
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
        folders: repos, or folders of repos such as hub_cards/.
        name: another name for the one repo that is given.
        private: of repos that do not exist yet.
        dry_run: prepare everything, and send nothing.

    Returns:
        For each repo what was sent, and the URL of the commit (None in a dry run).

    Raises:
        ValueError: a folder holds no repo, or the namespace cannot be one.
        S2EAdapterError: a repo is damaged, or an adapter belongs to another base than the one beside it.
        S2EHubError: the Hub refused or could not be reached. Each repo is published whole or not at all, and
            none where one of them has another error.
    """
    folders = [repo.resolve() for folder in folders for repo in find_repos(folder)]
    if "/" in namespace:
        raise ValueError(f"{namespace!r} is not a namespace: expected the name of a user or an organisation.")
    if name and len(folders) != 1:
        raise ValueError(f"name={name!r} is for one repo, but {len(folders)} were given.")
    names = {folders[0]: name} if name else {}
    repos = {folder: f"{namespace}/{names.get(folder, folder.name)}" for folder in _with_bases(folders, names)}
    published = {folder: (repo_id, NEW_COMMIT) for folder, repo_id in repos.items()}  # a base's new id and commit
    # all of them before the first is sent: an adapter that is refused must not have published its base
    planned = [prepare(folder, repo_id, published.get(local_base(folder))) for folder, repo_id in repos.items()]
    if dry_run:
        return [(upload, None) for upload in planned]
    api, done = HfApi(token=token), []
    for folder, repo_id in repos.items():
        upload = prepare(folder, repo_id, published.get(local_base(folder)))
        with asking_the_hub(f"cannot push {repo_id}"):
            api.create_repo(repo_id, private=private, exist_ok=True)
            operations = [CommitOperationAdd(name, content) for name, content in upload.files.items()]
            commit = api.create_commit(repo_id, operations, commit_message=f"Upload {folder.name}")
        published[folder] = (repo_id, commit.oid)
        done.append((upload, commit.commit_url))
    return done


def _with_bases(repos: list[Path], names: Mapping[Path, str]) -> list[Path]:
    """These repos and the unpublished bases beside them, bases first; some may have another name."""
    bases = [local_base(repo) for repo in repos if not read_config(repo).get("base_model_revision")]
    repos = sorted(dict.fromkeys([*repos, *filter(None, bases)]), key=is_adapter)
    count = Counter(names.get(repo, repo.name) for repo in repos)
    if twice := [name for name, times in count.items() if times > 1]:
        raise ValueError(f"several folders are called {', '.join(twice)}, and each would be the same repo.")
    return repos


def prepare(folder: Path, repo_id: str, base: tuple[str, str] | None = None) -> Upload:
    """What to send of one folder: checked, with remote code added and ids and commits written in.

    Args:
        base: Hub id and commit of an adapter's base, where the recorded ones are not to stay.
    """
    validate_repo_id(repo_id)
    check_repo(folder, local_base(folder))
    upload = Upload(folder, repo_id)
    upload.files = {name: folder / name for name in SENT if (folder / name).is_file()}
    upload.files |= {path.name: path for path in sorted(CODE.glob("*_s2e.py"))}
    kept = {*upload.files, "README.md"}
    upload.left_out = sorted(path.name for path in folder.iterdir() if path.name not in kept)
    upload.files["README.md"] = _card(upload, base).encode()
    changes: dict[str, Any] = {"base_local_path": None} if is_adapter(folder) else {"repo_id": repo_id}
    if base:
        changes |= {"base_model_name_or_path": base[0], "base_model_revision": base[1]}
    _substitute(upload, "config.json", changes)
    if TRAINING_FACTS in upload.files:
        _substitute(upload, TRAINING_FACTS, {"results": None})  # a path of this machine
    return upload


def _substitute(upload: Upload, name: str, changes: dict[str, Any]) -> None:
    """Change fields of one of the JSON files that are sent; None takes a field away."""
    old = json.loads((upload.folder / name).read_text(encoding="utf-8"))
    new = {key: value for key, value in (old | changes).items() if key not in changes or value is not None}
    if new == old:
        return
    for key, value in changes.items():
        if old.get(key) != value:
            upload.substitutions.append(f"{name}: {key}: {old.get(key)!r} -> {value!r}")
    upload.files[name] = (json.dumps(new, indent=2, ensure_ascii=False) + "\n").encode()


def _card(upload: Upload, base: tuple[str, str] | None) -> str:
    """The card, or one made here, with the repo's own and the base's new id and the base's commit."""
    folder = upload.folder
    config = S2EConfig.from_json_file(folder / "config.json")
    if (folder / "README.md").is_file():
        card = ModelCard((folder / "README.md").read_text(encoding="utf-8"), ignore_metadata_errors=True)
    else:
        card = make_card(folder, config, read_training(folder), None)
        upload.substitutions.append("README.md: there was none, so one that says what the repo is")
    ids = {card_repo_id(folder, config): upload.repo_id}
    if base:
        card.data.base_model, card.data.base_model_relation = base[0], "adapter"
        card.data["base_model_revision"] = base[1]
        ids[config.base_model_name_or_path] = base[0]
    text = _COMMIT_ROW.sub(f"| Base commit | {base[1]} |", str(card)) if base else str(card)
    for old, new in ids.items():
        if old and old != new and old in text:
            text = re.sub(rf"(?<![\w./-]){re.escape(old)}(?![\w-])", new, text)
            upload.substitutions.append(f"README.md: {old} -> {new}")
    if base:
        upload.substitutions.append(f"README.md: base commit -> {base[1]}")
    return text


# ---- s2e push


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="a repo, or a folder of repos")
    parser.add_argument("--to", required=True, metavar="NAMESPACE", help="user or organisation on the Hub")
    parser.add_argument("--private", action="store_true", default=None, help="make new repos private")
    parser.add_argument("--dry-run", action="store_true", help="show what would be sent, and send nothing")


def run(args: argparse.Namespace) -> int:
    done = push(args.folders, args.to, private=args.private, dry_run=args.dry_run)
    for upload, url in done:
        sizes = upload.sizes
        print(f"{upload.repo_id}  ({sum(sizes.values()) / 1e6:.2f} MB from {upload.folder})")
        for name, size in sizes.items():
            print(f"  {size:>10,}  {name}")
        for line in upload.substitutions:
            print(f"  changed: {line}")
        if upload.left_out:
            print(f"  left out: {', '.join(upload.left_out)}")
        print(f"  {'not sent: dry run' if url is None else url}")
    return 0
