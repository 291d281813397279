"""How a script's processes end, wait for each other and speak."""

import os
import re
import signal
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from processes import ranks_of, torchrun

from run_folder.processes import run_script
from utils import InputError, RunError

# Exit statuses


def raising(error: Exception):
    """Return a script's main that raises."""

    def main(args):
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (InputError("label must be 0 or 1, got '\x1b[2J'"), 2,
         "error: label must be 0 or 1, got '\\x1b[2J'\n"),
        (RunError("the disk is full"), 1, "error: the disk is full\n"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB"), 1,
         "error: out of memory: a smaller --batch needs less (CUDA out of memory. Tried 2 GiB)\n"),
        (RuntimeError("CUDNN_STATUS_ALLOC_FAILED\nmore lines"), 1,
         "error: out of memory: a smaller --batch needs less (CUDNN_STATUS_ALLOC_FAILED)\n"),
    ],
    ids=["input", "run", "memory", "memory-of-a-library"],
)  # fmt: skip
def test_expected_errors_are_one_sentence(capsys, error, status, message):
    assert run_script(raising(error), Namespace()) == status
    assert capsys.readouterr().err == message


@pytest.mark.parametrize("error", [KeyError("a fault"), RuntimeError("shapes differ")])
def test_other_errors_keep_their_traceback(error):
    with pytest.raises(type(error)):
        run_script(raising(error), Namespace())


@pytest.mark.parametrize(
    ("number", "args", "kept", "message"),
    [
        (signal.SIGTERM, Namespace(overwrite=False), "Every epoch is kept",
         "stopped by SIGTERM. Every epoch is kept; the same command resumes.\n"),
        (signal.SIGINT, Namespace(overwrite=True), "Every epoch is kept",
         "stopped by SIGINT. Every epoch is kept; the same command without --overwrite resumes.\n"),
        (signal.SIGINT, Namespace(), "", "stopped by SIGINT.\n"),
    ],
)  # fmt: skip
def test_a_signal_closes_files_and_a_second_one_kills(capsys, number, args, kept, message):
    before, closed = signal.getsignal(number), []

    def main(args):
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        finally:
            closed.append(signal.getsignal(number) is before)

    assert run_script(main, args, kept) == 128 + number
    assert closed == [True] and signal.getsignal(number) is before
    assert capsys.readouterr().err == message


# Several processes

JOB = """
import sys, time
import numpy as np
import torch
from torch import distributed
from run_folder import processes
from utils import InputError, RunError, rank

def refuse():
    assert rank() == 0
    raise InputError("there is no scan")

def meet():
    found = processes.from_first(lambda: {"rank": rank()})
    assert found == {"rank": 0}, found
    assert processes.gathered(10 * rank()) == [0, 10]
    array = np.array([[1.0, rank()]])
    processes.add_up(array)
    assert array.tolist() == [[2, 1]]
    sys.stdout.write("met\\n")  # in one piece, unlike print
    processes.from_first(refuse)

def main(what):
    if what == "meet":
        meet()
    if rank() == 0:
        time.sleep(300)
    distributed.all_reduce(torch.zeros(1), async_op=True)  # the other's part will not come
    if what == "fault":
        raise KeyError("a fault")
    sys.stdout.write("waiting\\n")
    sys.stdout.flush()
    processes.wait_for_all()

sys.exit(processes.run_script(main, sys.argv[1], "Epochs are kept"))
"""


@pytest.fixture
def script_path(tmp_path) -> Path:
    (tmp_path / "job.py").write_text(JOB)
    return tmp_path / "job.py"


def test_processes_meet_and_one_of_them_says_an_input_error(script_path):
    with torchrun(2, script_path, "meet") as process:
        output, messages = process.communicate(timeout=120)
    assert output == "met\nmet\n", messages
    assert messages.count("rank 0: error: there is no scan\n") == messages.count("error: ") == 1
    assert re.search(r"Root Cause.*exitcode *: 2 ", messages, re.DOTALL)
    assert process.returncode == 1  # torchrun's own


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("signal", "rank 1: stopped by SIGTERM. Epochs are kept; the same command resumes."),
        ("fault", "KeyError: 'a fault'"),
    ],
)
def test_a_process_that_fails_speaks_and_ends_at_once(script_path, what, message):
    """Also with a collective under way, whose other part never comes."""
    with torchrun(2, script_path, what) as process:
        if what == "signal":
            assert process.stdout.readline() == "waiting\n"
            os.kill(ranks_of(process)[1], signal.SIGTERM)
        try:
            _, messages = process.communicate(timeout=60)
        finally:
            process.kill()
    assert message in messages and process.returncode == 1
