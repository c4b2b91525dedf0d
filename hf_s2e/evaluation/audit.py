"""Leakage audit: what lets a model score on a corpus without hearing the emotion.

`s2e audit NAME --data-dir DIR`, or `audit(dataset)`. Accuracies are UA in percent; how they are reached is
said in trivial_baselines.py.
"""

import hashlib
import io
import os
import warnings
from collections import Counter
from multiprocessing.pool import ThreadPool
from typing import NamedTuple

import numpy as np

from ..corpora.index import CorpusIndex, audio_paths, below_common_folder, few, text_column
from .protocols import Protocol, make_protocol
from .trivial_baselines import chance_ua, random_folds, speaker_folds, ua_by_duration, ua_by_speaker

SILENT_PEAK = 1e-3  # of full scale: -60 dB
CLIPPED_LEVEL, CLIPPED_RUN = 0.999, 3  # so many neighbouring samples at full scale
LOW_RATE = 8000  # Hz; the network looks at 0 to 4 kHz
CONSTANT_SHARE, CONSTANT_FILES = 0.2, 5  # of files with the same length to the millisecond
SURPRISING_UA = 15  # points above chance; half of the way from chance to 100 is an error
HISTOGRAM_BINS = 30


def audit(dataset, *, protocol=None) -> dict:
    """Look for everything that makes scores on this corpus mean less than they seem to.

    dataset: with `audio` (not decoded), `label` (ClassLabel) and, where known, `speaker` and `split`.
    protocol: a Protocol of this dataset; its folds are then checked for shared speakers and used for the
        accuracies that speaker and duration alone reach.

    Returns `{"findings": [{"kind", "severity", "message", "files"}], "counts": {...}}`, which json can write.
    Severity is "error" for what makes results wrong, "warning" for what one has to know. Files are named by
    their path below the folder that all share. Kinds: unreadable, silent, clipped, duplicate_row,
    duplicate_audio, constant_duration, sampling_rate, unlabelled, empty_class, label_with_one_speaker,
    no_speaker, speaker_overlap, speaker_predicts_label, duration_predicts_label; and from `s2e audit`
    faulty_copy, what a strict load of the corpus refuses.
    """
    names = _file_names(dataset)
    if not names:
        raise ValueError("the corpus has no utterances")
    index = _lenient_index(dataset, names)
    files = inspect_files(dataset)
    folds = [(f.name, *protocol.indices(dataset, f)) for f in protocol.folds] if protocol else []
    labelled = set(index.labels) - {-1}
    labels_are_speakers = index.speakers == [index.classes[label] for label in index.labels]
    report = {"findings": [], "counts": _counts(index, files)}
    report["findings"] += _file_findings(names, files) + _duplicates(index, files)
    report["findings"] += _durations(names, files) + _rates(names, files)
    report["findings"] += _overlap(index, folds or _own_split(index))
    if len(labelled) > 1 and not labels_are_speakers:  # VoxCeleb: nothing to say about labels
        report["findings"] += _labels(index)
        report["findings"] += _speaker_alone(index, folds, report["counts"])
        report["findings"] += _duration_alone(index, files, folds, report["counts"])
    return report


class File(NamedTuple):
    """One decoded file: seconds, stored rate in Hz, levels of full scale, hash of samples; or an error."""

    error: str | None = None
    seconds: float = 0.0
    rate: int | None = None
    peak: float = 0.0
    clipped: int = 0
    digest: bytes = b""


def inspect_files(dataset):
    """Decode every file once, in a few threads and with a progress bar; a list of File in row order."""
    from tqdm import tqdm

    rows = (row["audio"] for row in dataset.select_columns("audio"))
    with warnings.catch_warnings(), ThreadPool(min(8, os.cpu_count() or 1)) as pool:
        warnings.simplefilter("ignore")  # silence is reported as a finding
        files = pool.imap(_inspect, rows, chunksize=16)
        return list(tqdm(files, total=len(dataset), desc="decoding", unit="file", disable=None))


