"""Where maps are compared: their grid, and the mask, the reference and the atlas on it."""

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from nibabel.spatialimages import SpatialImage
from nilearn import image

import dataset
import scan_files
import utils
from errors import InputError
from utils import log

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
    img, problem = scan_files.open_scan(str(path))
    if img is None:
        raise InputError(f"{what} {path} {problem}")
    try:
        data = img.get_fdata(dtype=np.float32).reshape(scan_files.volume_shape_of(img))
    except scan_files.READ_ERRORS as error:
        raise InputError(f"{what} {path} {scan_files.damage(error)}") from None
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
    short = [utils.printable(name) for name in short]
    names = [
        f"{utils.printable(path.parent.name)}/{name}" if short.count(name) > 1 else name
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
    except (OSError, ValueError, IndexError, OverflowError) as error:
        raise InputError(
            f"--atlas-labels {args.atlas_labels} must be a CSV with a header and the columns "
            f"number and name: {error}"
        ) from None
    unnamed = sorted(set(np.unique(region_of_voxel).tolist()) - {0} - set(names))
    if unnamed:
        log.warning("regions without a name in %s: %s", args.atlas_labels, unnamed)
    return region_of_voxel, names
