"""Time integrated gradients: captum's, every step a whole pass, and ours.

python3 benchmarks/attribution_ig.py          # a small volume and few steps, minutes
python3 benchmarks/attribution_ig.py --full   # modelA24 at 193×229×193; half an hour

captum's time is proportional to its steps, so both ways take few; with --full ours alone takes the
paper's 100, too. --steps 100 has both take them.
"""

import argparse
import functools

import measuring
import plain

import attribution

TARGET = 1
STEPS = 10
PAPER_STEPS = 100
BRIEF_STEPS = 3  # what one step needs is given back before the next


def plain_way(model, volume, n_steps):
    """Return captum's integrated gradients."""
    return plain.integrated_gradients(model, volume, TARGET, n_steps)


def our_way(model, volume, n_steps):
    """Return ours."""
    return attribution.integrated_gradients(model, volume, TARGET, n_steps)


def main(args: argparse.Namespace) -> None:
    """Print the tables."""

    def ways(n_steps):
        return tuple(functools.partial(way, n_steps=n_steps) for way in (plain_way, our_way))

    measuring.compare(args, f"IG, {args.steps} steps", ways(args.steps), ways(BRIEF_STEPS))
    if args.full:
        _, ours = ways(PAPER_STEPS)
        measuring.measure_alone(args, f"IG, {PAPER_STEPS} steps", ours)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = measuring.make_parser(__doc__)
    parser.add_argument("--steps", type=int, default=STEPS, help="default: 10")
    return measuring.parse(parser, argv)


if __name__ == "__main__":
    main(parse_args())
