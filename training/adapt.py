"""Adapt a speaker-trained network to an emotion corpus; writes an adapter repo, or a full model repo.

    accelerate launch training/adapt.py --corpus emodb --data_dir DIR --method residual_adapter \
        --model_name_or_path hub_cards/s2e-resnet20-adapter --output_dir OUT

The recipe is the paper's for emotion corpora (section IV-B) unless `--recipe FILE.yaml` or a flag says
otherwise. With `--eval_speakers 03,08` these speakers are left out of the training and recognised afterwards.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from hf_s2e.metrics import scores
from hf_s2e.training.engine import TrainingError, predict, train
from hf_s2e.training.methods import METHODS, build_model
from hf_s2e.training.script import (
    RunArguments,
    find_checkpoint,
    make_accelerator,
    make_task,
    parse_arguments,
    read_corpus,
    run_folder,
    write_environment,
    write_json,
)


@dataclass
class Arguments(RunArguments):
    method: str = field(default="residual_adapter", metadata={"help": ", ".join(METHODS)})
    model_name_or_path: str | None = field(default=None, metadata={"help": "the speaker-trained base"})
    model_revision: str | None = None
    adapter_name: str | None = field(default=None, metadata={"help": "by default the corpus' name"})
    eval_speakers: str | None = field(
        default=None, metadata={"help": "leave these speakers out and test on them: a,b"}
    )
    per_device_eval_batch_size: int = 64


def split_speakers(dataset, held_out: str | None, max_train: int | None) -> tuple[list[int], list[int]]:
    """Indices of the training utterances and of those of the speakers that are left out."""
    speakers = [str(speaker) for speaker in dataset["speaker"]]
    test_speakers = {name.strip() for name in held_out.split(",")} if held_out else set()
    if unknown := test_speakers - set(speakers):
        raise SystemExit(
            f"--eval_speakers: the corpus has no {sorted(unknown)}; it has {sorted(set(speakers))}"
        )
    training = [i for i, speaker in enumerate(speakers) if speaker not in test_speakers]
    return training[:max_train], [i for i, speaker in enumerate(speakers) if speaker in test_speakers]


def evaluate(model, dataset, task, device, batch_size: int) -> dict:
    """UA, WA and the posterior of each utterance of the left-out speakers."""
    posteriors = predict(model, task, device=device, batch_size=batch_size)
    labels = np.asarray(task.labels)[task.utterances]
    found = posteriors.argmax(axis=1)
    names = dataset.features["label"].names
    rows = [
        {
            "file": dataset[i]["audio"]["path"],
            "speaker": dataset[i]["speaker"],
            "label": names[label],
            "prediction": names[guess],
            "posterior": [round(float(p), 6) for p in posterior],
        }
        for i, label, guess, posterior in zip(task.utterances, labels, found, posteriors)
    ]
    return {"scores": scores(labels, found, len(names)), "classes": names, "utterances": rows}


def save(model, args: Arguments) -> None:
    """The repo: one adapter, or the whole network where the method changed it."""
    if METHODS[args.method].makes_adapter:
        model.save_adapter(args.output_dir, model.active_adapter())
    else:
        model.save_pretrained(args.output_dir)


def main(argv: list[str] | None = None) -> None:
    args, recipe = parse_arguments(Arguments, {}, argv)
    accelerator = make_accelerator(args)
    dataset, store = read_corpus(accelerator, args)
    training, testing = split_speakers(dataset, args.eval_speakers, args.max_train_samples)
    labels, name = dataset.features["label"].names, args.adapter_name or args.corpus
    revision = {"revision": args.model_revision} if args.model_revision else {}
    try:
        model = build_model(args.method, args.model_name_or_path, name, labels, recipe, **revision)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    accelerator.print(
        f"{args.method}: {len(training)} utterances, {len(labels)} classes, {trained:,} parameters trained"
    )
    write_environment(args, recipe, accelerator, trained_parameters=trained, base_fingerprint=None)
    try:
        history = train(
            accelerator,
            model,
            make_task(dataset, store, training, model.config),
            recipe,
            seed=args.seed,
            max_train_steps=args.max_train_steps,
            checkpoint_dir=run_folder(args) / "checkpoints",
            checkpointing_steps=args.checkpointing_steps,
            resume_from=find_checkpoint(args),
            description=args.method,
        )
    except TrainingError as error:
        raise SystemExit(f"training stopped: {error}") from error
    if accelerator.is_main_process:
        write_json(run_folder(args) / "history.json", history)
        save(model, args)
        if testing:
            task = make_task(dataset, store, testing, model.config)
            result = evaluate(model, dataset, task, accelerator.device, args.per_device_eval_batch_size)
            write_json(run_folder(args) / "evaluation.json", result)
            print(
                f"{len(testing)} utterances of unseen speakers: UA {100 * result['scores']['ua']:.1f} %, "
                f"WA {100 * result['scores']['wa']:.1f} %"
            )
        print(f"written: {Path(args.output_dir)}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
