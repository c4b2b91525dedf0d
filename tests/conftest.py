"""Fixtures that every test file shares."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def s2e_data() -> Path:
    """The folder with real speech (``S2E_DATA``); tests that need it are skipped where it is missing."""
    folder = Path(os.environ.get("S2E_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real speech at {folder} (set S2E_DATA)")
    return folder


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
