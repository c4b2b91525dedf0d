"""Your own recordings in a folder: ``label/file.wav``, or any files beside a metadata.csv that lists them.

A metadata.csv has the columns ``file_name``, ``label`` and, where known, ``speaker``; the options are those
of the manifest loader. Without it, the first folder level is the label (after train/, validation/ or test/,
if that is how the folder begins), and the speaker is None unless ``speaker_pattern`` finds it in the path,
as ``speaker_pattern="_([FM][0-9]+)_"`` does in ``Angry/SM1_F19_A019.wav``; with ``label="speaker"`` that is
the label, too.
"""

import os
from pathlib import Path

from .files import CorpusError, is_audio, show_entries, walk
from .labels import SPLITS
from .manifest import OPTIONS, Manifest

FOLDER_OPTIONS = {**OPTIONS, "manifest": "metadata.csv", "path": "file_name"}


class Folder(Manifest):
    LAYOUT = "label/file.wav, or a metadata.csv with the columns file_name, label and, where known, speaker"
    OPTIONS = FOLDER_OPTIONS

    def locate(self, data_dir):
        if data_dir is None:
            raise CorpusError(f"folder needs data_dir=, a folder with {self.LAYOUT}")
        folder = Path(data_dir).expanduser().absolute()
        if (folder / self.options["manifest"]).is_file():
            return super().locate(folder)
        if self.options["manifest"] != FOLDER_OPTIONS["manifest"] and folder.is_dir():
            raise CorpusError(f"{folder} has no {self.options['manifest']} (manifest=); found: {show_entries(folder)}")
        if not folder.is_dir():
            raise CorpusError(f"{folder} is not a folder; expected: {self.LAYOUT}")
        if not any(is_audio(path) and os.path.dirname(path) != str(folder) for path, _ in walk(folder)):
            found = show_entries(folder)
            raise CorpusError(f"{folder}\n  expected: {self.LAYOUT}\n  found:    {found}")
        known = {OPTIONS["label"], self.options["speaker"] if self.options["speaker_pattern"] else None}
        if self.options["label"] not in known:
            raise CorpusError(
                f"{folder} has no {self.options['manifest']}, so no column {self.options['label']!r} for label=; "
                "without one a label is the name of a folder or, with speaker_pattern= and "
                f"label={self.options['speaker']!r}, the speaker"
            )
        self.COLUMNS = ("split",) * any(path.name.lower() in SPLITS for path in folder.iterdir())
        return folder

    def entries(self):
        if self.table:
            yield from super().entries()
            return
        for path, _ in walk(self.root):
            if is_audio(path):
                relative = os.path.relpath(path, self.root)
                *folders, _ = Path(relative).parts
                split = SPLITS.get(folders[0].lower()) if len(folders) > 1 else None
                speaker = self.speaker_in(relative)
                label = folders[1 if split else 0] if folders else ""
                if self.options["label"] == self.options["speaker"]:  # to learn who speaks
                    label = speaker or ""
                yield {"place": path, "path": relative, "label": label, "speaker": speaker, "split": split}

    def files(self):
        return super().files() if self.table else walk(self.root)
