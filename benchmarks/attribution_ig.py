"""Time integrated gradients: captum's, every step a whole pass, and ours.

    python3 benchmarks/attribution_ig.py          # a small volume and few steps, minutes
    python3 benchmarks/attribution_ig.py --full   # modelA24 at 193×229×193, 100 steps; an hour

Where two voxels of a pooling window are nearly equal, rounding decides which one wins, in captum's
float32 map as in ours. How far that takes either from captum's map in float64 is shown by

    python3 benchmarks/attribution_ig.py --float64 10 --model modelB24 --shape 94 96 95

for ten random networks and volumes.
"""

import argparse
import functools

import measuring
import plain

import attribution

TARGET = 1
QUICK_STEPS, PAPER_STEPS = 10, 100
BRIEF_STEPS = 3  # what one step needs is given back before the next


def plain_way(model, volume, n_steps):
    """Return captum's integrated gradients."""
    return plain.integrated_gradients(model, volume, TARGET, n_steps)


def our_way(model, volume, n_steps):
    """Return ours."""
    return attribution.integrated_gradients(model, volume, TARGET, n_steps)


def compare_with_float64(args: argparse.Namespace) -> None:
    """Print how far both ways are from captum's map in float64."""
    rows = []
    for seed in range(args.float64):
        model, volume = measuring.make_case(args, seed)
        maps = [way(model, volume, args.steps) for way in (plain_way, our_way)]
        expected = plain_way(model.double(), volume.double(), args.steps)
        both = [measuring.differences(found, expected) for found in maps]
        rows.append([str(seed), *(f"{value:.0e}" for values in both for value in values)])
    names = [f"{way}, {what}" for way in ("captum", "ours") for what in ("largest", "1 − r")]
    measuring.print_table(["from float64: seed", *names], rows)


def main(args: argparse.Namespace) -> None:
    """Print the table."""
    if args.float64:
        compare_with_float64(args)
        return
    ways, brief_ways = (
        [functools.partial(way, n_steps=n_steps) for way in (plain_way, our_way)]
        for n_steps in (args.steps, BRIEF_STEPS)
    )
    measuring.compare(args, f"IG, {args.steps} steps", ways, brief_ways)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = measuring.make_parser(__doc__)
    option = parser.add_argument
    option("--steps", type=int, help="default: 10, with --full 100")
    option("--float64", type=int, default=0, metavar="N", help="networks to hold to float64")
    args = measuring.parse(parser, argv)
    args.steps = args.steps or (PAPER_STEPS if args.full else QUICK_STEPS)
    return args


if __name__ == "__main__":
    main(parse_args())
