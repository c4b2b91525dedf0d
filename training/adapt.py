"""Adapt a speaker-trained network to an emotion corpus; writes an adapter repo, or a full model repo.

    accelerate launch training/adapt.py --corpus emodb --data_dir DIR --method residual_adapter \
        --model_name_or_path hub_cards/s2e-resnet20-adapter --output_dir OUT

The recipe is the paper's for emotion corpora (section IV-B) unless `--recipe FILE.yaml` or a flag says
otherwise. With `--eval_speakers 03,08` these speakers are left out of the training and recognised afterwards.
OUT is the repo itself; checkpoints, logs, arguments, environment, history and evaluation lie in OUT/run and are
never published. A repo in OUT is written over, but a new run with --checkpointing_steps refuses an OUT that holds
checkpoints of an earlier one: resume from them with --resume_from_checkpoint latest, or delete them.

Several GPUs (`accelerate launch --multi_gpu`, NCCL) are built for, but unverified: only processes on CPUs were tried.
Where batch norm learns, several processes differ from one: each normalises by its own share of the batch.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from hf_s2e.evaluation.metrics import scores
from hf_s2e.training.arguments import (
    RepoArguments,
    checkpoint_folder,
    domain_of,
    parse_arguments,
    run_folder,
    split_names,
)
from hf_s2e.training.inputs import decode, draw, load_corpora, make_task, rows_by_speaker
from hf_s2e.training.loop import train
from hf_s2e.training.methods import METHODS, build_model, check_method
from hf_s2e.training.output import (
    check_output,
    find_checkpoint,
    find_namespace,
    prediction_table,
    push_to_hub,
    write_facts,
    write_json,
    write_model,
    write_record,
)
from hf_s2e.training.predict import predict
from hf_s2e.training.runtime import environment, make_accelerator, readable_errors, start_trackers


@dataclass
class Arguments(RepoArguments):
    method: str = field(default="residual_adapter", metadata={"help": ", ".join(METHODS)})
    model_name_or_path: str | None = field(default=None, metadata={"help": "the speaker-trained base"})
    model_revision: str | None = None
    adapter_name: str | None = field(default=None, metadata={"help": "by default the corpus' name"})
    eval_speakers: str | None = field(default=None, metadata={"help": "left out, then tested on: a,b"})
    per_device_eval_batch_size: int = 64


def check_classes(dataset, training: list[int]) -> None:
    """Refuse to train a classifier with a class that it never sees."""
    seen, labels = set(dataset.select(training)["label"]), dataset.features["label"].names
    if missing := [label for number, label in enumerate(labels) if number not in seen]:
        raise SystemExit(
            f"No utterance of {', '.join(missing)} is left to train on: leave these classes out with --labels, hold "
            "out other speakers (--eval_speakers), or draw more (--max_train_samples)"
        )


def evaluate(model, dataset, task, device, args: Arguments) -> str:
    """Recognise the left-out speakers; keeps scores and predictions in run/, returns the scores in words."""
    posteriors = predict(model, task, device=device, batch_size=args.per_device_eval_batch_size)
    labels, classes = np.asarray(task.labels)[task.utterances], dataset.features["label"].names
    found = scores(labels, posteriors.argmax(axis=1), len(classes))
    table = prediction_table(dataset, task.utterances, posteriors, run=0, fold="held out", method=args.method)
    table.to_parquet(run_folder(args) / "predictions.parquet", index=False)
    result = {"scores": found, "classes": classes, "speakers": split_names(args.eval_speakers)}
    write_json(run_folder(args) / "evaluation.json", result)
    return (
        f"{len(labels)} utterances of speakers left out of training ({args.eval_speakers}): "
        f"UA {100 * found['ua']:.1f} %, WA {100 * found['wa']:.1f} %"
    )


def main(argv: list[str] | None = None) -> None:
    args, recipe = parse_arguments(Arguments, {}, argv)
    accelerator = make_accelerator(args)
    with readable_errors():
        check_method(args.method, args.model_name_or_path)
    find_namespace(args)
    check_output(args, adapter=METHODS[args.method].makes_adapter)
    dataset = load_corpora(accelerator, args)
    training, testing = rows_by_speaker(dataset, args.eval_speakers, "--eval_speakers")
    training = draw(training, args.max_train_samples, args.seed)
    check_classes(dataset, training)
    labels, name = dataset.features["label"].names, args.adapter_name or domain_of(args.corpus)
    revision = {"revision": args.model_revision} if args.model_revision else {}
    with readable_errors():
        model = build_model(args.method, args.model_name_or_path, name, labels, recipe, **revision)
    store = decode(dataset, accelerator, args)
    facts = {
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "base_fingerprint": None if METHODS[args.method].from_scratch else model.base_fingerprint,
    }
    accelerator.print(
        f"{args.method}: {len(training)} utterances, {len(labels)} classes, "
        f"{facts['trained_parameters']:,} parameters trained"
    )
    made_by = environment(accelerator) | facts  # now: the files may have changed when the training ends
    with readable_errors("training stopped: "):
        history = train(
            accelerator,
            model,
            make_task(dataset, store, training, model.config),
            recipe,
            seed=args.seed,
            max_train_steps=args.max_train_steps,
            checkpoint_dir=checkpoint_folder(args),
            checkpointing_steps=args.checkpointing_steps,
            resume_from=find_checkpoint(args),
            description=args.method,
            on_epoch=start_trackers(accelerator, args, recipe),
        )
    if accelerator.is_main_process:
        with readable_errors(f"trained, but {args.output_dir} is not whole: "):
            write_model(model, args.output_dir, adapter=METHODS[args.method].makes_adapter)
            write_record(args, recipe, made_by, history)
            note = {}
            if testing:
                task = make_task(dataset, store, testing, model.config)
                note["note"] = f"One run: {evaluate(model, dataset, task, accelerator.device, args)}."
                print(note["note"])
            repo = write_facts(args, recipe, dataset, store, training, method=args.method, **note)
        print(f"written: {Path(args.output_dir)}")
        if args.push_to_hub:
            push_to_hub(args, repo)
    accelerator.end_training()


if __name__ == "__main__":
    main()
