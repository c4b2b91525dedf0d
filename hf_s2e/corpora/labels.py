"""The names of the classes, the same over all corpora.

A loader of a named corpus translates the corpus' own codes (``W``, ``ang``, ``05``, ``Surprise``) into
these names, so that a model trained on one corpus can be tested on another and
``labels=["neutral", "angry"]`` means the same everywhere. The general loaders (folder, manifest, hub) keep
the names they find; their ``label_map`` option translates them.
"""

EMOTIONS = (
    "neutral",
    "calm",  # RAVDESS: speaks quietly and at ease, apart from neutral
    "happy",  # joy
    "sad",
    "angry",
    "fearful",  # fear, anxiety in EmoDB's German original (Angst)
    "disgusted",
    "surprised",
    "bored",
    "excited",  # IEMOCAP; merged into happy by its option excited_as_happy
    "frustrated",
    "worried",  # CHEAVD
    "anxious",  # CHEAVD
    "other",  # IEMOCAP: an emotion outside the list
    "undecided",  # IEMOCAP xxx: the annotators did not agree
)

GENDERS = {"f": "female", "female": "female", "w": "female", "m": "male", "male": "male"}

SPLITS = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip
