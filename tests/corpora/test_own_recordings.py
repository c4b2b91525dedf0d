"""The loaders for one's own recordings (folder, manifest, CHEAVD, hub), and what they say about bad input."""

import os
from pathlib import Path

import datasets
import pytest
import soundfile
from numpy import zeros

from hf_s2e.corpora import CorpusError, CorpusWarning, unite
from hf_s2e.evaluation.protocols import make_protocol
from hf_s2e.training.wave_store import WaveStore

UMLAUT = "Größe 大小"


@pytest.fixture
def plant(tmp_path):
    """plant(*names): small sound files in the folder that is returned."""

    def plant_files(*names):
        for name in names:
            path = tmp_path / "own" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as file:
                soundfile.write(file, zeros(160), 16_000, format="WAV")
        return tmp_path / "own"

    return plant_files


def labels_of(corpus):
    return corpus.features["label"].int2str(corpus["label"])


def names_of(corpus):
    return [os.path.basename(audio["path"]) for audio in corpus["audio"]]


# Folder


def test_folder_of_labels(plant, load):
    folder = plant("sad/b.wav", "angry/a.FLAC", "angry/deep/er/c.aiff", f"{UMLAUT}/ä ö.wav", "angry/._a.wav")
    (folder / "angry" / "notes.txt").write_text("not audio")
    corpus = load("folder", folder)
    assert labels_of(corpus) == [UMLAUT, "angry", "angry", "sad"]
    assert names_of(corpus) == ["ä ö.wav", "a.FLAC", "c.aiff", "b.wav"]
    assert corpus["speaker"][:] == [None] * 4
    assert labels_of(load("folder", folder, labels=["sad", UMLAUT])) == [UMLAUT, "sad"]


def test_folder_translates_labels_and_finds_speakers(plant, load):
    folder = plant("Angry/SM1_F19_A019.wav", "Sad/SM1_M02_S001.wav")
    options = {"speaker_pattern": "_([FM][0-9]+)_", "label_map": {"Angry": "angry", "Sad": "sad"}}
    corpus = load("folder", folder, **options)
    assert labels_of(corpus) == ["angry", "sad"] and corpus["speaker"][:] == ["F19", "M02"]
    plant("Sad/nobody.wav")
    with pytest.raises(CorpusError, match=r"lines without a speaker: 1\n.*nobody.wav"):
        load("folder", folder, **options)


def test_folder_to_learn_who_speaks(plant, load):
    folder = plant("angry/x_F1_a.wav", "sad/x_F1_b.wav", "sad/x_M2_c.wav")
    corpus = load("folder", folder, label="speaker", speaker_pattern="_([FM][0-9])_")
    assert labels_of(corpus) == corpus["speaker"][:] == ["F1", "F1", "M2"]
    for options in ({"label": "speaker"}, {"label": "mood", "speaker_pattern": "_([FM][0-9])_"}):
        with pytest.raises(CorpusError, match=r"has no metadata.csv, so no column .* for label="):
            load("folder", folder, **options)


def test_folder_with_splits(plant, load):
    folder = plant("train/sad/a.wav", "dev/angry/b.wav", "test/sad/c.wav")
    corpus = load("folder", folder)
    splits = {"a.wav": "train", "b.wav": "validation", "c.wav": "test"}
    assert dict(zip(names_of(corpus), corpus["split"])) == splits
    assert corpus.features["label"].names == ["angry", "sad"]


def test_folder_with_metadata(plant, load):
    folder = plant("audio/x 1.wav", "audio/y.wav")
    lines = ["file_name,label,speaker,gender,mood", "audio/x 1.wav,sad,7,F,so so", "audio/y.wav,angry,8,,"]
    (folder / "metadata.csv").write_text("\n".join(lines))
    corpus = load("folder", folder)
    assert labels_of(corpus) == ["sad", "angry"] and corpus["speaker"][:] == ["7", "8"]
    assert corpus["gender"][:] == ["female", None] and corpus["mood"][:] == ["so so", None]


@pytest.mark.parametrize("name, speakers", [("commonvoice", 470), ("dspspeech20", 33)])
def test_real_corpora_of_speakers(s2e_data, load, name, speakers):
    corpus = load(name, s2e_data / "speakers_extra" / name)
    assert corpus.features["label"].num_classes == pytest.approx(speakers, rel=0.02)
    assert labels_of(corpus) == corpus["speaker"][:]
    same = load("folder", s2e_data / "speakers_extra" / name, label="speaker")
    assert labels_of(same) == labels_of(corpus)
    few = load(name, s2e_data / "speakers_extra" / name, num_speakers=5, speaker_seed=3)
    assert few.features["label"].num_classes == len(set(few["speaker"])) == 5


