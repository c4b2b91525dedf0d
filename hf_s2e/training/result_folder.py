"""A folder of results/: its name, the commands that make it, and the fold-runs in it.

predictions.parquet   a row for each utterance that a finished fold-run tested
validation.parquet    likewise of the runs by which folds chose their recipes, with the recipe
runs.json             a line for each finished fold-run, with its facts
running/              while a job runs: what has finished since the last merge, a file for each fold-run
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from ..model.atomic_write_s2e import atomic_write

TABLE_RUNS = 3
ROWS = {"test": "predictions.parquet", "validation": "validation.parquet"}  # by the part that was recognised
RUNS = "runs.json"
KEY = ["method", "run", "fold", "recipe"]  # of a row; that of a test part goes without the recipe
FACTS = b"fold-run"  # in a file of running/
UNSAID = {"cache_dir", "command"}  # flags that no other machine needs


def folder_name(corpus: str, protocol: str, recipe: str, labels: Sequence[str] = ()) -> str:
    """E.g. emodb-loso-paper, or emodb4-loso-paper where four labels were named."""
    name = f"{corpus}{len(labels) or ''}-{protocol}-{recipe}"
    return re.sub(r"[^\w.-]+", "_", name)  # a corpus may be called module:Class


def portable(words: Sequence[str], root: Path) -> list[str]:
    """The flags of a command without what is this machine's own: DIR stands for the corpus, files of the repository
    are named by their path in it and others by their name."""

    def place(path: str) -> str:
        if not Path(path).is_absolute():
            return path
        return Path(path).relative_to(root).as_posix() if Path(path).is_relative_to(root) else Path(path).name

    said, flag = [], ""
    for word in words:
        head, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        flag = head.lstrip("-").replace("-", "_") or flag
        if value:
            value = "DIR" if flag == "data_dir" else ",".join(map(place, value.split(",")))
        if flag not in UNSAID:
            said.append(f"{head}{equals}{value}")
    return said


class ResultFolder:
    """The fold-runs of one result.

    Each is kept in one step by the process that ran it, and merged with the others later. Any process may be killed at
    any moment, and several may keep and merge at once: no fold-run is lost, and none is there twice.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.running = self.path / "running"
        self._lock = FileLock(self.running / "lock")

    def keep(self, name: str, facts: Mapping[str, Any], rows: pd.DataFrame) -> None:
        """A finished fold-run; `facts` has at least `part`, `method`, `run`, `folds` and `recipe`."""
        table = pa.Table.from_pandas(rows, preserve_index=False)
        note = {FACTS: json.dumps({"name": name, **facts})}
        self.running.mkdir(parents=True, exist_ok=True)
        with self._lock, atomic_write(self.running / f"{quote(name, safe='+')}.parquet") as file:
            pq.write_table(table.replace_schema_metadata(table.schema.metadata | note), file)

    def merge(self) -> None:
        """Move what is in running/ to the other files.

        Rows are written first, then runs.json, and only then is anything deleted: after a kill between these steps
        they are done again, and rows of which runs.json does not know are dropped.
        """
        if not self.running.is_dir():
            return
        with self._lock:
            files = sorted(self.running.glob("*.parquet"))
            new = [_read(file) for file in files]
            if new:
                self._add({facts.pop("name"): (facts, rows) for facts, rows in new})
            cut_off = [file for name in (*ROWS.values(), RUNS) for file in self.path.glob(f"{name}.*.part")]
            for file in [*files, *self.running.glob("*.part"), *cut_off]:  # by a kill: nobody else writes now
                file.unlink()

    def finished(self) -> dict[str, dict[str, Any]]:
        """Name -> facts of every fold-run that was merged."""
        file = self.path / RUNS
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    def rows(self, part: str) -> pd.DataFrame:
        """The predictions of all finished fold-runs on their `part`, "test" or "validation".

        Raises:
            ValueError: those of a fold-run are missing.
        """
        return self._rows_of(self.finished(), part)  # in this order: a merge writes runs.json last

    def whole_runs(self, folds: int) -> pd.DataFrame:
        """The predictions of the runs that are finished on all of so many folds."""
        rows = self.rows("test")
        return rows[rows.groupby(["method", "run"])["fold"].transform("nunique") == folds]

    def folds_by_run(self) -> dict[tuple[str, int], set[str]]:
        """For each method and run, the folds that are finished."""
        found: dict[tuple[str, int], set[str]] = {}
        for facts in self._tested():
            found.setdefault((facts["method"], facts["run"]), set()).update(facts["folds"])
        return found

    def environments(self) -> list[tuple[dict[str, Any], int]]:
        """What the fold-runs were made on and by, each with their number."""
        known = Counter(json.dumps(facts["environment"], sort_keys=True) for facts in self._tested())
        return [(json.loads(text), count) for text, count in known.items()]

    def _tested(self) -> list[dict[str, Any]]:
        return [facts for facts in self.finished().values() if facts["part"] == "test"]

    def _add(self, new: dict[str, tuple[dict[str, Any], pd.DataFrame]]) -> None:
        runs = {name: facts for name, facts in self.finished().items() if name not in new}
        for part, file in ROWS.items():
            if added := [rows for facts, rows in new.values() if facts["part"] == part]:
                kept = self._rows_of(runs, part)
                table = pd.concat([kept, *added] if len(kept) else added)
                table = table.sort_values([column for column in KEY if column in table], kind="stable")
                with atomic_write(self.path / file) as partial:
                    table.to_parquet(partial, index=False, compression="zstd")
        runs |= {name: facts for name, (facts, _) in new.items()}
        lines = (f"{json.dumps(name)}: {json.dumps(facts, sort_keys=True)}" for name, facts in sorted(runs.items()))
        with atomic_write(self.path / RUNS) as partial:
            partial.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")

    def _rows_of(self, runs: dict[str, dict[str, Any]], part: str) -> pd.DataFrame:
        runs = {name: facts for name, facts in runs.items() if facts["part"] == part}
        file = self.path / ROWS[part]
        rows = pd.read_parquet(file) if file.is_file() else pd.DataFrame(columns=KEY)
        key = [column for column in KEY if column in rows]
        name_of = {
            tuple(facts[column] if column != "fold" else fold for column in key): name
            for name, facts in runs.items()
            for fold in facts["folds"]
        }
        found = list(zip(*(rows[column] for column in key)))
        if missing := sorted(set(name_of) - set(found)):
            raise ValueError(
                f"{file} has no rows of {name_of[missing[0]]}, which is finished by {RUNS}: bring back the {file.name} "
                "that belongs to it, or delete its line there, so that it runs again"
            )
        return rows[pd.Series([one in name_of for one in found], index=rows.index, dtype=bool)]


def _read(file: Path) -> tuple[dict[str, Any], pd.DataFrame]:
    table = pq.read_table(file)
    return json.loads(table.schema.metadata[FACTS]), table.to_pandas()
