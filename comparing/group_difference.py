"""The plain difference of two groups, voxel by voxel: Welch's t, and what exchanged labels reach.

Volumes are read a range of voxels at a time, and of exchanges only the largest |t| is kept.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.linalg import orth
from scipy.sparse import csr_array

from loading.cache import BLOCK_BYTES, Volumes
from utils import InputError, derived_seed

N_LEAST = 2  # subjects of a label: one has no variance
VALUES_AT_ONCE = 2**22  # t values of exchanges, of 8 bytes, in each of a few arrays
ROUNDING = 1e-9  # relative: exchanges that only rename the groups reach the t that they equal


@dataclass(frozen=True)
class Subjects:
    """Whose scans are compared, each one's averaged first.

    Attributes
    ----------
    matrix : csr_array, shape (n_subjects, n_scans)
        Times the scans, it gives the subjects' means.
    labels : int array, shape (n_subjects,)
    left_out : list of str
        Subjects with scans of both labels.
    nuisance : float array, shape (n_subjects, n_columns), or None
        Covariates.
    """

    matrix: csr_array
    labels: np.ndarray
    left_out: list[str]
    nuisance: np.ndarray | None = None

    def having(self, is_used: np.ndarray) -> np.ndarray:
        """Tell which subjects have scans among those of a bool array, (n_scans,)."""
        return self.matrix @ is_used > 0

    def exchanged(self, n_exchanges: int, seed: int) -> np.ndarray:
        """Return whose label each subject gets in permutations, (n_exchanges, n_subjects)."""
        rng, n = np.random.default_rng(derived_seed(seed, purpose="group difference")), len(self)
        drawn = [rng.permutation(n) for _ in range(n_exchanges)]
        return np.array(drawn, dtype=int).reshape(n_exchanges, n)

    def __len__(self) -> int:
        return len(self.labels)

    def t(self, values: np.ndarray, is_member: np.ndarray, exchanges: np.ndarray) -> np.ndarray:
        """Return the t of some subjects' values, (n_members, n_voxels), in each exchange."""
        labels = self.labels[is_member]
        if self.nuisance is None:
            return welch_t(values, labels[exchanges] == 1)
        return partial_t(values, labels, self.nuisance[is_member], exchanges)


def average_scans(
    subjects: pd.Series, labels: np.ndarray, covariates: pd.DataFrame | None = None
) -> Subjects:
    """Return the subjects of scans; those with scans of both labels are left out.

    Covariates, a row a scan, are averaged; words become a column a level, but for the first.
    """
    table = pd.DataFrame({"subject": subjects.to_numpy(), "label": labels})
    of_subject = table.groupby("subject", sort=False)["label"].agg(["first", "nunique"])
    is_mixed = of_subject["nunique"] > 1
    kept = of_subject.index[~is_mixed]
    row = kept.get_indexer(table["subject"])
    scans = np.flatnonzero(row >= 0)
    weights = 1 / np.bincount(row[scans], minlength=len(kept))[row[scans]]
    matrix = csr_array((weights, (row[scans], scans)), shape=(len(kept), len(table)))
    nuisance = None
    if covariates is not None:
        nuisance = matrix @ pd.get_dummies(covariates, drop_first=True).to_numpy(dtype=float)
    return Subjects(
        matrix, of_subject.loc[kept, "first"].to_numpy(), list(of_subject.index[is_mixed]), nuisance
    )


def check_groups(labels: np.ndarray, place: str) -> None:
    """Raise an InputError unless a place has enough subjects of both labels."""
    for label in (0, 1):
        if (n := int((labels == label).sum())) < N_LEAST:
            raise InputError(f"{place} has {n} subjects of label {label}: a t needs {N_LEAST}")


def welch_t(values: np.ndarray, are_patients: np.ndarray) -> np.ndarray:
    """Return Welch's t of patients minus controls, (n_groupings, n_voxels).

    Parameters
    ----------
    values : float64 array, shape (n_subjects, n_voxels)
        Best with an origin near them: variances are taken from sums of squares.
    are_patients : bool array, shape (n_groupings, n_subjects)
        Each row is one way to divide the subjects, into equally many patients.

    Notes
    -----
    t = (m₁ − m₀) / √(v₁/n₁ + v₀/n₀), v the groups' variances with n − 1 (Welch, Biometrika 34:28,
    1947, doi:10.1093/biomet/34.1-2.28). It is 0 where no group varies.
    """
    n, n_patients = len(values), int(are_patients[0].sum())
    n_controls = n - n_patients
    groupings = are_patients.astype(np.float64)
    total, squares = values.sum(0), np.square(values).sum(0)
    of_patients = groupings @ values
    squared = groupings @ np.square(values)
    of_controls = total - of_patients
    difference = of_patients / n_patients - of_controls / n_controls
    within_patients = squared - of_patients**2 / n_patients
    within_controls = squares - squared - of_controls**2 / n_controls
    variance = within_patients / (n_patients * (n_patients - 1))
    variance += within_controls / (n_controls * (n_controls - 1))
    varies = variance > 1e-12 * squares / n**2
    return np.where(varies, difference / np.sqrt(np.where(varies, variance, 1)), 0)


