"""Folds: who trains, validates and tests; what is refused; and that a protocol file means one thing only."""

import dataclasses
import json

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_s2e.corpora import about
from hf_s2e.corpora.base import About, PublishedFolds
from hf_s2e.corpora.index import utterance_ids
from hf_s2e.evaluation.protocols import Protocol, choice_protocol, default_protocol, make_protocol

CLASSES = ["neutral", "angry", "sad"]


def corpus(speakers, *, each=3, classes=CLASSES, folder="/data/corpus", ending="wav", **columns):
    """Every speaker says each class `each` times; columns: name -> function of the speaker."""
    rows = [(s, c, i) for s in speakers for c in range(len(classes)) for i in range(each)]
    return table(
        [f"{folder}/{s}/{s}_{c}_{i}.{ending}" for s, c, i in rows],
        [c for _, c, _ in rows],
        classes,
        speaker=[s for s, _, _ in rows],
        **{name: [value(s) for s, _, _ in rows] for name, value in columns.items()},
    )


def table(paths, labels, classes, **columns):
    """A dataset as the loaders make it, from plain columns: `datasets` encodes no Audio column."""
    data = datasets.Dataset.from_dict({"audio": paths, "label": labels, **columns})
    data = data.cast_column("label", datasets.ClassLabel(names=classes))
    return data.cast_column("audio", datasets.Audio(decode=False))


def changed(data, column, row, value):
    """The dataset with another value in one row of a column."""
    feature, values = data.features[column], list(data[column])
    values[row] = value
    return data.remove_columns(column).add_column(column, values, feature=feature)


def ten(n=10):
    return [f"{i:02d}" for i in range(1, n + 1)]


@pytest.fixture(scope="module")
def iemocap():
    speakers = [f"Ses0{session}{gender}" for session in range(1, 6) for gender in "FM"]
    return corpus(speakers, session=lambda speaker: speaker[:5])


@pytest.fixture(scope="module")
def ravdess():
    return corpus([f"Actor_{actor:02d}" for actor in range(1, 25)])


def speakers_of(dataset, rows):
    return {dataset[int(row)]["speaker"] for row in rows}


@settings(max_examples=25, deadline=None)
@given(speakers=st.integers(3, 12), folds=st.integers(2, 6), seed=st.integers(0, 3))
def test_kfold_tests_everyone_once_and_never_on_a_known_speaker(speakers, folds, seed):
    data = corpus(ten(speakers), each=1)
    if folds > speakers:
        with pytest.raises(ValueError, match="cannot make"):
            make_protocol("kfold", data, folds=folds)
        return
    protocol = make_protocol("kfold", data, folds=folds, seed=seed)
    tested = []
    for fold in protocol.folds:
        train, validation, test = protocol.indices(data, fold)
        parts = [speakers_of(data, rows) for rows in (train, validation, test)]
        assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
        assert len(train) + len(validation) + len(test) == len(data)
        assert not validation.size
        tested += list(test)
    assert sorted(tested) == list(range(len(data)))
    sizes = [len(fold.test) for fold in protocol.folds]
    assert max(sizes) - min(sizes) <= 1
    assert protocol.speaker_disjoint


def test_kfold_depends_on_the_seed_only():
    data = corpus(ten())
    first, again = (make_protocol("5fold", data, seed=1) for _ in range(2))
    assert first == again and first.hash == again.hash and first.name == "5fold"
    assert first.folds != make_protocol("5fold", data, seed=2).folds
    shuffled = data.shuffle(seed=0)
    assert make_protocol("5fold", shuffled, seed=1).hash == first.hash


def test_loso_has_a_fold_per_speaker():
    protocol = make_protocol("loso", corpus(ten()))
    assert [fold.test for fold in protocol.folds] == [(speaker,) for speaker in ten()]
    assert all(len(fold.train) == 9 for fold in protocol.folds)


def test_session_goes_both_directions_on_one_training(iemocap):
    protocol = make_protocol("session", iemocap)
    assert len(protocol.folds) == 10
    roles = {fold.test: fold.validation for fold in protocol.folds}
    assert roles["Ses05F",] == ("Ses05M",) and roles["Ses05M",] == ("Ses05F",)
    groups = protocol.by_training_part()
    assert [len(group) for group in groups] == [2] * 5
    for group in groups:
        assert len(group[0].train) == 8
        assert {*group[0].train, *group[0].validation, *group[0].test} == set(iemocap["speaker"])


def test_session_needs_two_speakers_each():
    lonely = corpus(["a", "b", "c"], session=lambda speaker: "1" if speaker in "ab" else "2")
    with pytest.raises(ValueError, match=r"two speakers in each session.*2: c"):
        make_protocol("session", lonely)
    with pytest.raises(ValueError, match="needs a column 'session'"):
        make_protocol("session", corpus(ten()))


