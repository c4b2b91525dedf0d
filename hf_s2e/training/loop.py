"""The training loop, shared by speaker and emotion training."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import DynamoBackend
from torch.utils.data import DataLoader

from ..audio import AudioError
from ..model.adapter_files_s2e import tensors_sha256
from ..model.modeling_s2e import S2EForAudioClassification
from .augment import Augment
from .checkpoints import Checkpoints, Meter, TrainingError, refuse_other_checkpoints
from .data import Features, ShuffledBatches, Task, segment_loader, segments_of
from .linear_probe import fit_head
from .losses import loss_by_name
from .recipe import Recipe, make_optimizer, make_scheduler
from .runtime import keep_freed_memory
from .teachers import TeacherTargets, distillation

LOSS_CHECK_STEPS = 20  # reading the loss stalls an accelerator: not at every step


def train(
    accelerator: Accelerator,
    model: S2EForAudioClassification,
    task: Task,
    recipe: Recipe,
    *,
    seed: int = 0,
    max_train_steps: int | None = None,
    checkpoint_dir: Path | None = None,
    checkpointing_steps: int | None = None,
    resume_from: Path | None = None,
    description: str = "training",
    on_epoch=None,
    independent: bool = False,
    teachers: Sequence[TeacherTargets] = (),
) -> list[dict]:
    """Train whatever requires a gradient; returns one row an epoch (loss, accuracy, segments per second).

    With `teachers` the model is an [`S2EStudent`] that learns what they say too, with the recipe's `teacher_weight`;
    speakers are then learnt from segments at their own speed only.

    Batch order and augmentation depend on `seed`, epoch and step alone: a run resumed from a checkpoint goes
    on exactly as if it had not stopped. An `independent` run is this process' own, whatever
    the others do.

    Each of several processes takes its own batches, so the batch of an optimiser step is that much larger.
    Where batch norm learns, each process normalises by its own share of it, and the first process's running
    statistics are kept: the result then differs from that of one process with the larger batch; elsewhere it
    is the same.

    Raises:
        TrainingError: the loss or a tensor of the network is not finite, something frozen has changed, a
            recording cannot be read any more, a checkpoint cannot be written or read, or those of another run
            are where they belong.
    """
    if checkpointing_steps:
        refuse_other_checkpoints(checkpoint_dir, resume_from)
    loader, sampler = _batches(task, recipe, seed, accelerator.device)
    settings = _settings(accelerator, model, task, recipe, seed) | {"teachers": [one.key for one in teachers]}
    frozen = settings["frozen filters"]
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    if recipe.head_start == "probe" and resume_from is None:
        fit_head(model, task, recipe, accelerator.device)
        model.train()
    torch.backends.cudnn.benchmark = accelerator.device.type == "cuda"  # shapes are fixed
    model.to(accelerator.device)
    wrapped, optimizer, loader = _prepare(accelerator, model, make_optimizer(model, recipe), loader, independent)
    scheduler = make_scheduler(optimizer, recipe, len(loader))
    if not independent:  # a process of many trainings writes no checkpoints
        accelerator.register_for_checkpointing(scheduler)
    features = Features(task, recipe, accelerator.device)
    total = recipe.num_train_epochs * len(loader)
    total = total if max_train_steps is None else min(total, max_train_steps)
    classes = model.config.num_labels
    run = _Run(accelerator, wrapped, optimizer, scheduler, features, recipe, seed, classes, independent, teachers)
    checkpoints = Checkpoints(accelerator, checkpoint_dir, checkpointing_steps, settings)
    done = {} if resume_from is None else checkpoints.load(resume_from)
    run.step = done.get("step", 0)
    try:
        history = _loop(run, loader, sampler, total, checkpoints, description, done, on_epoch)
    except AudioError as error:  # from a worker with its traceback, of which the last line says it
        raise TrainingError(f"{str(error).splitlines()[-1]} {checkpoints.last_good()}") from error
    _check_finite(model, total, checkpoints.last_good())
    if _frozen_sha256(model) != frozen:
        raise TrainingError("A frozen tensor changed during training: this result must not be used.")
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)  # answer in full precision, as at the user's
    del run, wrapped, optimizer, scheduler, loader, checkpoints  # DDP must be gone before the processes part
    accelerator.free_memory()
    return history


def _batches(task: Task, recipe: Recipe, seed: int, device: torch.device) -> tuple[DataLoader, ShuffledBatches]:
    """The training segments in batches, and the sampler that shuffles them anew each epoch."""
    data = segments_of(task, recipe, seed)
    if not len(data):
        raise TrainingError("There is nothing to train on: no utterance is left.")
    sampler = ShuffledBatches(data.labels, recipe.per_device_train_batch_size, seed, balance=recipe.balance_classes)
    return segment_loader(data, device, batch_sampler=sampler), sampler


def _prepare(accelerator: Accelerator, model, optimizer, loader: DataLoader, independent: bool) -> tuple:
    """Model, optimiser and loader as accelerate runs them: this process's share, or all of it in an independent run."""
    segments, batch_size = len(loader.dataset), loader.batch_sampler.batch_size
    if independent:
        model, optimizer = _compiled(accelerator, model), accelerator.prepare_optimizer(optimizer)
        # all batches are this process's; accelerate sees the last, at which accumulated gradients are due
        loader = prepare_data_loader(loader, num_processes=1, process_index=0)
    else:
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    if not len(loader):
        raise TrainingError(
            f"{segments} segments make no batch of {batch_size} for each of the {accelerator.num_processes} "
            "processes: lower --per_device_train_batch_size."
        )
    return model, optimizer, loader


