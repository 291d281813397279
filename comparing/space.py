"""Where maps are compared: their grid, and the mask, the reference and the atlas on it."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from nibabel.spatialimages import SpatialImage
from nilearn import datasets, image

from loading.image import read_image
from reporting.maps import MEAN_SCAN
from utils import InputError, log, printable

AFFINE_TOLERANCE_MM = 1e-3


@dataclass(frozen=True)
class Map:
    """A map to compare, with the fold maps beside it."""

    path: Path
    img: SpatialImage
    fold_imgs: list[SpatialImage]


@dataclass(frozen=True)
class Space:
    """Where maps are compared: M, S ⊂ M as bool arrays (D, H, W), and what they are shown on."""

    like_img: SpatialImage
    mask_data: np.ndarray
    mask_source: str
    reference_data: np.ndarray
    background_img: SpatialImage
    background_source: str

    @property
    def inside(self) -> np.ndarray:
        """S as a mask of the voxels of M."""
        return self.reference_data[self.mask_data]


def same_grid(img: SpatialImage, other: SpatialImage) -> bool:
    """Tell whether two images have the same shape and affine."""
    near = np.allclose(img.affine, other.affine, rtol=0, atol=AFFINE_TOLERANCE_MM)
    return img.shape == other.shape and near


def require_same_grid(img: SpatialImage, path: Path, like_img: SpatialImage, like: str) -> None:
    """Raise an InputError that shows both grids if they differ; maps are never resampled."""
    if not same_grid(img, like_img):
        grids = "\nand\n".join(f"{each.shape}\n{each.affine}" for each in (img, like_img))
        raise InputError(f"{path} and {like} are not on one grid; resample one of them:\n{grids}")


def load_maps(paths: list[Path]) -> dict[str, Map]:
    """Return each map and its fold maps by name, all on one grid."""
    maps, like_img = {}, read_image(paths[0], "map")
    for path, name in zip(paths, name_maps(paths), strict=True):
        imgs = [read_image(each, "map") for each in (path, *fold_paths(path))]
        for img, each in zip(imgs, (path, *fold_paths(path)), strict=True):
            require_same_grid(img, each, like_img, str(paths[0]))
        maps[name] = Map(path, imgs[0], imgs[1:])
    return maps


def name_maps(paths: list[Path]) -> list[str]:
    """Return a short name for each map, with its folder where names alone are ambiguous."""
    short = [printable(re.sub(r"(_map)?(_all)?\.nii(\.gz)?$", "", path.name)) for path in paths]
    names = [
        f"{printable(path.parent.name)}/{name}" if short.count(name) > 1 else name
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


def load_space(
    maps: dict[str, Map], reference_path: Path, threshold: float, mask_path: Path | None
) -> Space:
    """Return mask and reference on the grid of the maps.

    The reference, above `threshold`, is resampled to it if it is on another. The mask left out is
    where the mean scan beside the maps, or any map, is not 0. Raises InputError if an image cannot
    be read, the mask is on another grid, or the reference fills none or all of the mask.
    """
    like_img = next(iter(maps.values())).img
    background_img = _mean_scan_beside(maps, like_img)
    if mask_path is not None:
        imgs, mask_source = [read_image(mask_path, "mask")], str(mask_path)
        require_same_grid(imgs[0], mask_path, like_img, "the maps")
    else:
        imgs = [m.img for m in maps.values()] + [background_img] * (background_img is not None)
        mask_source = "voxels where the mean scan beside the maps, or any map, is non-zero"
    mask_data = np.any([img.get_fdata() != 0 for img in imgs], axis=0)
    reference_data = _load_reference(reference_path, threshold, like_img) & mask_data
    n_mask, n_reference = int(mask_data.sum()), int(reference_data.sum())
    if n_reference == 0:
        raise InputError(
            f"reference {reference_path} has no voxel above {threshold:g} in the analysis mask "
            f"({mask_source}: {n_mask} voxels)"
        )
    if n_reference == n_mask:
        raise InputError(f"reference {reference_path} fills the whole analysis mask: no contrast")
    background_source = "the mean scan"
    if background_img is None:
        template_img, background_source = datasets.load_mni152_template(2), "the ICBM152 template"
        background_img = resample(template_img, like_img, "continuous")
    return Space(
        like_img, mask_data, mask_source, reference_data, background_img, background_source
    )


def _mean_scan_beside(maps: dict[str, Map], like_img: SpatialImage) -> SpatialImage | None:
    """Return the mean scan beside the maps, None if there is none on their grid."""
    for path in [m.path.with_name(MEAN_SCAN) for m in maps.values()]:
        if path.is_file() and same_grid(img := read_image(path, "mean scan"), like_img):
            return img
    return None


def _load_reference(path: Path, threshold: float, like_img: SpatialImage) -> np.ndarray:
    """Return the reference as a mask on the maps' grid."""
    reference_img = read_image(path, "reference")
    data = reference_img.get_fdata()
    is_binary = len(np.unique(data)) <= 2
    if is_binary and threshold >= data.max():
        log.warning("--reference-threshold %g is not below the reference's maximum", threshold)
    resampled_img = resample(reference_img, like_img, "nearest" if is_binary else "linear")
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


def load_atlas(
    atlas_path: Path, labels_path: Path, space: Space
) -> tuple[np.ndarray, dict[int, str]]:
    """Return the atlas's region of each mask voxel and the regions' names."""
    atlas_img = resample(read_image(atlas_path, "atlas"), space.like_img, "nearest")
    region_of_voxel = np.round(atlas_img.get_fdata()[space.mask_data]).astype(int)
    try:
        labels = pd.read_csv(labels_path)
        names = dict(zip(labels.iloc[:, 0].astype(int), labels.iloc[:, 1].astype(str), strict=True))
    except (OSError, ValueError, IndexError, OverflowError) as error:
        raise InputError(
            f"--atlas-labels {labels_path} must be a CSV with a header and the columns number and "
            f"name: {error}"
        ) from None
    unnamed = sorted(set(np.unique(region_of_voxel).tolist()) - {0} - set(names))
    if unnamed:
        log.warning("regions without a name in %s: %s", labels_path, unnamed)
    return region_of_voxel, names
