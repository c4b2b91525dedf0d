"""What must not go unnoticed: another run's checkpoints, weights that are not finite, results half written."""

from dataclasses import replace

import pytest
import torch
from training_tools import Workbench, forget_accelerator, fresh_accelerator, save_base, script

from hf_s2e.training.engine import train
from hf_s2e.training.progress import TrainingError, finished_checkpoints
from hf_s2e.training.recipe import Recipe


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return Workbench(tmp_path_factory.mktemp("guards"))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    forget_accelerator()
    yield
    torch.set_num_threads(before)
    forget_accelerator()


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
    before = content(tmp_path / "out" / "run" / "checkpoints")
    with pytest.raises(SystemExit, match=r"out.run.checkpoints holds checkpoints of an earlier run"):
        run(checkpointing_steps=2, model_name_or_path=other)
    with pytest.raises(SystemExit, match=r"start weights \w+, not \w+"):
        run(resume_from_checkpoint="latest", model_name_or_path=other)
    run(model_name_or_path=other)
    assert content(tmp_path / "out" / "run" / "checkpoints") == before
