"""Time LRP: captum with library kernels, and ours.

python3 benchmarks/attribution_lrp.py          # a small volume, a minute
python3 benchmarks/attribution_lrp.py --full   # modelA24 at 193×229×193
"""

import argparse

import measuring
import plain

import attribution

TARGET = 1


def plain_way(model, volume):
    """Return captum's LRP, in two passes."""
    return plain.lrp(model, volume, TARGET)


def our_way(model, volume):
    """Return ours."""
    return attribution.lrp(model, volume, TARGET)


def main(args: argparse.Namespace) -> None:
    """Print the table."""
    measuring.compare(args, "LRP", (plain_way, our_way))


if __name__ == "__main__":
    main(measuring.parse(measuring.make_parser(__doc__)))
