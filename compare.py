"""Ask how well maps overlap a reference, such as a meta-analysis of where the disease strikes.

    python3 compare.py --maps maps/IG_map_all.nii.gz maps/IG_contrast_all.nii.gz \\
        svm/SVM_pattern_all.nii.gz --reference meta_analysis.nii.gz --sign neg pos abs \\
        --fwhm 10 0 --run ./output/ ./svm/ --outpath ./comparison/

Every measure comes with what chance would give, and every map is measured with each --sign and each
--fwhm; tables lead with the first of each, and nothing picks the best. Beside a map that ends in
_all its fold maps (_f0, _f1, …) are measured too, and the map of untrained networks (_random_), its
control, is added. Where heatmap.py --save-subjects left the maps of single scans, measures have
standard errors, and contrasts a p of exchanged labels.

--sign says what counts as evidence: neg is what reads atrophy, which darkens tissue, in maps of IG,
GGC and SVM with --target 1, and pos in the contrast of IG; see docs/reading-maps.md.

    python3 compare.py --maps maps/IG_map_all.nii.gz maps/LRP_map_all.nii.gz --outpath ./stability/

Without --reference the maps are shown, with how stable each is and how they correlate.

    python3 compare.py --run ./modelA24/ ./modelB32/ ./svm/ --outpath ./chosen/

Runs are sorted by their validation loss, which is what a model is chosen by; for two runs of the
same scans the difference of their ROC AUCs has a bootstrap interval.

Written to --outpath: comparison.csv, correlations.csv, differences.csv, dice_curves.png,
settings.png, report.html, compare.log; with --atlas, regions.csv; with --run, runs.csv and
run_differences.csv.
"""

import argparse
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from nibabel import Nifti1Image

import utils
from comparing import finding, measures, overlap, page, peaks, viewer
from comparing.maps import Map, load_maps
from comparing.measures import Measured, Settings
from comparing.runs import Run, differences, load_runs, runs_table
from comparing.space import Space, load_atlas, load_space
from reporting import map_pictures, metrics, pictures
from run_folder import files
from run_folder.processes import run_script
from utils import log, printable

MAX_NAME = 80  # of a map, in names of files
SHOWN = (
    "map", "sign", "fwhm", "dice_matched", "dice_matched_se", "average_precision",
    "average_precision_se", "roc_auc", "label_p", "label_p_untrained", "shift_p", "fold_r",
    "half_r", "outside",
)  # fmt: skip


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    number = utils.number
    parser = utils.make_parser(__doc__, "comparison", "--outpath", "--seed")
    option = parser.add_argument
    # fmt: off
    option("--maps", type=Path, nargs="+", default=[], metavar="FILE",
           help="maps on one grid, such as LRP_map_all.nii.gz")
    option("--reference", type=Path, default=None, metavar="FILE",
           help="the reference map; resampled to the maps' grid if it is on another")
    option("--mask", type=Path, default=None, metavar="FILE",
           help="analysis mask; left out: where at least half of the explained scans are not 0")
    option("--reference-threshold", type=number(float), default=0.0,
           help="the reference is where its map is above this")
    option("--sign", choices=list(overlap.SIGNS), nargs="+", default=["abs"],
           help="what counts as evidence, after --fwhm")
    option("--fwhm", type=number(float, at_least=0), nargs="+", default=[0.0], metavar="MM",
           help="smooth the signed maps with a Gaussian of this width in mm")
    option("--permutations", type=number(int, at_least=1), default=1000,
           help="exchanges of labels, and shifts of maps, that a p is taken from")
    option("--atlas", type=Path, default=None, metavar="FILE", help="label image for regions.csv")
    option("--atlas-labels", type=Path, default=None, metavar="CSV",
           help="number and name of each region of --atlas, with a header row")
    option("--run", type=Path, nargs="+", default=[], metavar="DIR",
           help="folders of train_cv.py or svm.py to compare; the page shows their metrics and "
           "curves. Without --maps only the runs are compared")
    # fmt: on
    args = parser.parse_args(argv)
    if (args.atlas is None) != (args.atlas_labels is None):
        parser.error("--atlas and --atlas-labels go together")
    if (args.reference and not args.maps) or not (args.maps or args.run):
        parser.error("--maps are needed, or --run without --reference")
    for name in ("sign", "fwhm"):
        if len(set(getattr(args, name))) < len(getattr(args, name)):
            parser.error(f"argument --{name}: a value is given twice")
    args.command = shlex.join(["compare.py", *(sys.argv[1:] if argv is None else argv)])
    return args


