"""The corpus index, what a corpus says of each utterance: a name that travels, label, speaker, session and split.

A corpus is a `datasets.Dataset` as `hf_s2e.corpora.load_corpus` gives it: with the columns `audio` (not
decoded) and `label` (a ClassLabel) and, where known, `speaker`, `session` and `split`.
"""

import hashlib
import json
import os
from collections import Counter
from typing import NamedTuple


class CorpusIndex(NamedTuple):
    """The index of a corpus in memory, row by row, as protocols need it; columns that it lacks are None.

    labels are numbers into `classes`, the label names.
    """

    utterances: list[str]
    labels: list[int]
    classes: tuple[str, ...]
    speakers: list[str] | None
    sessions: list[str] | None
    splits: list[str] | None

    def sha256(self):
        """Over all of this, whatever the order of the rows."""
        empty = [""] * len(self.utterances)
        columns = [column or empty for column in (self.speakers, self.sessions, self.splits)]
        rows = sorted(zip(self.utterances, (self.classes[label] for label in self.labels), *columns))
        return hashlib.sha256(canonical([self.classes, rows]).encode()).hexdigest()

    def values(self, column):
        return {"speaker": self.speakers, "split": self.splits, "utterance": self.utterances}[column]


def read_index(dataset) -> CorpusIndex:
    """Read utterance ids, labels, speakers, sessions and splits, and check them. Raises ValueError."""
    utterances = utterance_ids(dataset)
    labels, classes = dataset["label"][:], tuple(dataset.features["label"].names)
    known = range(len(classes))
    unlabelled = [utterance for utterance, label in zip(utterances, labels) if label not in known]
    if unlabelled:
        raise ValueError(f"{len(unlabelled)} utterances have no label ({few(unlabelled)}): leave them out")
    speakers, sessions, splits = (text_column(dataset, name) for name in ("speaker", "session", "split"))
    nameless = [utterance for utterance, speaker in zip(utterances, speakers or ()) if not speaker]
    if nameless:
        raise ValueError(f"{len(nameless)} of {len(labels)} utterances have no speaker ({few(nameless)})")
    return CorpusIndex(utterances, labels, classes, speakers, sessions, splits)


def utterance_ids(dataset):
    """A name for each row that does not depend on where the corpus lies or how its audio is stored.

    The column `utterance_id` where there is one; otherwise the file name without its ending, or, where file
    names repeat (VoxCeleb's 00001), the path below the folder that all files share. Raises ValueError for
    rows that have the same file.
    """
    if "utterance_id" in dataset.column_names:
        names = [str(name) for name in dataset["utterance_id"][:]]
        return _unique(names)
    paths = audio_paths(dataset)
    if any(path is None for path in paths):
        raise ValueError("some rows have no audio path: add a column 'utterance_id' with a name for each row")
    if not paths:
        raise ValueError("the corpus has no utterances")
    names = [os.path.splitext(os.path.basename(path))[0] for path in paths]
    if len(set(names)) == len(names):
        return names
    relative = below_common_folder(paths)
    names = [os.path.splitext(path)[0] for path in relative]
    return names if len(set(names)) == len(names) else _unique(relative)


def audio_paths(dataset):
    """Path of each row's audio; audio bytes that the table may hold are passed over."""
    paths = []
    for batch in dataset.select_columns("audio").with_format("arrow").iter(batch_size=1000):
        column = batch["audio"].combine_chunks()
        paths += (column if column.type.num_fields == 0 else column.field("path")).to_pylist()
    return paths


def below_common_folder(paths):
    """The paths below the folder that all of them share, with forward slashes."""
    paths = [os.path.abspath(path).replace(os.sep, "/") for path in paths]
    folder = os.path.commonpath([os.path.dirname(path) for path in paths]) if paths else ""
    return [path[len(folder) :].lstrip("/") for path in paths]


def text_column(dataset, name):
    """A column's values as text, blank ones "", or None where it is absent or blank throughout."""
    if name not in dataset.column_names:
        return None
    values = ["" if value is None else str(value).strip() for value in dataset[name][:]]
    return values if any(values) else None


def _unique(names):
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(f"{len(repeated)} utterances are there more than once ({few(repeated)})")
    return names


def corpus_name(dataset):
    """Name under which `load_corpus` made the dataset; empty for one that was put together by hand."""
    return (getattr(getattr(dataset, "info", None), "dataset_name", None) or "").removeprefix("s2e_")


def shuffled(values, seed, purpose):
    """The same order on every machine and version: by a hash, not by a random generator."""
    return sorted(values, key=lambda value: hashlib.sha256(f"{seed}\0{purpose}\0{value}".encode()).digest())


def canonical(content):
    """JSON text that is the same for the same content, for hashing."""
    return json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def few(values, limit=4):
    """The first values, for a message."""
    values = [str(value) for value in values]
    return ", ".join(values[:limit]) + (", ..." if len(values) > limit else "")
