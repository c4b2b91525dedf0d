"""What many domains over one resident base cost: memory, switching, loading from the Hub's cache.

    python benchmarks/adapters.py [--adapters 50]

Everything runs on the CPU, against the Hub on localhost of the tests, so that loading from the cache is
measured as a server would see it: with the Hub answering (only whether something changed), and offline. The
baseline of each line is the same job with whole networks in place of adapters, in the same run.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
LABELS = ["neutral", "calm", "happy", "sad", "angry", "fearful", "disgusted", "surprised"]
GOALS = {"memory": 0.66, "switch": 5.0, "load": 150.0}  # MB an adapter, ms, ms


def resident_mb() -> float:
    """Resident memory of this process in MB (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def milliseconds(job, times: int) -> float:
    """Median duration of a job."""
    durations = []
    for turn in range(times):
        start = time.perf_counter()
        job(turn)
        durations.append(1000 * (time.perf_counter() - start))
    return statistics.median(durations)


def tensor_mb(model) -> float:
    return sum(tensor.nbytes for tensor in model.state_dict().values()) / 1e6


def line(what: str, value: str, baseline: str, ratio: float, goal: str = "") -> None:
    print(
        f"{what:<42} {value:>12}   whole networks {baseline:>12}   {ratio:7.1f} times less   {goal}",
        flush=True,
    )


def measure(count: int, folder: Path) -> bool:
    from huggingface_hub import constants

    from hf_s2e import S2EConfig, S2EForAudioClassification
    from hf_s2e.hub import pull, push

    base = S2EForAudioClassification(S2EConfig(num_labels=250, repo_id="hf-s2e/base"))
    base.save_pretrained(folder / "base")
    base = S2EForAudioClassification.from_pretrained(folder / "base")
    base.add_adapter("one", labels=LABELS)
    base.save_adapter(folder / "one", "one")
    push([folder / "one"], "me")
    pull("me/one")

    network = milliseconds(lambda _: S2EForAudioClassification.from_pretrained("me/base"), 5)
    model = S2EForAudioClassification.from_pretrained("me/base")
    before, base_mb = resident_mb(), tensor_mb(model)
    model.load_adapter("me/one", "warm")
    online = milliseconds(lambda turn: model.load_adapter("me/one", f"online{turn}"), 10)
    constants.HF_HUB_OFFLINE = True
    offline = milliseconds(lambda turn: model.load_adapter("me/one", f"domain{turn}"), count - 11)
    used, tensors = resident_mb() - before, tensor_mb(model)
    names = model.adapter_names
    switch = milliseconds(lambda turn: model.set_adapter(names[turn % count]), 500)

    whole, memory_goal = count * base_mb, base_mb + count * GOALS["memory"]
    goal = f"goal: {memory_goal:.0f} MB"
    line(f"tensors: base + {count} adapters", f"{tensors:.1f} MB", f"{whole:.0f} MB", whole / tensors, goal)
    line(f"resident memory of {count} adapters", f"{used:.1f} MB", f"{whole:.0f} MB", whole / used)
    line("switch", f"{switch:.3f} ms", f"{network:.1f} ms", network / switch, f"goal: {GOALS['switch']} ms")
    line("load from the cache, the Hub answering", f"{online:.1f} ms", f"{network:.1f} ms", network / online,
         f"goal: {GOALS['load']} ms")  # fmt: skip
    line("load from the cache, offline", f"{offline:.1f} ms", f"{network:.1f} ms", network / offline)
    return tensors <= memory_goal and switch <= GOALS["switch"] and online <= GOALS["load"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=50)
    count = parser.parse_args().adapters
    if count < 12:
        parser.error("--adapters: at least 12, of which 11 are loaded with the Hub answering")
    from local_hub import LocalHub

    with LocalHub() as hub, tempfile.TemporaryDirectory() as folder:
        # before huggingface_hub is imported
        os.environ |= {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": hub.token, "HF_HOME": f"{folder}/home"}
        os.environ |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        met = measure(count, Path(folder))
    print("goals met" if met else "goals missed")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
