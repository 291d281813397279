"""What is wrong with an image's file, in a sentence: damage, disguise, missing voxels."""

import gzip
import math
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from nibabel.arrayproxy import ArrayProxy
from nibabel.openers import ImageOpener
from nibabel.spatialimages import SpatialImage

from utils import InputError

DEFLATE_RATIO = 1032  # at most: 258 bytes out of 2 bits
MAX_RATIOS = {".gz": DEFLATE_RATIO, ".mgz": DEFLATE_RATIO, ".bz2": math.inf}
CHUNK_BYTES = 2**20
GZIP = b"\x1f\x8b"
SIGNATURES = {  # how files begin that are often found under a scan's name
    b"version https://git-lfs": "it is a Git LFS pointer, and `git lfs pull` fetches the scan",
    b"PK\x03\x04": "it is a zip archive, to be unpacked",
    b"BZh": "it is bzip2-compressed: its name should end in .bz2",
    b"<": "it is a web page or XML, such as a download that failed",
    bytes(128) + b"DICM": "it is DICOM, to be converted, such as by dcm2niix",
}


@contextmanager
def named(path: str | Path) -> Iterator[None]:
    """Turn what nibabel raises on a damaged file into an InputError that names it."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # each of nibabel's formats has errors of its own
        reason = _disguise(Path(path)) or (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path} is not a readable image, or damaged: {reason}") from None


def _disguise(path: Path) -> str:
    """Return what a file holds that its name does not say, "" where nothing is known of it."""
    try:
        with path.open("rb") as file:
            head = file.read(max(348, *map(len, SIGNATURES)))
    except OSError:
        return ""
    is_packed = path.suffix.lower() in MAX_RATIOS
    if head.startswith(b"BZh") and path.suffix.lower() == ".bz2":
        return ""
    if head.startswith(GZIP):
        if not is_packed:
            return "it is gzip-compressed: its name should end in .gz"
        return "bytes after its gzip content are none of it" if _has_tail(path) else ""
    if is_packed and head[344:347] in (b"n+1", b"ni1"):
        return f"it is not compressed: its name should not end in {path.suffix}"
    return next((what for start, what in SIGNATURES.items() if head.startswith(start)), "")


def _has_tail(path: Path) -> bool:
    """Tell whether a gzip file ends in bytes that are neither gzip nor 0."""
    try:
        with gzip.open(path, "rb") as stream:
            while stream.read(CHUNK_BYTES):
                pass
    except (OSError, EOFError, zlib.error) as error:
        return str(error).startswith("Not a gzipped file")
    return False


def is_truncated(img: SpatialImage, path: str | Path) -> bool:
    """Tell whether a file holds fewer bytes than its header says; only that much is ever read."""
    proxy = img.dataobj
    path = Path(img.file_map["image"].filename or path)
    suffix = path.suffix.lower()
    capacity = path.stat().st_size * MAX_RATIOS.get(suffix, 1)
    n_bytes = math.prod(map(int, proxy.shape)) * img.get_data_dtype().itemsize
    if not isinstance(proxy, ArrayProxy):  # MINC, PAR/REC: only a full read can tell
        is_possible = n_bytes <= capacity * DEFLATE_RATIO
        if is_possible:
            np.asanyarray(proxy)
        return not is_possible
    n_bytes += int(proxy.offset)
    if n_bytes > capacity or suffix not in MAX_RATIOS:
        return n_bytes > capacity
    with path.open("rb") as compressed:
        compressed.seek(-4, os.SEEK_END)
        n_bytes_at_end = int.from_bytes(compressed.read(4), "little")  # RFC 1952: size mod 2³²
    if suffix != ".bz2" and n_bytes_at_end == n_bytes % 2**32:
        return False
    with ImageOpener(path) as opened:  # several gzip members, bytes after the end, bzip2
        opened.seek(n_bytes - 1)
        is_cut = not opened.read(1)
    if not is_cut and suffix != ".bz2" and _has_tail(path):
        raise OSError("")  # `_disguise` says what is wrong
    return is_cut
