"""Time a training step by precision and memory format.

And an epoch as train_cv.py has it, from the folder of decoded scans: what its steps would take with
the volumes at hand is the share that it is busy, the rest is waiting.

    python3 benchmarks/training_step.py                         # a small volume, a minute
    python3 benchmarks/training_step.py --full                  # modelA24 at 193×229×193, minutes
    python3 benchmarks/training_step.py --full --device cuda    # every precision
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

sys.path.pop(0)  # this folder: some scripts have names of packages
sys.path.insert(0, str(Path(__file__).parent.parent))

import dataset
import models
import train_cv
import utils
from benchmarks import measuring
from run_folder import device as devices

MEMORY_FORMATS = {
    "NCDHW": torch.contiguous_format,
    "channels last": torch.channels_last_3d,
}
N_STEPS = 3  # timed, after one that is not
N_BATCHES = {"cpu": 2, "cuda": 10}  # of an epoch


class Training:
    """A network and its optimiser, as train_cv.py makes them, and its bare steps."""

    def __init__(self, args: argparse.Namespace, precision: str):
        devices.set_precision(precision)
        torch.manual_seed(0)
        device = torch.device(args.device)
        self.model, self.optimizer = train_cv.make_network(args, tuple(args.shape), device)
        self.model.train()
        self.network = torch.compile(self.model) if args.compile else self.model
        is_bf16 = precision == "bf16"
        self.in_precision = torch.autocast(device.type, torch.bfloat16, enabled=is_bf16)

    def run(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Train on some batches."""
        for scans, labels in batches:
            self.optimizer.zero_grad()
            with self.in_precision:
                loss = cross_entropy(self.network(scans), labels)
            loss.backward()
            self.optimizer.step()


def count_operations(args: argparse.Namespace) -> float:
    """Return a step's floating-point operations in convolutions and linear layers."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = models.build_model(args.model, tuple(args.shape))
        model(torch.rand(args.batch, 1, *args.shape)).sum().backward()
    return counter.get_total_flops()


def time_step(
    args: argparse.Namespace, precision: str, memory_format: torch.memory_format
) -> float:
    """Return the seconds of a step on random volumes."""
    training = Training(args, precision)
    training.model.to(memory_format=memory_format)
    volumes = torch.rand(args.batch, 1, *args.shape, device=args.device)
    batch = volumes, torch.arange(args.batch, device=args.device) % 2
    training.run([batch])
    return statistics.median(
        measuring.seconds(lambda: training.run([batch]), args.clock) for _ in range(N_STEPS)
    )


def time_epochs(args: argparse.Namespace, precision: str) -> tuple[float, float]:
    """Return seconds a step of an epoch with the volumes at hand, and from the folder."""
    training, device = Training(args, precision), torch.device(args.device)
    n_batches = N_BATCHES[device.type]
    with tempfile.TemporaryDirectory() as name:
        csv_path = measuring.write_cohort(Path(name), args.shape, n_batches * args.batch)
        cohort = dataset.read_cohort(csv_path)
        volumes = cohort.volumes(Path(name) / "cache", utils.N_WORKERS)
        volumes.fill()
        rows = devices.shuffled(np.arange(len(volumes)), 0)
        at_hand = [next(volumes.batches(rows, args.batch, device))] * n_batches
        training.run(at_hand[:1])
        epochs = [lambda: at_hand, lambda: volumes.batches(rows, args.batch, device)]
        return tuple(
            measuring.seconds(lambda epoch=epoch: training.run(epoch()), args.clock) / n_batches
            for epoch in epochs
        )


def main(args: argparse.Namespace) -> None:
    """Print the tables."""
    if args.threads:
        torch.set_num_threads(args.threads)
    tera = count_operations(args) / 1e12
    print(
        f"{measuring.conditions(args)}, {args.batch} scans and {tera:.2f} tera-operations a step"
        f"{', compiled' * args.compile}\n"
    )
    precisions = utils.PRECISIONS if torch.device(args.device).type == "cuda" else ["fp32"]
    rows = []
    for precision in precisions:
        for name, memory_format in MEMORY_FORMATS.items():
            step_s = time_step(args, precision, memory_format)
            rows.append([precision, name, f"{step_s:.3g}", f"{tera / step_s:.3g}"])
    head = ["precision", "memory format", "s a step", "tera-operations a second"]
    measuring.print_table(head, rows)
    rows = []
    for precision in precisions:
        alone_s, loaded_s = time_epochs(args, precision)
        share = f"{100 * alone_s / loaded_s:.0f}"
        rows.append([precision, f"{alone_s:.3g}", f"{loaded_s:.3g}", share])
    head = ["an epoch in", "s a step, volumes at hand", "s a step, from the folder", "% busy"]
    measuring.print_table(head, rows)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = measuring.make_parser(__doc__)
    parser.set_defaults(lr=train_cv.LEARNING_RATE, wd=train_cv.WEIGHT_DECAY)
    option = parser.add_argument
    option("--batch", type=int, help="scans per step; default: 1, on a GPU 5")
    option("--compile", action="store_true", help="also through torch.compile")
    args = measuring.parse(parser, argv)
    args.batch = args.batch or (1 if args.device == "cpu" else train_cv.BATCH)
    return args


if __name__ == "__main__":
    main(parse_args())
