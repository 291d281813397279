"""A cohort seen at a glance: the same slices of its scans, those least like the mean first."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from loading.cache import Volumes
from reporting.pictures import label_of, save_figure
from utils import log, progress

N_SHOWN, N_NAMED, N_COLUMNS, ROW_INCHES = 60, 10, 10, 0.9
GRID_VOXELS = 20**3  # 1.6 GB of 50,000 scans
N_LOOKED_AT = 100  # scans of a cohort by a dry run
GROUPS = {"least like the mean": "#c33", "most": "#393", "first": "#36c", "last": "#666"}


def likeness(volumes: Volumes, rows: Sequence[int]) -> np.ndarray:
    """Return the correlation of some scans with their mean, (n,); NaN of a flat one.

    It is taken over a grid of about `GRID_VOXELS` voxels, so that scans are read once.
    """
    step = math.ceil((volumes.n_voxels / GRID_VOXELS) ** (1 / 3))
    grid = (slice(step // 2, None, step),) * 3
    bar = progress(rows, "at a glance", unit="scan")
    values = np.stack([volumes[row][grid].ravel() for row in bar])
    mean = values.mean(0, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.array([np.corrcoef(each, mean)[0, 1] for each in values])


def choose(r: np.ndarray) -> list[tuple[int, str]]:
    """Return the rows to show, and why: all, or those least and most like the mean, first, last."""
    order = np.argsort(np.nan_to_num(r, nan=-2), kind="stable")
    if len(r) <= N_SHOWN:
        return [(int(row), "least like the mean") for row in order]
    n = N_SHOWN // len(GROUPS)
    rows = (order[:n], order[::-1][:n], range(n), range(len(r) - n, len(r)))
    return [(int(row), why) for why, some in zip(GROUPS, rows, strict=True) for row in some]


def named(r: np.ndarray, paths: pd.Series) -> list[str]:
    """Return the scans that are least like the mean, with their correlations."""
    order = np.argsort(np.nan_to_num(r, nan=-2), kind="stable")[:N_NAMED]
    return [f"{paths.iloc[row]} {r[row]:.3f}" for row in order]


def at_a_glance(volumes: Volumes, paths: pd.Series) -> str:
    """Return what a dry run says of some scans of the cohort, evenly taken from its rows."""
    rows = np.unique(np.linspace(0, len(volumes) - 1, N_LOOKED_AT).astype(int))
    r = likeness(volumes, rows.tolist())
    shown = ", ".join(named(r, paths.iloc[rows]))
    return f"of {len(rows)} scans, least like their mean (correlation): {shown}"


def draw(path: Path, volumes: Volumes, paths: pd.Series) -> None:
    """Draw three slices through the middle of up to `N_SHOWN` scans, and log the least alike."""
    from matplotlib.figure import Figure

    r = likeness(volumes, range(len(volumes)))
    chosen = choose(r)
    n_rows = -(-len(chosen) // N_COLUMNS)
    figure = Figure(figsize=(1.9 * N_COLUMNS, ROW_INCHES * n_rows + 0.4), facecolor="black")
    axes = figure.subplots(n_rows, N_COLUMNS, squeeze=False)
    figure.subplots_adjust(0.005, 0.005, 0.995, 1 - 0.4 / (ROW_INCHES * n_rows + 0.4), 0.04, 0.2)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (row, why) in zip(axes.flat, chosen, strict=False):
        axis.imshow(slices(volumes[row]), cmap="gray", vmin=0, vmax=1)
        color = GROUPS[why] if len(r) > N_SHOWN else "0.8"
        text = f"{label_of(Path(paths.iloc[row]).name, 22)} {r[row]:.3f}"
        axis.set_title(text, fontsize=6.5, color=color, pad=2)
    said = "by correlation with the mean scan, least like it first"
    if len(r) > N_SHOWN:
        said = f"{len(chosen)} of {len(r)} scans: {', '.join(GROUPS)}; with the correlation"
    figure.text(0.005, 0.995, said, color="white", fontsize=9, va="top")
    save_figure(figure, path)
    log.info("least like the mean scan (correlation): %s", ", ".join(named(r, paths)))


def slices(volume: np.ndarray) -> np.ndarray:
    """Return a volume's sagittal, coronal and axial middle slices side by side."""
    middles = [side // 2 for side in volume.shape]
    cuts = [np.rot90(volume.take(middle, axis)) for axis, middle in enumerate(middles)]
    height = max(len(cut) for cut in cuts)
    padded = [np.pad(cut, ((height - len(cut), 0), (0, 1))) for cut in cuts]
    return np.concatenate(padded, axis=1)
