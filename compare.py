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

Written to --outpath: comparison.csv, dice_curves.png, report.html, compare.log and, with --atlas,
regions.csv.
"""

import argparse
import shlex
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from nilearn import image
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import files
import map_space
import overlap
import page_data
import pictures
import report
import utils
from map_space import Space
from utils import log

MEASURES = ("dice_matched", "dice_max", "roc_auc", "average_precision", "mass")
SHOWN = ("map", *MEASURES, "p", "null_mean", "null_p")


# Measuring


def evidence(map_img: nib.Nifti1Image, sign: str, fwhm_mm: float) -> np.ndarray:
    """Return what of a map counts as evidence: after --sign and then --fwhm."""
    data = overlap.SIGNS[sign](map_img.get_fdata(dtype=np.float32))
    if fwhm_mm == 0:
        return data
    smooth_img = image.smooth_img(nib.Nifti1Image(data, map_img.affine), fwhm_mm)
    return smooth_img.get_fdata(dtype=np.float32)


def measure(
    args: argparse.Namespace, name: str, path: Path, imgs: tuple, space: Space
) -> tuple[dict, np.ndarray, np.ndarray]:
    """Return a map's row of comparison.csv, its Dice curve and its evidence volume."""
    map_img, fold_imgs = imgs
    data = evidence(map_img, args.sign, args.fwhm)
    inside = space.inside
    found = overlap.overlap(data[space.mask_data], inside)
    row = {"map": name, "n_mask": len(inside), "n_reference": int(inside.sum()), "p": inside.mean()}
    row |= found
    row["null_p"], row["null_mean"] = overlap.shift_null(
        data, space.mask_data, space.reference_data, args.seed
    )
    of_folds = pd.DataFrame(
        [
            overlap.overlap(evidence(img, args.sign, args.fwhm)[space.mask_data], inside)
            for img in fold_imgs
        ]
    )
    row["n_folds"] = len(fold_imgs)
    for measure_name in MEASURES:
        values = of_folds.get(measure_name, pd.Series(dtype=float))
        row[f"{measure_name}_folds_mean"] = values.mean()
        row[f"{measure_name}_folds_sd"] = values.std()
    if found["degenerate"]:
        log.warning("%s: fewer non-zero voxels than the reference has", name)
    return row, overlap.dice_curve(data[space.mask_data], inside)[0], data


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    number = utils.number
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=utils.HelpFormatter)
    option = parser.add_argument
    # fmt: off
    option("--maps", type=Path, nargs="+", required=True, metavar="FILE",
           help="maps on one grid, such as LRP_map_all.nii.gz")
    option("--reference", type=Path, required=True, metavar="FILE",
           help="the reference map; resampled to the maps' grid if it is on another")
    option("--outpath", type=Path, required=True, metavar="DIR",
           help="output folder, created if missing")
    option("--mask", type=Path, default=None, metavar="FILE",
           help="analysis mask; left out: where the mean scan beside the maps, or a map, is not 0")
    option("--reference-threshold", type=number(float), default=0.0,
           help="the reference is where its map is above this")
    option("--sign", choices=list(overlap.SIGNS), default="abs", help="what counts as evidence")
    option("--fwhm", type=number(float, at_least=0), default=0.0,
           help="smooth the maps, after --sign, with a Gaussian of this width in mm")
    option("--atlas", type=Path, default=None, metavar="FILE", help="label image for regions.csv")
    option("--atlas-labels", type=Path, default=None, metavar="CSV",
           help="number and name of each region of --atlas, with a header row")
    option("--run", type=Path, nargs="+", default=[], metavar="DIR",
           help="folders of train_cv.py or svm.py whose metrics and curves the page shows")
    option("--seed", type=number(int, at_least=0), default=0, help="seed of the null shifts")
    # fmt: on
    args = parser.parse_args(argv)
    if (args.atlas is None) != (args.atlas_labels is None):
        parser.error("--atlas and --atlas-labels go together")
    args.command = shlex.join(["compare.py", *(sys.argv[1:] if argv is None else argv)])
    return args


def main(args: argparse.Namespace) -> None:
    """Compare every map with the reference and draw the page."""
    utils.start_log()
    maps = map_space.load_maps(args.maps)
    space = map_space.load_space(args, maps)
    atlas = map_space.load_atlas(args, space)
    runs = [page_data.load_run(path) for path in args.run]
    ig_errors = page_data.completeness_errors(dict(zip(maps, args.maps, strict=True)))

    utils.make_outpath(args.outpath)
    files.remove_leftovers(args.outpath)
    utils.start_log(args.outpath / "compare.log")
    log.info("mask: %s, %d voxels", space.mask_source, space.mask_data.sum())
    rows, curves, regions, volumes = [], {}, [], {}
    with logging_redirect_tqdm([log]):
        for (name, imgs), path in tqdm(zip(maps.items(), args.maps, strict=True), "maps",
                                       total=len(maps), disable=None):  # fmt: skip
            row, curves[name], data = measure(args, name, path, imgs, space)
            rows.append(row)
            volumes[name] = imgs[0]
            if atlas is not None:
                region_rows = overlap.region_table(data[space.mask_data], *atlas)
                regions += [{"map": name, **region_row} for region_row in region_rows]

    table = pd.DataFrame(rows)
    files.write_csv(args.outpath / "comparison.csv", table)
    region_table = pd.DataFrame(regions) if atlas is not None else None
    if region_table is not None:
        files.write_csv(args.outpath / "regions.csv", region_table)
    pictures.plot_dice_curves(args.outpath / "dice_curves.png", curves, space.inside.mean())
    reference_img = nib.Nifti1Image(space.reference_data.astype(np.uint8), space.like_img.affine)
    report.write_report(
        args.outpath / "report.html", args, table, region_table, runs, ig_errors, volumes,
        reference_img, space.mask_source, map_space.load_background(args, space.like_img),
    )  # fmt: skip
    print(table[list(SHOWN)].to_string(index=False, float_format="%.3f"))
    print(args.outpath / "comparison.csv", args.outpath / "report.html", sep="\n")


if __name__ == "__main__":
    sys.exit(utils.run_script(main, parse_args()))
