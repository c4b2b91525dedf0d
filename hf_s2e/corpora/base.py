"""What all corpora share: a builder that finds the root folder, checks every row and caches the index.

A corpus module states its facts, its layout, its label table and its counts, and turns a file name into a row;
see docs/corpora.md for how to write one.
"""

import itertools
import json
import os
import random
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import datasets
import pyarrow as pa

from .files import CorpusError, CorpusWarning, Report, digest, is_audio, show_entries, walk, without_extension

ROWS_PER_BATCH = 10_000  # rows in memory while the index is written
TEXT = datasets.Value("string")
SPEAKER_OPTIONS = {"num_speakers": None, "speaker_seed": 0}  # of corpora whose label is the speaker


@dataclass(frozen=True)
class PublishedFolds:
    """Folds of a corpus that others have published; a protocol by their name uses them.

    description: what they are, for readers of a card.
    test_speakers: of each fold, by the names that the loader gives them.
    """

    description: str
    test_speakers: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, kw_only=True)
class About:
    """What there is to know of a corpus beside its files: for cards, and for its cross-validation.

    language: an identifier of the Hub, or "multilingual".
    license: an identifier of the Hub, "other" where the corpus has an agreement of its own.
    weights: the licence of what is trained on it, where the corpus does not leave that free.
    terms: the licence in words.
    protocol: what it is cross-validated by unless another one is asked for.
    folds: published ones, by the name of their protocol.
    """

    title: str
    language: str
    license: str
    terms: str
    weights: str | None = None
    url: str | None = None
    citation: str | None = None
    protocol: str = "loso"
    folds: Mapping[str, PublishedFolds] = field(default_factory=dict)


