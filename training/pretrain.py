"""Train the shared network to tell speakers apart; writes a base repo.

    accelerate launch training/pretrain.py --corpus speechocean762 --data_dir DIR --num_speakers 50 \
        --speaker_seed 0 --adapters --output_dir OUT

With `--teacher NAME[:LAYER]` the network learns, beside the speakers or (`--loss none`) instead of them, what a network
that has heard much more speech says of each segment (distillation):

    accelerate launch training/pretrain.py --corpus speechocean762,commonvoice,dspspeech20 --data_dir A,B,C \
        --teacher openai/whisper-tiny.en:2 --teacher hub_cards/s2e-campplus --speeds 0.8 1.0 1.25 --no-adapters \
        --remove_dc --model_name_or_path hub_cards/s2e-resnet20-plain --output_dir OUT

The recipe is the paper's for VoxCeleb2 (section IV-B): SGD, 30 epochs, learning rate 0.05 divided by 10 at
the 21st epoch, weight decay 1e-4. Some utterances of each speaker, and some whole speakers, are left out and
recognised afterwards: accuracy on the former, equal error rate of verification on the latter. Checkpoints, logs,
arguments, environment, history and evaluation lie in OUT/run and are never published.

Several GPUs (`accelerate launch --multi_gpu`, NCCL) are built for, but unverified: only processes on CPUs were tried.
As batch norm learns, several processes differ from one: each normalises by its own share of the batch.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator

from hf_s2e import S2EConfig, S2EForAudioClassification, S2EFrontEnd
from hf_s2e.training.arguments import RepoArguments, checkpoint_folder, parse_arguments, run_folder
from hf_s2e.training.data import Task, segments_of
from hf_s2e.training.inputs import draw, make_task, read_corpus, speakers_of, store_folder
from hf_s2e.training.loop import train
from hf_s2e.training.output import (
    check_output,
    find_checkpoint,
    find_namespace,
    push_to_hub,
    write_facts,
    write_json,
    write_model,
    write_record,
)
from hf_s2e.training.predict import predict, run_segments
from hf_s2e.training.recipe import Recipe
from hf_s2e.training.runtime import environment, make_accelerator, readable_errors, start_trackers
from hf_s2e.training.teachers import S2EStudent, Teacher, TeacherError, TeacherTargets, needs_decoded, steps_of

PAPER = {
    "learning_rate": 0.05,
    "weight_decay": 1e-4,
    "lr_drop_epochs": [21],
    "per_device_train_batch_size": 64,
    "balance_classes": True,
}
TRIALS = 20_000  # pairs of utterances for the equal error rate


@dataclass
class Arguments(RepoArguments):
    adapters: bool = field(default=True, metadata={"help": "with 1x1 adapters, or the plain network"})
    shortcut: str = "pool"
    remove_dc: bool = field(default=False, metadata={"help": "take each segment's mean away before the spectrogram"})
    model_name_or_path: str | None = field(default=None, metadata={"help": "a base whose filters training starts with"})
    teacher: list[str] = field(
        default_factory=list,
        metadata={"action": "extend", "help": "NAME[:LAYER] of networks to learn from, folders or Hub ids"},
    )
    num_speakers: int | None = field(default=None, metadata={"help": "train on so many, drawn by --speaker_seed"})
    speaker_seed: int = 0
    min_seconds: float = field(default=20.0, metadata={"help": "leave out speakers with less speech"})
    held_out_utterances: float = field(default=0.05, metadata={"help": "share of each speaker's utterances"})
    held_out_speakers: int = field(default=20, metadata={"help": "for the equal error rate"})
    repo_id: str | None = field(default=None, metadata={"help": "the Hub id under which the base will be published"})


@dataclass
class Split:
    """Row numbers of the corpus, and the speakers in the order of the classes."""

    speakers: list[str]
    training: list[int]
    held_out: list[int]
    unseen: list[int]


def split_corpus(speakers: list[str], seconds: list[float], args: Arguments) -> Split:
    """Choose speakers by seed; then some of their utterances, and some further speakers, to test on.

    Raises:
        SystemExit: fewer speakers than asked for have enough speech.
    """
    draw, total = random.Random(args.speaker_seed), Counter()
    for speaker, length in zip(speakers, seconds):
        total[speaker] += length
    usable = sorted(speaker for speaker, length in total.items() if length >= args.min_seconds)
    draw.shuffle(usable)
    unseen = set(usable[: args.held_out_speakers])
    usable = usable[args.held_out_speakers :]
    wanted = args.num_speakers or len(usable)
    if not 2 <= wanted <= len(usable):
        raise SystemExit(
            f"--num_speakers {wanted}: the corpus has {len(usable)} speakers with at least {args.min_seconds}"
            f" s of speech, {args.held_out_speakers} held out already (--held_out_speakers, --min_seconds)"
        )
    chosen = sorted(usable[:wanted])
    split = Split(chosen, [], [], [i for i, speaker in enumerate(speakers) if speaker in unseen])
    rows: dict[str, list[int]] = {speaker: [] for speaker in chosen}
    for i, speaker in enumerate(speakers):
        if speaker in rows:
            rows[speaker].append(i)
    for speaker in chosen:
        draw.shuffle(rows[speaker])
        count = round(args.held_out_utterances * len(rows[speaker]))
        split.held_out += sorted(rows[speaker][:count])
        split.training += sorted(rows[speaker][count:])
    return split


def new_model(
    args: Arguments, speakers: list[str], teachers: Sequence[TeacherTargets] = ()
) -> S2EForAudioClassification:
    config = S2EConfig(
        adapters=args.adapters,
        shortcut=args.shortcut,
        remove_dc=args.remove_dc,
        repo_id=args.repo_id or args.hub_model_id,
        id2label=dict(enumerate(speakers)),
        label2id={speaker: i for i, speaker in enumerate(speakers)},
    )
    model = S2EStudent(config, [one.width for one in teachers]) if teachers else S2EForAudioClassification(config)
    if args.model_name_or_path:
        take_filters(model, S2EForAudioClassification.from_pretrained(args.model_name_or_path))
    return model


def take_filters(model: S2EForAudioClassification, base: S2EForAudioClassification) -> None:
    """Begin with another base's filters, alpha and batch norms; its own classifier goes with its speakers."""
    if model.config.adapters != base.config.adapters:
        base.merge_base_adapter()
    found = {name: tensor for name, tensor in base.s2e.state_dict().items() if not name.startswith("domains.")}
    domain = base.s2e.domains[base.config.base_domain].state_dict()
    found |= {f"domains.{model.config.base_domain}.{name}": tensor for name, tensor in domain.items()}
    own = {name: tensor.shape for name, tensor in model.s2e.state_dict().items()}
    if {name: tensor.shape for name, tensor in found.items()} != own:
        raise ValueError("--model_name_or_path: that base has filters of other sizes, or no adapters to start from.")
    model.s2e.load_state_dict(found)


