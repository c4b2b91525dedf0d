"""VoxCeleb2, development part: 5,994 speakers, 1,092,009 utterances from interviews
(2,442 h with its test part).

Chung et al., "VoxCeleb2: Deep Speaker Recognition", Interspeech 2018. The paper draws 50 of its speakers.
"""

from .base import About
from .voxceleb import TERMS, URL, VoxCeleb


class VoxCeleb2(VoxCeleb):
    ABOUT = About(
        title="VoxCeleb2",
        language="multilingual",
        license="cc-by-4.0",
        terms=TERMS,
        url=URL,
        citation='Chung et al., "VoxCeleb2, Deep Speaker Recognition", Interspeech 2018',
    )
    LAYOUT = "dev/aac/id00012/21Uxsk56VDQ/00001.m4a or .wav (speaker, video, utterance)"
    META = "vox2_meta.csv"
    SPEAKERS = ((5994, 1_092_009),)
