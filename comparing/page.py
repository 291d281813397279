"""report.html, one self-contained file: what it shows is escaped, laid out and drawn here."""

import base64
import html
import json
from collections.abc import Iterable
from pathlib import Path
from string import Template

import nibabel as nib
import numpy as np
import pandas as pd
from nibabel.affines import apply_affine, voxel_sizes
from nibabel.spatialimages import SpatialImage

from comparing.maps import Map, control_path
from comparing.measures import Settings
from comparing.peaks import MAX_CLUSTERS, MIN_CLUSTER_MM3, TOP_SHARE
from comparing.runs import METRICS_SHOWN, PICTURES, PNG_SIGNATURE, Run
from comparing.space import Space
from reporting.maps import OUTCOME_NAMES, OUTCOMES, title_of
from reporting.metrics import SUMMARY_ROWS
from reporting.pictures import HIDDEN_FRACTION, color_limit
from utils import printable

TEMPLATE_PATH = Path(__file__).with_name("page_template.html")
SHOWN_VOXEL_MM = 2.0  # slices are no finer: the page stays small
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
        css = "finds" if row["finds"] else "fails"
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


def in_order(maps: dict[str, Map]) -> list[str]:
    """Return the names of the maps, each control behind its map."""
    name_of = {each.path: name for name, each in maps.items()}
    pairs = [
        (name, name_of.get(control_path(each.path), name))
        for name, each in maps.items()
        if not each.is_control
    ]
    return list(dict.fromkeys([*(name for pair in pairs for name in pair), *maps]))


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


