"""One writer at a time: locks below an output folder that end with the process that holds them."""

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from errors import InputError, RunError
from utils import log

LOCK_FOLDER = ".locks"
MAX_WAIT_SECONDS = 24 * 3600.0  # for another process to start a run or to put it together
POLL_SECONDS = 0.25
MAX_ORPHAN_SECONDS = 30.0  # the reading processes of a killed script hold its lock for some seconds


@contextmanager
def one_writer(folder: Path, name: str, wait: bool = False) -> Iterator[None]:
    """Hold the lock of one piece of work below an output folder.

    The operating system takes the lock back when its process ends, however it ends, so a lock whose
    owner died is free. It is taken with flock, which Linux carries to other hosts over NFS.

    Parameters
    ----------
    folder : Path
        The output folder.
    name : str
        Of the work, such as "fold_3"; part of a file name.
    wait : bool
        Wait for another process to be done, for a day at most, rather than refuse at once.

    Raises
    ------
    InputError
        If another process holds it; the message names its host and process.
    RunError
        If the file system has no locks.
    """
    lock_path = folder / LOCK_FOLDER / f"{name}.lock"
    owner_path = lock_path.with_suffix(".owner")
    lock_path.parent.mkdir(exist_ok=True)
    lock = FileLock(lock_path, fallback_to_soft=False)  # a soft one outlives a node that dies
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if wait:
                log.info("waiting for %s (%s in %s)", describe_owner(owner_path), name, folder)
            orphan_seconds = MAX_ORPHAN_SECONDS if has_died(owner_path) else 0
            lock.acquire(MAX_WAIT_SECONDS if wait else orphan_seconds, POLL_SECONDS)
    except Timeout:
        owner = describe_owner(owner_path)
        raise InputError(
            f"{owner} is at work on {folder} ({name}); wait until it is done, or stop it"
        ) from None
    except (OSError, NotImplementedError) as error:
        raise RunError(f"{lock_path} cannot be locked: {error}") from None
    try:
        owner_path.write_text(json.dumps({"host": platform.node(), "process": os.getpid()}))
        yield
    finally:
        lock.release()


def read_owner(owner_path: Path) -> tuple[str, int] | None:
    """Return host and process that wrote themselves down as a lock's owner."""
    try:
        owner = json.loads(owner_path.read_text())
        return str(owner["host"]), int(owner["process"])
    except (OSError, ValueError, KeyError, TypeError):  # it has just got the lock
        return None


def describe_owner(owner_path: Path) -> str:
    """Return who holds a lock, for a message."""
    owner = read_owner(owner_path)
    return f"process {owner[1]} on host {owner[0]}" if owner else "another process"


def has_died(owner_path: Path) -> bool:
    """Tell whether a lock's owner was a process of this host that runs no more."""
    owner = read_owner(owner_path)
    return owner is not None and owner[0] == platform.node() and not is_running(owner[1])


def is_running(process: int) -> bool:
    """Tell whether a process of this host runs."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # another user's; no number of a process
        return True
    return True
