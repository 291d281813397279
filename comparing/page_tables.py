"""The tables of the page as HTML: one number a cell, what belongs to it below."""

import html
from collections.abc import Iterable

import numpy as np
import pandas as pd

from comparing.maps import Map, in_order
from comparing.runs import METRICS_SHOWN, Run
from reporting.metrics import SUMMARY_ROWS

N_REGIONS_SHOWN, N_PEAKS_SHOWN = 20, 4
HEADS = {
    "dice_matched": "Dice, matched size",
    "dice_max": "Dice, best size",
    "average_precision": "average precision",
    "roc_auc": "ROC AUC",
    "mass": "mass inside",
    "outside": "outside the mask",
    "label_p": "p of labels",
    "shift_p": "p of shifts",
}

Cell = str | tuple[str, str]  # a number, or a number and what stands below it


def table_html(heads: list[str], rows: Iterable[list[Cell]], css: str = "") -> str:
    """Return an HTML table; cells are escaped, and know their heads where a page is narrow."""
    lines = []
    for row in rows:
        cells = []
        for head, cell in zip(heads, row, strict=True):
            first, second = cell if isinstance(cell, tuple) else (cell, "")
            below = f"<small>{html.escape(second)}</small>" * bool(second)
            cells.append(f'<td data-head="{html.escape(head)}">{html.escape(first)}{below}</td>')
        is_control = "untrained" in (row[0][1] if isinstance(row[0], tuple) else "")
        lines.append(f"<tr{' class=control' * is_control}>{''.join(cells)}</tr>")
    head = "".join(f"<th>{html.escape(each)}</th>" for each in heads)
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f'<table class="{css}">{body}</table>'


def number_text(value: float, digits: int = 3) -> str:
    """Return a number as the tables show it."""
    return "–" if pd.isna(value) else f"{value:.{digits}f}"


def p_text(value: float, n: int) -> str:
    """Return a p, as small as n permutations can make it."""
    least = 1 / (n + 1)
    if pd.isna(value):
        return "–"
    return f"≤ {least:.2g}" if value <= least * (1 + 1e-9) else f"{value:.3f}"


def bars_html(judged: pd.DataFrame) -> str:
    """Return a bar for each map, longest first: its Dice, chance, and the untrained networks'."""
    lines = []
    for name, row in judged.sort_values("dice", ascending=False).iterrows():
        error = "" if pd.isna(row["error"]) else f" ± {row['error']:.3f}"
        untrained = row["untrained"]
        tick = "" if pd.isna(untrained) else f'<i style="left:{100 * untrained:.1f}%"></i>'
        css = "fails" if row["fails"] else "finds"
        lines.append(
            f'<div class="bar {css}"><span>{html.escape(str(name))}</span>'
            f'<div><b style="width:{100 * row["dice"]:.1f}%"></b>{tick}'
            f'<u style="left:{100 * row["chance"]:.1f}%"></u></div>'
            f"<span>{row['dice']:.2f}{error}</span></div>"
        )
    return "".join(lines)


def metrics_html(runs: list[Run]) -> str:
    """Return the held-out metrics: means over folds with their intervals, and confusion counts."""
    rows = []
    for run in runs:
        n_patients = int(run.predictions["label"].sum())
        row: list[Cell] = [(run.name, f"{n_patients} + {len(run.predictions) - n_patients} scans")]
        for metric in METRICS_SHOWN:
            mean, low, high = run.metrics.loc[[*SUMMARY_ROWS[:3]], metric]
            row.append((f"{mean:.2f}", f"[{low:.2f}, {high:.2f}]"))
        label, predicted = run.predictions["label"], run.predictions["predicted"]
        counts = {f"{t}{p}": int(((label == t) & (predicted == p)).sum())
                  for t in (1, 0) for p in (1, 0)}  # fmt: skip
        row += [f"{counts['11']} of {n_patients}",
                f"{counts['00']} of {len(run.predictions) - n_patients}"]  # fmt: skip
        rows.append(row)
        if run.covariates is not None:
            alone = run.covariates.set_index("fold").reindex(SUMMARY_ROWS[:3])
            row = [(f"covariates of {run.name} alone", "no scan")]
            row += [
                (f"{each.iloc[0]:.2f}", f"[{each.iloc[1]:.2f}, {each.iloc[2]:.2f}]")
                for each in (alone.get(metric, pd.Series([np.nan] * 3)) for metric in METRICS_SHOWN)
            ]
            rows.append([*row, "–", "–"])
    measured = [m.replace("_", " ").replace("roc auc", "ROC AUC") for m in METRICS_SHOWN]
    return table_html(["classifier", *measured, "patients found", "controls found"], rows)


def strata_html(runs: list[Run]) -> str:
    """Return the networks' ROC AUC within strata of the covariates, where a run has some."""
    rows = []
    for run in [run for run in runs if run.strata is not None]:
        for record in run.strata.to_dict("records"):
            interval = f"[{record['low']:.2f}, {record['high']:.2f}]"
            is_known = not pd.isna(record["roc_auc"])
            auc = (f"{record['roc_auc']:.2f}", interval) if is_known else ("–", "too few scans")
            stratum = f"{record['covariate']} {record['stratum']}"
            counts = f"{record['n_patients']} + {record['n_controls']}"
            rows.append([run.name, stratum, counts, auc])
    heads = ["classifier", "stratum", "patients + controls", "ROC AUC"]
    return f"<h3>Within strata</h3>{table_html(heads, rows)}" if rows else ""