@pytest.mark.parametrize("name", ["commonvoice", "dspspeech20"])
def test_a_table_of_speakers(plant, load, name):
    folder = plant("audio/a/1.ogg", "audio/a/2.ogg", "audio/b/1.ogg")
    with pytest.raises(CorpusError, match=rf"no .*metadata.csv; {name} needs audio/.* columns file_name and speaker"):
        load(name, folder)
    lines = ["file_name,speaker,gender,language,duration_s", "audio/a/1.ogg,a,m,ab,1.5"]
    lines += ["audio/a/2.ogg,a,m,ab,2.5", "audio/b/1.ogg,b,,zh,1.0"]
    (folder / "metadata.csv").write_text("\n".join(lines))
    corpus = load(name, folder)
    assert labels_of(corpus) == corpus["speaker"][:] == ["a", "a", "b"]
    assert corpus["gender"][:] == ["male", "male", None] and corpus["language"][:] == ["ab", "ab", "zh"]
    assert labels_of(load(name, folder, num_speakers=1, speaker_seed=1)) in (["a", "a"], ["b"])


def test_folder_without_anything(plant, load, tmp_path):
    folder = plant("loose.wav")
    with pytest.raises(CorpusError, match=r"label/file.wav, or a metadata.csv.*\n.*found: +loose.wav"):
        load("folder", folder)
    plant("sad/a.wav")
    with pytest.raises(CorpusError, match=r"lines without a label: 1\n.*loose.wav"):
        load("folder", folder)
    with pytest.raises(CorpusError, match="is not a folder"):
        load("folder", tmp_path / "nowhere")


# Manifest


def test_a_manifest_that_is_named_and_not_there(plant, load):
    with pytest.raises(CorpusError, match=r"no listt\.csv"):
        load("folder", plant("a/1.wav"), manifest="listt.csv")


def test_speakers_in_paths_that_windows_wrote(plant, load):
    folder = plant("spk1/a.wav", "spk2/b.wav")
    (folder / "list.csv").write_text("path,label\nspk1\\a.wav,x\nspk2\\b.wav,y\n")
    corpus = load("manifest", folder / "list.csv", speaker_pattern=r"^(\w+)/")
    assert corpus["speaker"][:] == ["spk1", "spk2"]


def test_manifest_with_bom_windows_lines_and_own_columns(plant, load):
    folder = plant("a.wav", f"{UMLAUT}/b c.wav")
    table = folder / "list.csv"
    text = f"File; Emotion ;Spk;Set\r\na.wav;neu;s1;dev\r\n\r\n{UMLAUT}\\b c.wav; hap ;s2;TRAIN\r\n"
    table.write_bytes(b"\xef\xbb\xbf" + text.encode())
    columns = {"path": "File", "label": "Emotion", "speaker": "Spk", "split": "Set"}
    corpus = load("manifest", table, label_map={"neu": "neutral", "hap": "happy"}, **columns)
    assert labels_of(corpus) == ["neutral", "happy"] and corpus["speaker"][:] == ["s1", "s2"]
    assert corpus["split"][:] == ["validation", "train"]
    assert all(os.path.isfile(audio["path"]) for audio in corpus["audio"])


def test_manifest_in_another_folder_than_the_audio(plant, load, tmp_path):
    folder = plant("a.wav")
    table = tmp_path / "lists" / "train.tsv"
    table.parent.mkdir()
    table.write_text("path\tlabel\na.wav\tsad\n")
    assert len(load("manifest", folder, manifest=table)) == 1
    with pytest.raises(CorpusError, match=r"missing files: 1\n.*train.tsv:2: .*lists.a.wav"):
        load("manifest", table)
    table.write_text(f"path\tlabel\n{folder / 'a.wav'}\tsad\n")
    assert load("manifest", table)["speaker"][:] == [None]


def test_manifest_is_read_again_when_it_changes(plant, load):
    folder = plant("a.wav", "b.wav")
    (folder / "list.csv").write_text("path,label,speaker\na.wav,sad,1\nb.wav,sad,2\n")
    assert labels_of(load("manifest", folder)) == ["sad", "sad"]
    (folder / "list.csv").write_text("path,label,speaker\na.wav,sad,1\nb.wav,mad,2\n")
    assert labels_of(load("manifest", folder)) == ["sad", "mad"]


