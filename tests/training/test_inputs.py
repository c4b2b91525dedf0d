"""What a training reads: corpora, their options, and the rows that train and are tested."""

import json

import datasets
import pytest
from accelerate.state import PartialState
from training_tools import TOY, fresh_accelerator, script

from hf_s2e.training import inputs
from hf_s2e.training.arguments import CorpusArguments
from hf_s2e.training.inputs import decode, load_corpora, read_corpus, rows_by_speaker

pytestmark = pytest.mark.usefixtures("one_thread")


def test_labels_apply_whatever_the_corpus_options_are(work):
    for options in (TOY, {"toy": TOY}):
        args = CorpusArguments("toy", str(work.folder), "happy,sad", json.dumps(options), str(work.folder / "cache"))
        dataset, _ = read_corpus(fresh_accelerator(), args)
        assert dataset.features["label"].names == ["happy", "sad"] and len(dataset) == 12


@pytest.mark.parametrize("options", ["[]", "3", '"x"', "null", '{"toy": ["neutral"]}'])
def test_corpus_options_that_are_none_end_in_one_sentence(work, options):
    args = CorpusArguments("toy", str(work.folder), "happy,sad", options)
    with pytest.raises(SystemExit, match=r"--corpus_options: .* for toy, but expected options in JSON"):
        read_corpus(fresh_accelerator(), args)


def test_one_folder_may_have_a_comma_and_decoding_no_workers(work, tmp_path):
    args = CorpusArguments(corpus="toy", data_dir=str(tmp_path / "Emo, Berlin"), cache_dir=str(tmp_path / "cache"))
    args.corpus_options, args.decode, args.dataloader_num_workers = json.dumps(TOY), "lazily", 0
    corpus, store = read_corpus(fresh_accelerator(), args)
    assert len(corpus) == 24 and store.workers == 0


@pytest.mark.parametrize("machine, decodes", [(0, True), (1, True), (1, False)])
def test_one_process_of_each_machine_reads_the_corpus_first(work, tmp_path, monkeypatch, machine, decodes):
    accelerator, order = fresh_accelerator(), []
    monkeypatch.setitem(PartialState._shared_state, "num_processes", 4)
    monkeypatch.setitem(PartialState._shared_state, "process_index", 2 * machine + (not decodes))
    monkeypatch.setitem(PartialState._shared_state, "local_process_index", int(not decodes))
    monkeypatch.setattr(PartialState, "wait_for_everyone", lambda self: order.append("waited"))
    monkeypatch.setattr(inputs, "build_store", lambda *args: order.append("read"))
    args = CorpusArguments("toy", str(work.folder), None, json.dumps(TOY), str(work.folder / "cache"))
    decode(load_corpora(accelerator, args), accelerator, args)
    assert order == 2 * ["waited"] + ["read"] if not decodes else ["waited", "read", "waited"]


def test_nobody_is_left_out_where_somebody_is_unknown():
    rows = {"audio": [f"{name}.wav" for name in "abcd"], "speaker": ["a", " b ", None, "b"]}
    corpus = datasets.Dataset.from_dict(rows)
    assert rows_by_speaker(corpus, None, "--flag") == ([0, 1, 2, 3], [])
    with pytest.raises(SystemExit, match=r"1 of 4 utterances have no speaker \(c\)"):
        rows_by_speaker(corpus, "b", "--flag")
    known = corpus.select([0, 1, 3])
    assert rows_by_speaker(known, "b", "--flag") == ([0], [1, 2])
    with pytest.raises(SystemExit, match=r"--flag: no \['z'\]"):
        rows_by_speaker(known, "z,a", "--flag")


def test_a_class_without_training_utterances_is_refused(work, tmp_path):
    with pytest.raises(SystemExit, match="is left to train on: leave these classes out"):
        script("adapt").main(
            work.flags(output_dir=tmp_path / "out", model_name_or_path=work.adapter, max_train_samples=2)
        )
    assert not (tmp_path / "out").exists()
