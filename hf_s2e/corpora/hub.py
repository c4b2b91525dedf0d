"""Any dataset with audio and label (and speaker) columns: from the Hub, from a folder, or already in memory.

``data_dir`` is a Hub id, a folder that `datasets` can load or that ``save_to_disk`` wrote, or a `Dataset` or
`DatasetDict`. Options: ``split`` (all splits by default, kept in a column), ``config`` and ``revision`` of
the Hub dataset, the names of the columns (``audio``, ``label``, ``speaker``), ``label_map`` to translate
labels; with ``label`` naming the speakers' column, ``num_speakers`` and ``speaker_seed``. Where the dataset
holds the encoded audio itself, as most on the Hub do, it is written to files below ``cache_dir``, once: what
decodes in several processes, and what names utterances, goes by paths.
"""

import hashlib
import os
import re
import warnings
from pathlib import Path

import datasets
import pyarrow.compute

from ..model.atomic_write_s2e import atomic_write
from .base import draw_speakers
from .files import CorpusError, CorpusWarning, Report


class Hub:
    @staticmethod
    def load(
        data_dir, *, cache_dir=None, strict=True, labels=None, split=None, config=None, revision=None,
        audio="audio", label="label", speaker="speaker", label_map=None, num_speakers=None, speaker_seed=0,
        **unknown,
    ) -> datasets.Dataset:  # fmt: skip
        """See the module; the arguments that all corpora share are those of `hf_s2e.corpora.load_corpus`."""
        if unknown:
            raise CorpusError(f"hub has no option {', '.join(unknown)}; its options are in docs/corpora.md")
        if num_speakers and label != speaker:
            raise CorpusError("num_speakers needs the speaker as label: give both columns the same name")
        found = _open(data_dir, split, config, revision, cache_dir and os.fspath(cache_dir))
        dataset = _rename(_one_table(found), {"audio": audio, "label": label, "speaker": speaker})
        if num_speakers:
            labels = draw_speakers(set(dataset["speaker"]) - {None, ""}, num_speakers, speaker_seed)
        return _to_files(_encode(dataset, labels, label_map, strict), cache_dir)


def _open(source, split, config, revision, cache_dir):
    if source is None:
        raise CorpusError("hub needs data_dir=, a dataset id, a folder or a datasets.Dataset")
    if not isinstance(source, (datasets.Dataset, datasets.DatasetDict)):
        source = os.fspath(source)
        files = ("dataset_info.json", "dataset_dict.json")
        if any(os.path.isfile(os.path.join(source, name)) for name in files):
            source = datasets.load_from_disk(source)
        else:
            try:
                source = datasets.load_dataset(source, config, revision=revision, cache_dir=cache_dir)
            except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
                raise CorpusError(f"cannot load the dataset {source!r}: {error}") from error
    if split is None:
        return source
    if isinstance(source, datasets.Dataset) or split not in source:
        has = list(source) if isinstance(source, datasets.DatasetDict) else "none"
        raise CorpusError(f"no split {split!r} in the dataset; its splits: {has}")
    return source[split]


def _one_table(found) -> datasets.Dataset:
    """The dataset, or all splits one after the other with their names in a column ``split``."""
    if isinstance(found, datasets.Dataset):
        return found
    splits = []
    for name, part in found.items():
        part = part.remove_columns("split") if "split" in part.column_names else part
        splits.append(part.add_column("split", [name] * len(part)))
    return datasets.concatenate_datasets(splits)


