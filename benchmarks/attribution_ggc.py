"""Time guided Grad-CAM: captum's in two passes, and ours in one.

python3 benchmarks/attribution_ggc.py          # a small volume, a minute
python3 benchmarks/attribution_ggc.py --full   # modelA24 at 193×229×193
"""

import argparse

import measuring
import plain

import attribution

TARGET = 1


def plain_way(model, volume):
    """Return captum's guided Grad-CAM."""
    return plain.guided_gradcam(model, volume, TARGET)


def our_way(model, volume):
    """Return ours."""
    return attribution.guided_gradcam(model, volume, TARGET)


def main(args: argparse.Namespace) -> None:
    """Print the table."""
    measuring.compare(args, "GGC", (plain_way, our_way))


if __name__ == "__main__":
    main(measuring.parse(measuring.make_parser(__doc__)))
