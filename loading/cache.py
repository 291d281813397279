"""A cohort's scaled volumes, decoded once: one .npy file a scan in a folder that many may fill.

A file is named by what it was decoded from (path, size and time of the scan, version of the
scaling), written aside and renamed. What is missing, or has not its full size, is decoded; so
processes and hosts may fill one folder together, whenever any of them is killed.
"""

import hashlib
import json
import math
import os
import platform
import random
import re
import shutil
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from loading import image
from run_folder import files
from utils import RunError, log, progress, some_of

if TYPE_CHECKING:  # what uses no batches needs no torch
    import torch
    from torch import Tensor

SCALING_VERSION = 1  # to be raised when `image.load_volume` gives other voxels
HEADER_BYTES = 128  # of a .npy file of float32 volumes
N_AHEAD = 2  # batches
BLOCK_BYTES = 128 * 2**20  # of float32 voxels of all scans at once; float64 makes it thrice that
MIN_RANGE_VOXELS = 4096  # 16 kB a read: with shorter ones a disk does nothing but seek
MAX_SHARE_OF_GPU = 0.4  # of its free memory, that volumes may take for a whole run
N_COPIED = 8  # volumes at a time
DARK = 0.2  # 99.9th percentile of a scaled volume, below which a few voxels take the range
MAX_WRITING_SECONDS = 3600.0  # a temporary file untouched for so long has lost its writer
OTHER_HALF = {"hdr": "img", "img": "hdr", "HDR": "IMG", "IMG": "HDR"}


