"""What the page's script needs to draw slices of the maps, in few bytes."""

import base64

import nibabel as nib
import numpy as np
import pandas as pd
from nibabel.affines import apply_affine, voxel_sizes
from nibabel.spatialimages import SpatialImage

from comparing.maps import Map, in_order
from comparing.space import Space
from reporting.map_pictures import HIDDEN_FRACTION, color_limit
from reporting.maps import title_of
from utils import printable

SHOWN_VOXEL_MM = 2.0  # slices are no finer: the page stays small


def shrink(img: SpatialImage) -> SpatialImage:
    """Return an image turned to RAS axes, averaged over blocks to about the shown voxel size."""
    img = nib.as_closest_canonical(img)
    data = np.asarray(img.dataobj, dtype=np.float32)
    factors = np.maximum(1, SHOWN_VOXEL_MM // voxel_sizes(img.affine))
    factors = np.minimum(factors, data.shape).astype(int).tolist()
    n_blocks = [side // factor for side, factor in zip(data.shape, factors, strict=True)]
    cropped = data[tuple(slice(n * f) for n, f in zip(n_blocks, factors, strict=True))]
    split = [size for pair in zip(n_blocks, factors, strict=True) for size in pair]
    affine = img.affine @ np.diag([*factors, 1])
    affine[:3, 3] = apply_affine(img.affine, [(f - 1) / 2 for f in factors])
    return nib.Nifti1Image(cropped.reshape(split).mean((1, 3, 5)), affine)


def encode(values: np.ndarray) -> str:
    """Return the bytes of an array, base64."""
    return base64.b64encode(values.tobytes()).decode()


def encode_values(values: np.ndarray) -> str:
    """Return float32 values without their last 8 bits, which no one reads, 3 bytes each, base64."""
    rounded = (values.astype("<f4").view("<u4") + 0x80) & 0xFFFFFF00
    return encode(rounded.view(np.uint8).reshape(-1, 4)[:, 1:])


def viewer_data(
    maps: dict[str, Map], sidecars: dict[str, dict], smoothed: dict[str, np.ndarray],
    thresholds: dict[str, float], peaks: dict[str, pd.DataFrame], fwhm_mm: float, space: Space,
) -> dict:  # fmt: skip
    """Return what the page's script needs to draw the slices of all maps inside the mask.

    Voxels are in Fortran order, the first axis fastest. Maps are as they are, to 2e-5 of a value,
    and where `fwhm_mm` is not 0 also smoothed, in 255 levels.
    """

    def shown_of(data: np.ndarray) -> np.ndarray:
        """Return an array on the maps' grid as the page has it."""
        img = nib.Nifti1Image(data.astype(np.float32), space.like_img.affine)
        return shrink(img).get_fdata(dtype=np.float32)

    grid_img = shrink(space.like_img)
    in_mask = shown_of(space.mask_data) >= 0.5
    inside = in_mask.ravel(order="F")
    background = shrink(space.background_img).get_fdata().ravel(order="F")
    positive = background[background > 0]
    top = np.percentile(positive, 99.5) if positive.size else 1.0
    reference_data = space.reference_data
    reference_data = space.mask_data * 0 if reference_data is None else reference_data
    shown = []
    for name in in_order(maps):
        data = shrink(maps[name].img).get_fdata(dtype=np.float32)
        raw = data.ravel(order="F")[inside]
        limit = color_limit(raw)
        each = {"name": printable(name), "control": maps[name].is_control,
                "title": printable(
                    title_of(sidecars[name]) if sidecars[name] else maps[name].path.name
                ),
                "unit": printable(str(sidecars[name].get("unit", "value"))),
                "verdict": printable(str(sidecars[name].get("verdict_short") or "")),
                "raw": {"limit": limit, "threshold": HIDDEN_FRACTION * limit,
                        "data": encode_values(raw)}}  # fmt: skip
        whole_data = np.zeros(space.mask_data.shape, dtype=np.float32)
        whole_data[space.mask_data] = smoothed[name]
        values = shown_of(whole_data).ravel(order="F")[inside]
        limit = color_limit(values)
        threshold = min(thresholds[name], limit)
        if fwhm_mm:
            levels = np.clip(np.round(127 * values / limit), -127, 127).astype(np.int8)
            each["smoothed"] = {"limit": limit, "threshold": threshold, "data": encode(levels)}
        else:
            each["raw"]["threshold"] = threshold
        peak = peaks[name][["x", "y", "z"]].to_numpy(dtype=float)[:1]
        voxel = apply_affine(np.linalg.inv(grid_img.affine), peak)[0] if len(peak) else (
            np.argwhere(in_mask)[np.abs(data[in_mask]).argmax()]
        )  # fmt: skip
        top_voxel = np.array(in_mask.shape) - 1
        each["peak"] = np.clip(np.rint(voxel), 0, top_voxel).astype(int).tolist()
        shown.append(each)
    return {
        "shape": in_mask.shape,
        "affine": grid_img.affine.tolist(),
        "fwhm": fwhm_mm,
        "inside": encode(np.packbits(inside)),
        "background": encode(np.clip(255 * background / top, 0, 255).astype(np.uint8)),
        "reference": encode(np.packbits(shown_of(reference_data).ravel(order="F") >= 0.5)),
        "maps": shown,
    }
