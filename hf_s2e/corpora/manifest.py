"""Your own recordings, listed in a CSV or TSV file: one line per recording, with its path and its label.

``data_dir`` is the table itself, or a folder with one table in it, or (with ``manifest=`` naming the table)
the folder that relative paths start from. Options name the columns (``path``, ``label``, ``speaker``,
``split``); all other columns are kept as text. ``label="speaker"`` makes a speaker corpus of it, of which
``num_speakers`` draws some. ``label_map={"neu": "neutral"}`` translates labels, and then others are errors.
Without a speaker column, ``speaker_pattern`` may find the speaker in the path (its first group); otherwise
the speaker is None, and protocols need ``speaker_disjoint=False``. While the index is built, all paths are in
memory, to find duplicates.
"""

import os
import re
from pathlib import Path

from .base import SPEAKER_OPTIONS, Corpus
from .files import CorpusError, read_table, show_entries, size_of
from .labels import GENDERS, SPLITS

OPTIONS = {
    "manifest": None,
    "path": "path",
    "label": "label",
    "speaker": "speaker",
    "split": "split",
    "label_map": None,
    "speaker_pattern": None,
    **SPEAKER_OPTIONS,
}
OWN_COLUMNS = {"audio", "label", "speaker", "split", "path", "size", "place"}  # not for extra columns


class Manifest(Corpus):
    LAYOUT = "a CSV or TSV file with the columns path, label and, where known, speaker and split"
    OPTIONS = OPTIONS
    UNIQUE_NAMES = False

    table: Path | None = None

    def __init__(self, data_dir=None, **options):
        _check_options(options.get("label_map"), options.get("speaker_pattern"))
        super().__init__(data_dir, **options)

    def locate(self, data_dir):
        given = data_dir or self.options["manifest"]
        if not given:
            raise CorpusError(f"{self.title()} needs data_dir=, {self.LAYOUT}")
        folder = Path(given).expanduser().absolute()
        root = folder if folder.is_dir() else folder.parent
        self.table = root / self.options["manifest"] if self.options["manifest"] else folder
        if self.table.is_dir():
            self.table = self.only_table(root)
        if not self.table.is_file():
            raise CorpusError(f"there is no {self.table}; {self.title()} needs {self.LAYOUT}")
        self.read_header()
        return root

    def only_table(self, folder: Path) -> Path:
        tables = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in (".csv", ".tsv")]
        if len(tables) != 1:
            names = ", ".join(path.name for path in tables)
            found = f"several tables ({names}): say which, manifest=..." if tables else show_entries(folder)
            raise CorpusError(f"{folder}\n  expected: {self.LAYOUT}\n  found:    {found}")
        return tables[0]

    def read_header(self) -> None:
        """Check that the table has the columns that are needed, and see what else it has."""
        _, first = next(read_table(self.table), (0, None))
        if first is None:
            raise CorpusError(f"{self.table} has no lines below its header; expected: {self.LAYOUT}")
        for need in ("path", "label"):
            if self.options[need] not in first:
                raise CorpusError(
                    f"{self.table} has no column {self.options[need]!r}, only {', '.join(first)}; "
                    f'name the column of the {need}: {need}="..."'
                )
        used = {self.options[key] for key in ("path", "label", "speaker", "split")} | OWN_COLUMNS
        split = ("split",) * (self.options["split"] in first)
        self.COLUMNS = (*(column for column in first if column and column not in used), *split)

    def entries(self):
        """Yield one dict per line: its ``place`` for messages, path, label, speaker, the other columns."""
        path, label, speaker, split = (self.options[key] for key in ("path", "label", "speaker", "split"))
        for line, cells in read_table(self.table):
            entry = {column: cells.get(column) or None for column in self.COLUMNS}
            entry |= {"place": f"{self.table}:{line}", "path": cells[path], "label": cells[label]}
            entry["speaker"] = cells[speaker] if speaker in cells else self.speaker_in(cells[path])
            if "split" in self.COLUMNS:
                entry["split"] = SPLITS.get(cells[split].lower(), cells[split] or None)
            if "gender" in self.COLUMNS:
                entry["gender"] = GENDERS.get(cells["gender"].lower(), entry["gender"])
            yield entry

    def speaker_in(self, path: str) -> str | None:
        """The speaker that ``speaker_pattern`` finds in a path; None without a pattern, blank if it fails."""
        if not self.options["speaker_pattern"]:
            return None
        match = re.search(self.options["speaker_pattern"], path.replace("\\", "/"))  # as Windows writes them
        return match[1] if match else ""

    def full_path(self, path: str) -> str:
        path = path if os.sep == "\\" or "/" in path else path.replace("\\", "/")  # written on Windows
        return os.path.join(self.root, path)

    def class_names(self):
        labels, speakers = set(), set()
        for entry in self.entries():
            labels.add(entry["label"])
            speakers.add(entry["speaker"])
        chosen = self.choose_speakers(speakers - {"", None}) if self.options["num_speakers"] else None
        self.speakers = chosen and set(chosen)
        if chosen and self.options["label"] == self.options["speaker"]:
            return chosen
        mapping = self.label_map()
        return dict.fromkeys(mapping.values()) if mapping else sorted(labels - {""})

    def label_map(self) -> dict[str, str] | None:
        return self.options["label_map"]

    def files(self):
        yield str(self.table), size_of(self.table)
        for entry in self.entries():
            path = self.full_path(entry["path"])
            yield path, size_of(path)

    def rows(self, report):
        places, mapping = {}, self.label_map()
        for entry in self.entries():
            place, label = entry["place"], entry["label"]
            if not entry["path"]:
                report.add("lines without a path", place)
                continue
            path = self.full_path(entry["path"])
            fault = self.fault(entry, path, mapping)
            if path in places:
                report.add("duplicate rows, the first is kept", f"{place} repeats {places[path]}: {path}")
            elif fault:
                report.add(fault[0], f"{place}: {fault[1]}")
            elif self.speakers is None or entry["speaker"] in self.speakers:
                label = mapping[label] if mapping else label
                yield {**entry, "path": path, "label": label, "size": size_of(path)}
            places.setdefault(path, place)

    def fault(self, entry: dict, path: str, mapping: dict[str, str] | None) -> tuple[str, str] | None:
        """What makes a line unusable: (kind, what is wrong here)."""
        if not entry["label"]:
            return "lines without a label", path
        if mapping and entry["label"] not in mapping:
            return "unknown labels", f"{entry['label']!r} is not among {', '.join(mapping)}"
        if entry["speaker"] == "":
            return "lines without a speaker", path
        if not os.path.lexists(path):
            return "missing files", path
        return None


def _check_options(label_map, speaker_pattern) -> None:
    if label_map is not None and not (isinstance(label_map, dict) and label_map):
        raise CorpusError(f"label_map is {label_map!r}; expected a dict like {{'neu': 'neutral'}}")
    try:
        groups = speaker_pattern is None or re.compile(speaker_pattern).groups
    except (re.error, TypeError) as error:
        raise CorpusError(f"speaker_pattern {speaker_pattern!r} is no regular expression: {error}") from error
    if not groups:
        raise CorpusError(
            f"speaker_pattern {speaker_pattern!r} has no group; put brackets around the speaker, as in '_([FM][0-9]+)_'"
        )
