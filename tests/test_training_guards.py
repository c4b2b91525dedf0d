"""What must not go unnoticed: another run's checkpoints, weights that are not finite, results half written."""

import json
import subprocess
from dataclasses import fields, replace
from pathlib import Path

import datasets
import pytest
import torch
from accelerate.state import PartialState
from safetensors import SafetensorError
from training_tools import TOY, Workbench, forget_accelerator, fresh_accelerator, same_tensors, save_base, script

import hf_s2e
from hf_s2e import S2EForAudioClassification
from hf_s2e.model import adapter_files_s2e as files
from hf_s2e.training import inputs, runtime, wave_store
from hf_s2e.training.arguments import CorpusArguments, RepoArguments, parse_arguments
from hf_s2e.training.checkpoints import TrainingError, finished_checkpoints
from hf_s2e.training.inputs import decode, load_corpora, read_corpus, rows_by_speaker
from hf_s2e.training.loop import train
from hf_s2e.training.output import write_model
from hf_s2e.training.recipe import Recipe
from hf_s2e.training.wave_store import WaveStore

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return Workbench(tmp_path_factory.mktemp("guards"))


def recipe(epochs=1, **options) -> Recipe:
    return Recipe(num_train_epochs=epochs, per_device_train_batch_size=5, **options)


def names(folder) -> list[str]:
    return [path.name for path in finished_checkpoints(folder)]


def content(folder) -> dict:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ---- resumption


def test_a_fresh_run_leaves_an_earlier_runs_checkpoints_alone(work, tmp_path):
    every = {"checkpoint_dir": tmp_path, "checkpointing_steps": 2}
    work.train(recipe=recipe(), max_train_steps=6, **every)
    before = content(tmp_path)
    with pytest.raises(TrainingError, match=r"earlier run, the newest step_0000006.*latest.*--output_dir.*delete"):
        work.train(recipe=recipe(), max_train_steps=2, **every)
    elsewhere = tmp_path.with_name("elsewhere")
    work.train(recipe=recipe(), max_train_steps=2, checkpoint_dir=elsewhere, checkpointing_steps=2)
    with pytest.raises(TrainingError, match="earlier run"):  # the resumed run is not the one whose folder this is
        work.train(recipe=recipe(), resume_from=finished_checkpoints(elsewhere)[-1], **every)
    work.train(recipe=recipe(), max_train_steps=2, checkpoint_dir=tmp_path)  # it writes none
    assert content(tmp_path) == before


def test_resumed_from_an_earlier_checkpoint_the_newly_written_one_stays(work, tmp_path):
    every = {"recipe": recipe(2), "checkpoint_dir": tmp_path}
    work.train(max_train_steps=12, checkpointing_steps=6, **every)
    work.train(max_train_steps=10, checkpointing_steps=2, resume_from=finished_checkpoints(tmp_path)[0], **every)
    assert names(tmp_path) == ["step_0000008", "step_0000010", "step_0000012"]


def test_the_last_good_checkpoint_is_this_runs(work, tmp_path):
    work.train(recipe=recipe(), max_train_steps=4, checkpoint_dir=tmp_path, checkpointing_steps=2)
    with pytest.raises(TrainingError, match="There is no checkpoint yet"):
        work.train(recipe=recipe(learning_rate=1e38), checkpoint_dir=tmp_path)


@pytest.mark.parametrize(
    "differing", ["start weights", "utterances", "labels", "gradient_accumulation_steps", "mixed_precision"]
)
def test_a_resumption_must_be_of_the_same_run(work, tmp_path, differing):
    def run(other=False, **options):
        of = other and differing
        model = work.model("fine_tune")
        task, wanted = work.task(model, range(20)), {}
        if of == "start weights":
            with torch.no_grad():
                model.s2e.shared.stem.weight += 1e-3
        elif of == "utterances":
            task = replace(task, utterances=range(4, 24))
        elif of == "labels":
            task = replace(task, labels=[(label + 1) % 4 for label in task.labels])
        elif of:
            wanted = {of: {"gradient_accumulation_steps": 2, "mixed_precision": "bf16"}[of]}
        train(fresh_accelerator(**wanted), model, task, recipe(), **options)

    run(max_train_steps=2, checkpoint_dir=tmp_path, checkpointing_steps=2)
    with pytest.raises(TrainingError, match=rf"other settings \(.*{differing} \S+, not \S+"):
        run(other=True, resume_from=finished_checkpoints(tmp_path)[-1])


def test_the_script_refuses_a_used_folder_before_it_trains(work, tmp_path):
    """A finished repo may be written over; its run's checkpoints may not, nor another base's be gone on from."""
    adapt, other = script("adapt"), tmp_path / "other"
    save_base(other, seed=1, adapters=False)
    flags = {"method": "fine_tune", "output_dir": tmp_path / "out", "num_train_epochs": 1}
    flags |= {"per_device_train_batch_size": 5, "max_train_steps": 2, "model_name_or_path": work.plain}

    def run(**changed):
        forget_accelerator()
        adapt.main(work.flags(**(flags | changed)))

    run(checkpointing_steps=2)
    before, record = content(tmp_path / "out" / "run" / "checkpoints"), content(tmp_path / "out" / "run")
    with pytest.raises(SystemExit, match=r"out.run.checkpoints holds checkpoints of an earlier run"):
        run(checkpointing_steps=2, model_name_or_path=other)
    with pytest.raises(SystemExit, match=r"start weights \w+, not \w+"):
        run(resume_from_checkpoint="latest", model_name_or_path=other)
    assert content(tmp_path / "out" / "run") == record  # still of the model beside it
    run(model_name_or_path=other)
    assert content(tmp_path / "out" / "run" / "checkpoints") == before


# ---- what is learned


@pytest.mark.parametrize("buffer", [False, True], ids=["weights", "batch norm statistics"])
def test_a_last_step_that_spoils_the_network_is_noticed_without_checkpoints(work, buffer):
    model, options = work.model(), {"recipe": recipe(learning_rate=1e38, weight_decay=1e3), "max_train_steps": 1}
    if buffer:

        def spoil(row):
            model.s2e.domains["toy"].stem.bn.running_var.fill_(torch.inf)

        options = {"recipe": recipe(), "max_train_steps": 1, "on_epoch": spoil}
    named = "running_var" if buffer else r"\S+"
    with pytest.raises(TrainingError, match=rf"not finite by step 1 \(\S*{named}; .*lower the learning rate"):
        work.train(model=model, **options)


def test_alone_or_not_the_last_batches_of_an_epoch_are_learned_from(work):
    """38 segments are 7 batches, so that the last accumulates alone."""
    trained = []
    for alone in (False, True):
        model = work.model()
        accelerator = fresh_accelerator(gradient_accumulation_steps=4)
        train(accelerator, model, work.task(model), recipe(), seed=1, alone=alone)
        trained.append(model)
    assert same_tensors(*trained)


# ---- recipes


@pytest.mark.parametrize(
    "setting, said",
    [
        ("lr_drop_epochs: 11", "lr_drop_epochs is 11, but must be a list of epochs, whole numbers from 1"),
        ("lr_drop_epochs: [eleven]", "lr_drop_epochs is ['eleven'], but must be a list"),
        ("lr_drop_epochs: [0]", "lr_drop_epochs is [0], but must be a list"),
        ("num_train_epochs: 2.5", "num_train_epochs is 2.5, but must be a whole number, 1 or more"),
        ("num_train_epochs: 0", "num_train_epochs is 0, but must be a whole number, 1 or more"),
        ("num_train_epochs: true", "num_train_epochs is True, but must be a whole number"),
        ("learning_rate: null", "learning_rate is None, but must be a number, 0 or more"),
        ("learning_rate: [0.1]", "learning_rate is [0.1], but must be a number"),
        ("learning_rate: -0.1", "learning_rate is -0.1, but must be a number, 0 or more"),
        ("learning_rate: .nan", "learning_rate is nan, but must be a number"),
        ("alpha_learning_rate: [0.1]", "alpha_learning_rate is [0.1], but must be a number, 0 or more"),
        ("momentum: 1", "momentum is 1, but must be a number, between 0 and 1"),
        ("mixup: -2.0", "mixup is -2.0, but must be a number, 0 or more"),
        ("speed_perturbation: 1.0", "speed_perturbation is 1.0, but must be"),
        ("balance_classes: 3", "balance_classes is 3, but must be true or false"),
        ("noise_snr: [5]", "noise_snr is [5], but must be a number, of any size"),
        ("pooling: max", "pooling is 'max', but must be one of ('mean', 'mean_std')"),
        ("adapter_init: 3", "adapter_init is 3, but must be a name"),
        ("3: 4", "unknown settings ['3']"),
    ],
)
def test_a_setting_that_cannot_be_meant_is_named_in_one_line(tmp_path, capsys, setting, said):
    (tmp_path / "mine.yaml").write_text(setting)
    with pytest.raises(SystemExit) as stopped:
        parse_arguments(RepoArguments, {}, ["--recipe", str(tmp_path / "mine.yaml")])
    errors = capsys.readouterr().err
    assert stopped.value.code == 2 and said in errors and len(errors.splitlines()) == 1


@pytest.mark.parametrize("flags", [["--mixup", "-2"], ["--learning_rate", "-1"], ["--num_train_epochs", "0"]])
def test_so_is_one_of_the_command_line(capsys, flags):
    with pytest.raises(SystemExit):
        parse_arguments(RepoArguments, {}, flags)
    errors = capsys.readouterr().err
    assert f"error: {flags[0][2:]} is {float(flags[1]):g}" in errors.replace(".0,", ",") and "usage" not in errors


def test_settings_that_are_left_out_or_whole_numbers_are_fine():
    settings = {"bn_weight_decay": None, "learning_rate": 1, "lr_drop_epochs": [], "noise_snr": -5}
    assert Recipe(**settings).learning_rate == 1
    parse_arguments(RepoArguments, {}, [])  # after which the fields' types are others
    assert Recipe(**settings) == Recipe(**settings, alpha_learning_rate=None)


# ---- corpora


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


def test_a_store_that_another_machine_has_finished_meanwhile_is_taken(work, tmp_path, monkeypatch):
    decode_all = wave_store._decode_all

    def decode_while_another_is_faster(*args):
        with monkeypatch.context() as other:
            other.setattr(wave_store, "_decode_all", decode_all)
            WaveStore.build(work.corpus, tmp_path, progress=False)
        return decode_all(*args)

    monkeypatch.setattr(wave_store, "_decode_all", decode_while_another_is_faster)
    store = WaveStore.build(work.corpus, tmp_path, progress=False)
    assert torch.equal(store.lengths, work.store.lengths) and len(list(tmp_path.iterdir())) == 1


def test_a_store_that_cannot_be_put_into_place_is_an_error(work, tmp_path):
    (folder,) = WaveStore.build(work.corpus, tmp_path, progress=False) and tmp_path.iterdir()
    (folder / "index.json").unlink()
    with pytest.raises(OSError, match=folder.name):
        WaveStore.build(work.corpus, tmp_path, progress=False)


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


# ---- results


@pytest.mark.parametrize("method", ["fine_tune", "residual_adapter"])
@pytest.mark.parametrize("error", [SafetensorError("No space left on device"), OSError(28, "No space left on device")])
def test_a_full_disk_at_the_end_leaves_the_old_repo_and_says_so(work, tmp_path, monkeypatch, method, error):
    adapt, base = script("adapt"), work.base(method)
    flags = {"method": method, "model_name_or_path": base, "output_dir": tmp_path, "max_train_steps": 1}
    adapt.main(work.flags(**flags))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.suffix == ".safetensors"}
    module = "transformers.modeling_utils.safe_save_file" if method == "fine_tune" else f"{files.__name__}.save_file"

    def fail(tensors, path, **options):
        Path(path).write_bytes(b"half")
        raise error

    monkeypatch.setattr(module, fail)
    forget_accelerator()
    with pytest.raises(SystemExit, match=r"trained, but .* is not whole: .*No space left"):
        adapt.main(work.flags(**flags, seed=1))
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.safetensors")} == before
    assert not list(tmp_path.rglob("*.part"))


