"""IEMOCAP: English, 5 sessions of two actors each, improvised and scripted dialogues, 10,039 turns.

Busso et al., "IEMOCAP: interactive emotional dyadic motion capture database", LRE 42, 2008. By default the
improvised turns of four classes, 2,280 in all, as in the paper of this package (section 3). Options:
``scripted=True`` takes the scripted dialogues too, ``excited_as_happy=True`` merges the two (5,531 turns with
both options), ``labels`` names other classes.

The speaker of a turn is its session and the letter of the LAST part of its name: in Ses01F_impro01_M000 the
man speaks; the F says whose motion was captured.
"""

import os
import re

from .base import About, Corpus
from .files import is_audio, walk, without_extension

EMOTIONS = {
    "neu": "neutral", "ang": "angry", "hap": "happy", "sad": "sad", "exc": "excited", "fru": "frustrated",
    "fea": "fearful", "sur": "surprised", "dis": "disgusted", "oth": "other", "xxx": "undecided",
}  # fmt: skip
FOUR = ("neutral", "angry", "happy", "sad")
IMPROVISED = {"neutral": 1099, "angry": 289, "happy": 284, "sad": 608, "excited": 663}
ALL_TURNS = {
    "neutral": 1708, "angry": 1103, "happy": 595, "sad": 1084, "excited": 1041, "frustrated": 1849,
    "fearful": 40, "surprised": 107, "disgusted": 2, "other": 3, "undecided": 2507,
}  # fmt: skip
SPEAKERS = {  # of the 2,280
    "Ses01F": 217, "Ses01M": 205, "Ses02F": 185, "Ses02M": 208, "Ses03F": 264, "Ses03M": 274,
    "Ses04F": 149, "Ses04M": 221, "Ses05F": 298, "Ses05M": 259,
}  # fmt: skip
IEMOCAP_OPTIONS = {"labels": FOUR, "scripted": False, "excited_as_happy": False}
# [6.2901 - 8.2357]<TAB>Ses01F_impro01_F000<TAB>neu<TAB>[2.5000, 2.5000, 2.5000]
LABEL_LINE = re.compile(r"\[[\d.]+ - [\d.]+\]\t(?P<turn>(?P<session>Ses\d\d)\w+_(?P<who>[FM])\d+)\t(?P<code>\w+)\t.*")


class IEMOCAP(Corpus):
    ABOUT = About(
        title="IEMOCAP",
        language="en",
        license="other",
        weights="other",
        terms="by agreement with the University of Southern California, for research",
        url="https://sail.usc.edu/iemocap/",
        citation='Busso et al., "IEMOCAP, interactive emotional dyadic motion capture database", '
        "Language Resources and Evaluation 42, 2008",
    )
    LAYOUT = (
        "Session1/dialog/EmoEvaluation/Ses01F_impro01.txt and "
        "Session1/sentences/wav/Ses01F_impro01/Ses01F_impro01_F000.wav"
    )
    COLUMNS = ("gender", "session", "scenario")
    OPTIONS = IEMOCAP_OPTIONS

    def is_root(self, folder):
        return any(folder.glob("Session[1-5]/dialog/EmoEvaluation"))

    def files(self):
        for session in sorted(self.root.glob("Session[1-5]")):
            for folder, depth in ((session / "dialog/EmoEvaluation", 1), (session / "sentences/wav", 2)):
                if folder.is_dir():
                    yield from walk(folder, depth)

    def class_names(self):
        merged = self.options["excited_as_happy"]
        return [name for name in EMOTIONS.values() if not (merged and name == "excited")]

    def rows(self, report):
        recordings, label_files = {}, []
        for path, size in self.files():
            if is_audio(path):
                recordings[without_extension(os.path.basename(path))] = (path, size)
            elif path.endswith(".txt"):
                label_files.append(path)
        for label_file in label_files:
            yield from self.turns(label_file, recordings, report)
        for turn, (path, _) in recordings.items():
            report.add("recordings without a label line", f"{turn}: {path}")

    def turns(self, label_file, recordings, report):
        """The rows of one dialogue, taken out of ``recordings``."""
        with open(label_file, encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, 1):
                if not line.startswith("["):  # the header, or what the single evaluators said
                    continue
                match = LABEL_LINE.fullmatch(line.strip())
                place = f"{label_file}:{number}"
                if match is None or match["code"] not in EMOTIONS:
                    report.add("label lines that cannot be read", f"{place}: {line.strip()}")
                    continue
                scenario = "improvised" if "impro" in match["turn"] else "scripted"
                path, size = recordings.pop(match["turn"], (None, 0))
                row = {**self.facts(match), "scenario": scenario, "path": path, "size": size}
                wanted = scenario == "improvised" or self.options["scripted"]
                if not wanted or row["label"] not in self.classes:
                    continue
                if path is None:
                    report.add("missing files", f"{match['turn']} ({place})")
                    continue
                yield row

    def facts(self, match):
        label = EMOTIONS[match["code"]]
        if label == "excited" and self.options["excited_as_happy"]:
            label = "happy"
        return {
            "label": label,
            "speaker": match["session"] + match["who"],
            "gender": "female" if match["who"] == "F" else "male",
            "session": match["session"],
        }

    def expected(self):
        counts = dict(ALL_TURNS if self.options["scripted"] else IMPROVISED)
        if self.options["excited_as_happy"]:
            counts["happy"] += counts.pop("excited")
        as_in_paper = set(self.classes) == set(FOUR) and counts["happy"] == IMPROVISED["happy"]
        return {"label": counts, **({"speaker": SPEAKERS} if as_in_paper else {})}