def _rename(dataset: datasets.Dataset, columns: dict[str, str]) -> datasets.Dataset:
    for ours, theirs in columns.items():
        if theirs not in dataset.column_names:
            if ours == "speaker":
                nobody = [None] * len(dataset)
                dataset = dataset.add_column("speaker", nobody, feature=datasets.Value("string"))
                continue
            has = ", ".join(dataset.column_names)
            raise CorpusError(f'the dataset has no column {theirs!r}, only {has}; name it: {ours}="..."')
    if columns["label"] == columns["speaker"]:
        speakers = list(dataset[columns["speaker"]])
        dataset = dataset.remove_columns("label") if "label" in dataset.column_names else dataset
        dataset = dataset.add_column("label", speakers)
        columns = columns | {"label": "label"}
    renamed = {theirs: ours for ours, theirs in columns.items() if ours != theirs and theirs in dataset.column_names}
    hidden = {ours for ours in renamed.values() if ours in dataset.column_names} - set(renamed)
    dataset = dataset.remove_columns(sorted(hidden)).rename_columns(renamed)  # together: names may change places
    dataset = dataset.cast_column("audio", datasets.Audio(decode=False))
    return dataset.cast_column("speaker", datasets.Value("string"))


def _encode(dataset: datasets.Dataset, labels, label_map, strict: bool) -> datasets.Dataset:
    """The rows whose label is among the classes, with ``label`` as a ClassLabel of these."""
    feature, values, report = dataset.features["label"], dataset["label"], Report()
    if isinstance(feature, datasets.ClassLabel):
        known = list(feature.names)
        values = [None if value is None or value < 0 else known[value] for value in values]
    else:
        values = [None if value in (None, "") else str(value) for value in values]
        known = sorted(set(values) - {None})
    for row, value in enumerate(values):
        if value is None:
            report.add("rows without a label", f"row {row}")
        elif label_map and value not in label_map:
            report.add("unknown labels", f"row {row}: {value!r} is not among {', '.join(label_map)}")
    silent = [row for row, there in enumerate(_has_audio(dataset)) if not there]
    for row in silent:
        report.add("rows without audio, neither a path nor the sound itself", f"row {row}")
        values[row] = None
    if label_map:
        values = [label_map.get(value) for value in values]
        known = list(dict.fromkeys(label_map.values()))
    if unknown := [name for name in labels or () if name not in known]:
        raise CorpusError(f"the dataset has no class {unknown}; it has {known}")
    if report and strict:
        raise CorpusError(f"hub:\n{report}\n  Repair it, or pass strict=False to leave these rows out.")
    if report:
        warnings.warn(f"hub, left out:\n{report}", CorpusWarning, stacklevel=5)
    names = list(labels or known)
    index = {name: i for i, name in enumerate(names)}
    codes = [index.get(value, -1) for value in values]
    dataset = dataset.remove_columns("label")
    dataset = dataset.add_column("label", codes, feature=datasets.ClassLabel(names=names))
    return dataset.select([row for row, code in enumerate(codes) if code >= 0])


def _has_audio(dataset: datasets.Dataset) -> list[bool]:
    """Whether each row has a path or the sound itself; no sound is read."""
    found: list[bool] = []
    for batch in dataset.select_columns("audio").with_format("arrow").iter(batch_size=1000):
        column = batch["audio"].combine_chunks()
        lengths = (pyarrow.compute.binary_length(column.field(name)).to_pylist() for name in ("path", "bytes"))
        found += [bool(there and (path or data)) for there, path, data in zip(column.is_valid().to_pylist(), *lengths)]
    return found


def _to_files(dataset: datasets.Dataset, cache_dir) -> datasets.Dataset:
    """The same with a path in every row's ``audio``; a file is named by its content and its name there."""
    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE, "s2e_hub_audio")
    paths, written = [], False
    for audio in dataset.select_columns("audio"):
        path, data = ((audio["audio"] or {}).get(key) for key in ("path", "bytes"))
        if data:
            name = re.sub(r"[^\w. -]", "_", os.path.basename(path or "")).encode()[-100:].decode(errors="ignore")
            name = name.lstrip(".") or "audio"
            path = _write_once(folder / hashlib.sha256(data).hexdigest()[:32] / name, data)
            written = True
        paths.append(path)
    if not written:
        return dataset
    dataset = dataset.remove_columns("audio").add_column("audio", paths)
    return dataset.cast_column("audio", datasets.Audio(decode=False))


def _write_once(path: Path, data: bytes) -> str:
    if not (path.is_file() and path.stat().st_size == len(data)):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write_bytes(data)
    return str(path)
