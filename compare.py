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
import shlex
import sys
from pathlib import Path

import pandas as pd

import utils
from comparing import measures, overlap, page
from comparing.maps import Map, load_maps
from comparing.measures import Settings
from comparing.runs import Run, differences, load_runs, runs_table
from comparing.space import Space, load_atlas, load_space
from reporting import metrics, pictures
from run_folder import files
from run_folder.processes import run_script
from utils import log

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
        page.completeness_errors(maps)  # a damaged sidecar is refused before anything is written
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
    found, regions = {}, []
    with utils.log_above_bars():
        for name, each in utils.progress(maps.items(), "maps"):
            found[name] = measures.measure(name, each, space, settings, args.outpath)
            if atlas is not None:
                evidence = overlap.SIGNS[args.sign[0]](found[name].values)
                regions += [{"map": name} | row for row in overlap.region_table(evidence, *atlas)]
    measures.add_controls(maps, found)
    table = pd.DataFrame([row for each in found.values() for row in each.rows])
    tables = {
        "comparison": table,
        "correlations": measures.correlations(found),
        "differences": measures.differences_of_maps(maps, found),
        "regions": pd.DataFrame(regions),
    }
    for name, each in tables.items():
        if len(each):
            files.write_csv(args.outpath / f"{name}.csv", each)
    if space.inside is not None:
        curves, p = {name: each.curve for name, each in found.items()}, space.inside.mean()
        pictures.plot_curves(args.outpath / "dice_curves.png", overlap.TOP_FRACTIONS, curves, p)
        pictures.plot_settings(args.outpath / "settings.png", table)
    facts = {
        "Command": args.command,
        "Reference": f"{args.reference}, above {args.reference_threshold:g}; "
        f"{space.inside.sum()} of {len(space.inside)} mask voxels"
        if args.reference else "none was given",
        "Mask": space.mask_source,
        "Evidence": f"--sign {' '.join(args.sign)}, smoothed by "
        f"{' or '.join(f'{fwhm:g}' for fwhm in args.fwhm)} mm; the first of each leads",
        "Background": space.background_source,
        "Versions": ", ".join(f"{k} {v}" for k, v in utils.versions().items()),
        "Made": utils.now(),
    }  # fmt: skip
    page_path = args.outpath / "report.html"
    page.write_page(page_path, facts, tables, runs, maps, space)
    shown = table[[name for name in SHOWN if name in table]]
    utils.conclude(metrics.as_text(shown), *page.verdicts(runs, maps), f"open {page_path}")


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args()))
