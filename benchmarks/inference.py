"""Milliseconds a 2 s segment takes through the network, as ratios to the network as the paper draws it.

    python benchmarks/inference.py [--batch_size 8] [--steps 5]

Baseline, measured in the same run: 3x3 and 1x1 convolution side by side (eq. 3), channels first. Beside it this
package's network, which merges the two kernels (eq. 1), and the fused one without batch norm.
"""

import argparse
import time

import torch
import torch.nn.functional as F

from hf_s2e import S2EConfig, S2EForAudioClassification
from hf_s2e.model import adapter_layers_s2e


def side_by_side(x, shared, alpha, use_shared):
    """Eq. (3) as it stands."""
    x = x.contiguous()
    y = F.conv2d(x, shared.weight, shared.bias, stride=shared.stride, padding=shared.padding)
    return y if alpha is None else y + F.conv2d(x, alpha, stride=shared.stride)


@torch.inference_mode()
def milliseconds(model, inputs: torch.Tensor, steps: int) -> float:
    """A segment's time, the fastest of so many forward passes."""
    model(input_values=inputs)
    times = []
    for _ in range(steps):
        started = time.perf_counter()
        model(input_values=inputs)
        times.append(time.perf_counter() - started)
    return 1000 * min(times) / len(inputs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    model = S2EForAudioClassification(S2EConfig(num_labels=7)).eval()
    inputs = torch.rand(args.batch_size, 400, 200)
    merged = adapter_layers_s2e.adapted_conv
    adapter_layers_s2e.adapted_conv = side_by_side
    baseline = milliseconds(model, inputs, args.steps)
    adapter_layers_s2e.adapted_conv = merged
    print(f"{torch.get_num_threads()} threads, batch {args.batch_size}\n{'network':24} {'ms':>6} {'speed':>6}")
    rows = {
        "side by side (eq. 3)": baseline,
        "merged (eq. 1), as here": milliseconds(model, inputs, args.steps),
        "fused": milliseconds(model.fuse(), inputs, args.steps),
    }
    for name, value in rows.items():
        print(f"{name:24} {value:6.1f} {baseline / value:6.2f}")


if __name__ == "__main__":
    main()
