"""Every named corpus on a generated tree of its exact layout, and on the real recordings where they are."""

import itertools
import os
import shutil
import subprocess
import sys
from collections import Counter

import pytest
import soundfile
from numpy import zeros

from hf_s2e.corpora import CorpusError, CorpusWarning, list_corpora, load_corpus
from hf_s2e.corpora.labels import EMOTIONS


@pytest.fixture(scope="session")
def sound(tmp_path_factory):
    path = tmp_path_factory.mktemp("sound") / "sound.wav"
    soundfile.write(path, zeros(160), 16_000)
    return path


@pytest.fixture
def plant(tmp_path, sound):
    """plant(root, names): a tree of hard links to one small file."""

    def plant_files(root, names):
        for name in names:
            path = tmp_path / root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            os.link(sound, path)
        return tmp_path / root

    return plant_files


def label_counts(corpus):
    return Counter(corpus.features["label"].int2str(corpus["label"]))


def check_columns(corpus):
    """What every corpus promises."""
    row = corpus[0]
    assert row["audio"]["bytes"] is None and os.path.isfile(row["audio"]["path"])
    assert corpus.features["audio"].decode is False
    assert corpus.features["speaker"].dtype == "string"
    assert 0 <= row["label"] < corpus.features["label"].num_classes


def test_names():
    emotion, anything = "iemocap cheavd emodb ravdess cremad", "folder manifest hub toy"
    speakers = "voxceleb1 voxceleb2 speechocean762 commonvoice dspspeech20"
    assert set(list_corpora()) == set(f"{emotion} {speakers} {anything}".split())
    with pytest.raises(CorpusError, match="no corpus 'iemocapp'; known are iemocap"):
        load_corpus("iemocapp")


def test_corpora_know_nothing_of_their_evaluation():
    code = "import sys; from hf_s2e import corpora; [corpora.about(name) for name in corpora.list_corpora()]; "
    code += "assert 'hf_s2e.corpora.toy' in sys.modules; print(*sys.modules)"
    imported = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    own = {name.split(".")[1] for name in imported if name.startswith("hf_s2e.")}
    assert own == {"audio", "auto_classes", "corpora", "model"}


# EmoDB


def test_emodb_real(s2e_data, load):
    corpus = load("emodb", s2e_data / "emodb")
    check_columns(corpus)
    assert len(corpus) == 535
    assert label_counts(corpus)["angry"] == 127 and label_counts(corpus)["disgusted"] == 46
    assert set(label_counts(corpus)) <= set(EMOTIONS)
    speakers = Counter(zip(corpus["speaker"], corpus["gender"]))
    assert len(speakers) == 10 and sum(n for (_, gender), n in speakers.items() if gender == "female") == 302


@pytest.mark.parametrize("below", ["..", ".", "wav"])
def test_root_is_found_from_parent_and_audio_folder(s2e_data, load, below):
    assert len(load("emodb", s2e_data / "emodb" / below)) == 535


def test_labels_are_chosen_in_the_order_given(s2e_data, load):
    corpus = load("emodb", s2e_data / "emodb", labels=["sad", "angry"])
    assert corpus.features["label"].names == ["sad", "angry"]
    assert label_counts(corpus) == {"sad": 62, "angry": 127}


@pytest.mark.parametrize("labels", [["joyful"], "sad", ["sad", "sad"], []])
def test_labels_that_make_no_sense(s2e_data, load, labels):
    with pytest.raises(CorpusError, match=r"joyful.*it has.*happy|list of different class names"):
        load("emodb", s2e_data / "emodb", labels=labels)


def test_a_missing_file_is_named_in_a_table(s2e_data, load, plant):
    names = [f"wav/{path.stem}.wav" for path in (s2e_data / "emodb/wav").iterdir()]
    names.remove("wav/16b10Wb.wav")
    copy = plant("emodb", names)
    with pytest.raises(CorpusError) as error:
        load("emodb", copy)
    assert [line.split() for line in str(error.value).splitlines()][1:5] == [
        ["expected", "found"],
        ["label", "angry", "127", "126"],
        ["missing", "files:", "1"],
        ["16b10Wb"],
    ]
    with pytest.warns(CorpusWarning, match="16b10Wb"):
        assert len(load("emodb", copy, strict=False)) == 534
    with pytest.warns(CorpusWarning, match="16b10Wb"):  # also when it comes from the cache
        load("emodb", copy, strict=False)
    with pytest.raises(CorpusError, match="16b10Wb"):  # which does not satisfy strict=True
        load("emodb", copy)
    assert len(load("emodb", copy, labels=["sad", "bored"])) == 143  # these classes are complete


