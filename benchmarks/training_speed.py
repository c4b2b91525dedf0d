"""Segments per second of training: data path alone, network alone, both; as ratios to the plain loop in fp32.

    python benchmarks/training_speed.py [--batch_size 64] [--steps 40] [--loop] [--profile] [--output FILE]

Baseline of every ratio: eager fp32 training by the first of `--methods` (plain: everything learns), in the same run.
On a GPU, bf16 autocast and torch.compile are measured beside it; on a CPU bf16 (fast where it has AVX512-BF16 or
AMX) and what keeping freed memory is worth. `--loop` adds the training loop of the scripts, with accelerate,
shuffling, schedule and progress bar: its second epoch, so that compiling does not count.
"""

import argparse
import contextlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import TorchDynamoPlugin

from hf_s2e import S2EConfig, S2EForAudioClassification, S2EFrontEnd
from hf_s2e.training.data import Features, Task
from hf_s2e.training.loop import train
from hf_s2e.training.recipe import Recipe, make_optimizer
from hf_s2e.training.runtime import keep_freed_memory
from hf_s2e.training.wave_store import WaveStore

LABELS = [f"class_{i}" for i in range(7)]
METHODS = ("plain", "pretrain", "residual_adapter", "bn_only")
COLUMNS = ("method", "precision", "variant", "data", "network", "both", "loop", "ratio")
KEPT = "kept memory"


def network(method: str) -> S2EForAudioClassification:
    """A randomly initialised network with the trained part of a method; speed does not depend on the weights."""
    model = S2EForAudioClassification(S2EConfig(adapters=method != "plain", num_labels=len(LABELS)))
    if method in ("residual_adapter", "bn_only"):
        model.add_adapter("domain", LABELS)
        model.train_adapter("domain", parts=("alpha", "bn", "fc") if method == "residual_adapter" else ("bn", "fc"))
    return model.train()