def picture_html(path: Path, caption: str, css: str = "") -> str:
    """Return a picture, embedded."""
    data = base64.b64encode(path.read_bytes()).decode()
    caption = html.escape(caption)
    return (
        f'<figure class="{css}"><img alt="{caption}" src="data:image/png;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def outcomes_html(maps: dict[str, Map]) -> str:
    """Return the pictures of the maps by outcome beside each map, which heatmap.py has drawn."""
    found = []
    for name, each in maps.items():
        stem = each.path.name.split("_all.nii")[0]
        for outcome in OUTCOMES:
            path = each.path.with_name(f"{stem}_{outcome}.png")
            if path.is_file() and path.read_bytes().startswith(PNG_SIGNATURE):
                found.append(picture_html(path, f"{name}: {OUTCOME_NAMES[outcome]}"))
    return "".join(found)


def shrink(img: SpatialImage) -> SpatialImage:
    """Return an image turned to RAS axes, averaged over blocks to about the shown voxel size."""
    img = nib.as_closest_canonical(img)
    data = np.asarray(img.dataobj, dtype=np.float32)
    factors = np.maximum(1, SHOWN_VOXEL_MM // voxel_sizes(img.affine))
    factors = np.minimum(factors, data.shape).astype(int).tolist()
    n_blocks = [side // factor for side, factor in zip(data.shape, factors, strict=True)]
    cropped = data[tuple(slice(n * f) for n, f in zip(n_blocks, factors, strict=True))]
    split = [size for pair in zip(n_blocks, factors, strict=True) for size in pair]
    affine = img.affine @ np.diag([*factors, 1])
    affine[:3, 3] = apply_affine(img.affine, [(f - 1) / 2 for f in factors])
    return nib.Nifti1Image(cropped.reshape(split).mean((1, 3, 5)), affine)


def encode(values: np.ndarray) -> str:
    """Return the bytes of an array, base64."""
    return base64.b64encode(values.tobytes()).decode()


def encode_values(values: np.ndarray) -> str:
    """Return float32 values without their last 8 bits, which no one reads, 3 bytes each, base64."""
    rounded = (values.astype("<f4").view("<u4") + 0x80) & 0xFFFFFF00
    return encode(rounded.view(np.uint8).reshape(-1, 4)[:, 1:])


def viewer_data(
    maps: dict[str, Map], sidecars: dict[str, dict], smoothed: dict[str, np.ndarray],
    thresholds: dict[str, float], peaks: dict[str, pd.DataFrame], fwhm_mm: float, space: Space,
) -> dict:  # fmt: skip
    """Return what the page's script needs to draw the slices of all maps inside the mask.

    Voxels are in Fortran order, the first axis fastest. Maps are as they are, to 2e-5 of a value,
    and where `fwhm_mm` is not 0 also smoothed, in 255 levels.
    """

    def shown_of(data: np.ndarray) -> np.ndarray:
        """Return an array on the maps' grid as the page has it."""
        img = nib.Nifti1Image(data.astype(np.float32), space.like_img.affine)
        return shrink(img).get_fdata(dtype=np.float32)

    grid_img = shrink(space.like_img)
    in_mask = shown_of(space.mask_data) >= 0.5
    inside = in_mask.ravel(order="F")
    background = shrink(space.background_img).get_fdata().ravel(order="F")
    positive = background[background > 0]
    top = np.percentile(positive, 99.5) if positive.size else 1.0
    reference_data = space.reference_data
    reference_data = space.mask_data * 0 if reference_data is None else reference_data
    shown = []
    for name in in_order(maps):
        data = shrink(maps[name].img).get_fdata(dtype=np.float32)
        raw = data.ravel(order="F")[inside]
        limit = color_limit(raw)
        each = {"name": printable(name), "control": maps[name].is_control,
                "title": printable(
                    title_of(sidecars[name]) if sidecars[name] else maps[name].path.name
                ),
                "unit": printable(str(sidecars[name].get("unit", "value"))),
                "verdict": printable(str(sidecars[name].get("verdict_short") or "")),
                "raw": {"limit": limit, "threshold": HIDDEN_FRACTION * limit,
                        "data": encode_values(raw)}}  # fmt: skip
        whole_data = np.zeros(space.mask_data.shape, dtype=np.float32)
        whole_data[space.mask_data] = smoothed[name]
        values = shown_of(whole_data).ravel(order="F")[inside]
        limit = color_limit(values)
        threshold = min(thresholds[name], limit)
        if fwhm_mm:
            levels = np.clip(np.round(127 * values / limit), -127, 127).astype(np.int8)
            each["smoothed"] = {"limit": limit, "threshold": threshold, "data": encode(levels)}
        else:
            each["raw"]["threshold"] = threshold
        peak = peaks[name][["x", "y", "z"]].to_numpy(dtype=float)[:1]
        voxel = apply_affine(np.linalg.inv(grid_img.affine), peak)[0] if len(peak) else (
            np.argwhere(in_mask)[np.abs(data[in_mask]).argmax()]
        )  # fmt: skip
        top_voxel = np.array(in_mask.shape) - 1
        each["peak"] = np.clip(np.rint(voxel), 0, top_voxel).astype(int).tolist()
        shown.append(each)
    return {
        "shape": in_mask.shape,
        "affine": grid_img.affine.tolist(),
        "fwhm": fwhm_mm,
        "inside": encode(np.packbits(inside)),
        "background": encode(np.clip(255 * background / top, 0, 255).astype(np.uint8)),
        "reference": encode(np.packbits(shown_of(reference_data).ravel(order="F") >= 0.5)),
        "maps": shown,
    }


def explanations(settings: Settings, space: Space) -> dict[str, str]:
    """Return what the page says of the settings that it shows."""
    width, n = settings.fwhms_mm[0], settings.n_permutations
    how = f"--sign {settings.signs[0]}" + f", smoothed by {width:g} mm" * bool(width)
    taken = "as many voxels as the reference has"
    if space.inside is None:
        taken = f"the top {100 * TOP_SHARE:g} % of the mask's voxels"
    outline = " The green line is the outline of the reference." * (space.inside is not None)
    said = {
        "bars_say": "Bars: Dice with the reference at matched size. Dotted: chance. Orange: the "
        "same map of untrained networks. Grey bars do not lie above both by two standard errors "
        f"(±). Measured with {how}; every other setting stands below. The contrast of IG reads "
        "with the other sign."
        if space.inside is not None
        else "",
        "maps_say": f"Blue is negative, orange positive. Shown are {taken}, those with the "
        f"strongest evidence ({how}), and what is as strong with the other sign; the slider shows "
        f"more.{outline}",
        "permutations_say": f"The p of labels ({n:,} permutations) asks whether the difference of "
        "the groups' maps overlaps the reference better than differences of groups drawn at random "
        "do. It does not say that the networks learned it: compare it with that of untrained "
        "networks. The p of shifts answers for smoothness only; a map that is merely stronger "
        "towards the middle of the brain passes it, too.",
        "peaks_say": f"Face-connected clusters of {taken} with the strongest evidence ({how}), at "
        f"least {MIN_CLUSTER_MM3:g} mm³: the first {N_PEAKS_SHOWN} peaks of each map; the files "
        f"*_peaks.csv have those of the {MAX_CLUSTERS} highest clusters.",
    }
    return {key: html.escape(text) for key, text in said.items()}


def write_page(page: dict[str, str], data: dict) -> bytes:
    """Return report.html from the parts that the template names, and the viewers' data."""
    text = json.dumps(data).replace("<", r"\u003c")  # opens or ends no tag
    template = Template(TEMPLATE_PATH.read_text(encoding="utf-8"))
    return template.substitute(page, data=text).encode(errors="xmlcharrefreplace")


def page_parts(
    sentences: list[str], warnings: list[str], facts: dict[str, str], methods: str,
    tables: dict[str, pd.DataFrame], judged: pd.DataFrame, peaks: dict[str, pd.DataFrame],
    runs: list[Run], maps: dict[str, Map], n_permutations: int, outpath: Path,
    first_picture: Path | None,
) -> dict[str, str]:  # fmt: skip
    """Return the page's parts as HTML; the pictures of overlap lie in `outpath`."""
    table, has_reference = tables["comparison"], len(judged) > 0

    def items(texts: list[str]) -> str:
        return "".join(f"<li>{html.escape(text)}</li>" for text in texts)

    curves = [(path, f"{run.name}: {PICTURES[path.name]}", "" if path.name == "roc.png" else "wide")
              for run in runs for path in run.pictures]  # fmt: skip
    curves.sort(key=lambda curve: curve[2])  # the ROC curves side by side, before the wide ones
    overlap_pictures = {"settings.png": "average precision over chance, in every setting",
                        "dice_curves.png": "Dice against the number of voxels taken"}  # fmt: skip
    return {
        "sentences": items(sentences),
        "bars": bars_html(judged) if has_reference else "",
        "first": picture_html(first_picture, "") if first_picture else "",
        "warnings": f"<ul class=warnings>{items(warnings)}</ul>" if warnings else "",
        "stability": stability_html(table, tables["correlations"], maps),
        "overlap": overlap_html(table, maps, n_permutations)
        if has_reference else "<p>No --reference was given.</p>",
        "pictures": "".join(
            picture_html(outpath / name, text)
            for name, text in overlap_pictures.items() if has_reference
        ),
        "differences": differences_html(tables["differences"], maps)
        if len(tables["differences"])
        else "<p>No two maps have the maps of the same scans beside them (--save-subjects).</p>",
        "peaks": peaks_html({n: each for n, each in peaks.items() if not maps[n].is_control}),
        "metrics": metrics_html(runs) if runs else "<p>No --run was given.</p>",
        "strata": strata_html(runs),
        "curves": "".join(picture_html(*each) for each in curves),
        "outcomes": outcomes_html(maps),
        "regions": f"<h2>Regions</h2>{regions_html(tables['regions'])}"
        if len(tables["regions"]) else "",
        "methods": html.escape(methods),
        "facts": "".join(
            f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in facts.items()
        ),
    }  # fmt: skip
