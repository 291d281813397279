"""How sure an overlap is, from the maps of single scans: errors, exchanged labels, halves.

The networks are held fixed throughout: nothing here says what training anew would change. A mean
map is a weighted sum of its scans' maps, so that every draw of scans is a row of weights.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pandas as pd

from reporting import bootstrap
from utils import derived_seed

N_ERROR_DRAWS = 200
N_HALVES = 20
PERTURBATION = 0.5  # of what drawing anew changes, that a draw changes
DRAWS_TOGETHER = 64  # maps held at once, of 4 bytes a voxel of the mask
N_THREADS = 4
MAX_DEVIATION = 1e-3  # of a map's largest magnitude: the mean of its scans' maps is the map

Measure = Callable[[np.ndarray], float]


@dataclass(frozen=True)
class ScanMaps:
    """Maps of single scans in the voxels of the mask, and the mean map that they give.

    Attributes
    ----------
    values : float32 array, shape (n_scans, n_voxels)
        Signed and smoothed; it may be a memory map.
    table : DataFrame
        A row a scan: path, label, fold and, if known, subject. A scan that several folds explain
        has a row for each.
    is_contrast : bool
        The mean map is patients' less controls'.
    """

    values: np.ndarray
    table: pd.DataFrame
    is_contrast: bool

    @property
    def unit(self) -> pd.Series:
        """What is drawn together with each scan, see `unit_of`."""
        return unit_of(self.table)

    def weights(self, counts: np.ndarray, labels: np.ndarray | None = None) -> np.ndarray:
        """Return what each scan weighs in each draw's mean map, (draws, n_scans).

        `counts`, (draws, n_scans), say how often a scan counts; `labels`, of that shape, stand in
        for the scans' own. As in the map itself, means over a fold's scans, or of its patients less
        its controls, are averaged over the folds; a fold of one label has no contrast.
        """
        fold = self.table["fold"].to_numpy()
        own = np.broadcast_to(self.table["label"].to_numpy(), counts.shape)
        labels = own if labels is None else labels
        signs = {1: 1.0, 0: -1.0} if self.is_contrast else {None: 1.0}
        of_folds = []
        for number in np.unique(fold):
            members = [
                counts * (fold == number) * (True if label is None else labels == label)
                for label in signs
            ]
            if all(each.any() for each in members):
                parts = zip(members, signs.values(), strict=True)
                of_folds.append(
                    sum(
                        sign * each / np.maximum(1, each.sum(1, keepdims=True))
                        for each, sign in parts
                    )
                )
        return np.mean(of_folds, axis=0)

    def mean(self) -> np.ndarray:
        """Return the mean map, (n_voxels,)."""
        return self.maps(self.weights(np.ones((1, len(self.table)))))[0]

    def maps(self, weights: np.ndarray) -> np.ndarray:
        """Return weighted sums of the scans' maps, (draws, n_voxels)."""
        return weights.astype(np.float32) @ self.values

    def measured(self, weights: np.ndarray, measures: list[Measure]) -> np.ndarray:
        """Return measures of each draw's map, (draws, measures)."""
        found = []
        with ThreadPoolExecutor(N_THREADS) as pool:
            for start in range(0, len(weights), DRAWS_TOGETHER):
                maps = self.maps(weights[start : start + DRAWS_TOGETHER])
                found += pool.map(lambda each: [measure(each) for measure in measures], maps)
        return np.array(found)


def unit_of(table: pd.DataFrame) -> pd.Series:
    """Return what is drawn together with each scan: its subject, or itself, in all folds."""
    return table.get("subject", table["path"])


def is_mean_of(scan_maps: ScanMaps, values: np.ndarray) -> bool:
    """Tell whether a map, (n_voxels,), is the mean of these scans' maps; not with --mean equal."""
    deviation = np.abs(scan_maps.mean() - values).max()
    return bool(deviation <= MAX_DEVIATION * np.abs(values).max())


def draws(scan_maps: ScanMaps, measures: list[Measure], seed: int) -> np.ndarray:
    """Return measures of `N_ERROR_DRAWS` maps of scans drawn anew, (draws, measures).

    Drawn with replacement are subjects, within their folds and labels; maps of the same scans get
    the same draws. A map of drawn scans is noisier than the map is, and the measures of a noisier
    map are lower and vary otherwise. So a draw goes part of the way from the map to that of the
    drawn scans, and `standard_errors` are scaled up: the numerical delta method (Hong and Li, J.
    Econometrics 206:379, 2018). Percentiles of the draws are no confidence interval.
    """
    drawn_with = bootstrap.units_and_strata(scan_maps.table, scan_maps.unit)
    drawn = bootstrap.draws(*drawn_with, seed, N_ERROR_DRAWS, is_rescaled=True)
    own = scan_maps.weights(np.ones((1, len(scan_maps.table))))
    weights = own + PERTURBATION * (scan_maps.weights(np.concatenate(list(drawn))) - own)
    return scan_maps.measured(weights, measures)