def learn_from(args: Arguments, task: Task, recipe: Recipe, accelerator: Accelerator) -> list[TeacherTargets]:
    """What the teachers say of every segment that is trained on; computed by the first process, kept on disk."""
    if not args.teacher:
        return []
    needs_decoded(task.store)
    if recipe.random_crop or recipe.speed_perturbation or recipe.mixup:
        raise TeacherError(
            "--teacher says what it hears in fixed segments: leave random_crop, speed_perturbation and mixup out of "
            "the recipe (--speeds gives other speeds)."
        )
    data = segments_of(task, recipe, args.seed)
    steps, folder = steps_of(S2EConfig(**task.front_end.settings)), store_folder(args.cache_dir).with_name("teachers")
    with accelerator.main_process_first():
        progress = accelerator.is_main_process
        return [TeacherTargets.build(Teacher(one), data, steps, folder, progress=progress) for one in args.teacher]


def equal_error_rate(model, task: Task, speakers: list[str], device: torch.device) -> float:
    """Verification of unseen speakers by the cosine of utterance embeddings: the error at which misses and
    false alarms are equal, over random pairs of utterances."""
    utterances = run_segments(model, task, device=device, output="embeddings")
    embeddings = torch.stack([segments.mean(dim=0) for segments in utterances])
    unit = F.normalize(embeddings - embeddings.mean(dim=0), dim=1)
    names = np.asarray([speakers[i] for i in task.utterances])
    a, b = _pairs(names)
    scores, target = (unit[a] * unit[b]).sum(dim=1).numpy(), names[a] == names[b]
    order = np.argsort(-scores)
    misses = 1 - np.cumsum(target[order]) / target.sum()
    alarms = np.cumsum(~target[order]) / (~target).sum()
    at = np.argmin(np.abs(misses - alarms))
    return float((misses[at] + alarms[at]) / 2)


