"""CREMA-D: English, 91 actors, 12 sentences, 6 emotions, 7,442 utterances.

Cao et al., "CREMA-D: Crowd-Sourced Emotional Multimodal Actors Dataset", IEEE TAC 5(4), 2014. The labels are
the emotions that were meant to be acted. 1076_MTI_SAD_XX is silent as published, and one name ends in _X.
"""

import re
from functools import cached_property

from .base import About, Corpus
from .files import read_table, walk
from .labels import GENDERS

EMOTIONS = {
    "NEU": "neutral", "HAP": "happy", "SAD": "sad", "ANG": "angry", "FEA": "fearful", "DIS": "disgusted",
}  # fmt: skip
COUNTS = {"label": {label: 1087 if label == "neutral" else 1271 for label in EMOTIONS.values()}}
TABLE = "VideoDemographics.csv"
INTENSITIES = {"LO": "low", "MD": "medium", "HI": "high"}


class CREMAD(Corpus):
    ABOUT = About(
        title="CREMA-D",
        language="en",
        license="odbl",
        terms="Open Database License 1.0, the contents under the Database Contents License",
        url="https://github.com/CheyneyComputerScience/CREMA-D",
        citation='Cao et al., "CREMA-D, Crowd-sourced Emotional Multimodal Actors Dataset", '
        "IEEE Transactions on Affective Computing 5(4), 2014",
    )
    LAYOUT = "AudioWAV/1001_DFA_ANG_XX.wav (actor, sentence, emotion, level) and VideoDemographics.csv"
    PATTERN = re.compile(
        r"(?:AudioWAV/)?(?P<actor>1\d\d\d)_(?P<sentence>[A-Z]{3})_"
        r"(?P<emotion>NEU|HAP|SAD|ANG|FEA|DIS)_(?P<level>[A-Z]{1,2})"
    )
    CLASSES = tuple(EMOTIONS.values())
    COLUMNS = ("gender", "text", "intensity")
    EXPECTED = COUNTS

    def row(self, name):
        return {
            "label": EMOTIONS[name["emotion"]],
            "speaker": name["actor"],
            "gender": self.genders.get(name["actor"]),
            "text": name["sentence"],
            "intensity": INTENSITIES.get(name["level"]),
        }

    def files(self):
        audio = self.root / "AudioWAV"  # beside it, the published repository has the same as AudioMP3
        yield from walk(audio if audio.is_dir() else self.root, depth=1)
        if table := self.beside(TABLE):
            yield str(table), table.stat().st_size

    @cached_property
    def genders(self) -> dict[str, str]:
        """actor -> gender, where the demographics table lies with the audio"""
        table = self.beside(TABLE)
        lines = read_table(table) if table else ()
        return {cells["ActorID"]: GENDERS.get(cells["Sex"].lower()) for _, cells in lines}
