"""How scans come in batches: loaders, a process's share of each batch, and faults of readers."""

import functools
import signal
import weakref
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    default_collate,
    get_worker_info,
)  # fmt: skip

from dataset import ScanDataset
from errors import RunError
from teams import Team


class BatchStacker:
    """Stacks scans into batches, in memory that is used again once nobody holds a batch of it.

    Fresh memory comes from the system a page at a time, which takes longer than the copying.
    """

    def __init__(self):
        self.free = []

    def __call__(self, scans: list[tuple[Tensor, int, int]]) -> tuple[Tensor, ...]:
        volumes, labels, rows = zip(*scans, strict=True)
        n_values = len(volumes) * volumes[0].numel()
        memory = self.free.pop() if self.free else np.empty(n_values, dtype=np.float32)
        if len(memory) < n_values:
            memory = np.empty(n_values, dtype=np.float32)
        batch = memory[:n_values].reshape(len(volumes), *volumes[0].shape)
        weakref.finalize(batch, self.free.append, memory)  # the tensor keeps it alive
        np.stack(volumes, out=batch)
        return torch.from_numpy(batch), torch.tensor(labels), torch.tensor(rows)


class ShareOfBatches:
    """A team member's share of each batch of a sampler: every size-th scan of it."""

    def __init__(self, batches: BatchSampler, team: Team):
        self.batches, self.team = batches, team

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches:
            yield batch[self.team.index :: self.team.size]

    def __len__(self) -> int:
        return len(self.batches)

    def seed(self, seed: int) -> None:
        """Say which order the batches are to be drawn in next."""
        self.batches.sampler.generator.manual_seed(seed)


class CollateShare:
    """Collate a share of a batch, which may hold no scan at all."""

    def __init__(self, volume_shape: tuple[int, int, int]):
        self.volume_shape = volume_shape
        self.stack = BatchStacker()

    def __call__(self, scans: list[tuple]) -> list[Tensor]:
        if scans:
            in_worker = get_worker_info() is not None  # it collates into shared memory
            return default_collate(scans) if in_worker else self.stack(scans)
        nothing = torch.zeros(0, dtype=torch.int64)
        return [torch.zeros(0, 1, *self.volume_shape), nothing, nothing]


def training_loader(
    scans: ScanDataset, batch: int, shuffle: bool, n_workers: int,
    volume_shape: tuple[int, int, int], device: torch.device, team: Team,
) -> DataLoader:  # fmt: skip
    """Return a loader of this team member's share of batches of scans.

    The order has a generator of its own, and so has what the loader draws for its workers:
    their number changes no result. Decoded scans reach a CPU faster without workers.
    """
    if scans.cached is not None and device.type == "cpu":
        n_workers = 0
    shuffled = RandomSampler(scans, generator=torch.Generator())
    batches = BatchSampler(shuffled if shuffle else SequentialSampler(scans), batch, False)
    return DataLoader(
        scans,
        batch_sampler=ShareOfBatches(batches, team),
        collate_fn=CollateShare(volume_shape),
        generator=torch.Generator(),
        num_workers=n_workers,
        persistent_workers=n_workers > 0,
        pin_memory=device.type == "cuda",
        worker_init_fn=ignore_interrupts,
    )


def ignore_interrupts(worker: int) -> None:
    """Leave Ctrl-C to the main process, which stops its reading processes itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def batches(loader: DataLoader) -> Iterator:
    """Iterate over a loader's batches.

    Raises
    ------
    RunError
        If a scan cannot be read, in one sentence also from a reading process.
    """
    try:
        yield from loader
    except RunError as error:  # torch hands on a reading process's whole traceback
        raise RunError(str(error).rpartition("RunError: ")[2].strip()) from None


@functools.cache
def copying_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the one stream of a GPU that copies; each stream keeps memory of its own for good."""
    return torch.cuda.Stream(device)


def on_device(loader: DataLoader, device: torch.device) -> Iterator[tuple[Tensor, ...]]:
    """Iterate over a loader's batches, their volumes and labels on a device, rows on the CPU.

    A GPU's batches come on a stream of their own, the next one while it computes on this one; two
    are there at a time.
    """
    if device.type != "cuda":
        yield from batches(loader)
        return
    computing, copying = torch.cuda.current_stream(device), copying_stream(device)
    step_before = None
    for volumes, labels, rows in batches(loader):
        with torch.cuda.stream(copying):
            copied = [tensor.to(device, non_blocking=True) for tensor in (volumes, labels)]
        computing.wait_stream(copying)
        for tensor in copied:
            tensor.record_stream(computing)  # its memory is in use until that stream is past it
        yield *copied, rows
        step = computing.record_event()
        if step_before is not None:
            step_before.synchronize()
        step_before = step
