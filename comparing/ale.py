"""Activation likelihood estimation: where foci of many experiments lie more densely than by chance.

Throughout, a map is held as Λ = Σ −log(1 − MA) over the experiments, MA an experiment's modelled
activation: Λ adds, and ALE = 1 − exp(−Λ). Foci are voxels of a grid with equal sides.
"""

import numpy as np
from scipy.ndimage import label
from scipy.stats import norm

# Lancaster et al., Hum. Brain Mapp. 28:1194, 2007, doi:10.1002/hbm.20345: icbm_other, MNI to
# Talairach
TO_TALAIRACH = np.array(
    [
        [0.9357, 0.0029, -0.0072, -1.0423],
        [-0.0065, 0.9396, -0.0726, -1.3940],
        [0.0103, 0.0752, 0.8967, 3.6475],
        [0, 0, 0, 1],
    ]
)
# Eickhoff et al., Hum. Brain Mapp. 30:2907, 2009, doi:10.1002/hbm.20718: mean Euclidean distances
TEMPLATE_MM, SUBJECT_MM = 5.7, 11.6
FWHM_PER_SD = np.sqrt(8 * np.log(2))
REACH_SD = 5.0  # of a kernel; beyond, it is below 4e-6 of its peak
BIN = 1e-5  # of Λ


def from_talairach(places_mm: np.ndarray) -> np.ndarray:
    """Return places, (n, 3) in Talairach space, in MNI space."""
    inverse = np.linalg.inv(TO_TALAIRACH)
    return places_mm @ inverse[:3, :3].T + inverse[:3, 3]


def kernel_sd_mm(n_subjects: int) -> float:
    """Return the standard deviation of an experiment's kernel.

    Mean distances of a Gaussian's points are 2√(2/π) standard deviations.
    """
    template, subject = (mm / (2 * np.sqrt(2 / np.pi)) for mm in (TEMPLATE_MM, SUBJECT_MM))
    return float(np.sqrt(template**2 + subject**2 / n_subjects))


def kernel(n_subjects: int, voxel_mm: float) -> np.ndarray:
    """Return −log(1 − p) in a cube around a focus, p the chance that it lies in a voxel."""
    sd_vox = kernel_sd_mm(n_subjects) / voxel_mm
    reach = int(np.ceil(REACH_SD * sd_vox))
    profile = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sd_vox) ** 2)
    profile /= np.sqrt(2 * np.pi) * sd_vox
    return -np.log1p(-np.einsum("i,j,k->ijk", profile, profile, profile))


def add_experiment(
    total_data: np.ndarray, own_data: np.ndarray, foci_vox: np.ndarray, cube: np.ndarray
) -> None:
    """Add an experiment to Λ, (D, H, W): in each voxel the largest of its foci's kernels.

    `own_data`, of that shape, is 0 before and after.
    """
    regions = []
    for focus in foci_vox:
        starts = focus - cube.shape[0] // 2
        low = np.maximum(starts, 0)
        high = np.minimum(starts + cube.shape[0], total_data.shape)
        if (low < high).all():
            region = tuple(map(slice, low, high))
            part = cube[tuple(map(slice, low - starts, high - starts))]
            np.maximum(own_data[region], part, out=own_data[region])
            regions.append(region)
    for region in regions:  # what two of them share is 0 when it comes again
        total_data[region] += own_data[region]
        own_data[region] = 0


def ale_map(
    foci_vox: list[np.ndarray], cubes: list[np.ndarray], shape: tuple[int, ...]
) -> np.ndarray:
    """Return Λ, (D, H, W), of experiments' foci, (n, 3) each, and kernels."""
    total_data, own_data = np.zeros((2, *shape))
    for foci, cube in zip(foci_vox, cubes, strict=True):
        add_experiment(total_data, own_data, foci, cube)
    return total_data


def null_survival(
    foci_vox: list[np.ndarray], cubes: list[np.ndarray], mask_data: np.ndarray
) -> np.ndarray:
    """Return the chance that Λ reaches each multiple of `BIN`, if foci lie anywhere in the mask.

    The histograms of the experiments' Λ over the mask are convolved (Eickhoff et al., NeuroImage
    59:2349, 2012, doi:10.1016/j.neuroimage.2011.09.017), and summed from the top.
    """
    chances = np.ones(1)
    for foci, cube in zip(foci_vox, cubes, strict=True):
        of_one = ale_map([foci], [cube], mask_data.shape)[mask_data]
        histogram = np.bincount(np.rint(of_one / BIN).astype(int)) / len(of_one)
        chances = np.convolve(chances, histogram)
    return np.cumsum(chances[::-1])[::-1]


def p_of(total: np.ndarray, survival: np.ndarray) -> np.ndarray:
    """Return the p of Λ; of more than the null can reach, that of its most."""
    bins = np.rint(total / BIN).astype(int)
    return np.minimum(1, survival[np.minimum(bins, len(survival) - 1)])


def z_of(p: np.ndarray) -> np.ndarray:
    """Return the z of a p; 0 where p is more than a half."""
    return np.maximum(norm.isf(p), 0)


def least_of(survival: np.ndarray, threshold: float) -> float:
    """Return the smallest Λ whose p is below a threshold."""
    return (int((survival >= threshold).sum()) - 0.5) * BIN


def largest_cluster(is_above: np.ndarray) -> int:
    """Return how many voxels the largest face-connected cluster has."""
    numbers, n_clusters = label(is_above)
    return int(np.bincount(numbers.ravel())[1:].max()) if n_clusters else 0


def permuted_size(
    rng: np.random.Generator, counts: list[int], cubes: list[np.ndarray], mask_data: np.ndarray,
    inside: np.ndarray, least: float,
) -> int:  # fmt: skip
    """Return the size of the largest cluster above `least` when all foci lie anywhere in the mask.

    `inside` are the mask's voxels, (n, 3); `counts` how many foci each experiment has.
    """
    foci_vox = [inside[rng.integers(len(inside), size=n)] for n in counts]
    return largest_cluster((ale_map(foci_vox, cubes, mask_data.shape) >= least) & mask_data)
