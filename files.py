"""Files that appear whole or not at all (tables, records, maps), and their reading."""

import errno
import hashlib
import io
import json
import os
import platform
import re
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from isal import igzip

from errors import InputError, RunError
from locks import is_running

TEMPORARY_PREFIX = ".tmp-"
N_WRITERS = 2
MAP_COMPRESSION = 1  # of ISA-L, 0 to 3: an order of magnitude faster than zlib's lowest
MAX_WAITING = 4  # calls, each of which may hold a map in memory
MAX_WRITING_SECONDS = 3600.0  # a file untouched for so long has lost its writer
# fmt: off
ORIENTATION_FIELDS = (
    "pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d",
    "qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z",
)
# fmt: on


# Writing


@contextmanager
def whole_file(path: Path, n_bytes: int | None = None) -> Iterator[Path]:
    """Yield a temporary path; flush it and rename it onto `path` when all went well.

    Parameters
    ----------
    path : Path
    n_bytes : int, optional
        How large the file may become, for the message when the disk is full.

    Raises
    ------
    RunError
        If the file cannot be written; what stood at `path` is unharmed.
    """
    temporary_path = path.with_name(f"{temporary_prefix()}{os.getpid()}@{path.name}")
    try:
        yield temporary_path
        with temporary_path.open("rb+") as file:
            os.fsync(file.fileno())
        temporary_path.replace(path)
    except OSError as error:
        raise RunError(describe_failure(path, n_bytes, error)) from None
    finally:
        temporary_path.unlink(missing_ok=True)


def describe_failure(path: Path, n_bytes: int | None, error: OSError) -> str:
    """Say why a file could not be written and, if for lack of space, how much it needs."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return f"{path} cannot be written: {error.strerror or error}"
    needed = f"up to {n_bytes / 1e6:.1f} MB are needed, " if n_bytes else ""
    n_free = shutil.disk_usage(path.parent).free
    return (
        f"{path} cannot be written, the disk is full: {needed}{n_free / 1e6:.1f} MB are free. No "
        "file was damaged; with more space the same command, without --overwrite, goes on"
    )


def temporary_prefix() -> str:
    """Return what this host's temporary files begin with; no host name has an @."""
    return f"{TEMPORARY_PREFIX}{platform.node()}@"


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files below a folder whose writers were killed; call it before writing."""
    for path in folder.rglob(f"{TEMPORARY_PREFIX}*"):
        here = re.match(rf"{re.escape(temporary_prefix())}(\d+)@", path.name)
        with suppress(FileNotFoundError):  # its writer has just finished
            is_old = time.time() - path.stat().st_mtime > MAX_WRITING_SECONDS
            if is_old or (here and not is_another_running(int(here[1]))):
                path.unlink()


def is_another_running(process: int) -> bool:
    """Tell whether a process other than this one, which may have a killed one's number, runs."""
    return process != os.getpid() and is_running(process)


def write_bytes(path: Path, content: bytes) -> None:
    """Write bytes to a file, whole or not at all."""
    with whole_file(path, len(content)) as temporary_path:
        temporary_path.write_bytes(content)


def write_csv(path: Path, table: pd.DataFrame, float_format: str | None = None) -> None:
    """Write a table without its index; missing values are empty cells."""
    write_bytes(path, csv_bytes(table, float_format))


def csv_bytes(table: pd.DataFrame, float_format: str | None = None) -> bytes:
    """Return what `write_csv` writes."""
    text = table.to_csv(index=False, float_format=float_format)
    return text.encode(errors="backslashreplace")  # file names need not be UTF-8


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file, indented."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_bytes(path, text.encode(errors="backslashreplace"))  # which is how JSON escapes them


def read_json(path: Path) -> dict:
    """Read a JSON file that holds an object.

    Raises
    ------
    InputError
        If it is not JSON, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no JSON object")
    return content


def read_csv(
    path: Path, columns: dict[str, type], optional: dict[str, type] | None = None
) -> pd.DataFrame:
    """Read the columns that a table must or may have, and hold them to their types.

    Raises
    ------
    InputError
        If it is no such table.
    """
    try:
        types = columns | (optional or {})
        table = pd.read_csv(path, dtype=types, usecols=lambda name: name in types)
        if not set(columns) <= set(table):
            raise ValueError(f"{sorted(set(columns) - set(table))} are missing")
        return table
    except (OSError, ValueError, OverflowError) as error:
        raise InputError(f"{path} is not a table of {', '.join(columns)}: {error}") from None


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def plain(value: object) -> object:
    """Return an option's value as JSON can hold it."""
    return str(value) if isinstance(value, Path) else value


def write_npy(path: Path, values: list[float]) -> None:
    """Write numbers as a float64 .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(values, dtype=np.float64))
    write_bytes(path, buffer.getvalue())


def write_map(path: Path, data: np.ndarray, like_img: nib.spatialimages.SpatialImage) -> None:
    """Write a float32 NIfTI map in the space of a scan.

    Parameters
    ----------
    path : Path
        Ends in .nii or .nii.gz.
    data : array, shape (D, H, W)
    like_img : nibabel image
        A scan of the cohort; its affine and, if it is NIfTI, its sform and qform with their codes
        and its units are kept.
    """
    map_img = nib.Nifti1Image(np.asarray(data, dtype=np.float32), like_img.affine)
    if isinstance(like_img.header, nib.Nifti1Header):
        for field in ORIENTATION_FIELDS:
            map_img.header[field] = like_img.header[field]
    else:
        map_img.header.set_xyzt_units("mm")
    content = map_img.to_bytes()
    if path.suffix == ".gz":
        content = igzip.compress(content, MAP_COMPRESSION, mtime=0)
    write_bytes(path, content)


class Background:
    """Calls functions beside the work that goes on; a failure is raised at a later call.

    A few calls wait at the most, so memory stays bounded; leaving the context waits for all. With
    one thread they run in their order.
    """

    def __init__(self, n_threads: int = N_WRITERS):
        self.pool = ThreadPoolExecutor(n_threads)
        self.waiting = deque()

    def submit(self, function: Callable, *args) -> None:
        """Have `function(*args)` called in the background."""
        while len(self.waiting) >= MAX_WAITING:
            self.waiting.popleft().result()
        self.waiting.append(self.pool.submit(function, *args))

    def __enter__(self) -> "Background":
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.pool.shutdown()
        if error is None:
            for call in self.waiting:
                call.result()
