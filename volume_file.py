"""One file of scaled volumes, one scan a row, and an index of what is in it.

`volumes.f32` is float32 in C order. `index.npy` has each scan's size and time when it was decoded:
a row is entered once it is on the disk, so what a killed process leaves is never read half-written,
and the next one goes on from there. A scan whose size or time has changed is decoded anew.
"""

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import files
import scan_files
from dataset import Cohort
from errors import RunError
from utils import log

INDEX_ROW = np.dtype([("size", "i8"), ("mtime_ns", "i8"), ("n_nonfinite", "i8")])
NOT_DECODED = np.array((-1, -1, 0), dtype=INDEX_ROW)
SAVE_SECONDS = 5  # a killed process loses what it decoded since the index was saved


@dataclass(frozen=True)
class Volumes:
    """A cohort's scaled volumes on disk; a process that is handed them is handed a path.

    Attributes
    ----------
    path : Path
    n_scans : int
    shape : tuple of int, (D, H, W)
    n_nonfinite : int array, shape (n_scans,)
        How many voxels of each scan were NaN or infinite and set to 0.
    """

    path: Path
    n_scans: int
    shape: tuple[int, int, int]
    n_nonfinite: np.ndarray

    @property
    def n_voxels(self) -> int:
        """Voxels of one scan."""
        return int(np.prod(self.shape))

    def __getitem__(self, row: int) -> np.ndarray:
        """Return a scan's volume, float32 of shape (D, H, W), mapped; changes stay private."""
        return np.memmap(self.path, np.float32, "c", 4 * self.n_voxels * row, self.shape)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return a range of voxels of all scans, float32 of shape (n_scans, stop − start)."""
        block = np.empty((self.n_scans, stop - start), dtype=np.float32)
        with self.path.open("rb") as file:
            for row in range(self.n_scans):
                file.seek(4 * (row * self.n_voxels + start))
                file.readinto(block[row])
        return block


def bytes_allocated(folder: Path) -> int:
    """Return how much of a disk a folder's volumes take already, whatever they hold."""
    try:
        return 512 * (folder / "volumes.f32").stat().st_blocks
    except OSError:
        return 0


def bytes_of_scan(cohort: Cohort) -> int:
    """Return the size of one scaled volume."""
    return 4 * int(np.prod(cohort.volume_shape))


def open_volumes(cohort: Cohort, folder: Path) -> Volumes:
    """Return the volumes of a folder in which every scan has been decoded."""
    n_nonfinite = read_index(cohort, folder)["n_nonfinite"]
    return Volumes(folder / "volumes.f32", len(n_nonfinite), cohort.volume_shape, n_nonfinite)


# The index


def read_index(cohort: Cohort, folder: Path) -> np.ndarray:
    """Return the index of a folder in which there may be nothing yet."""
    n_scans = len(cohort.table)
    try:
        index = np.load(folder / "index.npy", allow_pickle=False)
        n_bytes = (folder / "volumes.f32").stat().st_size
        fits = (index.dtype, index.shape) == (INDEX_ROW, (n_scans,))
        if fits and n_bytes == n_scans * bytes_of_scan(cohort):
            return index
    except (OSError, ValueError, EOFError):
        pass
    return np.full(n_scans, NOT_DECODED)


def save_index(folder: Path, index: np.ndarray) -> None:
    """Put the volumes on the disk, then the index that speaks of them."""
    with files.whole_file(folder / "index.npy") as path:
        with (folder / "volumes.f32").open("rb+") as volumes:
            os.fsync(volumes.fileno())
        with path.open("wb") as file:
            np.save(file, index)


def stale_rows(cohort: Cohort, index: np.ndarray) -> list[int]:
    """Return the rows whose scan has not been decoded, or has changed since."""
    stale = []
    for row, (file, known) in enumerate(zip(cohort.table["file"], index, strict=True)):
        try:
            is_current = scan_files.stamp(file) == (known["size"], known["mtime_ns"])
        except OSError:
            is_current = False
        if not is_current:
            stale.append(row)
    return stale


# Decoding


class Decoder(Dataset):
    """Decodes a scan into its row of the file; gives (row, its index entry, what went wrong)."""

    def __init__(self, cohort: Cohort, folder: Path):
        self.files = cohort.table["file"].to_numpy()
        self.shape, self.n_bytes = cohort.volume_shape, bytes_of_scan(cohort)
        self.path = folder / "volumes.f32"

    def __getitem__(self, row: int) -> tuple[int, tuple[int, ...], str]:
        try:
            # before reading: a later change will show
            size, mtime_ns = scan_files.stamp(self.files[row])
            volume_data, n_nonfinite = scan_files.load_volume(self.files[row])
            if volume_data.shape != self.shape:
                return row, (), f"{self.files[row]} now has shape {volume_data.shape}"
            with self.path.open("rb+") as file:
                file.seek(row * self.n_bytes)
                file.write(np.ascontiguousarray(volume_data).data)
        except RunError as error:
            return row, (), str(error)
        except OSError as error:
            n_bytes = len(self.files) * self.n_bytes
            return row, (), files.describe_failure(self.path, n_bytes, error)
        return row, (size, mtime_ns, n_nonfinite), ""


def decode(cohort: Cohort, folder: Path, n_workers: int) -> None:
    """Decode what is missing or has changed, and enter in the index what is done.

    Raises
    ------
    RunError
        If a scan cannot be decoded, or a worker process dies; what was decoded is kept.
    """
    index = read_index(cohort, folder)
    rows = stale_rows(cohort, index)
    if not rows:
        return
    n_scans, n_bytes = len(cohort.table), bytes_of_scan(cohort)
    n_gb = n_scans * n_bytes / 1e9
    log.info("%d of %d scans are decoded into %s (%.2f GB)", len(rows), n_scans, folder, n_gb)
    try:
        if len(rows) == n_scans:  # an index of volumes that are gone must not speak of these
            (folder / "index.npy").unlink(missing_ok=True)
        with (folder / "volumes.f32").open("ab") as file:
            file.truncate(n_scans * n_bytes)
    except OSError as error:
        raise RunError(files.describe_failure(folder / "volumes.f32", None, error)) from None
    index[rows] = NOT_DECODED
    save_index(folder, index)
    loader = DataLoader(Decoder(cohort, folder), None, sampler=rows, num_workers=n_workers)
    problem, saved_at = "", time.monotonic()
    try:
        for row, entry, problem in tqdm(loader, "decoding", unit="scan", disable=None):
            if problem:
                break
            index[row] = tuple(entry)
            if time.monotonic() - saved_at > SAVE_SECONDS:
                save_index(folder, index)
                saved_at = time.monotonic()
    except RuntimeError as error:  # of DataLoader
        problem = f"decoding stopped ({error}); with fewer --workers it needs less memory"
    finally:
        with contextlib.suppress(RunError if problem else ()):  # of the same full disk
            save_index(folder, index)
    if problem:
        raise RunError(f"{problem}\nwhat is decoded already is kept in {folder}")