def _inspect(source):
    from ..audio import SAMPLING_RATE, AudioError, load_audio

    source = {"path": source} if isinstance(source, str) else source
    try:
        samples = load_audio(source)
    except (AudioError, OSError) as error:
        return File(error=str(error).removeprefix(f"{source.get('path')}: "))
    loud = np.abs(samples)
    full = np.concatenate([[0], loud >= CLIPPED_LEVEL, [0]]).astype(np.int8)
    starts, ends = np.flatnonzero(np.diff(full) == 1), np.flatnonzero(np.diff(full) == -1)
    runs = ends - starts
    # as 16-bit integers, so that the same recording is found again in another lossless format
    integers = np.clip(np.rint(samples * 32768), -32768, 32767).astype(np.int16)
    return File(
        seconds=len(samples) / SAMPLING_RATE,
        rate=_header_rate(source),
        peak=float(loud.max()),
        clipped=int(runs[runs >= CLIPPED_RUN].sum()),
        digest=hashlib.sha256(integers.tobytes()).digest(),
    )


def _header_rate(source):
    """Sampling rate in Hz as stored; None where soundfile does not know the format (m4a)."""
    import soundfile

    try:
        file = io.BytesIO(source["bytes"]) if source.get("bytes") else source["path"]
        return soundfile.info(file).samplerate
    except soundfile.LibsndfileError:
        return None


def _file_names(dataset):
    paths = audio_paths(dataset)
    known = below_common_folder([path for path in paths if path is not None])
    named = iter(known)
    return [f"row {row}" if path is None else next(named) for row, path in enumerate(paths)]


def _lenient_index(dataset, names):
    """Like `read_index`, but it takes what is wrong (unlabelled: -1, no speaker: "") instead of raising."""
    classes = tuple(dataset.features["label"].names)
    labels = [label if label in range(len(classes)) else -1 for label in dataset["label"][:]]
    speakers, sessions, splits = (text_column(dataset, name) for name in ("speaker", "session", "split"))
    return CorpusIndex(names, labels, classes, speakers, sessions, splits)


def _finding(kind, severity, message, files):
    return {"kind": kind, "severity": severity, "message": message, "files": list(files)}


def _select(names, files, condition):
    return [name for name, file in zip(names, files) if not file.error and condition(file)]


def _file_findings(names, files):
    findings = []
    if broken := [(name, file.error) for name, file in zip(names, files) if file.error]:
        path, reason = broken[0]
        message = f"{len(broken)} files cannot be decoded; {path}: {reason}"
        findings.append(_finding("unreadable", "error", message, [name for name, _ in broken]))
    if silent := _select(names, files, lambda file: file.peak < SILENT_PEAK):
        message = f"{len(silent)} files have no sample above -60 dB of full scale"
        findings.append(_finding("silent", "error", message, silent))
    if clipped := _select(names, files, lambda file: file.clipped):
        message = f"{len(clipped)} files have {CLIPPED_RUN} or more neighbouring samples at full scale"
        findings.append(_finding("clipped", "warning", message, clipped))
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        message = f"{len(repeated)} files are in the table more than once"
        findings.append(_finding("duplicate_row", "error", message, repeated))
    return findings


def _duplicates(index, files):
    """Files with equal samples (16-bit, 16 kHz, mono); silent ones are equal for another reason."""
    groups = {}
    for row, file in enumerate(files):
        if not file.error and file.peak >= SILENT_PEAK:
            groups.setdefault(file.digest, []).append(row)
    findings = []
    for rows in groups.values():
        names = sorted({index.utterances[row] for row in rows})
        if len(names) < 2:
            continue
        labels = {index.labels[row] for row in rows}
        speakers = {index.speakers[row] for row in rows} if index.speakers else set()
        message = f"{len(names)} files have equal samples"
        if len(labels) > 1:
            message += " and different labels"
        if len(speakers) > 1:
            message += " and different speakers"
        severity = "error" if len(labels) > 1 or len(speakers) > 1 else "warning"
        findings.append(_finding("duplicate_audio", severity, message, names))
    return findings


