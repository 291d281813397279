"""The cohort: its scans, the checks on them, and the dataset that reads them."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from nibabel.spatialimages import SpatialImage
from torch.utils.data import Dataset

import csv_rows
import ranks
import scan_files
from errors import InputError
from utils import log, progress

if TYPE_CHECKING:
    from volume_file import Volumes

AFFINE_TOLERANCE_MM = 1e-3
FORMS_TOLERANCE_MM = 0.1  # between sform and qform, anywhere in the volume
MAX_PROBLEMS_SHOWN = 20
N_CHECK_THREADS = 8


@dataclass(frozen=True)
class Cohort:
    """A checked cohort.

    Attributes
    ----------
    table : DataFrame
        One row a scan: path (as the CSV has it), file (absolute), label, and subject if given.
    volume_shape : tuple of int, (D, H, W)
        Shape of every scan, in voxels.
    like_img : nibabel image
        The first scan, unread: its header says in which space the cohort lies.
    """

    table: pd.DataFrame
    volume_shape: tuple[int, int, int]
    like_img: SpatialImage

    @property
    def subjects(self) -> pd.Series | None:
        """Subject of each scan, None where the CSV has no such column."""
        return self.table.get("subject")


# The scans' headers, compared


def check_scans(table: pd.DataFrame) -> tuple[SpatialImage | None, list[str]]:
    """Check that all scans are good and in one space; return the first good one and problems."""
    with ThreadPoolExecutor(N_CHECK_THREADS) as pool:
        checks = pool.map(scan_files.check_scan, table["file"])
        checked = list(progress(checks, "checking", total=len(table), unit="scan"))
    problems = [
        f"row {line}: {path} {problem}"
        for line, path, (_, problem) in zip(table["line"], table["path"], checked, strict=True)
        if problem
    ]
    good = [(row, img) for row, (img, _) in zip(table.itertuples(), checked, strict=True) if img]
    if not good:
        return None, problems
    common_space, _ = Counter(space_of(img) for _, img in good).most_common(1)[0]
    like_img = next(img for _, img in good if space_of(img) == common_space)
    common_shape = scan_files.volume_shape_of(like_img)
    for row, img in good:
        if scan_files.volume_shape_of(img) != common_shape:
            problems.append(
                f"row {row.line}: {row.path} has shape {img.shape}, the other scans {common_shape}"
            )
        elif not np.allclose(img.affine, like_img.affine, rtol=0, atol=AFFINE_TOLERANCE_MM):
            problems.append(
                f"row {row.line}: {row.path} has another affine than {like_img.get_filename()}:\n"
                f"{img.affine}\ninstead of\n{like_img.affine}"
            )
    if not problems:
        warn_about_forms([(row.path, img) for row, img in good])
    return like_img, problems


def warn_about_forms(scans: list[tuple[str, SpatialImage]]) -> None:
    """Say once in how many scans sform and qform contradict each other."""
    apart_mm = {path: scan_files.forms_apart_mm(img) for path, img in scans}
    apart_mm = {path: mm for path, mm in apart_mm.items() if not mm <= FORMS_TOLERANCE_MM}
    if apart_mm:
        log.warning(
            "sform and qform place voxels of %d of %d scans up to %.3g mm apart; the sform is used "
            "(first: %s)", len(apart_mm), len(scans), max(apart_mm.values()), next(iter(apart_mm)),
        )  # fmt: skip


def space_of(img: SpatialImage) -> tuple:
    """Return a hashable key of an image's shape and affine."""
    return scan_files.volume_shape_of(img), (np.round(img.affine, 2) + 0.0).tobytes()


def read_cohort(csv_path: Path) -> Cohort:
    """Read the CSV and check every scan in it.

    Of the scans the headers are read, the last bytes, and voxels until two of them differ, so that
    hundreds of scans are checked in seconds.

    Parameters
    ----------
    csv_path : Path
        Columns path, label (0 or 1) and, optionally, subject; a header row is recognised.

    Returns
    -------
    Cohort

    Raises
    ------
    InputError
        With every problem found and its row.
    """
    table, like_path = ranks.from_first(lambda: check_cohort(csv_path))
    like_img = nib.load(like_path)
    return Cohort(table, scan_files.volume_shape_of(like_img), like_img)


def check_cohort(csv_path: Path) -> tuple[pd.DataFrame, str]:
    """Return the cohort's table and the file of its first scan, or raise what is wrong."""
    table, problems = csv_rows.parse_rows(csv_rows.read_rows(csv_path), csv_path)
    like_img, scan_problems = check_scans(table)
    problems += scan_problems
    if problems:
        shown = problems[:MAX_PROBLEMS_SHOWN]
        if len(problems) > len(shown):
            shown.append(f"… and {len(problems) - len(shown)} more problems")
        raise InputError(f"{csv_path}:\n  " + "\n  ".join(shown))
    table = table.drop(columns="line").astype({"label": int})
    if "subject" in table:
        warn_about_subjects(table)
    return table, like_img.get_filename()


def warn_about_subjects(table: pd.DataFrame) -> None:
    """Say how many subjects column 3 names, and which of them have both labels."""
    n_labels = table.groupby("subject")["label"].nunique()
    log.info("column 3 is taken as the subject: %d subjects, %d scans", len(n_labels), len(table))
    mixed = n_labels.index[n_labels > 1]
    if len(mixed):
        names = ", ".join(map(str, mixed[:5]))
        log.warning("%d subjects have scans of both labels: %s", len(mixed), names)


# Volumes


class ScanDataset(Dataset):
    """Scans as (volume, label, row), read on demand.

    Parameters
    ----------
    table : DataFrame
        The cohort's table (file, label).
    rows : int array, shape (n,)
        The rows of the table that belong to this dataset.
    cached : volume_file.Volumes, optional
        The cohort's decoded volumes; without them every scan is decoded whenever it is asked for.

    Notes
    -----
    `volume` is float32 of shape (1, D, H, W), scaled to [0, 1]; `label` and `row` are int.
    `n_nonfinite` counts each scan's non-finite voxels once it has been read, in any worker process.
    """

    def __init__(self, table: pd.DataFrame, rows: np.ndarray, cached: "Volumes | None" = None):
        self.files = table["file"].to_numpy()[rows]
        self.labels = table["label"].to_numpy()[rows]
        self.rows = np.asarray(rows)
        self.cached = cached
        self.n_nonfinite = torch.zeros(len(rows), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, int]:
        row = int(self.rows[index])
        if self.cached is None:
            volume_data, self.n_nonfinite[index] = scan_files.load_volume(self.files[index])
        else:
            volume_data, self.n_nonfinite[index] = self.cached[row], self.cached.n_nonfinite[row]
        return torch.from_numpy(volume_data[None]), int(self.labels[index]), row
