"""Linear SVMs of all folds in terms of one Gram matrix: scans are read a range of voxels at a time.

Under torchrun the ranges are shared among the processes, and so are the folds.
"""

from dataclasses import dataclass

import numpy as np
from sklearn.svm import SVC

import ranks
from utils import log, progress
from volume_file import Volumes

BLOCK_BYTES = 128 * 2**20  # of float32 voxels held at a time; float64 copies make it thrice that
MIN_RANGE_VOXELS = 4096  # 16 kB a read: with shorter ones a disk does nothing but seek
TILE_ROWS = 1024  # of the Gram matrix at a time: no second one is needed
TOLERANCE = 1e-9  # of the optimiser; weights are then good to a millionth of their maximum


@dataclass(frozen=True)
class FoldFit:
    """One fold's fitted SVM in terms of the scans.

    Attributes
    ----------
    weight_coefficients : array, shape (n_scans,)
        w = Σ_i of these times scan i; 0 for scans that are no support vectors.
    pattern_coefficients : array, shape (n_scans,)
        A = Σ_i of these times scan i.
    decisions : array, shape (n_scans,)
        Signed distance from the decision border, in units of the margin, of every scan.
    """

    weight_coefficients: np.ndarray
    pattern_coefficients: np.ndarray
    decisions: np.ndarray


def voxel_ranges(volumes: Volumes) -> list[tuple[int, int]]:
    """Return this process's share of the ranges of voxels that are read of all scans at once."""
    n_at_once = max(MIN_RANGE_VOXELS, BLOCK_BYTES // (4 * volumes.n_scans))
    starts = range(0, volumes.n_voxels, n_at_once)[ranks.rank() :: ranks.world_size()]
    return [(start, min(start + n_at_once, volumes.n_voxels)) for start in starts]


def row_tiles(n_scans: int) -> list[slice]:
    """Return the rows of the Gram matrix that are added to at once."""
    return [slice(i, min(i + TILE_ROWS, n_scans)) for i in range(0, n_scans, TILE_ROWS)]


def gram_matrix(volumes: Volumes) -> tuple[np.ndarray, np.ndarray]:
    """Return the Gram matrix of all scans and their mean.

    Returns
    -------
    gram : float64 array, shape (n_scans, n_scans)
        Inner products after subtracting the mean of all scans.
    mean : float32 array, shape (n_voxels,)
    """
    n_scans, n_on_host = volumes.n_scans, ranks.n_on_host()
    of_each = f", in each of this host's {n_on_host} processes" if n_on_host > 1 else ""
    log.info(
        "the Gram matrix of %d scans takes %.3g GB of memory, less than twice that while a fold is "
        "fitted%s", n_scans, 8 * n_scans**2 / 1e9, of_each,
    )  # fmt: skip
    gram = np.zeros((n_scans, n_scans))
    mean = np.zeros(volumes.n_voxels, dtype=np.float32)
    for start, stop in progress(voxel_ranges(volumes), "Gram matrix", unit="block"):
        block = volumes.read(start, stop).astype(np.float64)
        mean[start:stop] = block.mean(0)
        block -= block.mean(0)
        for rows in row_tiles(n_scans):  # up to the diagonal; the whole has more than 2³¹ entries
            gram[rows, : rows.stop] += block[rows] @ block[: rows.stop].T
    for rows in row_tiles(n_scans):
        corner = gram[rows, rows]
        corner[:] = np.tril(corner) + np.tril(corner, -1).T
        gram[rows, rows.stop :] = gram[rows.stop :, rows].T
    ranks.add_up(gram)
    ranks.add_up(mean)
    return gram, mean


def fit_fold(gram: np.ndarray, labels: np.ndarray, train: np.ndarray, cost: float) -> FoldFit:
    """Fit a fold's SVM on its training scans.

    Parameters
    ----------
    gram : array, shape (n_scans, n_scans)
        Of all scans. The result does not depend on its origin, but libsvm holds inner products in
        float32, so that one near the scans is best.
    labels : int array, shape (n_scans,)
    train : int array
        Rows of the scans to train on.
    cost : float
        The SVM's C.

    Returns
    -------
    FoldFit

    Notes
    -----
    Moving the origin to the training mean, as the definition has it, changes inner products by
    r_i + r_j + constant. It drops out of the SVM, whose coefficients add up to 0, and of the
    centred scores; so the only copy that is made is that of the training scans' inner products.

    The pattern is A = Cov(X)·w / Var(X·w) over the training scans, computed as Xᵀs/((n−1)·Var(s))
    with s = X·w centred: its coefficients are s/((n−1)·Var(s)), since Xᵀs is the same for centred
    and for raw scans.

    References
    ----------
    Haufe et al., NeuroImage 87:96-110, 2014, doi:10.1016/j.neuroimage.2013.10.067
    """
    svc = SVC(C=cost, kernel="precomputed", tol=TOLERANCE)
    svc.fit(gram[np.ix_(train, train)], labels[train])
    weights = np.zeros(len(labels))
    weights[train[svc.support_]] = svc.dual_coef_[0]
    scores = gram @ weights
    train_scores = scores[train] - scores[train].mean()
    pattern = np.zeros(len(labels))
    pattern[train] = train_scores / ((len(train) - 1) * train_scores.var(ddof=1))
    return FoldFit(weights, pattern, scores + svc.intercept_[0])


def combine_scans(volumes: Volumes, coefficients: np.ndarray) -> np.ndarray:
    """Return weighted sums of scans, (n_maps, n_voxels), for coefficients (n_maps, n_scans)."""
    maps = np.zeros((len(coefficients), volumes.n_voxels), dtype=np.float32)
    for start, stop in progress(voxel_ranges(volumes), "maps", unit="block"):
        maps[:, start:stop] = coefficients @ volumes.read(start, stop).astype(np.float64)
    ranks.add_up(maps)
    return maps
