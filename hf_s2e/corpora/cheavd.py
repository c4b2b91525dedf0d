"""CHEAVD 2.0, the data of the Multimodal Emotion Challenge (MEC) 2017: Chinese films and shows, 8 emotions.

Li et al., "MEC 2017: Multimodal Emotion Recognition Challenge", ACII Asia 2018. The corpus is handed out on
request and its layout could not be checked, so this loader takes a manifest that you write: a CSV or TSV file
with the columns ``path, label, split[, speaker]`` (other names through the options of the manifest loader).
``split`` is the official train, validation or test. No counts are asserted.
"""

from .base import About
from .files import CorpusError
from .manifest import Manifest

LABELS = {
    "neutral": "neutral", "angry": "angry", "happy": "happy", "sad": "sad", "worried": "worried",
    "anxious": "anxious", "surprise": "surprised", "disgust": "disgusted",
}  # fmt: skip


class CHEAVD(Manifest):
    ABOUT = About(
        title="CHEAVD 2.0 (MEC 2017)",
        language="zh",
        license="other",
        weights="other",
        terms="by agreement with the Chinese Academy of Sciences, for research",
        citation='Li et al., "MEC 2017, Multimodal Emotion Recognition Challenge", ACII Asia 2018',
    )
    LAYOUT = "a CSV or TSV file with the columns path, label, split and, where known, speaker"

    def label_map(self):
        capitals = {name.capitalize(): label for name, label in LABELS.items()}
        return self.options["label_map"] or LABELS | capitals

    def class_names(self):
        super().class_names()
        return LABELS.values()

    def read_header(self):
        super().read_header()
        if "split" not in self.COLUMNS:
            raise CorpusError(f'{self.table} has no column {self.options["split"]!r}; name it: split="..."')
