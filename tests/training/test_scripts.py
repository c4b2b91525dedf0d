"""The scripts in training/ as a user runs them: in this process, and through accelerate's and torch's launchers."""

import functools
import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from conftest import ROOT
from local_hub import head
from safetensors.torch import load_file
from tiny import tiny_config
from training_tools import (
    AUGMENTED,
    CPU,
    FRONT_END,
    LAUNCH,
    SCRIPTS,
    TINY_RUN,
    fresh_accelerator,
    read,
    run,
    save_base,
    script,
    train_parts,
    without_speed,
)

from hf_s2e import S2EForAudioClassification
from hf_s2e.training.checkpoints import finished_checkpoints
from hf_s2e.training.methods import METHODS

pytestmark = pytest.mark.usefixtures("one_thread")
SPEAKERS = {"min_seconds": 1, "held_out_utterances": 0.2, "held_out_speakers": 0, "max_train_steps": 1}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def adapt(work, output_dir, method="residual_adapter", **flags):
    flags = {"model_name_or_path": work.base(method), **TINY_RUN, **flags}
    script("adapt").main(work.flags(method=method, output_dir=output_dir, **flags))
    return output_dir


def evaluate(work, output_dir, **flags):
    script("evaluate").main(work.flags(output_dir=output_dir, **flags))
    return read(output_dir / "evaluation.json"), pd.read_parquet(output_dir / "predictions.parquet")


@pytest.fixture
def pretrain(monkeypatch):
    """The script with a tiny network."""
    module = script("pretrain")
    monkeypatch.setattr(module, "S2EConfig", functools.partial(tiny_config, **FRONT_END))
    return module


def same_files(a, b) -> bool:
    """Whether two adapter repos hold the same tensors."""
    a, b = load_file(a / "adapter.safetensors"), load_file(b / "adapter.safetensors")
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- adapt


@pytest.mark.parametrize("method", ["residual_adapter", "fine_tune"])
def test_adapt_writes_a_repo_and_what_led_to_it(work, tmp_path, capsys, method):
    out = adapt(work, tmp_path / "s2e-toy", method, eval_speakers="spk02", hub_token="hf_secret")
    weights = "adapter.safetensors" if METHODS[method].makes_adapter else "model.safetensors"
    assert load_file(out / weights)
    card, facts = (out / "README.md").read_text(), read(out / "training.json")
    assert facts["corpora"][0] | {"hours": 0} == {"name": "toy", "speakers": 2, "utterances": 16, "hours": 0}
    assert facts["method"] == method and "2 speakers, 16 utterances" in card and "Nesterov" in card
    assert "spk02" in facts["note"] and facts["note"] in capsys.readouterr().out

    run_folder = out / "run"
    history, evaluation = read(run_folder / "history.json"), read(run_folder / "evaluation.json")
    environment, arguments = read(run_folder / "environment.json"), read(run_folder / "arguments.json")
    assert [row["epoch"] for row in history] == [1, 2]
    table = pd.read_parquet(run_folder / "predictions.parquet")
    assert set(table["speaker"]) == {"spk02"} and len(table) == 8
    assert evaluation["scores"]["wa"] == (table["label"] == table["prediction"]).mean()
    base = S2EForAudioClassification.from_pretrained(work.base(method))
    assert environment["base_fingerprint"] == base.base_fingerprint
    assert environment["processes"] == 1 and environment["torch"] == torch.__version__
    assert arguments["arguments"]["method"] == method and arguments["recipe"]["num_train_epochs"] == 2
    for file in out.rglob("*"):
        assert not file.is_file() or b"hf_secret" not in file.read_bytes(), file


def test_a_drawn_sample_has_all_speakers_and_depends_on_the_seed(work, tmp_path):
    outs = [adapt(work, tmp_path / str(i), max_train_samples=9, seed=seed) for i, seed in enumerate((0, 0, 1))]
    used = [read(out / "training.json")["corpora"][0] for out in outs]
    assert [entry["utterances"] for entry in used] == [9, 9, 9]
    assert used[0]["speakers"] == 3
    assert same_files(outs[0], outs[1]) and not same_files(outs[0], outs[2])