class Volumes:
    """The scaled volumes of a cohort's scans, in its order, with an int64 label each.

    They are kept in a folder once n_workers threads decoded them; without one they are decoded
    whenever they are asked for.
    """

    def __init__(
        self, scans: list[str], labels: np.ndarray, shape: tuple[int, int, int],
        folder: Path | None = None, n_workers: int = 0,
    ):  # fmt: skip
        self.scans, self.labels, self.shape, self.folder = scans, labels, shape, folder
        self.n_workers = max(1, n_workers)
        self.n_voxels = math.prod(shape)
        self.facts: dict[int, dict] = {}  # by row, of the scans decoded so far
        self.warned: set[int] = set()  # rows that `_warn` has seen
        if folder is not None:
            self.paths = [folder / f"{_key(scan)}.npy" for scan in scans]
        self.kept: Tensor | None = None  # all volumes, (n, 1, D, H, W), on a GPU

    def __len__(self) -> int:
        return len(self.scans)

    @property
    def gb(self) -> float:
        """Size of all decoded volumes."""
        return len(self) * (HEADER_BYTES + 4 * self.n_voxels) / 1e9

    def missing(self) -> list[int]:
        """Return the rows of the scans that are still to be decoded into the folder."""
        return [row for row in range(len(self)) if not self._is_there(row)]

    def _is_there(self, row: int) -> bool:
        """Tell whether a scan's file is there, and whole."""
        try:
            return self.paths[row].stat().st_size == HEADER_BYTES + 4 * self.n_voxels
        except OSError:
            return False

    def check_room(self) -> None:
        """Raise an InputError if the folder cannot be written, or what is missing does not fit."""
        if self.folder is not None:
            files.check_outpath(self.folder, "--cache-dir")
            missing_gb = self.gb * len(self.missing()) / len(self)
            files.check_room({"decoded scans (see --cache-dir)": (missing_gb, self.folder)})

    def fill(self) -> None:
        """Decode what is missing; a RunError if one fails: what was decoded until then is kept."""
        if self.folder is None:
            return
        rows = self.missing()
        files.make_outpath(self.folder, "--cache-dir")
        for path in self.folder.glob(f"{files.TEMPORARY_PREFIX}*"):
            with suppress(FileNotFoundError):  # somebody else is done with it
                if time.time() - path.stat().st_mtime > MAX_WRITING_SECONDS:
                    path.unlink()
        if rows:
            gb = f"{self.gb * len(rows) / len(self):.2f} GB"
            log.info("decoding %d of %d scans into %s (%s)", len(rows), len(self), self.folder, gb)
        random.Random().shuffle(rows)  # those who fill the folder together start apart
        pool = ThreadPoolExecutor(self.n_workers)
        try:
            list(progress(pool.map(self._decode, rows), "decoding", total=len(rows)))
        finally:
            pool.shutdown(cancel_futures=True)
        self.facts = {row: self._facts_of(row) for row in range(len(self))}
        self._warn()

    def _decode(self, row: int) -> None:
        """Write a scan's file, unless somebody else has meanwhile."""
        if self._is_there(row):
            return
        volume_data = self._load(row)
        mine = f"{platform.node()}-{os.getpid()}-{threading.get_ident()}-{self.paths[row].name}"
        header = np.lib.format.header_data_from_array_1_0(volume_data)
        # a file that a power failure cuts short has not its full size, and is decoded again
        whole_file = files.whole_file(self.paths[row], mine, volume_data.nbytes, is_durable=False)
        with whole_file as temporary_path, temporary_path.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)  # np.save would hide a full disk
            file.write(volume_data.data)
        with suppress(OSError):  # where they are missing, or cut, they are computed anew
            self.paths[row].with_suffix(".json").write_text(json.dumps(self.facts[row]))

    def _load(self, row: int) -> np.ndarray:
        """Decode a scan."""
        volume_data, n_nonfinite = image.load_volume(self.scans[row])
        if volume_data.shape != tuple(self.shape):
            raise RunError(f"{self.scans[row]} now has shape {volume_data.shape}, not {self.shape}")
        if row not in self.facts:
            self.facts[row] = image.describe_volume(volume_data, n_nonfinite)
        return volume_data

    def _facts_of(self, row: int) -> dict:
        """Return what `image.describe_volume` says of a decoded scan, from the file beside it."""
        try:
            return json.loads(self.paths[row].with_suffix(".json").read_text())
        except (OSError, ValueError):
            return image.describe_volume(self[row], 0)

    def _warn(self) -> None:
        """Say what is odd about the scans decoded so far, of each scan once."""
        rows = sorted(set(self.facts) - self.warned)
        self.warned.update(rows)
        n_bad = {row: n for row in rows if (n := self.facts[row]["n_nonfinite"])}
        if n_bad:
            names, n_voxels = some_of(self.scans[row] for row in n_bad), sum(n_bad.values())
            remark = "%d non-finite voxels in %d scans were set to 0: %s"
            log.warning(remark, n_voxels, len(n_bad), names)
        copies = pd.Series({row: self.facts[row]["crc32"] for row in rows}, dtype=object)
        kinds = {
            "have an outlier: a few bright voxels take most of the range, and leave the others "
            "little contrast": [row for row in rows if self.facts[row]["top"] < DARK],
            "have a background that is not 0 after scaling, as LRP needs it: there are values "
            "below it, or it is NaN": [row for row in rows if self.facts[row]["filling"]],
            "are copies of each other, voxel by voxel": copies.index[copies.duplicated(keep=False)],
        }
        for what, odd in kinds.items():
            if len(odd):
                names = some_of(self.scans[row] for row in odd)
                log.warning("%d of %d scans %s: %s", len(odd), len(self), what, names)

    def __getitem__(self, row: int) -> np.ndarray:
        """Return a scan's volume, float32 of shape (D, H, W); writing to it changes no file."""
        if self.folder is None:
            return self._load(row)
        return np.load(self.paths[row], mmap_mode="c", allow_pickle=False)

    def batches(
        self, rows: np.ndarray, batch: int, device: "torch.device"
    ) -> "Iterator[tuple[Tensor, Tensor]]":
        """Yield volumes (N, 1, D, H, W) and labels (N,) of scans, at most `batch` at a time.

        The next batches are read meanwhile, for a GPU into pinned memory.
        """
        import torch

        parts = deque(rows[start : start + batch] for start in range(0, len(rows), batch))
        if self.kept is not None:
            for part in parts:
                wanted = torch.from_numpy(part).to(device)
                yield self.kept[wanted], torch.from_numpy(self.labels[part]).to(device)
            return
        n_ahead = N_AHEAD if self.folder else max(N_AHEAD, self.n_workers)
        pool, coming = ThreadPoolExecutor(self.n_workers), deque()
        try:
            while parts or coming:
                while parts and len(coming) < n_ahead:
                    coming.append(pool.submit(self._batch, parts.popleft(), device.type == "cuda"))
                tensors = coming.popleft().result()
                yield tuple(tensor.to(device, non_blocking=True) for tensor in tensors)
        finally:
            pool.shutdown(cancel_futures=True)
        self._warn()

    def gb_on(self, device: "torch.device", needed_gb: float) -> float:
        """Return what all volumes take of a GPU that has room for them and the work; else 0."""
        from run_folder.device import available_gb

        free_gb = available_gb(device)
        room_gb = min(MAX_SHARE_OF_GPU * free_gb, free_gb - needed_gb)
        return self.gb if device.type == "cuda" and self.gb <= room_gb else 0.0

    def keep_on(self, device: "torch.device", needed_gb: float) -> None:
        """Keep all volumes on a GPU from now on, if it has room for them and for the work."""
        import torch

        if device.type == "cpu" or self.kept is not None:
            return
        if not self.gb_on(device, needed_gb):
            log.info("%.3g GB of scans are read in every epoch: they fill %s", self.gb, device)
            return
        rows, kept = np.arange(len(self)), torch.empty(len(self), 1, *self.shape, device=device)
        bar = progress(self.batches(rows, N_COPIED, device), "copying to the GPU")
        for first, (volumes, _) in zip(rows[::N_COPIED], bar, strict=True):
            kept[first : first + N_COPIED] = volumes
        self.kept = kept

    def _batch(self, rows: np.ndarray, pinned: bool) -> "list[Tensor]":
        """Return volumes and labels of some scans, on the CPU."""
        import torch

        volumes = torch.from_numpy(np.stack([self[row] for row in rows])[:, None])
        tensors = [volumes, torch.from_numpy(self.labels[rows])]
        return [tensor.pin_memory() for tensor in tensors] if pinned else tensors

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return a range of voxels of all decoded scans, float32, (n_scans, stop − start)."""
        block = np.empty((len(self), stop - start), dtype=np.float32)
        for row, path in enumerate(self.paths):
            with path.open("rb") as file:
                file.seek(HEADER_BYTES + 4 * start)
                file.readinto(block[row])
        return block

    def blocks(
        self, description: str, block_bytes: int = BLOCK_BYTES
    ) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield ranges of voxels, and these of all decoded scans, float64, (n_scans, n_voxels)."""
        n_at_once = max(MIN_RANGE_VOXELS, block_bytes // (4 * len(self)))
        for start in progress(range(0, self.n_voxels, n_at_once), description):
            stop = min(start + n_at_once, self.n_voxels)
            yield slice(start, stop), self.read(start, stop).astype(np.float64)

    def table(self) -> pd.DataFrame:
        """Return size in bytes and CRC-32 of each scan, as scans.csv has them."""
        sizes = [Path(scan).stat().st_size for scan in self.scans]
        crc32 = [self.facts[row]["crc32"] for row in range(len(self))]
        return pd.DataFrame({"bytes": sizes, "crc32": crc32})

    def remove(self, is_own: bool) -> None:
        """Remove the folder if it is the run's own; a folder that the user named stays."""
        if is_own and self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
        elif self.folder is not None and self.folder.is_dir():
            log.info("%.2f GB of decoded scans stay in --cache-dir %s", self.gb, self.folder)


def _key(scan: str) -> str:
    """Return the name of a decoded scan: a hash of what it is decoded from."""
    other = re.sub(
        r"(?<=\.)(hdr|img)(?=(\.gz|\.bz2)?$)", lambda match: OTHER_HALF.get(match[0], match[0]),
        scan, flags=re.IGNORECASE,
    )  # fmt: skip
    facts = [SCALING_VERSION, scan]
    for path in dict.fromkeys((scan, other)):
        try:
            stat = Path(path).stat()
        except OSError:
            continue  # decoding says what is wrong
        facts += [stat.st_size, stat.st_mtime_ns]
    text = "\0".join(map(str, facts))
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:32]