def test_a_full_model_that_is_written_over_is_the_new_one(work, tmp_path):
    for seed in (0, 1):
        model = work.model("fine_tune", seed=seed)
        write_model(model, tmp_path, adapter=False)
    assert same_tensors(S2EForAudioClassification.from_pretrained(tmp_path), model)
    assert (tmp_path / "preprocessor_config.json").is_file() and not list(tmp_path.rglob("*.part"))


# ---- evaluation


@pytest.mark.parametrize(
    "tested, of_adapter, of_base, unseen",
    [
        ("ravdess", "emodb", "speechocean762", True),
        ("ravdess,cremad", "emodb", "speechocean762", True),
        ("emodb", "emodb", "speechocean762", False),
        ("ravdess, emodb", "emodb", "speechocean762", False),
        ("speechocean762", "emodb", "speechocean762", False),
        ("folder", "emodb", "speechocean762", None),  # anybody's recordings
        ("my.package:Corpus", "emodb", "speechocean762", None),
        ("ravdess", "hub", "speechocean762", None),
        ("ravdess", "emodb", "folder", None),
        ("ravdess", "emodb", None, None),
        ("ravdess", None, "speechocean762", None),
    ],
)
def test_speakers_are_unseen_only_where_that_can_be_known(work, tmp_path, tested, of_adapter, of_base, unseen):
    def says(folder, corpus, method):
        if corpus:
            (folder / "training.json").write_text(json.dumps({"corpora": [{"name": corpus}], "method": method}))

    evaluate, base, adapter = script("evaluate"), tmp_path / "base", tmp_path / "adapter"
    save_base(base)
    model = S2EForAudioClassification.from_pretrained(base)
    model.add_adapter("toy", work.labels)
    model.save_adapter(adapter, "toy")
    says(base, of_base, "speaker classification")
    says(adapter, of_adapter, "residual_adapter")
    args = evaluate.Arguments(corpus=tested, model_name_or_path=str(adapter))
    assert evaluate.speakers_unseen(args) is unseen


def test_a_fine_tuned_model_does_not_say_what_its_base_was_trained_on(tmp_path):
    evaluate = script("evaluate")
    for method, unseen in {"fine_tune": None, "plain": True, "speaker classification": True}.items():
        facts = {"corpora": [{"name": "emodb"}], "method": method}
        (tmp_path / "training.json").write_text(json.dumps(facts))
        args = evaluate.Arguments(corpus="ravdess", model_name_or_path=str(tmp_path))
        assert evaluate.speakers_unseen(args) is unseen
        args.corpus = "emodb"
        assert evaluate.speakers_unseen(args) is False


# ---- what a result says about itself


def test_the_environment_says_which_code_ran(tmp_path, monkeypatch):
    def git(*command):
        setup = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(tmp_path), *setup, *command], check=True, capture_output=True)

    def said():
        found = runtime.environment(fresh_accelerator())
        assert found["hf_s2e"] == hf_s2e.__version__
        return found["git_revision"], found["git_changed"]

    package = tmp_path / "hf_s2e" / "training"
    package.mkdir(parents=True)
    (package / "runtime.py").write_text("one")
    (tmp_path / "notes.md").write_text("another's repository")
    monkeypatch.setattr(runtime, "__file__", str(package / "runtime.py"))
    assert said() == (None, None)
    git("init", "-q")
    git("add", "notes.md")
    git("commit", "-q", "-m", "another's")
    assert said() == (None, None)  # installed there, but no part of it
    git("add", "hf_s2e")
    git("commit", "-q", "-m", "ours")
    revision, changed = said()
    assert len(revision) == 40 and changed is False
    (package / "runtime.py").write_text("two")
    assert said() == (revision, True)