def test_every_fault_of_a_manifest_is_named_with_its_line(plant, load):
    folder = plant("a.wav", "b.wav", "c.wav", "d.wav")
    (folder / "empty.wav").touch()
    table = folder / "list.csv"
    lines = ["a.wav,sad,1", "b.wav,grumpy,1", "gone.wav,sad,1", "a.wav,angry,1", "c.wav,,2", ",sad,2"]
    lines += ["empty.wav,sad,2", "d.wav,angry,", "c.wav,angry,2"]
    table.write_text("path,label,speaker\n" + "\n".join(lines) + "\n")
    options = {"label_map": {"sad": "sad", "angry": "angry"}}
    with pytest.raises(CorpusError) as error:
        load("manifest", table, **options)
    text = str(error.value)
    assert f"unknown labels: 1\n    {table}:3: 'grumpy' is not among sad, angry" in text
    assert f"missing files: 1\n    {table}:4: {folder}/gone.wav" in text
    assert f"duplicate rows, the first is kept: 2\n    {table}:5 repeats {table}:2: {folder}/a.wav" in text
    assert f"lines without a label: 1\n    {table}:6: {folder}/c.wav" in text
    assert f"lines without a path: 1\n    {table}:7" in text
    assert f"empty files or broken links: 1\n    {folder}/empty.wav" in text
    assert f"lines without a speaker: 1\n    {table}:9: {folder}/d.wav" in text
    with pytest.warns(CorpusWarning, match=r"missing files: 1\n"):
        corpus = load("manifest", table, strict=False, labels=["sad"], **options)
    assert names_of(corpus) == ["a.wav"]


def test_many_faults_are_counted_but_not_all_shown(plant, load):
    folder = plant("a.wav")
    lines = ["path,label", "a.wav,sad", *(f"no{n}.wav,sad" for n in range(99))]
    (folder / "list.csv").write_text("\n".join(lines))
    with pytest.raises(CorpusError, match="missing files: 99") as error:
        load("manifest", folder)
    assert str(error.value).count("no") < 20


@pytest.mark.parametrize(
    "content, message",
    [
        (b"path,label\n", "has no lines below its header"),
        (b"", "has no lines below its header"),
        (b"file,label\na.wav,sad\n", r"has no column 'path', only file, label; .*path=\"\.\.\.\""),
        (b"path,label\na.wav,sad,1\n", r"list.csv:2: 3 cells under 2 columns"),
        (b"path,label\na.wav,s\xe4d\n", "is not UTF-8 .* save it as UTF-8"),
        (b"path,label\nb.wav,sad\n", r"no utterance left"),
        (b"path,label,label\na.wav,sad,mad\n", r"list.csv:1: several columns are called label"),
    ],
)
def test_tables_that_cannot_be_used(plant, load, content, message):
    folder = plant("a.wav")
    (folder / "list.csv").write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        load("manifest", folder / "list.csv", strict=False)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"label_map": "sad"}, "label_map is 'sad'; expected a dict"),
        ({"speaker_pattern": "(["}, "is no regular expression"),
        ({"speaker_pattern": "S[0-9]+"}, "has no group; put brackets around the speaker"),
        ({"speaker_pattern": "(.)", "num_speakers": "5"}, "num_speakers='5', but there are 1 speakers"),
    ],
)
@pytest.mark.parametrize("name", ["folder", "manifest"])
def test_options_that_make_no_sense(plant, load, name, options, message):
    folder = plant("sad/a.wav")
    (folder / "list.csv").write_text("path,label\nsad/a.wav,sad\n")
    with pytest.raises(CorpusError, match=message):
        load(name, folder, **options)


def test_manifest_is_not_guessed(plant, load, tmp_path):
    folder = plant("a.wav")
    with pytest.raises(CorpusError, match=r"found: +a.wav"):
        load("manifest", folder)
    for name in ("train.csv", "test.csv"):
        (folder / name).write_text("path,label\na.wav,sad\n")
    with pytest.raises(CorpusError, match=r"several tables \(test.csv, train.csv\): say which"):
        load("manifest", folder)
    assert len(load("manifest", folder, manifest="test.csv")) == 1
    with pytest.raises(CorpusError, match="there is no"):
        load("manifest", tmp_path / "nowhere.csv")


# CHEAVD


