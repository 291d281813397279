"""Simulated scans: the template, or a given scan, with tissue lost and other anatomy."""

from collections.abc import Iterator

import numpy as np
from nibabel.affines import voxel_sizes
from scipy.ndimage import map_coordinates, zoom

from loading.template import Template, smooth

DEFORMATION_FWHM_MM = 25.0
BIAS_SD = 0.05  # standard deviation of the log bias field that correction leaves
BIAS_FWHM_MM = 80.0
GAIN_RANGE = (0.8, 1.2)
NOISE_SD = 0.03  # of the template's maximum, in both Rician channels


def smooth_noise(rng: np.random.Generator, shape: tuple, fwhm_vox: float) -> np.ndarray:
    """Return smooth random values with standard deviation 1, drawn coarsely and interpolated."""
    spacing_vox = max(1.0, fwhm_vox / 4)
    coarse_shape = [int(np.ceil(side / spacing_vox)) + 8 for side in shape]
    coarse_data = smooth(rng.standard_normal(coarse_shape), fwhm_vox / spacing_vox)
    coarse_data = (coarse_data / coarse_data.std()).astype(np.float32)
    fine_data = zoom(coarse_data, spacing_vox, order=1)
    margin = [(fine - side) // 2 for fine, side in zip(fine_data.shape, shape, strict=True)]
    return fine_data[tuple(slice(m, m + side) for m, side in zip(margin, shape, strict=True))]


def simulate_scan(
    template: Template, coordinates: np.ndarray, voxel_mm: float, severities: dict[str, float],
    deformation_mm: float, rng: np.random.Generator,
) -> np.ndarray:  # fmt: skip
    """Return one scan, (D, H, W): tissue loss, other anatomy, bias field, gain and noise.

    `coordinates`, (3, D, H, W), are those of its voxels in the template; `severities` say which
    share of its tissue each region loses. It is 0 outside the brain, as skull-stripped scans are.
    """
    shape = coordinates.shape[1:]
    t1_data = template.t1_data.copy()
    for name, (box, change_data) in template.loss_data.items():
        t1_data[box] += severities[name] * change_data
    displaced = coordinates.copy()
    for axis in range(3):  # template voxels are 1 mm
        displaced[axis] += deformation_mm * smooth_noise(rng, shape, DEFORMATION_FWHM_MM / voxel_mm)
    scan_data = map_coordinates(t1_data, displaced, order=1)
    in_brain = map_coordinates(template.brain_data, displaced, order=1) > 0.5
    scan_data *= np.exp(BIAS_SD * smooth_noise(rng, shape, BIAS_FWHM_MM / voxel_mm))
    scan_data *= rng.uniform(*GAIN_RANGE)
    real = scan_data + NOISE_SD * rng.standard_normal(shape, dtype=np.float32)
    imaginary = NOISE_SD * rng.standard_normal(shape, dtype=np.float32)
    return np.where(in_brain, np.hypot(real, imaginary), 0).astype(np.float32)


def planted_copies(
    scan_data: np.ndarray, loss_data: np.ndarray, fluid: float, affine: np.ndarray,
    deformation_mm: float, n_copies: int, rng: np.random.Generator,
) -> Iterator[np.ndarray]:  # fmt: skip
    """Yield copies of a scan, (D, H, W), with some of its tissue lost to fluid.

    The first is the scan itself, the others have other anatomy. What is 0 stays 0.
    """
    planted_data = scan_data + loss_data * (fluid - scan_data) * (scan_data != 0)
    yield planted_data
    shape, sizes_mm = scan_data.shape, voxel_sizes(affine)
    fwhm_vox = DEFORMATION_FWHM_MM / sizes_mm.prod() ** (1 / 3)
    for _ in range(n_copies - 1):
        displaced = np.indices(shape, dtype=np.float32)
        for axis in range(3):
            displaced[axis] += deformation_mm / sizes_mm[axis] * smooth_noise(rng, shape, fwhm_vox)
        yield map_coordinates(planted_data, displaced, order=1)
