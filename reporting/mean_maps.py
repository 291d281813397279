"""The mean maps over folds, from each fold's files, and what their records say of them."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
from nibabel.spatialimages import SpatialImage

import utils
from loading import image
from reporting import map_pictures
from reporting.maps import (
    COVERAGE,
    IG_TOLERANCE,
    KINDS,
    MEAN_SCAN,
    OUTCOME_NAMES,
    OUTCOMES,
    TABLE_COLUMNS,
    UNITS,
    RunningMean,
    read_map,
    title_of,
)  # fmt: skip
from run_folder import files
from utils import log, named

MAX_SHARE = 0.5  # of the power of all folds' maps, by one fold
NO_CONTRAST = "%s: the contrast leaves out %s, where all scans have one label"


def write_mean(path: Path, parts: Iterable[tuple[Path, int]], like_img: SpatialImage) -> None:
    """Write the weighted mean of maps, each given as (path, weight)."""
    mean = RunningMean()
    for part_path, n in parts:
        mean.add(read_map(part_path, image.volume_shape(like_img)), n)
    image.write_image(path, mean.mean(), like_img)


def power(data: np.ndarray, mask_data: np.ndarray) -> float:
    """Return the sum of squares of a map inside a mask."""
    return float(np.square(data[mask_data], dtype=np.float64).sum())


def assemble(
    outpath: Path, stem: str, n_folds: int, like_img: SpatialImage, by_outcome: bool, equal: bool,
    described: str,
) -> tuple[pd.DataFrame, dict[int, float], list[Path]]:  # fmt: skip
    """Write what a method found over all folds, from each fold's maps and table.

    With `equal` each fold's map is scaled to the mean of all folds' root mean squares before the
    mean over folds, and its contrast with it; maps that are 0 are left out. Contrasts are those of
    the folds that have one. `described` goes into the maps' headers. Returns all folds' lines, each
    fold's share of the power (sum of squares, where at least half of the scans are not 0), and the
    files.
    """
    shape = image.volume_shape(like_img)
    paths = [outpath / f"{stem}_predictions_f{fold}.csv" for fold in range(n_folds)]
    tables = [files.read_csv(path, TABLE_COLUMNS) for path in paths]
    table = pd.concat(tables, ignore_index=True)
    written = [outpath / MEAN_SCAN, outpath / COVERAGE, outpath / f"{stem}_predictions.csv"]
    for path in written[:2]:
        name = path.name.removesuffix(".nii.gz")
        parts = [(outpath / f"{name}_f{fold}.nii.gz", len(t)) for fold, t in enumerate(tables)]
        write_mean(path, parts, like_img)
    files.write_csv(written[2], table)

    mask_data = read_map(outpath / COVERAGE, shape) >= 0.5
    fold_maps = {fold: outpath / f"{stem}_map_f{fold}.nii.gz" for fold in range(n_folds)}
    powers = {fold: power(read_map(path, shape), mask_data) for fold, path in fold_maps.items()}
    total = sum(powers.values())
    shares = {fold: each / total if total else 0.0 for fold, each in powers.items()}
    weights = dict.fromkeys(fold_maps, 1.0)
    if equal and total:
        roots = {fold: np.sqrt(each) for fold, each in powers.items() if each}
        weights = {fold: np.mean(list(roots.values())) / root for fold, root in roots.items()}
    for kind in KINDS:
        mean = RunningMean()
        for fold, weight in weights.items():
            path = outpath / f"{stem}_{kind}_f{fold}.nii.gz"
            if kind == "map" or path.is_file():
                mean.add(read_map(path, shape) * weight)
        if mean.n:
            written.append(outpath / f"{stem}_{kind}_all.nii.gz")
            labels = map_pictures.color_labels(mean.mean(), f"{stem} {kind}", described)
            image.write_image(written[-1], mean.mean(), like_img, labels=labels)
        if 0 < mean.n < len(weights):
            missing = [f for f in weights if not (outpath / f"{stem}_{kind}_f{f}.nii.gz").is_file()]
            log.warning(NO_CONTRAST, stem, named("fold", missing))
    for outcome in OUTCOMES if by_outcome else ():
        counts = [int((t["outcome"] == outcome).sum()) for t in tables]
        parts = [
            (outpath / f"{stem}_map_{outcome}_f{fold}.nii.gz", n)
            for fold, n in enumerate(counts)
            if n
        ]
        if parts:
            written.append(outpath / f"{stem}_map_{outcome}.nii.gz")
            write_mean(written[-1], parts, like_img)
    return table, shares, written


def draw_outcomes(
    outpath: Path, stem: str, method: str, table: pd.DataFrame, unit: str
) -> list[Path]:
    """Draw the maps by outcome that there are, with their numbers of scans; return the pictures."""
    drawn = []
    for outcome, n_scans in table["outcome"].value_counts().items():
        map_stem = outpath / f"{stem}_map_{outcome}"
        if map_stem.with_suffix(".nii.gz").is_file():
            title = f"{method}, {OUTCOME_NAMES[outcome]} ({outcome}): {n_scans} scans"
            drawn += map_pictures.draw_map(
                map_stem, outpath / MEAN_SCAN, title, unit, has_viewer=False
            )
    return drawn


def describe(method: str, table: pd.DataFrame, shares: dict[int, float]) -> dict:
    """Return what a sidecar says of the scans behind a mean map; warn of what is odd."""
    parts = set(table["part"].fillna(""))
    n_zero = (table["map_sum"] == 0).groupby(table["fold"]).sum()
    warn_of(method, n_zero, shares, parts)
    median = float(table["completeness_error"].median())
    error = None if np.isnan(median) else median
    if error is not None:
        is_large = method == "IG" and error > IG_TOLERANCE
        say, advice = (log.warning, "; more --steps lower it") if is_large else (log.info, "")
        say("%s: median completeness error %.2g%s", method, error, advice)
    return {
        "held_out": None if "" in parts else parts <= {"test", "new"},
        "scans_per_fold": {str(fold): int(n) for fold, n in table.groupby("fold").size().items()},
        "zero_maps_per_fold": {str(fold): int(n) for fold, n in n_zero.items()},
        "power_share_per_fold": {str(fold): round(share, 4) for fold, share in shares.items()},
        "median_completeness_error": error,
    }


def warn_of(method: str, n_zero: pd.Series, shares: dict[int, float], parts: set[str]) -> None:
    """Say what a reader of a mean map must know of the maps that went into it."""
    if n_zero.any():
        zeros = ", ".join(f"{n} of fold {fold}" for fold, n in n_zero[n_zero > 0].items())
        log.warning("%s: maps of scans that are 0 everywhere count in the mean: %s", method, zeros)
    for fold, share in shares.items():
        if share > max(MAX_SHARE, 2 / len(shares)) or share == 0:
            log.warning(
                "%s: fold %d has %.0f %% of the power of all folds' maps: the mean is the map of "
                "the folds with the largest logits; see --mean equal", method, fold, 100 * share,
            )  # fmt: skip
    if parts & {"train", "val"}:
        log.warning("%s: not all explained scans were held out; see the column part", method)


def write_background(
    outpath: Path, mean: np.ndarray, coverage: np.ndarray, like_img: SpatialImage
) -> None:
    """Write what a baseline's maps are drawn on and masked by, each (n_voxels,)."""
    for name, values in ((MEAN_SCAN, mean), (COVERAGE, coverage)):
        data = values.reshape(image.volume_shape(like_img))
        image.write_image(outpath / name, data, like_img)


