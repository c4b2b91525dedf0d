"""What ready-made features reach under the same folds: openSMILE and a speaker embedding, with a linear SVM.

    python benchmarks/references.py --corpus emodb --data_dir DIR --protocol loso --output_dir OUT

eGeMAPSv02 (88 functionals; Eyben et al., 2016), ComParE 2016 (6,373; Schuller et al., 2016) and Resemblyzer's
utterance embedding (256; its GE2E weights lie in its wheel), each of the audio that the networks are given: 16
kHz, mono, 16 bit, of which the networks use 0 to 4 kHz and the references all. For scale, the same SVM on the
logarithm of the duration alone, and the training part's most frequent class. Standardisation and C see the
training part only: C is the one with the highest UA when groups of training speakers are left out in turn. OUT
gets

    references.json     name -> {"ua", "wa", "measured": true, ...}, which training/cross_validate.py reads
    references.parquet  the predictions, in the form of predictions.parquet
    protocol.json       the folds
    references.md       all of it with intervals and, where OUT has whole runs of networks, paired tests with those

and may be the folder of a cross-validation with the same corpus and protocol. Needs no network once
`pip install 'hf-s2e[bench]'` has run. Of that extra: openSMILE may be used for research and teaching, not in
products; Resemblyzer imports webrtcvad, which pip builds (a C compiler is needed) and which imports
`pkg_resources`, hence setuptools below 81.
"""

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
from accelerate import Accelerator
from tqdm import tqdm
from transformers import HfArgumentParser

from hf_s2e.audio import SAMPLING_RATE
from hf_s2e.corpora.index import audio_paths, read_index, shuffled
from hf_s2e.evaluation.metrics import unweighted_accuracy
from hf_s2e.evaluation.protocols import Protocol
from hf_s2e.evaluation.reports import markdown_table, summarize
from hf_s2e.model.atomic_write_s2e import atomic_write
from hf_s2e.training.arguments import ProtocolArguments
from hf_s2e.training.fold_runs import collect
from hf_s2e.training.inputs import read_corpus, read_protocol, store_folder
from hf_s2e.training.output import prediction_table, write_json
from hf_s2e.training.result_folder import RUNS, ResultFolder
from hf_s2e.training.runtime import readable_errors
from hf_s2e.training.wave_store import FULL_SCALE, WaveStore

C_GRID = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
INNER_FOLDS = 5  # groups of training speakers that C is chosen by
CLASSIFIER = "linear SVM, one against one, classes weighted equally"
ABOUT = (
    f"Rows named *_svm: {CLASSIFIER}, on standardised features; C in {', '.join(f'{c:g}' for c in C_GRID)} by "
    f"the UA on training speakers, left out in {INNER_FOLDS} groups in turn. Deterministic, hence one run. They hear "
    "the recordings up to 8 kHz, the networks up to 4 kHz."
)


@dataclass
class Arguments(ProtocolArguments):
    output_dir: str = field(default="out", metadata={"help": "what is written"})


# -- features


def opensmile_extractor(feature_set: str) -> Callable[[np.ndarray], np.ndarray]:
    import opensmile

    smile = opensmile.Smile(opensmile.FeatureSet[feature_set], opensmile.FeatureLevel.Functionals)
    return lambda wave: smile.process_signal(wave, SAMPLING_RATE).to_numpy()[0]


