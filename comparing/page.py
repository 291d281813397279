"""report.html, one self-contained file: what it shows is escaped, laid out and drawn here."""

import base64
import html
import json
from pathlib import Path
from string import Template

import pandas as pd

from comparing import page_tables
from comparing.maps import Map
from comparing.measures import Settings
from comparing.peaks import MAX_CLUSTERS, MIN_CLUSTER_MM3, TOP_SHARE
from comparing.runs import PICTURES, PNG_SIGNATURE, Run
from comparing.space import Space
from reporting.maps import OUTCOME_NAMES, OUTCOMES

TEMPLATE_PATH = Path(__file__).with_name("page_template.html")


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


def explanations(settings: Settings, space: Space, has_ig_contrast: bool) -> dict[str, str]:
    """Return what the page says of the settings that it shows."""
    how, n = settings.how, settings.n_permutations
    taken = "as many voxels as the reference has"
    if space.inside is None:
        taken = f"the top {100 * TOP_SHARE:g} % of the mask's voxels"
    outline = " The green line is the outline of the reference." * (space.inside is not None)
    said = {
        "bars_say": "Bars: how well the strongest voxels of a map, as many as the reference has, "
        "overlap it (Dice: 1 is all, 0 nothing; ± standard error over scans). Dotted: chance. "
        "Purple: the same map of untrained networks. Grey: not above both by two standard errors. "
        f"Evidence is {how}; every other setting stands below. A contrast is patients' mean map "
        "less controls'; what made the maps is said under Methods."
        + " The contrast of IG has its evidence of atrophy in positive values."
        * has_ig_contrast
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
        f"least {MIN_CLUSTER_MM3:g} mm³: the first {page_tables.N_PEAKS_SHOWN} peaks of each map; "
        f"the files *_peaks.csv have those of the {MAX_CLUSTERS} highest clusters.",
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
        "bars": page_tables.bars_html(judged) if has_reference else "",
        "first": picture_html(first_picture, "The first map; the others are below.")
        if first_picture else "",
        "warnings": f"<ul class=warnings>{items(warnings)}</ul>" if warnings else "",
        "stability": page_tables.stability_html(table, tables["correlations"], maps),
        "overlap": page_tables.overlap_html(table, maps, n_permutations)
        if has_reference else "<p>No --reference was given.</p>",
        "pictures": "".join(
            picture_html(outpath / name, text)
            for name, text in overlap_pictures.items() if has_reference
        ),
        "differences": page_tables.differences_html(tables["differences"], maps)
        if len(tables["differences"])
        else "<p>No two maps have the maps of the same scans beside them (--save-subjects).</p>",
        "peaks": page_tables.peaks_html(
            {name: each for name, each in peaks.items() if not maps[name].is_control}
        ),
        "metrics": page_tables.metrics_html(runs) if runs else "<p>No --run was given.</p>",
        "strata": page_tables.strata_html(runs),
        "curves": "".join(picture_html(*each) for each in curves),
        "outcomes": outcomes_html(maps),
        "regions": f"<h2>Regions</h2>{page_tables.regions_html(tables['regions'])}"
        if len(tables["regions"]) else "",
        "methods": html.escape(methods),
        "facts": "".join(
            f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in facts.items()
        ),
    }  # fmt: skip
