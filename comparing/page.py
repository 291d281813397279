"""report.html, one self-contained file: what it shows is read, checked, escaped and drawn here."""

import base64
import html
import json
from pathlib import Path
from string import Template

import nibabel as nib
import numpy as np
import pandas as pd
from nibabel.spatialimages import SpatialImage

from comparing.maps import Map
from comparing.runs import METRICS_SHOWN, PICTURES, Run
from comparing.space import Space
from reporting.maps import IG_TOLERANCE
from reporting.metrics import SUMMARY_ROWS
from reporting.pictures import color_limit
from run_folder import files
from utils import InputError, printable

TEMPLATE_PATH = Path(__file__).with_name("page_template.html")
SHOWN_VOXEL_MM = 2.0  # slices are no finer: the page stays small
N_REGIONS_SHOWN = 20
OVERLAP_HEADS = {
    "dice_matched": "Dice, matched size",
    "dice_max": "Dice, best size",
    "dice_max_fraction": "at top",
    "roc_auc": "ROC AUC",
    "average_precision": "average precision",
    "mass": "mass",
    "label_p": "p of labels",
    "label_p_untrained": "p of labels, untrained",
    "shift_mean": "Dice, shifted map",
    "shift_p": "p of shifts",
    "outside": "outside the mask",
}


def warnings_of(table: pd.DataFrame, runs: list[Run], maps: dict[str, Map]) -> list[str]:
    """Return what a reader must know before believing the tables."""
    is_degenerate = table.get("degenerate", pd.Series(False, table.index)).astype(bool)
    warnings = [
        f"{name}: fewer voxels are non-zero than the reference has; its matched Dice is degenerate."
        for name in table.loc[is_degenerate, "map"].unique()
    ]
    for run in runs:
        auc = run.metrics.loc[run.metrics.index.str.isdigit(), "roc_auc"]
        warnings += [
            f"{run.name}: fold {fold} is below chance on its held-out scans (ROC AUC {value:.2f})."
            for fold, value in auc[auc < 0.5].items()
        ]
    return warnings + [
        f"{name}: incomplete attributions, median error {error:.2g}; more --steps lower it."
        for name, error in completeness_errors(maps).items()
        if error > IG_TOLERANCE
    ]


def sidecar_path_of(each: Map) -> Path:
    """Return where what is known of a map stands."""
    return each.path.with_name(each.path.name.split(".nii")[0] + ".json")


def read_sidecar(each: Map) -> dict:
    """Return what is known of a map; nothing without a file."""
    path = sidecar_path_of(each)
    return files.read_json(path) if path.is_file() else {}


def verdicts(runs: list[Run], maps: dict[str, Map]) -> list[str]:
    """Return what the classifiers found, of the runs and of those that the maps explain."""
    said = [f"{run.name}: {run.verdict.sentence}" for run in runs]
    known = {run.verdict.sentence for run in runs}
    for name, each in maps.items():
        verdict = printable(str(read_sidecar(each).get("verdict") or ""))
        if verdict and verdict not in known:
            known.add(verdict)
            said.append(f"{name}: {verdict}")
    return said or ["No --run was given: nothing says whether these maps are worth a look."]


def completeness_errors(maps: dict[str, Map]) -> dict[str, float]:
    """Return each IG map's median completeness error, as the sidecar beside it has it."""
    errors = {}
    for name, each in maps.items():
        sidecar = read_sidecar(each)
        error = sidecar.get("median_completeness_error")
        if sidecar.get("method") == "IG" and error is not None:
            try:
                errors[name] = float(error)
            except (TypeError, ValueError, OverflowError):
                raise InputError(
                    f"{sidecar_path_of(each)}: median_completeness_error must be a number"
                ) from None
    return errors


def table_html(heads: list[str], rows: list[list[str]], css: str = "") -> str:
    """Return an HTML table; cells are escaped."""
    with pd.option_context("display.max_colwidth", None):
        table = pd.DataFrame(rows, columns=heads).to_html(index=False, border=0, classes=css)
    return f'<div class="wide">{table}</div>'


def number_text(value: float) -> str:
    """Return a number as the tables show it."""
    return "–" if pd.isna(value) else f"{value:.3f}"


