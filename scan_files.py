"""One scan: what its header says, whether it is whole, its voxels scaled to [0, 1]."""

import os
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
from isal import igzip, isal_zlib
from nibabel.arrayproxy import ArrayProxy
from nibabel.brikhead import AFNIHeaderError, AFNIImageError
from nibabel.filebasedimages import ImageFileError
from nibabel.openers import ImageOpener
from nibabel.parrec import PARRECError
from nibabel.spatialimages import HeaderDataError, SpatialImage

from utils import RunError

PROBE_STOPS = (1 / 8, 1 / 4, 1 / 2, 1)  # how far into a scan the search for contrast reads
READ_ERRORS = (  # ImportError: MINC 2 needs h5py
    OSError, EOFError, ValueError, ImportError, zlib.error, isal_zlib.error, ImageFileError,
    HeaderDataError, PARRECError, AFNIImageError, AFNIHeaderError,
)  # fmt: skip


# The scans' headers, and as little of their voxels as it takes


def volume_shape_of(img: SpatialImage) -> tuple[int, ...]:
    """Return an image's shape without trailing axes of length 1."""
    shape = tuple(map(int, img.shape))  # MGH's are numpy integers
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def is_truncated(img: SpatialImage, file: str) -> bool:
    """Tell whether a file holds fewer bytes than its header says, from its size or last bytes."""
    proxy = img.dataobj
    if not isinstance(proxy, ArrayProxy):
        np.asanyarray(proxy)  # MINC, PAR/REC: only a full read can tell
        return False
    n_bytes = proxy.offset + int(np.prod(proxy.shape)) * proxy.dtype.itemsize
    data_path = Path(img.file_map["image"].filename or file)
    if data_path.suffix not in (".gz", ".mgz"):
        return data_path.stat().st_size < n_bytes
    with data_path.open("rb") as compressed:
        compressed.seek(-4, os.SEEK_END)
        n_bytes_at_end = int.from_bytes(compressed.read(4), "little")  # RFC 1952: size mod 2³²
    if n_bytes_at_end == n_bytes % 2**32:
        return False
    np.asanyarray(proxy)  # several gzip members, or trailing bytes: only a full read can tell
    return False


def has_contrast(img: SpatialImage) -> bool:
    """Tell whether two voxels differ, reading from the start only as far as needed."""
    n_slices = img.shape[2]
    first_value, start = None, 0
    for fraction in PROBE_STOPS:
        stop = max(1, round(n_slices * fraction))
        slab_data = np.asanyarray(img.dataobj[:, :, start:stop]).astype(np.float32)
        slab_data, _ = finite(slab_data)
        if slab_data.size:
            first_value = slab_data.flat[0] if first_value is None else first_value
            if (slab_data != first_value).any():
                return True
        start = stop
    return False


def check_scan(file: str) -> tuple[SpatialImage | None, str]:
    """Return a scan's image (header only) and what is wrong with it ("" if nothing)."""
    try:
        img = nib.load(file)
        if not isinstance(img, SpatialImage):
            return None, f"is not a volume but a {type(img).__name__}"
        shape = volume_shape_of(img)
        if len(shape) != 3 or min(shape) < 1:
            return None, f"is not a 3D volume but has shape {img.shape}"
        if np.issubdtype(img.get_data_dtype(), np.complexfloating) or img.get_data_dtype().fields:
            return None, f"has voxels of type {img.get_data_dtype()}, not one real number each"
        if not np.isfinite(img.affine).all() or abs(np.linalg.det(img.affine[:3, :3])) < 1e-12:
            return None, "has an affine that cannot be inverted"
        if is_truncated(img, file):
            return None, "is truncated: it holds fewer voxels than its header says"
        if not has_contrast(img):
            return None, "has no contrast: all its voxels have the same value"
    except READ_ERRORS as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return None, f"is not a readable image, or damaged: {reason}"
    return img, ""


# Volumes


def finite(data: np.ndarray) -> tuple[np.ndarray, int]:
    """Return data with non-finite voxels set to 0, and how many there were."""
    if not np.issubdtype(data.dtype, np.floating):
        return data, 0
    bad = ~np.isfinite(data)
    n_bad = int(bad.sum())
    return (np.where(bad, data.dtype.type(0), data) if n_bad else data), n_bad


def read_voxels(file: str) -> np.ndarray:
    """Return a scan's voxels, float32 of its volume's shape, with no float64 copy on the way.

    ISA-L decompresses: a scan is ready 1.4 to 1.7 times as fast as with zlib.
    """
    img = nib.load(file)
    proxy = img.dataobj
    if type(proxy) is not ArrayProxy:  # formats with a scaling of their own
        return img.get_fdata(dtype=np.float32).reshape(volume_shape_of(img))
    slope, inter = np.float32(proxy.slope), np.float32(proxy.inter)
    data_path = Path(img.file_map["image"].filename)
    is_gzip = data_path.suffix.lower() in (".gz", ".mgz")
    with igzip.open(data_path) if is_gzip else ImageOpener(data_path) as stream:
        spec = proxy.shape, proxy.dtype, proxy.offset, slope, inter
        raw_data = np.asarray(ArrayProxy(stream, spec, order=proxy.order), dtype=np.float32)
    return raw_data.reshape(volume_shape_of(img))


def load_volume(file: str) -> tuple[np.ndarray, int]:
    """Read a scan and scale it to [0, 1].

    Returns
    -------
    volume_data : float32 array, shape (D, H, W), in C order
        (x − min) / (max − min) of the scan's own minimum and maximum.
    n_nonfinite : int
        How many voxels were NaN or infinite and set to 0 before scaling.

    Raises
    ------
    RunError
        If the scan cannot be read (any more), or has no contrast.
    """
    try:
        raw_data = read_voxels(file)
    except READ_ERRORS as error:
        raise RunError(f"{file} cannot be read: {error}") from None
    low, high, n_nonfinite = raw_data.min(), raw_data.max(), 0
    if not (np.isfinite(low) and np.isfinite(high)):
        raw_data, n_nonfinite = finite(raw_data)
        low, high = raw_data.min(), raw_data.max()
    if not (low < high and np.isfinite(high - low)):
        raise RunError(f"{file} cannot be scaled: its voxels range from {low:g} to {high:g}")
    volume_data = np.empty(raw_data.shape, dtype=np.float32)
    for column in range(raw_data.shape[1]):  # as much as the processor's cache can turn to C order
        volume_data[:, column] = (raw_data[:, column] - low) / (high - low)
    return volume_data, n_nonfinite