def _pairs(names: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Random pairs of utterances, and as many of one speaker each, which chance would seldom draw."""
    draw_from = np.random.default_rng(0)
    a, b = draw_from.integers(len(names), size=(2, TRIALS))
    order = np.argsort(names, kind="stable")
    _, first, count = np.unique(names[order], return_index=True, return_counts=True)
    which = draw_from.integers(len(names), size=TRIALS)  # a speaker as often as he has utterances
    speaker = np.searchsorted(np.unique(names), names[which])
    mate = order[first[speaker] + draw_from.integers(count[speaker])]
    a, b = np.concatenate([a, which]), np.concatenate([b, mate])
    return a[a != b], b[a != b]


def report(model, dataset, store, split: Split, labels: list[int], device: torch.device) -> dict[str, float]:
    """Accuracy on left-out utterances of the training speakers, equal error rate on left-out speakers."""
    result = {"speakers": len(split.speakers), "utterances": len(split.training)}
    result["hours"] = round(float(store.lengths[split.training].sum()) / 16_000 / 3600, 2)
    if split.held_out:
        task = Task(store, labels, split.held_out, S2EFrontEnd(**model.config.front_end))
        right = predict(model, task, device=device).argmax(axis=1) == np.asarray(labels)[split.held_out]
        result["held_out_accuracy"], result["held_out_utterances"] = float(right.mean()), len(right)
    speakers = speakers_of(dataset)
    unseen = {speakers[i] for i in split.unseen}
    if 1 < len(unseen) < len(split.unseen):  # somebody has two utterances to tell from others'
        task = make_task(dataset, store, split.unseen, model.config)
        result["equal_error_rate"] = equal_error_rate(model, task, speakers, device)
        result["unseen_speakers"] = len(unseen)
    return result


def main(argv: list[str] | None = None) -> None:
    args, recipe = parse_arguments(Arguments, PAPER, argv)
    accelerator = make_accelerator(args)
    find_namespace(args)
    check_output(args, adapter=False)
    dataset, store = read_corpus(accelerator, args)
    speakers = speakers_of(dataset)
    split = split_corpus(speakers, (store.lengths / 16_000).tolist(), args)
    split.training = draw(split.training, args.max_train_samples, args.seed)
    class_of = {speaker: i for i, speaker in enumerate(split.speakers)}
    labels = [class_of.get(speaker, -1) for speaker in speakers]
    with readable_errors():
        config = S2EConfig(remove_dc=args.remove_dc)
        front_end = S2EFrontEnd(**config.front_end)
        task = Task(store, labels, split.training, front_end)
        teachers = learn_from(args, task, recipe, accelerator)
        model = new_model(args, split.speakers, teachers)
    accelerator.print(f"{len(split.speakers)} speakers, {len(split.training)} utterances")
    made_by = environment(accelerator)  # now: the files may have changed when the training ends
    with readable_errors("training stopped: "):
        history = train(
            accelerator,
            model,
            task,
            recipe,
            seed=args.seed,
            max_train_steps=args.max_train_steps,
            checkpoint_dir=checkpoint_folder(args),
            checkpointing_steps=args.checkpointing_steps,
            resume_from=find_checkpoint(args),
            description="speakers" if not teachers else "teachers",
            teachers=teachers,
            on_epoch=start_trackers(accelerator, args, recipe),
        )
    model = model.base() if teachers else model
    if accelerator.is_main_process:
        with readable_errors(f"trained, but {args.output_dir} is not whole: "):
            write_model(model, args.output_dir, adapter=False)
            write_record(args, recipe, made_by, history)
            result = report(model, dataset, store, split, labels, accelerator.device)
            write_json(run_folder(args) / "evaluation.json", result)
            method = "speaker classification" if recipe.loss != "none" else "distillation"
            method += f", distilled from {' and '.join(args.teacher)}" if teachers and recipe.loss != "none" else ""
            facts = {"method": method, "evaluation": result}
            repo = write_facts(args, recipe, dataset, store, split.training, **facts)
        print(", ".join(f"{name} {value:.4g}" for name, value in result.items()))
        print(f"written: {args.output_dir}, fingerprint {model.base_fingerprint}")
        if args.push_to_hub:
            push_to_hub(args, repo)
    accelerator.end_training()


if __name__ == "__main__":
    main()
