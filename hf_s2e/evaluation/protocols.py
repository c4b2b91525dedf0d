"""Which utterances train, validate and test: speaker-disjoint folds that can be saved and checked.

A protocol names its parts by speaker (`column="speaker"`), by the corpus' own split, or, where nothing better
is known, utterance by utterance. It is bound to the corpus it was made for by a hash over the utterances,
their labels and their speakers, so that a corpus that has changed since is noticed.
"""

import hashlib
import json
import re
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from ..corpora import about, list_corpora
from ..corpora.index import canonical, corpus_name, few, read_index, shuffled
from ..model.atomic_write_s2e import atomic_write


@dataclass(frozen=True)
class Fold:
    """Speakers, splits or utterances (see `Protocol.column`) of one train/validation/test division."""

    name: str
    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]


@dataclass(frozen=True)
class Protocol:
    """Folds of one corpus; made by `make_protocol`, kept as JSON beside every result.

    A part of a fold that names nothing (often `validation`) is an empty tuple.

    column: what the folds list: "speaker", "split" or "utterance".
    speaker_disjoint: whether no speaker is shared between the test part of a fold and its other parts. False
        also where speakers are not known; every report then says so.
    corpus_sha256: over utterance ids, labels, speakers, sessions and splits, in no order.
    """

    name: str
    corpus: str
    column: str
    folds: tuple[Fold, ...]
    speaker_disjoint: bool
    seed: int
    classes: tuple[str, ...]
    utterances: int
    corpus_sha256: str

    def indices(self, dataset, fold):
        """Row numbers (train, validation, test) of a fold, given as a Fold or by its name.

        Raises ValueError where the dataset is not the one that the protocol was made for.
        """
        index = read_index(dataset)
        if index.sha256() != self.corpus_sha256:
            raise ValueError(
                f"protocol {self.name!r} was made for {self.utterances} utterances of {self.corpus!r} with "
                f"labels {', '.join(self.classes)}; this dataset has {len(index.utterances)} with labels "
                f"{', '.join(index.classes)}, and names, labels or speakers differ. Make the protocol anew, "
                "or load the corpus with the options used then"
            )
        if isinstance(fold, str):
            fold = self._fold(fold)
        values = index.values(self.column)
        parts = (set(fold.train), set(fold.validation), set(fold.test))
        return tuple(np.flatnonzero([value in part for value in values]) for part in parts)

    def by_training_part(self):
        """Folds grouped by what they train on, as a list of lists: each group needs one training.

        Leave one session out tests both speakers of a session on the same network.
        """
        groups = {}
        for fold in self.folds:
            groups.setdefault(fold.train, []).append(fold)
        return list(groups.values())

    @property
    def hash(self):
        """SHA-256 over the whole content."""
        return hashlib.sha256(canonical(asdict(self)).encode()).hexdigest()

    def to_json(self):
        return json.dumps({**asdict(self), "hash": self.hash}, indent=1, ensure_ascii=False)

    @classmethod
    def from_json(cls, text):
        """The protocol that `to_json` wrote. Raises ValueError where the text is another or was edited."""
        try:
            content = json.loads(text)
            stored = content.pop("hash")
            folds = tuple(
                Fold(f["name"], tuple(f["train"]), tuple(f["validation"]), tuple(f["test"]))
                for f in content.pop("folds")
            )
            protocol = cls(**{**content, "folds": folds, "classes": tuple(content["classes"])})
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"not a protocol file: {error!r}") from error
        if protocol.hash != stored:
            raise ValueError(
                f"protocol {protocol.name!r}: its content has the hash {protocol.hash[:12]}, the file says "
                f"{str(stored)[:12]}. It was edited or cut; make it anew with make_protocol"
            )
        return protocol

    def save(self, path):
        """Write the JSON file; a killed process leaves the old file or the new one."""
        with atomic_write(path) as file:
            file.write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path):
        return cls.from_json(Path(path).read_text(encoding="utf-8"))

    def _fold(self, name):
        for fold in self.folds:
            if fold.name == name:
                return fold
        raise ValueError(f"no fold {name!r} in {self.name!r}: it has {', '.join(f.name for f in self.folds)}")


