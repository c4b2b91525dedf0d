"""What a training reads: the corpus, its audio, and the rows that are trained and tested on."""

import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..corpora.index import few, text_column, utterance_ids
from ..evaluation.protocols import Protocol, make_protocol
from ..model.feature_extraction_s2e import S2EFrontEnd
from .arguments import CorpusArguments, ProtocolArguments, split_names
from .data import Task
from .lazy_store import LazyStore
from .runtime import readable_errors
from .wave_store import WaveStore


def read_corpus(accelerator: Accelerator, args: CorpusArguments):
    """The corpus as a `datasets.Dataset`, and its audio; see [`load_corpora`] and [`decode`]."""
    dataset = load_corpora(accelerator, args)
    return dataset, decode(dataset, accelerator, args)


def load_corpora(accelerator: Accelerator, args: CorpusArguments):
    """The corpus as a `datasets.Dataset`, before any of its audio is read.

    Several corpora, `--corpus a,b --data_dir x,y`, are united; speakers of different corpora stay apart.

    Raises:
        SystemExit: the corpus cannot be read; the message says why.
    """
    from ..corpora import load_corpus, unite

    names = args.corpus.split(",")
    folders = (args.data_dir or "").split(",") if len(names) > 1 else [args.data_dir or ""]  # one may have a comma
    options = _corpus_options(args, names)
    if len(folders) != len(names):
        raise SystemExit(f"--corpus names {len(names)} corpora, but --data_dir {len(folders)} folders")
    common = {"cache_dir": args.cache_dir, "strict": not args.not_strict}
    with readable_errors(), accelerator.local_main_process_first():  # of each machine: caches may be its own
        loaded = [
            load_corpus(name, data_dir=folder or None, **common, **options[name])
            for name, folder in zip(names, folders)
        ]
        keys = [f"{name}{i}" if names.count(name) > 1 else name for i, name in enumerate(names)]
        return loaded[0] if len(names) == 1 else unite(dict(zip(keys, loaded)))


def decode(dataset, accelerator: Accelerator, args: CorpusArguments) -> WaveStore | LazyStore:
    """The corpus' audio, decoded once.

    Raises:
        SystemExit: a recording cannot be read; the message says why.
    """
    with readable_errors(), accelerator.local_main_process_first():
        return build_store(dataset, accelerator, args)


def _corpus_options(args: CorpusArguments, names: list[str]) -> dict[str, dict[str, Any]]:
    """Each corpus' own entry of `--corpus_options`, or all of them where it has none; `--labels` goes with both."""
    with readable_errors("--corpus_options: "):
        options = json.loads(args.corpus_options)
    of_each = {name: options.get(name, options) if isinstance(options, dict) else options for name in names}
    for name, found in of_each.items():
        if not isinstance(found, dict):
            raise SystemExit(
                f"--corpus_options: {json.dumps(found)} for {name}, but expected options in JSON, "
                'like {"OPTION": VALUE}, or {"CORPUS": {"OPTION": VALUE}}'
            )
    labels = {"labels": split_names(args.labels)} if args.labels else {}
    return {name: found | labels for name, found in of_each.items()}


def build_store(dataset, accelerator: Accelerator, args: CorpusArguments) -> WaveStore | LazyStore:
    """The audio as `--decode` says."""
    folder, progress = store_folder(args.cache_dir), accelerator.is_main_process
    if args.decode == "once":
        try:
            return WaveStore.build(dataset, folder, progress=progress)
        except OSError as error:
            raise OSError(
                f"the decoded audio cannot be kept in {folder} ({error}): choose another --cache_dir or --decode lazily"
            ) from error
    if args.decode != "lazily":
        raise ValueError(f"--decode is {args.decode!r}, but must be once or lazily")
    workers = args.dataloader_num_workers
    if workers is None:
        workers = max(1, (os.cpu_count() or 1) // accelerator.num_processes)
    return LazyStore.build(dataset, folder, progress=progress, workers=workers)


def store_folder(cache_dir: str | None) -> Path:
    from huggingface_hub.constants import HF_HOME

    return Path(cache_dir or Path(HF_HOME, "s2e"), "waves")


def speakers_of(dataset) -> list[str]:
    """Every utterance's speaker; SystemExit where one has none, so that nobody is learnt or left out unseen."""
    speakers = text_column(dataset, "speaker") or [""] * len(dataset)
    if "" in speakers:
        nameless = [name for name, speaker in zip(utterance_ids(dataset), speakers) if not speaker]
        raise SystemExit(
            f"{len(nameless)} of {len(dataset)} utterances have no speaker ({few(nameless)}), which is needed here: "
            "name them, or leave these utterances out"
        )
    return speakers


def rows_by_speaker(dataset, names: str | None, flag: str) -> tuple[list[int], list[int]]:
    """Row numbers of the other speakers, and of those that `names` (a,b) has; all and none where it has none."""
    if not (chosen := set(split_names(names or ""))):
        return list(range(len(dataset))), []
    speakers = speakers_of(dataset)
    if unknown := chosen - set(speakers):
        raise SystemExit(f"{flag}: no {sorted(unknown)} in the corpus, only {sorted(set(speakers))}")
    others = [row for row, speaker in enumerate(speakers) if speaker not in chosen]
    return others, [row for row, speaker in enumerate(speakers) if speaker in chosen]


def read_protocol(args: ProtocolArguments, dataset) -> Protocol:
    """The folds. Raises ValueError where the corpus has not what the protocol needs."""
    disjoint = not args.no_speaker_ids
    return make_protocol(args.protocol, dataset, corpus=args.corpus, seed=args.protocol_seed, speaker_disjoint=disjoint)


def draw(rows: Sequence[int], count: int | None, seed: int) -> list[int]:
    """So many of these rows by seed, in their order; all of them where `count` is None."""
    if count is None or count >= len(rows):
        return list(rows)
    return sorted(random.Random(seed).sample(list(rows), count))


def make_task(dataset, store: WaveStore, utterances: Sequence[int], config: Any) -> Task:
    return Task(store, list(dataset["label"]), list(utterances), S2EFrontEnd(**config.front_end))
