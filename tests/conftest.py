"""What all test files share: fixtures, and what keeps the run short. Helpers are in the modules beside this one."""

import gc
import os
import time
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import jinja2
import pytest

ROOT = Path(__file__).resolve().parents[1]
TEMPLATES = cache(jinja2.Template)  # compiled once


@pytest.fixture(scope="module", autouse=True)
def little_garbage() -> None:
    """Accelerate collects garbage before each training: what has been imported is not searched for it every time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def s2e_data() -> Path:
    """The folder with real speech (``S2E_DATA``); tests that need it are skipped where it is missing."""
    folder = Path(os.environ.get("S2E_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real speech at {folder} (set S2E_DATA)")
    return folder


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    """Tiny bases and a toy corpus, for whatever trains (training_tools.py)."""
    from training_tools import Workbench

    return Workbench(tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory) -> Path:
    """The `data_dir` of the toy corpus with its own options, which whoever is first makes there."""
    return tmp_path_factory.mktemp("toy")


@pytest.fixture
def load(tmp_path):
    """`load_corpus` with a cache of the test's own."""
    from hf_s2e.corpora import load_corpus

    return partial(load_corpus, cache_dir=tmp_path / "cache")


@pytest.fixture
def one_thread():
    """For trainings that must not vary: a single thread, and accelerate as in a new process."""
    import torch
    from training_tools import forget_accelerator

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    forget_accelerator()
    yield
    torch.set_num_threads(before)
    forget_accelerator()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that everything in this process talks to, with an empty cache, logged in as its user.

    huggingface_hub has read its environment long before: its constants are replaced, and put back afterwards.
    """
    from huggingface_hub import constants, hf_api
    from local_hub import LocalHub

    with LocalHub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_URL_HOSTS", constants.HF_URL_HOSTS | {"127.0.0.1"})
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(hf_api.api, "endpoint", hub.endpoint)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
        monkeypatch.setenv("HF_TOKEN", hub.token)
        impatient = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})  # between retries
        monkeypatch.setattr("jinja2.Template", TEMPLATES)  # every push makes cards
        for module in ("file_download", "utils._http"):
            monkeypatch.setattr(f"huggingface_hub.{module}.time", impatient)
        yield hub
