"""Where maps are compared: the mask, the reference and the atlas on the maps' grid."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from nibabel.spatialimages import SpatialImage

from comparing.maps import Map, require_same_grid
from loading.image import read_image, same_space
from loading.table import Rows, plain, read_rows, shown
from reporting.maps import COVERAGE, MEAN_SCAN
from utils import InputError, log, some_of

MAX_MASK_SHARE = 0.6  # of the volume; brains fill less
MAX_MASK_RATIO = 1.2  # to the default mask
MAX_CHANGE = 0.2  # of the reference's volume, by bringing it to the maps' grid
MAX_POINTS = 10  # per axis that a voxel is averaged over
NUMBER_HEADS = ("index", "label", "id", "number")


@dataclass(frozen=True)
class Space:
    """Where maps are compared: M, S ⊂ M as bool arrays (D, H, W), and what they are shown on.

    S is None without a reference.
    """

    like_img: SpatialImage
    mask_data: np.ndarray
    mask_source: str
    reference_data: np.ndarray | None
    background_img: SpatialImage
    background_source: str

    @property
    def inside(self) -> np.ndarray | None:
        """S as a mask of the voxels of M."""
        return None if self.reference_data is None else self.reference_data[self.mask_data]


def load_space(
    maps: dict[str, Map], reference_path: Path | None, threshold: float, mask_path: Path | None
) -> Space:
    """Return mask and reference on the grid of the maps.

    The reference, above `threshold`, is brought to it if it is on another. Raises InputError if an
    image cannot be read, the mask is on another grid, or the reference fills none or all of it.
    """
    like_img = next(iter(maps.values())).img
    mask_data, mask_source = _default_mask(maps, like_img)
    if mask_path is not None:
        mask_img, n_default = read_image(mask_path, "mask"), int(mask_data.sum())
        require_same_grid(mask_img, mask_path, like_img, "the maps")
        mask_data, mask_source = mask_img.get_fdata() != 0, str(mask_path)
        if mask_data.sum() > MAX_MASK_RATIO * n_default:
            log.warning(
                "mask %s has %d voxels, the default one %d: outside the head chance looks lower "
                "than it is", mask_path, mask_data.sum(), n_default,
            )  # fmt: skip
    if mask_data.mean() > MAX_MASK_SHARE:
        log.warning(
            "the mask (%s) fills %.0f %% of the volume: outside the head chance looks lower than "
            "it is; give a brain mask with --mask", mask_source, 100 * mask_data.mean(),
        )  # fmt: skip
    reference_data = None
    if reference_path is not None:
        reference_data = _load_reference(reference_path, threshold, like_img) & mask_data
        n_mask, n_reference = int(mask_data.sum()), int(reference_data.sum())
        if n_reference == 0:
            raise InputError(
                f"reference {reference_path} has no voxel above {threshold:g} in the analysis mask "
                f"({mask_source}: {n_mask} voxels)"
            )
        if n_reference == n_mask:
            raise InputError(f"reference {reference_path} fills the whole analysis mask")
    background_img, background_source = _beside(maps, MEAN_SCAN, like_img), "the mean scan"
    if background_img is None:
        from nilearn import datasets, image

        template_img, background_source = datasets.load_mni152_template(2), "the ICBM152 template"
        background_img = image.resample_img(
            template_img, like_img.affine, like_img.shape, force_resample=True, copy_header=True
        )
    return Space(
        like_img, mask_data, mask_source, reference_data, background_img, background_source
    )


def _default_mask(maps: dict[str, Map], like_img: SpatialImage) -> tuple[np.ndarray, str]:
    """Return where most explained scans are not 0, as far as it is known, and how it is known."""
    coverage_img = _beside(maps, COVERAGE, like_img)
    if coverage_img is not None:
        return coverage_img.get_fdata() >= 0.5, "voxels where at least half of the scans are not 0"
    mean_scan_img = _beside(maps, MEAN_SCAN, like_img)
    if mean_scan_img is not None:
        data = mean_scan_img.get_fdata()
        return data > 0.1 * np.percentile(data, 98), "voxels where the mean scan is bright"
    data = np.any([each.img.get_fdata() != 0 for each in maps.values()], axis=0)
    return data, "voxels where any map is not 0"


def _beside(maps: dict[str, Map], name: str, like_img: SpatialImage) -> SpatialImage | None:
    """Return an image of this name beside the maps, None if there is none on their grid."""
    for path in [each.path.with_name(name) for each in maps.values()]:
        if path.is_file() and same_space(img := read_image(path, "mean over scans"), like_img):
            return img
    return None


def _load_reference(path: Path, threshold: float, like_img: SpatialImage) -> np.ndarray:
    """Return the reference as a mask on the maps' grid: thresholded on its own, then averaged."""
    reference_img = read_image(path, "reference")
    inside_data = reference_img.get_fdata() > threshold
    if same_space(reference_img, like_img):
        return inside_data
    share_data = average_over_voxels(inside_data, reference_img.affine, like_img)
    result_data = share_data > 0.5
    before, after = (
        data.sum() * abs(np.linalg.det(affine[:3, :3])) / 1000
        for data, affine in ((inside_data, reference_img.affine), (result_data, like_img.affine))
    )
    log.info("reference: %.1f ml on its own grid, %.1f ml on the maps'", before, after)
    if abs(after - before) > MAX_CHANGE * before:
        log.warning(
            "the reference takes %.1f ml on its own grid and %.1f ml on the maps': its clusters "
            "are too small for their voxels, or lie outside their volume", before, after,
        )  # fmt: skip
    return result_data