def test_cheavd(plant, load):
    codes = ["neutral", "angry", "happy", "sad", "worried", "anxious", "surprise", "disgust"]
    folder = plant(*(f"{code}.wav" for code in codes))
    splits = zip(codes, ["train", "val", "test"] * 3)
    lines = ["path,label,split", *(f"{code}.wav,{code.capitalize()},{split}" for code, split in splits)]
    (folder / "mec2017.csv").write_text("\n".join(lines))
    corpus = load("cheavd", folder)
    assert labels_of(corpus) == [*codes[:6], "surprised", "disgusted"]
    assert corpus["split"][:3] == ["train", "validation", "test"] and set(corpus["speaker"]) == {None}
    (folder / "mec2017.csv").write_text("path,label,split\nangry.wav,furious,train\nsad.wav,Sad,train\n")
    with pytest.raises(CorpusError, match=r"mec2017.csv:2: 'furious' is not among neutral, angry"):
        load("cheavd", folder)
    (folder / "mec2017.csv").write_text("path,label\nangry.wav,angry\n")
    with pytest.raises(CorpusError, match="has no column 'split'"):
        load("cheavd", folder)


# Hub


def own_dataset(folder, **columns):
    paths = [str(folder / name) for name in ("a.wav", "b.wav", "c.wav")]
    return datasets.Dataset.from_dict({"audio": paths, **columns})


def test_hub_dataset_in_memory_and_on_disk(plant, load, tmp_path):
    own = own_dataset(plant("a.wav", "b.wav", "c.wav"), emotion=["sad", "mad", "sad"], who=[3, 4, 3])
    own.save_to_disk(tmp_path / "saved")
    for source in (own, tmp_path / "saved"):
        corpus = load("hub", source, label="emotion", speaker="who")
        assert names_of(corpus) == ["a.wav", "b.wav", "c.wav"] and labels_of(corpus) == ["sad", "mad", "sad"]
        assert corpus["speaker"][:] == ["3", "4", "3"] and corpus.features["audio"].decode is False
    assert names_of(load("hub", own, label="emotion", speaker="who", labels=["mad"])) == ["b.wav"]
    crossed = load("hub", own.rename_columns({"who": "label", "emotion": "speaker"}), label="speaker", speaker="label")
    assert labels_of(crossed) == ["sad", "mad", "sad"] and crossed["speaker"][:] == ["3", "4", "3"]
    taken = load("hub", own.rename_column("who", "label"), label="emotion", speaker="label")
    assert labels_of(taken) == ["sad", "mad", "sad"] and taken["speaker"][:] == ["3", "4", "3"]
    speakers = load("hub", own, label="who", speaker="who")
    assert speakers.features["label"].names == ["3", "4"] and speakers["speaker"][:] == ["3", "4", "3"]
    assert len(set(load("hub", own, label="who", speaker="who", num_speakers=1)["speaker"])) == 1
    with pytest.raises(CorpusError, match="hub has no option split_by"):
        load("hub", own, split_by="who")


def test_hub_class_labels_and_splits(plant, load):
    own = own_dataset(plant("a.wav", "b.wav", "c.wav"), label=["neu", "hap", "neu"])
    own = own.class_encode_column("label")
    both = datasets.DatasetDict({"train": own.select([0, 1]), "test": own.select([2])})
    corpus = load("hub", both, label_map={"hap": "happy", "neu": "neutral"})
    assert labels_of(corpus) == ["neutral", "happy", "neutral"]
    assert corpus["split"][:] == ["train", "train", "test"] and set(corpus["speaker"]) == {None}
    assert names_of(load("hub", both, split="test")) == ["c.wav"]
    with pytest.raises(CorpusError, match=r"no split 'dev' in the dataset; its splits: \['train', 'test'\]"):
        load("hub", both, split="dev")


def test_hub_faults(plant, load, tmp_path):
    own = own_dataset(plant("a.wav", "b.wav", "c.wav"), label=["sad", None, "odd"])
    with pytest.raises(CorpusError, match=r"rows without a label: 1\n    row 1"):
        load("hub", own)
    with pytest.raises(CorpusError, match=r"row 2: 'odd' is not among sad"):
        load("hub", own, label_map={"sad": "sad"})
    with pytest.warns(CorpusWarning, match="row 1"):
        assert names_of(load("hub", own, strict=False)) == ["a.wav", "c.wav"]
    with pytest.raises(CorpusError, match=r"no column 'emotion', only audio, label; name it: label=\"...\""):
        load("hub", own, label="emotion")
    with pytest.raises(CorpusError, match="cannot load the dataset"):
        load("hub", tmp_path / "nowhere")


