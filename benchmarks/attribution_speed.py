"""Time LRP, IG, GGC and the first input gradient, the plain way and ours, in forward passes.

    python3 benchmarks/attribution_speed.py                          # a small volume, minutes
    python3 benchmarks/attribution_speed.py --model modelA24 --shape 193 229 193 --pairs 1

Each pair runs the plain way and ours in turn, in this process. The unit is one forward pass (eval,
no gradient). Peak memory is what each way adds to the idle process, measured in a process of its
own.
"""

import argparse
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from captum.attr import GuidedGradCam, IntegratedGradients
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import attribution
import convolution
import models


def make_case(name: str, shape: list[int], device: str) -> tuple[nn.Module, torch.Tensor]:
    """Return a network and a volume with zero background, as skull-stripped scans have."""
    torch.manual_seed(0)
    model = models.build_model(name, tuple(shape)).to(device).eval().requires_grad_(False)
    volume = torch.rand(1, 1, *shape)
    volume[:, :, : shape[0] // 8] = 0
    return model, volume.to(device)


def plain_lrp(model: nn.Module, volume: torch.Tensor) -> torch.Tensor:
    """LRP by the same rule through the library's own kernels."""
    original = convolution.is_plain_one_channel
    convolution.is_plain_one_channel = lambda layer: False
    try:
        return attribution.lrp(model, volume, 1)
    finally:
        convolution.is_plain_one_channel = original


def plain_ig(model: nn.Module, volume: torch.Tensor, n_steps: int) -> torch.Tensor:
    """captum's integrated gradients on the whole network."""
    options = {"n_steps": n_steps, "method": "riemann_left", "internal_batch_size": 1}
    return IntegratedGradients(model).attribute(volume, 0, target=1, **options)


def plain_ggc(model: nn.Module, volume: torch.Tensor) -> torch.Tensor:
    """captum's guided Grad-CAM through the library's own kernels."""
    method = GuidedGradCam(model, attribution.last_convolution(model))
    return method.attribute(volume.clone(), target=1, interpolate_mode="trilinear")


def ways(n_steps: int) -> dict[str, tuple[Callable, Callable]]:
    """Return (plain, ours) for each row of the table, as functions of model and volume."""

    def gradient(model, volume, fast):
        layer = model.features[0]
        outputs = layer(volume)
        if fast:
            return convolution.one_channel_input_gradient(layer.weight, outputs)
        return nn.grad.conv3d_input(volume.shape, layer.weight, outputs)

    return {
        f"IG, {n_steps} steps": (
            lambda m, v: plain_ig(m, v, n_steps),
            lambda m, v: attribution.integrated_gradients(m, v, 1, n_steps=n_steps),
        ),
        "LRP": (plain_lrp, lambda m, v: attribution.lrp(m, v, 1)),
        "GGC": (plain_ggc, lambda m, v: attribution.guided_gradcam(m, v, 1)),
        "first convolution, there and back": (
            lambda m, v: gradient(m, v, False),
            lambda m, v: gradient(m, v, True),
        ),
    }


def seconds(function: Callable, device: str) -> float:
    """Return how long one call takes."""
    start = time.perf_counter()
    function()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure_peak(args: argparse.Namespace, row: str, way: int, queue) -> None:
    """Put the memory in GB that one way adds to the idle process."""
    model, volume = make_case(args.model, args.shape, args.device)
    idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ways(min(args.steps, 3))[row][way](model, volume)
    queue.put((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - idle) / 2**20)


def peak_gb(args: argparse.Namespace, row: str, way: int) -> float:
    """Return one way's peak memory, measured in a process of its own."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(
        target=measure_peak,
        args=(args, row.replace(str(args.steps), str(min(args.steps, 3))), way, queue),
    )
    child.start()
    peak = queue.get()
    child.join()
    return peak


def main(args: argparse.Namespace) -> None:
    """Print the table."""
    model, volume = make_case(args.model, args.shape, args.device)

    @torch.no_grad()
    def forward():
        return model(volume)

    forward()
    unit = statistics.median(seconds(forward, args.device) for _ in range(5))
    shape_text = "×".join(map(str, args.shape))
    print(
        f"{args.model}, {shape_text}, {args.device}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}: one forward pass {unit:.3f} s"
    )
    head = ("work", "plain", "ours", "ratio", "largest difference", "plain GB", "ours GB")
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row, (plain, ours) in ways(args.steps).items():
        times = [
            (
                seconds(lambda f=plain: f(model, volume), args.device),
                seconds(lambda f=ours: f(model, volume), args.device),
            )
            for _ in range(args.pairs)
        ]
        plain_s, ours_s = (statistics.median(column) for column in zip(*times, strict=True))
        expected, found = plain(model, volume).detach(), ours(model, volume).detach()
        difference = float((found - expected).abs().max() / expected.abs().max())
        memory = [f"{peak_gb(args, row, way):.2f}" if args.memory else "–" for way in (0, 1)]
        cells = (row, f"{plain_s / unit:.1f}", f"{ours_s / unit:.1f}", f"{plain_s / ours_s:.1f}",
                 f"{difference:.0e}", *memory)  # fmt: skip
        print("| " + " | ".join(cells) + " |", flush=True)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", default="modelT8")
    parser.add_argument("--shape", type=int, nargs=3, default=[65, 77, 65])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())