def default_protocol(corpus: str) -> str:
    """The name of the protocol by which a corpus is cross-validated unless another one is asked for."""
    known = about(corpus)
    return known.protocol if known else "loso"


def make_protocol(name, dataset, *, corpus=None, seed=0, folds=5, speaker_disjoint=True) -> Protocol:
    """Folds of a corpus by a protocol's name.

    name:
        `loso`: leave one speaker out, a fold per speaker.
        `kfold`, or `5fold`, `10fold`, ...: `folds` groups of whole speakers, each tested once. With
        `speaker_disjoint=False`, single utterances in class-wise random order instead of speakers.
        `session`: leave one session out in both directions (IEMOCAP, as in the paper): of the two speakers of
        the left-out session one validates and the other tests, then swapped: two folds that share a training.
        `split`: the corpus' own parts: trains on `train`, tests on `test`, or on `validation` where the
        corpus has no test part (CHEAVD, as in the paper).
        `emobox6`: EmoBox's six folds of RAVDESS; likewise the folds that any other corpus' module publishes.
    corpus: the corpus' name for the record; by default what the dataset's builder is called.
    speaker_disjoint: False accepts a corpus without speaker ids and official splits that share speakers.

    Raises ValueError where speakers, sessions or splits are missing, are too few, or are shared between
    parts, and where a fold would leave a class out of training.

    >>> from hf_s2e.corpora import load_corpus
    >>> corpus = load_corpus("toy", data_dir="corpora", cache_dir="cache", num_speakers=3, utterances_per_label=2)
    >>> protocol = make_protocol("loso", corpus)
    >>> [fold.test for fold in protocol.folds]
    [('spk00',), ('spk01',), ('spk02',)]
    >>> train, validation, test = protocol.indices(corpus, "spk01")
    >>> len(train), len(validation), set(corpus[test]["speaker"])
    (16, 0, {'spk01'})
    """
    index = read_index(dataset)
    match = re.fullmatch(r"(\d+)fold", name)
    kind, count = ("kfold", int(match[1])) if match else (name, folds)
    corpus = corpus or corpus_name(dataset)
    divide = _builder(kind, corpus)
    if index.speakers is None and speaker_disjoint:
        raise ValueError(
            f"protocol {name!r} keeps speakers apart, but the corpus has no speaker ids. Give it a 'speaker' "
            "column, or accept shared speakers with speaker_disjoint=False, which every report will say"
        )
    column, divisions = divide(index, seed=seed, count=count, speaker_disjoint=speaker_disjoint)
    for fold in divisions:
        _check_classes(index, column, fold)
    _check_tested(index, column, divisions)
    shared = {fold.name: shared_speakers(index, column, fold) for fold in divisions}
    disjoint = index.speakers is not None and not any(shared.values())
    if speaker_disjoint and not disjoint:
        fold_name, speakers = next((n, s) for n, s in shared.items() if s)
        raise ValueError(
            f"protocol {name!r}, fold {fold_name!r}: {len(speakers)} speakers are in training or "
            f"validation, and in test ({few(speakers)}). Use another protocol, or accept it with "
            "speaker_disjoint=False, which every report will say"
        )
    return Protocol(
        name=f"{count}fold" if kind == "kfold" else kind,
        corpus=corpus,
        column=column,
        folds=tuple(divisions),
        speaker_disjoint=disjoint,
        seed=seed,
        classes=index.classes,
        utterances=len(index.utterances),
        corpus_sha256=index.sha256(),
    )