def standard_errors(of_draws: np.ndarray) -> np.ndarray:
    """Return the standard errors of measures, or of differences, from their draws."""
    return of_draws.std(axis=0, ddof=1) / PERTURBATION


def label_vectors(table: pd.DataFrame, n_draws: int, seed: int) -> tuple[np.ndarray, int]:
    """Return labels exchanged at random, (n_draws, n_scans), and how many subjects keep theirs.

    Whole label vectors change places between subjects of one fold that have equally many scans;
    subjects with both labels stay, and so do those that find none to change with.
    """
    unit = pd.factorize(unit_of(table))[0]
    by_unit = table.groupby(unit)
    label = by_unit["label"].mean()
    is_mixed = ~label.isin([0, 1])
    facts = [by_unit["fold"].mean(), by_unit.size(), is_mixed]
    groups = [
        np.asarray(rows) for rows in label.groupby(facts).groups.values() if not is_mixed[rows[0]]
    ]
    rng = np.random.default_rng(derived_seed(seed, purpose="exchanges"))
    own, moves = table["label"].to_numpy(), ~is_mixed.to_numpy()[unit]
    labels = np.tile(own, (n_draws, 1))
    for of_draw in labels:
        exchanged = label.to_numpy().copy()
        for rows in groups:
            exchanged[rows] = rng.permutation(exchanged[rows])
        of_draw[moves] = exchanged[unit][moves]
    n_free = sum(len(rows) for rows in groups if label[rows].nunique() == 2)
    return labels, len(label) - n_free


def label_p(scan_maps: ScanMaps, measure: Measure, n_draws: int, seed: int) -> tuple[float, int]:
    """Return how often a contrast reaches its measure when labels change places, and who stays.

    The first is (1 + exchanges that reach it) / (1 + n_draws), NaN where nobody can change. It says
    that the groups' maps differ there, not that a network learned it: an untrained one's do, too,
    where the groups' scans differ.
    """
    labels, n_fixed = label_vectors(scan_maps.table, n_draws, seed)
    if n_fixed == scan_maps.unit.nunique():
        return np.nan, n_fixed
    ones = np.ones((1, len(scan_maps.table)))
    observed = scan_maps.measured(scan_maps.weights(ones), [measure])[0, 0]
    weights = scan_maps.weights(np.broadcast_to(ones, labels.shape), labels)
    reached = int((scan_maps.measured(weights, [measure])[:, 0] >= observed).sum())
    return (1 + reached) / (1 + n_draws), n_fixed


def half_r(scan_maps: ScanMaps, seed: int) -> float:
    """Return the mean correlation of the mean maps of random halves of each fold's subjects.

    NaN where a fold (for a contrast, a label of it) has but one subject. The networks are fixed, so
    that it tells how much a mean depends on whose scans were explained.
    """
    table = scan_maps.table
    stratum = table["fold"].to_numpy() * 2 + table["label"].to_numpy() * scan_maps.is_contrast
    strata, unit = bootstrap.by_stratum(scan_maps.unit.to_numpy(), stratum)
    if min(map(len, strata)) < 2:
        return np.nan
    rng = np.random.default_rng(derived_seed(seed, purpose="halves"))
    found = []
    for _ in range(N_HALVES):
        is_first = np.zeros(unit.max() + 1, dtype=bool)
        for units in strata:
            is_first[rng.permutation(units)[: len(units) // 2]] = True
        counts = np.stack([is_first[unit], ~is_first[unit]]).astype(float)
        found.append(correlations(scan_maps.maps(scan_maps.weights(counts)))[0, 1])
    return float(np.mean(found))


def fold_r(of_folds: np.ndarray) -> float:
    """Return the mean correlation of pairs of the folds' maps, (n_folds, n_voxels); NaN of one."""
    if len(of_folds) < 2:
        return np.nan
    return float(correlations(of_folds)[np.triu_indices(len(of_folds), 1)].mean())


def correlations(maps: np.ndarray) -> np.ndarray:
    """Return Pearson's correlation of each two maps, (n_maps, n_maps), from (n_maps, n_voxels)."""
    with np.errstate(invalid="ignore"):  # a map that is 0 everywhere correlates with nothing
        return np.atleast_2d(np.corrcoef(maps))
