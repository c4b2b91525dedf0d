"""Repos on disk and on the Hugging Face Hub: described, published, fetched and found. Loaded on first use.

docs/hub.md shows how they are used, and is run by a test.
"""

import importlib

_HOMES = {
    "Repo": "repo",
    "S2EHubError": "errors",
    "list_adapters": "listing",
    "pull": "download",
    "push": "upload",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
