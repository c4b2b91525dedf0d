"""Mozilla Common Voice, to learn who speaks: clips of your choice, arranged by yourself beside a metadata.csv.

Ardila et al., "Common Voice: A Massively-Multilingual Speech Corpus", LREC 2020. Languages, accounts and clips are
those that you chose: no counts are asserted.
"""

from .base import About
from .speaker_table import SpeakerTable


class CommonVoice(SpeakerTable):
    ABOUT = About(
        title="Common Voice",
        language="multilingual",
        license="cc0-1.0",
        terms="CC0-1.0",
        url="https://commonvoice.mozilla.org/",
        citation='Ardila et al., "Common Voice, A Massively-Multilingual Speech Corpus", LREC 2020',
    )
    LAYOUT = "audio/cv0000/cv0000_0001.ogg, and a metadata.csv with the columns file_name and speaker"