@pytest.mark.parametrize(
    "flags, said",
    [
        ({"method": "residual_adapter_source", "model_name_or_path": "plain"}, "pretrain.py --adapters"),
        ({"method": "adapter_only", "adapter_init": "zero"}, "no gradient"),
        ({"method": "alchemy"}, "must be one of plain"),
        ({"model_name_or_path": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"eval_speakers": "nobody"}, "nobody"),
        ({"corpus_options": "{"}, "--corpus_options"),
        ({"corpus_options": '{"colour": 1}'}, "colour"),
        ({"resume_from_checkpoint": "latest"}, "no whole checkpoint"),
        ({"report_to": "paper", "with_tracking": True}, "tensorboard"),
        ({"per_device_train_batch_size": 40, "learning_rate": 1e38}, "training stopped: The loss is nan"),
    ],
)
def test_what_cannot_work_ends_in_one_message(work, tmp_path, flags, said):
    if "model_name_or_path" in flags and not flags["model_name_or_path"].startswith("/"):
        flags = flags | {"model_name_or_path": getattr(work, flags["model_name_or_path"])}
    flags = {"model_name_or_path": work.adapter, **TINY_RUN, **flags}
    with pytest.raises(SystemExit, match=re.escape(said)):
        script("adapt").main(work.flags(output_dir=tmp_path / "out", **flags))
    assert not list(tmp_path.rglob("*.safetensors"))


def test_scores_do_not_outlive_the_model_that_they_are_of(work, tmp_path):
    for speakers, kept in (("spk02", True), (None, False)):
        adapt(work, tmp_path, max_train_steps=1, **({"eval_speakers": speakers} if speakers else {}))
        found = {file.name for file in (tmp_path / "run").iterdir()}
        assert {"arguments.json", "environment.json", "history.json"} <= found
        assert ({"evaluation.json", "predictions.parquet"} <= found) == kept


def test_another_kind_of_repo_is_not_overwritten(work, tmp_path):
    adapt(work, tmp_path, "fine_tune", max_train_steps=1)
    with pytest.raises(SystemExit, match=r"holds model\.safetensors"):
        adapt(work, tmp_path, "residual_adapter", max_train_steps=1)
    assert not (tmp_path / "adapter.safetensors").exists()


def test_an_unreadable_recording_is_named(work, tmp_path):
    for speaker in ("a", "b"):
        for label in ("calm", "cross"):
            (tmp_path / "own" / label).mkdir(parents=True, exist_ok=True)
            wave = np.random.default_rng(0).normal(scale=0.1, size=16_000)
            soundfile.write(tmp_path / "own" / label / f"{speaker}.wav", wave, 16_000)
    bad = tmp_path / "own" / "calm" / "b.wav"
    bad.write_bytes(bad.read_bytes()[:30])
    flags = {
        "corpus": "folder",
        "data_dir": tmp_path / "own",
        "corpus_options": "{}",
        "cache_dir": tmp_path / "c",
    }
    with pytest.raises(SystemExit, match=r"calm.b\.wav"):
        adapt(work, tmp_path / "out", **flags)