def main(args: argparse.Namespace) -> None:
    """Compare the runs, then every map with the reference, and draw the page."""
    utils.start_log()
    runs, space = load_runs(args.run), None
    if args.maps:
        maps = load_maps(args.maps)
        space = load_space(maps, args.reference, args.reference_threshold, args.mask)
        atlas = load_atlas(args.atlas, args.atlas_labels, space) if args.atlas else None
        scratch = (measures.scratch_gb(maps, space), args.outpath)
        files.check_room({"smoothed maps of scans": scratch})
        finding.read_sidecars(maps)  # a damaged one is refused before anything is written
    files.make_outpath(args.outpath)
    utils.start_log(args.outpath / "compare.log")
    if runs:
        compare_runs(args, runs)
    if space is not None:
        compare_maps(args, maps, space, atlas, runs)


def compare_runs(args: argparse.Namespace, runs: list[Run]) -> None:
    """Write and say how the runs compare."""
    table, pairs = runs_table(runs), differences(runs, args.seed)
    files.write_csv(args.outpath / "runs.csv", table)
    utils.conclude(metrics.as_text(table))
    if len(runs) > 1:
        utils.conclude(
            "sorted by validation loss: choose a model by it, never by the columns test_…"
        )
    if len(pairs):
        files.write_csv(args.outpath / "run_differences.csv", pairs)
        heads = "differences of ROC AUC, with bootstrap intervals by subject:"
        utils.conclude(heads, metrics.as_text(pairs))


def compare_maps(
    args: argparse.Namespace, maps: dict[str, Map], space: Space, atlas: tuple | None,
    runs: list[Run],
) -> None:  # fmt: skip
    """Measure every map in every setting, write the tables and draw the page."""
    log.info("mask: %s, %d voxels", space.mask_source, space.mask_data.sum())
    settings = Settings(args.sign, args.fwhm, args.permutations, args.seed)
    evidence_of, found, regions = overlap.SIGNS[args.sign[0]], {}, []
    peaks_of, thresholds = {}, {}
    with utils.log_above_bars():
        for name, each in utils.progress(maps.items(), "maps"):
            found[name] = measures.measure(name, each, space, settings, args.outpath)
            evidence = evidence_of(found[name].values)
            thresholds[name] = peaks.threshold_of(evidence, space.inside)
            peaks_of[name] = peaks.find_peaks(
                found[name].values, evidence, thresholds[name], space, atlas
            )
            if atlas is not None:
                regions += [{"map": name} | row for row in overlap.region_table(evidence, *atlas)]
    measures.add_controls(maps, found)
    table = pd.DataFrame([row for each in found.values() for row in each.rows])
    tables = {
        "comparison": table,
        "correlations": measures.correlations(found),
        "differences": measures.differences_of_maps(maps, found),
        "regions": pd.DataFrame(regions),
    }
    write_tables(args.outpath, tables, peaks_of)
    if space.inside is not None:
        curves = {n: each.curve for n, each in found.items() if not maps[n].is_control}
        p = space.inside.mean()
        pictures.plot_curves(args.outpath / "dice_curves.png", overlap.TOP_FRACTIONS, curves, p)
        pictures.plot_settings(args.outpath / "settings.png", table)
    sidecars = finding.read_sidecars(maps)
    drawn = draw_maps(args.outpath, settings, maps, found, thresholds, sidecars, space)
    said = write_report(
        args, settings, tables, found, peaks_of, thresholds, runs, maps, sidecars, space, drawn
    )
    shown = table[[name for name in SHOWN if name in table]]
    utils.conclude(metrics.as_text(shown), *said, f"open {args.outpath / 'report.html'}")


