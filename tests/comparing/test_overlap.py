"""Every measure on maps whose Dice, average precision, mass and chance are known exactly."""

import numpy as np
import pytest

from comparing import overlap

INSIDE = np.array([True] * 4 + [False] * 16)  # K = 4 of 20 voxels: p = 0.2
P = 0.2


def test_perfect_map():
    found = overlap.overlap(INSIDE.astype(float), INSIDE)
    assert found["dice_matched"] == found["roc_auc"] == found["average_precision"] == 1
    assert found["mass"] == found["dice_max"] == 1 and not found["degenerate"]
    assert found["dice_max_fraction"] == pytest.approx(P, abs=0.025)  # to the nearest voxel


def test_constant_map_is_chance():
    """All voxels tie: voxel order decides Dice, and one step the rest."""
    found = overlap.overlap(np.ones(20), np.roll(INSIDE, 10))
    assert found["dice_matched"] == 0  # the first four voxels, of which none is in S
    assert found["roc_auc"] == 0.5
    assert found["average_precision"] == pytest.approx(P)
    assert found["mass"] == pytest.approx(P)


def test_map_with_ties():
    """Values 2 2 1 1 | 1 1 0 …: two of S on top, then four ties, of which voxel order takes two."""
    values = np.array([2.0, 2, 1, 1, 1, 1, *[0] * 14])
    found = overlap.overlap(values, INSIDE)
    assert found["dice_matched"] == 1
    assert overlap.dice_matched(values[::-1], INSIDE[::-1]) == 2 * 2 / 8
    # steps: 2 voxels (recall 1/2, precision 1), 6 voxels (recall 1, precision 4/6)
    assert found["average_precision"] == pytest.approx(0.5 * 1 + 0.5 * 4 / 6)
    assert found["mass"] == pytest.approx(6 / 8)
    # 4 × 16 pairs: against the 2 outside ties, 2 win and 2 tie; against the 14 zeros all win
    assert found["roc_auc"] == pytest.approx((2 * (2 + 2 * 0.5) + 14 * 4) / 64)


def test_map_with_fewer_nonzero_voxels_than_the_reference():
    values = np.zeros(20)
    assert np.isnan(overlap.overlap(values, INSIDE)["mass"])
    values[[2, 9]] = 1
    found = overlap.overlap(values, INSIDE)
    assert found["degenerate"]
    assert found["dice_matched"] == 3 / 4  # voxels 2 and 9, then 0 and 1 by voxel order


def test_raw_map_with_negative_values():
    """Mass counts positive values only; ranking puts negative ones last."""
    values = np.where(INSIDE, -1.0, 0.0)
    values[10] = 3
    found = overlap.overlap(values, INSIDE)
    assert found["mass"] == found["roc_auc"] == 0


def test_dice_curve_and_its_chance():
    """Of 1,000 voxels, 100 in S, the map's first 50 right and the rest wrong."""
    inside, values = np.arange(1000) < 100, np.zeros(1000)
    values[:50], values[100:950] = 2, 1
    curve, chance = overlap.dice_curve(values, inside)
    n_top = np.maximum(1, np.round(1000 * overlap.TOP_FRACTIONS))
    assert curve == pytest.approx(2 * np.minimum(n_top, 50) / (n_top + 100))
    q = overlap.TOP_FRACTIONS
    assert chance == pytest.approx(2 * 0.1 * q / (0.1 + q))
    assert q[0] == pytest.approx(0.005) and q[-1] == pytest.approx(0.5) and len(q) == 40


def test_random_maps_reach_their_stated_chance():
    rng = np.random.default_rng(0)
    inside = rng.random(3000) < 0.1
    found = [overlap.overlap(rng.random(3000), inside) for _ in range(100)]
    for name in ("dice_matched", "average_precision", "mass"):
        assert np.mean([f[name] for f in found]) == pytest.approx(inside.mean(), rel=0.06), name
    assert np.mean([f["roc_auc"] for f in found]) == pytest.approx(0.5, abs=0.01)


def test_top_voxels_against_a_stable_sort():
    rng = np.random.default_rng(1)
    for n_top in (1, 7, 40, 99, 100):
        values = rng.integers(6, size=100).astype(float)
        expected = np.zeros(100, bool)
        expected[np.argsort(-values, kind="stable")[:n_top]] = True
        assert (overlap.top_voxels(values, n_top) == expected).all()


def test_shift_null_of_a_map_that_hits():
    """A small blob on the reference: no shift reaches it, and shifts overlap by about p."""
    reference = np.zeros((8, 9, 10), bool)
    reference[2:4, 3:5, 4:6] = True
    mask = np.ones_like(reference)
    null_p, null_mean = overlap.shift_null(reference * 1.0, mask, reference, seed=0, n_shifts=1000)
    assert null_p == 1 / 1001
    assert null_mean == pytest.approx(reference.mean(), abs=0.01)


def test_shift_null_repeats_and_is_seeded():
    rng = np.random.default_rng(0)
    data, mask = rng.random((6, 7, 8)), np.ones((6, 7, 8), bool)
    noisy, reference = data + rng.random(data.shape), data > 0.8
    first = overlap.shift_null(noisy, mask, reference, seed=1, n_shifts=100)
    assert first == overlap.shift_null(noisy, mask, reference, seed=1, n_shifts=100)
    assert first[1] != overlap.shift_null(noisy, mask, reference, seed=2, n_shifts=100)[1]


def test_region_table():
    values = np.array([4.0, 2, 0, 0, 1, 1])
    regions = np.array([1, 1, 0, 7, 7, 7])
    rows = overlap.region_table(values, regions, {1: "hippocampus"})
    assert rows[0] == {
        "region": 1, "name": "hippocampus", "n_voxels": 2, "sum": 6, "share": 6 / 8, "mean": 3,
        "dice": 1,
    }  # fmt: skip
    assert rows[1]["name"] == "" and rows[1]["share"] == 2 / 8
    assert rows[1]["dice"] == pytest.approx(2 * 1 / 6)  # of the top 3 (4, 2, 1) one is inside
