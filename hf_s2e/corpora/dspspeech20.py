"""DSPSpeech-20, to learn who speaks: Chinese words, arranged by yourself beside a metadata.csv.

Chen, "DSPSpeech-20", 2019. Words of one speaker may have been joined to longer recordings: no counts are asserted.
"""

from .base import About
from .speaker_table import SpeakerTable


class DSPSpeech20(SpeakerTable):
    ABOUT = About(
        title="DSPSpeech-20",
        language="zh",
        license="mit",
        terms="MIT",
        citation='Chen, "DSPSpeech-20", 2019',
    )
    LAYOUT = "audio/ds00/ds00_001.ogg, and a metadata.csv with the columns file_name and speaker"
