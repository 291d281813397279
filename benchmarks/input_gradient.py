"""Time the gradient of the first convolution with respect to the volume: library, and ours.

python3 benchmarks/input_gradient.py          # a small volume, seconds
python3 benchmarks/input_gradient.py --full   # modelA24 at 193×229×193
"""

import argparse

import measuring
import plain
import torch

import convolution


@torch.no_grad()
def prepare(model, volume):
    """Return the first convolution's weight and outputs, and the volume's shape."""
    layer = model.features[0]
    return layer.weight, layer(volume), volume.shape


def our_way(weight, outputs, shape):
    """Return the gradient as one convolution over blocks of voxels."""
    return convolution.one_channel_input_gradient(weight, outputs)


def main(args: argparse.Namespace) -> None:
    """Print the table."""
    ways = (plain.input_gradient, our_way)
    measuring.compare(args, "first input gradient", ways, prepare=prepare)


if __name__ == "__main__":
    main(measuring.parse(measuring.make_parser(__doc__)))
