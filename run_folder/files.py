"""Files that appear whole or not at all, what is read back from them, and room on disks."""

import errno
import hashlib
import io
import json
import os
import shutil
import tempfile
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd

from utils import InputError, RunError

TEMPORARY_PREFIX = ".tmp-"


def nearest_folder(path: Path) -> Path:
    """Return what there is of a path: itself, or the nearest of its parents."""
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.exists())


def find(text: str, folder: Path) -> Path | None:
    """Look a file up from a folder, then from here, however its letters are composed.

    A link keeps its own name: what it points to may have none that says what it holds.
    """
    spellings = dict.fromkeys([text, *(unicodedata.normalize(f, text) for f in ("NFC", "NFD"))])
    try:
        for path in (Path(spelling).expanduser() for spelling in spellings):
            for candidate in (folder.resolve() / path, Path.cwd() / path):
                if candidate.is_file():
                    return candidate
    except (OSError, RuntimeError):  # a name too long, a folder not ours, an unknown ~user
        return None
    return None


def check_outpath(outpath: Path, option: str = "--outpath", is_made: bool = False) -> None:
    """Refuse a folder that cannot be written to; nothing is left of it unless it `is_made`."""
    try:
        if is_made:
            outpath.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=nearest_folder(outpath)):
            pass
    except OSError as e:
        raise InputError(f"{option} {outpath} cannot be used as a folder: {e.strerror}") from None


def make_outpath(outpath: Path, option: str = "--outpath") -> Path:
    """Create a folder to write to; an InputError if that cannot be, naming the option."""
    check_outpath(outpath, option, is_made=True)
    return outpath


def free_gb(path: Path) -> float:
    """Return the free space, in GB, where a path is or would be."""
    return shutil.disk_usage(nearest_folder(path)).free / 1e9


def check_room(needed_gb: dict[str, tuple[float, Path]]) -> list[str]:
    """Return a line for each {name: (GB, where)}; an InputError if a disk has not the room."""
    disks = {name: nearest_folder(path).stat().st_dev for name, (_, path) in needed_gb.items()}
    for name, (_, path) in needed_gb.items():
        together = [other for other in needed_gb if disks[other] == disks[name]]
        total = sum(needed_gb[other][0] for other in together)
        if total > free_gb(path):
            there = f"below {path}, {free_gb(path):.3g} GB are free"
            raise InputError(f"{' and '.join(together)} need {total:.3g} GB {there}")
    return [
        f"disk: at most {gb:.3g} GB of {name}; free: {free_gb(path):.3g} GB below {path}"
        for name, (gb, path) in needed_gb.items()
    ]


@contextmanager
def whole_file(
    path: Path, temporary_name: str = "", n_bytes: int = 0, is_durable: bool = True
) -> Iterator[Path]:
    """Yield a temporary path; flush it and rename it onto `path`, which is unharmed until then.

    A RunError if that fails. Where several processes may write `path`, each needs a temporary name;
    `n_bytes` is for the message when the disk is full. What is not durable may be cut short by a
    power failure.
    """
    temporary_path = path.with_name(TEMPORARY_PREFIX + (temporary_name or path.name))
    try:
        yield temporary_path
        if is_durable:
            with temporary_path.open("rb+") as file:
                os.fsync(file.fileno())
        temporary_path.replace(path)
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            needed = f"up to {n_bytes / 1e6:.1f} MB are needed, " if n_bytes else ""
            reason = (
                f"the disk is full: {needed}{1e3 * free_gb(path):.1f} MB are free. No file was "
                "damaged; with more space the same command, without --overwrite, resumes"
            )
        raise RunError(f"{path} cannot be written: {reason}") from None
    finally:
        temporary_path.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write bytes to a file, whole or not at all."""
    with whole_file(path, n_bytes=len(content)) as temporary_path:
        temporary_path.write_bytes(content)


def write_csv(path: Path, table: pd.DataFrame) -> None:
    """Write a table without its index; missing values are empty cells."""
    text = table.to_csv(index=False)
    write_bytes(path, text.encode(errors="backslashreplace"))  # file names need not be UTF-8


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file, indented."""
    text = json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n"
    write_bytes(path, text.encode(errors="backslashreplace"))  # which is how JSON escapes them


def write_npy(path: Path, values: list[float]) -> None:
    """Write numbers as a float64 .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(values, dtype=np.float64))
    write_bytes(path, buffer.getvalue())


def read_json(path: Path) -> dict:
    """Read a JSON file that holds an object; an InputError if it does not."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no JSON object")
    return content


def read_csv(path: Path, columns: dict[str, type]) -> pd.DataFrame:
    """Read a table that must have these columns, of these types; an InputError if it has not."""
    try:
        table = pd.read_csv(path, dtype=columns)
        if not set(columns) <= set(table):
            raise ValueError(f"{sorted(set(columns) - set(table))} are missing")
        return table
    except (OSError, ValueError, OverflowError) as error:
        raise InputError(f"{path} is not a table of {', '.join(columns)}: {error}") from None


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hex; an InputError if it is there no more."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path} cannot be read any more: {error.strerror}") from None