def resemblyzer_extractor() -> Callable[[np.ndarray], np.ndarray]:
    """Its own preprocessing included: loudness raised to -30 dBFS, long silences cut."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pkg_resources and a module of SciPy that will move
        from resemblyzer import VoiceEncoder, preprocess_wav

    encoder = VoiceEncoder("cpu", verbose=False)
    return lambda wave: encoder.embed_utterance(preprocess_wav(wave))


# name -> (distribution that makes the features, maker of the function: float32 (samples,) to (features,))
EXTRACTORS: dict[str, tuple[str, Callable]] = {
    "opensmile_egemaps_svm": ("opensmile", lambda: opensmile_extractor("eGeMAPSv02")),
    "opensmile_compare_svm": ("opensmile", lambda: opensmile_extractor("ComParE_2016")),
    "resemblyzer_svm": ("resemblyzer", resemblyzer_extractor),
}


def extract(name: str, store: WaveStore, paths: Sequence[str], folder: Path) -> tuple[np.ndarray, float]:
    """Features float64 (utterances, features) and the seconds that they took, from `folder` if kept there.

    Raises:
        ValueError: an utterance has no usable features; the message names its file.
    """
    package, make = EXTRACTORS[name]
    digest = hashlib.sha256(json.dumps([package, version(package), store.lengths.tolist()]).encode())
    digest.update(store.waves.numpy())
    kept = folder / f"{name}-{digest.hexdigest()[:24]}.npz"
    if kept.is_file():
        with np.load(kept) as content:
            return content["features"], float(content["seconds"])
    started, function = time.perf_counter(), make()
    rows = []
    for number, path in enumerate(tqdm(paths, desc=name, unit="file")):
        start, length = int(store.offsets[number]), int(store.lengths[number])
        wave = store.waves[start : start + length].numpy().astype(np.float32) / FULL_SCALE
        rows.append(_checked(function, wave, f"{path}: {name}"))
    features, seconds = np.stack(rows), time.perf_counter() - started
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(kept) as partial, open(partial, "wb") as file:
        np.savez(file, features=features, seconds=seconds)
    return features, seconds


def _checked(function, wave, what):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they would warn of (too short, silent) is found below
            values = np.asarray(function(wave), dtype=np.float64)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{what} failed on it ({error}). Repair the recording or leave it out") from error
    if not np.isfinite(values).all():
        seconds = len(wave) / SAMPLING_RATE
        raise ValueError(
            f"{what} gives values that are not finite; expected {seconds:.2f} s of speech. Is it silent or "
            "too short? Repair it or leave it out"
        )
    return values


# -- classifier


def svm_predictions(
    features: np.ndarray,
    labels: np.ndarray,
    speakers: Sequence[str],
    train: np.ndarray,
    test: np.ndarray,
) -> tuple[np.ndarray, float]:
    """Predicted classes of the test rows, and the C chosen on the training rows.

    Args:
        features: (utterances, features). labels: class numbers (utterances,). train, test: row numbers.
        speakers: (utterances,); C is chosen by leaving groups of them out.

    Raises:
        ValueError: a single training speaker, or a single class in training.
    """
    guesses = np.empty((len(C_GRID), len(train)), dtype=np.int64)
    for inner in inner_folds([speakers[row] for row in train]):
        guesses[:, inner] = _fit_predict(features, labels, np.delete(train, inner), train[inner], C_GRID)
    classes = int(labels.max()) + 1
    scores = [unweighted_accuracy(labels[train], guess, classes) for guess in guesses]
    best = C_GRID[int(np.argmax(scores))]  # the smallest of those that are equally good
    return _fit_predict(features, labels, train, test, [best])[0], best


def inner_folds(speakers: Sequence[str]) -> list[np.ndarray]:
    """Row numbers of each left-out part: whole speakers, the same on every machine.

    Raises:
        ValueError: there is only one speaker.
    """
    order = shuffled(sorted(set(speakers)), 0, "inner folds")
    if len(order) < 2:
        raise ValueError("C cannot be chosen without the test speakers: training has a single speaker")
    group = {speaker: number % INNER_FOLDS for number, speaker in enumerate(order)}
    of_row = np.array([group[speaker] for speaker in speakers])
    return [np.flatnonzero(of_row == number) for number in sorted(set(group.values()))]


def _fit_predict(features, labels, train, test, grid):
    """Predictions (C values, test rows); the kernel of the standardised features is computed once."""
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    scaler = StandardScaler().fit(features[train])
    fitted, tested = scaler.transform(features[train]), scaler.transform(features[test])
    kernel, kernel_test = fitted @ fitted.T, tested @ fitted.T
    machines = [SVC(kernel="precomputed", C=c, class_weight="balanced") for c in grid]
    return np.stack([svm.fit(kernel, labels[train]).predict(kernel_test) for svm in machines])


def majority_predictions(labels: np.ndarray, train: np.ndarray, test: np.ndarray) -> np.ndarray:
    """The training part's most frequent class (the first of equally frequent ones) for every test row."""
    return np.full(len(test), np.bincount(labels[train]).argmax())


# -- protocol and report


def cross_validate(
    name: str, features: np.ndarray | None, dataset, protocol: Protocol
) -> tuple[pd.DataFrame, dict[str, float]]:
    """Predictions on every fold's test part, and the C of each fold; no features: the majority class."""
    index = read_index(dataset)
    labels, names = np.array(index.labels), index.classes
    speakers = index.speakers or index.utterances
    rows, chosen = [], {}
    for fold in tqdm(protocol.folds, desc=name, unit="fold"):
        train, _, test = protocol.indices(dataset, fold)
        if features is None:
            guesses = majority_predictions(labels, train, test)
        else:
            guesses, chosen[fold.name] = svm_predictions(features, labels, speakers, train, test)
        table = prediction_table(dataset, test, np.eye(len(names))[guesses], run=0, fold=fold.name, method=name)
        rows.append(table.drop(columns="posterior"))  # an SVM has none
    return pd.concat(rows, ignore_index=True), chosen


