"""The files of maps: one a scan, one a fold, and what is put together from the folds' files."""

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
from nibabel.spatialimages import SpatialImage

import files
import scan_files
from dataset import Cohort
from errors import InputError
from maps import OUTCOMES, FoldResult, RunningMean

MAX_NAME_BYTES = 80  # of a scan's name in the name of its map
TABLE_COLUMNS = {
    "path": str, "label": int, "fold": int, "predicted": int, "probability": float, "outcome": str,
    "logit": float, "map_sum": float, "completeness_error": float,
}  # fmt: skip


# Scans


class ScanMaps:
    """One method's maps of one fold's scans, a file each, written in the background.

    Parameters
    ----------
    outpath : Path
        They lie below it, in {M}_subjects.
    stem : str
        What the names of the method's files begin with.
    cohort : Cohort
    fold : int
    writer : Background
    """

    def __init__(
        self, outpath: Path, stem: str, cohort: Cohort, fold: int, writer: files.Background
    ):
        self.outpath, self.stem, self.cohort = outpath, stem, cohort
        self.fold, self.writer = fold, writer

    def name_of(self, row: int) -> str:
        """Return a map's path below the output folder; no name of a scan leads out of it."""
        name = Path(self.cohort.table["path"].iloc[row]).name.split(".")[0]
        name = re.sub(r"[^\w-]+", "_", name).encode()[:MAX_NAME_BYTES].decode(errors="ignore")
        return f"{self.stem}_subjects/{row + 1:05d}_{name}_f{self.fold}.nii.gz"

    def read(self, rows: list[int]) -> np.ndarray | None:
        """Return the scans' maps, (N, D, H, W), None unless an earlier command has left them."""
        paths = [self.outpath / self.name_of(row) for row in rows]
        if not all(path.is_file() for path in paths):
            return None
        return np.stack([read_map(path, self.cohort.volume_shape) for path in paths])

    def write(self, rows: list[int], found: np.ndarray) -> None:
        """Write the scans' maps, (N, D, H, W)."""
        for row, map_data in zip(rows, found, strict=True):
            path = self.outpath / self.name_of(row)
            path.parent.mkdir(exist_ok=True)
            self.writer.submit(files.write_map, path, map_data, self.cohort.like_img)


# Folds


def is_finished(outpath: Path, stem: str, fold: int) -> bool:
    """Tell whether a method has explained a fold: its table is what is written last."""
    return (outpath / f"{stem}_predictions_f{fold}.csv").is_file()


def write_fold(
    outpath: Path, stem: str, fold: int, result: FoldResult, like_img: SpatialImage
) -> None:
    """Write a fold's mean maps and, last, its table."""
    table = pd.DataFrame(list(result.rows.values()))
    files.write_map(outpath / f"{stem}_map_f{fold}.nii.gz", result.mean.mean(), like_img)
    for outcome, mean in result.by_outcome.items():
        if mean.n:
            path = outpath / f"{stem}_map_{outcome}_f{fold}.nii.gz"
            files.write_map(path, mean.mean(), like_img)
    files.write_csv(outpath / f"{stem}_predictions_f{fold}.csv", table)


def read_map(path: Path, volume_shape: tuple[int, int, int]) -> np.ndarray:
    """Return a map's values, float32 of this shape, in C order as before they were written.

    Raises
    ------
    InputError
        If it is damaged, or of another shape; then its values are not read.
    """
    map_img, problem = scan_files.open_scan(str(path))
    if map_img is not None and map_img.shape != volume_shape:
        problem = f"has shape {map_img.shape}, the scans have {volume_shape}"
    try:
        if not problem:
            return np.ascontiguousarray(scan_files.read_voxels(str(path)))
    except scan_files.READ_ERRORS as error:
        problem = scan_files.damage(error)
    raise InputError(f"{path} {problem}; start anew with --overwrite")


# All folds


def assemble(
    outpath: Path, stem: str, folds: list[int], cohort: Cohort, by_outcome: bool
) -> tuple[pd.DataFrame, list[Path]]:
    """Write what a method found over all folds, from each fold's files.

    Parameters
    ----------
    outpath : Path
    stem : str
        What the names of the method's files begin with.
    folds : list of int
        Each with its mean map and table in `outpath`.
    cohort : Cohort
    by_outcome : bool
        Also the mean map over all scans of each outcome.

    Returns
    -------
    table : DataFrame
        All folds' rows.
    written : list of Path
        The mean over the folds' maps, the table and, if asked for, the maps by outcome.
    """
    tables = [read_table(outpath / f"{stem}_predictions_f{fold}.csv") for fold in folds]
    table = pd.concat(tables, ignore_index=True)
    written = [outpath / f"{stem}_map_all.nii.gz", outpath / f"{stem}_predictions.csv"]
    write_mean(written[0], cohort, ((outpath / f"{stem}_map_f{f}.nii.gz", 1) for f in folds))
    files.write_csv(written[1], table)
    for outcome in OUTCOMES if by_outcome else ():
        counts = [int((t["outcome"] == outcome).sum()) for t in tables]
        parts = [
            (outpath / f"{stem}_map_{outcome}_f{fold}.nii.gz", n)
            for fold, n in zip(folds, counts, strict=True)
            if n
        ]
        if parts:
            written.append(outpath / f"{stem}_map_{outcome}.nii.gz")
            write_mean(written[-1], cohort, parts)
    return table, written


def read_table(path: Path) -> pd.DataFrame:
    """Read a table of explained scans; with --save-subjects it names each scan's map.

    Raises
    ------
    InputError
        If it is no such table.
    """
    return files.read_csv(path, TABLE_COLUMNS, {"map": str})


def write_mean(path: Path, cohort: Cohort, parts: Iterable[tuple[Path, int]]) -> None:
    """Write the weighted mean of maps, each given as (path, weight)."""
    mean = RunningMean()
    for part_path, n in parts:
        mean.add(read_map(part_path, cohort.volume_shape), n)
    files.write_map(path, mean.mean(), cohort.like_img)


def write_mean_scan(outpath: Path, stem: str, folds: list[int], cohort: Cohort) -> Path:
    """Write the mean of all explained scans, from each fold's; return its path."""
    tables = [read_table(outpath / f"{stem}_predictions_f{fold}.csv") for fold in folds]
    parts = [
        (outpath / f"mean_scan_f{fold}.nii.gz", len(table))
        for fold, table in zip(folds, tables, strict=True)
    ]
    path = outpath / "mean_scan.nii.gz"
    write_mean(path, cohort, parts)
    return path