def partial_t(
    values: np.ndarray, labels: np.ndarray, nuisance: np.ndarray, exchanges: np.ndarray
) -> np.ndarray:
    """Return the t of the label in a linear model with covariates, (n_exchanges, n_voxels).

    Parameters
    ----------
    values, labels : arrays, shape (n_subjects, n_voxels), (n_subjects,)
    nuisance : float array, shape (n_subjects, n_columns)
        Covariates, without the intercept.
    exchanges : int array, shape (n_exchanges, n_subjects)
        Permutations of the subjects (Freedman and Lane, J. Bus. Econ. Stat. 1:292, 1983,
        doi:10.2307/1391660): labels and covariates of the whole model are permuted against what
        the covariates leave of the values.

    Notes
    -----
    Of pooled variance, with n − rank degrees of freedom. It is 0 where nothing varies.
    """
    spread = nuisance.std(0)
    columns = (nuisance - nuisance.mean(0))[:, spread > 0] / spread[spread > 0]
    basis = orth(np.column_stack([np.ones(len(labels)), columns]))
    label = labels - basis @ (basis.T @ labels)
    label /= np.linalg.norm(label)
    residual = values - basis @ (basis.T @ values)
    found = label[exchanges] @ residual
    left = np.square(residual).sum(0) - found**2
    for column in basis.T:
        left -= (column[exchanges] @ residual) ** 2
    varies = left > 1e-12 * np.square(values).sum(0)
    n_free = len(labels) - basis.shape[1] - 1
    return np.where(varies, found * np.sqrt(n_free / np.where(varies, left, 1)), 0)


def check_model(subjects: Subjects, is_member: np.ndarray, place: str) -> None:
    """Raise an InputError where covariates leave nothing of the labels, or no freedom."""
    columns = np.column_stack([np.ones(len(subjects)), subjects.nuisance])[is_member]
    labels = subjects.labels[is_member]
    basis = orth(columns)
    left = np.linalg.norm(labels - basis @ (basis.T @ labels))
    if left < 1e-6 or len(labels) <= basis.shape[1] + 1:
        raise InputError(f"{place}: the covariates determine the labels of its subjects")


def compare(
    volumes: Volumes, subjects: Subjects, members: np.ndarray, exchanges: np.ndarray,
    block_bytes: int = BLOCK_BYTES,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Return the t of each set of subjects, what exchanges reach, the mean scan, and the coverage.

    Parameters
    ----------
    volumes : Volumes
    subjects : Subjects
    members : bool array, shape (n_sets, n_subjects)
        The last set has all subjects: it is the one whose labels are exchanged.
    exchanges : int array, shape (n_exchanges, n_subjects)
        See `Subjects.exchanged`.

    Returns
    -------
    t : float32 array, shape (n_sets, n_voxels)
    largest : float64 array, shape (n_exchanges,)
        The largest |t| over all voxels.
    mean, coverage : float32 arrays, shape (n_voxels,)
        Of the scans: their mean, and the share that is not 0.
    """
    t = np.zeros((len(members), volumes.n_voxels), dtype=np.float32)
    mean, coverage = np.zeros((2, volumes.n_voxels), dtype=np.float32)
    largest = np.zeros(len(exchanges))
    for voxels, block in volumes.blocks("group difference", block_bytes):
        mean[voxels], coverage[voxels] = block.mean(0), (block != 0).mean(0)
        values = subjects.matrix @ (block - block[0])
        for of_set, is_member in zip(t, members, strict=True):
            as_they_are = np.arange(is_member.sum())[None]
            of_set[voxels] = subjects.t(values[is_member], is_member, as_they_are)[0]
        varying = values[:, np.ptp(values, axis=0) > 0]
        for some in _parts(varying.shape[1], len(exchanges)):
            reached = np.abs(subjects.t(varying, members[-1], exchanges[some])).max(1, initial=0)
            largest[some] = np.maximum(largest[some], reached)
    return t, largest, mean, coverage


def _parts(n_voxels: int, n_exchanges: int) -> Iterator[slice]:
    """Yield which exchanges are done at once."""
    n_together = max(1, VALUES_AT_ONCE // max(1, n_voxels))
    for start in range(0, n_exchanges, n_together):
        yield slice(start, min(start + n_together, n_exchanges))


def familywise_p(t: np.ndarray, largest: np.ndarray) -> np.ndarray:
    """Return each voxel's family-wise p, (1 + exchanges whose largest |t| reaches its) / (1 + N).

    Westfall and Young; Nichols and Holmes, Hum. Brain Mapp. 15:1, 2002, doi:10.1002/hbm.1058.
    """
    reached = len(largest) - np.searchsorted(np.sort(largest), np.abs(t) * (1 - ROUNDING))
    return ((1 + reached) / (1 + len(largest))).astype(np.float32)
