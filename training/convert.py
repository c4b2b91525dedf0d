"""Turn a speaker-trained ResNet20 with the tensor names below into a base repo of this package.

    python training/convert.py CHECKPOINT.safetensors OUTPUT_DIR --repo_id NAMESPACE/NAME [--labels FILE]

Tensors of the checkpoint: `stem.conv7x7.weight`, `stem.bn.*`,
`stage{1..3}.block{1..3}.conv{1,2}.{shared3x3,alpha1x1,bn}.*`, `fc.*`. A checkpoint without `alpha1x1` is the
plain network. Nothing is changed but the names.
"""

import argparse
import re
from pathlib import Path

import torch
from safetensors.torch import load_file

from hf_s2e import S2EConfig, S2EForAudioClassification

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
    """The checkpoint's tensors, unchanged, in a model of this package."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--repo_id", required=True, help="the Hub id under which the base will be published")
    parser.add_argument("--labels", type=Path, help="a file with one class name a line, in the order of the logits")
    args = parser.parse_args()
    labels = args.labels.read_text(encoding="utf-8").split("\n") if args.labels else None
    model = convert(args.checkpoint, [label for label in labels if label] if labels else None, args.repo_id)
    model.save_pretrained(args.output_dir)
    print(f"{args.output_dir}: {len(model.config.id2label)} speakers, fingerprint {model.base_fingerprint}")


if __name__ == "__main__":
    main()
