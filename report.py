"""Pages that work offline: the viewer beside each map, and report.html."""

import argparse
import base64
import html
import json
from pathlib import Path
from string import Template

import pandas as pd
from nibabel.spatialimages import SpatialImage
from nilearn import plotting

import files
import utils
from page_data import METRICS_SHOWN, PICTURES, SUMMARY_ROWS, Run, template_like, viewer_data
from pictures import HIDDEN_FRACTION, MAP_COLORS, color_limit

TEMPLATE_PATH = Path(__file__).with_name("report_template.html")
N_REGIONS_SHOWN = 20
IG_TOLERANCE = 0.05  # median completeness error above which a warning says so
OVERLAP_HEADS = {
    "dice_matched": "Dice, matched size",
    "dice_max": "Dice, best size",
    "dice_max_fraction": "at top",
    "roc_auc": "ROC AUC",
    "average_precision": "average precision",
    "mass": "mass",
    "null_mean": "Dice, shifted map",
    "null_p": "p of shifts",
}


def write_viewer(
    path: Path, map_img: SpatialImage, background_img: SpatialImage, title: str
) -> None:
    """Write a page with three linked slices of a map over the mean scan; it works offline.

    Parameters
    ----------
    path : Path
    map_img, background_img : nibabel images on one grid
    title : str
    """
    limit = color_limit(map_img.get_fdata())
    view = plotting.view_img(
        map_img, background_img, cmap=MAP_COLORS, vmax=limit, threshold=HIDDEN_FRACTION * limit,
        title=html.escape(title), resampling_interpolation="nearest", black_bg=True,
    )  # fmt: skip
    files.write_bytes(path, view.get_standalone().encode())


# The page


def table_html(heads: list[str], rows: list[list[str]], last_class: str = "") -> str:
    """Return an HTML table; cells are escaped, the last row can have a class of its own."""
    lines = ["<tr>" + "".join(f"<th>{html.escape(head)}</th>" for head in heads) + "</tr>"]
    for i, row in enumerate(rows):
        css = f' class="{last_class}"' if last_class and i == len(rows) - 1 else ""
        cells = "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row)
        lines.append(f"<tr{css}>{cells}</tr>")
    return '<div class="wide"><table>' + "\n".join(lines) + "</table></div>"


def number_text(value: float) -> str:
    """Return a number as the tables show it."""
    return "–" if pd.isna(value) else f"{value:.3f}"


def metrics_html(runs: list[Run]) -> str:
    """Return the table of held-out metrics, with intervals and the spread over folds."""
    rows = []
    for run in runs:
        row = [run.name, f"{run.n_patients} + {run.n_controls}"]
        for metric in METRICS_SHOWN:
            pooled, low, high, mean, sd = (run.metrics.loc[name, metric] for name in SUMMARY_ROWS)
            row.append(f"{pooled:.2f} [{low:.2f}, {high:.2f}] · {mean:.2f} ± {sd:.2f}")
        rows.append(row)
    heads = ["classifier", "patients + controls", *(m.replace("_", " ") for m in METRICS_SHOWN)]
    return table_html(heads, rows)


def overlap_html(table: pd.DataFrame) -> str:
    """Return the overlap table; each cell has the fold maps' mean ± sd, the last row is chance."""
    rows = []
    for record in table.to_dict("records"):
        row = [record["map"]]
        for column in OVERLAP_HEADS:
            text = number_text(record[column])
            if record["n_folds"] and f"{column}_folds_mean" in record:
                mean, sd = record[f"{column}_folds_mean"], record[f"{column}_folds_sd"]
                text += f" (folds {mean:.3f} ± {sd:.3f})"
            row.append(f"{100 * record[column]:.1f} %" if column == "dice_max_fraction" else text)
        rows.append(row)
    p = number_text(table["p"].iloc[0])
    best_chance = f"≤ {number_text(table['dice_max_chance'].max())}"
    rows.append(["chance", p, best_chance, "–", "0.500", p, p, p, "–"])
    return table_html(["map", *OVERLAP_HEADS.values()], rows, "chance")


