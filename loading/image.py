"""The one reader and the one writer of volumes: headers, damage, voxels, scaling to [0, 1]."""

import functools
import math
from pathlib import Path

import nibabel as nib
import numpy as np
from isal import igzip, isal_zlib
from nibabel.spatialimages import SpatialImage

from loading import damage
from run_folder import files
from utils import InputError, RunError, log

PROBE_STOPS = (1 / 8, 1 / 4, 1 / 2, 1)  # how far into a scan the search for contrast reads
SAMPLED_VOXELS = 50_000
MAX_FILLED = 0.1  # of the voxels, by one value
MAX_DISPLACEMENT_VOX = 0.01  # of a volume's corners, in what counts as one space
COMPRESSION = 1  # of ISA-L, 0 to 3: an order of magnitude faster than zlib's lowest
MAX_QUATERNION_EXCESS = 1e-4  # of its squared length over 1: more is damage, not rounding
for header_class in (nib.Nifti1Header, nib.Nifti2Header):  # and their kinds for pairs
    header_class.quaternion_threshold = -MAX_QUATERNION_EXCESS
UNKNOWN_ORIENTATION = (
    "states no orientation (sform and qform codes are 0, or its format has none): nibabel guesses, "
    "left and right may be swapped, and other programs may place it elsewhere"
)
QUATERNION_FIELDS = ("quatern_b", "quatern_c", "quatern_d")
ORIENTATION_FIELDS = (
    "pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d",
    "qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z",
)  # fmt: skip


def open_image(path: str | Path) -> SpatialImage:
    """Open a 3D image, unread; an InputError if it is damaged or claims more than it holds."""
    with damage.named(path):
        img = nib.load(path)
        if not isinstance(img, SpatialImage):
            raise InputError(f"{path} is not a volume but a {type(img).__name__}")
        shape, dtype = volume_shape(img), img.get_data_dtype()
        if len(shape) != 3 or min(shape) < 1:
            raise InputError(f"{path} is not a 3D volume but has shape {img.shape}")
        if np.issubdtype(dtype, np.complexfloating) or dtype.fields:
            raise InputError(f"{path} has voxels of type {dtype}, not one real number each")
        if not np.isfinite(img.affine).all() or abs(np.linalg.det(img.affine[:3, :3])) < 1e-12:
            raise InputError(f"{path} has an affine that cannot be inverted")
        if isinstance(img, nib.Nifti1Image) and img.dataobj.offset < img.header.single_vox_offset:
            place = f"vox_offset {img.dataobj.offset}"
            raise InputError(f"{path} is damaged: its voxels begin inside its header ({place})")
        if damage.is_truncated(img, path):
            raise InputError(
                f"{path} is truncated or damaged: it holds fewer voxels than its header says"
            )
    return img


def open_scan(path: str | Path) -> SpatialImage:
    """Open a scan as `open_image` does; an InputError also if all its voxels are equal."""
    img = open_image(path)
    with damage.named(path):
        if not _has_contrast(img):
            raise InputError(f"{path} has no contrast: all its voxels have the same value")
    return img


def states_orientation(img: SpatialImage) -> bool:
    """Tell whether an image says where its voxels lie, so that nibabel need not guess."""
    header = img.header
    if isinstance(header, nib.Nifti1Header):
        return bool(header["sform_code"] > 0 or header["qform_code"] > 0)
    if isinstance(header, nib.freesurfer.mghformat.MGHHeader):
        return bool(header["goodRASFlag"])
    return not isinstance(header, nib.AnalyzeHeader)  # Analyze has no orientation


def orientation_of(img: SpatialImage) -> str:
    """Return what a sidecar says of an image's orientation."""
    return "stated" if states_orientation(img) else f"the first scan {UNKNOWN_ORIENTATION}"


@functools.cache
def warn_of_orientation(what: str) -> None:
    """Say once of each kind of images that where their voxels lie is a guess."""
    log.warning("%s %s", what, UNKNOWN_ORIENTATION)


def same_space(img: SpatialImage, other: SpatialImage) -> bool:
    """Tell whether images have one shape and place its corners in one spot, but for rounding."""
    shape = volume_shape(img)
    if shape != volume_shape(other):
        return False
    corners = np.indices((2, 2, 2)).reshape(3, -1).T * (np.array(shape) - 1)
    moved = nib.affines.apply_affine(np.linalg.inv(other.affine) @ img.affine, corners)
    return float(np.linalg.norm(moved - corners, axis=1).max()) < MAX_DISPLACEMENT_VOX


def volume_shape(img: SpatialImage) -> tuple[int, ...]:
    """Return an image's shape without trailing axes of length 1."""
    shape = tuple(map(int, img.shape))  # MGH's are numpy integers
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _has_contrast(img: SpatialImage) -> bool:
    """Tell whether two voxels differ, reading from the start only as far as needed."""
    for fraction in PROBE_STOPS:
        slab_data = img.dataobj[:, :, : math.ceil(img.shape[2] * fraction)]
        slab_data = _finite(np.asanyarray(slab_data).astype(np.float32))
        if slab_data.min() < slab_data.max():
            return True
    return False


def _finite(data: np.ndarray) -> np.ndarray:
    """Return data with NaN and infinite voxels set to 0."""
    return np.nan_to_num(data, nan=0.0, posinf=0.0, neginf=0.0)


