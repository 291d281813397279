"""Pictures: loss curves, ROC curves, mosaics of maps, Dice curves."""

import re
from pathlib import Path

import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from nilearn import plotting
from sklearn.metrics import roc_curve

from files import whole_file
from overlap import TOP_FRACTIONS

DPI = 110
FOLD_COLORS = plt.get_cmap("tab10").colors
LOSS_COLUMNS = {"epoch": int, "train_loss": float, "valid_loss": float}
MAP_COLORS = "cold_hot"
N_CUTS = 7  # slices per direction of a mosaic
SHOWN_PERCENTILE = 99.9  # of |map| inside the head: the end of the colour scale
HIDDEN_FRACTION = 0.1  # of the colour scale: voxels below it are left transparent


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure, whole or not at all, and close it."""
    with whole_file(path) as temporary_path:
        figure.savefig(temporary_path, dpi=DPI, format=path.suffix[1:])
    plt.close(figure)


def plot_loss_curves(path: Path, histories: list[pd.DataFrame]) -> None:
    """Draw each fold's training and validation loss; a dot marks the epoch that was kept.

    Parameters
    ----------
    path : Path
    histories : list of DataFrame
        One a fold: epoch, train_loss, valid_loss.
    """
    n_columns = min(len(histories), 5)
    n_rows = -(-len(histories) // n_columns)
    size_inches = (2.6 * n_columns + 0.6, 2.4 * n_rows + 0.4)
    figure, axes = plt.subplots(
        n_rows, n_columns, figsize=size_inches, sharex=True, sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for fold, (axis, history) in enumerate(zip(axes.flat, histories, strict=False)):
        best = history.loc[history["valid_loss"].idxmin()]
        axis.plot(history["epoch"], history["train_loss"], color="0.6", label="training")
        axis.plot(history["epoch"], history["valid_loss"], color="C0", label="validation")
        axis.plot(best["epoch"], best["valid_loss"], "o", color="C3", label="kept")
        axis.set_title(f"fold {fold}", fontsize=10)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(histories) :]:
        axis.set_axis_off()
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.supxlabel("epoch", fontsize=10)
    figure.supylabel("cross-entropy per scan", fontsize=10)
    save_figure(figure, path)


def plot_roc(path: Path, predictions: pd.DataFrame, metrics: pd.DataFrame) -> None:
    """Draw the ROC curve of each fold and of all held-out scans together.

    Parameters
    ----------
    path : Path
    predictions : DataFrame
        Columns fold, label and probability.
    metrics : DataFrame
        As `utils.metrics_table` returns it.
    """
    auc = metrics.set_index("fold")["roc_auc"]
    figure, axis = plt.subplots(figsize=(4.6, 4.6), layout="constrained")
    axis.plot([0, 1], [0, 1], ":", color="0.5", label="chance: 0.50")
    for fold, rows in predictions.groupby("fold"):
        if rows["label"].nunique() == 2:
            false_rate, true_rate, _ = roc_curve(rows["label"], rows["probability"])
            color = FOLD_COLORS[fold % len(FOLD_COLORS)]
            label = f"fold {fold}: {auc[str(fold)]:.2f}"
            axis.plot(false_rate, true_rate, color=color, alpha=0.6, linewidth=1, label=label)
    false_rate, true_rate, _ = roc_curve(predictions["label"], predictions["probability"])
    interval = f"{auc['pooled']:.2f} [{auc['pooled_low']:.2f}, {auc['pooled_high']:.2f}]"
    axis.plot(false_rate, true_rate, color="black", linewidth=2, label=f"pooled: {interval}")
    axis.set(xlabel="1 − specificity", ylabel="sensitivity", aspect="equal")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(title="area under the curve", frameon=False, fontsize=8, loc="lower right")
    save_figure(figure, path)


def color_limit(map_data: np.ndarray) -> float:
    """Return where a map's colour scale ends: a high percentile of its non-zero magnitudes."""
    magnitudes = np.abs(map_data[map_data != 0])
    limit = float(np.percentile(magnitudes, SHOWN_PERCENTILE)) if magnitudes.size else 0.0
    return limit or 1.0


def mosaic_cuts(background_img: nib.Nifti1Image) -> dict[str, np.ndarray]:
    """Return where to cut, in mm: evenly through the head, its outermost tenths left out."""
    inside = np.argwhere(np.asarray(background_img.dataobj) > 0)
    inside_mm = nib.affines.apply_affine(background_img.affine, inside)
    ends_mm = np.percentile(inside_mm, [3, 97], axis=0) if len(inside) else np.zeros((2, 3))
    return {axis: np.linspace(*ends_mm[:, i], N_CUTS) for i, axis in enumerate("xyz")}


def plot_mosaic(
    path: Path, map_img: nib.Nifti1Image, background_img: nib.Nifti1Image, title: str
) -> None:
    """Draw a map in three rows of slices over the mean scan.

    Parameters
    ----------
    path : Path
    map_img, background_img : nibabel images on one grid
    title : str
    """
    limit = color_limit(map_img.get_fdata())
    figure = plt.figure(figsize=(10, 5.6), facecolor="black")
    plotting.plot_stat_map(
        map_img, background_img, display_mode="mosaic", cut_coords=mosaic_cuts(background_img),
        cmap=MAP_COLORS, vmax=limit, symmetric_cbar=True, threshold=HIDDEN_FRACTION * limit,
        black_bg=True, figure=figure, axes=(0, 0, 1, 0.93),
    )  # fmt: skip
    figure.text(0.01, 0.955, title, color="white", fontsize=12)
    save_figure(figure, path)


def plain_label(name: str) -> str:
    """Return a map's name for a legend: no formula, and not hidden by an underscore in front."""
    return re.sub(r"^_", "\u200b_", name.replace("$", r"\$"))


def plot_dice_curves(path: Path, curves: dict[str, np.ndarray], p: float) -> None:
    """Draw each map's Dice coefficient with the reference against the share of voxels taken.

    Parameters
    ----------
    path : Path
    curves : dict of str to array, shape (40,)
        Dice at each of `overlap.TOP_FRACTIONS`, by map.
    p : float
        Share of the mask that the reference fills; chance follows from it.
    """
    percent = 100 * TOP_FRACTIONS
    figure, axis = plt.subplots(figsize=(6, 4.2), layout="constrained")
    axis.plot(
        percent, 2 * p * TOP_FRACTIONS / (p + TOP_FRACTIONS), ":", color="0.4", label="chance"
    )
    for name, curve in curves.items():
        axis.plot(percent, curve, label=plain_label(name))
    axis.axvline(100 * p, color="0.85", zorder=0)
    axis.text(100 * p, 1.01, "size of the reference", fontsize=8, color="0.5", ha="center",
              transform=axis.get_xaxis_transform())  # fmt: skip
    axis.set(xscale="log", xlabel="voxels taken, % of the mask", ylabel="Dice with the reference")
    axis.set_xticks([0.5, 1, 2, 5, 10, 20, 50], ["0.5", "1", "2", "5", "10", "20", "50"])
    axis.set_ylim(0, None)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    save_figure(figure, path)
