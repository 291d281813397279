"""Linear SVMs of all folds from one Gram matrix; scans are read a range of voxels at a time."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from nibabel.spatialimages import SpatialImage

from loading import image
from loading.cache import BLOCK_BYTES, Volumes
from reporting import maps
from run_folder import files
from utils import InputError, log, progress

TILE_ROWS = 1024  # of the Gram matrix at a time: no second one is needed
TOLERANCE = 1e-9  # of the optimiser; weights are then good to a millionth of their maximum


@dataclass(frozen=True)
class FoldFit:
    """One fold's fitted SVM in terms of the scans: its arrays have a number a scan.

    The weights are Σ_i of `weight_coefficients` times scan i, the pattern that of
    `pattern_coefficients`. `decisions` are signed distances from the border, in units of the
    margin.
    """

    weight_coefficients: np.ndarray
    pattern_coefficients: np.ndarray
    intercept: float
    decisions: np.ndarray


def row_tiles(n_scans: int) -> list[slice]:
    """Return the rows of the Gram matrix that are added to at once."""
    return [slice(i, min(i + TILE_ROWS, n_scans)) for i in range(0, n_scans, TILE_ROWS)]


def gram_matrix(
    volumes: Volumes, block_bytes: int = BLOCK_BYTES
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the scans' Gram matrix, centred on their mean, that mean, and where they are not 0."""
    n_scans = len(volumes)
    log.info(
        "the Gram matrix of %d scans takes %.3g GB of memory, less than twice that while a fold is "
        "fitted", n_scans, 8 * n_scans**2 / 1e9,
    )  # fmt: skip
    gram = np.zeros((n_scans, n_scans))
    mean, coverage = np.zeros((2, volumes.n_voxels), dtype=np.float32)
    for voxels, block in volumes.blocks("Gram matrix", block_bytes):
        mean[voxels], coverage[voxels] = block.mean(0), (block != 0).mean(0)
        block -= block.mean(0)
        for rows in row_tiles(n_scans):  # up to the diagonal; the whole has more than 2³¹ entries
            gram[rows, : rows.stop] += block[rows] @ block[: rows.stop].T
    for rows in row_tiles(n_scans):
        corner = gram[rows, rows]
        corner[:] = np.tril(corner) + np.tril(corner, -1).T
        gram[rows, rows.stop :] = gram[rows.stop :, rows].T
    return gram, mean, coverage


def fit_fold(gram: np.ndarray, labels: np.ndarray, train: np.ndarray, cost: float) -> FoldFit:
    """Fit a fold's SVM on its training scans.

    Parameters
    ----------
    gram : array, shape (n_scans, n_scans)
        Of all scans. The result does not depend on its origin, but libsvm holds inner products in
        float32, so that one near the scans is best.
    labels, train : int arrays, shape (n_scans,), (n_train,)
        The latter are the rows to train on.
    cost : float
        The SVM's C.

    Notes
    -----
    Moving the origin to the training mean, as the definition has it, changes inner products by r_i
    + r_j + constant. It drops out of the SVM, whose coefficients add up to 0, and of the centred
    scores; so the only copy that is made is that of the training scans' inner products. The pattern
    is A = Cov(X)·w / Var(X·w) = Xᵀs/((n−1)·Var(s)) with s = X·w centred, over the training scans
    (Haufe et al., NeuroImage 87:96, 2014, doi:10.1016/j.neuroimage.2013.10.067).
    """
    from sklearn.svm import SVC

    svc = SVC(C=cost, kernel="precomputed", tol=TOLERANCE)
    svc.fit(gram[np.ix_(train, train)], labels[train])
    weights = np.zeros(len(labels))
    weights[train[svc.support_]] = svc.dual_coef_[0]
    scores = gram @ weights
    train_scores = scores[train] - scores[train].mean()
    pattern = np.zeros(len(labels))
    pattern[train] = train_scores / ((len(train) - 1) * train_scores.var(ddof=1))
    intercept = float(svc.intercept_[0])
    return FoldFit(weights, pattern, intercept, scores + intercept)


def combine_scans(
    volumes: Volumes, coefficients: np.ndarray, block_bytes: int = BLOCK_BYTES
) -> np.ndarray:
    """Return weighted sums of scans, (n_maps, n_voxels), for coefficients (n_maps, n_scans)."""
    maps = np.zeros((len(coefficients), volumes.n_voxels), dtype=np.float32)
    for voxels, block in volumes.blocks("maps", block_bytes):
        maps[:, voxels] = coefficients @ block
    return maps


def load(folder: Path, like_img: SpatialImage) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the SVMs' weights, (n_folds, n_voxels), their intercepts, and the mean scan."""
    table = files.read_csv(folder / "intercepts.csv", {"fold": int, "intercept": float})
    paths = [folder / f"SVM_weights_f{fold}.nii.gz" for fold in table["fold"]]
    imgs = [image.read_image(path, "map of svm.py") for path in (*paths, folder / maps.MEAN_SCAN)]
    for img, path in zip(imgs, (*paths, folder / maps.MEAN_SCAN), strict=True):
        if not image.same_space(img, like_img):
            raise InputError(f"--svm: {path} is not on the grid of the run's scans")
    *weights, mean = (img.get_fdata(dtype=np.float32).ravel() for img in imgs)
    return np.array(weights), table["intercept"].to_numpy(), mean


def decide(
    volumes: Volumes, weights: np.ndarray, intercepts: np.ndarray, mean: np.ndarray
) -> np.ndarray:
    """Return the decisions of the SVMs that `load` returns, (n_scans, n_folds)."""
    rows = progress(range(len(volumes)), "SVM", unit="scan")
    return np.array([weights @ (volumes[row].ravel() - mean) + intercepts for row in rows])
