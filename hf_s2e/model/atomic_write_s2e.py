"""Atomic writes: a killed process or a full disk leaves the old file, never a part of the new one."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def beside(path: Path) -> Path:
    """A name for what is to become `path`, that no process of any machine uses."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """A path to write to, which becomes `path` at the end of the block, unless that raises."""
    partial = beside(Path(path))
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