def choice_protocol(protocol, dataset) -> Protocol:
    """For each fold, the parts that choose among recipes without its test part: train, validation, no test.

    Folds that have a validation part keep it. The others are paired: a fold is validated on its partner's
    test part, and neither part is trained on, so that one training serves both; an odd last fold takes the
    first as its partner.

    Raises ValueError where there is one fold only, which has nothing to validate on, and where a class would
    be left out of training.
    """
    index, folds = read_index(dataset), protocol.folds
    if not all(fold.validation for fold in folds):
        if len(folds) < 3:
            raise ValueError(
                f"protocol {protocol.name!r} has {len(folds)} fold(s) and no validation part: without its test "
                "part nothing is left to choose a recipe by. Use loso or 5fold, or name one recipe"
            )
        partners = [folds[i ^ 1] if i ^ 1 < len(folds) else folds[0] for i in range(len(folds))]
        folds = [_validated_by(fold, partner) for fold, partner in zip(folds, partners)]
    folds = tuple(replace(fold, test=()) for fold in folds)
    for fold in folds:
        _check_classes(index, protocol.column, fold)
    return replace(protocol, name=f"{protocol.name}-choice", folds=folds)


def _validated_by(fold, partner):
    theirs = set(partner.test)
    train = tuple(value for value in fold.train if value not in theirs)
    return replace(fold, train=train, validation=partner.test)


def shared_speakers(index, column, fold):
    """Speakers of a fold's test part that its training or validation part holds too, sorted."""
    if index.speakers is None:
        return []
    test, rest = set(fold.test), {*fold.train, *fold.validation}
    values = index.values(column)
    tested = {speaker for speaker, value in zip(index.speakers, values) if value in test}
    return sorted(tested & {speaker for speaker, value in zip(index.speakers, values) if value in rest})


def _builder(kind, corpus):
    """What divides a corpus by a protocol of this name: index and options -> column and folds."""
    if kind in _BUILDERS:
        return _BUILDERS[kind]
    known = [about(name) for name in (*list_corpora(), corpus)]  # the corpus' own folds go before others of that name
    published = {name: folds for one in known if one for name, folds in one.folds.items()}
    if kind not in published:
        expected = ", ".join((*_BUILDERS, *published))
        raise ValueError(f"protocol {kind!r}: expected one of {expected} or, say, 5fold")
    return partial(_published, name=kind, test_speakers=published[kind].test_speakers)


def _loso(index, **_):
    speakers = _speakers(index, "loso")
    return "speaker", [_leave_out(speakers, [speaker], speaker) for speaker in speakers]


def _kfold(index, *, seed, count, speaker_disjoint):
    if count < 2:
        raise ValueError(f"{count} folds: expected at least 2")
    if not speaker_disjoint:
        return "utterance", _utterance_folds(index, seed, count)
    speakers = _speakers(index, "kfold")
    if len(speakers) < count:
        raise ValueError(f"{len(speakers)} speakers cannot make {count} folds: use loso, or fewer folds")
    sizes, groups = Counter(index.speakers), [[] for _ in range(count)]
    # equal numbers of speakers; among the groups that have fewest, the one with the fewest utterances
    for speaker in shuffled(speakers, seed, "kfold"):
        min(groups, key=lambda group: (len(group), sum(sizes[s] for s in group))).append(speaker)
    return "speaker", [_leave_out(speakers, group, f"fold{i}") for i, group in enumerate(groups, 1)]


def _utterance_folds(index, seed, count):
    order = shuffled(index.utterances, seed, "utterances")
    label_of = dict(zip(index.utterances, index.labels))
    order.sort(key=label_of.get)  # stable: dealt class by class, so every fold has its share of each
    return [_leave_out(index.utterances, order[i::count], f"fold{i + 1}") for i in range(count)]


