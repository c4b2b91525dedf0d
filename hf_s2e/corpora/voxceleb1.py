"""VoxCeleb1: 1,251 speakers (1,211 without the test part), 153,516 utterances from interviews.

Nagrani et al., "VoxCeleb: a large-scale speaker identification dataset", Interspeech 2017.
"""

from .base import About
from .voxceleb import TERMS, URL, VoxCeleb


class VoxCeleb1(VoxCeleb):
    ABOUT = About(
        title="VoxCeleb1",
        language="en",
        license="cc-by-4.0",
        terms=TERMS,
        url=URL,
        citation='Nagrani et al., "VoxCeleb, a large-scale speaker identification dataset", Interspeech 2017',
    )
    LAYOUT = "wav/id10001/1zcIwhmdeo4/00001.wav (speaker, video, utterance)"
    META = "vox1_meta.csv"
    SPEAKERS = ((1211, 148_642), (1251, 153_516))
