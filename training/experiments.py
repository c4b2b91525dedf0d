"""The paper's comparison, other bases, and the choice among recipes, most telling first: `make experiments`.

    python training/experiments.py --data_dir DATA [--accelerate='FLAGS'] [--only emodb,plus] [--dry_run]

DATA holds the corpora as folders `emodb`, `ravdess` and `speechocean762`, and, for the stronger base,
`speakers_extra/commonvoice` and `speakers_extra/dspspeech20`. What is finished is kept, so that it can be stopped at
any time and resumed. Hours on a GPU; on two cores one method takes two to three hours for one leave-one-speaker-out run
of EmoDB, and everything many days.
"""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from hf_s2e.evaluation.protocols import default_protocol
from hf_s2e.training.checkpoints import finished_checkpoints
from hf_s2e.training.methods import MAIN_METHODS, METHODS, TABLE_METHODS
from hf_s2e.training.result_folder import folder_name

ROOT = Path(__file__).resolve().parents[1]
BASES = Path("out/bases")
RECIPES = Path("training/recipes")
CANDIDATES = ("paper", "crops", "voices", "voices-light", "voices-long", "voices-mixed", "voices-spread", "all")
FOUR = "neutral,angry,happy,sad"
SPEAKERS = {"speechocean762": "speechocean762"}  # corpus -> its folder in DATA
MORE_SPEAKERS = SPEAKERS | {name: f"speakers_extra/{name}" for name in ("commonvoice", "dspspeech20")}


def results(corpus: str, methods: Iterable[str], **flags) -> list[str]:
    flags = {"corpus": corpus, "data_dir": f"DATA/{corpus}", "methods": ",".join(methods), **flags}
    return ["results.py", *(part for name, value in flags.items() for part in (f"--{name}", str(value)))]


def on_bases(kind: str) -> dict[str, Path]:
    return {"base": BASES / f"s2e-{kind}-adapter", "plain_base": BASES / f"s2e-{kind}-plain"}


def pretrain(kind: str, corpora: dict[str, str], *flags: str) -> list[list[str]]:
    """The base with adapters, and the plain one; their Hub names tell them from the released ones."""
    commands, folders = [], ",".join(f"DATA/{folder}" for folder in corpora.values())
    for name, adapters in (("adapter", "--adapters"), ("plain", "--no-adapters")):
        repo = ["--repo_id", f"hf-s2e/s2e-{kind}-{name}", "--output_dir", str(BASES / f"s2e-{kind}-{name}")]
        corpus = ["--corpus", ",".join(corpora), "--data_dir", folders]
        commands.append(["pretrain.py", *corpus, *flags, adapters, *repo])
    return commands


def candidates(corpus: str) -> list[str]:
    files = ",".join(str(RECIPES / "plus" / f"{name}.yaml") for name in CANDIDATES)
    out = f"results/{folder_name(corpus, default_protocol(corpus), 'chosen')}-plus"
    return [*results(corpus, MAIN_METHODS, out=out, **on_bases("plus")), "--candidates", files]


def experiments() -> dict[str, list[list[str]]]:
    """Name -> commands (a script of this folder and its flags), with DATA for the folder of the corpora."""
    recipe = ["--recipe", str(RECIPES / "speakers-plus.yaml")]
    trained = [name for name in TABLE_METHODS if not METHODS[name].from_scratch]  # those that another base changes
    return {
        "emodb": [results("emodb", MAIN_METHODS)],
        "ravdess": [results("ravdess", MAIN_METHODS)],
        "methods": [results("emodb", METHODS), results("ravdess", METHODS)],
        "plus": [*pretrain("plus", MORE_SPEAKERS, *recipe), candidates("emodb"), candidates("ravdess")],
        "folds": [results("emodb", MAIN_METHODS, protocol="5fold"), results("emodb", MAIN_METHODS, labels=FOUR)],
        "fifty": [
            *pretrain("50", SPEAKERS, "--num_speakers", "50"),
            results("emodb", trained, out="results/emodb-loso-paper-50", **on_bases("50")),
            results("ravdess", trained, out="results/ravdess-emobox6-paper-50", **on_bases("50")),
        ],
    }


def finished(command: list[str]) -> bool:
    """A base is trained once, its card is written last; results.py finds out by itself what is missing."""
    return command[0] == "pretrain.py" and (ROOT / command[-1] / "README.md").is_file()


def complete(command: list[str], args: argparse.Namespace) -> list[str]:
    """The command line: as `results.py --accelerate FLAGS`, or through `accelerate launch FLAGS`."""
    script, *flags = command
    flags = [flag.replace("DATA/", f"{args.data_dir.resolve()}/") for flag in flags]
    if script == "results.py":
        return [sys.executable, str(ROOT / "training" / script), *flags, f"--accelerate={args.accelerate}"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", *shlex.split(args.accelerate)]
    begun = finished_checkpoints(ROOT / flags[-1] / "run" / "checkpoints")
    resume = ["--resume_from_checkpoint", "latest"] if begun else []
    return [*launch, str(ROOT / "training" / script), *flags, "--checkpointing_steps", "500", *resume]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--only", help=f"a,b of {', '.join(experiments())}; by default all")
    parser.add_argument("--dry_run", action="store_true", help="print the commands")
    parser.add_argument(
        "--accelerate",
        default="--num_processes 1 --num_machines 1 --mixed_precision bf16 --dynamo_backend inductor",
        help="flags of accelerate launch, in one string",
    )
    args = parser.parse_args(argv)
    known = experiments()
    names = args.only.split(",") if args.only else list(known)
    if unknown := set(names) - set(known):
        parser.error(f"--only: unknown {sorted(unknown)}; known are {', '.join(known)}")
    for name in names:
        for command in known[name]:
            if finished(command):
                print(f"{name}: {command[-1]} is there")
                continue
            line = complete(command, args)
            print(f"{name}: {shlex.join(line)}", flush=True)
            if not args.dry_run and (code := subprocess.run(line, cwd=ROOT).returncode):
                sys.exit(code)


if __name__ == "__main__":
    main()
