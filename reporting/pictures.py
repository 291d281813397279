"""Pictures: loss curves, ROC curves, mosaics of maps and pages with their slices."""

import gc
import html
import re
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import nibabel as nib
import numpy as np
import pandas as pd

from reporting.metrics import entropy, read_kept
from run_folder import files

if TYPE_CHECKING:  # matplotlib and nilearn take seconds: they are imported where they are used
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

DPI = 110
MAP_DPI = 200
OUTLINE_COLOR = "#6aff4d"
VIEWER_HEADING = (
    '<div style="font: 15px system-ui, sans-serif; padding: 6px 10px"><b>{title}</b><br>{said}. '
    'compare.py writes the <a href="comparison/report.html">report</a>.</div>'
)
MAX_COLORS = 10  # of matplotlib, "C0" to "C9"
LOSSES = {"epoch": int, "train_loss": float, "valid_loss": float, "best": int}
MAX_LABEL = 40  # letters of a name in a legend
N_CUTS = 7  # slices per direction
SHOWN_PERCENTILE = 99.9  # of |map| inside the head: the end of the colour scale
HIDDEN_FRACTION = 0.1  # of the colour scale: voxels below it are left transparent


def save_figure(figure: "Figure", path: Path, temporary_name: str = "", dpi: int = DPI) -> None:
    """Write a figure, whole or not at all; several processes need temporary names of their own."""
    with files.whole_file(path, temporary_name) as temporary_path:
        figure.savefig(temporary_path, dpi=dpi, format=path.suffix[1:], facecolor="auto")


def draw_losses(
    outpath: Path, n_folds: int, labels: np.ndarray, by_fold: int, min_age_s: float = 0.0
) -> None:
    """Draw the losses of a run's folds so far, unless that was done less than `min_age_s` ago.

    `by_fold` is the fold of the process that draws them, where others may do so, too.
    """
    path, histories, unlearned = outpath / "loss_curves.png", {}, []
    if min_age_s and path.is_file() and time.time() - path.stat().st_mtime < min_age_s:
        return
    for fold in range(n_folds):
        if (outpath / f"history_f{fold}.csv").is_file():
            histories[fold] = files.read_csv(outpath / f"history_f{fold}.csv", LOSSES)
        if (outpath / f"training_f{fold}.csv").is_file():
            unlearned += [fold] * (not read_kept(outpath, fold)["learned"])
    plot_loss_curves(path, histories, entropy(labels), unlearned, by_fold)


