"""Networks trained one after the other share what torch.compile made of the first."""

import os
import subprocess
import sys

from conftest import ROOT

SCRIPT = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from torch._dynamo.utils import counters
from training_tools import Workbench
from hf_s2e.training.recipe import Recipe

work = Workbench(Path(sys.argv[1]))
recipe = Recipe(num_train_epochs=1, per_device_train_batch_size=5)
for seed in range(3):
    work.train(recipe=recipe, seed=seed, alone=True, max_train_steps=2)
    print(counters["stats"]["unique_graphs"])
"""


def test_a_second_network_is_not_compiled_anew(tmp_path):
    environment = os.environ | {"ACCELERATE_DYNAMO_BACKEND": "EAGER", "ACCELERATE_MIXED_PRECISION": "bf16"}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), str(ROOT / "tests"), str(ROOT)],
        env=environment | {"ACCELERATE_USE_CPU": "true"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    graphs = [int(line) for line in result.stdout.split() if line.isdigit()]
    assert len(graphs) == 3 and graphs[0] >= 1
    assert graphs[0] == graphs[1] == graphs[2]