def write_tables(
    outpath: Path, tables: dict[str, pd.DataFrame], peaks_of: dict[str, pd.DataFrame]
) -> None:
    """Write the tables that have rows, and each map's peaks."""
    for name, each in tables.items():
        if len(each):
            files.write_csv(outpath / f"{name}.csv", each)
    for name, each in peaks_of.items():
        files.write_csv(outpath / f"{file_name(name)}_peaks.csv", each)


def file_name(name: str) -> str:
    """Return a map's name as that of a file; folders in it would lead elsewhere."""
    return re.sub(r"[^\w.-]+", "_", name).lstrip(".")[:MAX_NAME]


def draw_maps(
    outpath: Path, settings: Settings, maps: dict[str, Map], found: dict[str, Measured],
    thresholds: dict[str, float], sidecars: dict[str, dict], space: Space,
) -> Path | None:  # fmt: skip
    """Draw each map but the controls as it was measured first; return the first picture.

    The reference is an outline.
    """
    affine, reference_img = space.like_img.affine, None
    background_img = Nifti1Image(space.background_img.get_fdata(dtype=np.float32), affine)
    if space.reference_data is not None:
        reference_img = Nifti1Image(space.reference_data.astype(np.float32), affine)
    drawn = []
    shown = {name: each for name, each in maps.items() if not each.is_control}
    for name in utils.progress(shown, "pictures"):
        data = np.zeros(space.mask_data.shape, dtype=np.float32)
        data[space.mask_data] = found[name].values
        limit = map_pictures.color_limit(data)
        unit = str(sidecars[name].get("unit", "value"))
        drawn += map_pictures.draw_slices(
            outpath / file_name(name), Nifti1Image(data, affine), background_img,
            pictures.label_of(f"{name}: {settings.how}", MAX_NAME),
            pictures.label_of(printable(unit), MAX_NAME), limit, min(thresholds[name], limit),
            reference_img,
        )  # fmt: skip
    return drawn[0] if drawn else None


def write_report(
    args: argparse.Namespace, settings: Settings, tables: dict[str, pd.DataFrame],
    found: dict[str, Measured], peaks_of: dict[str, pd.DataFrame], thresholds: dict[str, float],
    runs: list[Run], maps: dict[str, Map], sidecars: dict[str, dict], space: Space,
    first_picture: Path | None,
) -> list[str]:  # fmt: skip
    """Write report.html; return the sentences that it begins with."""
    first = tables["comparison"].drop_duplicates("map")
    judged = finding.judge(first, maps) if space.inside is not None else pd.DataFrame()
    said = finding.verdicts(runs, sidecars)
    is_void = any("explain nothing" in sentence for sentence in said)  # sidecars have it, too
    said.append(
        finding.sentence_of(judged, settings, is_void) if len(judged)
        else finding.of_stability(first)
    )  # fmt: skip
    versions = utils.versions()
    facts = {
        "Command": args.command,
        "Reference": f"{args.reference}, above {args.reference_threshold:g}; "
        f"{space.inside.sum()} of {len(space.inside)} mask voxels"
        if args.reference else "none was given",
        "Mask": space.mask_source,
        "Evidence": f"--sign {' '.join(args.sign)}, smoothed by "
        f"{' or '.join(f'{fwhm:g}' for fwhm in args.fwhm)} mm; the first of each leads",
        "Background": space.background_source,
        "Versions": ", ".join(f"{k} {v}" for k, v in versions.items()),
        "Made": utils.now(),
    }  # fmt: skip
    parts = page.page_parts(
        said, finding.warnings_of(runs, sidecars), facts,
        finding.methods_paragraph(first, runs, sidecars, space, settings, versions), tables, judged,
        peaks_of, runs, maps, args.permutations, args.outpath, first_picture,
    )  # fmt: skip
    values = {name: each.values for name, each in found.items()}
    data = viewer.viewer_data(maps, sidecars, values, thresholds, peaks_of, args.fwhm[0], space)
    content = page.write_page(
        parts | page.explanations(settings, space, "IG_contrast" in maps), data
    )
    files.write_bytes(args.outpath / "report.html", content)
    return said


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args()))