@dataclass
class _Run:
    accelerator: Accelerator
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    features: Features
    recipe: Recipe
    seed: int
    num_classes: int
    independent: bool
    teachers: Sequence[TeacherTargets] = ()
    step: int = 0

    def train_step(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimiser step; the loss and the number of segments recognised, still on the device."""
        share = 0 if self.independent else self.accelerator.process_index  # whichever process it is
        seed = (self.seed * 1_000_003 + self.step) * 1009 + share
        augment = Augment(self.recipe, seed, self.accelerator.device)
        labels = batch["labels"].to(self.accelerator.device, non_blocking=True)
        inputs = self.features(batch["utterance"], batch["start"], augment, batch.get("waves"), batch["speed"])
        # F.one_hot would wait for the device
        targets = torch.zeros(len(labels), self.num_classes, device=labels.device).scatter_(1, labels[:, None], 1.0)
        if self.recipe.mixup:
            inputs, targets = augment.mix(inputs, targets)
        with self.accelerator.accumulate(self.model):
            with self.accelerator.autocast():
                output = self.model(input_values=inputs)
            loss, logits = self._loss(output, targets, batch), output.logits
            self.accelerator.backward(loss)
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
        self.step += 1
        return loss.detach(), (logits.detach().argmax(dim=-1) == labels).sum()

    def _loss(self, output, targets: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        loss = loss_by_name(self.recipe.loss)
        if not self.teachers:
            return loss(output.logits, targets, self.recipe)
        said = [teacher.of(batch["index"]).to(self.accelerator.device) for teacher in self.teachers]
        total = self.recipe.teacher_weight * distillation(output.taught, said)
        own = (batch["speed"] == 1).to(self.accelerator.device)  # at another speed it is another voice
        return total + loss(output.logits[own], targets[own], self.recipe) if own.any() else total


def _loop(
    run: _Run,
    loader,
    sampler: ShuffledBatches,
    total: int,
    checkpoints: Checkpoints,
    description: str,
    done: dict,
    on_epoch,
) -> list[dict]:
    """Train until `total` steps; `done` is what a checkpoint says of those before."""
    from tqdm import tqdm

    history: list[dict] = done.get("history", [])
    bar = tqdm(
        total=total,
        initial=run.step,
        desc=description,
        unit="step",
        disable=not run.accelerator.is_main_process,
    )
    if run.step < total:  # an epoch that was cut short is gone on with
        history = [row for row in history if row["step"] % len(loader) == 0]
    model, before = run.accelerator.unwrap_model(run.model), done.get("totals")
    while run.step < total:
        model.train()  # on_epoch may have evaluated
        sampler.epoch, batches_done = divmod(run.step, len(loader))
        loader.dataset.epoch = sampler.epoch
        rate = run.scheduler.base_lrs[0] * run.scheduler.lr_lambdas[0](run.step - batches_done)
        meter, before = Meter(bar, run.accelerator, run.independent, before), None
        for batch in skip_first_batches(loader, batches_done) if batches_done else loader:
            meter.update(*run.train_step(batch), len(batch["labels"]))
            bar.update()
            whole_epoch = run.step % len(loader) == 0
            last = whole_epoch or run.step == total
            if last or run.step % LOSS_CHECK_STEPS == 0 or checkpoints.due(run.step):
                meter.check(run.step, checkpoints.last_good())
            if last:
                row = {"epoch": sampler.epoch + 1, "step": run.step, "learning_rate": rate, **meter.row()}
                history.append(row)
                if on_epoch is not None:
                    on_epoch(row)
            if checkpoints.due(run.step):
                _check_finite(model, run.step, checkpoints.last_good())
                checkpoints.save(run.step, history=history, totals=None if whole_epoch else meter.totals())
            if run.step == total:
                break
    bar.close()
    return history


def _check_finite(model: torch.nn.Module, step: int, last_good: str) -> None:
    """Parameters and batch norm statistics: the loss was that of the weights before the last step."""
    bad = [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]
    if bad:
        raise TrainingError(
            f"Weights are not finite by step {step} ({bad[0]}; {len(bad)} tensors in all): lower the learning rate. "
            f"{last_good}"
        )


def _compiled(accelerator: Accelerator, model: torch.nn.Module) -> torch.nn.Module:
    """The model as accelerate would compile it, but not wrapped for mixed precision or several processes.

    The wrapper is another function for every model: torch would compile each fold-run's network anew, and
    give up after the eighth.
    """
    plugin = accelerator.state.dynamo_plugin
    return model if plugin.backend == DynamoBackend.NO else torch.compile(model, **plugin.to_kwargs())


def _settings(
    accelerator: Accelerator, model: torch.nn.Module, task: Task, recipe: Recipe, seed: int
) -> dict[str, object]:
    """What a run and its resumption must have in common; asked before anything is trained."""
    rows = torch.as_tensor(task.utterances, dtype=torch.int64)
    labels = torch.as_tensor(np.asarray(task.labels, dtype=np.int64))[rows]
    lengths = task.store.lengths[rows]
    return {
        **asdict(recipe),
        "seed": seed,
        "front_end": model.config.front_end,
        "start weights": tensors_sha256(model.state_dict()),
        "frozen filters": _frozen_sha256(model),
        "utterances": tensors_sha256({"rows": rows, "lengths": lengths}),  # of whatever corpus lies there
        "labels": tensors_sha256({"labels": labels}),
        "gradient_accumulation_steps": accelerator.gradient_accumulation_steps,
        "mixed_precision": accelerator.mixed_precision,
        "processes": accelerator.num_processes,
    }


def _frozen_sha256(model: torch.nn.Module) -> str:
    """All that training must leave alone: frozen parameters, and the statistics of frozen batch norms."""
    learning = tuple({name.rsplit(".", 1)[0] + "." for name, p in model.named_parameters() if p.requires_grad})
    frozen = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(learning)}
    return tensors_sha256(frozen)