def metrics_html(runs: list[Run]) -> str:
    """Return the table of held-out metrics: means over folds, their intervals and sd."""
    rows = []
    for run in runs:
        n_patients = int(run.predictions["label"].sum())
        row = [run.name, f"{n_patients} + {len(run.predictions) - n_patients}"]
        for metric in METRICS_SHOWN:
            mean, low, high, sd = run.metrics.loc[[*SUMMARY_ROWS[:4]], metric]
            row.append(f"{mean:.2f} [{low:.2f}, {high:.2f}] ± {sd:.2f}")
        rows.append(row)
    heads = ["classifier", "patients + controls", *(m.replace("_", " ") for m in METRICS_SHOWN)]
    return table_html(heads, rows)


def overlap_html(table: pd.DataFrame) -> str:
    """Return the overlap table in the first setting; its last row is chance.

    Cells have a standard error over scans, where it is known, and the fold maps' mean ± sd.
    """
    rows = []
    columns = [name for name in OVERLAP_HEADS if name in table]
    for record in table.drop_duplicates("map").to_dict("records"):
        row = [record["map"]]
        for column in columns:
            text = number_text(record[column])
            if not pd.isna(error := record.get(f"{column}_se")):
                text += f" ± {error:.3f}"
            if record["n_folds"] and f"{column}_folds_mean" in record:
                mean, sd = record[f"{column}_folds_mean"], record[f"{column}_folds_sd"]
                text += f" (folds {mean:.3f} ± {sd:.3f})"
            row.append(f"{100 * record[column]:.1f} %" if column == "dice_max_fraction" else text)
        rows.append(row)
    p = number_text(table["p"].iloc[0])
    best_chance = f"≤ {number_text(table['dice_max_chance'].max())}"
    chance = {"dice_matched": p, "dice_max": best_chance, "roc_auc": "0.500",
              "average_precision": p, "mass": p, "shift_mean": p}  # fmt: skip
    rows.append(["chance", *(chance.get(column, "–") for column in columns)])
    return table_html(["map", *(OVERLAP_HEADS[name] for name in columns)], rows, "with-chance")


def stability_html(table: pd.DataFrame, of_maps: pd.DataFrame) -> str:
    """Return how stable each map is, and how it correlates with every other."""
    names = of_maps.iloc[:, 0]
    first = table.drop_duplicates("map").set_index("map")
    rows = [
        [name, *(number_text(first.at[name, r]) for r in ("fold_r", "half_r") if r in first),
         *(f"{value:.2f}" for value in row)]
        for name, row in zip(names, of_maps.iloc[:, 1:].to_numpy(), strict=True)
    ]  # fmt: skip
    heads = {"fold_r": "r of folds", "half_r": "r of halves"}
    heads = [head for name, head in heads.items() if name in first]
    return table_html(["map", *heads, *(f"r with {name}" for name in names)], rows)


def differences_html(differences: pd.DataFrame) -> str:
    """Return the differences between maps of the same scans, with their standard errors."""
    rows = [
        [f"{row['map']} − {row['other']}",
         *(f"{row[f'{m}_difference']:+.3f} ± {row[f'{m}_difference_se']:.3f}"
           for m in ("dice_matched", "average_precision"))]
        for row in differences.to_dict("records")
    ]  # fmt: skip
    return table_html(["maps", "Dice, matched size", "average precision"], rows)


def regions_html(regions: pd.DataFrame) -> str:
    """Return the regions with the largest shares, one column a map."""
    largest = regions["share"].abs().groupby(regions["region"]).max().nlargest(N_REGIONS_SHOWN)
    rows = []
    for region in largest.index:
        records = regions[regions["region"] == region].to_dict("records")
        cells = [f"{100 * r['share']:.1f} % · {r['mean']:.2g} · {r['dice']:.2f}" for r in records]
        rows.append([records[0]["name"] or region, records[0]["n_voxels"], *cells])
    return table_html(["region", "voxels", *dict.fromkeys(regions["map"])], rows)


