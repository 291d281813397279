"""What stops a script: the user's input, a fault, a signal, memory."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import torch

MEMORY_MESSAGES = (  # of plain RuntimeErrors: torch's on the CPU, the driver's and its libraries'
    "DefaultCPUAllocator", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED", "DEVICE_ALLOCATION_FAILED",  # of cuDNN before 9, and since
    "unable to find an engine to execute this computation",  # no kernel's workspace fits
)  # fmt: skip
READER_MESSAGE = "DataLoader worker"  # torch raises it wherever the main process is just then


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
        signal.signal(
            signal.SIGCHLD, signal.SIG_DFL
        )  # readers that got the signal too are no fault
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
    is_said = any(message in str(error) for message in MEMORY_MESSAGES)
    return is_said or isinstance(error, torch.OutOfMemoryError)


def in_one_sentence(error: Exception) -> str | None:
    """Return what to tell the user of an error, or None if only a traceback says enough."""
    reason = (str(error).splitlines() or [""])[0]
    if isinstance(error, InputError | RunError):
        return str(error)
    if isinstance(error, RuntimeError) and is_out_of_memory(error):
        return f"out of memory: a smaller --batch needs less ({reason})"
    if isinstance(error, RuntimeError) and READER_MESSAGE in reason:
        return f"a process that reads scans was killed, as for memory: {reason}"
    return None