def _durations(names, files):
    lengths = Counter(round(file.seconds, 3) for file in files if not file.error)
    findings = []
    for seconds, count in lengths.most_common(3):
        if count >= CONSTANT_FILES and count >= CONSTANT_SHARE * len(files):
            same = _select(names, files, lambda file, seconds=seconds: round(file.seconds, 3) == seconds)
            message = f"{count} of {len(files)} files last exactly {seconds:.3f} s: cut or padded?"
            findings.append(_finding("constant_duration", "warning", message, same))
    return findings


def _rates(names, files):
    rates = Counter(file.rate for file in files if file.rate)
    findings = []
    if len(rates) > 1:
        usual = rates.most_common(1)[0][0]
        others = _select(names, files, lambda file: file.rate not in (usual, None))
        message = f"{len(others)} files are not at the {usual} Hz of most: {dict(rates.most_common())}"
        findings.append(_finding("sampling_rate", "warning", message, others))
    if low := _select(names, files, lambda file: file.rate is not None and file.rate < LOW_RATE):
        message = f"{len(low)} files are below {LOW_RATE} Hz: they lack part of the 0 to 4 kHz that is used"
        findings.append(_finding("sampling_rate", "warning", message, low))
    return findings


def _labels(index):
    findings = []
    names = index.utterances
    if unlabelled := [name for name, label in zip(names, index.labels) if label < 0]:
        findings.append(_finding("unlabelled", "error", f"{len(unlabelled)} files have no label", unlabelled))
    speakers = index.speakers or [""] * len(names)
    if nameless := [name for name, speaker in zip(names, speakers) if not speaker]:
        message = f"{len(nameless)} files have no speaker: nothing can be said of leakage between speakers"
        findings.append(_finding("no_speaker", "warning", message, nameless))
    for number, name in enumerate(index.classes):
        rows = [row for row, label in enumerate(index.labels) if label == number]
        who = {index.speakers[row] for row in rows} - {""} if index.speakers else set()
        if not rows:
            findings.append(_finding("empty_class", "warning", f"{name!r} has no utterance", []))
        elif len(who) == 1:
            message = f"{name!r} has the one speaker {who.pop()!r}: it cannot be tested on another"
            spoken = [names[row] for row in rows]
            findings.append(_finding("label_with_one_speaker", "error", message, spoken))
    return findings


def _overlap(index, folds):
    """Speakers of a test part that the fold's other parts hold too."""
    findings = []
    for name, train, validation, test in folds if index.speakers else ():
        known = {index.speakers[row] for row in (*train, *validation)} - {""}
        if shared := known & {index.speakers[row] for row in test}:
            who = few(sorted(shared))
            message = f"fold {name!r}: {len(shared)} speakers are in training or validation, and in test ({who})"
            tested = [index.utterances[row] for row in test if index.speakers[row] in shared]
            findings.append(_finding("speaker_overlap", "error", message, tested))
    return findings


def _speaker_alone(index, folds, counts):
    if index.speakers is None:
        return []
    ua = counts["ua_by_speaker"] = ua_by_speaker(index, random_folds(index))
    if folds:
        counts["ua_by_speaker_in_protocol"] = ua_by_speaker(index, folds)
    one = [s for s, labels in counts["speakers"].items() if len(labels) == 1 and sum(labels.values()) > 1]
    about = f"; {len(one)} of {len(counts['speakers'])} speakers have one label only" if one else ""
    message = f"who speaks reaches {ua} % UA (utterances split at random){about}"
    return _shortcut("speaker_predicts_label", message, ua, index)


def _duration_alone(index, files, folds, counts):
    seconds = [np.nan if file.error else file.seconds for file in files]
    folds = folds or speaker_folds(index) or random_folds(index)
    ua = counts["ua_by_duration"] = ua_by_duration(index, seconds, folds)
    return _shortcut("duration_predicts_label", f"the duration reaches {ua} % UA", ua, index)