def test_emobox_folds_are_the_published_ones(ravdess):
    protocol = make_protocol("emobox6", ravdess)
    assert protocol.folds[0].test == ("Actor_01", "Actor_11", "Actor_20", "Actor_21")
    published = about("ravdess").folds["emobox6"].test_speakers
    assert sorted(actor for fold in published for actor in fold) == ten(24)
    bare = make_protocol("emobox6", corpus(ten(24)))
    assert tuple(fold.test for fold in bare.folds) == published
    with pytest.raises(ValueError, match="24 speakers 01 to 24; found 10"):
        make_protocol("emobox6", corpus(ten()))
    with pytest.raises(ValueError, match="found 25"):
        make_protocol("emobox6", corpus([*ten(24), "Actor_01"]))


class Own:
    """A corpus of one's own, of which others have published folds."""

    ABOUT = About(
        title="Own",
        language="en",
        license="mit",
        terms="MIT",
        protocol="theirs",
        folds={
            "theirs": PublishedFolds("their folds", (("Ann", "Bob"), ("Cleo",))),
            "emobox6": PublishedFolds("of the same name", (("Ann",), ("Bob",), ("Cleo",))),
        },
    )


def test_published_folds_and_default_protocol_are_the_corpus_modules():
    name, data = f"{__name__}:Own", corpus(["Ann", "Bob", "Cleo"])
    assert (default_protocol(name), default_protocol("ravdess"), default_protocol("emodb")) == (
        "theirs",
        "emobox6",
        "loso",
    )
    protocol = make_protocol("theirs", data, corpus=name)
    assert [fold.test for fold in protocol.folds] == [("Ann", "Bob"), ("Cleo",)]
    assert len(make_protocol("emobox6", data, corpus=name).folds) == 3  # its own, not RAVDESS'
    with pytest.raises(ValueError, match="expected one of loso, kfold, session, split, emobox6 or, say, 5fold"):
        make_protocol("theirs", data, corpus="emodb")


def test_official_split():
    data = corpus(ten(), split=lambda s: "validation" if s == "10" else "train")
    protocol = make_protocol("split", data)
    assert protocol.column == "split" and protocol.speaker_disjoint
    train, validation, test = protocol.indices(data, "validation")
    assert speakers_of(data, test) == {"10"} and not len(validation) and len(train) == 81
    three = corpus(ten(), split=lambda s: {"10": "test", "09": "validation"}.get(s, "train"))
    assert [len(part) for part in make_protocol("split", three).indices(three, "test")] == [72, 9, 9]
    with pytest.raises(ValueError, match="found train"):
        make_protocol("split", corpus(ten(), split=lambda s: "train"))


def test_a_split_that_shares_speakers_has_to_be_accepted():
    data = corpus(ten(4))
    data = data.add_column("split", ["train" if row % 3 else "test" for row in range(len(data))])
    with pytest.raises(ValueError, match="4 speakers are in training or validation, and in test"):
        make_protocol("split", data)
    assert not make_protocol("split", data, speaker_disjoint=False).speaker_disjoint


def test_no_speaker_ids_need_consent():
    data = corpus(ten()).remove_columns("speaker")
    with pytest.raises(ValueError, match="speaker_disjoint=False"):
        make_protocol("5fold", data)
    with pytest.raises(ValueError, match="by speaker"):
        make_protocol("loso", data, speaker_disjoint=False)
    protocol = make_protocol("5fold", data, speaker_disjoint=False)
    assert not protocol.speaker_disjoint and protocol.column == "utterance"
    tested = []
    for fold in protocol.folds:
        train, _, test = protocol.indices(data, fold)
        assert not set(train) & set(test)
        assert sorted(data[test]["label"]) == [0] * 6 + [1] * 6 + [2] * 6
        tested += list(test)
    assert sorted(tested) == list(range(90))


def test_a_few_missing_speaker_ids_are_named():
    data = changed(corpus(ten(3)), "speaker", 4, "")
    with pytest.raises(ValueError, match="1 of 27 utterances have no speaker \\(01_1_1\\)"):
        make_protocol("loso", data)


def test_a_class_of_one_speaker_cannot_be_tested_apart():
    data = corpus(ten(4)).filter(lambda row: row["label"] != 2 or row["speaker"] == "03")
    with pytest.raises(ValueError, match="'03' leaves classes out of training: 'sad' has the one speaker"):
        make_protocol("loso", data)


def test_a_class_without_utterances_is_refused():
    data = corpus(ten(4)).filter(lambda row: row["label"] != 1)
    with pytest.raises(ValueError, match="'angry' has no utterance at all"):
        make_protocol("loso", data)


def test_a_class_that_is_never_tested_is_said():
    data = corpus(ten(4), split=lambda s: "test" if s == "04" else "train")
    data = data.filter(lambda row: row["label"] != 2 or row["speaker"] != "04")
    with pytest.warns(UserWarning, match="never tested: sad"):
        make_protocol("split", data)


@pytest.mark.parametrize("name, trainings", [("loso", 4), ("3fold", 2), ("5fold", 3)])
def test_a_recipe_is_chosen_without_the_test_speakers(name, trainings):
    """7 speakers: an odd last fold has the first as its partner, and a training of its own."""
    data = corpus(ten(7))
    protocol = make_protocol(name, data)
    inner = choice_protocol(protocol, data)
    assert [fold.name for fold in inner.folds] == [fold.name for fold in protocol.folds]
    tests = {fold.test for fold in protocol.folds}
    for fold, outer in zip(inner.folds, protocol.folds):
        assert fold.test == () and fold.validation in tests - {outer.test}
        assert {*fold.train, *fold.validation} == set(outer.train) and not {*fold.train} & {*fold.validation}
    assert len(inner.by_training_part()) == trainings
    assert inner.hash != protocol.hash