def average_over_voxels(data: np.ndarray, affine: np.ndarray, like_img: SpatialImage) -> np.ndarray:
    """Return the mean of an image, 0 outside it, over each voxel of another grid.

    Every voxel of the other grid is looked up at points in it, about two to a voxel of the image
    along each axis.
    """
    to_image = np.linalg.inv(affine) @ like_img.affine
    n_points = np.ceil(2 * np.abs(to_image[:3, :3]).max(0)).astype(int).clip(1, MAX_POINTS)
    total_data = np.zeros(like_img.shape, dtype=np.float32)
    for point in np.ndindex(*n_points):
        offset = (np.array(point) + 0.5) / n_points - 0.5
        total_data += look_up(data.astype(np.float32), to_image, offset, like_img.shape)
    return total_data / n_points.prod()


def look_up(data: np.ndarray, to_image: np.ndarray, offset: np.ndarray, shape: tuple) -> np.ndarray:
    """Return the image's value at a point of each voxel of a grid, `offset` from its centre."""
    from scipy.ndimage import affine_transform

    start = to_image[:3, :3] @ offset + to_image[:3, 3]
    return affine_transform(data, to_image[:3, :3], start, shape, order=0, mode="grid-constant")


def load_atlas(
    atlas_path: Path, labels_path: Path, space: Space
) -> tuple[np.ndarray, dict[int, str]]:
    """Return the atlas's region of each mask voxel and the regions' names.

    The table has a header, and columns for the number (index, label or id) and the name.
    """
    atlas_img = read_image(atlas_path, "atlas", np.float64)  # float32 would merge large numbers
    atlas_data = np.rint(atlas_img.get_fdata()).astype(np.int64)
    to_atlas = np.linalg.inv(atlas_img.affine) @ space.like_img.affine
    region_data = look_up(atlas_data, to_atlas, np.zeros(3), space.like_img.shape)
    region_of_voxel = region_data[space.mask_data]
    names = read_names(labels_path)
    unnamed = sorted(set(np.unique(region_of_voxel).tolist()) - {0} - set(names))
    if unnamed:
        log.warning("regions without a name in %s: %s", labels_path, some_of(unnamed, 10))
    return region_of_voxel, names


def read_names(path: Path) -> dict[int, str]:
    """Return the names of an atlas's regions by number; an InputError if the table is ambiguous."""

    def heads(cells: list[str]) -> list[str]:
        return [plain(cell) if plain(cell) in (*NUMBER_HEADS, "name") else "" for cell in cells]

    def score(rows: Rows) -> tuple:
        return (sum(map(bool, heads(rows[0][1]))) if rows else 0,)

    rule = (
        f"--atlas-labels {path} must have a header with one of {', '.join(NUMBER_HEADS)}, and name"
    )
    rows = read_rows(path, score, lambda cells: all(heads(cells)))
    header = heads(rows[0][1]) if rows else []
    numbers = [column for column, head in enumerate(header) if head in NUMBER_HEADS]
    if len(numbers) != 1 or header.count("name") != 1:
        raise InputError(f"{rule}; it has {', '.join(rows[0][1]) if rows else 'no row'}")
    names: dict[int, str] = {}
    for line, cells in rows[1:]:
        try:
            number, name = int(cells[numbers[0]]), cells[header.index("name")]
        except (ValueError, IndexError):
            raise InputError(f"{rule}; row {line} is {shown(','.join(cells))}") from None
        if number in names:
            raise InputError(f"--atlas-labels {path} names a region twice: {number}")
        names[number] = name
    return names
