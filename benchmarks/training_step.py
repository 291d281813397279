"""Time a training step by precision and memory format, beside the work that it cannot do without.

And an epoch as train_cv.py has it, from the file of scaled volumes: what its steps would take with
the volumes at hand is the share that it is busy, the rest is waiting.

    python3 benchmarks/training_step.py                         # a small volume, a minute
    python3 benchmarks/training_step.py --full                  # modelA24 at 193×229×193, minutes
    python3 benchmarks/training_step.py --full --device cuda    # every precision

The work: floating-point operations of the convolutions and linear layers, forward and backward, as
torch counts them; and the bytes of what enters and leaves each layer, once forward and twice
backward. The longer of what both take at a card's peak rates bounds a step.
"""

import argparse
import math
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import measuring
import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import dataset
import devices
import loading
import models
import train_cv
import utils
import volume_cache
from teams import Team

BATCH = 5
MEMORY_FORMATS = {
    "NCDHW": torch.contiguous_format,
    "channels last": torch.channels_last_3d,
}
BYTES = {"fp32": 4, "tf32": 4, "bf16": 2}  # a value
PEAKS = {  # tera-operations a second without sparsity, terabytes a second: NVIDIA's data sheets
    "A100": ({"fp32": 19.5, "tf32": 156, "bf16": 312}, 2.0),
    "H100": ({"fp32": 67, "tf32": 495, "bf16": 989}, 3.35),
    "H200": ({"fp32": 67, "tf32": 495, "bf16": 989}, 4.8),
}
PASSES = 3  # through each layer: forward, its inputs' gradient, its weights' gradient
N_STEPS = 3  # timed, after one that is not
N_BATCHES = 10  # of an epoch


def make_step(args: argparse.Namespace, precision: str, memory_format: str) -> Callable:
    """Return a training step on random volumes."""
    devices.set_precision(precision)
    torch.manual_seed(0)
    model = models.build_model(args.model, tuple(args.shape)).train()
    model = model.to(args.device, memory_format=MEMORY_FORMATS[memory_format])
    optimizer = torch.optim.Adam(model.parameters())
    volumes = torch.rand(args.batch, 1, *args.shape, device=args.device)
    labels = torch.arange(args.batch, device=args.device) % 2
    network = torch.compile(model) if args.compile else model
    device_type = torch.device(args.device).type

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device_type, torch.bfloat16, enabled=precision == "bf16"):
            loss = nn.functional.cross_entropy(network(volumes), labels)
        loss.backward()
        optimizer.step()
        if device_type == "cuda":
            torch.cuda.synchronize(args.device)

    return step


def count_work(args: argparse.Namespace) -> tuple[float, float]:
    """Return a step's floating-point operations and the values that its layers read and write."""
    with torch.device("meta"):
        model = models.build_model(args.model, tuple(args.shape))
        volumes = torch.rand(args.batch, 1, *args.shape)
    n_values = 0

    def add(_, inputs, outputs) -> None:
        nonlocal n_values
        n_values += inputs[0].numel() + outputs.numel()

    for module in model.modules():
        if not list(module.children()):
            module.register_forward_hook(add)
    with FlopCounterMode(display=False) as counter:
        model(volumes).sum().backward()
    return counter.get_total_flops(), PASSES * n_values


def bound_s(device: str, precision: str, n_operations: float, n_values: float) -> float:
    """Return what a step takes at a card's peak rates; NaN if these are not known."""
    name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else ""
    for card, (tera_operations, terabytes) in PEAKS.items():
        if card in name:
            n_bytes = BYTES[precision] * n_values
            return max(n_operations / tera_operations[precision], n_bytes / terabytes) / 1e12
    return math.nan


def time_epochs(args: argparse.Namespace, precision: str) -> tuple[float, float]:
    """Return seconds a step of an epoch with the volumes at hand, and from the file."""
    devices.set_precision(precision)
    device = torch.device(args.device)
    model = models.build_model(args.model, tuple(args.shape))
    model = model.to(device, memory_format=train_cv.MEMORY_FORMATS[device.type])
    optimizer = torch.optim.Adam(model.parameters())
    n_batches = N_BATCHES if device.type == "cuda" else 2
    n_scans = n_batches * args.batch

    def step_s(batches) -> float:
        def epoch():
            train_cv.train_epoch(
                model, batches, nn.CrossEntropyLoss(), optimizer, device, precision
            )

        return measuring.seconds(epoch, args.clock) / len(batches)

    with tempfile.TemporaryDirectory() as name:
        cohort = dataset.read_cohort(measuring.write_cohort(Path(name), args.shape, n_scans))
        cache_folder = volume_cache.locate(cohort, Path(name), None)
        with volume_cache.opened(cohort, cache_folder, utils.N_WORKERS) as volumes:
            loader = loading.training_loader(
                dataset.ScanDataset(cohort.table, np.arange(n_scans), volumes), args.batch,
                True, utils.N_WORKERS, tuple(args.shape), device, Team(),
            )  # fmt: skip
            loader.batch_sampler.seed(0)
            at_hand = [[part.to(device) for part in next(loading.batches(loader))]] * n_batches
            step_s(at_hand[:1])
            if device.type == "cuda":
                step_s(loader)  # starts the reading processes
            return step_s(at_hand), step_s(loader)


def percent(share: float) -> str:
    """Return a share in percent, or a word where it is not known."""
    return "unknown" if math.isnan(share) else f"{100 * share:.0f}"


def main(args: argparse.Namespace) -> None:
    """Print the work and the tables."""
    if args.threads:
        torch.set_num_threads(args.threads)
    n_operations, n_values = count_work(args)
    precisions = devices.PRECISIONS if torch.device(args.device).type == "cuda" else ["fp32"]
    rows = []
    for precision in precisions:
        for memory_format in MEMORY_FORMATS:
            step = make_step(args, precision, memory_format)
            step()
            times = [measuring.seconds(step, args.clock) for _ in range(N_STEPS)]
            rows.append((precision, memory_format, statistics.median(times)))
    print(
        f"{args.model}, {'×'.join(map(str, args.shape))}, {args.batch} scans a step, "
        f"{args.device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
        f"{', compiled' if args.compile else ''}; a step is {n_operations / 1e12:.2f} "
        f"tera-operations on {BYTES['fp32'] * n_values / 1e9:.1f} GB of float32\n"
    )
    measuring.print_table(
        ["precision", "memory format", "s a step", "× the first", "tera-operations a second",
         "% of the card's bound"],
        [[precision, memory_format, f"{step_s:.3g}", f"{rows[0][2] / step_s:.2f}",
          f"{n_operations / step_s / 1e12:.3g}",
          percent(bound_s(args.device, precision, n_operations, n_values) / step_s)]
         for precision, memory_format, step_s in rows],
    )  # fmt: skip
    waiting = []
    for precision in precisions:
        alone_s, loaded_s = time_epochs(args, precision)
        cells = f"{alone_s:.3g}", f"{loaded_s:.3g}", percent(alone_s / loaded_s)
        waiting.append([precision, *cells])
    measuring.print_table(
        ["an epoch in", "s a step, volumes at hand", "s a step, from the file", "% busy"], waiting
    )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = measuring.make_parser(__doc__)
    option = parser.add_argument
    option("--batch", type=int, help="scans per step; default: 1, on a GPU 5")
    option("--compile", action="store_true", help="also through torch.compile")
    args = measuring.parse(parser, argv)
    args.batch = args.batch or (1 if torch.device(args.device).type == "cpu" else BATCH)
    return args


if __name__ == "__main__":
    main(parse_args())