def test_wrong_folder_shows_layout_and_what_was_found(plant, load):
    folder = plant("music", [f"album {number}/song.mp3" for number in range(9)])
    with pytest.raises(CorpusError) as error:
        load("emodb", folder)
    assert "expected: wav/03a01Wa.wav" in str(error.value)
    assert "album 0/, album 1/, album 2/, album 3/, album 4/ ... (9 in all)" in str(error.value)


def test_no_folder(load, tmp_path):
    with pytest.raises(CorpusError, match="is not a folder"):
        load("ravdess", tmp_path / "nowhere")
    with pytest.raises(CorpusError, match="needs data_dir="):
        load("ravdess")


def test_two_copies_in_one_folder_are_ambiguous(plant, load):
    plant("both/one", ["wav/03a01Wa.wav"])
    folder = plant("both/two", ["wav/03a01Wa.wav"]).parent
    with pytest.raises(CorpusError, match="several such folders: one, two"):
        load("emodb", folder)


def test_unknown_option(load):
    with pytest.raises(CorpusError, match="has no option scriptd; it has labels"):
        load("emodb", scriptd=True)


# RAVDESS


def test_ravdess_real(s2e_data, load):
    corpus = load("ravdess", s2e_data / "ravdess")
    check_columns(corpus)
    assert len(corpus) == 1440 and label_counts(corpus)["neutral"] == 96
    assert set(label_counts(corpus)) <= set(EMOTIONS)
    by_name = {os.path.basename(row["audio"]["path"])[:20]: row for row in corpus}
    row = by_name["03-01-05-02-01-02-18"]
    assert corpus.features["label"].int2str(row["label"]) == "angry"
    assert (row["speaker"], row["gender"], row["intensity"]) == ("18", "female", "strong")
    assert row["text"] == "Kids are talking by the door"


def test_ravdess_songs_are_passed_over_and_missing_speech_is_named(plant, load):
    two = ("01", "02")
    names = [f"Actor_07/03-{song}-01-01-01-{take}-07.wav" for song, take in itertools.product(two, two)]
    folder = plant("ravdess", names)
    with pytest.warns(CorpusWarning, match=r"missing files: 1438\n    03-01-01-01-01-01-01"):
        corpus = load("ravdess", folder, strict=False)
    assert len(corpus) == 2 and set(corpus["gender"]) == {"male"}


# speechocean762


def test_speechocean762_real(s2e_data, load):
    corpus = load("speechocean762", s2e_data / "speechocean762")
    check_columns(corpus)
    assert len(corpus) == 5000 and corpus.features["label"].num_classes == 250
    assert corpus.features["label"].int2str(corpus["label"]) == list(corpus["speaker"])
    assert Counter(corpus["gender"]) == {"male": 2500, "female": 2500}
    assert "WE CALL IT BEAR" in corpus["text"]


def test_speakers_are_drawn_by_seed(s2e_data, load):
    def drawn(seed):
        corpus = load("speechocean762", s2e_data / "speechocean762", num_speakers=8, speaker_seed=seed)
        assert len(corpus) == 160 and sorted(set(corpus["speaker"])) == corpus.features["label"].names
        return corpus.features["label"].names

    assert drawn(0) == drawn(0) != drawn(1)
    with pytest.raises(CorpusError, match="num_speakers=251, but there are 250 speakers"):
        load("speechocean762", s2e_data / "speechocean762", num_speakers=251)


def test_speechocean762_original_tree(plant, load):
    folder = plant("speechocean762", ["WAVE/SPEAKER0001/000010011.WAV", "WAVE/SPEAKER0002/000020002.WAV"])
    for split, utterance, gender in (("train", "000010011", "m"), ("test", "000020002", "f")):
        (folder / split).mkdir()
        (folder / split / "text").write_text(f"{utterance}\tHELLO THERE\n")
        (folder / split / "spk2gender").write_text(f"{utterance[1:5]}\t{gender}\n")
    with pytest.warns(CorpusWarning, match="speakers in the copy +250 +2"):
        corpus = load("speechocean762", folder, strict=False)
    assert corpus["speaker"][:] == ["0001", "0002"] and corpus["gender"][:] == ["male", "female"]
    assert corpus["split"][:] == ["train", "test"] and corpus["text"][0] == "HELLO THERE"


# CREMA-D


def test_cremad(plant, load):
    names = ["1001_DFA_ANG_XX", "1002_IEO_SAD_HI"]
    plant("CREMA-D", [f"AudioMP3/{name}.mp3" for name in names])
    folder = plant("CREMA-D", [f"AudioWAV/{name}.wav" for name in names])
    (folder / "VideoDemographics.csv").write_text(
        '"ActorID","Age","Sex","Race","Ethnicity"\n1001,51,"Male","Caucasian","Not Hispanic"\n1002,21,"Female","",""\n'
    )
    for data_dir in (folder, folder / "AudioWAV"):
        with pytest.warns(CorpusWarning, match="label angry +1271 +1\n"):
            corpus = load("cremad", data_dir, strict=False)
        assert corpus["speaker"][:] == ["1001", "1002"] and corpus["gender"][:] == ["male", "female"]
        assert corpus["intensity"][:] == [None, "high"] and corpus["text"][:] == ["DFA", "IEO"]
        assert label_counts(corpus) == {"angry": 1, "sad": 1}