def picture_html(path: Path, caption: str) -> str:
    """Return a picture, embedded."""
    data = base64.b64encode(path.read_bytes()).decode()
    caption = html.escape(caption)
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def shrink(img: SpatialImage) -> SpatialImage:
    """Return an image turned to RAS axes, averaged over blocks to about the shown voxel size."""
    img = nib.as_closest_canonical(img)
    data = np.asarray(img.dataobj, dtype=np.float32)
    factors = np.maximum(1, SHOWN_VOXEL_MM // nib.affines.voxel_sizes(img.affine))
    factors = np.minimum(factors, data.shape).astype(int).tolist()
    n_blocks = [side // factor for side, factor in zip(data.shape, factors, strict=True)]
    cropped = data[tuple(slice(n * f) for n, f in zip(n_blocks, factors, strict=True))]
    split = [size for pair in zip(n_blocks, factors, strict=True) for size in pair]
    affine = img.affine @ np.diag([*factors, 1])
    affine[:3, 3] = nib.affines.apply_affine(img.affine, [(f - 1) / 2 for f in factors])
    return nib.Nifti1Image(cropped.reshape(split).mean((1, 3, 5)), affine)


def encode(data: np.ndarray) -> str:
    """Return bytes in Fortran order (first axis fastest), base64."""
    return base64.b64encode(data.tobytes(order="F")).decode()


def viewer_data(maps: dict[str, Map], space: Space) -> dict:
    """Return what the page's script needs to draw the slices of all maps."""
    background_data = shrink(space.background_img).get_fdata()
    positive = background_data[background_data > 0]
    top = np.percentile(positive, 99.5) if positive.size else 1.0
    nothing = np.zeros(space.like_img.shape)
    reference_data = nothing if space.reference_data is None else space.reference_data
    reference_img = nib.Nifti1Image(reference_data.astype(np.uint8), space.like_img.affine)
    reference_img = shrink(reference_img)
    shown = []
    for name, each in maps.items():
        data = shrink(each.img).get_fdata()
        limit = color_limit(data)
        levels = np.clip(np.round(127 * data / limit), -127, 127) + 128
        title = f"{name} · {short}" if (short := read_sidecar(each).get("verdict_short")) else name
        shown.append(
            {"name": printable(title), "limit": limit, "data": encode(levels.astype(np.uint8))}
        )
    return {
        "shape": reference_img.shape,
        "affine": reference_img.affine.tolist(),
        "background": encode(np.clip(255 * background_data / top, 0, 255).astype(np.uint8)),
        "reference": encode((reference_img.get_fdata() >= 0.5).astype(np.uint8)),
        "maps": shown,
    }


def write_page(
    path: Path, facts: dict[str, str], tables: dict[str, pd.DataFrame], runs: list[Run],
    maps: dict[str, Map], space: Space,
) -> None:  # fmt: skip
    """Write report.html; `facts` say how it was made, the pictures of overlap stand beside it."""
    table, has_reference = tables["comparison"], space.reference_data is not None
    warnings = warnings_of(table, runs, maps)
    pictures = {"dice_curves.png": "Dice against voxels taken", "settings.png": "every setting"}
    page = Template(TEMPLATE_PATH.read_text(encoding="utf-8")).substitute(
        facts="".join(
            f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in facts.items()
        ),
        verdicts="".join(f"<li>{html.escape(text)}</li>" for text in verdicts(runs, maps)),
        warnings="".join(f"<li>{html.escape(text)}</li>" for text in warnings or ["None."]),
        metrics=metrics_html(runs) if runs else "<p>No --run was given.</p>",
        curves="".join(
            picture_html(p, f"{run.name}: {PICTURES[p.name]}") for run in runs for p in run.pictures
        ),
        overlap=overlap_html(table) if has_reference else "<p>No --reference was given.</p>",
        pictures="".join(
            picture_html(path.with_name(name), caption)
            for name, caption in pictures.items()
            if has_reference
        ),
        differences=differences_html(tables["differences"])
        if len(tables["differences"])
        else "<p>No two maps have the maps of the same scans beside them (--save-subjects).</p>",
        stability=stability_html(table, tables["correlations"]),
        regions=regions_html(tables["regions"])
        if len(tables["regions"])
        else "<p>No --atlas was given.</p>",
        data=json.dumps(viewer_data(maps, space)).replace("<", r"\u003c"),  # opens or ends no tag
    )
    files.write_bytes(path, page.encode(errors="xmlcharrefreplace"))
