"""Clusters of a map's evidence and their peaks, as tables of coordinates have them."""

import warnings

import numpy as np
import pandas as pd
from nibabel import Nifti1Image
from nibabel.affines import apply_affine, voxel_sizes
from scipy.ndimage import label, maximum

from comparing import overlap
from comparing.space import Space

MIN_CLUSTER_MM3 = 50.0
MAX_CLUSTERS = 30  # of a map: peaks within one take most of a second at 1 mm
TOP_SHARE = 0.02  # of the mask: what counts as evidence where there is no reference
HEADS = {"Cluster ID": "cluster", "X": "x", "Y": "y", "Z": "z", "Cluster Size (mm3)": "volume_mm3"}


def threshold_of(evidence: np.ndarray, inside: np.ndarray | None) -> float:
    """Return the smallest evidence, above 0, among the voxels that dice_matched takes.

    Without a reference it is among the top `TOP_SHARE` of the mask's voxels.
    """
    n_top = int(inside.sum()) if inside is not None else round(TOP_SHARE * len(evidence))
    top = evidence[overlap.top_voxels(evidence, max(1, n_top))]
    return float(top[top > 0].min()) if (top > 0).any() else np.inf


def highest_clusters(data: np.ndarray, n_least: int) -> np.ndarray:
    """Return where the `MAX_CLUSTERS` highest of the clusters with `n_least` voxels lie."""
    numbers, n_clusters = label(data > 0)
    sizes = np.bincount(numbers.ravel(), minlength=n_clusters + 1)[1:]
    heights = maximum(data, numbers, np.arange(1, n_clusters + 1)) * (sizes >= n_least)
    highest = np.argsort(-heights, kind="stable")[:MAX_CLUSTERS] + 1
    return np.isin(numbers, highest[heights[highest - 1] > 0])


def find_peaks(
    values: np.ndarray, evidence: np.ndarray, threshold: float, space: Space,
    atlas: tuple[np.ndarray, dict[int, str]] | None = None,
) -> pd.DataFrame:  # fmt: skip
    """Return peaks of face-connected clusters of at least `MIN_CLUSTER_MM3`, highest first.

    They are those of the `MAX_CLUSTERS` highest clusters.

    Parameters
    ----------
    values, evidence : arrays, shape (n_mask_voxels,)
        The smoothed map with its sign, and what counts of it.
    threshold : float
        Voxels with at least that much evidence make the clusters.
    atlas : see `space.load_atlas`

    Returns
    -------
    DataFrame
        cluster (3, and 3a, 3b for further peaks in it), x, y, z in mm, value of the smoothed map,
        volume_mm3 of the cluster and, with an atlas, region.
    """
    from nilearn.reporting import get_clusters_table

    columns = ["cluster", "x", "y", "z", "value", "volume_mm3", *(["region"] if atlas else [])]
    if not (evidence >= threshold).any():
        return pd.DataFrame(columns=columns)
    affine, mask_data = space.like_img.affine, space.mask_data
    evidence_data = np.zeros(mask_data.shape, dtype=np.float64)
    evidence_data[mask_data] = np.where(evidence >= threshold, evidence, 0)
    least = int(np.ceil(MIN_CLUSTER_MM3 / voxel_sizes(affine).prod()))
    evidence_data[~highest_clusters(evidence_data, least)] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where no cluster is large enough, which the table shows
        table = get_clusters_table(
            Nifti1Image(evidence_data, affine), threshold * (1 - 1e-6), cluster_threshold=least
        )
    table = table.rename(columns=HEADS)
    table["volume_mm3"] = pd.to_numeric(table["volume_mm3"], errors="coerce")
    places_mm = table[["x", "y", "z"]].to_numpy(dtype=float).reshape(-1, 3)
    voxels = np.rint(apply_affine(np.linalg.inv(affine), places_mm)).astype(int)
    number = np.full(mask_data.shape, -1)
    number[mask_data] = np.arange(len(values))
    rows = number[tuple(voxels.T)]
    table["value"] = values[rows]
    if atlas:
        table["region"] = [atlas[1].get(int(region), "") for region in atlas[0][rows]]
    return table[columns]