def test_cremad_complete(plant, load):
    counts = {"ANG": 1271, "DIS": 1271, "FEA": 1271, "HAP": 1271, "SAD": 1271, "NEU": 1087}
    sentences = [f"{letter}{letter}{letter}" for letter in "ABCDEFGHIJKLMN"]
    names = []
    for code, number in counts.items():
        pairs = itertools.islice(itertools.product(range(1001, 1092), sentences), number)
        names += [f"AudioWAV/{actor}_{sentence}_{code}_XX.wav" for actor, sentence in pairs]
    corpus = load("cremad", plant("CREMA-D", names))
    assert len(corpus) == 7442


# IEMOCAP

IMPROVISED = {  # F/M per session; per speaker the share of each class below sums up to the published counts
    "Ses01F": 217, "Ses01M": 205, "Ses02F": 185, "Ses02M": 208, "Ses03F": 264, "Ses03M": 274,
    "Ses04F": 149, "Ses04M": 221, "Ses05F": 298, "Ses05M": 259,
}  # fmt: skip
CLASSES = {"neu": 1099, "sad": 608, "ang": 289, "hap": 284}
HEADER = "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n"


def label_line(turn, code):
    return (
        f"[6.2901 - 8.2357]\t{turn}\t{code}\t[2.5000, 2.5000, 2.5000]\n"
        "C-E2:\tNeutral;\t()\nA-E3:\tval 3; act 2; dom  2;\t()\n\n"
    )


def iemocap_tree(plant, dialogues):
    """dialogues: name -> {turn: code}; a tree as the corpus is handed out, macOS litter included."""
    names = []
    for dialogue, turns in dialogues.items():
        session = f"Session{dialogue[4]}"
        names += [f"{session}/sentences/wav/{dialogue}/{turn}.wav" for turn in turns]
        names.append(f"{session}/sentences/wav/{dialogue}/._{next(iter(turns))}.wav")
    root = plant("IEMOCAP_full_release", names)
    for dialogue, turns in dialogues.items():
        folder = root / f"Session{dialogue[4]}" / "dialog/EmoEvaluation"
        (folder / "Categorical").mkdir(parents=True, exist_ok=True)
        (folder / "Categorical" / f"{dialogue}_e1_cat.txt").write_text(f"{dialogue}_F000 :Anger; ()\n")
        (folder / f"._{dialogue}.txt").write_bytes(b"\0\5\26\7")
        text = HEADER + "".join(label_line(turn, code) for turn, code in turns.items())
        (folder / f"{dialogue}.txt").write_text(text)
    return root


def test_iemocap_complete(plant, load):
    codes = [code for code, number in CLASSES.items() for _ in range(number)]
    dialogues = {}
    for speaker, number in IMPROVISED.items():
        dialogue = f"{speaker[:5]}F_impro01"  # both actors speak in the dialogue that is named after the F
        turns = {f"{dialogue}_{speaker[5]}{turn:03d}": codes.pop() for turn in range(number)}
        dialogues.setdefault(dialogue, {}).update(turns)
    dialogues["Ses01F_impro01"] |= {f"Ses01F_impro01_F{turn:03d}": "exc" for turn in range(300, 963)}
    dialogues["Ses01F_impro01"] |= {"Ses01F_impro01_M990": "xxx", "Ses01F_impro01_M991": "fru"}
    dialogues["Ses01F_script01_1"] = {"Ses01F_script01_1_F000": "neu"}
    root = iemocap_tree(plant, dialogues)
    corpus = load("iemocap", root)
    check_columns(corpus)
    assert corpus.features["label"].names == ["neutral", "angry", "happy", "sad"]
    assert len(corpus) == 2280 and label_counts(corpus)["happy"] == 284
    assert Counter(corpus["speaker"]) == IMPROVISED
    assert label_counts(load("iemocap", root, excited_as_happy=True))["happy"] == 284 + 663
    assert len(load("iemocap", root, labels=["excited"])) == 663
    with pytest.raises(CorpusError, match=r"label neutral +1708 +1100"):
        load("iemocap", root, scripted=True)


def test_iemocap_speaker_is_the_letter_of_the_last_part(plant, load):
    turns = {"Ses03M_impro05b_F012": "neu", "Ses03M_impro05b_M013": "ang"}
    root = iemocap_tree(plant, {"Ses03M_impro05b": turns})
    with pytest.warns(CorpusWarning, match="label neutral +1099 +1\n"):
        corpus = load("iemocap", root, strict=False)
    assert corpus["speaker"][:] == ["Ses03F", "Ses03M"] and corpus["gender"][:] == ["female", "male"]
    assert set(corpus["session"]) == {"Ses03"} and set(corpus["scenario"]) == {"improvised"}


