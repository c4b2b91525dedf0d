"""speechocean762: English read by 250 Mandarin speakers, 20 sentences each; the label is the speaker.

Zhang et al., "speechocean762: An Open-Source Non-native English Speech Corpus For Pronunciation Assessment",
Interspeech 2021 (OpenSLR 101). Taken as the original tree (``WAVE/SPEAKER0001/000010011.WAV`` beside Kaldi
tables in train/ and test/) or as ``audio/0001/000010011.ogg`` beside a metadata.csv.
"""

import itertools
import os
import re
from functools import cached_property

from .base import SPEAKER_OPTIONS, About, Corpus
from .files import is_audio, read_table, walk, without_extension
from .labels import GENDERS


class SpeechOcean762(Corpus):
    ABOUT = About(
        title="speechocean762",
        language="en",
        license="other",
        terms="free for commercial and non-commercial use (its README)",
        url="https://www.openslr.org/101/",
        citation='Zhang et al., "speechocean762, An Open-Source Non-native English Speech Corpus For Pronunciation '
        'Assessment", Interspeech 2021',
    )
    LAYOUT = "WAVE/SPEAKER0001/000010011.WAV or audio/0001/000010011.ogg (speaker 0001, utterance 000010011)"
    PATTERN = re.compile(
        r"(?:(?:WAVE|audio)/)?(?:(?:SPEAKER)?\d{4}/)?(?P<utterance>0(?P<speaker>\d{4})\d{4})", re.IGNORECASE
    )
    DEPTH = 3
    COLUMNS = ("gender", "text", "split")
    SPEAKERS = ((250, 5000),)
    OPTIONS = SPEAKER_OPTIONS

    def class_names(self):
        names = (self._parse(path, self.root) for path, _ in walk(self.root, self.DEPTH) if is_audio(path))
        return self.choose_speakers({name["speaker"] for name in names if name})

    def row(self, name):
        facts = self.metadata.get(name["utterance"], {})
        text, split = self.kaldi["text"].get(name["utterance"], (facts.get("text"), None))
        gender, _ = self.kaldi["spk2gender"].get(name["speaker"], (facts.get("gender"), None))
        who = name["speaker"]
        return {"label": who, "speaker": who, "gender": GENDERS.get(gender), "text": text, "split": split}

    def expected(self):
        return {"label": dict.fromkeys(self.classes, 20)}

    def expected_names(self):
        return self.metadata or self.kaldi["text"]

    @cached_property
    def metadata(self) -> dict[str, dict[str, str]]:
        """utterance -> its line in metadata.csv"""
        table = self.root / "metadata.csv"
        lines = read_table(table) if table.is_file() else ()
        return {without_extension(os.path.basename(cells["file_name"])): cells for _, cells in lines}

    @cached_property
    def kaldi(self) -> dict[str, dict[str, tuple[str, str]]]:
        """table -> first word of a line -> (the rest of the line, the split whose table it stands in)"""
        tables = {"text": {}, "spk2gender": {}}
        for table, split in itertools.product(tables, ("train", "test")):
            path = self.root / split / table
            for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
                key, _, rest = line.strip().partition("\t" if "\t" in line else " ")
                tables[table][key] = (rest, split)
        return tables
