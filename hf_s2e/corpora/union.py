"""Several speaker corpora as one, for pretraining on more speakers than any of them has."""

import datasets

from .files import CorpusError


def unite(corpora: dict[str, datasets.Dataset]) -> datasets.Dataset:
    """One dataset over all speakers, those of different corpora kept apart as ``corpus/speaker``.

    Args:
        corpora: name -> dataset from `hf_s2e.corpora.load_corpus`; the label of each is disregarded.

    Returns:
        Columns ``audio``, ``label`` (ClassLabel of ``corpus/speaker``), ``speaker`` (the same as text) and
        ``corpus``, in the order given.

    Raises:
        CorpusError: nothing to unite, a name with a slash, or a recording without a speaker.
    """
    names = []
    for corpus, dataset in corpora.items():
        speakers = dataset.unique("speaker")
        if "/" in corpus or None in speakers or "" in speakers:
            why = "its name has a slash" if "/" in corpus else "it has recordings without a speaker"
            raise CorpusError(f"cannot unite {corpus!r} with others: {why}")
        names += [f"{corpus}/{speaker}" for speaker in sorted(speakers)]
    if not names:
        raise CorpusError("unite needs at least one corpus with speakers: unite({'name': dataset, ...})")
    text = datasets.Value("string")
    features = datasets.Features(
        {"audio": datasets.Audio(decode=False), "label": datasets.ClassLabel(names=names)}
        | {"speaker": text, "corpus": text}
    )
    parts = [_renamed(corpus, dataset, features) for corpus, dataset in corpora.items()]
    return datasets.concatenate_datasets(parts)


def _renamed(corpus: str, dataset: datasets.Dataset, features: datasets.Features) -> datasets.Dataset:
    label = features["label"]

    def rename(batch):
        speakers = [f"{corpus}/{speaker}" for speaker in batch["speaker"]]
        return {"label": label.str2int(speakers), "speaker": speakers, "corpus": [corpus] * len(speakers)}

    kept = dataset.select_columns(["audio", "speaker"])
    return kept.map(rename, batched=True, features=features, desc=f"Uniting {corpus}")
