"""How the index of a corpus grows: files per second and memory, on generated trees of tiny files.

    python benchmarks/corpus_index.py [--sizes 1000 10000 100000] [--json results.json]

Each tree has VoxCeleb2's layout (50 utterances a speaker, 5 a video); the files are hard links. Every figure
comes from a fresh process: `first` builds the index, `cached` finds it again (which lists the tree to see
that nothing changed), `50 spk` draws 50 speakers before listing. `+MiB` is the peak resident memory above
that of the process before it began; it includes the index file (`index`, MiB), which is mapped, not loaded.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

UTTERANCES, VIDEOS = 50, 10  # per speaker
LINKS = 10_000  # hard links to one file: file systems allow some 65,000


def make_tree(root: Path, files: int, content: bytes = b"\0" * 44, ending: str = "m4a") -> None:
    source = None
    for number in range(files):
        speaker, utterance = divmod(number, UTTERANCES)
        folder = root / f"dev/aac/id{speaker:05d}" / f"video{utterance % VIDEOS}"
        if utterance < VIDEOS:
            folder.mkdir(parents=True)
        path = folder / f"{utterance // VIDEOS:05d}.{ending}"
        if number % LINKS == 0:
            source = path
            path.write_bytes(content)
        else:
            os.link(source, path)


def measure(root: str, cache: str, options: dict) -> dict:
    """Load the corpus in this process: rows, seconds, and how far the peak memory rose."""
    import datasets

    from hf_s2e.corpora import load_corpus

    datasets.disable_progress_bars()
    warnings.simplefilter("ignore")  # the counts differ from VoxCeleb2's, of course
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    corpus = load_corpus("voxceleb2", root, cache_dir=cache, strict=False, **options)
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    index = sum(os.path.getsize(file["filename"]) for file in corpus.cache_files) / 2**20
    return {"rows": len(corpus), "seconds": seconds, "peak_mib": (after - before) / 1024, "index_mib": index}


def in_fresh_process(root: Path, cache: Path, options: dict) -> dict:
    command = [sys.executable, __file__, "--measure", str(root), str(cache), json.dumps(options)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        root, cache, options = arguments.measure
        print(json.dumps(measure(root, cache, json.loads(options))))
        return
    figures = []
    print(f"{'files':>9}  {'run':8}{'rows':>9}{'seconds':>9}{'files/s':>9}{'+MiB':>8}{'index':>8}")
    for files in arguments.sizes:
        with tempfile.TemporaryDirectory() as folder:
            root, cache = Path(folder) / "VoxCeleb2", Path(folder) / "cache"
            make_tree(root, files)
            runs = {"first": {}, "cached": {}, "50 spk": {"num_speakers": min(50, files // UTTERANCES)}}
            for run, options in runs.items():
                figure = {"files": files, "run": run, **in_fresh_process(root, cache, options)}
                rate = figure["rows"] / figure["seconds"]
                figures.append(figure)
                print(
                    f"{files:9,}  {run:8}{figure['rows']:9,}{figure['seconds']:9.2f}{rate:9,.0f}"
                    f"{figure['peak_mib']:8.1f}{figure['index_mib']:8.1f}"
                )
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