def _shortcut(kind, message, ua, index):
    """A finding where something that is not emotion reaches clearly more than chance."""
    chance, noise = chance_ua(index)
    if ua is None or ua < chance + max(SURPRISING_UA, 3 * noise):
        return []
    severity = "error" if ua >= (100 + chance) / 2 else "warning"
    return [_finding(kind, severity, f"{message}; chance is {chance} %", [])]


def _own_split(index):
    """The corpus' own division as a fold for each part that is not for training."""
    rows = {name: [] for name in ("train", "validation", "test")}
    for row, split in enumerate(index.splits or ()):
        rows.setdefault(split, []).append(row)
    parts = ("validation", [], rows["validation"]), ("test", rows["validation"], rows["test"])
    return [(part, rows["train"], validation, tested) for part, validation, tested in parts if tested]


def _counts(index, files):
    """Plain numbers for the report; seconds of the files that could be decoded, accuracies in percent."""
    decoded = [row for row, file in enumerate(files) if not file.error]
    seconds = np.array([files[row].seconds for row in decoded])
    label_names = [index.classes[label] if label >= 0 else "" for label in index.labels]
    speakers = {}
    for speaker, label in zip(index.speakers or (), label_names):
        speakers.setdefault(speaker, Counter())[label] += 1
    used = Counter(label_names)
    counts = {
        "files": len(files),
        "unreadable": len(files) - len(decoded),
        "hours": round(float(seconds.sum()) / 3600, 3),
        "classes": {name: used[name] for name in index.classes},
        "speakers": {speaker: dict(labels) for speaker, labels in sorted(speakers.items())},
        "sampling_rates": {str(k or "unknown"): n for k, n in Counter(files[row].rate for row in decoded).items()},
        "chance_ua": chance_ua(index)[0],
    }
    if decoded:
        counts["duration_s"] = _duration_counts(seconds, np.array(label_names)[decoded], used)
    return counts


def _duration_counts(seconds, label_names, classes):
    """Range, median and a histogram by class; the longest hundredth is counted in the last bin."""
    edges = np.histogram_bin_edges(seconds, HISTOGRAM_BINS, (seconds.min(), np.quantile(seconds, 0.99)))
    cut = np.minimum(seconds, edges[-1])
    return {
        "min": round(float(seconds.min()), 3),
        "median": round(float(np.median(seconds)), 3),
        "max": round(float(seconds.max()), 3),
        "histogram_edges": np.round(edges, 4).tolist(),
        "histogram": {name: np.histogram(cut[label_names == name], edges)[0].tolist() for name in classes},
    }


def audit_corpus(name, data_dir=None, *, protocol=None, **options) -> dict:
    """Load a corpus, faulty or not, and audit it; what a strict load refuses is a finding, `faulty_copy`.

    name, data_dir, options: as `load_corpus` takes them.
    protocol: a name, as `make_protocol` takes it, or a JSON file.

    Returns what `audit` does. Raises ValueError, OSError or ImportError where the corpus or the protocol cannot be
    had.
    """
    dataset, faults = _load(name, data_dir, **options)
    report = audit(dataset, protocol=_protocol(protocol, dataset))
    return report | {"findings": faults + report["findings"]}


def _load(name, data_dir, **options):
    """The corpus without what a strict load refuses, and a finding for that: it is what an audit is for."""
    from ..corpora import CorpusWarning, load_corpus

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dataset = load_corpus(name, data_dir=data_dir, strict=False, **options)
    findings = []
    for warning in caught:
        if issubclass(warning.category, CorpusWarning):
            findings.append(_finding("faulty_copy", "error", str(warning.message), []))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return dataset, findings


def _protocol(name, dataset):
    if name is None:
        return None
    if name.endswith(".json"):
        return Protocol.load(name)
    # an official split that shares speakers is a finding, not a reason to stop
    return make_protocol(name, dataset, speaker_disjoint=name != "split")