def regions_html(regions: pd.DataFrame) -> str:
    """Return the regions with the largest shares, one column a map."""
    names = regions.drop_duplicates("region").set_index("region")[["name", "n_voxels"]]
    shares = regions.pivot(index="region", columns="map", values="share")
    shares = shares[list(dict.fromkeys(regions["map"]))]
    means = regions.pivot(index="region", columns="map", values="mean")
    dices = regions.pivot(index="region", columns="map", values="dice")
    rows = []
    for region in shares.abs().max(axis=1).nlargest(N_REGIONS_SHOWN).index:
        cells = [
            f"{100 * shares.loc[region, name]:.1f} % · {means.loc[region, name]:.2g} · "
            f"{dices.loc[region, name]:.2f}"
            for name in shares
        ]
        rows.append([names.loc[region, "name"] or region, names.loc[region, "n_voxels"], *cells])
    return table_html(["region", "voxels", *shares.columns], rows)


def warnings_of(table: pd.DataFrame, runs: list[Run], ig_errors: dict[str, float]) -> list[str]:
    """Return what a reader must know before believing the tables."""
    found = [
        f"{name}: fewer voxels are non-zero than the reference has; its matched Dice is degenerate."
        for name in table.loc[table["degenerate"], "map"]
    ]
    for run in runs:
        auc = run.metrics.loc[run.metrics.index.str.isdigit(), "roc_auc"]
        found += [
            f"{run.name}: fold {fold} is below chance on its held-out scans (ROC AUC {value:.2f})."
            for fold, value in auc[auc < 0.5].items()
        ]
    return found + [
        f"{name}: incomplete attributions, median error {error:.2g}; more --steps lower it."
        for name, error in ig_errors.items()
        if error > IG_TOLERANCE
    ]


def picture_html(path: Path, caption: str) -> str:
    """Return a picture, embedded."""
    data = base64.b64encode(path.read_bytes()).decode()
    caption = html.escape(caption)
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def write_report(
    path: Path, args: argparse.Namespace, table: pd.DataFrame, regions: pd.DataFrame | None,
    runs: list[Run], ig_errors: dict[str, float], volumes: dict[str, SpatialImage],
    reference_img: SpatialImage, mask_source: str, background: tuple[SpatialImage | None, str],
) -> None:  # fmt: skip
    """Write report.html, one self-contained file.

    Parameters
    ----------
    path : Path
        dice_curves.png stands beside it.
    args : Namespace
        compare.py's options.
    table : DataFrame
        Of comparison.csv.
    regions : DataFrame or None
        Of regions.csv.
    runs : list of Run
    ig_errors : dict of str to float
        Median completeness error of the IG maps for which it is known.
    volumes : dict of str to nibabel image
        The maps.
    reference_img : nibabel image
        On the maps' grid, 1 inside.
    mask_source : str
    background : (nibabel image or None, str)
        The mean scan and what it is; None for nilearn's template.
    """
    background_img, background_name = background
    if background_img is None:
        background_img, background_name = template_like(reference_img), "the ICBM152 template"
    data = viewer_data(volumes, reference_img, background_img)
    facts = {
        "Command": args.command,
        "Reference": f"{args.reference}, above {args.reference_threshold:g}; "
        f"{table['n_reference'].iloc[0]} of {table['n_mask'].iloc[0]} mask voxels",
        "Mask": mask_source,
        "Evidence": f"--sign {args.sign}, smoothed by {args.fwhm:g} mm",
        "Background": background_name,
        "Versions": ", ".join(f"{k} {v}" for k, v in utils.versions().items()),
        "Made": utils.now(),
    }
    found = warnings_of(table, runs, ig_errors)
    page = Template(TEMPLATE_PATH.read_text(encoding="utf-8")).substitute(
        facts="".join(
            f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in facts.items()
        ),
        warnings="".join(f"<li>{html.escape(text)}</li>" for text in found) or "<li>None.</li>",
        metrics=metrics_html(runs) if runs else "<p>No --run was given.</p>",
        curves="".join(
            picture_html(p, f"{run.name}: {PICTURES[p.name]}") for run in runs for p in run.pictures
        ),
        overlap=overlap_html(table),
        dice_curves=picture_html(path.with_name("dice_curves.png"), "Dice against voxels taken"),
        regions=regions_html(regions) if regions is not None else "<p>No --atlas was given.</p>",
        data=json.dumps(data).replace("<", r"\u003c"),  # nothing in it opens or ends a tag
    )
    files.write_bytes(path, page.encode(errors="xmlcharrefreplace"))
