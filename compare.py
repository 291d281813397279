"""Ask how well maps overlap a reference map, such as a meta-analysis of where the disease strikes.

    python3 compare.py --maps maps/LRP_map_all.nii.gz maps/IG_map_all.nii.gz \\
        svm/SVM_pattern_all.nii.gz --reference meta_analysis.nii.gz --outpath ./comparison/ \\
        --run ./output/ ./svm/

Every measure comes with what chance would give. Beside a map that ends in _all, its fold maps
(_f0, _f1, …) are measured too.

--sign says what counts as evidence. LRP, IG and GGC: abs takes evidence for and against the target
class alike, pos only evidence for it, raw ranks evidence against it below none. SVM: abs takes any
voxel that matters (weights) or changes (pattern), pos only where patients are brighter, raw ranks
darker voxels lowest; atrophy makes patients darker, so abs is the one to use.

    python3 compare.py --run ./modelA24/ ./modelB32/ ./svm/ --outpath ./chosen/

Runs are sorted by their validation loss, which is what a model is chosen by; for two runs of the
same scans the difference of their ROC AUCs has a bootstrap interval.

Written to --outpath: comparison.csv, dice_curves.png, report.html, compare.log; with --atlas,
regions.csv; with --run, runs.csv and run_differences.csv.
"""

import argparse
import shlex
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd

import utils
from comparing import overlap, page
from comparing.runs import Run, differences, load_runs, runs_table
from comparing.space import Map, Space, load_atlas, load_maps, load_space
from reporting import metrics
from run_folder import files
from run_folder.processes import run_script
from utils import log

MEASURES = ("dice_matched", "dice_max", "roc_auc", "average_precision", "mass")
SHOWN = ("map", *MEASURES, "p", "null_mean", "null_p", "outside")


def evidence(map_img: nib.Nifti1Image, sign: str, fwhm_mm: float) -> np.ndarray:
    """Return what of a map counts as evidence: after --sign and then --fwhm."""
    data = overlap.SIGNS[sign](map_img.get_fdata(dtype=np.float32))
    if fwhm_mm == 0:
        return data
    from nilearn import image

    smooth_img = image.smooth_img(nib.Nifti1Image(data, map_img.affine), fwhm_mm)
    return smooth_img.get_fdata(dtype=np.float32)


def measure(
    args: argparse.Namespace, name: str, each: Map, space: Space
) -> tuple[dict, np.ndarray, np.ndarray]:
    """Return a map's row of comparison.csv, its Dice curve and its evidence volume."""
    data = evidence(each.img, args.sign, args.fwhm)
    values, inside = data[space.mask_data], space.inside
    row = {"map": name, "n_mask": len(inside), "n_reference": int(inside.sum()), "p": inside.mean()}
    row |= overlap.overlap(values, inside)
    row["null_p"], row["null_mean"] = overlap.shift_null(
        data, space.mask_data, space.reference_data, args.seed
    )
    of_folds = pd.DataFrame(
        [
            overlap.overlap(evidence(img, args.sign, args.fwhm)[space.mask_data], inside)
            for img in each.fold_imgs
        ]
    )
    row["n_folds"] = len(each.fold_imgs)
    for measure_name in MEASURES:
        of_measure = of_folds.get(measure_name, pd.Series(dtype=float))
        row[f"{measure_name}_folds_mean"] = of_measure.mean()
        row[f"{measure_name}_folds_sd"] = of_measure.std()
    total = np.abs(data).sum(dtype=np.float64)
    row["outside"] = (
        np.abs(data[~space.mask_data]).sum(dtype=np.float64) / total if total else np.nan
    )
    if row["degenerate"]:
        log.warning("%s: fewer non-zero voxels than the reference has", name)
    return row, overlap.dice_curve(values, inside)[0], data


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
    option("--sign", choices=list(overlap.SIGNS), default="abs", help="what counts as evidence")
    option("--fwhm", type=number(float, at_least=0), default=0.0,
           help="smooth the maps, after --sign, with a Gaussian of this width in mm")
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
    if bool(args.maps) != bool(args.reference) or not (args.maps or args.run):
        parser.error("--maps and --reference go together; without them --run is needed")
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
    """Measure every map against the reference, write the tables and draw the page."""
    log.info("mask: %s, %d voxels", space.mask_source, space.mask_data.sum())
    rows, curves, regions = [], {}, []
    with utils.log_above_bars():
        for name, each in utils.progress(maps.items(), "maps"):
            row, curves[name], data = measure(args, name, each, space)
            rows.append(row)
            if atlas is not None:
                region_rows = overlap.region_table(data[space.mask_data], *atlas)
                regions += [{"map": name, **region_row} for region_row in region_rows]
    table = pd.DataFrame(rows)
    files.write_csv(args.outpath / "comparison.csv", table)
    region_table = pd.DataFrame(regions) if atlas is not None else None
    if region_table is not None:
        files.write_csv(args.outpath / "regions.csv", region_table)

    page.plot_dice_curves(args.outpath / "dice_curves.png", curves, space.inside.mean())
    facts = {
        "Command": args.command,
        "Reference": f"{args.reference}, above {args.reference_threshold:g}; "
        f"{space.inside.sum()} of {len(space.inside)} mask voxels",
        "Mask": space.mask_source,
        "Evidence": f"--sign {args.sign}, smoothed by {args.fwhm:g} mm",
        "Background": space.background_source,
        "Versions": ", ".join(f"{k} {v}" for k, v in utils.versions().items()),
        "Made": utils.now(),
    }
    page_path = args.outpath / "report.html"
    page.write_page(page_path, facts, table, region_table, runs, maps, space)
    verdicts = page.verdicts(runs, maps)
    utils.conclude(metrics.as_text(table[list(SHOWN)]), *verdicts, f"open {page_path}")


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args()))
