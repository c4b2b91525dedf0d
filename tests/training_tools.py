"""What the training tests share: a workbench with tiny bases and a toy corpus, and the scripts as modules."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import set_seed
from conftest import ROOT
from tiny import tiny_config

from hf_s2e import S2EForAudioClassification
from hf_s2e.corpora import load_corpus
from hf_s2e.training.data import Task
from hf_s2e.training.inputs import make_task
from hf_s2e.training.loop import train
from hf_s2e.training.methods import METHODS, build_model
from hf_s2e.training.recipe import Recipe
from hf_s2e.training.wave_store import WaveStore

SCRIPTS, BENCHMARKS = ROOT / "training", ROOT / "benchmarks"
TOY = {"num_speakers": 3, "utterances_per_label": 2}  # 24 utterances of 1.5 to 3 s
FRONT_END = {  # segments of 2 s, as in the paper, but 20 bins and 20 frames of them
    "window_length": 640,
    "hop_length": 1600,
    "n_fft": 640,
    "num_bins": 20,
    "segment_length": 32000,
    "segment_hop": 16000,
}
TINY_RUN = {"num_train_epochs": 2, "per_device_train_batch_size": 5}
CPU = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "TQDM_DISABLE": "1"}
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no"]
AUGMENTED = {
    "random_crop": True,
    "freq_mask": 4,
    "time_mask": 4,
    "speed_perturbation": 0.1,
    "noise_snr": 10.0,
    "channel_db": 3.0,
    "mixup": 0.3,
    "label_smoothing": 0.1,
}


def save_base(folder: Path, seed: int = 0, **options) -> None:
    """A tiny speaker-trained network, as pretrain.py would leave it."""
    torch.manual_seed(seed)
    S2EForAudioClassification(tiny_config(**FRONT_END, **options)).save_pretrained(folder)


@dataclass
class Workbench:
    """A folder with the bases `adapter` and `plain`, and the toy corpus."""

    folder: Path

    def __post_init__(self):
        self.adapter, self.plain = str(self.folder / "adapter"), str(self.folder / "plain")
        if not (self.folder / "adapter").is_dir():
            save_base(self.folder / "adapter", repo_id="hf-s2e/adapter")
            save_base(self.folder / "plain", adapters=False, repo_id="hf-s2e/plain")

    def base(self, method: str) -> str:
        return self.adapter if METHODS[method].makes_adapter else self.plain

    @cached_property
    def corpus(self):
        return load_corpus("toy", data_dir=self.folder, cache_dir=str(self.folder / "cache"), **TOY)

    @cached_property
    def store(self) -> WaveStore:
        return WaveStore.build(self.corpus, self.folder / "cache" / "waves", progress=False)

    @property
    def labels(self) -> list[str]:
        return self.corpus.features["label"].names

    def flags(self, **others) -> list[str]:
        """The flags that every script takes; True is a flag without a value."""
        flags = {
            "corpus": "toy",
            "data_dir": self.folder,
            "cache_dir": self.folder / "cache",
            "corpus_options": json.dumps(TOY),
            **others,
        }
        return [part for k, v in flags.items() for part in ([f"--{k}"] if v is True else [f"--{k}", str(v)])]

    def model(self, method: str = "residual_adapter", recipe: Recipe | None = None, seed: int = 0):
        set_seed(seed)
        return build_model(method, self.base(method), "toy", self.labels, recipe or Recipe())

    def task(self, model, rows=None) -> Task:
        return make_task(self.corpus, self.store, range(24) if rows is None else rows, model.config)

    def train(self, method: str = "residual_adapter", recipe: Recipe | None = None, model=None, **options):
        """A trained network, and its history without the times."""
        recipe = recipe or Recipe(**TINY_RUN)
        model = model or self.model(method, recipe)
        history = train(fresh_accelerator(), model, self.task(model), recipe, **options)
        return model, without_speed(history)


def train_parts(work: Workbench, accelerator: Accelerator, parts: tuple[str, ...], batch_size: int):
    """An adapter of which only these parts learn, for two epochs."""
    model = work.model()
    model.train_adapter("toy", parts=parts)
    recipe = Recipe(num_train_epochs=2, per_device_train_batch_size=batch_size)
    return model, without_speed(train(accelerator, model, work.task(model), recipe, seed=5))


def without_speed(history: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "segments_per_second"} for row in history]


def fresh_accelerator(**options) -> Accelerator:
    forget_accelerator()
    return Accelerator(**options)


def forget_accelerator() -> None:
    """Accelerate keeps its state for the process; each training here shall begin with none."""
    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    GradientState._reset_state()


def script(name: str, folder: Path = SCRIPTS):
    """A script as a module, without its folder on the path, where evaluate.py lies."""
    spec = importlib.util.spec_from_file_location(f"{folder.name}_{name}", folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def same_tensors(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def read(file):
    return json.loads(Path(file).read_text(encoding="utf-8"))


def run(command, timeout=240, env=None, **options):
    """What a command prints; it, and all that it started, ends with the time."""
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    process = subprocess.Popen(command, env=CPU | (env or {}), **options)
    try:
        said, errors = process.communicate(timeout=timeout)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    assert process.returncode == 0, errors[-3000:]
    return said