def synthetic_task(seconds: int = 600) -> Task:
    waves = torch.randint(-3000, 3000, (seconds * 16_000,), dtype=torch.int16)
    lengths = torch.full((seconds // 4,), 64_000)
    store = WaveStore(waves, lengths.cumsum(0) - lengths, lengths)
    return Task(store, [0] * len(lengths), range(len(lengths)), S2EFrontEnd())


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(step, steps: int, device: torch.device) -> float:
    """Seconds a step, after three to warm up."""
    for _ in range(3):
        step()
    synchronize(device)
    started = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize(device)
    return (time.perf_counter() - started) / steps


class Trainer:
    """One configuration: data path, forward, backward, optimiser."""

    def __init__(self, method: str, args, device: torch.device, *, bf16: bool, compiled: str | None):
        self.device, self.size, self.bf16 = device, args.batch_size, bf16
        self.model = network(method).to(device)
        self.optimizer = make_optimizer(self.model, Recipe())
        self.forward = torch.compile(self.model, mode=compiled) if compiled and device.type == "cuda" else self.model
        self.spectrograms = Features(synthetic_task(), Recipe(), device)
        generator = torch.Generator().manual_seed(0)
        self.utterances = torch.randint(0, 150, (self.size,), generator=generator).to(device)
        self.starts = torch.randint(0, 2, (self.size,), generator=generator).to(device) * 16_000
        self.labels = torch.randint(0, len(LABELS), (self.size,), generator=generator).to(device)
        self.inputs = self.data()

    def data(self) -> torch.Tensor:
        return self.spectrograms(self.utterances, self.starts)

    def learn(self, inputs: torch.Tensor | None = None) -> None:
        inputs = self.inputs if inputs is None else inputs
        precision = torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else contextlib.nullcontext()
        with precision:
            logits = self.forward(input_values=inputs).logits
        F.cross_entropy(logits, self.labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def both(self) -> None:
        self.learn(self.data())


def loop_speed(method: str, args, device: torch.device, *, bf16: bool, compiled: str | None) -> float:
    """Segments per second of `train`, as every script calls it."""
    AcceleratorState._reset_state(True)  # it lives as long as the process, with one precision
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="bf16" if bf16 else "no",
        dynamo_plugin=TorchDynamoPlugin(backend="inductor", mode=compiled)
        if compiled and device.type == "cuda"
        else None,
    )
    task = synthetic_task(seconds=4 * math.ceil(args.steps * args.batch_size / 3))  # 3 segments every 4 s
    recipe = Recipe(num_train_epochs=2, per_device_train_batch_size=args.batch_size)
    independent = method != "pretrain"  # as cross_validate.py trains; pretrain.py goes through accelerator.prepare
    history = train(accelerator, network(method), task, recipe, description=method, independent=independent)
    return history[-1]["segments_per_second"]


def profile(trainer: Trainer) -> None:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    activity = ProfilerActivity.CUDA if trainer.device.type == "cuda" else ProfilerActivity.CPU
    with profiler(activities=[activity]) as result:
        for _ in range(5):
            trainer.both()
        synchronize(trainer.device)
    order = f"self_{trainer.device.type}_time_total"
    print(result.key_averages().table(sort_by=order, row_limit=22, max_name_column_width=70))


def variants(args, device: torch.device) -> list[tuple[bool, str | None]]:
    """Whether in bf16, and compiled in which mode or what else is different."""
    if device.type == "cpu":
        return [(False, None), (False, KEPT), (True, KEPT)]
    return [(False, None), (True, None), *((True, mode) for mode in args.compile_modes.split(",") if mode)]


def measure_all(args, device: torch.device) -> Iterator[dict]:
    """A row for each precision, variant and method: segments per second, and the ratio to the first row."""
    baseline = None
    for bf16, variant in variants(args, device):
        if variant == KEPT:
            keep_freed_memory()  # as the training loop does on a CPU
        for method in args.methods.split(","):
            how = {"bf16": bf16, "compiled": variant}
            trainer = Trainer(method, args, device, **how)
            row = {"method": method, "precision": "bf16" if bf16 else "fp32", "variant": variant or "eager"}
            for name, step in (("data", trainer.data), ("network", trainer.learn), ("both", trainer.both)):
                row[name] = round(args.batch_size / measure(step, args.steps, device), 1)
            if args.loop and (device.type == "cuda" or variant == KEPT):  # on a CPU the loop keeps freed memory
                row["loop"] = round(loop_speed(method, args, device, **how), 1)
            baseline = baseline or row["both"]
            yield row | {"ratio": round(row["both"] / baseline, 2)}
            if args.profile:
                profile(trainer)
            torch.compiler.reset()


def table_row(values) -> str:
    return "| " + " | ".join("" if value is None else str(value) for value in values) + " |"


def markdown(result: dict) -> str:
    """The measurement as a table, with what it was measured on."""
    columns = [name for name in COLUMNS if any(name in row for row in result["rows"])]
    lines = [table_row(columns), "|---" * len(columns) + "|"]
    lines += [table_row(row.get(name) for name in columns) for row in result["rows"]]
    about = f"{result['device']}, {result['threads']} threads, batch {result['batch_size']}, torch {result['torch']}"
    return "\n".join([*lines, "", f"Segments per second on: {about}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--compile_modes", default="default")
    parser.add_argument("--loop", action="store_true", help="also the training loop of the scripts")
    parser.add_argument("--profile", action="store_true", help="also print where the time goes")
    parser.add_argument("--output", type=Path, help="a JSON file for the result")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    result = {"device": name, "threads": torch.get_num_threads(), "batch_size": args.batch_size}
    result |= {"torch": torch.__version__, "rows": []}
    for row in measure_all(args, device):
        print(table_row(f"{name} {value}" for name, value in row.items()), flush=True)
        result["rows"].append(row)
    print(f"\n{markdown(result)}")
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
