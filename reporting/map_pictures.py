"""Pictures of maps: slices at their peaks, pages with linked slices, and colours in headers."""

import gc
import html
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import nibabel as nib
import numpy as np

from reporting.pictures import save_figure
from run_folder import files

if TYPE_CHECKING:  # matplotlib and nilearn take seconds: they are imported where they are used
    from matplotlib.colors import ListedColormap

MAP_DPI = 200
LETTERS_AT_14 = 108  # of a title that fills the picture at 14 points
OUTLINE_COLOR = "#6aff4d"
VIEWER_HEADING = (
    '<div style="font: 15px system-ui, sans-serif; padding: 6px 10px"><b>{title}</b><br>{said}. '
    'compare.py writes the <a href="comparison/report.html">report</a>.</div>'
)
N_CUTS = 7  # slices per direction
SHOWN_PERCENTILE = 99.9  # of |map| inside the head: the end of the colour scale
HIDDEN_FRACTION = 0.1  # of the colour scale: voxels below it are left transparent


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
    from nilearn.image import reorder_img

    data = np.abs(map_img.get_fdata())
    shown_img = nib.Nifti1Image(np.where(data >= threshold, data, 0), map_img.affine)
    if shown_img.get_fdata().any():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fewer peaks than cuts: it takes their neighbours
            shown_img = reorder_img(shown_img, resample="nearest", copy_header=True)  # if oblique
            found = {axis: plotting.find_cut_slices(shown_img, axis, N_CUTS) for axis in "xyz"}
        ends = np.array([(0, 0, 0), shown_img.shape]) - [[0], [1]]
        ends_mm = np.sort(nib.affines.apply_affine(shown_img.affine, ends), axis=0).T
        limits = zip("xyz", ends_mm, strict=True)
        return {axis: np.unique(np.clip(found[axis], *ends)) for axis, ends in limits}
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
    # of a background that is 0 everywhere; of a peak in the outermost voxels of an oblique map
    for odd in ("empty mask", "Some of the specified cut_coords"):
        warnings.filterwarnings("ignore", message=odd)
    for row, axis in enumerate("xyz"):
        display = plotting.plot_stat_map(
            map_img, background_img, display_mode=axis, cut_coords=cuts[axis], figure=figure,
            axes=(0.005, 0.63 - 0.315 * row, 0.885, 0.305), colorbar=False, draw_cross=False,
            black_bg=True, cmap=cmap, vmax=limit, vmin=-limit, threshold=threshold,
        )  # fmt: skip
        if reference_img is not None:
            display.add_contours(reference_img, levels=[0.5], colors=OUTLINE_COLOR, linewidths=0.9)
    values = np.linspace(-limit, limit, 256)
    colors = cmap(Normalize(-limit, limit)(values))
    colors[np.abs(values) < threshold] = (0.25, 0.25, 0.25, 1)
    scale = ScalarMappable(Normalize(-limit, limit), ListedColormap(colors))
    bar = figure.colorbar(scale, cax=figure.add_axes((0.895, 0.24, 0.012, 0.62)))
    bar.set_ticks([-limit, -threshold, 0, threshold, limit])
    bar.ax.set_yticklabels([f"{v:.2g}" for v in bar.get_ticks()], color="white", fontsize=11)
    bar.ax.tick_params(color="white")
    bar.set_label(unit, color="white", fontsize=11)
    hidden = f"within ±{threshold:.2g}\ntransparent"
    if not map_img.get_fdata().any():
        hidden = "the map is 0\neverywhere"
    hidden += "\ngreen: reference" * (reference_img is not None)
    size = min(14, 14 * LETTERS_AT_14 / len(title))
    figure.text(0.01, 0.96, title, color="white", fontsize=size, va="center")
    figure.text(0.895, 0.125, hidden, color="0.8", fontsize=9.5, va="top")
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
    page = re.sub(r"(?<=-)[0-9a-f]{32}\b", "map", page)  # a random name: equal maps, equal bytes
    page = re.sub(r"(<body[^>]*>)", lambda match: match[0] + heading, page, count=1)
    path = stem.with_suffix(".html")
    files.write_bytes(path, page.encode())
    return path
