"""RAVDESS, speech part: English, 24 actors, 2 sentences, 8 emotions at two intensities, 1440 utterances.

Livingstone and Russo, "The Ryerson Audio-Visual Database of Emotional Speech and Song", PLoS ONE 13(5),
2018. Songs (channel 02) are passed over. The published audio holds one pair of equal recordings
(03-01-03-01-02-01-07 and 03-01-03-01-02-02-07); about 47 % of it is silence before and after the sentence.
"""

import itertools
import re

from .base import About, Corpus, PublishedFolds

EMOTIONS = {
    "01": "neutral", "02": "calm", "03": "happy", "04": "sad",
    "05": "angry", "06": "fearful", "07": "disgusted", "08": "surprised",
}  # fmt: skip
INTENSITIES = {"01": "normal", "02": "strong"}
COUNTS = {"label": {label: 96 if label == "neutral" else 192 for label in EMOTIONS.values()}}
STATEMENTS = {"01": "Kids are talking by the door", "02": "Dogs are sitting by the door"}
SPEECH = "01"
EMOBOX = PublishedFolds(
    "EmoBox's folds of speakers",
    (
        ("01", "11", "20", "21"), ("04", "10", "12", "14"), ("08", "09", "19", "23"),
        ("03", "05", "07", "24"), ("02", "15", "16", "18"), ("06", "13", "17", "22"),
    ),
)  # fmt: skip


class RAVDESS(Corpus):
    ABOUT = About(
        title="RAVDESS, speech part",
        language="en",
        license="cc-by-nc-sa-4.0",
        weights="cc-by-nc-sa-4.0",
        terms="CC BY-NC-SA 4.0, no commercial use",
        url="https://zenodo.org/records/1188976",
        citation='Livingstone and Russo, "The Ryerson Audio-Visual Database of Emotional Speech and Song", '
        "PLoS ONE 13(5), 2018",
        protocol="emobox6",
        folds={"emobox6": EMOBOX},
    )
    LAYOUT = "Actor_18/03-01-05-01-02-01-18.wav (-channel-emotion-intensity-statement-repetition-actor)"
    PATTERN = re.compile(
        r"(?:Actor_\d\d/)?03-(?P<channel>0[12])-(?P<emotion>0[1-8])-(?P<intensity>0[12])-(?P<statement>0[12])"
        r"-(?P<repetition>0[12])-(?P<actor>\d\d)"
    )
    CLASSES = tuple(EMOTIONS.values())
    COLUMNS = ("gender", "text", "intensity")
    EXPECTED = COUNTS

    def row(self, name):
        if name["channel"] != SPEECH:
            return None
        return {
            "label": EMOTIONS[name["emotion"]],
            "speaker": name["actor"],
            "gender": "male" if int(name["actor"]) % 2 else "female",
            "text": STATEMENTS[name["statement"]],
            "intensity": INTENSITIES[name["intensity"]],
        }

    def expected_names(self):
        two = ("01", "02")
        actors = [f"{actor:02d}" for actor in range(1, 25)]
        for actor, emotion, intensity, *rest in itertools.product(actors, EMOTIONS, two, two, two):
            if (emotion, intensity) != ("01", "02"):  # there is no strong neutral
                yield "-".join(["03", SPEECH, emotion, intensity, *rest, actor])