def test_hub_audio_within_the_dataset_becomes_files(plant, load, tmp_path):
    """As most datasets on the Hub have it: the sound in a column, and a name that leads nowhere."""
    sounds = [(plant(name) / name).read_bytes() + bytes(4 * number) for number, name in enumerate("abcd")]
    names = ["speaker 1/ä.wav", "speaker 2/ä.wav", None, ".."]
    rows = [{"path": name, "bytes": sound} for name, sound in zip(names, sounds)]
    own = datasets.Dataset.from_dict({"audio": rows, "label": list("xyxy"), "speaker": list("1122")})
    own = own.cast_column("audio", datasets.Audio(decode=False))
    (tmp_path / "parquet").mkdir()
    own.to_parquet(tmp_path / "parquet" / "train.parquet")
    for source in (own, tmp_path / "parquet"):
        corpus = load("hub", source)
        paths = [audio["path"] for audio in corpus["audio"]]
        assert [Path(path).read_bytes() for path in paths] == sounds
        assert [os.path.basename(path) for path in paths] == ["ä.wav", "ä.wav", "audio", "audio"]
        assert all(path.startswith(str(tmp_path / "cache")) for path in paths)
        assert labels_of(corpus) == list("xyxy") and corpus["speaker"][:] == list("1122")
    changed = {path: os.stat(path).st_mtime_ns for path in paths}
    Path(paths[0]).write_bytes(sounds[0][:10])  # what a full disk may leave
    assert [audio["path"] for audio in load("hub", own)["audio"]] == paths
    assert Path(paths[0]).read_bytes() == sounds[0]
    assert {path: os.stat(path).st_mtime_ns for path in paths[1:]}.items() <= changed.items()
    assert make_protocol("loso", corpus).utterances == 4  # ids that travel
    assert len(WaveStore.build(corpus, tmp_path / "waves", progress=False).lengths) == 4
    nothing = own.remove_columns("audio").add_column("audio", [None] * 4)
    with pytest.raises(CorpusError, match=r"rows without audio.*\n.*row 0"):
        load("hub", nothing.cast_column("audio", datasets.Audio(decode=False)))
    own = datasets.Dataset.from_dict(
        {"audio": [rows[0], None, {"path": "字" * 80, "bytes": sounds[2]}], "label": list("xyx")}
    )
    with pytest.warns(CorpusWarning, match=r"rows without audio.*\n.*row 1"):
        corpus = load("hub", own.cast_column("audio", datasets.Audio(decode=False)), strict=False)
    assert [Path(audio["path"]).read_bytes() for audio in corpus["audio"]] == [sounds[0], sounds[2]]


# Union


def test_unite_keeps_speakers_of_different_corpora_apart(plant, load):
    folder = plant("a.wav", "b.wav", "c.wav")
    one = load("hub", own_dataset(folder, speaker=["1", "2", "1"]), label="speaker")
    two = load("hub", own_dataset(folder, speaker=["2", "3", "3"]), label="speaker")
    united = unite({"one": one, "two": two.select([1, 2])})
    assert united.features["label"].names == ["one/1", "one/2", "two/3"]
    assert united["speaker"][:] == ["one/1", "one/2", "one/1", "two/3", "two/3"] == labels_of(united)
    assert names_of(united) == ["a.wav", "b.wav", "c.wav", "b.wav", "c.wav"]


def test_unite_needs_speakers(plant, load):
    corpus = load("folder", plant("sad/a.wav"))
    with pytest.raises(CorpusError, match=r"cannot unite 'own' .* it has recordings without a speaker"):
        unite({"own": corpus})
    with pytest.raises(CorpusError, match="at least one corpus"):
        unite({})


def test_extra_columns_do_not_collide_with_the_own_ones(plant, load):
    folder = plant("a.wav")
    lines = ["path,emotion,label,split,set,audio,size,room", "a.wav,sad,9,3,dev,x,y,kitchen"]
    (folder / "list.csv").write_text("\n".join(lines))
    corpus = load("manifest", folder, label="emotion", split="set")
    assert labels_of(corpus) == ["sad"] and corpus["split"][:] == ["validation"]
    assert set(corpus.column_names) == {"audio", "label", "speaker", "room", "split"}
