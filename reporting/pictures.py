"""Pictures: loss curves, ROC curves, Dice curves and tables of settings."""

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from reporting.metrics import entropy, read_kept
from run_folder import files

if TYPE_CHECKING:  # matplotlib and nilearn take seconds: they are imported where they are used
    from matplotlib.figure import Figure

DPI = 110
MAX_COLORS = 10  # of matplotlib, "C0" to "C9"
LOSSES = {"epoch": int, "train_loss": float, "valid_loss": float, "best": int}
MAX_LABEL = 40  # letters of a name in a legend


def save_figure(figure: "Figure", path: Path, temporary_name: str = "", dpi: int = DPI) -> None:
    """Write a figure, whole or not at all; several processes need temporary names of their own."""
    undated = {"CreationDate": None} if path.suffix == ".pdf" else None  # equal maps, equal bytes
    with files.whole_file(path, temporary_name) as temporary_path:
        figure.savefig(
            temporary_path, dpi=dpi, format=path.suffix[1:], facecolor="auto", metadata=undated
        )


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