def plot_loss_curves(
    path: Path, histories: dict[int, pd.DataFrame], label_entropy: float,
    unlearned: list[int], by_fold: int,
) -> None:  # fmt: skip
    """Draw folds' losses, as in history_f*.csv; a dot marks the epoch that is kept.

    A dashed line is the loss without learning, the entropy of the labels.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    n_columns = min(len(histories), 5)
    n_rows = -(-len(histories) // n_columns)
    size_inches = (2.6 * n_columns + 0.6, 2.4 * n_rows + 0.4)
    figure = Figure(figsize=size_inches, layout="constrained")
    axes = figure.subplots(n_rows, n_columns, sharex=True, sharey=True, squeeze=False)
    for axis, (fold, history) in zip(axes.flat, histories.items(), strict=False):
        best = history[history["best"] == 1].iloc[-1]
        is_unlearned = fold in unlearned
        axis.axhline(label_entropy, color="0.75", linestyle="--", label="nothing learned")
        axis.plot(history["epoch"], history["train_loss"], color="0.6", label="training")
        axis.plot(history["epoch"], history["valid_loss"], color="C0", label="validation")
        axis.plot(best["epoch"], best["valid_loss"], "o", color="C3", label="kept")
        title = f"fold {fold}" + ": not learned" * is_unlearned
        axis.set_title(title, fontsize=10, color="C3" if is_unlearned else "black")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(histories) :]:
        axis.set_axis_off()
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.supxlabel("epoch", fontsize=10)
    figure.supylabel("cross-entropy per scan", fontsize=10)
    save_figure(figure, path, f"{path.name}.f{by_fold}")


def plot_roc(
    path: Path, predictions: pd.DataFrame, metrics: pd.DataFrame,
    pooled: pd.DataFrame | None = None,
) -> None:  # fmt: skip
    """Draw the ROC curve of each fold and of all held-out scans; `metrics` is a metrics_table.

    `pooled` are the predictions of the latter, where they are not the folds'.
    """
    from matplotlib.figure import Figure
    from sklearn.metrics import roc_curve

    auc = metrics.set_index("fold")["roc_auc"]
    figure = Figure(figsize=(4.6, 4.6), layout="constrained")
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], ":", color="0.5", label="chance: 0.50")
    for fold, rows in predictions.groupby("fold"):
        if rows["label"].nunique() == 2:
            false_rate, true_rate, _ = roc_curve(rows["label"], rows["probability"])
            color = f"C{fold % MAX_COLORS}"
            label = f"fold {fold}: {auc[str(fold)]:.2f}"
            axis.plot(false_rate, true_rate, color=color, alpha=0.6, linewidth=1, label=label)
    pooled = predictions if pooled is None else pooled
    false_rate, true_rate, _ = roc_curve(pooled["label"], pooled["probability"])
    interval = f"{auc['pooled']:.2f} [{auc['pooled_low']:.2f}, {auc['pooled_high']:.2f}]"
    axis.plot(false_rate, true_rate, color="black", linewidth=2, label=f"pooled: {interval}")
    axis.set(xlabel="1 − specificity", ylabel="sensitivity", aspect="equal")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(title="area under the curve", frameon=False, fontsize=8, loc="lower right")
    save_figure(figure, path)


def plot_curves(path: Path, fractions: np.ndarray, curves: dict[str, np.ndarray], p: float) -> None:
    """Draw each map's Dice with as many voxels as `fractions` of the mask; the reference has p."""
    from matplotlib.figure import Figure

    percent, chance = 100 * fractions, 2 * p * fractions / (p + fractions)
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axis = figure.subplots()
    axis.plot(percent, chance, ":", color="0.4", label="chance")
    for number, (name, curve) in enumerate(curves.items()):
        line = ("-", "--", ":")[number // MAX_COLORS % 3]
        axis.plot(percent, curve, line, color=f"C{number % MAX_COLORS}", label=label_of(name))
    axis.axvline(100 * p, color="0.85", zorder=0)
    axis.text(100 * p, 1.01, "size of the reference", fontsize=8, color="0.5", ha="center",
              transform=axis.get_xaxis_transform())  # fmt: skip
    axis.set(xscale="log", xlabel="voxels taken, % of the mask", ylabel="Dice with the reference")
    axis.set_xticks([0.5, 1, 2, 5, 10, 20, 50], ["0.5", "1", "2", "5", "10", "20", "50"])
    axis.set_ylim(0, None)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    save_figure(figure, path)


def label_of(name: str, n_letters: int = MAX_LABEL) -> str:
    """Return a name as matplotlib shows it: no formula, not hidden by an underscore in front."""
    shown = name if len(name) <= n_letters else f"{name[: n_letters - 1]}…"
    return re.sub(r"^_", "\u200b_", shown.replace("$", r"\$"))


def plot_settings(path: Path, comparison: pd.DataFrame) -> None:
    """Draw, a row a map and a column a setting, how many times chance the average precision is."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    gain = comparison["average_precision"] / comparison["p"]
    keys = [comparison["map"], comparison["fwhm"], comparison["sign"]]
    table = gain.groupby(keys, sort=False).first().unstack([1, 2])
    size_inches = (2.4 + 0.75 * len(table.columns), 1.3 + 0.32 * len(table))
    figure = Figure(figsize=size_inches, layout="constrained")
    axis = figure.subplots()
    colors = {"cmap": "YlGn", "norm": LogNorm(1, max(2.0, float(np.nanmax(table))))}
    axis.imshow(table.clip(lower=1), aspect="auto", **colors)
    for (row, column), value in np.ndenumerate(table):
        is_dark = value > np.nanmax(table) ** 0.6
        text = f"{value:.1f}" if value < 10 else f"{value:.0f}"
        axis.text(column, row, text, ha="center", va="center", color="w" if is_dark else "k")
    axis.set_yticks(range(len(table)), map(label_of, table.index))
    axis.set_xticks(range(len(table.columns)), [f"{sign}\n{mm:g} mm" for mm, sign in table.columns])
    axis.tick_params(length=0, labeltop=True, labelbottom=False, top=True, bottom=False)
    axis.spines[:].set_visible(False)
    axis.set_xlabel("average precision over chance")
    save_figure(figure, path)


def color_limit(map_data: np.ndarray) -> float:
    """Return where a map's colour scale ends: a high percentile of its non-zero magnitudes."""
    magnitudes = np.abs(map_data[map_data != 0])
    limit = float(np.percentile(magnitudes, SHOWN_PERCENTILE)) if magnitudes.size else 0.0
    return limit or 1.0


def color_labels(map_data: np.ndarray, name: str, description: str) -> dict[str, str | float]:
    """Return the fields of a map's header by which viewers colour and name it."""
    limit = color_limit(map_data)
    return {"cal_min": -limit, "cal_max": limit, "intent_name": name[:15],
            "descrip": description.replace(" ·", ",")[:79]}  # fmt: skip


def map_colors() -> "ListedColormap":
    """Return the colours of maps: blue to cyan below 0, orange to yellow above, on dark grey."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap
    from nilearn import plotting  # noqa: F401 (registers its colours)

    return ListedColormap(colormaps["cyan_orange"](np.linspace(0.1, 0.9, 256)))  # no white ends


def slice_cuts(
    map_img: nib.Nifti1Image, background_img: nib.Nifti1Image, threshold: float
) -> dict[str, np.ndarray]:
    """Return where to cut, in mm: at the map's peaks, or evenly through the head if it has none."""
    from nilearn import plotting

    data = np.abs(map_img.get_fdata())
    shown_img = nib.Nifti1Image(np.where(data >= threshold, data, 0), map_img.affine)
    if shown_img.get_fdata().any():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fewer peaks than cuts: it takes their neighbours
            found = {axis: plotting.find_cut_slices(shown_img, axis, N_CUTS) for axis in "xyz"}
        corners = np.indices((2, 2, 2)).reshape(3, -1).T * (np.array(data.shape) - 1)
        corners_mm = nib.affines.apply_affine(map_img.affine, corners)
        ends_mm = zip("xyz", corners_mm.min(0), corners_mm.max(0), strict=True)
        return {axis: np.unique(np.clip(found[axis], *ends)) for axis, *ends in ends_mm}
    inside = np.argwhere(np.asarray(background_img.dataobj) > 0)
    inside_mm = nib.affines.apply_affine(background_img.affine, inside)
    ends_mm = np.percentile(inside_mm, [3, 97], axis=0) if len(inside) else np.zeros((2, 3))
    return {axis: np.linspace(*ends_mm[:, i], N_CUTS) for i, axis in enumerate("xyz")}


def draw_slices(
    stem: Path, map_img: nib.Nifti1Image, background_img: nib.Nifti1Image, title: str, unit: str,
    limit: float, threshold: float, reference_img: nib.Nifti1Image | None = None,
) -> list[Path]:  # fmt: skip
    """Draw slices of a map at its peaks, as .png and .pdf; the reference is an outline.

    Magnitudes below `threshold` are left transparent, those above `limit` have one colour.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize
    from matplotlib.figure import Figure
    from nilearn import plotting

    gc.freeze()  # nilearn collects garbage 14 times a picture, half of its time
    figure = Figure(figsize=(11, 5.4), facecolor="black")
    cuts, cmap = slice_cuts(map_img, background_img, threshold), map_colors()
    warnings.filterwarnings("ignore", message="empty mask")  # of a background that is 0 everywhere
    for row, axis in enumerate("xyz"):
        display = plotting.plot_stat_map(
            map_img, background_img, display_mode=axis, cut_coords=cuts[axis], figure=figure,
            axes=(0.005, 0.63 - 0.315 * row, 0.9, 0.305), colorbar=False, draw_cross=False,
            black_bg=True, cmap=cmap, vmax=limit, vmin=-limit, threshold=threshold,
        )  # fmt: skip
        if reference_img is not None:
            display.add_contours(reference_img, levels=[0.5], colors=OUTLINE_COLOR, linewidths=0.9)
    values = np.linspace(-limit, limit, 256)
    colors = cmap(Normalize(-limit, limit)(values))
    colors[np.abs(values) < threshold] = (0.25, 0.25, 0.25, 1)
    scale = ScalarMappable(Normalize(-limit, limit), ListedColormap(colors))
    bar = figure.colorbar(scale, cax=figure.add_axes((0.915, 0.16, 0.012, 0.62)))
    bar.set_ticks([-limit, -threshold, 0, threshold, limit])
    bar.ax.set_yticklabels([f"{v:.2g}" for v in bar.get_ticks()], color="white", fontsize=9)
    bar.ax.tick_params(color="white")
    bar.set_label(unit, color="white", fontsize=9)
    outlined = "" if reference_img is None else "; green: the reference"
    hidden = f"between −{threshold:.2g} and {threshold:.2g} transparent{outlined}"
    figure.text(0.01, 0.96, title, color="white", fontsize=12, va="center")
    figure.text(0.99, 0.96, hidden, color="0.7", fontsize=9, va="center", ha="right")
    paths = [stem.with_suffix(".png"), stem.with_suffix(".pdf")]
    for path in paths:
        save_figure(figure, path, dpi=MAP_DPI)
    return paths


def draw_map(
    stem: Path, mean_scan_path: Path, title: str, unit: str, has_viewer: bool = True
) -> list[Path]:
    """Draw `stem`.nii.gz over the mean scan: slices, and an offline viewer; return their paths."""
    imgs = map(nib.load, (stem.with_suffix(".nii.gz"), mean_scan_path))
    # without their headers: nilearn warns of one that has a qform only
    map_img, scan_img = (nib.Nifti1Image(i.get_fdata(dtype=np.float32), i.affine) for i in imgs)
    in_head = scan_img.get_fdata() > 0  # GGC and SG of noisy edges are not 0 outside it
    map_data = map_img.get_fdata() * in_head
    map_img = nib.Nifti1Image(map_data, map_img.affine)
    limit = color_limit(map_data)
    threshold = min(HIDDEN_FRACTION * limit, float(np.abs(map_data).max()))
    paths = draw_slices(stem, map_img, scan_img, title, unit, limit, threshold)
    if not has_viewer:
        return paths
    heading = VIEWER_HEADING.format(
        title=html.escape(title), said=html.escape(said_of(unit, threshold, limit))
    )
    return [*paths, write_viewer(stem, map_img, scan_img, heading, limit, threshold)]


def said_of(unit: str, threshold: float, limit: float) -> str:
    """Return what a viewer shows."""
    hidden = f"between −{threshold:.2g} and {threshold:.2g} transparent"
    return f"{unit}; {hidden}, colours end at ±{limit:.2g}; opened at the peak"


def write_viewer(
    stem: Path, map_img: nib.Nifti1Image, scan_img: nib.Nifti1Image, heading: str, limit: float,
    threshold: float,
) -> Path:  # fmt: skip
    """Write an offline page with linked slices, opened at the map's peak; `heading` is HTML."""
    from nilearn import plotting

    map_data = map_img.get_fdata()
    peak = np.unravel_index(np.abs(map_data).argmax(), map_data.shape)
    view = plotting.view_img(
        map_img, scan_img, title=None, resampling_interpolation="nearest", black_bg=True,
        cut_coords=nib.affines.apply_affine(map_img.affine, peak).tolist(), cmap=map_colors(),
        vmax=limit, threshold=threshold,
    )  # fmt: skip
    page = re.sub(r"<link[^>]*https?:[^>]*>", "", view.get_standalone())  # nilearn 0.14's icon
    page = re.sub(r"(<body[^>]*>)", lambda match: match[0] + heading, page, count=1)
    path = stem.with_suffix(".html")
    files.write_bytes(path, page.encode())
    return path