def write_baseline(
    outpath: Path, name: str, of_folds: np.ndarray, like_img: SpatialImage, method: str,
    sidecar: dict,
) -> list[Path]:  # fmt: skip
    """Write a baseline's maps of the folds, (n_folds, D, H, W), and what belongs to their mean.

    `name` and `_f0` … or `_all` make the files' names. Returns those of the mean.
    """
    if len(of_folds) > 1:
        for fold, map_data in enumerate(of_folds):
            image.write_image(outpath / f"{name}_f{fold}.nii.gz", map_data, like_img)
    stem = outpath / f"{name}_all"
    mean_data = of_folds.mean(0, dtype=np.float64)
    sidecar = {"method": method, "n_folds": len(of_folds)} | sidecar
    title = title_of(sidecar)
    labels = map_pictures.color_labels(mean_data, name, title)
    image.write_image(stem.with_suffix(".nii.gz"), mean_data, like_img, labels=labels)
    general = {
        "unit": UNITS[method],
        "background": MEAN_SCAN,
        "orientation": image.orientation_of(like_img),
        "versions": utils.versions(),
    }
    files.write_json(stem.with_suffix(".json"), sidecar | general)
    drawn = map_pictures.draw_map(stem, outpath / MEAN_SCAN, title, UNITS[method])
    return [stem.with_suffix(".nii.gz"), stem.with_suffix(".json"), *drawn]
