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
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from nibabel.spatialimages import SpatialImage
from nilearn import image
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import dataset
import files
import overlap
import pictures
import report
import scan_files
import utils
from errors import InputError
from utils import log

MEASURES = ("dice_matched", "dice_max", "roc_auc", "average_precision", "mass")
SHOWN = ("map", *MEASURES, "p", "null_mean", "null_p")
BACKGROUND_NAME = "mean_scan.nii.gz"


@dataclass(frozen=True)
class Space:
    """Where maps are compared.

    Attributes
    ----------
    like_img : nibabel image
        The first map: its grid is everyone's.
    mask_data, reference_data : bool arrays, shape (D, H, W)
        M, and S ⊂ M.
    mask_source : str
        Where M comes from.
    """

    like_img: SpatialImage
    mask_data: np.ndarray
    reference_data: np.ndarray
    mask_source: str

    @property
    def inside(self) -> np.ndarray:
        """S as a mask of the voxels of M."""
        return self.reference_data[self.mask_data]


# Reading


def load_image(path: Path, what: str) -> SpatialImage:
    """Read a 3D image whole, non-finite voxels set to 0."""
    if not path.is_file():
        raise InputError(f"there is no {what} {path}")
    try:
        img = nib.load(path)
        data = img.get_fdata(dtype=np.float32).reshape(scan_files.volume_shape_of(img))
    except scan_files.READ_ERRORS as error:
        raise InputError(f"{what} {path} is not a readable image, or damaged: {error}") from None
    if data.ndim != 3:
        raise InputError(f"{what} {path} is not a 3D volume but has shape {img.shape}")
    return nib.Nifti1Image(scan_files.finite(data)[0], img.affine)


def same_grid(img: SpatialImage, other: SpatialImage) -> bool:
    """Tell whether two images have the same shape and affine."""
    near = np.allclose(img.affine, other.affine, rtol=0, atol=dataset.AFFINE_TOLERANCE_MM)
    return img.shape == other.shape and near


def require_same_grid(img: SpatialImage, path: Path, like_img: SpatialImage, like: Path) -> None:
    """Raise an error that shows both grids if they differ; maps are never resampled."""
    if not same_grid(img, like_img):
        raise InputError(
            f"{path} and {like} are not on one grid:\n{img.shape}\n{img.affine}\nand\n"
            f"{like_img.shape}\n{like_img.affine}\nResample one of them first; maps are not "
            "resampled here"
        )


def load_maps(paths: list[Path]) -> dict[str, tuple[SpatialImage, list[SpatialImage]]]:
    """Return each map and its fold maps by name, all on one grid."""
    maps, like_img = {}, None
    for path, name in zip(paths, name_maps(paths), strict=True):
        map_img = load_image(path, "map")
        like_img = like_img or map_img
        require_same_grid(map_img, path, like_img, paths[0])
        fold_imgs = []
        for fold_path in fold_paths(path):
            fold_imgs.append(load_image(fold_path, "map"))
            require_same_grid(fold_imgs[-1], fold_path, like_img, paths[0])
        maps[name] = map_img, fold_imgs
    return maps


def name_maps(paths: list[Path]) -> list[str]:
    """Return a short name for each map, with its folder where names alone are ambiguous."""
    short = [re.sub(r"(_map)?(_all)?\.nii(\.gz)?$", "", path.name) for path in paths]
    names = [
        f"{path.parent.name}/{name}" if short.count(name) > 1 else name
        for path, name in zip(paths, short, strict=True)
    ]
    if len(set(names)) < len(names):
        raise InputError(f"two maps have one name: {', '.join(names)}")
    return names


def fold_paths(path: Path) -> list[Path]:
    """Return the fold maps beside a map that ends in _all, in the folds' order."""
    stem, is_all, suffix = path.name.rpartition("_all.nii")
    if not is_all:
        return []
    pattern = re.compile(re.escape(stem) + r"_f(\d+)\.nii" + re.escape(suffix))
    found = [(pattern.fullmatch(p.name), p) for p in path.parent.iterdir()]
    return [p for match, p in sorted((int(m[1]), p) for m, p in found if m)]


