"""Segments of 2 s per second through both backbones, in one run: training an adapter, and answering with it.

    python benchmarks/backbones.py [--batch_size 32] [--steps 5] [--threads 1,2] [--output FILE]

Every ratio is to the paper's ResNet20 in the same precision and with as many threads. Random weights: speed does not
depend on them.
"""

import argparse
import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from hf_s2e import S2EConfig, S2EForAudioClassification
from hf_s2e.training.runtime import keep_freed_memory

LABELS = [f"class_{i}" for i in range(7)]
BACKBONES = ("resnet20", "campplus")
WHAT = ("training", "inference", "inference, fused")


def network(backbone: str) -> S2EForAudioClassification:
    model = S2EForAudioClassification(S2EConfig(backbone=backbone))
    model.add_adapter("domain", LABELS, pooling="mean_std")
    return model


def steps_of(backbone: str, batch_size: int) -> dict[str, Callable[[], object]]:
    """What is timed: a training step, and forward passes of the network as it is and fused."""
    learner, model = network(backbone), network(backbone).eval()
    learner.train_adapter("domain")
    optimizer = torch.optim.SGD([p for p in learner.parameters() if p.requires_grad], lr=1e-3)
    fused = model.fuse("domain").eval()
    inputs = torch.rand(batch_size, model.config.num_bins, model.config.frames_per_segment)
    labels = torch.arange(batch_size) % len(LABELS)

    def train() -> None:
        optimizer.zero_grad()
        learner(input_values=inputs, labels=labels).loss.backward()
        optimizer.step()

    return dict(zip(WHAT, (train, lambda: answer(model, inputs), lambda: answer(fused, inputs))))


@torch.inference_mode()
def answer(model: S2EForAudioClassification, inputs: torch.Tensor) -> torch.Tensor:
    return model(input_values=inputs).logits


def seconds(step: Callable[[], object], steps: int) -> float:
    """The fastest of so many, after one to warm up."""
    step()
    times = []
    for _ in range(steps):
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    return min(times)


def measure(args: argparse.Namespace) -> Iterator[dict]:
    for threads in map(int, args.threads.split(",")):
        torch.set_num_threads(threads)
        for bf16 in (False, True):
            found: dict[str, dict[str, float]] = {}
            for backbone in BACKBONES:
                with torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext():
                    steps = steps_of(backbone, args.batch_size)
                    found[backbone] = {
                        what: args.batch_size / seconds(step, args.steps) for what, step in steps.items()
                    }
            for what in WHAT:
                speeds = {backbone: round(found[backbone][what], 1) for backbone in BACKBONES}
                ratio = round(found["campplus"][what] / found["resnet20"][what], 2)
                yield {
                    "threads": threads,
                    "precision": "bf16" if bf16 else "fp32",
                    "what": what,
                    **speeds,
                    "ratio": ratio,
                }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--output", type=Path, help="a JSON file for the result")
    args = parser.parse_args(argv)
    keep_freed_memory()  # as the training loop does on a CPU
    rows = []
    print("| threads | precision | what | ResNet20 | CAM++ | ratio |\n|---|---|---|---|---|---|")
    for row in measure(args):
        rows.append(row)
        print(f"| {' | '.join(map(str, row.values()))} |", flush=True)
    if args.output:
        result = {"batch_size": args.batch_size, "torch": torch.__version__, "rows": rows}
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
