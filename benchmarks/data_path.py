"""How the data path of training grows: decoding a corpus once, then segments a second, on one core.

    python benchmarks/data_path.py [--sizes 1000 10000 100000]

Trees of VoxCeleb2's layout with hard links to a wav file of 0.25 s, so that 100,000 files fit on a disk; a
segment of such a file costs the same work as any other, zeros and all. `decode` is files a second into the
store (all cores), `+MiB` how far the peak memory rose during that, `cut` segments a second read out of the
store in the order of an epoch, `front end` the same with spectrograms, `lazy` segments a second that one
worker decodes where nothing is stored (`--decode lazily`). Baseline: segments a second that the plain network
learns from on one core in fp32, in the same run. The last lines give one core's decoding of AAC as VoxCeleb2
has it, and what a GPU of 4,000 segments a second asks for.
"""

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

from corpus_index import make_tree

SECONDS, RATE = 0.25, 16_000
BATCH, BATCHES = 64, 30
GPU_SEGMENTS = 4_000  # a second
SPEECH = 8.0  # seconds, as VoxCeleb2's utterances last on average


def noise(seconds: float):
    import numpy as np

    return np.random.default_rng(0).normal(0, 0.1, int(seconds * RATE)).astype(np.float32)


def wav_file() -> bytes:
    import soundfile

    with io.BytesIO() as file:
        soundfile.write(file, noise(SECONDS), RATE, format="WAV")
        return file.getvalue()


def aac_file(path: Path) -> None:
    import av

    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray(noise(SPEECH)[None], format="fltp", layout="mono")
        frame.rate = RATE
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def rate(job, count: int) -> float:
    """`count` things a second, for a job that does so many."""
    job()
    start = time.perf_counter()
    job()
    return count / (time.perf_counter() - start)


def measure(root: str, cache: str) -> dict[str, float]:
    """The figures of one tree, in this process."""
    import datasets
    import torch

    from hf_s2e import S2EFrontEnd
    from hf_s2e.corpora import load_corpus
    from hf_s2e.training.data import Features, SegmentDataset, ShuffledBatches, Task
    from hf_s2e.training.lazy_store import LazyStore
    from hf_s2e.training.recipe import Recipe
    from hf_s2e.training.wave_store import WaveStore

    datasets.disable_progress_bars()
    warnings.simplefilter("ignore")  # the counts differ from VoxCeleb2's, of course
    torch.set_num_threads(1)
    corpus = load_corpus("voxceleb2", root, cache_dir=cache, strict=False)
    before, start = peak_mib(), time.perf_counter()
    store = WaveStore.build(corpus, cache, progress=False)
    figures = {"decode": len(corpus) / (time.perf_counter() - start), "mib": peak_mib() - before}
    task = Task(store, list(corpus["label"]), range(len(corpus)), S2EFrontEnd())
    segments = SegmentDataset(store, task.labels, task.utterances, task.front_end)
    spectrograms = Features(task, Recipe(), torch.device("cpu"))
    front_end = task.front_end

    def epoch(batches, work):
        for indices, _ in zip(ShuffledBatches(segments.labels, BATCH, seed=0), range(batches)):
            batch = segments.__getitems__(indices)
            work(batch["utterance"], batch["start"])

    def cut(utterances, starts):
        store.cut(utterances, starts - front_end.context, front_end.segment_samples)

    few = min(BATCHES, len(segments) // BATCH)
    figures["cut"] = rate(lambda: epoch(few, cut), few * BATCH)
    figures["front end"] = rate(lambda: epoch(few, spectrograms), few * BATCH)
    lazy = LazyStore(corpus, store.lengths, workers=1)

    def read(utterances, starts):
        lazy.read(utterances, starts - front_end.context, front_end.segment_samples)

    figures["lazy"] = rate(lambda: epoch(few, read), few * BATCH)
    return figures


def peak_mib() -> float:
    """Peak resident memory of this process and of the largest of its workers, in MiB."""
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(resource.getrusage(each).ru_maxrss for each in who) / 1024


def learn() -> float:
    """Segments a second of training on one core."""
    import torch
    import torch.nn.functional as F

    from hf_s2e import S2EConfig, S2EForAudioClassification
    from hf_s2e.training.recipe import Recipe, make_optimizer
    from hf_s2e.training.runtime import keep_freed_memory

    torch.set_num_threads(1)
    keep_freed_memory()  # as the training loop does
    model = S2EForAudioClassification(S2EConfig(adapters=False, num_labels=50)).train()
    optimizer, inputs, labels = make_optimizer(model, Recipe()), torch.rand(16, 400, 200), torch.arange(16)

    def step():
        F.cross_entropy(model(input_values=inputs).logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return rate(step, 16)


def decode_aac() -> float:
    """Milliseconds that one core takes for an utterance of VoxCeleb2's usual length and format."""
    from hf_s2e.audio import load_audio

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "speech.m4a")
        aac_file(path)
        return 1000 / rate(lambda: [load_audio(str(path)) for _ in range(20)], 20)


def main() -> None:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(*arguments.measure)))
        return
    baseline = learn()
    print(f"training on one core: {baseline:.1f} segments/s (baseline of the ratios); {os.cpu_count()} cores")
    columns = f"{'decode':>10}{'+MiB':>8}{'cut':>9}{'ratio':>8}{'front end':>11}{'ratio':>8}{'lazy':>9}{'ratio':>8}"
    print(f"{'files':>9}{columns}", flush=True)
    for files in arguments.sizes:
        with tempfile.TemporaryDirectory() as folder:
            make_tree(Path(folder, "VoxCeleb2"), files, wav_file(), "wav")
            command = [sys.executable, __file__, "--measure", f"{folder}/VoxCeleb2", f"{folder}/cache"]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        of = json.loads(done.stdout.splitlines()[-1])
        print(
            f"{files:9,}{of['decode']:10,.0f}{of['mib']:8.0f}{of['cut']:9,.0f}{of['cut'] / baseline:8.0f}"
            f"{of['front end']:11,.0f}{of['front end'] / baseline:8.0f}"
            f"{of['lazy']:9,.0f}{of['lazy'] / baseline:8.0f}",
            flush=True,
        )
    aac = decode_aac()
    hours = 1_092_009 * aac / 3.6e6
    print(f"decoding {SPEECH:.0f} s of AAC: {aac:.1f} ms a file on one core; VoxCeleb2, once: {hours:.1f} h")
    print(f"a GPU of {GPU_SEGMENTS:,} segments/s asks for")
    print("  the order of an epoch only, where the audio fits into its memory (up to 4 GiB, 37 h)")
    megabytes = GPU_SEGMENTS * 64e3 / 1e6
    print(f"  {GPU_SEGMENTS / of['cut']:.1f} cores that cut and {megabytes:.0f} MB/s, from a store on disk")
    print(f"  {GPU_SEGMENTS * aac / 1000:.0f} cores that decode AAC anew for every segment, with no store")


if __name__ == "__main__":
    main()
