"""What stops a script: the user's input, a fault, a signal, memory."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import torch

ALLOCATOR_MESSAGE = "DefaultCPUAllocator"  # torch raises a plain RuntimeError on the CPU


class InputError(ValueError):
    """The user's input is at fault: one message, exit status 2."""


class RunError(RuntimeError):
    """The run cannot go on, through no fault of the command line: one message, exit status 1."""


class Stopped(KeyboardInterrupt):
    """A signal asked the script to stop: exit status 128 plus the signal's number."""

    def __init__(self, signal_number: int):
        super().__init__(signal_number)
        self.signal = signal.Signals(signal_number)


@contextmanager
def stoppable() -> Iterator[None]:
    """Let the first SIGINT or SIGTERM raise `Stopped`, so that files close; a second one kills."""

    def stop(signal_number, frame):
        for number, handler in before.items():
            signal.signal(number, handler)
        raise Stopped(signal_number)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Tell whether torch could not get memory, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or ALLOCATOR_MESSAGE in str(error)
