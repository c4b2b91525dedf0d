"""The whole job once: adapt the speaker-trained base, write the adapter repo, classify unseen speakers.

    python training/demo.py [--corpus toy] [--data_dir DIR] [--base campplus] [--output_dir out/demo]

With no data at hand the corpus is `toy`, which the package makes itself: for trying things out, not a
result. The speakers named in HELD_OUT (by default the last two) take no part in the training.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm
from transformers import pipeline

import hf_s2e  # noqa: F401 (registers the model with transformers)
from hf_s2e.audio import load_audio
from hf_s2e.corpora import load_corpus
from hf_s2e.evaluation.metrics import scores
from hf_s2e.training.arguments import split_names
from hf_s2e.training.inputs import speakers_of
from hf_s2e.training.runtime import readable_errors

ROOT = Path(__file__).resolve().parents[1]
BASES = {"resnet20": "s2e-resnet20-adapter", "campplus": "s2e-campplus"}
HELD_OUT = {"emodb": "03,08", "ravdess": "01,02,03,04"}  # a man and a woman of EmoDB
# Few and strong steps instead of the paper's 30 epochs: what two CPU cores do in some two minutes
SETTINGS = {
    "resnet20": {"learning_rate": 0.02, "per_device_train_batch_size": 16, "lr_scheduler_type": "cosine"},
    "campplus": {"recipe": ROOT / "training" / "recipes" / "campplus.yaml", "per_device_train_batch_size": 16},
}
EPOCHS = {"toy": 5}


def adapt(args: argparse.Namespace, held_out: str, folder: Path) -> None:
    """training/adapt.py, started as a user would; its failure ends the demo with its exit code."""
    settings = SETTINGS[args.base] | {"num_train_epochs": EPOCHS.get(args.corpus, 1)}
    base = ROOT / "hub_cards" / BASES[args.base]
    if not (base / "model.safetensors").is_file():
        sys.exit(f"{base} has no weights yet: `make base-campplus` gets them, once")
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += [
        "--num_processes",
        "1",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    # accelerate gives a process one thread, unless told otherwise
    command += ["--num_cpu_threads_per_process", str(os.cpu_count() or 1)]
    command += [str(Path(__file__).with_name("adapt.py")), "--method", "residual_adapter"]
    command += ["--corpus", args.corpus, "--model_name_or_path", str(base), "--output_dir", str(folder)]
    command += ["--eval_speakers", held_out] + (["--data_dir", args.data_dir] if args.data_dir else [])
    command += [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    print("$", " ".join(command), flush=True)
    if code := subprocess.run(command).returncode:
        sys.exit(code)


def classify(folder: Path, dataset) -> Iterator[tuple[str, str, list[dict]]]:
    """Each clip's file name, label and scores, by transformers' own pipeline on the adapter repo."""
    classifier = pipeline("audio-classification", model=str(folder), device="cpu")
    names = dataset.features["label"].names
    for row in tqdm(dataset, desc="classifying unseen speakers", unit="clip"):
        answer = classifier(load_audio(row["audio"]["path"]), top_k=len(names))
        yield Path(row["audio"]["path"]).stem, names[row["label"]], answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", default="toy")
    parser.add_argument("--data_dir")
    parser.add_argument("--base", default="resnet20", choices=BASES, help="the speaker-trained network")
    parser.add_argument("--held_out", help="speakers to classify afterwards: a,b")
    parser.add_argument("--output_dir", default="out/demo")
    args = parser.parse_args()
    with readable_errors():
        dataset = load_corpus(args.corpus, data_dir=args.data_dir)
    speakers = sorted(set(speakers_of(dataset)))
    held_out = args.held_out or HELD_OUT.get(args.corpus) or ",".join(speakers[-2:])
    folder = Path(args.output_dir, f"s2e-{args.corpus}")
    adapt(args, held_out, folder)

    unseen = set(split_names(held_out))
    rows = list(classify(folder, dataset.filter(lambda speaker: speaker in unseen, input_columns="speaker")))
    names = dataset.features["label"].names
    width = max(len(name) for name, _, _ in rows)
    for name, label, answer in rows:
        listed = "  ".join(f"{guess['label']} {guess['score']:.2f}" for guess in answer)
        print(f"{name:{width}}  {label:>10}  {'+' if label == answer[0]['label'] else '-'}  {listed}")
    result = scores(
        np.array([names.index(label) for _, label, _ in rows]),
        np.array([names.index(answer[0]["label"]) for _, _, answer in rows]),
        len(names),
    )
    ua, wa = 100 * result["ua"], 100 * result["wa"]
    print(f"\n{len(rows)} clips of speakers {held_out}, who took no part in the training")
    print(f"UA {ua:.1f} %   WA {wa:.1f} %   ({len(names)} classes, chance: UA {100 / len(names):.1f} %)")
    print(f"The adapter repo is {folder}")
    if args.corpus == "toy":
        print("The toy corpus is synthetic: everything works, which says nothing about real speech.")


if __name__ == "__main__":
    main()
