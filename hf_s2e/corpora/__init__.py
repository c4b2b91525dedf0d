"""Corpora as `datasets.Dataset` tables of paths, labels and speakers: one call for all, one module each.

How a corpus of your own becomes a module is in docs/corpora.md; the class names are in labels.py.
"""

import importlib

from .files import CorpusError, CorpusWarning

__all__ = ["CorpusError", "CorpusWarning", "about", "list_corpora", "load_corpus", "unite"]

_CORPORA = {  # name, which is also the module's -> the class in it
    "iemocap": "IEMOCAP",
    "cheavd": "CHEAVD",
    "voxceleb1": "VoxCeleb1",
    "voxceleb2": "VoxCeleb2",
    "emodb": "EmoDB",
    "ravdess": "RAVDESS",
    "cremad": "CREMAD",
    "speechocean762": "SpeechOcean762",
    "commonvoice": "CommonVoice",
    "dspspeech20": "DSPSpeech20",
    "folder": "Folder",
    "manifest": "Manifest",
    "hub": "Hub",
    "toy": "Toy",
}


def list_corpora() -> list[str]:
    """The names that `load_corpus` knows."""
    return list(_CORPORA)


def load_corpus(name, data_dir=None, *, cache_dir=None, strict=True, **options):
    """Index a corpus on disk; no audio is read, and the index is cached until a file changes.

    Args:
        name: one of `list_corpora`, ``"package.module:Class"``, or a `hf_s2e.corpora.base.Corpus` subclass.
        data_dir: the corpus' root folder, or the folder that holds it, or the one with the audio.
        cache_dir: where the index is kept; by default where `datasets` keeps its cache.
        strict: a copy that differs from the published corpus, or has unusable files or lines, is an error
            that names them; with False they are left out with a `CorpusWarning`.
        options: ``labels=["neutral", "angry"]`` keeps these classes, in this order; speaker corpora have
            ``num_speakers`` and ``speaker_seed``; the others are listed in docs/corpora.md.

    Returns:
        `datasets.Dataset` with ``audio`` (``{"path": ..., "bytes": None}``), ``label`` (ClassLabel),
        ``speaker`` (text, None where unknown) and what the corpus knows: gender, session, text, intensity,
        split.

    Raises:
        CorpusError: unknown name or option, another layout than expected, or (strict) a faulty copy.

    Example:
        >>> corpus = load_corpus("toy", data_dir="corpora", cache_dir="cache", num_speakers=2)  # made on first use
        >>> len(corpus), corpus.features["label"].names
        (48, ['neutral', 'happy', 'sad', 'angry'])
        >>> corpus[0]["speaker"], corpus[0]["gender"], corpus[0]["audio"]["path"].rpartition("/")[2]
        ('spk00', 'male', 'spk00_angry_00.wav')
        >>> len(load_corpus("toy", data_dir="corpora", cache_dir="cache", num_speakers=2, labels=["sad", "happy"]))
        24
    """
    loader = _find(name) if isinstance(name, str) else name
    return loader.load(data_dir, cache_dir=cache_dir, strict=strict, **options)


def about(name):
    """What the module of a corpus says of it: a `hf_s2e.corpora.base.About`.

    None for a name that `load_corpus` does not know, and for loaders of recordings of any origin.
    """
    try:
        return getattr(_find(name), "ABOUT", None)
    except CorpusError:
        return None


def unite(corpora):
    """One corpus of speakers from several, see `hf_s2e.corpora.union.unite`."""
    from .union import unite as unite_speakers

    return unite_speakers(corpora)


def _find(name: str):
    module, _, corpus = name.partition(":")
    if not corpus:
        if name not in _CORPORA:
            raise CorpusError(f"no corpus {name!r}; known are {', '.join(_CORPORA)}, or package.module:Class")
        module, corpus = f"{__name__}.{name}", _CORPORA[name]
    try:
        return getattr(importlib.import_module(module), corpus)
    except (ImportError, AttributeError) as error:
        raise CorpusError(f"cannot load corpus {name!r}: {error}") from error
