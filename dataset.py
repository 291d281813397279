"""The cohort: its CSV, the checks on it, and the dataset that reads its scans."""

import csv
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from nibabel.spatialimages import SpatialImage
from torch.utils.data import Dataset
from tqdm import tqdm

import scan_files
from utils import InputError, log

if TYPE_CHECKING:
    from volume_file import Volumes

LABELS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1}  # spreadsheets and pandas write 1.0 for 1
IMAGE_SUFFIXES = (".nii", ".nii.gz", ".hdr", ".img", ".img.gz", ".hdr.gz", ".mgz", ".mgh", ".mnc")
AFFINE_TOLERANCE_MM = 1e-3
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


# The CSV


def read_rows(csv_path: Path) -> list[tuple[int, list[str]]]:
    """Return the CSV's rows as (line number, cells), without header row and empty lines."""
    try:
        with csv_path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, skipinitialspace=True)
            rows = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader]
    except FileNotFoundError:
        raise InputError(f"there is no CSV file {csv_path}") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{csv_path} cannot be read as a CSV file: {error}") from None
    rows = [(line, cells) for line, cells in rows if any(cells)]
    if rows and is_header(rows[0][1]):
        del rows[0]
    if not rows:
        raise InputError(f"{csv_path} lists no scan")
    return rows


def is_header(cells: list[str]) -> bool:
    """Tell whether the first row names columns instead of a scan."""
    has_label = len(cells) > 1 and cells[1] in LABELS
    return not has_label and not cells[0].lower().endswith(IMAGE_SUFFIXES)


def find_file(text: str, csv_path: Path) -> Path | None:
    """Look a path up from the CSV's folder, then from the working directory."""
    try:
        path = Path(text).expanduser()
        for candidate in (csv_path.parent / path, path):
            if candidate.is_file():
                return candidate.resolve()
    except (OSError, RuntimeError):  # a name too long, a folder not ours, an unknown ~user
        return None
    return None


def parse_rows(rows: list[tuple[int, list[str]]], csv_path: Path) -> tuple[pd.DataFrame, list[str]]:
    """Return the scans that the rows name, with their line, and the problems found."""
    has_subjects = any(len(cells) > 2 and cells[2] for _, cells in rows)
    scans, problems, line_of_file = [], [], {}
    for line, cells in rows:
        if len(cells) < 2:
            problems.append(
                f"row {line}: needs a path and a label separated by a comma, got {cells[0]!r}"
            )
            continue
        label = LABELS.get(cells[1])
        if label is None:
            problems.append(f"row {line}: label must be 0 or 1, got {cells[1]!r}")
        subject = cells[2] if has_subjects and len(cells) > 2 else ""
        if has_subjects and not subject:
            problems.append(f"row {line}: the subject is empty while other rows have one")
        file = find_file(cells[0], csv_path)
        if file is None:
            problems.append(f"row {line}: there is no file {cells[0]!r}")
            continue
        if file in line_of_file:
            problems.append(
                f"row {line}: {cells[0]!r} is listed already, in row {line_of_file[file]}"
            )
            continue
        line_of_file[file] = line
        scans.append(
            {"path": cells[0], "file": str(file), "label": label, "subject": subject, "line": line}
        )
    columns = ["path", "file", "label", "subject", "line"]
    table = pd.DataFrame(scans, columns=columns)
    return table if has_subjects else table.drop(columns="subject"), problems


# The scans' headers, compared


def check_scans(table: pd.DataFrame) -> tuple[SpatialImage | None, list[str]]:
    """Check that all scans are good and in one space; return the first good one and problems."""
    with ThreadPoolExecutor(N_CHECK_THREADS) as pool:
        checks = pool.map(scan_files.check_scan, table["file"])
        checked = list(tqdm(checks, total=len(table), desc="checking", unit="scan", disable=None))
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
    return like_img, problems


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
    table, problems = parse_rows(read_rows(csv_path), csv_path)
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
    return Cohort(table, scan_files.volume_shape_of(like_img), like_img)


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


class BatchStacker:
    """Stacks scans into batches, in memory that is used again once nobody holds a batch of it.

    Fresh memory comes from the system a page at a time, which takes longer than the copying.
    """

    def __init__(self):
        self.free = []

    def __call__(self, scans: list[tuple[torch.Tensor, int, int]]) -> tuple[torch.Tensor, ...]:
        volumes, labels, rows = zip(*scans, strict=True)
        n_values = len(volumes) * volumes[0].numel()
        memory = self.free.pop() if self.free else np.empty(n_values, dtype=np.float32)
        if len(memory) < n_values:
            memory = np.empty(n_values, dtype=np.float32)
        batch = memory[:n_values].reshape(len(volumes), *volumes[0].shape)
        weakref.finalize(batch, self.free.append, memory)  # the tensor keeps it alive
        np.stack(volumes, out=batch)
        return torch.from_numpy(batch), torch.tensor(labels), torch.tensor(rows)
