"""The examples in docstrings run, offline, and print what they show; every public class and main function has one."""

import doctest
import importlib
from pathlib import Path

import numpy as np
import pytest
import torch

import hf_s2e
from hf_s2e.audio import load_audio, read_blocks
from hf_s2e.corpora import load_corpus
from hf_s2e.evaluation.evaluate_metric import SpeechEmotionMetric
from hf_s2e.evaluation.metrics import paired_test, scores
from hf_s2e.evaluation.protocols import make_protocol
from hf_s2e.serving import AdapterCache

PACKAGE = Path(hf_s2e.__file__).parent
MODULES = [
    ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for file in sorted(PACKAGE.rglob("*.py"))
    if ">>> " in file.read_text(encoding="utf-8")
]
PUBLIC = {name: getattr(hf_s2e, name) for name in hf_s2e.__all__}
GIVEN = PUBLIC | {"np": np, "torch": torch}  # code that travels with a repo cannot import the package, nor its examples
CLASSES = [value for value in PUBLIC.values() if not issubclass(value, Exception)]
FUNCTIONS = [load_audio, read_blocks, load_corpus, make_protocol, scores, paired_test]


@pytest.mark.parametrize("name", MODULES)
def test_examples_print_what_they_show(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write files
    (tmp_path / "hub_cards").symlink_to(PACKAGE.parent / "hub_cards")
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    found = doctest.testmod(importlib.import_module(name), extraglobs=GIVEN, optionflags=flags)
    assert found.attempted and not found.failed


@pytest.mark.parametrize(
    "documented", [*CLASSES, AdapterCache, SpeechEmotionMetric, *FUNCTIONS], ids=lambda value: value.__name__
)
def test_every_public_name_has_an_example(documented):
    assert doctest.DocTestParser().get_examples(documented.__doc__)