def test_iemocap_faults_name_file_and_line(plant, load):
    turns = {f"Ses01F_impro01_F{turn:03d}": "neu" for turn in range(4)}
    root = iemocap_tree(plant, {"Ses01F_impro01": turns})
    (root / "Session1/sentences/wav/Ses01F_impro01/Ses01F_impro01_F001.wav").unlink()
    labels = root / "Session1/dialog/EmoEvaluation/Ses01F_impro01.txt"
    broken = labels.read_text().replace("F003\tneu", "F003\tjoy")
    labels.write_text(broken)
    with pytest.raises(CorpusError) as error:
        load("iemocap", root)
    text = str(error.value)
    assert f"Ses01F_impro01_F001 ({labels}:7)" in text and "missing files: 1" in text
    assert f"{labels}:15: [6.2901" in text and "label lines that cannot be read: 1" in text
    assert "recordings without a label line: 1\n    Ses01F_impro01_F003" in text


def test_iemocap_wrong_folder(plant, load):
    folder = plant("Session1", ["sentences/wav/Ses01F_impro01/Ses01F_impro01_F000.wav"])
    with pytest.raises(CorpusError, match="expected: Session1/dialog/EmoEvaluation/Ses01F_impro01"):
        load("iemocap", folder)


# VoxCeleb

VOX2_META = "VoxCeleb2 ID ,VGGFace2 ID ,Gender ,Set \n"


def vox2_tree(plant, speakers=12, ext="m4a", inside="dev/aac"):
    numbers = itertools.product(range(speakers), range(2), (1, 2))
    root = plant("VoxCeleb2", [f"{inside}/id{s:05d}/video{v}_-x/{u:05d}.{ext}" for s, v, u in numbers])
    lines = [f"id{n:05d} ,n{n:06d} ,{'fm'[n % 2]} ,dev \n" for n in range(speakers + 1)]
    (root / "vox2_meta.csv").write_text(VOX2_META + "".join(lines))
    return root


@pytest.mark.parametrize("inside,ext", [("dev/aac", "m4a"), ("dev/wav", "wav"), ("wav", "wav"), (".", "ogg")])
def test_voxceleb2(plant, load, inside, ext):
    root = vox2_tree(plant, ext=ext, inside=inside)
    with pytest.warns(CorpusWarning, match=r"speakers in the copy +5994 +12\n.*missing: 1\n +id00012"):
        corpus = load("voxceleb2", root, strict=False)
    check_columns(corpus)
    assert len(corpus) == 48 and corpus.features["label"].num_classes == 12
    assert corpus[4]["speaker"] == "id00001" and corpus[4]["gender"] == "male"
    assert corpus[4]["session"] == "video0_-x" and set(corpus["split"]) == {"dev"}


def test_voxceleb_lists_only_the_speakers_drawn(plant, load):
    root = vox2_tree(plant)
    with pytest.warns(CorpusWarning):
        drawn = load("voxceleb2", root, num_speakers=3, strict=False).features["label"].names
    for speaker in {f"id{n:05d}" for n in range(12)} - set(drawn):
        shutil.rmtree(root / "dev/aac" / speaker / "video0_-x")
    with pytest.warns(CorpusWarning):
        again = load("voxceleb2", root, num_speakers=3, strict=False)
    assert again.features["label"].names == drawn and len(again) == 12
    with pytest.raises(CorpusError, match=r"speakers in the copy +5994 +12"):
        load("voxceleb2", root, num_speakers=3)


def test_voxceleb1(plant, load):
    root = plant("VoxCeleb1", ["wav/id10001/1zcIwhmdeo4/00001.wav", "wav/id10002/1zcIwhmdeo4/00001.wav"])
    header = "VoxCeleb1 ID\tVGGFace1 ID\tGender\tNationality\tSet\n"
    (root / "vox1_meta.csv").write_text(header + "id10001\tA.J._Buckley\tm\tIreland\tdev\n")
    with pytest.warns(CorpusWarning, match=r"speakers in the copy +1251 +2"):
        corpus = load("voxceleb1", root, strict=False)
    assert corpus["speaker"][:] == ["id10001", "id10002"] and corpus["gender"][:] == ["male", None]


def test_voxceleb_twice_converted(plant, load):
    root = plant("vox", [f"wav/id10001/video/00001.{ext}" for ext in ("m4a", "wav")])
    with pytest.warns(CorpusWarning, match=r"found twice, the second left out: 1\n.*00001.wav"):
        assert len(load("voxceleb1", root, strict=False)) == 1