def load_mask(
    args: argparse.Namespace, maps: dict, like_img: SpatialImage
) -> tuple[np.ndarray, str]:
    """Return the analysis mask and where it comes from."""
    if args.mask is not None:
        mask_img = load_image(args.mask, "mask")
        require_same_grid(mask_img, args.mask, like_img, args.maps[0])
        return mask_img.get_fdata() != 0, str(args.mask)
    mask_data = np.zeros(like_img.shape, dtype=bool)
    for map_img, _ in maps.values():
        mask_data |= map_img.get_fdata() != 0
    background_img, _ = load_background(args, like_img)
    if background_img is None:
        return mask_data, "voxels where any map is non-zero"
    return mask_data | (background_img.get_fdata() != 0), (
        "voxels where the mean scan or any map is non-zero"
    )


def load_background(
    args: argparse.Namespace, like_img: SpatialImage
) -> tuple[SpatialImage | None, str]:
    """Return the mean scan beside the maps, if there is one, and what it is."""
    for path in args.maps:
        background_path = path.parent / BACKGROUND_NAME
        if background_path.is_file():
            background_img = load_image(background_path, "mean scan")
            if same_grid(background_img, like_img):
                return background_img, "the mean scan"
    return None, ""


def load_reference(args: argparse.Namespace, like_img: SpatialImage) -> np.ndarray:
    """Return the reference as a mask on the maps' grid."""
    reference_img = load_image(args.reference, "reference")
    is_binary = len(np.unique(reference_img.get_fdata())) <= 2
    resampled_img = resample(reference_img, like_img, "nearest" if is_binary else "linear")
    threshold = args.reference_threshold
    if is_binary and threshold >= reference_img.get_fdata().max():
        log.warning("--reference-threshold %g is not below the reference's maximum", threshold)
    return resampled_img.get_fdata() > threshold


def resample(img: SpatialImage, like_img: SpatialImage, interpolation: str) -> SpatialImage:
    """Return an image on the maps' grid."""
    if same_grid(img, like_img):
        return img
    log.info("resampled to the maps' grid (%s): %s → %s", interpolation, img.shape, like_img.shape)
    return image.resample_img(
        img, like_img.affine, like_img.shape, interpolation=interpolation,
        force_resample=True, copy_header=True,
    )  # fmt: skip


def load_space(args: argparse.Namespace, maps: dict) -> Space:
    """Return mask and reference on the maps' grid."""
    like_img = next(iter(maps.values()))[0]
    mask_data, mask_source = load_mask(args, maps, like_img)
    reference_data = load_reference(args, like_img) & mask_data
    n_mask, n_reference = int(mask_data.sum()), int(reference_data.sum())
    if n_reference == 0:
        raise InputError(
            f"reference {args.reference} has no voxel above {args.reference_threshold:g} in the "
            f"analysis mask ({mask_source}: {n_mask} voxels)"
        )
    if n_reference == n_mask:
        raise InputError(f"reference {args.reference} fills the whole analysis mask: no contrast")
    return Space(like_img, mask_data, reference_data, mask_source)


def load_atlas(args: argparse.Namespace, space: Space) -> tuple[np.ndarray, dict[int, str]] | None:
    """Return the atlas's region of each mask voxel and the regions' names."""
    if args.atlas is None:
        return None
    atlas_img = resample(load_image(args.atlas, "atlas"), space.like_img, "nearest")
    region_of_voxel = np.round(atlas_img.get_fdata()[space.mask_data]).astype(int)
    try:
        labels = pd.read_csv(args.atlas_labels)
        names = dict(zip(labels.iloc[:, 0].astype(int), labels.iloc[:, 1].astype(str), strict=True))
    except (OSError, ValueError, IndexError) as error:
        raise InputError(
            f"--atlas-labels {args.atlas_labels} must be a CSV with a header and the columns "
            f"number and name: {error}"
        ) from None
    unnamed = sorted(set(np.unique(region_of_voxel).tolist()) - {0} - set(names))
    if unnamed:
        log.warning("regions without a name in %s: %s", args.atlas_labels, unnamed)
    return region_of_voxel, names


# Measuring


def evidence(map_img: SpatialImage, sign: str, fwhm_mm: float) -> np.ndarray:
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
    maps = load_maps(args.maps)
    space = load_space(args, maps)
    atlas = load_atlas(args, space)
    runs = [report.load_run(path) for path in args.run]

    utils.make_outpath(args.outpath)
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
        args.outpath / "report.html", args, table, region_table, runs, volumes, reference_img,
        space.mask_source, load_background(args, space.like_img),
    )  # fmt: skip
    print(table[list(SHOWN)].to_string(index=False, float_format="%.3f"))
    print(args.outpath / "comparison.csv", args.outpath / "report.html", sep="\n")


if __name__ == "__main__":
    sys.exit(utils.run_script(main, parse_args()))
