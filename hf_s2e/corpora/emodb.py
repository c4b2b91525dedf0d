"""EmoDB (Berlin Database of Emotional Speech): German, 10 actors, 10 sentences, 7 emotions, 535 utterances.

Burkhardt et al., "A Database of German Emotional Speech", Interspeech 2005.
"""

import re

from .base import About, Corpus

EMOTIONS = {
    "N": "neutral", "W": "angry", "L": "bored", "E": "disgusted", "A": "fearful", "F": "happy", "T": "sad",
}  # fmt: skip
COUNTS = {
    "label": {
        "neutral": 79, "angry": 127, "bored": 81, "disgusted": 46, "fearful": 69, "happy": 71, "sad": 62,
    }
}  # fmt: skip
MEN = {"03", "10", "11", "12", "15"}

# All 535 names: speaker, then for each sentence the emotions and versions that were kept.
NAMES = {
    "03": "a01FaNcWa a02FcNcTaWbWc a04AdFdLcNcTaWc a05AaFcNdTcWaWb a07FaFbLaNcWc "
          "b01FaLbNbTdWaWc b02AaLaNaTbWb b03NbTcWc b09LaNcTcWa b10AbEcNaNcWbWc",
    "08": "a01AbFdLcNaWaWc a02AbAcFeLaNaTbWc a04FfLaNcTbWc a05FeLcNbTaWa a07FdLaNaTaTbWc "
          "b01AaFdFeLbNaWa b02FfLaNbTcWd b03FeLcNbTcWd b09AbFdLcNbTbWaWc b10AaFdLaNcTcWa",
    "09": "a01EaFaNbWb a02EaEbLaWb a04FdLaNbWa a05EdLcNbTbWbWc a07EbNaTaWbWd "
          "b01EaNaWb b02NaTbWcWd b03EdFaFdLbNbTaWb b09EaNdWa b10AaNdWa",
    "10": "a01AcNbWa a02AbFaLbNaWa a04FdNbWaWb a05AaLdTbWb a07AaAdLaTaWb "
          "b01AaEaFaLb b02AaLaNaWb b03LaTbWb b09AdLbWb b10FcLcWa",
    "11": "a01AaAbLdNdWc a02EcFbLdNcTcWc a04AcFdNdWc a05AdFbFcLcNaTdWd a07AcLdTaWc "
          "b01AbEbFcLbNcWd b02AbFdNaTdWb b03FcLcNbTdWaWb b09AdFdLdNaTdWa b10AdAeLdNcTdWa",
    "12": "a01FbLbNbWc a02AcEcNbWaWc a04Wc a05AbLbNdTaWb a07AcLaWa "
          "b01TaWa b02AdEaFbNaWaWbWd b03LaTa b09AcTdWc b10AcLdWa",
    "13": "a01AcEaEcFdLbNbWb a02AdEcFaLcNcTaWa a04AcFcLbTaWc a05AaEaLcNbTcWaWc a07FdLbNaTcWb "
          "b01AbEcFcLdNcWa b02FbLcNbWa b03AcEdFdLbNaTdWc b09AbEcFbFcLaNaWa b10EcFaLaNcWaWc",
    "14": "a01AaAcEaNaWaWc a02AbEaFdLaNcTbWaWc a04AaEdLbTbTcWbWc a05AaAcFaFbLbNaTaTcWaWb a07AaEbFdLcLdNaTcWc "
          "b01AcEbFaFcNaWc b02AaFbNaTcWbWd b03AdEdLbTaWb b09AcEaFcLbTdWaWc b10AdEbLbNbTcWc",
    "15": "a01EaFbLaNbWa a02AcEaLaNaTaWbWd a04AbAcFdNcWaWb a05EbFbLbNaWa a07AcEbFaFbLdNc "
          "b01EcLbNaWc b02AaLbNdTcWaWc b03AaLcNbTcWaWb b09AcFaLaNbTaWb b10AcLcNbNcWa",
    "16": "a01EcFcLbNcTbWb a02EaEcLbNbTcWb a04AbEaFaLaLcNcTcWbWc a05AbEaFcLaTbWbWc a07EaFaFbLaLbNbTdWa "
          "b01AaEbFaLaLcTbWaWb b02AaEbFdLbWb b03AdEaFaFdLaNbTaWb b09AbEbFbLaLbWb b10AaEbFbLbTbTdWaWb",
}  # fmt: skip


class EmoDB(Corpus):
    ABOUT = About(
        title="EmoDB",
        language="de",
        license="cc0-1.0",
        terms="CC0-1.0 as released by audEERING (audb emodb 1.4.1); version 2.0 on Zenodo is CC BY 4.0",
        url="https://audeering.github.io/datasets/datasets/emodb.html",
        citation='Burkhardt et al., "A Database of German Emotional Speech", Interspeech 2005',
    )
    LAYOUT = "wav/03a01Wa.wav (speaker 03, sentence a01, emotion W, version a)"
    PATTERN = re.compile(r"(?:wav/)?(?P<speaker>\d\d)(?P<text>[ab]\d\d)(?P<emotion>[NWLEAFT])[a-z]")
    CLASSES = tuple(EMOTIONS.values())
    COLUMNS = ("gender", "text")
    EXPECTED = COUNTS

    def row(self, name):
        return {
            "label": EMOTIONS[name["emotion"]],
            "speaker": name["speaker"],
            "gender": "male" if name["speaker"] in MEN else "female",
            "text": name["text"],
        }

    def expected_names(self):
        for speaker, sentences in NAMES.items():
            for sentence in sentences.split():
                yield from (speaker + sentence[:3] + take for take in re.findall("..", sentence[3:]))
