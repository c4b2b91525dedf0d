"""What `s2e info` says of a repo."""

from typing import Any

from huggingface_hub import ModelCard

from .download import fetch_repo
from .repo import CARD, Repo


def describe_repo(source: str) -> dict[str, Any]:
    """What a folder or Hub repo holds, after it was checked.

    Returns:
        `source`, `kind` (base, plain base, fused or adapter), `labels`, `parameters`, `weights_bytes`,
        `fingerprint` (of the base; for an adapter of the one it needs) and `results` (of the card's
        model-index: dataset, metric, value); of a base also `repo_id` and `adapters` (name to labels), of an
        adapter `name`, `base`, `base_revision` and `method`.

    Raises:
        S2EAdapterError, OSError, ValueError: there is no such repo, it is not one of this package's, or its weights
            are not those that its config describes.
    """
    repo = fetch_repo(source)
    repo.check()
    own = _of_adapter(repo) if repo.is_adapter else _of_base(repo)
    measured = {
        "fingerprint": repo.fingerprint,
        "parameters": repo.parameters,
        "weights_bytes": repo.weights_bytes,
        "results": _results(repo),
    }
    return {"source": source, "kind": repo.kind, **own, **measured}


def _of_adapter(repo: Repo) -> dict[str, Any]:
    config = repo.config
    return {
        "name": config.adapter_name,
        "labels": repo.labels,
        "base": config.base_model_name_or_path or config.base_local_path,
        "base_revision": config.base_model_revision,
        "method": config.method,
    }


def _of_base(repo: Repo) -> dict[str, Any]:
    config = repo.config
    adapters = [name for name in config.domains if name != config.base_domain]
    return {
        "repo_id": config.repo_id,
        "labels": repo.labels,
        "adapters": {name: config.labels_of(name) for name in adapters},
    }


def _results(repo: Repo) -> list[dict[str, Any]]:
    """Those of the card's model-index."""
    path = repo.folder / CARD
    if not path.is_file():
        return []
    return [
        {
            "dataset": result.dataset_name,
            "metric": result.metric_name or result.metric_type,
            "value": result.metric_value,
        }
        for result in ModelCard.load(path, ignore_metadata_errors=True).data.eval_results or []
    ]
