"""The processes of one job: who is who under torchrun, and how they wait for each other.

Without torchrun a job is one process, rank 0 of 1, and nothing here waits.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import numpy as np
import torch
from torch import distributed

from errors import InputError, RunError

MAX_WAIT = timedelta(days=30)  # for ranks whose folds take longer than others'
POLL_SECONDS = 0.05


def under_torchrun() -> bool:
    """Tell whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def rank() -> int:
    """Return this process's number in the job, from 0."""
    return int(os.environ["RANK"]) if under_torchrun() else 0


def local_rank() -> int:
    """Return this process's number on its host, from 0."""
    return int(os.environ["LOCAL_RANK"]) if under_torchrun() else 0


def world_size() -> int:
    """Return how many processes the job has."""
    return int(os.environ["WORLD_SIZE"]) if under_torchrun() else 1


def n_on_host() -> int:
    """Return how many of the job's processes this host has."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if under_torchrun() else 1


def is_first() -> bool:
    """Tell whether this is the process that speaks for the job."""
    return rank() == 0


@contextmanager
def joined() -> Iterator[None]:
    """Join the job's other processes, and leave them when all are done; not after an error."""
    if world_size() == 1:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(backend, timeout=MAX_WAIT)
    yield
    wait_for_all()
    distributed.destroy_process_group()


def leave_at_once(status: int) -> None:
    """End this process with an exit status, if it has joined others; for after an error.

    Without this, Python's end would wait for the others' part in whatever was under way.
    """
    if distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait_for_all(group: distributed.ProcessGroup | None = None) -> None:
    """Return when every process of the job, or of a group, has come to this point.

    Raises
    ------
    RunError
        If another process has died.
    """
    if world_size() == 1:
        return
    try:
        arrived = distributed.all_reduce(torch.zeros(1), group=group, async_op=True)
        while not arrived.is_completed():  # signals are heard between two looks
            time.sleep(POLL_SECONDS)
        arrived.wait()
    except RuntimeError as error:
        reason = (str(error).splitlines() or [""])[0]
        raise RunError(f"another process of this job has stopped ({reason})") from None


def from_first(function: Callable[[], object]) -> object:
    """Call a function in the first process only, and return its result in all of them."""
    if world_size() == 1:
        return function()
    result = [function() if is_first() else None]
    wait_for_all()
    distributed.broadcast_object_list(result)
    return result[0]


def agreed(check: Callable[[], object]) -> object:
    """Call a function in every process; return its result if it refuses nobody's input.

    Raises
    ------
    InputError
        In the first process that has this message, so that each is said once.
    RunError
        In the others, when that process has stopped.
    """
    result, refusal = None, None
    try:
        result = check()
    except InputError as error:
        refusal = error
    messages = gathered(refusal and str(refusal))
    if refusal and messages.index(str(refusal)) == rank():
        raise refusal
    if any(messages):
        wait_for_all()  # until it has spoken: whoever ends first has the others stopped
    return result


def gathered(value: object) -> list:
    """Return every process's value, in the order of their ranks, in all of them."""
    if world_size() == 1:
        return [value]
    wait_for_all()
    values = [None] * world_size()
    distributed.all_gather_object(values, value)
    return values


def add_up(array: np.ndarray) -> None:
    """Replace an array by its sum over all processes, in all of them."""
    if world_size() > 1:
        wait_for_all()
        distributed.all_reduce(torch.from_numpy(array))
