"""Time every method and hold its maps against the plain way: captum's, by library kernels.

    python3 benchmarks/attribution.py                     # a small volume, minutes
    python3 benchmarks/attribution.py --full --only LRP   # modelA24 at 193×229×193; IG: an hour

The unit is one forward pass (eval, no gradient). In each pair a forward pass, the plain way and
ours run in turn in one process; figures are medians over the pairs. Peak memory is what one run
adds to the idle process, measured in a fresh process each. Where zennit is installed, a row has its
LRP in place of the plain way's. zennit gives neurons with one kind of input the weight 1 + β or −β
where ours gives 1, so the maps differ where there are such neurons.
"""

import argparse
import statistics
import sys
import types
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.pop(0)  # this folder: some scripts have names of packages
sys.path.insert(0, str(Path(__file__).parent.parent))

import attribution
from attribution.convolution import one_channel_input_gradient
from benchmarks import measuring, plain

TARGET = 1
QUICK_STEPS, PAPER_STEPS = 10, 100
STEPS_PER_SAMPLE = 4  # IG of 100 steps beside SG of 25 samples
BRIEF_STEPS = 4  # for the memory: what one step needs is given back before the next
BY_ZENNIT = "LRP, zennit as plain"
WORKS = ("LRP", BY_ZENNIT, "IG", "GGC", "SG", "first input gradient")


def zennit_lrp(model: nn.Module, volume: Tensor, target: int) -> Tensor:
    """zennit's LRP by the rules of ours; its max-pooling is left to the gradient."""
    # zennit's own module for torchvision's networks, unused here, would need torchvision
    sys.modules.setdefault("zennit.torchvision", types.ModuleType("zennit.torchvision"))
    from zennit.attribution import Gradient
    from zennit.composites import LayerMapComposite
    from zennit.rules import AlphaBeta, Pass

    beta = attribution.BETA
    rule = AlphaBeta(1 + beta, beta, zero_params="bias")
    composite = LayerMapComposite(
        [((nn.Conv3d, nn.Linear), rule), ((nn.BatchNorm3d, nn.ReLU, nn.Dropout), Pass())]
    )

    def start(logits: Tensor) -> Tensor:
        return logits * (torch.arange(logits.shape[1], device=logits.device) == target)

    with Gradient(model, composite, start) as gradient:
        return gradient(volume.clone())[1]


def both_ways(
    work: str, model: nn.Module, volume: Tensor, n_steps: int
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Return the plain way and ours, from nothing to a map."""
    if work == "first input gradient":
        weight = model.features[0].weight
        with torch.no_grad():
            outputs = model.features[0](volume)
        return (
            lambda: torch.nn.grad.conv3d_input(volume.shape, weight, outputs),
            lambda: one_channel_input_gradient(weight, outputs),
        )
    steps = {"IG": (n_steps,), "SG": (max(1, n_steps // STEPS_PER_SAMPLE),)}.get(work, ())
    name, plainly = ("LRP", zennit_lrp) if work == BY_ZENNIT else (work, plain.METHODS[work])
    methods = plainly, attribution.METHODS[name]
    return tuple(lambda method=method: method(model, volume, TARGET, *steps) for method in methods)


def measure_peak(args: argparse.Namespace, work: str, way: int) -> float:
    """Return the memory in GiB that one way adds; for a fresh process."""
    run = both_ways(work, *measuring.make_case(args), BRIEF_STEPS)[way]
    return measuring.added_gib(args.device, run)


def differences(found: Tensor, expected: Tensor) -> tuple[float, float]:
    """Return the largest difference over the expected map's maximum, and 1 − r."""
    found, expected = found.double().flatten(), expected.double().flatten()
    largest = float((found - expected).abs().max() / expected.abs().max())
    return largest, 1 - float(torch.corrcoef(torch.stack([found, expected]))[0, 1])


def compare(args: argparse.Namespace, work: str) -> list[str]:
    """Return a row of the table."""
    model, volume = measuring.make_case(args)
    ways = both_ways(work, model, volume, args.steps)
    maps: dict[int, Tensor] = {}

    @torch.no_grad()
    def forward() -> None:
        model(volume)

    def run(way: int) -> None:
        maps[way] = ways[way]().detach()

    runs = [forward, lambda: run(0), lambda: run(1)]
    for each in runs if torch.device(args.device).type == "cuda" else [forward]:
        each()  # a GPU's libraries choose their kernels in the first call
    times = [[measuring.seconds(each, args.clock) for each in runs] for _ in range(args.pairs)]
    unit_s, _, ours_s = map(statistics.median, zip(*times, strict=True))
    in_units = [statistics.median(row[column] / row[0] for row in times) for column in (1, 2)]
    ratio = statistics.median(row[1] / row[2] for row in times)
    peaks = [measuring.in_fresh_process(measure_peak, args, work, way) for way in (0, 1)]
    return [work, f"{unit_s:.3g}", *(f"{units:.1f}" for units in in_units), f"{ratio:.1f}",
            f"{ours_s:.3g}", *(f"{peak:.2f}" for peak in peaks),
            *(f"{value:.0e}" for value in differences(maps[1], maps[0]))]  # fmt: skip


def main(args: argparse.Namespace) -> None:
    """Print the table."""
    print(f"{measuring.conditions(args)}, pairs: {args.pairs}, {args.clock} time, ", end="")
    print(f"steps of IG: {args.steps}, a {STEPS_PER_SAMPLE}th as many samples of SG\n")
    if BY_ZENNIT in args.only and not measuring.is_installed("zennit"):
        args.only = [work for work in args.only if work != BY_ZENNIT]
    measuring.print_table(
        ["in forward passes", "one, s", "plain", "ours", "ratio", "ours, s", "peak GiB, plain",
         "peak GiB, ours", "largest difference / maximum", "1 − r"],
        [compare(args, work) for work in args.only],
    )  # fmt: skip


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = measuring.make_parser(__doc__)
    option = parser.add_argument
    option("--only", nargs="+", choices=WORKS, default=WORKS, metavar="WORK", help="default: all")
    option("--steps", type=int, help="default: 10, with --full 100")
    args = measuring.parse(parser, argv)
    args.steps = args.steps or (PAPER_STEPS if args.full else QUICK_STEPS)
    return args


if __name__ == "__main__":
    main(parse_args())
