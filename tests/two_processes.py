"""Trains together with the other processes of torchrun; training/test_scripts.py looks at what it saves.

torchrun --nproc_per_node 2 tests/two_processes.py FOLDER OUT
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from training_tools import Workbench, train_parts

if __name__ == "__main__":
    torch.set_num_threads(1)
    work, out = Workbench(Path(sys.argv[1])), Path(sys.argv[2])
    for name, parts in {"frozen": ("alpha", "fc"), "learning": ("alpha", "bn", "fc")}.items():
        accelerator = Accelerator()
        model, history = train_parts(work, accelerator, parts, batch_size=4)
        if accelerator.is_main_process:
            torch.save({"tensors": model.state_dict(), "history": history}, out / f"{name}.pt")
        del model
    accelerator.end_training()
