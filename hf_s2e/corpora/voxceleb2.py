"""VoxCeleb2, development part: 5,994 speakers, 1,092,009 utterances from interviews
(2,442 h with its test part).

Chung et al., "VoxCeleb2: Deep Speaker Recognition", Interspeech 2018. The paper draws 50 of its speakers.
"""

from .voxceleb import VoxCeleb


class VoxCeleb2(VoxCeleb):
    LAYOUT = "dev/aac/id00012/21Uxsk56VDQ/00001.m4a or .wav (speaker, video, utterance)"
    META = "vox2_meta.csv"
    SPEAKERS = ((5994, 1_092_009),)