def _session(index, **_):
    speakers = _speakers(index, "session")
    if index.sessions is None:
        raise ValueError("protocol 'session' needs a column 'session', and there is none: use loso or 5fold")
    members = {}
    for session, speaker in zip(index.sessions, index.speakers):
        members.setdefault(session, set()).add(speaker)
    wrong = {session: sorted(found) for session, found in members.items() if len(found) != 2}
    if wrong or sum(map(len, members.values())) != len(speakers):
        detail = ", ".join(f"{s}: {few(found)}" for s, found in wrong.items()) or "a speaker is in several"
        raise ValueError(f"protocol 'session' expects two speakers in each session, in no other ({detail})")
    divisions = []
    for session in sorted(members):
        train = tuple(s for s in speakers if s not in members[session])
        for validation, test in (sorted(members[session]), sorted(members[session], reverse=True)):
            divisions.append(Fold(f"{session}-{test}", train, (validation,), (test,)))
    return "speaker", divisions


def _split(index, **_):
    found = set(index.splits or ())
    if "train" not in found or not found & {"validation", "test"}:
        raise ValueError(
            "protocol 'split' needs a column 'split' with 'train' and 'validation' or 'test'; "
            f"found {', '.join(sorted(found)) or 'none'}"
        )
    if "test" in found:
        validation = ("validation",) if "validation" in found else ()
        return "split", [Fold("test", ("train",), validation, ("test",))]
    return "split", [Fold("validation", ("train",), (), ("validation",))]


def _published(index, *, name, test_speakers, **_):
    speakers = _speakers(index, name)
    expected = sorted(speaker for fold in test_speakers for speaker in fold)
    key = str if speakers == expected else _number  # RAVDESS' 01 may be called 1, or Actor_01
    named = {key(speaker): speaker for speaker in speakers}
    if set(named) != set(map(key, expected)) or len(named) != len(speakers):
        raise ValueError(
            f"protocol {name!r} is for the {len(expected)} speakers {expected[0]} to {expected[-1]}; found "
            f"{len(speakers)} ({few(speakers)})"
        )
    groups = [[named[key(speaker)] for speaker in fold] for fold in test_speakers]
    return "speaker", [_leave_out(speakers, group, f"fold{i}") for i, group in enumerate(groups, 1)]


def _number(speaker):
    return re.sub(r"\D", "", speaker).lstrip("0")


_BUILDERS = {"loso": _loso, "kfold": _kfold, "session": _session, "split": _split}


def _leave_out(everything, test, name):
    left_out = set(test)
    return Fold(name, tuple(v for v in everything if v not in left_out), (), tuple(sorted(test)))


def _untrained(index, column, fold):
    """Names of the classes that no training utterance has."""
    train = set(fold.train)
    seen = {label for label, value in zip(index.labels, index.values(column)) if value in train}
    return [name for number, name in enumerate(index.classes) if number not in seen]


def _check_classes(index, column, fold):
    missing = _untrained(index, column, fold)
    if not missing:
        return
    reasons = []
    for name in missing:
        who = {s for s, label in zip(index.speakers or (), index.labels) if index.classes[label] == name}
        if index.classes.index(name) not in index.labels:
            reasons.append(f"{name!r} has no utterance at all")
        elif len(who) == 1:
            reasons.append(f"{name!r} has the one speaker {who.pop()!r}")
        else:
            reasons.append(f"{name!r}")
    raise ValueError(
        f"fold {fold.name!r} leaves classes out of training: {'; '.join(reasons)}. "
        "Leave those labels out of the corpus, or use fewer or other folds"
    )


def _check_tested(index, column, divisions):
    tested = {value for fold in divisions for value in fold.test}
    seen = {label for label, value in zip(index.labels, index.values(column)) if value in tested}
    never = [name for number, name in enumerate(index.classes) if number not in seen]
    if never:
        message = f"never tested: {', '.join(never)}; UA is the mean over the other classes"
        warnings.warn(message, stacklevel=3)


def _speakers(index, name):
    if index.speakers is None:
        raise ValueError(f"protocol {name!r} is by speaker, and there are no speaker ids: use 5fold or split")
    speakers = sorted(set(index.speakers))
    if len(speakers) < 2:
        raise ValueError(f"protocol {name!r} needs at least 2 speakers; found {few(speakers)}")
    return speakers
