"""Checkpoints: resumed as if never stopped, never another run's, and the last good one where something breaks."""

import errno
from dataclasses import replace

import pytest
import torch
from safetensors import SafetensorError
from training_tools import (
    AUGMENTED,
    forget_accelerator,
    fresh_accelerator,
    same_tensors,
    save_base,
    script,
    without_speed,
)

from hf_s2e.training.checkpoints import TrainingError, finished_checkpoints
from hf_s2e.training.loop import train
from hf_s2e.training.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")


def recipe(epochs=1, **options) -> Recipe:
    return Recipe(num_train_epochs=epochs, per_device_train_batch_size=5, **options)


def names(folder) -> list[str]:
    return [path.name for path in finished_checkpoints(folder)]


def content(folder) -> dict:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ---- resumed


@pytest.mark.parametrize("augmentation", [{}, AUGMENTED], ids=["as in the paper", "augmented"])
def test_resumed_is_as_if_it_had_not_stopped(work, tmp_path, augmentation):
    settings = recipe(3, lr_scheduler_type="cosine", **augmentation)
    whole, losses = work.train(recipe=settings, seed=3)
    for stop in (10, 14, 1):  # in the second epoch, at its end, in the first
        run = {"recipe": settings, "seed": 3, "checkpoint_dir": tmp_path / str(stop)}
        work.train(**run, max_train_steps=stop, checkpointing_steps=stop)
        resumed, rest = work.train(**run, resume_from=finished_checkpoints(tmp_path / str(stop))[-1])
        assert rest == losses and same_tensors(whole, resumed), stop


def test_a_finished_run_that_is_resumed_keeps_its_history(work, tmp_path):
    options = {"recipe": recipe(4), "seed": 3, "max_train_steps": 10, "checkpoint_dir": tmp_path}
    _, losses = work.train(**options, checkpointing_steps=5)
    _, again = work.train(**options, resume_from=finished_checkpoints(tmp_path)[-1])
    assert [row["step"] for row in again] == [7, 10] and again == losses


def test_resumed_twice_and_with_accumulated_gradients(work, tmp_path):
    def run(**options):
        model = work.model()
        accelerator = fresh_accelerator(gradient_accumulation_steps=2)
        options |= {"checkpoint_dir": tmp_path, "seed": 1}
        return model, without_speed(train(accelerator, model, work.task(model), recipe(4), **options))

    whole, losses = run()
    run(max_train_steps=5, checkpointing_steps=3)  # step 3 is between the batches of one optimiser step: 4 is kept
    assert [path.name for path in finished_checkpoints(tmp_path)] == ["step_0000004"]
    run(max_train_steps=16, checkpointing_steps=6, resume_from=finished_checkpoints(tmp_path)[-1])
    resumed, rest = run(resume_from=finished_checkpoints(tmp_path)[-1])
    assert rest == losses and same_tensors(whole, resumed)


def test_resumed_from_an_earlier_checkpoint_the_newly_written_one_stays(work, tmp_path):
    every = {"recipe": recipe(2), "checkpoint_dir": tmp_path}
    work.train(max_train_steps=12, checkpointing_steps=6, **every)
    work.train(max_train_steps=10, checkpointing_steps=2, resume_from=finished_checkpoints(tmp_path)[0], **every)
    assert names(tmp_path) == ["step_0000008", "step_0000010", "step_0000012"]


# ---- of the same run only


@pytest.mark.parametrize(
    "change, said",
    [
        ({"recipe": recipe(learning_rate=0.5)}, "learning_rate"),
        ({"seed": 9}, "seed 0, not 9"),
        ({"method": "bn_only"}, "cannot be read|frozen"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(work, tmp_path, change, said):
    work.train(recipe=recipe(), max_train_steps=4, checkpoint_dir=tmp_path, checkpointing_steps=4)
    with pytest.raises(TrainingError, match=said):
        work.train(**{"recipe": recipe(), **change}, resume_from=finished_checkpoints(tmp_path)[-1])


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


# ---- what goes wrong


def spoil_after_two_epochs(model):
    def spoil(row):
        if row["epoch"] == 2:
            with torch.no_grad():
                model.heads["toy"].bias.fill_(torch.nan)

    return spoil


@pytest.mark.parametrize("every, good, said", [(4, 12, "The loss is nan"), (7, 7, "Weights are not finite")])
def test_nan_stops_and_leaves_the_last_good_checkpoint(work, tmp_path, every, good, said):
    model, options = work.model(), {"checkpoint_dir": tmp_path, "checkpointing_steps": every}
    with pytest.raises(TrainingError, match=rf"{said} by step .* The last good .*step_00000{good:02d}"):
        work.train(model=model, on_epoch=spoil_after_two_epochs(model), recipe=recipe(3), **options)
    assert finished_checkpoints(tmp_path)[-1].name == f"step_00000{good:02d}"
    resumed, _ = work.train(recipe=recipe(3), resume_from=finished_checkpoints(tmp_path)[-1])
    assert all(p.isfinite().all() for p in resumed.parameters())


def test_the_last_good_checkpoint_is_this_runs(work, tmp_path):
    work.train(recipe=recipe(), max_train_steps=4, checkpoint_dir=tmp_path, checkpointing_steps=2)
    with pytest.raises(TrainingError, match="There is no checkpoint yet"):
        work.train(recipe=recipe(learning_rate=1e38), checkpoint_dir=tmp_path)


@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left")]
)
def test_a_full_disk(work, tmp_path, monkeypatch, failure):
    from accelerate import Accelerator

    save, saved = Accelerator.save_state, []

    def save_until_full(self, folder, **options):
        if saved:
            (tmp_path / f"{folder}/model.safetensors").write_bytes(b"half")
            raise failure
        saved.append(folder)
        return save(self, folder, **options)

    monkeypatch.setattr(Accelerator, "save_state", save_until_full)
    with pytest.raises(TrainingError, match=r"step 8 cannot be written \(.*No space left.*step_0000004"):
        work.train(checkpoint_dir=tmp_path, checkpointing_steps=4)
    assert [path.name for path in tmp_path.iterdir()] == ["step_0000004"]


def test_a_half_written_checkpoint_is_not_one(work, tmp_path):
    work.train(max_train_steps=8, checkpoint_dir=tmp_path, checkpointing_steps=4)
    (tmp_path / "step_0000012.part").mkdir()
    (tmp_path / "step_0000012.part" / "progress.json").write_text('{"step": 12}')
    (tmp_path / "step_0000016").mkdir()
    assert [path.name for path in finished_checkpoints(tmp_path)] == ["step_0000004", "step_0000008"]


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.bin", "progress.json"])
def test_a_damaged_checkpoint_is_refused(work, tmp_path, file):
    work.train(max_train_steps=4, checkpoint_dir=tmp_path, checkpointing_steps=4)
    checkpoint = tmp_path / "step_0000004"
    content = (checkpoint / file).read_bytes()
    (checkpoint / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(TrainingError, match=r"step_0000004 cannot be read"):
        work.train(checkpoint_dir=tmp_path, resume_from=checkpoint)