class Corpus(datasets.ArrowBasedBuilder):
    """One corpus on disk, as an index of paths, labels and speakers; no audio is read.

    A subclass sets the constants below and `row`; corpora that are not named by a path pattern override
    `is_root`, `files` and `rows`, those whose classes depend on the copy override `class_names`.
    """

    ABOUT: About | None = None  # None where the loader is for recordings of any origin
    LAYOUT: str  # what the folder looks like, for messages
    PATTERN: re.Pattern | None = None  # path below the root without extension; its named groups go to `row`
    DEPTH: int | None = 2  # folder levels that are listed; None lists all
    CLASSES: tuple[str, ...] = ()  # every class of the corpus, in the default order
    COLUMNS: tuple[str, ...] = ()  # columns beside audio, label and speaker
    EXPECTED: ClassVar[dict[str, dict[str, int]]] = {}  # column -> value -> rows in the published corpus
    SPEAKERS: tuple[tuple[int, int], ...] = ()  # (speakers, utterances) of complete speaker corpora
    OPTIONS: ClassVar[dict[str, object]] = {}  # option -> default; all corpora have `labels`
    UNIQUE_NAMES = True  # file names without extension are unique in the corpus (checked)

    def __init__(self, data_dir=None, *, cache_dir=None, strict=True, **options):
        known = {"labels": None, **self.OPTIONS}
        if unknown := sorted(set(options) - set(known)):
            raise CorpusError(f"{self.title()} has no option {', '.join(unknown)}; it has {', '.join(known)}")
        self.options = {**known, **options}
        self.strict = strict
        self.cache_dir_root = cache_dir
        self.root = self.locate(data_dir)
        self.all_classes = tuple(self.class_names())
        self.classes = self._chosen_classes()
        self.class_index = {name: index for index, name in enumerate(self.classes)}
        facts = (self.title(), str(self.root), self._options_text(), _code(type(self)))
        super().__init__(
            cache_dir=cache_dir and os.fspath(cache_dir),
            dataset_name=f"s2e_{self.title()}",
            config_name=digest(self.files(), *facts),  # so the cache holds for these files and options only
        )

    @classmethod
    def load(cls, data_dir=None, *, cache_dir=None, strict=True, **options) -> datasets.Dataset:
        """Build the index, or take it from the cache, and return it; see `hf_s2e.corpora.load_corpus`."""
        builder = cls(data_dir, cache_dir=cache_dir, strict=strict, **options)
        builder._build()
        try:
            dataset = builder._read()
        except (OSError, ValueError, datasets.exceptions.DatasetsError):  # a damaged cache is built anew
            builder._build(datasets.DownloadMode.FORCE_REDOWNLOAD)
            dataset = builder._read()
        if builder.info.description:
            warnings.warn(builder._message(builder.info.description), CorpusWarning, stacklevel=3)
        return dataset

    # What a corpus may override

    @classmethod
    def title(cls) -> str:
        return cls.__module__.rpartition(".")[2]

    def row(self, name: dict[str, str]) -> dict | None:
        """The row of a file whose path gave the groups ``name``; None leaves the file out on purpose.

        A row has ``label`` (a class name), ``speaker`` and what `COLUMNS` names.
        """
        raise NotImplementedError(f"{type(self).__name__} needs row() or rows()")

    def is_root(self, folder: Path) -> bool:
        return any(self._parse(path, folder) for path, _ in walk(folder, self.DEPTH) if is_audio(path))

    def files(self) -> Iterator[tuple[str, int]]:
        """All files that the index depends on, as ``(path, size)``."""
        return walk(self.root, self.DEPTH)

    def rows(self, report: Report) -> Iterator[dict]:
        """All rows, with ``path`` and ``size``; what cannot become a row is added to ``report``."""
        for path, size in self.files():
            if not is_audio(path):
                continue
            name = self._parse(path, self.root)
            if name is None:
                report.add(f"audio files whose names do not follow {self.LAYOUT}", path)
            elif row := self.row(name):
                yield {"path": path, "size": size, **row}

    def class_names(self) -> Iterable[str]:
        return self.CLASSES

    def expected(self) -> dict[str, dict[str, int]]:
        """`EXPECTED`, of which counts other than the label's hold only while all classes are taken."""
        if self.classes == self.all_classes:
            return self.EXPECTED
        return {column: counts for column, counts in self.EXPECTED.items() if column == "label"}

    def expected_names(self) -> Iterable[str]:
        """File names without extension that the published corpus has, where they are known."""
        return ()

    # Shared machinery

    def locate(self, data_dir) -> Path:
        """The corpus' root: the folder given, or the one folder in it that has the layout.

        Raises:
            CorpusError: not a folder, or no such layout, or several; the layout and what was found are shown.
        """
        if data_dir is None:
            raise CorpusError(f"{self.title()} needs data_dir=, a folder with {self.LAYOUT}")
        folder = Path(data_dir).expanduser().absolute()
        if not folder.is_dir():
            raise CorpusError(f"{folder} is not a folder; {self.title()} needs one with {self.LAYOUT}")
        if self.is_root(folder):
            return folder
        inner = [child for child in sorted(folder.iterdir()) if child.is_dir() and self.is_root(child)]
        if len(inner) == 1:
            return inner[0]
        several = f"several such folders: {', '.join(path.name for path in inner)}"
        found = several if inner else show_entries(folder)
        raise CorpusError(f"{folder} does not look like {self.title()}\n  expected: {self.LAYOUT}\n  found:    {found}")

    def beside(self, table: str) -> Path | None:
        """A table of the corpus: in its root, or above it where the root is the audio folder."""
        folders = (self.root, *self.root.parents[:2])
        return next((folder / table for folder in folders if (folder / table).is_file()), None)

    def choose_speakers(self, speakers: Iterable[str]) -> list[str]:
        """``num_speakers`` of them, drawn by ``speaker_seed``; for corpora that have these options."""
        speakers = sorted(speakers)
        self.speakers_found = len(speakers)
        return draw_speakers(speakers, self.options["num_speakers"], self.options["speaker_seed"])

    def _chosen_classes(self) -> tuple[str, ...]:
        labels = self.options["labels"]
        if labels is None:
            return self.all_classes
        if isinstance(labels, str) or len(set(labels)) < len(labels) or not labels:
            raise CorpusError(f"labels must be a list of different class names, not {labels!r}")
        if unknown := [label for label in labels if label not in self.all_classes]:
            raise CorpusError(f"{self.title()} has no class {unknown}; it has {list(self.all_classes)}")
        return tuple(labels)

    def _options_text(self) -> str:
        return json.dumps(self.options, sort_keys=True, default=str)

    def _parse(self, path: str, root: str | os.PathLike) -> dict[str, str] | None:
        relative = without_extension(path[len(os.fspath(root)) :].lstrip(os.sep))
        match = self.PATTERN.fullmatch(relative.replace(os.sep, "/"))
        return match and match.groupdict()

    def _info(self) -> datasets.DatasetInfo:
        label = datasets.ClassLabel(names=list(self.classes))
        more = {column: TEXT for column in self.COLUMNS}
        audio = datasets.Audio(decode=False)
        return datasets.DatasetInfo(
            features=datasets.Features({"audio": audio, "label": label, "speaker": TEXT, **more})
        )

    def _split_generators(self, dl_manager):
        return [datasets.SplitGenerator(name=datasets.Split.TRAIN)]

    def _generate_tables(self):
        report, counts = Report(), {column: Counter() for column in ["label", *self.expected()]}
        rows = self._checked(report, counts)
        for number, batch in enumerate(iter(lambda: list(itertools.islice(rows, ROWS_PER_BATCH)), [])):
            yield number, self._table(batch)
        if not any(counts["label"].values()):
            report.add("no utterance left", f"expected {self.LAYOUT}")
            raise CorpusError(self._message(str(report)))
        self.info.description = str(report)  # kept in the cache: a copy with faults says so at every load
        if report and self.strict:
            raise CorpusError(self._message(str(report)))

    def _checked(self, report: Report, counts: dict[str, Counter]) -> Iterator[dict]:
        """The rows that are in order and of the chosen classes; all others go to the report."""
        names: dict[str, str] = {}
        for row in self.rows(report):
            path = row["path"]
            if self.UNIQUE_NAMES:
                name = without_extension(os.path.basename(path))
                if name in names:
                    report.add("utterances found twice, the second left out", f"{path} and {names[name]}")
                    continue
                names[name] = path
            if row["label"] not in self.class_index:
                continue
            if not _is_utf8(path):
                report.add("file names that are not valid UTF-8; rename them", repr(path))
                continue
            if not row["size"]:
                report.add("empty files or broken links", path)
                continue
            for column, counter in counts.items():
                counter[row[column]] += 1
            yield row
        self._compare(report, counts, names)

    def _compare(self, report: Report, counts: dict[str, Counter], names: dict[str, str]) -> None:
        """Add to the report what differs from the published corpus, and classes that have no utterance."""
        for column, expected in self.expected().items():
            for value, number in expected.items():
                if counts[column][value] != number and (column != "label" or value in self.class_index):
                    report.differences.append((f"{column} {value}", number, counts[column][value]))
        if self.SPEAKERS:
            self._compare_speakers(report, counts["label"].total())
        for name in self.expected_names():
            if name in names:
                continue
            if self.row(self.PATTERN.fullmatch(name).groupdict())["label"] in self.class_index:
                report.add("missing files", name)
        for label in self.classes:
            if not counts["label"][label]:
                report.add("classes without an utterance", label)

    def _compare_speakers(self, report: Report, utterances: int) -> None:
        complete = dict(self.SPEAKERS)
        if self.speakers_found not in complete:
            report.differences.append(("speakers in the copy", max(complete), self.speakers_found))
        elif len(self.classes) == self.speakers_found and utterances != complete[self.speakers_found]:
            report.differences.append(("utterances", complete[self.speakers_found], utterances))

    def _table(self, rows: list[dict]) -> pa.Table:
        schema = self.info.features.arrow_schema
        columns = {column: [row.get(column) for row in rows] for column in ["speaker", *self.COLUMNS]}
        columns["audio"] = [{"bytes": None, "path": row["path"]} for row in rows]
        columns["label"] = [self.class_index[row["label"]] for row in rows]
        return pa.table({name: columns[name] for name in schema.names}, schema=schema)

    def _message(self, findings: str) -> str:
        remedy = "Repair the copy, or pass strict=False to go on with what is in order."
        if not self.strict:
            remedy = "What is named here was left out (strict=False)."
        return f"{self.title()} in {self.root}:\n{findings}\n  {remedy}"

    def _build(self, mode=None) -> None:
        """Write the index unless the cache has it.

        Raises:
            CorpusError: the copy has faults and ``strict`` holds, or no row is left.
        """
        try:
            self.download_and_prepare(download_mode=mode)
        except datasets.exceptions.DatasetGenerationError as error:
            if isinstance(error.__cause__, CorpusError):
                raise error.__cause__ from None
            raise
        if self.info.description and self.strict:
            raise CorpusError(self._message(self.info.description))

    def _read(self) -> datasets.Dataset:
        dataset = self.as_dataset(datasets.Split.TRAIN)
        if len(dataset) != self.info.splits["train"].num_examples:
            raise OSError(f"the index in {self.cache_dir} is cut short")
        return dataset


def draw_speakers(speakers: Iterable[str], number: int | None, seed: int) -> list[str]:
    """``number`` of the speakers, or all if it is None, sorted; the same for the same speakers and seed."""
    speakers = sorted(speakers)
    if number is None:
        return speakers
    if not isinstance(number, int) or not 1 <= number <= len(speakers):
        raise CorpusError(f"num_speakers={number!r}, but there are {len(speakers)} speakers")
    return sorted(random.Random(seed).sample(speakers, number))


def _is_utf8(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _code(corpus: type[Corpus]) -> str:
    """The source of the modules that define a corpus, so that an edited module never meets its old cache."""
    modules = (sys.modules[c.__module__] for c in corpus.__mro__ if issubclass(c, Corpus))
    sources = [module.__file__ for module in modules if getattr(module, "__file__", None)]
    return "".join(Path(source).read_text(encoding="utf-8") for source in sources)
