"""How a script's processes begin, wait for each other and end: torchrun, signals, exit statuses."""

import argparse
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import numpy as np

from utils import InputError, RunError, is_first, printable, rank, world_size

MAX_WAIT = timedelta(days=30)  # for ranks whose folds take longer than others'
POLL_SECONDS = 0.05
LATE_SECONDS = 5.0
OUT_OF_MEMORY = re.compile(  # torch's on the CPU, the driver's, its libraries', no workspace fits
    "DefaultCPUAllocator|out of memory|STATUS_ALLOC_FAILED|ALLOCATION_FAILED|unable to find an eng"
    "|CU(BLAS|DNN)_STATUS_NOT_INITIALIZED|Failed to CUDA calloc"
)


class Stopped(KeyboardInterrupt):
    """A signal asked the script to stop: exit status 128 plus the signal's number."""

    def __init__(self, signal_number: int):
        super().__init__(signal_number)
        self.signal = signal.Signals(signal_number)


class SaidByFirst(InputError):
    """The first process of the job reports this error; the others end without a word."""


def run_script(main: Callable, args: argparse.Namespace, kept: str = "") -> int:
    """Run a script's `main(args)` and return its exit status.

    0 done; 2 the input is at fault; 128 plus its number for a signal; 1 anything else. `kept` says,
    after a signal, what the run has kept. Under torchrun a process that fails waits for no other.
    """
    speaker = f"rank {rank()}: " if world_size() > 1 else ""
    try:
        with stoppable(), joined():
            main(args)
        return 0
    except Stopped as stop:
        without = " without --overwrite" * getattr(args, "overwrite", False)
        advice = f" {kept}; the same command{without} resumes." if kept else ""
        print(f"{speaker}stopped by {stop.signal.name}.{advice}", file=sys.stderr)
        status = 128 + stop.signal
    except SaidByFirst:
        status = 2
    except Exception as error:
        if isinstance(error, InputError) and not is_first():
            time.sleep(LATE_SECONDS)  # if the first fails alike, torchrun ends this one meanwhile
        if isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error)):
            reason = str(error).splitlines()[0]
            error = RunError(f"out of memory: a smaller --batch needs less ({reason})")
        if isinstance(error, InputError | RunError):
            print(f"{speaker}error: {printable(str(error))}", file=sys.stderr)
        elif world_size() == 1:
            raise
        else:
            traceback.print_exc()
        status = 2 if isinstance(error, InputError) else 1
    if world_size() > 1:  # Python's own end would wait for the other processes
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


@contextmanager
def stoppable() -> Iterator[None]:
    """Let the first SIGINT or SIGTERM raise `Stopped`, so that files close; a second one kills."""

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def stop(signal_number, frame):
        restore()
        raise Stopped(signal_number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        restore()


@contextmanager
def joined() -> Iterator[None]:
    """Join the job's other processes, and leave them when all are done; not after an error."""
    if world_size() == 1:
        yield
        return
    import torch
    from torch import distributed

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(backend, timeout=MAX_WAIT)
    yield
    wait_for_all()
    distributed.destroy_process_group()


def wait_for_all() -> None:
    """Return when every process of the job has come to this point; a RunError if one has died."""
    if world_size() == 1:
        return
    import torch
    from torch import distributed

    try:
        arrived = distributed.all_reduce(torch.zeros(1), async_op=True)
        while not arrived.is_completed():  # signals are heard between two looks
            time.sleep(POLL_SECONDS)
        arrived.wait()
    except RuntimeError as error:
        reason = (str(error).splitlines() or [""])[0]
        raise RunError(f"another process of this job has stopped ({reason})") from None


def from_first(function: Callable[[], object]) -> object:
    """Call a function in the first process; return its result, or refuse its input, in all."""
    result, refusal = None, None
    if is_first():
        try:
            result = function()
        except InputError as error:
            refusal = error
    result, refusal = gathered((result, refusal))[0]
    if refusal is None:
        return result
    if is_first():
        raise refusal
    with suppress(RunError):
        wait_for_all()  # until the first has ended: torchrun stops all when one has
    raise SaidByFirst


def gathered(value: object) -> list:
    """Return every process's value, in the order of their ranks, in all of them."""
    if world_size() == 1:
        return [value]
    from torch import distributed

    wait_for_all()
    values = [None] * world_size()
    distributed.all_gather_object(values, value)
    return values


def add_up(array: np.ndarray) -> None:
    """Replace an array by its sum over all processes, in all of them."""
    if world_size() > 1:
        import torch
        from torch import distributed

        wait_for_all()
        distributed.all_reduce(torch.from_numpy(array))