def evaluate(dataset, store: WaveStore, protocol: Protocol, cache: Path) -> tuple[pd.DataFrame, dict]:
    """Predictions of all references, and for each name the facts that go into references.json."""
    duration = np.log(store.lengths.numpy() / SAMPLING_RATE)[:, None]
    jobs = {"majority_class": (None, 0.0, None), "duration_svm": (duration, 0.0, None)}
    paths = audio_paths(dataset)
    for name, (package, _) in EXTRACTORS.items():
        jobs[name] = (*extract(name, store, paths, cache), package)
    tables, facts = [], {}
    for name, (features, seconds, package) in jobs.items():
        started = time.perf_counter()
        table, chosen = cross_validate(name, features, dataset, protocol)
        tables.append(table)
        facts[name] = {
            "measured": True,
            "protocol": protocol.hash,
            "classifier": "most frequent class" if features is None else CLASSIFIER,
            "features": 0 if features is None else features.shape[1],
            "C": chosen,
            "versions": {one: version(one) for one in (package, "scikit-learn", "numpy") if one},
            "seconds": {"features": round(seconds, 1), "svm": round(time.perf_counter() - started, 1)},
        }
    return pd.concat(tables, ignore_index=True), facts


def keep_protocol(folder: Path, protocol: Protocol) -> None:
    """Write protocol.json.

    Raises:
        ValueError: the folder holds results of another protocol or corpus.
    """
    file = folder / "protocol.json"
    if file.is_file() and (found := Protocol.load(file)).hash != protocol.hash:
        raise ValueError(
            f"{folder} holds results of {found.corpus}, protocol {found.name} ({found.hash[:12]}), not of "
            f"{protocol.corpus}, {protocol.name} ({protocol.hash[:12]}): choose another --output_dir"
        )
    folder.mkdir(parents=True, exist_ok=True)
    protocol.save(file)


def write_references(folder: Path, predictions: pd.DataFrame, facts: dict, protocol: Protocol) -> str:
    """references.parquet, references.json and references.md; returns the last."""
    common = {"corpus": protocol.corpus, "protocol": protocol, "classes": protocol.classes}
    pairs = len(protocol.classes) * (len(protocol.classes) - 1) // 2
    sizes = {name: pairs * (one["features"] + 1) if one["features"] else 0 for name, one in facts.items()}
    about = {"recipe": CLASSIFIER, "base": "none"}
    predicted = predictions
    if (folder / "summary.json").is_file() and (folder / RUNS).is_file():
        known = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        about = {key: known[key] for key in about} | {"starts": known.get("starts")}
        networks, trained = collect(ResultFolder(folder), protocol)
        predicted, sizes = pd.concat([predictions, networks]), sizes | trained
    summary = summarize(predicted, **common, **about, trained_parameters=sizes)
    summary["paired"] = [pair for pair in summary["paired"] if pair["a"] in facts and pair["b"] not in facts]
    scores = {name: summary["methods"][name] for name in facts}
    copied = ("ua_ci95", "wa_ci95")
    references = {
        name: {
            **{key.removesuffix("_mean"): row[key] for key in ("ua_mean", "wa_mean", "macro_f1_mean")},
            **{key: row[key] for key in copied},
            **facts[name],
        }
        for name, row in scores.items()
    }
    text = f"{markdown_table(summary)}\n{ABOUT}\n"
    predictions.to_parquet(folder / "references.parquet", index=False)
    write_json(folder / "references.json", references)
    (folder / "references.md").write_text(text, encoding="utf-8")
    return text


def main(argv: Sequence[str] | None = None) -> None:
    (args,) = HfArgumentParser(Arguments, allow_abbrev=False).parse_args_into_dataclasses(args=argv)
    if args.decode != "once":
        raise SystemExit(f"--decode {args.decode}: references are measured on the decoded corpus, --decode once")
    dataset, store = read_corpus(Accelerator(cpu=True), args)
    with readable_errors():
        protocol = read_protocol(args, dataset)
        keep_protocol(Path(args.output_dir), protocol)
        cache = store_folder(args.cache_dir).parent / "features"
        try:
            predictions, facts = evaluate(dataset, store, protocol, cache)
        except ImportError as error:
            raise SystemExit(f"{error}: pip install 'hf-s2e[bench]'") from error
        print(write_references(Path(args.output_dir), predictions, facts, protocol))


if __name__ == "__main__":
    main()
