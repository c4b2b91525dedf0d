"""Finding adapters on the Hugging Face Hub: `list_adapters`."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download

from ..model.adapter_files_s2e import BAD_CONFIG, S2EAdapterError
from .errors import asking_the_hub
from .repo import CONFIG, Repo, as_repo


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
    base: Repo | str | os.PathLike | None = None, *, token: str | None = None, limit: int | None = None
) -> list[AdapterEntry]:
    """The adapters on the Hub whose cards name this base (a Hub id, or a base's folder), or any base.

    Raises:
        ValueError: a folder whose config has no repo_id.
        S2EHubError: the Hub refused or could not be reached.
    """
    if isinstance(base, Repo) or (base is not None and os.path.isdir(base)):
        repo = as_repo(base)
        base = repo.config.repo_id
        if base is None:
            raise ValueError(
                f"{repo.folder}: its {CONFIG} has no repo_id, so no adapter on the Hub can name it: push it first."
            )
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
        with asking_the_hub(CONFIG):
            file = hf_hub_download(info.id, CONFIG, revision=info.sha, token=token)
        repo = Repo(Path(file).parent)
        entry.labels, config = repo.labels, repo.config
    except (*BAD_CONFIG, S2EAdapterError) as error:  # anybody's config: one must not hide the others
        entry.problem = f"{CONFIG} cannot be read ({type(error).__name__}: {error})"
        return entry
    entry.base_revision, entry.method = config.base_model_revision, config.method
    return entry
