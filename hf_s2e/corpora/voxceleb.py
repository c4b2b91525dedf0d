"""What VoxCeleb1 and VoxCeleb2 share: a million files ``speaker/video/utterance``; the label is the speaker.

Speakers are chosen by ``num_speakers`` and ``speaker_seed`` before any of their files is listed, and files
are listed one folder at a time, so memory does not grow with the corpus. The choice depends on which speakers
there are: from an incomplete copy others are drawn, which is why a wrong number of speakers is an error.
"""

import os
import re
from functools import cached_property

from .base import SPEAKER_OPTIONS, Corpus
from .files import is_audio, read_table, walk, without_extension

SPEAKER = re.compile(r"id\d{5}")
TERMS = "CC BY 4.0 for the metadata; the videos belong to their owners"
URL = "https://www.robots.ox.ac.uk/~vgg/data/voxceleb/"


class VoxCeleb(Corpus):
    AUDIO_FOLDERS = ("dev/wav", "dev/aac", "dev", "wav", "aac", "")  # the first one that holds speakers
    META: str  # table with one line per speaker
    COLUMNS = ("gender", "session", "split")
    OPTIONS = SPEAKER_OPTIONS
    UNIQUE_NAMES = False  # every video has a 00001

    def is_root(self, folder):
        return self.audio_folder(folder) is not None

    def audio_folder(self, folder):
        """The first of `AUDIO_FOLDERS` that holds speakers, or None."""
        for name in self.AUDIO_FOLDERS:
            inside = folder / name
            if inside.is_dir() and any(SPEAKER.fullmatch(entry) for entry in os.listdir(inside)):
                return inside
        return None

    def class_names(self):
        self.audio = self.audio_folder(self.root)
        self.on_disk = {name for name in os.listdir(self.audio) if SPEAKER.fullmatch(name)}
        return self.choose_speakers(self.on_disk)

    def files(self):
        if table := self.beside(self.META):
            yield str(table), table.stat().st_size
        for speaker in self.all_classes:
            yield from walk(self.audio / speaker, depth=2)

    def rows(self, report):
        previous, below = None, len(os.path.join(self.audio, ""))
        for path, size in self.files():
            if not is_audio(path):
                continue
            stem = without_extension(path)
            speaker, *video, _ = path[below:].split(os.sep)
            if stem == previous:  # 00001.m4a and 00001.wav
                report.add("utterances found twice, the second left out", path)
            elif not video:
                report.add(f"audio files outside of {self.LAYOUT}", path)
            else:
                who = {"label": speaker, "speaker": speaker, **self.meta.get(speaker, {})}
                yield {"path": path, "size": size, "session": video[0], **who}
            previous = stem
        if len(self.on_disk) not in dict(self.SPEAKERS):
            for speaker, meta in self.meta.items():
                if meta["split"] == "dev" and speaker not in self.on_disk:
                    report.add(f"speakers of {self.META} that are missing", speaker)

    @cached_property
    def meta(self) -> dict[str, dict[str, str]]:
        """speaker -> gender and split, where the table of speakers lies with the audio"""
        table = self.beside(self.META)
        return dict(_meta_line(list(cells.values())) for _, cells in read_table(table)) if table else {}


def _meta_line(cells: list[str]) -> tuple[str, dict[str, str]]:
    """id, name, gender, ..., set: the two corpora's tables have other column names but this order."""
    return cells[0], {"gender": "female" if cells[2] == "f" else "male", "split": cells[-1]}
