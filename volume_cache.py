"""The file of scaled volumes that the processes of one host share: made once, removed at the end.

A cache is a folder named after host, shape and scans. Its `lock` is held exclusively by the process
that decodes or removes, and shared by those that read; the system frees it when a process dies.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import utils
import volume_file
from dataset import Cohort
from errors import InputError, RunError
from utils import log

DEFAULT_PREFIX = ".cache-"
POLL_SECONDS = 0.2


def locate(cohort: Cohort, outpath: Path, cache_dir: Path | None) -> Path:
    """Return the folder of a cohort's cache on this host, below --cache-dir or else --outpath.

    Raises
    ------
    InputError
        If --cache-dir is no folder that can be written to.
    """
    if cache_dir is not None:
        there = utils.nearest_folder(cache_dir)
        if not (there.is_dir() and os.access(there, os.W_OK)):
            raise InputError(f"--cache-dir {cache_dir} cannot be used as a folder to write to")
    host = socket.gethostname()
    facts = [host, *map(str, cohort.volume_shape), *cohort.table["file"]]
    key = hashlib.sha256("\0".join(facts).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return (cache_dir or outpath / f"{DEFAULT_PREFIX}{host}") / key


def check_room(cohort: Cohort, folder: Path) -> None:
    """Check that what is missing of a cache fits on its disk.

    Raises
    ------
    InputError
        If it does not.
    """
    parent = utils.nearest_folder(folder.parent)
    n_missing = len(volume_file.stale_rows(cohort, volume_file.read_index(cohort, folder)))
    n_bytes = n_missing * volume_file.bytes_of_scan(cohort)
    n_whole = len(cohort.table) * volume_file.bytes_of_scan(cohort)
    n_bytes = min(n_bytes, n_whole - volume_file.bytes_allocated(folder))
    n_free = shutil.disk_usage(parent).free
    if n_bytes > n_free:
        raise InputError(
            f"the scaled scans need {n_bytes / 1e9:.1f} GB below {parent}, {n_free / 1e9:.1f} GB "
            "are free: give a --cache-dir on another disk (train_cv.py also runs with --no-cache)"
        )


# Sharing


def open_lock(folder: Path) -> TextIO:
    """Return the open lock of a folder, which is made where it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return (folder / "lock").open("a+")
    except FileNotFoundError:
        raise
    except OSError as error:  # somebody else's
        raise RunError(
            f"{folder} cannot be used ({error.strerror}): give another --cache-dir"
        ) from None


@contextlib.contextmanager
def opened_lock(folder: Path) -> Iterator[TextIO]:
    """Open the lock of a folder that is made where it is missing."""
    lock = None
    while lock is None:
        with contextlib.suppress(FileNotFoundError):  # its last user has removed it just now
            lock = open_lock(folder)
    with lock:
        try:
            yield lock
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # closing alone leaves it to worker processes


def try_lock(lock: TextIO, kind: int) -> bool:
    """Lock an open file exclusively or shared, if that can be had at once."""
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # file systems of clusters that do without locks
        raise RunError(
            f"{lock.name} cannot be locked ({error.strerror}): give a --cache-dir on a local disk"
        ) from None
    return True


def is_in(folder: Path, lock: TextIO) -> bool:
    """Tell whether an open lock is the folder's, not that of a cache removed meanwhile."""
    try:
        return os.path.samestat(os.fstat(lock.fileno()), (folder / "lock").stat())
    except FileNotFoundError:
        return False


def is_whole(cohort: Cohort, folder: Path) -> bool:
    """Tell whether a cache that others use is whole; a scan that has changed stops the run."""
    index = volume_file.read_index(cohort, folder)
    stale = volume_file.stale_rows(cohort, index)
    changed = [row for row in stale if index["size"][row] >= 0]
    if changed:
        raise RunError(
            f"{cohort.table['file'][changed[0]]} has changed while another process uses what was "
            f"decoded of it in {folder}: wait for that process, or give another --cache-dir"
        )
    return not stale


def try_enter(cohort: Cohort, folder: Path, n_workers: int, lock: TextIO) -> bool:
    """Lock a cache, shared, once it is whole: made here if nobody holds it; tell whether it is."""
    if try_lock(lock, fcntl.LOCK_EX):
        if not is_in(folder, lock):
            return False
        lock.truncate(0)
        print(os.getpid(), end="", file=lock, flush=True)
        volume_file.decode(cohort, folder, n_workers)
        fcntl.flock(lock, fcntl.LOCK_SH)
        return is_in(folder, lock)  # between the two locks it could be removed
    return try_lock(lock, fcntl.LOCK_SH) and is_in(folder, lock) and is_whole(cohort, folder)


@contextlib.contextmanager
def opened(cohort: Cohort, folder: Path, n_workers: int) -> Iterator[volume_file.Volumes]:
    """Give a cohort's scaled volumes, decoded here or by another process of this host.

    Parameters
    ----------
    cohort : Cohort
    folder : Path
        From `locate`. It stays when the block ends: `remove` is for the run that is complete.
    n_workers : int
        Processes that decode; 0: this one does.

    Raises
    ------
    RunError
        If a scan cannot be decoded, a worker process dies, or a scan has changed while another
        process uses the cache.
    """
    with contextlib.ExitStack() as stack:
        has_waited = False
        while True:
            lock = stack.enter_context(opened_lock(folder))
            if try_enter(cohort, folder, n_workers, lock):
                break
            if not has_waited:
                lock.seek(0)
                log.info("waiting for process %s, which decodes scans into %s", lock.read(), folder)
            has_waited = True
            stack.close()
            time.sleep(POLL_SECONDS)
        yield volume_file.open_volumes(cohort, folder)


def remove(folder: Path) -> None:
    """Remove a cache, whole or not, unless a process of this host uses it."""
    try:
        lock = (folder / "lock").open("a+")
    except OSError:  # gone, or somebody else's
        return
    with lock:
        if not (try_lock(lock, fcntl.LOCK_EX) and is_in(folder, lock)):
            return
        for path in folder.iterdir():
            if path.name != "lock":
                path.unlink()
        (folder / "lock").unlink()
        with contextlib.suppress(OSError):  # a new user has come already
            folder.rmdir()
            if folder.parent.name.startswith(DEFAULT_PREFIX):
                folder.parent.rmdir()


def remove_all(outpath: Path) -> None:
    """Remove what is left below the folder of a run that is complete, of every host's caches."""
    for folder in outpath.glob(f"{DEFAULT_PREFIX}*/*"):
        remove(folder)
