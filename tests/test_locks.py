"""One writer at a time: who holds a lock is said, and what a dead process held is free."""

import errno
import fcntl
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import locks
from errors import InputError, RunError
from locks import one_writer

ROOT = Path(locks.__file__).parent
HOLD = """
import sys, time
from pathlib import Path
from locks import one_writer
with one_writer(Path(sys.argv[1]), "fold_3"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Start another process that holds the lock of fold 3."""
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    with child:
        assert child.stdout.readline() == "held\n"
        yield child
        child.kill()


def test_a_second_writer_is_told_who_holds_the_lock(tmp_path, holder):
    with (
        pytest.raises(InputError, match=rf"process {holder.pid} on host .*fold_3"),
        one_writer(tmp_path, "fold_3"),
    ):
        pass
    with one_writer(tmp_path, "fold_4"):
        pass


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with one_writer(tmp_path, "fold_3"):
        assert locks.read_owner(tmp_path / ".locks" / "fold_3.owner")[1] == os.getpid()


def test_a_lock_is_waited_for_if_asked(tmp_path, holder, caplog):
    """For hours, and it is said for whom."""
    assert locks.MAX_WAIT_SECONDS >= 3600
    caplog.set_level(logging.INFO, "heatmaps")
    start = time.perf_counter()
    threading.Timer(0.7, holder.kill).start()
    with one_writer(tmp_path, "fold_3", wait=True):
        assert time.perf_counter() - start > 0.5
    assert f"waiting for process {holder.pid} on host {os.uname().nodename}" in caplog.text


def test_a_lock_is_free_after_an_error(tmp_path):
    with pytest.raises(KeyError), one_writer(tmp_path, "fold_3"):
        raise KeyError
    with one_writer(tmp_path, "fold_3"):
        pass


def test_a_file_system_without_locks_is_refused(tmp_path, monkeypatch):
    """No file whose mere being there locks: a node that dies would leave it for ever."""

    def not_here(file, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", not_here)
    with (
        pytest.raises(RunError, match=r"fold_3.lock cannot be locked: .*not implemented"),
        one_writer(tmp_path, "fold_3"),
    ):
        pass
