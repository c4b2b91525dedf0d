"""Listing folders and reading tables, with the traps of copied corpora in mind."""

import csv
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..audio import AUDIO_EXTENSIONS

SHOWN = 5  # how many offending files or lines a message names


class CorpusError(ValueError):
    """The folder, table or option given is not what the corpus needs; the message says what to do."""


class CorpusWarning(UserWarning):
    """The same finding with ``strict=False``: what is named was left out, the rest is used."""


def is_audio(path: str | os.PathLike) -> bool:
    return os.path.splitext(path)[1].lower() in AUDIO_EXTENSIONS


# `datasets` replaces os.path functions in builder modules by slower ones for URLs, so these are here.


def without_extension(path: str) -> str:
    return os.path.splitext(path)[0]


def size_of(path: str) -> int:
    """Size in bytes; 0 where there is no file."""
    return os.path.getsize(path) if os.path.isfile(path) else 0


def walk(folder: str | os.PathLike, depth: int | None = None) -> Iterator[tuple[str, int]]:
    """Yield ``(path, size in bytes)`` of the files below ``folder``, sorted, one folder in memory at a time.

    ``depth`` 1 lists the folder only. Names that begin with a dot are skipped (``._x.wav`` is what macOS
    leaves beside x.wav), links are followed except back into a folder that holds them, and a broken link has
    size 0.

    Raises:
        CorpusError: a folder cannot be listed.
    """
    yield from _walk(os.fspath(folder), depth, frozenset({os.path.realpath(folder)}))


def _walk(folder: str, depth: int | None, parents: frozenset[str]) -> Iterator[tuple[str, int]]:
    try:
        with os.scandir(folder) as found:
            visible = (entry for entry in found if not entry.name.startswith("."))
            entries = sorted(visible, key=lambda entry: entry.name)
    except OSError as error:
        raise CorpusError(f"cannot list {folder}: {error.strerror}") from error
    for entry in entries:
        try:
            if not entry.is_dir():
                yield entry.path, entry.stat().st_size
                continue
        except OSError:  # a link to nowhere or to itself
            yield entry.path, 0
            continue
        if depth is not None and depth <= 1:
            continue
        inside = parents
        if entry.is_symlink():
            real = os.path.realpath(entry.path)
            if real in parents or (os.path.realpath(folder) + os.sep).startswith(os.path.join(real, "")):
                continue
            inside = parents | {real}
        yield from _walk(entry.path, depth and depth - 1, inside)


def show_entries(folder: Path) -> str:
    """The first entries of a folder, for an error message."""
    names = sorted(f"{path.name}/" if path.is_dir() else path.name for path in folder.iterdir())
    more = f" ... ({len(names)} in all)" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more if names else "nothing"


def digest(files: Iterable[tuple[str, int]], *facts: str) -> str:
    """A short hash of a file list: names and sizes, and of all but audio the time of the last change."""
    hasher = hashlib.sha256("\0".join(facts).encode())
    for path, size in files:
        changed = 0 if is_audio(path) or not os.path.exists(path) else os.stat(path).st_mtime_ns
        hasher.update(os.fsencode(path) + f"\0{size} {changed}\n".encode())
    return hasher.hexdigest()[:20]


def read_table(path: str | os.PathLike) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield ``(line number, {column: cell})`` of a table separated by commas, tabs or semicolons.

    A byte order mark, Windows line ends, blanks around header and cells, and empty lines are taken in stride;
    cells that a short line lacks are empty.

    Raises:
        CorpusError: not UTF-8, two columns of one name, or a line with more cells than the header; file and line
            are named.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            header = file.readline()
            file.seek(0)
            reader = csv.reader(file, delimiter=max(",\t;", key=header.count), skipinitialspace=True)
            columns = [name.strip() for name in next(reader, [])]
            if twice := [name for name, number in Counter(columns).items() if name and number > 1]:
                raise CorpusError(f"{path}:1: several columns are called {', '.join(twice)}; rename them")
            for cells in reader:
                if len(cells) > len(columns):
                    found = f"{len(cells)} cells under {len(columns)} columns {columns}"
                    remedy = "put quotes around cells that hold the separator"
                    raise CorpusError(f"{path}:{reader.line_num}: {found}; {remedy}")
                cells = [cell.strip() for cell in cells]
                if any(cells):
                    yield reader.line_num, dict(zip(columns, cells + [""] * (len(columns) - len(cells))))
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} is not UTF-8 ({error.reason}); save it as UTF-8") from error
    except csv.Error as error:
        raise CorpusError(f"{path}:{reader.line_num}: {error}") from error
    except OSError as error:
        raise CorpusError(f"cannot read {path}: {error.strerror}") from error


class Report:
    """What is wrong with a copy of a corpus: kinds of finding, their numbers and the first few places."""

    def __init__(self):
        self.places: dict[str, list[str]] = {}
        self.numbers: Counter[str] = Counter()
        self.differences: list[tuple[str, int, int]] = []  # what, expected, found

    def add(self, kind: str, place: str) -> None:
        self.numbers[kind] += 1
        if self.numbers[kind] <= SHOWN:
            self.places.setdefault(kind, []).append(place)

    def __bool__(self) -> bool:
        return bool(self.numbers or self.differences)

    def __str__(self) -> str:
        lines = []
        if self.differences:
            width = max(len(what) for what, _, _ in self.differences)
            lines = [f"  {'':{width}}  expected   found"]
            lines += [f"  {what:{width}}  {want:8d}  {found:6d}" for what, want, found in self.differences]
        for kind, places in self.places.items():
            lines.append(f"  {kind}: {self.numbers[kind]}")
            lines += [f"    {place}" for place in places]
            lines += ["    ..."] * (self.numbers[kind] > len(places))
        return "\n".join(lines)