@pytest.mark.parametrize("name", ["adapt", "pretrain", "evaluate"])
def test_help_says_what_is_unverified_and_what_is_without_effect(name):
    module = script(name)
    assert "NCCL" in module.__doc__ and "unverified" in module.__doc__
    helps = {setting.name: setting.metadata.get("help", "") for setting in fields(module.Arguments)}
    assert "Without effect with --decode once" in helps["dataloader_num_workers"]


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


def test_what_was_recognised_has_a_hash_where_some_speakers_are_unknown(work):
    module = script("evaluate")
    speakers = [None, *list(work.corpus["speaker"])[1:]]
    corpus = work.corpus.remove_columns("speaker").add_column("speaker", speakers)
    assert (
        module.hash_of(corpus) == module.hash_of(work.corpus.remove_columns("speaker")) != module.hash_of(work.corpus)
    )


def test_no_equal_error_rate_where_nobody_is_heard_twice(work):
    module, model = script("pretrain"), work.model()
    speakers = list(work.corpus["speaker"])
    once = [speakers.index(name) for name in sorted(set(speakers))]
    split = module.Split(["a"], list(range(24)), [], once)
    assert "equal_error_rate" not in module.report(model, work.corpus, work.store, split, [0] * 24, torch.device("cpu"))
    split.unseen.append(once[0] + 1)
    found = module.report(model, work.corpus, work.store, split, [0] * 24, torch.device("cpu"))
    assert 0 <= found["equal_error_rate"] <= 1


def test_one_folder_may_have_a_comma_and_decoding_no_workers(work, tmp_path):
    args = CorpusArguments(corpus="toy", data_dir=str(tmp_path / "Emo, Berlin"), cache_dir=str(tmp_path / "cache"))
    args.corpus_options, args.decode, args.dataloader_num_workers = json.dumps(TOY), "lazily", 0
    corpus, store = read_corpus(fresh_accelerator(), args)
    assert len(corpus) == 24 and store.workers == 0


# ---- what is checked before the corpus is read, and before it is decoded


@pytest.mark.parametrize(
    "change, said",
    [
        ({"method": "adaptor"}, "method is 'adaptor', but must be one of"),
        ({"model_name_or_path": None}, "give --model_name_or_path"),
        ({"output_dir": "a file"}, "cannot be written to"),
    ],
)
def test_what_can_be_known_is_refused_before_the_corpus_is_read(work, tmp_path, monkeypatch, change, said):
    adapt = script("adapt")
    monkeypatch.setattr(adapt, "load_corpora", lambda *args: pytest.fail("the corpus was read"))
    (tmp_path / "a file").write_text("here already")
    flags = {"method": "fine_tune", "model_name_or_path": work.plain, "output_dir": "out"} | change
    flags["output_dir"] = tmp_path / flags["output_dir"]
    with pytest.raises(SystemExit, match=said):
        adapt.main(work.flags(**{name: value for name, value in flags.items() if value is not None}))


@pytest.mark.parametrize(
    "change, said",
    [
        ({"model_name_or_path": "nobody/nothing"}, "nobody/nothing"),
        ({"eval_speakers": "nobody"}, "no .'nobody'. in the corpus"),
        ({"labels": "angry,sad,envious"}, "envious"),
        ({"max_train_samples": 1}, "is left to train on"),
    ],
)
def test_what_the_index_tells_is_refused_before_audio_is_decoded(work, tmp_path, monkeypatch, change, said):
    adapt = script("adapt")
    monkeypatch.setattr(adapt, "decode", lambda *args: pytest.fail("audio was decoded"))
    flags = {"method": "fine_tune", "model_name_or_path": work.plain, "output_dir": tmp_path / "out"} | change
    with pytest.raises(SystemExit, match=said):
        adapt.main(work.flags(**flags))
