"""How well a map overlaps a reference, and what chance would give: pure functions of arrays.

Throughout, `values` are a map's values in the voxels of the analysis mask M, in voxel order, and
`inside` tells which of these voxels belong to the reference S ⊂ M; K = |S| and p = K/|M|.
"""

import numpy as np

from utils import derived_seed

TOP_FRACTIONS = np.geomspace(0.005, 0.5, 40)  # of M: the thresholds that dice_max chooses among
SIGNS = {  # what counts as evidence in a signed map, smoothed before if at all
    "abs": np.abs,
    "pos": lambda data: np.maximum(data, 0),
    "neg": lambda data: np.maximum(-data, 0),
    "raw": lambda data: data,
}
SIGN_WORDS = {
    "abs": "magnitudes", "pos": "positive values", "neg": "negative values", "raw": "signed values",
}  # fmt: skip


def top_voxels(values: np.ndarray, n_top: int) -> np.ndarray:
    """Return a mask of the n_top largest values; of ties, those that come first in voxel order."""
    if n_top >= len(values):
        return np.ones(len(values), dtype=bool)
    border = np.partition(values, len(values) - n_top)[len(values) - n_top]
    top = values > border
    ties = np.flatnonzero(values == border)
    top[ties[: n_top - int(top.sum())]] = True
    return top


def dice(first: np.ndarray, second: np.ndarray) -> float:
    """Return the Dice coefficient of two masks, 2·|A∩B|/(|A|+|B|)."""
    return 2 * int((first & second).sum()) / (int(first.sum()) + int(second.sum()))


def dice_matched(values: np.ndarray, inside: np.ndarray) -> float:
    """Return the Dice coefficient of S with the K voxels of largest value; chance: p."""
    return dice(top_voxels(values, int(inside.sum())), inside)


def average_precision(values: np.ndarray, inside: np.ndarray) -> float:
    """Return the area under precision over recall, in steps; chance: p.

    That is the mean, over the voxels of S, of the share of S among all voxels with such a value or
    a larger one. scikit-learn's function sorts an index of all voxels, which takes ten times as
    long.
    """
    of_reference, others = np.sort(values[inside]), np.sort(values[~inside])
    n_found = len(of_reference) - np.searchsorted(of_reference, of_reference)
    n_false = len(others) - np.searchsorted(others, of_reference)
    return float((n_found / (n_found + n_false)).mean())


def dice_curve(values: np.ndarray, inside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return Dice of S with the top q of M, and chance, 2pq/(p+q), at `TOP_FRACTIONS`."""
    order = np.argsort(-values, kind="stable")
    n_found = np.cumsum(inside[order])
    n_top = np.maximum(1, np.round(TOP_FRACTIONS * len(values)).astype(int))
    p = inside.mean()
    chance = 2 * p * TOP_FRACTIONS / (p + TOP_FRACTIONS)
    return 2 * n_found[n_top - 1] / (n_top + inside.sum()), chance


def mass(values: np.ndarray, inside: np.ndarray) -> float:
    """Return the share of the positive values that lies in S; chance: p; NaN without any."""
    positive = np.maximum(values, 0)
    total = positive.sum(dtype=np.float64)
    return float(positive[inside].sum(dtype=np.float64) / total) if total > 0 else np.nan


def outside(data: np.ndarray, mask_data: np.ndarray) -> float:
    """Return the share of the magnitudes of a map, (D, H, W), outside the mask; NaN of zeros."""
    total = np.abs(data).sum(dtype=np.float64)
    return float(np.abs(data[~mask_data]).sum(dtype=np.float64) / total) if total else np.nan


def overlap(values: np.ndarray, inside: np.ndarray) -> dict:
    """Return every measure of overlap of a map and a reference, neither all of M nor none."""
    from sklearn.metrics import roc_auc_score

    curve, chance = dice_curve(values, inside)
    best = int(curve.argmax())
    return {
        "dice_matched": dice_matched(values, inside),
        "degenerate": int(np.count_nonzero(values)) < int(inside.sum()),
        "dice_max": float(curve[best]),
        "dice_max_fraction": float(TOP_FRACTIONS[best]),
        "dice_max_chance": float(chance[best]),
        "roc_auc": float(roc_auc_score(inside, values)),
        "average_precision": average_precision(values, inside),
        "mass": mass(values, inside),
    }


def bounding_box(mask_data: np.ndarray) -> tuple[slice, ...]:
    """Return the smallest box that holds all True voxels."""
    return tuple(slice(i.min(), i.max() + 1) for i in np.nonzero(mask_data))


def shift_null(
    map_data: np.ndarray, mask_data: np.ndarray, reference_data: np.ndarray, seed: int,
    n_shifts: int,
) -> tuple[float, float]:  # fmt: skip
    """Compare dice_matched with that of the map moved around: same smoothness, other place.

    The shifts are toroidal inside the mask's bounding box, drawn at random, none of them zero.
    Arrays have shape (D, H, W). Returned are (1 + shifts that reach the map's own dice_matched) /
    (1 + n_shifts) and the mean over the shifts. It answers for smoothness only: an unrelated map
    that is merely brighter towards the brain's centre passes it more often than not.
    """
    rng = np.random.default_rng(derived_seed(seed, purpose="shifts"))
    box = bounding_box(mask_data)
    boxed_data, boxed_mask = map_data[box], mask_data[box]
    inside = reference_data[box][boxed_mask]
    observed = dice_matched(boxed_data[boxed_mask], inside)
    shifts = rng.integers(1, boxed_data.size, size=n_shifts)
    null = np.empty(n_shifts)
    for i, shift in enumerate(np.stack(np.unravel_index(shifts, boxed_data.shape), axis=1)):
        null[i] = dice_matched(np.roll(boxed_data, shift, axis=(0, 1, 2))[boxed_mask], inside)
    return (1 + int((null >= observed).sum())) / (1 + n_shifts), float(null.mean())


def region_table(
    values: np.ndarray, region_of_voxel: np.ndarray, names: dict[int, str]
) -> list[dict]:
    """Return one row a region of an atlas; `share` is of the sum over all magnitudes in M."""
    total = np.abs(values).sum(dtype=np.float64)
    rows = []
    for region in np.unique(region_of_voxel[region_of_voxel != 0]):
        inside = region_of_voxel == region
        region_sum = float(values[inside].sum(dtype=np.float64))
        rows.append(
            {
                "region": int(region),
                "name": names.get(int(region), ""),
                "n_voxels": int(inside.sum()),
                "sum": region_sum,
                "share": region_sum / total if total else np.nan,
                "mean": region_sum / int(inside.sum()),
                "dice": dice_matched(values, inside),
            }
        )
    return rows