def name_cell(name: str, each: Map) -> Cell:
    """Return a map's name, marked where it is the control of another."""
    return (name, "untrained networks") if each.is_control else name


def overlap_html(table: pd.DataFrame, maps: dict[str, Map], n_permutations: int) -> str:
    """Return the measures in the first setting, with errors and fold maps below; chance is last."""
    first = table.drop_duplicates("map").set_index("map")
    columns = [column for column in HEADS if column in first]
    above = {"dice_matched": "p", "average_precision": "p", "mass": "p", "roc_auc": 0.5}
    rows = []
    for name in in_order(maps):
        record = first.loc[name]
        row = [name_cell(name, maps[name])]
        for column in columns:
            if column.endswith("_p"):
                row.append(p_text(record[column], n_permutations))
                continue
            text, below = number_text(record[column]), []
            if not pd.isna(error := record.get(f"{column}_se", np.nan)):
                below.append(f"± {error:.3f}")
            if column in above:
                chance = record["p"] if above[column] == "p" else above[column]
                e = np.nan_to_num(record.get(f"{column}_se", 0.0))
                text += " ▲" * bool(record[column] - 2 * e > chance and not record["degenerate"])
            if record["n_folds"] and not pd.isna(record.get(f"{column}_folds_mean", np.nan)):
                mean, sd = record[f"{column}_folds_mean"], record[f"{column}_folds_sd"]
                below.append(f"folds {mean:.2f} ± {sd:.2f}")
            row.append((text, "; ".join(below)))
        rows.append(row)
    p, best = number_text(first["p"].iloc[0]), number_text(first["dice_max_chance"].max())
    chance = {"dice_matched": p, "dice_max": f"≤ {best}", "roc_auc": "0.500",
              "average_precision": p, "mass": p}  # fmt: skip
    rows.append(["chance", *(chance.get(column, "–") for column in columns)])
    return table_html(["map", *(HEADS[column] for column in columns)], rows, "with-chance")


def stability_html(table: pd.DataFrame, of_maps: pd.DataFrame, maps: dict[str, Map]) -> str:
    """Return how stable each map is, and what it correlates with most."""
    first = table.drop_duplicates("map").set_index("map")
    values = of_maps.iloc[:, 1:].to_numpy()
    names, rows = list(maps), []
    for name in in_order(maps):
        others = pd.Series(values[names.index(name)], names).drop(name)
        others = others[others.abs().sort_values(ascending=False).index].dropna()
        alike = ", ".join(f"{other} {r:.2f}" for other, r in others.head(3).items())
        known = [first.at[name, r] if r in first else np.nan for r in ("fold_r", "half_r")]
        rows.append([name_cell(name, maps[name]), *(number_text(r, 2) for r in known), alike])
    return table_html(["map", "r of folds", "r of halves", "correlates most with"], rows)


def differences_html(differences: pd.DataFrame, maps: dict[str, Map]) -> str:
    """Return the differences between maps of the same scans, those of controls left out."""
    rows = [
        [f"{row['map']} − {row['other']}",
         *((f"{row[f'{m}_difference']:+.3f}", f"± {row[f'{m}_difference_se']:.3f}")
           for m in ("dice_matched", "average_precision"))]
        for row in differences.to_dict("records")
        if not (maps[row["map"]].is_control or maps[row["other"]].is_control)
    ]  # fmt: skip
    return table_html(["maps", "Dice, matched size", "average precision"], rows)


def peaks_html(peaks: dict[str, pd.DataFrame]) -> str:
    """Return the highest peaks of each map; the files have all of them."""
    rows, has_regions = [], any("region" in table for table in peaks.values())
    for name, table in peaks.items():
        for record in table.head(N_PEAKS_SHOWN).to_dict("records"):
            volume = record["volume_mm3"]
            rows.append(
                [name, f"{record['x']:.0f}, {record['y']:.0f}, {record['z']:.0f}",
                 f"{record['value']:.3g}", "" if pd.isna(volume) else f"{volume:,.0f}",
                 *([str(record["region"])] if has_regions else [])]
            )  # fmt: skip
    heads = ["map", "x, y, z in mm", "value, smoothed", "cluster, mm³"]
    return table_html([*heads, *(["region"] if has_regions else [])], rows)


def regions_html(regions: pd.DataFrame) -> str:
    """Return the regions with the largest shares, one column a map."""
    largest = regions["share"].abs().groupby(regions["region"]).max().nlargest(N_REGIONS_SHOWN)
    rows = []
    for region in largest.index:
        records = regions[regions["region"] == region].to_dict("records")
        cells = [(f"{100 * r['share']:.1f} %", f"mean {r['mean']:.2g}, Dice {r['dice']:.2f}")
                 for r in records]  # fmt: skip
        rows.append(
            [(str(records[0]["name"] or region), f"{records[0]['n_voxels']} voxels"), *cells]
        )
    return table_html(["region", *dict.fromkeys(regions["map"])], rows)
