"""Print the table and draw the picture of docs/study.md, from what `make study` left.

python3 docs/study.py study
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

SIGN, FWHM_MM = "neg", 10.0
OTHER_SIGN = {"IG_contrast": "pos"}  # darker tissue contributes less of what is negative
NAMES = {
    "IG": "IG", "SG": "SmoothGrad", "GGC": "GGC", "LRP": "LRP",
    "IG_contrast": "IG contrast (pos)", "SG_contrast": "SmoothGrad contrast",
    "GGC_contrast": "GGC contrast", "LRP_contrast": "LRP contrast",
    "SVM_weights": "SVM weights", "SVM_pattern": "SVM pattern", "TTEST": "Welch's t",
}  # fmt: skip


def control_of(name: str) -> str:
    """Return the name of the untrained networks' map beside a map."""
    method, _, kind = name.partition("_")
    return f"{method}_random" + (f"_{kind}" if kind else "")


def read(folder: Path) -> pd.DataFrame:
    """Return a cohort's rows of the setting that is shown, by map."""
    table = pd.read_csv(folder / "comparison" / "comparison.csv")
    names = {control_of(name): sign for name, sign in OTHER_SIGN.items()} | OTHER_SIGN
    sign = table["map"].map(names).fillna(SIGN)
    return table[(table["sign"] == sign) & (table["fwhm"] == FWHM_MM)].set_index("map")


def setting_of(folder: Path) -> tuple[float, float]:
    """Return deformation in mm and share of spared regions, as a folder's name has them."""
    deformation, _, spared = folder.name.removesuffix("spared").partition("mm_")
    return float(deformation), float(spared)


def title_of(folder: Path) -> str:
    """Return what a folder's name says of its cohort."""
    deformation, spared = setting_of(folder)
    return f"{deformation:g} mm, {'half of the regions spared' if spared else 'uniform'}"


def cell(row: pd.Series) -> str:
    """Return matched Dice with its error, where there is one, and average precision over chance."""
    error = row.get("dice_matched_se", np.nan)
    text = f"{row['dice_matched']:.2f}" + ("" if np.isnan(error) else f" ± {error:.3f}")
    return f"{text}, × {row['average_precision'] / row['p']:.2g}"


def print_table(folders: list[Path], tables: list[pd.DataFrame]) -> None:
    """Print a row a classifier, a map, and a map of untrained networks; a column a cohort."""
    print("| |", " | ".join(map(title_of, folders)), "|")
    print("|---" * (len(folders) + 1) + "|")
    for kind, name in (("output", "networks"), ("svm", "SVM")):
        metrics = [pd.read_csv(f / kind / "metrics.csv").set_index("fold") for f in folders]
        auc = [f"{each.loc['mean', 'roc_auc']:.2f}" for each in metrics]
        print(f"| *ROC AUC of the {name}* |", " | ".join(auc), "|")
    trained = [name for name in NAMES if name in tables[0].index]
    untrained = [control_of(name) for name in trained if control_of(name) in tables[0].index]
    shown = {name: NAMES[name] for name in trained}
    shown |= {control_of(n): f"*{NAMES[n]}, untrained*" for n in trained
              if control_of(n) in untrained}  # fmt: skip
    for name, text in shown.items():
        print(f"| {text} |", " | ".join(cell(table.loc[name]) for table in tables), "|")


def draw(path: Path, folders: list[Path], tables: list[pd.DataFrame]) -> None:
    """Draw a panel a cohort: matched Dice of each map, and of the untrained networks' beside it."""
    trained = [name for name in NAMES if name in tables[0].index]
    rows = np.arange(len(trained))[::-1]
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    axes = figure.subplots(1, len(tables), sharey=True)
    for axis, folder, table in zip(axes, folders, tables, strict=True):
        found = table.reindex(trained)
        axis.errorbar(
            found["dice_matched"], rows, xerr=2 * found["dice_matched_se"], fmt="o", color="C0",
            label="trained, ± 2 errors", capsize=2, markersize=5,
        )  # fmt: skip
        control = table.reindex(map(control_of, trained))["dice_matched"]
        axis.plot(
            control, rows, "o", color="0.6", fillstyle="none", label="untrained", markersize=6
        )
        axis.axvline(table["p"].iloc[0], linestyle=":", color="0.5")
        axis.set(
            xlim=(-0.03, 1), title=title_of(folder).replace(", ", "\n"), xlabel="Dice, matched size"
        )
        axis.title.set_fontsize(10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="0.93")
    axes[0].set_yticks(rows, [NAMES[name] for name in trained])
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    figure.savefig(path, dpi=110)


def main(study: Path) -> None:
    """Put the finished cohorts beside each other."""
    folders = sorted(study.glob("*mm_*spared"), key=setting_of)
    tables = [read(folder) for folder in folders]
    print_table(folders, tables)
    draw(Path(__file__).with_suffix(".png"), folders, tables)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