def read_data(path: str | Path, dtype: type = np.float32) -> np.ndarray:
    """Read an image's voxels, of shape (D, H, W); an InputError if it is damaged.

    A single-file NIfTI is inflated by ISA-L, 1.4 to 1.7 times as fast as by zlib, and its checksum
    compared; every other format is left to nibabel.
    """
    with damage.named(path):
        img, suffix = nib.load(path), Path(path).suffix.lower()
        if type(img) in (nib.Nifti1Image, nib.Nifti2Image) and suffix != ".bz2":
            n_bytes = int(img.dataobj.offset) + math.prod(img.shape) * img.get_data_dtype().itemsize
            n_bytes = max(n_bytes, img.header.sizeof_hdr)  # voxels may be said to begin at byte 0
            is_gzip = suffix == ".gz"
            with (igzip.open if is_gzip else open)(path, "rb") as stream:
                content = stream.read(n_bytes)
                while is_gzip and stream.read(damage.CHUNK_BYTES):
                    pass  # the checksum is compared at the end
            if len(content) < n_bytes:
                raise EOFError("it ends too early")
            img = type(img).from_bytes(content)
        return img.get_fdata(dtype=dtype).reshape(volume_shape(img))


def read_image(path: Path, what: str, dtype: type = np.float32) -> nib.Nifti1Image:
    """Read a 3D image whole, non-finite voxels set to 0; `what` names it in errors."""
    if not path.is_file():
        raise InputError(f"there is no {what} {path}")
    img = open_image(path)
    if not states_orientation(img):
        warn_of_orientation(f"a {what}")
    return nib.Nifti1Image(_finite(read_data(path, dtype)), img.affine)


def load_volume(path: str | Path) -> tuple[np.ndarray, int]:
    """Read a scan and scale it by its own minimum and maximum: (x − min) / (max − min).

    Returns the volume, float32 of shape (D, H, W) in C order, and how many of its voxels were NaN
    or infinite and set to 0 before. A RunError if it cannot be read (any more), or has no contrast.
    """
    try:
        raw_data = read_data(path)
    except InputError as error:
        raise RunError(f"a scan cannot be read: {error}") from None
    low, high, n_nonfinite = raw_data.min(), raw_data.max(), 0
    if not (np.isfinite(low) and np.isfinite(high)):
        n_nonfinite = int((~np.isfinite(raw_data)).sum())
        raw_data = _finite(raw_data)
        low, high = raw_data.min(), raw_data.max()
    if not (low < high and np.isfinite(high - low)):
        raise RunError(f"{path} cannot be scaled: its voxels range from {low:g} to {high:g}")
    volume_data = np.empty(raw_data.shape, dtype=np.float32)
    for column in range(raw_data.shape[1]):  # as much as the processor's cache can turn to C order
        volume_data[:, column] = (raw_data[:, column] - low) / (high - low)
    return volume_data, n_nonfinite


def describe_volume(volume_data: np.ndarray, n_nonfinite: int) -> dict:
    """Return what a scaled volume tells of its scan.

    `crc32` is of all voxels. Of a part of them: `top`, the 99.9th percentile, far below 1 where one
    bright voxel takes the whole range; `filling`, the value of more than a tenth, None if it is 0.
    """
    voxels = volume_data.reshape(-1)
    part = np.sort(voxels[:: max(1, len(voxels) // SAMPLED_VOXELS)])
    values, counts = np.unique(part, return_counts=True)
    filling = float(values[counts.argmax()]) if counts.max() > MAX_FILLED * len(part) else 0.0
    return {
        "n_nonfinite": n_nonfinite,
        "crc32": isal_zlib.crc32(np.ascontiguousarray(volume_data)),
        "top": float(part[int(0.999 * (len(part) - 1))]),
        "filling": filling or None,
    }


def write_image(
    path: Path, data: np.ndarray, like_img: SpatialImage, dtype: type = np.float32,
    labels: dict[str, str | float] | None = None,
) -> None:  # fmt: skip
    """Write data (D, H, W) as a .nii or .nii.gz image in the space of a scan.

    That is its affine and, of NIfTI, sform and qform with their codes, and the units. `labels` are
    fields of the header that viewers show: descrip, intent_name, cal_min, cal_max.
    """
    map_img = nib.Nifti1Image(np.asarray(data, dtype=dtype), like_img.affine)
    if isinstance(like_img.header, nib.Nifti1Header):
        for field in ORIENTATION_FIELDS:
            map_img.header[field] = like_img.header[field]
        quaternion = [float(like_img.header[field]) for field in QUATERNION_FIELDS]
        length = max(1.0, math.hypot(*quaternion))  # a rounding error over 1 is not handed on
        for field, value in zip(QUATERNION_FIELDS, quaternion, strict=True):
            map_img.header[field] = value / length
    else:
        map_img.header.set_xyzt_units("mm")
    for field, value in (labels or {}).items():
        is_text = isinstance(value, str)
        map_img.header[field] = value.encode("ascii", "replace") if is_text else value
    content = map_img.to_bytes()
    if path.suffix == ".gz":
        content = igzip.compress(content, COMPRESSION, mtime=0)
    files.write_bytes(path, content)
