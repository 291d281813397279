"""Scans drawn anew, with replacement: whole subjects, within their folds and labels."""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from utils import derived_seed

N_DRAWS = 1000
MAX_COUNTS = 4_000_000  # of scans in draws at once: 32 MB


def draws(
    unit: np.ndarray, stratum: np.ndarray, seed: int, n_draws: int | None = None,
    is_rescaled: bool = False,
) -> Iterator[np.ndarray]:  # fmt: skip
    """Yield draws (left out: `N_DRAWS`), some at a time, as counts of scans of shape (draws, n).

    Drawn with replacement are units, within their strata; both arrays have a value a scan. With
    `is_rescaled` one unit fewer is drawn of each stratum, and counts for more: so the variance of a
    mean is right where strata are small, too (Rao and Wu, doi:10.1080/01621459.1988.10478591).
    """
    rng = np.random.default_rng(derived_seed(seed, purpose="bootstrap"))
    strata, unit_of_scan = by_stratum(unit, stratum)
    n_units, n_draws = unit_of_scan.max() + 1, n_draws or N_DRAWS
    n_together = max(1, MAX_COUNTS // len(unit))
    for start in range(0, n_draws, n_together):
        counts = np.zeros((min(n_together, n_draws - start), n_units))
        for of_draw in counts:
            for units in strata:
                n_drawn = max(1, len(units) - is_rescaled)
                drawn = rng.integers(len(units), size=n_drawn)
                n_times = np.bincount(drawn, minlength=len(units))
                of_draw[units] = n_times * len(units) / n_drawn
        yield counts[:, unit_of_scan]


def by_stratum(unit: np.ndarray, stratum: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """Return the numbers of each stratum's units, and the number of each scan's unit."""
    first_scan, unit_of_scan = np.unique(unit, return_index=True, return_inverse=True)[1:]
    of_unit = stratum[first_scan]
    return [np.flatnonzero(of_unit == value) for value in np.unique(of_unit)], unit_of_scan


def units_and_strata(
    table: pd.DataFrame, subjects: pd.Series | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return for each scan what is drawn with it, and among which others.

    That is its subject, or itself, among those of its fold whose scans have such labels.
    """
    unit = np.arange(len(table)) if subjects is None else subjects.to_numpy()
    alike = table[["fold", "label"]].groupby(unit).transform("mean")
    return unit, alike.groupby(["fold", "label"]).ngroup().to_numpy()
