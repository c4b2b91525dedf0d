"""Corpora of speakers that you arranged yourself: recordings beside a metadata.csv; the label is the speaker.

The table has the columns ``file_name`` and ``speaker``; further ones (gender, language, duration_s, ...) are kept.
"""

from .manifest import OPTIONS, Manifest

TABLE_OPTIONS = {**OPTIONS, "manifest": "metadata.csv", "path": "file_name", "label": "speaker"}


class SpeakerTable(Manifest):
    LAYOUT = "recordings, and a metadata.csv with the columns file_name and speaker"
    OPTIONS = TABLE_OPTIONS