@pytest.mark.slow
@pytest.mark.parametrize("augmentation", [{}, AUGMENTED], ids=["as in the paper", "augmented"])
def test_killed_in_the_middle_of_an_epoch_and_resumed(work, tmp_path, augmentation):
    """SIGKILL at no chosen moment; resumed, the run ends as the uninterrupted one."""
    flags = {"method": "residual_adapter", "model_name_or_path": work.adapter, "checkpointing_steps": 3}
    flags |= {"per_device_train_batch_size": 5, "num_train_epochs": 40, "lr_scheduler_type": "cosine"}
    flags |= {key: value for key, value in augmentation.items()}
    killed = tmp_path / "killed"
    command = [sys.executable, str(SCRIPTS / "adapt.py"), *work.flags(output_dir=killed, **flags)]
    process = subprocess.Popen(command, env=CPU, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not finished_checkpoints(killed / "run" / "checkpoints") and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read().decode()[-2000:]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    # the newest that ended in the middle of an epoch of 7 steps: of two neighbours one did
    checkpoints = finished_checkpoints(killed / "run" / "checkpoints")
    assert checkpoints and not (killed / "adapter.safetensors").exists()
    chosen = next(c for c in reversed(checkpoints) if read(c / "progress.json")["step"] % 7)
    assert read(chosen / "progress.json")["step"] < 40 * 7
    script("adapt").main(work.flags(output_dir=killed, resume_from_checkpoint=chosen, **flags))
    script("adapt").main(work.flags(output_dir=tmp_path / "whole", **flags))
    histories = [read(out / "run" / "history.json") for out in (killed, tmp_path / "whole")]
    assert without_speed(histories[0]) == without_speed(histories[1]) and len(histories[0]) == 40
    assert same_files(killed, tmp_path / "whole")


# ---- trackers, Hub


@pytest.mark.parametrize("name", ["adapt", "pretrain"])
def test_tensorboard_gets_the_losses_and_no_token(work, pretrain, tmp_path, name):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = {"with_tracking": True, "hub_token": "hf_secret", **TINY_RUN}
    if name == "adapt":
        adapt(work, tmp_path, **flags)
    else:
        flags |= SPEAKERS | {"max_train_steps": 4, "per_device_train_batch_size": 2}
        pretrain.main(work.flags(output_dir=tmp_path, **flags))
    events = EventAccumulator(str(tmp_path / "run" / "s2e")).Reload()
    logged = [event.value for event in events.Scalars("loss")]
    assert logged == pytest.approx([row["loss"] for row in read(tmp_path / "run" / "history.json")])
    for file in (tmp_path / "run").rglob("*"):
        assert not file.is_file() or b"hf_secret" not in file.read_bytes(), file


@pytest.mark.slow
def test_trackio_gets_the_losses(work, tmp_path):
    pytest.importorskip("trackio", reason="trackio is not installed (pip install 'hf-s2e[tracking]')")
    flags = {"model_name_or_path": work.adapter, "with_tracking": True, "report_to": "trackio", **TINY_RUN}
    command = [sys.executable, str(SCRIPTS / "adapt.py"), *work.flags(output_dir=tmp_path / "out", **flags)]
    run(command, env={"TRACKIO_DIR": str(tmp_path / "trackio")})
    assert list((tmp_path / "trackio").rglob("s2e*"))


def test_push_to_hub(hub, work, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    flags = {"push_to_hub": True, "hub_token": hub.token, "hub_private_repo": True}
    out = adapt(work, tmp_path / "s2e-toy", hub_model_id=f"{hub.user}/calls", checkpointing_steps=5, **flags)
    assert list(out.glob("run/checkpoints/*"))
    sent, base = head(hub, f"{hub.user}/calls"), head(hub, f"{hub.user}/adapter")
    assert not any(name.startswith("run") for name in sent)
    assert {"adapter.safetensors", "config.json", "preprocessor_config.json", "modeling_s2e.py"} <= set(sent)
    assert sent["adapter.safetensors"] == (out / "adapter.safetensors").read_bytes()
    config = json.loads(sent["config.json"])
    assert config["base_model_name_or_path"] == f"{hub.user}/adapter" and "base_local_path" not in config
    assert base["model.safetensors"] == Path(work.adapter, "model.safetensors").read_bytes()
    card = sent["README.md"].decode()
    assert f'model="{hub.user}/calls"' in card and "2 utterances" not in card and "24 utterances" in card
    everything = b"".join(sent.values()) + b"".join(base.values())
    assert hub.token.encode() not in everything and str(tmp_path).encode() not in everything

    loaded = S2EForAudioClassification.from_pretrained(f"{hub.user}/calls", token=hub.token)
    assert [loaded.config.id2label[i] for i in range(4)] == work.labels


def test_a_full_model_is_pushed_under_the_folders_name(hub, work, tmp_path):
    out = adapt(work, tmp_path / "s2e-full", "fine_tune", push_to_hub=True, max_train_steps=1)
    sent = head(hub, f"{hub.user}/s2e-full")
    assert sent["model.safetensors"] == (out / "model.safetensors").read_bytes()
    assert json.loads(sent["config.json"])["repo_id"] == f"{hub.user}/s2e-full"


def test_a_wrong_token_is_noticed_before_the_training(hub, work, tmp_path):
    with pytest.raises(SystemExit, match=r"--push_to_hub: cannot log in: .*token"):
        adapt(work, tmp_path / "out", push_to_hub=True, hub_token="hf_wrong")
    assert not (tmp_path / "out").exists()


# ---- evaluate


@pytest.fixture(scope="module")
def adapter_repo(work, tmp_path_factory):
    torch.set_num_threads(1)
    return adapt(work, tmp_path_factory.mktemp("repos") / "s2e-toy", eval_speakers="spk02")


def test_evaluate_says_what_adapt_said(work, adapter_repo, tmp_path, capsys):
    flags = {"model_name_or_path": adapter_repo, "eval_speakers": "spk02", "batch_size": 3}
    result, table = evaluate(work, tmp_path, **flags)
    before = pd.read_parquet(adapter_repo / "run" / "predictions.parquet")
    assert list(table["utterance"]) == list(before["utterance"])
    assert np.allclose(np.stack(table["posterior"]), np.stack(before["posterior"]), atol=2e-5)
    scores = result["methods"]["s2e-toy"]
    assert scores["wa_mean"] == pytest.approx(100 * (table["label"] == table["prediction"]).mean(), abs=1e-3)
    assert result["classes"] == work.labels and result["base"] == "hf-s2e/adapter"
    assert result["protocol"]["speaker_disjoint"] is False  # the repo was trained on this corpus
    assert "may have been in its training" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["full", "fused", "two domains"])
def test_evaluate_takes_any_repo(work, adapter_repo, tmp_path, kind):
    repo, flags = tmp_path / "repo", {}
    if kind == "full":
        adapt(work, repo, "fine_tune")
    else:
        model = S2EForAudioClassification.from_pretrained(adapter_repo)
        (model.fuse() if kind == "fused" else model).save_pretrained(repo)
        model.disable_adapters()
    if kind == "two domains":
        model.save_pretrained(repo)  # with the speaker domain active
        flags["adapter_name"] = "toy"
    result, table = evaluate(work, tmp_path / "out", model_name_or_path=repo, **flags)
    assert len(table) == 24 and result["utterances"] == 24 and result["speakers"] == 3
    if kind != "full":
        _, expected = evaluate(work, tmp_path / "adapter", model_name_or_path=adapter_repo)
        assert np.allclose(np.stack(table["posterior"]), np.stack(expected["posterior"]), atol=1e-4)


def own_corpus(folder, labels):
    """Two recordings of each class: the toy corpus' under other names."""
    rng = np.random.default_rng(0)
    for label in labels:
        (folder / label).mkdir(parents=True)
        for i in range(2):
            soundfile.write(folder / label / f"spk{i}.wav", rng.normal(scale=0.1, size=40_000), 16_000)
    return {"corpus": "folder", "data_dir": folder, "corpus_options": "{}"}


def test_evaluate_on_another_corpus_needs_the_label_map(work, adapter_repo, tmp_path, capsys):
    flags = own_corpus(tmp_path / "own", ["sad", "joy", "bored", "delight"])
    flags["model_name_or_path"] = adapter_repo
    with pytest.raises(SystemExit, match=r"no class bored, delight, joy.*--label_map"):
        evaluate(work, tmp_path / "out", **flags)
    label_map = {"joy": "happy", "delight": "happy", "bored": None}
    result, table = evaluate(work, tmp_path / "out", label_map=json.dumps(label_map), **flags)
    happy, sad = work.labels.index("happy"), work.labels.index("sad")
    assert sorted(table["label"]) == sorted([happy] * 4 + [sad] * 2)
    assert result["label_map"] == label_map and result["classes"] == work.labels
    assert {k for k, v in result["methods"]["s2e-toy"]["recall"].items() if v is not None} == {"happy", "sad"}
    right = [(table["prediction"] == table["label"])[table["label"] == c].mean() for c in (happy, sad)]
    assert result["methods"]["s2e-toy"]["ua_mean"] == pytest.approx(100 * np.mean(right))
    # `folder` does not say whose recordings these are
    assert result["protocol"]["speaker_disjoint"] is None
    assert "not known whether these speakers" in capsys.readouterr().out
    for wrong, said in [
        ({"rage": "angry"}, "corpus has no"),
        ({"joy": "bliss"}, "model has no"),
        ("x", "value"),
    ]:
        with pytest.raises(SystemExit, match=said):
            flags["label_map"] = wrong if isinstance(wrong, str) else json.dumps(wrong)
            evaluate(work, tmp_path / "out", **flags)


def test_a_bases_speakers_are_classes_too(work, pretrain, tmp_path):
    base = tmp_path / "base"
    flags = SPEAKERS | {"num_train_epochs": 1, "per_device_train_batch_size": 2}
    pretrain.main(work.flags(output_dir=base, **flags))
    corpus = own_corpus(tmp_path / "own", ["spk00", "spk01"])
    result, _ = evaluate(work, tmp_path / "out", **(corpus | {"model_name_or_path": base, "max_eval_samples": 3}))
    assert result["utterances"] == 3 and result["classes"] == ["spk00", "spk01", "spk02"]


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


def test_what_was_recognised_has_a_hash_where_some_speakers_are_unknown(work):
    module = script("evaluate")
    speakers = [None, *list(work.corpus["speaker"])[1:]]
    corpus = work.corpus.remove_columns("speaker").add_column("speaker", speakers)
    assert (
        module.hash_of(corpus) == module.hash_of(work.corpus.remove_columns("speaker")) != module.hash_of(work.corpus)
    )


# ---- pretrain


def test_pretrain_takes_several_corpora_and_says_what_it_learned(work, pretrain, tmp_path):
    other = work.folder / "other"
    flags = SPEAKERS | {"held_out_speakers": 2, "speaker_seed": 3, "num_speakers": 3, "repo_id": "me/base"}
    flags |= {"corpus": "toy,toy", "data_dir": f"{work.folder},{other}", "per_device_train_batch_size": 2}
    pretrain.main(work.flags(output_dir=tmp_path, **flags))
    evaluation, facts = read(tmp_path / "run" / "evaluation.json"), read(tmp_path / "training.json")
    assert evaluation["speakers"] == 3 and evaluation["unseen_speakers"] == 2
    assert 0 <= evaluation["equal_error_rate"] <= 1 and 0 <= evaluation["held_out_accuracy"] <= 1
    assert facts["evaluation"] == evaluation and facts["method"] == "speaker classification"
    assert sum(corpus["speakers"] for corpus in facts["corpora"]) == 3
    model = S2EForAudioClassification.from_pretrained(tmp_path)
    assert model.config.repo_id == "me/base" and model.config.adapters
    assert all(re.fullmatch(r"toy[01]/spk0\d", name) for name in model.config.id2label.values())
    assert "Verification of 2 unseen speakers" in (tmp_path / "README.md").read_text()


def test_too_few_speakers(work, pretrain, tmp_path):
    with pytest.raises(SystemExit, match=r"--num_speakers 9: the corpus has 3 speakers"):
        pretrain.main(work.flags(output_dir=tmp_path, **SPEAKERS, num_speakers=9))


def test_the_equal_error_rate_of_known_embeddings(pretrain, monkeypatch):
    speakers, rng = [f"s{i % 4}" for i in range(40)], np.random.default_rng(0)
    task = type("Task", (), {"utterances": range(40)})
    for spread, low, high in [(0.01, 0.0, 0.001), (100.0, 0.4, 0.6)]:
        rows = [torch.eye(4)[i % 4] + torch.tensor(rng.normal(scale=spread, size=4)) for i in range(40)]
        monkeypatch.setattr(pretrain, "run_segments", lambda *a, rows=rows, **k: [r[None].float() for r in rows])
        assert low <= pretrain.equal_error_rate(None, task, speakers, torch.device("cpu")) <= high


def test_no_equal_error_rate_where_nobody_is_heard_twice(work, pretrain):
    model = work.model()
    speakers = list(work.corpus["speaker"])
    once = [speakers.index(name) for name in sorted(set(speakers))]
    split = pretrain.Split(["a"], list(range(24)), [], once)
    rest = (model, work.corpus, work.store, split, [0] * 24, torch.device("cpu"))
    assert "equal_error_rate" not in pretrain.report(*rest)
    split.unseen.append(once[0] + 1)
    assert 0 <= pretrain.report(*rest)["equal_error_rate"] <= 1


# ---- launchers


@pytest.mark.parametrize("name", ["adapt", "pretrain", "evaluate"])
def test_help_says_what_is_unverified_and_what_is_without_effect(name):
    module = script(name)
    assert "NCCL" in module.__doc__ and "unverified" in module.__doc__
    helps = {setting.name: setting.metadata.get("help", "") for setting in fields(module.Arguments)}
    assert "Without effect with --decode once" in helps["dataloader_num_workers"]


@pytest.mark.slow
def test_accelerate_launch(work, tmp_path):
    """Each script through `accelerate launch`, the next on what the one before wrote."""
    launch = [*LAUNCH, "--num_processes", "1"]
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    size = {"num_train_epochs": 1, "per_device_train_batch_size": 2, "max_train_steps": 1}
    said = run([*launch, str(SCRIPTS / "pretrain.py"), *work.flags(output_dir=base, **(SPEAKERS | size))])
    assert "1 process(es) on cpu" in said and f"written: {base}" in said
    flags = work.flags(output_dir=adapter, method="residual_adapter", model_name_or_path=base, **size)
    assert f"written: {adapter}" in run([*launch, str(SCRIPTS / "adapt.py"), *flags])
    flags = work.flags(output_dir=tmp_path / "out", model_name_or_path=adapter)
    said = run([*launch, str(SCRIPTS / "evaluate.py"), *flags])
    assert "adapter on 24 utterances of toy" in said and (tmp_path / "out" / "evaluation.json").is_file()


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(work, tmp_path):
    """With batch norm frozen; where it learns, each process normalises by its share of the batch."""
    run([*TORCHRUN, str(ROOT / "tests" / "two_processes.py"), str(work.folder), str(tmp_path)])
    for name, parts in {"frozen": ("alpha", "fc"), "learning": ("alpha", "bn", "fc")}.items():
        two = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        one, history = train_parts(work, fresh_accelerator(), parts, batch_size=8)
        assert len(two["history"]) == len(history) == 2
        apart = max(float((two["tensors"][k] - v).abs().max()) for k, v in one.state_dict().items())
        losses = [abs(a["loss"] - b["loss"]) for a, b in zip(two["history"], history)]
        if name == "frozen":
            assert apart < 1e-6 and max(losses) < 1e-6
        else:
            assert apart > 1e-4 and max(losses) < 0.3
        assert [row["step"] for row in two["history"]] == [row["step"] for row in history]


@pytest.mark.slow
def test_two_processes_resume_and_evaluate(work, adapter_repo, tmp_path):
    """Checkpoints by two processes; utterances of an evaluation shared out."""
    flags = {"method": "residual_adapter", "model_name_or_path": work.adapter, "checkpointing_steps": 2}
    flags |= {"num_train_epochs": 3, "per_device_train_batch_size": 4}
    adapt_script = str(SCRIPTS / "adapt.py")
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    run([*TORCHRUN, adapt_script, *work.flags(output_dir=whole, **flags)])
    run([*TORCHRUN, adapt_script, *work.flags(output_dir=parted, max_train_steps=6, **flags)])
    again = work.flags(output_dir=parted, resume_from_checkpoint="latest", **flags)
    run([*TORCHRUN, adapt_script, *again])
    histories = [without_speed(read(out / "run" / "history.json")) for out in (whole, parted)]
    assert histories[0] == histories[1] and len(histories[0]) == 3
    assert same_files(whole, parted)
    out = work.flags(output_dir=tmp_path / "out", model_name_or_path=adapter_repo)
    run([*TORCHRUN, str(SCRIPTS / "evaluate.py"), *out])
    _, expected = evaluate(work, tmp_path / "one", model_name_or_path=adapter_repo)
    found = pd.read_parquet(tmp_path / "out" / "predictions.parquet")
    assert list(found["utterance"]) == list(expected["utterance"])
    assert np.allclose(np.stack(found["posterior"]), np.stack(expected["posterior"]), atol=1e-5)


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