def test_a_recipe_is_chosen_on_the_validation_part_that_there_is(iemocap):
    protocol = make_protocol("session", iemocap)
    inner = choice_protocol(protocol, iemocap)
    assert [(f.train, f.validation) for f in inner.folds] == [(f.train, f.validation) for f in protocol.folds]
    assert all(fold.test == () for fold in inner.folds)


def test_a_choice_needs_something_to_validate_on_and_every_class_in_training():
    data = corpus(ten(4), split=lambda speaker: "test" if speaker == "04" else "train")
    with pytest.raises(ValueError, match="nothing is left to choose a recipe by"):
        choice_protocol(make_protocol("split", data), data)
    rare = corpus(ten(4)).filter(lambda row: row["label"] != 2 or row["speaker"] in ("01", "02"))
    with pytest.raises(ValueError, match="leaves classes out of training"):
        choice_protocol(make_protocol("loso", rare), rare)


@pytest.mark.parametrize("name", ["random", "fold", "1fold", "0fold"])
def test_unknown_protocols(name):
    with pytest.raises(ValueError, match="expected"):
        make_protocol(name, corpus(ten()))


def test_file_round_trip(tmp_path, iemocap):
    protocol = make_protocol("session", iemocap, corpus="iemocap")
    path = tmp_path / "with blank ü" / "protocol.json"
    path.parent.mkdir()
    protocol.save(path)
    assert Protocol.load(path) == protocol
    assert json.loads(path.read_text())["hash"] == protocol.hash
    assert [p.name for p in path.parent.iterdir()] == ["protocol.json"]


def test_an_edited_or_foreign_file_is_refused(iemocap):
    text = make_protocol("session", iemocap).to_json()
    with pytest.raises(ValueError, match="edited"):
        Protocol.from_json(text.replace("Ses01F", "Ses02F"))
    half = '{"hash": "x", "folds": [], "classes": []}'
    for wrong in ("{}", "[]", "no json", '{"hash": "x", "folds": [1]}', half):
        with pytest.raises(ValueError, match="not a protocol file"):
            Protocol.from_json(wrong)


def test_the_hash_covers_every_field(iemocap):
    protocol = make_protocol("session", iemocap)
    for field in dataclasses.fields(protocol):
        value = getattr(protocol, field.name)
        other = value[1:] if isinstance(value, tuple) else f"{value}x"
        assert dataclasses.replace(protocol, **{field.name: other}).hash != protocol.hash, field.name


def test_a_changed_corpus_is_noticed():
    data = corpus(ten(4))
    protocol = make_protocol("loso", data)
    for place in (dict(folder="/elsewhere/a b"), dict(ending="flac")):
        assert len(protocol.indices(corpus(ten(4), **place), "01")[2]) == 9
    others = [
        data.select(range(1, len(data))),
        changed(data, "label", 0, 1),
        changed(data, "speaker", 0, "02"),
        corpus(ten(4), classes=["neutral", "sad", "angry"]),
    ]
    for other in others:
        with pytest.raises(ValueError, match="was made for 36 utterances"):
            protocol.indices(other, "01")
    with pytest.raises(ValueError, match="no fold '07'"):
        protocol.indices(data, "07")


def test_rows_that_follow_the_protocol_when_reordered():
    data = corpus(ten(4))
    protocol = make_protocol("loso", data)
    shuffled = data.shuffle(seed=3)
    assert speakers_of(shuffled, protocol.indices(shuffled, "03")[2]) == {"03"}


def from_paths(paths, **columns):
    return table(paths, [0] * len(paths), ["a"], **columns)


def test_utterance_ids():
    assert utterance_ids(from_paths(["/x/a/1.wav", "/x/b/2.v1.flac"])) == ["1", "2.v1"]
    assert utterance_ids(from_paths(["/x/a/1.wav", "/x/b/1.wav"])) == ["a/1", "b/1"]
    assert utterance_ids(from_paths(["/x/1.wav", "/x/1.flac"])) == ["1.wav", "1.flac"]
    assert utterance_ids(from_paths(["/x/1.wav"] * 2, utterance_id=["p", "q"])) == ["p", "q"]
    with pytest.raises(ValueError, match="more than once"):
        utterance_ids(from_paths(["/x/1.wav", "/x/1.wav"]))
    with pytest.raises(ValueError, match="no audio path"):
        utterance_ids(from_paths(["/x/1.wav", None]))


def test_unlabelled_rows_and_empty_corpora_are_refused():
    data = corpus(ten(3))
    with pytest.raises(ValueError, match="no utterances"):
        make_protocol("loso", data.select([]))
    with pytest.raises(ValueError, match="1 utterances have no label \\(01_0_0\\)"):
        make_protocol("loso", changed(data, "label", 0, None))
