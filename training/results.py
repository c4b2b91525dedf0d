"""From nothing but a corpus to its table: what `make results` runs.

    python training/results.py --corpus emodb --data_dir DIR [--methods a,b] [--recipe FILE] [--accelerate='FLAGS']

One command after another: training/cross_validate.py; benchmarks/references.py, where the extra `bench` is
installed, and the table again with the references in it; for a folder in results/, training/results_page.py.
The first that fails ends it, with its exit code. Started again it resumes what was stopped. Flags that are not listed
here are cross_validate.py's.
"""

import itertools
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

from transformers import HfArgumentParser

from hf_s2e.evaluation.protocols import default_protocol
from hf_s2e.training.arguments import ProtocolArguments, split_names
from hf_s2e.training.methods import TABLE_METHODS
from hf_s2e.training.recipe import Recipe
from hf_s2e.training.result_folder import TABLE_RUNS, folder_name, portable

ROOT = Path(__file__).resolve().parents[1]
# fields of `Arguments` that are variables of the Makefile; the others are among its CV_FLAGS
VARIABLES = (
    "corpus", "data_dir", "methods", "protocol", "runs", "labels", "recipe", "base", "plain_base", "out", "accelerate",
)  # fmt: skip
# few voices and few steps: every file of a result in a minute or two on two cores, and no result
TOY = {"methods": "fine_tune,residual_adapter", "runs": 1}
TOY_VOICES = '{"num_speakers": 3, "utterances_per_label": 3}'
TOY_FLAGS = ["--max_train_steps", "4", "--per_device_train_batch_size", "16", "--recipe_name", "few-steps"]


@dataclass
class Arguments(ProtocolArguments):
    protocol: str | None = field(default=None, metadata={"help": "by default the corpus' own: emobox6, or loso"})
    methods: str | None = field(default=None, metadata={"help": "by default all of the table"})
    runs: int | None = field(default=None, metadata={"help": f"by default {TABLE_RUNS}"})
    recipe: str | None = field(default=None, metadata={"help": "a YAML file; by default the paper's settings"})
    base: str = field(default=str(ROOT / "hub_cards/s2e-resnet20-adapter"), metadata={"help": "with adapters"})
    plain_base: str = str(ROOT / "hub_cards/s2e-resnet20-plain")
    out: str | None = field(default=None, metadata={"help": "by default results/CORPUS-PROTOCOL-RECIPE"})
    accelerate: str = field(
        default="--num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no",
        metadata={"help": "flags of accelerate launch, in one string"},
    )


def set_defaults(args: Arguments, rest: list[str]) -> list[str]:
    """Fill in what was left open; returns the further flags of cross_validate.py."""
    toy = args.corpus == "toy"
    args.protocol = args.protocol or default_protocol(args.corpus)
    args.methods = args.methods or (TOY["methods"] if toy else ",".join(TABLE_METHODS))
    args.runs = args.runs or (TOY["runs"] if toy else TABLE_RUNS)
    recipe = Path(args.recipe).stem if args.recipe else "few-steps" if toy else "paper"
    if any(flag.startswith("--candidates") for flag in rest):
        recipe = "chosen"
    named = {flag.lstrip("-").partition("=")[0] for flag in rest if flag.startswith("--")}
    if (changed := named & {setting.name for setting in fields(Recipe)}) and not (args.out or toy):
        raise SystemExit(
            f"--{', --'.join(sorted(changed))}: not the recipe {recipe}, so --out must name a folder for it"
        )
    name = folder_name(args.corpus, args.protocol, recipe, split_names(args.labels or ""))
    args.out = args.out or str(ROOT / ("out" if toy else "results") / name)
    if toy and args.corpus_options == "{}":
        args.corpus_options = TOY_VOICES
    return [*TOY_FLAGS, *rest] if toy else rest  # the last of two equal flags counts


def make_command(given: Arguments, rest: list[str]) -> str:
    """The `make results` line that says the same, as it may be published; $ is make's own sign."""
    changed = {
        one.name: getattr(given, one.name)
        for one in fields(given)
        if one.name == "corpus" or getattr(given, one.name) != one.default
    }
    words = {name: portable(flags(**{name: value}), ROOT) for name, value in changed.items()}
    variables = {name.upper(): words.pop(name)[-1] for name in VARIABLES if name in words}
    variables["CV_FLAGS"] = shlex.join([*itertools.chain(*words.values()), *portable(rest, ROOT)])
    said = [f"{name}={shlex.quote(value.replace('$', '$$'))}" for name, value in variables.items() if value]
    return " ".join(["make results", *said])


def flags(**values) -> list[str]:
    """`--name value` for what is set, `--name` for what is True."""
    pairs = [[f"--{name}"] if value is True else [f"--{name}", str(value)] for name, value in values.items() if value]
    return [part for pair in pairs for part in pair]


def missing_for_references() -> str | None:
    """Why the references cannot be run here; None where they can."""
    command = [sys.executable, "-c", "import opensmile, resemblyzer, sklearn"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return None
    return f"{done.stderr.strip().splitlines()[-1]} (pip install 'hf-s2e[bench]')"


def run(*command: str) -> None:
    print("$", shlex.join(command), flush=True)
    if code := subprocess.run(command).returncode:
        sys.exit(code)


def main(argv: list[str] | None = None) -> None:
    parser = HfArgumentParser(Arguments, description=__doc__, allow_abbrev=False)
    args, rest = parser.parse_args_into_dataclasses(args=argv, return_remaining_strings=True)
    command = make_command(args, rest)
    rest = set_defaults(args, rest)
    # accelerate gives a process one thread, unless told otherwise
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))

    shared = {one.name: getattr(args, one.name) for one in fields(ProtocolArguments)}
    decode = flags(decode=shared.pop("decode"))  # the references need the decoded corpus
    corpus = flags(**shared, output_dir=args.out)
    # --quiet: of a failure, the script's own message
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", *shlex.split(args.accelerate)]
    bases = {"model_name_or_path": args.base, "plain_model_name_or_path": args.plain_base}
    validate = [*launch, str(ROOT / "training/cross_validate.py"), *corpus, *decode]
    validate += [*flags(methods=args.methods, runs=args.runs, recipe=args.recipe, **bases), *rest, "--command", command]
    run(*validate)

    missing = "the voices are made up" if args.corpus == "toy" else missing_for_references()
    if missing:
        print(f"The references were left out: {missing}", flush=True)
    else:
        run(sys.executable, str(ROOT / "benchmarks/references.py"), *corpus)
        run(*validate, "--report_only")

    results = ROOT / "results"
    if results in Path(args.out).resolve().parents:
        page = ["--results", str(results), "--output", str(ROOT / "docs/results.md")]
        run(sys.executable, str(ROOT / "training/results_page.py"), *page)
    print(f"The table is {args.out}/table.md")
    if args.corpus == "toy":
        print(
            "The toy corpus is synthetic and its trainings last a few steps: all works, and the numbers mean nothing."
        )


if __name__ == "__main__":
    main()
