"""Errors over scans, exchanged labels and halves: by hand, by a slow twin, and calibrated."""

import itertools
from functools import partial

import numpy as np
import pandas as pd
import pytest
from scipy.ndimage import gaussian_filter
from sklearn.metrics import average_precision_score

from comparing import overlap, significance
from comparing.significance import ScanMaps

N_VOXELS = 40


def table_of(sizes: dict[str, list[int]], fold_of: dict[str, int]) -> pd.DataFrame:
    """Return a row a scan, from each subject's labels and fold."""
    rows = [
        {"path": f"{subject}_{i}", "label": label, "fold": fold_of[subject], "subject": subject}
        for subject, labels in sizes.items()
        for i, label in enumerate(labels)
    ]
    return pd.DataFrame(rows)


def make_scan_maps(is_contrast: bool, n_scans: int = 14) -> ScanMaps:
    """Return maps of scans in two unequal folds."""
    rng = np.random.default_rng(0)
    label, fold = np.arange(n_scans) % 3 // 2, (np.arange(n_scans) > 8).astype(int)
    paths = [f"scan{i}" for i in range(n_scans)]
    table = pd.DataFrame({"path": paths, "label": label, "fold": fold})
    values = rng.standard_normal((n_scans, N_VOXELS)).astype(np.float32)
    return ScanMaps(values, table, is_contrast)


def plain_mean(scan_maps: ScanMaps, rows: list[int], labels: np.ndarray) -> np.ndarray:
    """Return the mean map of some rows (a row may stand twice), as its definition says."""
    fold, folds = scan_maps.table["fold"].to_numpy(), []
    for number in (0, 1):
        of_fold = [row for row in rows if fold[row] == number]
        groups = [
            np.mean([scan_maps.values[row] for row in of_fold if labels[row] == label], axis=0)
            for label in (0, 1)
        ]
        everyone = np.mean([scan_maps.values[row] for row in of_fold], axis=0)
        folds.append(groups[1] - groups[0] if scan_maps.is_contrast else everyone)
    return np.mean(folds, axis=0)


@pytest.mark.parametrize("is_contrast", [False, True])
def test_weights_give_the_mean_map(is_contrast):
    """Of all scans, of scans drawn twice, and with other labels."""
    scan_maps = make_scan_maps(is_contrast)
    rng = np.random.default_rng(1)
    own = scan_maps.table["label"].to_numpy()
    counts = rng.integers(1, 3, (3, len(own)))
    labels = np.stack([own, own[::-1], 1 - own])
    found = scan_maps.maps(scan_maps.weights(counts, labels))
    for one, count, label in zip(found, counts, labels, strict=True):
        rows = np.repeat(np.arange(len(own)), count)
        assert one == pytest.approx(plain_mean(scan_maps, rows.tolist(), label), abs=1e-5)
    expected = plain_mean(scan_maps, list(range(len(own))), own)
    assert scan_maps.mean() == pytest.approx(expected, abs=1e-5)
    assert significance.is_mean_of(scan_maps, expected)
    assert not significance.is_mean_of(scan_maps, 1.01 * expected)


def test_a_fold_of_one_label_has_no_contrast():
    scan_maps = make_scan_maps(is_contrast=True)
    table = scan_maps.table.assign(label=lambda t: t["label"].where(t["fold"] == 0, 0))
    found = ScanMaps(scan_maps.values, table, True).mean()
    values, label = scan_maps.values, table["label"]
    first = (table["fold"] == 0).to_numpy()
    expected = values[first & (label == 1)].mean(0) - values[first & (label == 0)].mean(0)
    assert found == pytest.approx(expected, abs=1e-6)


def test_exchanges_of_subjects_with_several_scans():
    """Six subjects with 1, 1, 2, 2, 2 and 3 scans: pairs of equal size change, others stay."""
    sizes = {"a": [1], "b": [0], "c": [1, 1], "d": [0, 0], "e": [0, 0], "f": [1, 1, 1]}
    table = table_of(sizes, dict.fromkeys(sizes, 0))
    labels, n_fixed = significance.label_vectors(table, 500, seed=0)
    singles = [(1, 0), (0, 1)]
    pairs = [(1, 1, 0, 0, 0, 0), (0, 0, 1, 1, 0, 0), (0, 0, 0, 0, 1, 1)]
    expected = {(*s, *p, 1, 1, 1) for s, p in itertools.product(singles, pairs)}
    assert {tuple(each) for each in labels.tolist()} == expected
    assert n_fixed == 1
    again, _ = significance.label_vectors(table, 500, seed=0)
    other, _ = significance.label_vectors(table, 500, seed=1)
    assert (again == labels).all() and (other != labels).any()


def test_exchanges_keep_folds_and_subjects_with_both_labels():
    sizes = {"a": [1], "b": [0], "c": [1], "d": [1], "e": [1, 0], "g": [0, 1], "h": [0, 0]}
    fold_of = {"a": 0, "b": 0, "c": 1, "d": 1, "e": 0, "g": 0, "h": 0}
    labels, n_fixed = significance.label_vectors(table_of(sizes, fold_of), 100, seed=0)
    assert {tuple(each) for each in labels.tolist()} == {
        (*ab, 1, 1, 1, 0, 0, 1, 0, 0) for ab in ((1, 0), (0, 1))
    }
    assert n_fixed == 5


def test_a_scan_that_every_fold_explains_is_exchanged_in_all():
    table = pd.concat(
        [
            pd.DataFrame({"path": ["a", "b", "c", "d"], "label": [1, 0, 0, 1], "fold": fold})
            for fold in (0, 1)
        ],
        ignore_index=True,
    )
    labels, n_fixed = significance.label_vectors(table, 200, seed=0)
    assert n_fixed == 0 and (labels[:, :4] == labels[:, 4:]).all()
    assert len(np.unique(labels, axis=0)) == 6


def test_label_p_against_a_plain_loop():
    scan_maps = make_scan_maps(is_contrast=True)
    inside = np.arange(N_VOXELS) < 6
    measure = partial(overlap.dice_matched, inside=inside)
    found, n_fixed = significance.label_p(scan_maps, measure, 99, seed=3)
    rows, own = list(range(len(scan_maps.table))), scan_maps.table["label"].to_numpy()
    labels, _ = significance.label_vectors(scan_maps.table, 99, seed=3)
    null = [measure(plain_mean(scan_maps, rows, each)) for each in labels]
    observed = measure(plain_mean(scan_maps, rows, own))
    assert found == (1 + np.sum(np.array(null) >= observed)) / 100 and n_fixed == 0


def test_nobody_can_change():
    sizes = {"a": [1], "b": [0, 0]}
    table = table_of(sizes, {"a": 0, "b": 0})
    scan_maps = ScanMaps(np.zeros((3, N_VOXELS), np.float32), table, True)
    found, n_fixed = significance.label_p(scan_maps, np.max, 9, 0)
    assert np.isnan(found) and n_fixed == 2


def test_draws_are_shared_by_maps_of_the_same_scans():
    """So a map and its double have an error, and their difference the error of one of them."""
    scan_maps = make_scan_maps(is_contrast=False)
    double = ScanMaps(2 * scan_maps.values, scan_maps.table, False)
    one, other = (significance.draws(each, [np.max], 0) for each in (scan_maps, double))
    assert one.shape == (significance.N_ERROR_DRAWS, 1) and one.std() > 0
    assert other == pytest.approx(2 * one)
    errors = [significance.standard_errors(each)[0] for each in (one, other, other - one)]
    assert errors == pytest.approx([errors[0], 2 * errors[0], errors[0]])


def test_halves_and_folds():
    """Maps that differ by their fold only are stable over scans; unrelated ones are not."""
    scan_maps = make_scan_maps(is_contrast=False)
    of_fold = np.random.default_rng(0).standard_normal((2, N_VOXELS)).astype(np.float32)
    values = of_fold[scan_maps.table["fold"]]
    assert significance.half_r(ScanMaps(values, scan_maps.table, False), 0) == pytest.approx(1)
    assert abs(significance.half_r(scan_maps, 0)) < 0.2
    assert significance.fold_r(of_fold) == pytest.approx(np.corrcoef(of_fold)[0, 1])
    assert np.isnan(significance.fold_r(of_fold[:1]))
    alone = scan_maps.table.assign(subject=scan_maps.table["fold"].astype(str))
    assert np.isnan(significance.half_r(ScanMaps(values, alone, False), 0))


@pytest.mark.parametrize("digits", [0, 1, 8])
def test_average_precision_is_that_of_scikit_learn(digits):
    rng = np.random.default_rng(digits)
    values, inside = rng.standard_normal(500).round(digits), rng.random(500) < 0.1
    found = overlap.average_precision(values, inside)
    assert found == pytest.approx(average_precision_score(inside, values), abs=1e-12)


# Calibration: maps of scans through fixed networks, drawn as real ones vary

GRID = (15, 17, 13)
N_SIMULATIONS = 1000
FOLD_SUBJECTS = (18, 15, 12, 9, 6)  # a third of them patients, with one to three scans each
GROUND = np.moveaxis(np.indices(GRID), 0, -1).reshape(-1, 3)
TO_CENTRE = np.linalg.norm(GROUND - (np.array(GRID) - 1) / 2, axis=1)
IN_HEAD = TO_CENTRE < 6.5
BIASES = {
    "none": np.ones(len(GROUND)),
    "central": np.exp(-((TO_CENTRE / 4) ** 2)),
    "grey matter": gaussian_filter(np.random.default_rng(5).random(GRID), 1).ravel() ** 8,
}
REFERENCE = (np.linalg.norm(GROUND - (5, 9, 6), axis=1) < 2)[IN_HEAD]
DICE = partial(overlap.dice_matched, inside=REFERENCE)
PRECISION = partial(overlap.average_precision, inside=REFERENCE)


def smooth_noise(rng: np.random.Generator, n: int) -> np.ndarray:
    """Return smooth random maps, (n, voxels of the head), of standard deviation about 1."""
    noise = rng.standard_normal((n, *GRID)).astype(np.float32)
    return 8 * gaussian_filter(noise, (0, 1.2, 1.2, 1.2)).reshape(n, -1)[:, IN_HEAD]


def simulate(
    rng: np.random.Generator, networks: np.ndarray, bias: np.ndarray, is_contrast: bool,
    effect: float = 0.0,
) -> ScanMaps:  # fmt: skip
    """Return maps of a fresh cohort through fixed networks: unequal folds, several scans each."""
    folds = np.repeat(np.arange(len(FOLD_SUBJECTS)), FOLD_SUBJECTS)
    labels = np.concatenate([np.arange(n) % 3 == 0 for n in FOLD_SUBJECTS]).astype(int)
    n_scans = 1 + np.arange(len(folds)) // 3 % 3
    subject = np.repeat(np.arange(len(folds)), n_scans)
    table = pd.DataFrame({"path": np.arange(len(subject)).astype(str), "label": labels[subject],
                          "fold": folds[subject], "subject": subject})  # fmt: skip
    of_subjects, of_scans = smooth_noise(rng, len(folds)), smooth_noise(rng, len(subject))
    values = networks[folds[subject]] + of_subjects[subject] + 0.7 * of_scans
    values += effect * np.outer(1.0 if not is_contrast else labels[subject], REFERENCE)
    scaled = (values * bias[IN_HEAD] / bias[IN_HEAD].mean()).astype(np.float32)
    return ScanMaps(scaled, table, is_contrast)


def make_networks(seed: int) -> np.ndarray:
    """Return what each fold's network adds to every scan's map."""
    return smooth_noise(np.random.default_rng(seed), len(FOLD_SUBJECTS))


@pytest.mark.slow
@pytest.mark.parametrize("bias", BIASES)
def test_label_p_keeps_its_level(bias):
    """Labels have nothing to do with the maps, whatever shape these have: 5 % fall below 5 %."""
    rng, n_low = np.random.default_rng(1), 0
    networks = make_networks(2)
    for seed in range(N_SIMULATIONS):
        scan_maps = simulate(rng, networks, BIASES[bias], is_contrast=True)
        n_low += significance.label_p(scan_maps, DICE, 199, seed)[0] <= 0.05
    print(f"label_p, {bias}: {100 * n_low / N_SIMULATIONS:.1f} % below 5 %")
    assert 0.03 <= n_low / N_SIMULATIONS <= 0.07


@pytest.mark.slow
@pytest.mark.parametrize("is_contrast", [False, True])
@pytest.mark.parametrize("bias", BIASES)
def test_errors_are_those_over_fresh_cohorts(bias, is_contrast):
    """The mean error against the sd over cohorts; ± 2 errors of a paired difference cover."""
    rng, networks = np.random.default_rng(3), [make_networks(seed) for seed in (4, 5)]
    found, errors = [], []
    for seed in range(N_SIMULATIONS):
        one = simulate(rng, networks[0], BIASES[bias], is_contrast, effect=1.0)
        shift = (networks[1] - networks[0])[one.table["fold"]] * 0.5 + 0.7 * smooth_noise(
            rng, len(one.table)
        )
        other = ScanMaps((one.values + shift).astype(np.float32), one.table, is_contrast)
        ones = np.ones((1, len(one.table)))
        values = [m.measured(m.weights(ones), [DICE, PRECISION])[0] for m in (one, other)]
        draws = [significance.draws(m, [DICE, PRECISION], seed) for m in (one, other)]
        found.append([*values[0], *(values[0] - values[1])])
        pairs = (draws[0], draws[0] - draws[1])
        errors.append(np.concatenate([significance.standard_errors(each) for each in pairs]))
    found, errors = np.array(found), np.array(errors)
    ratio = errors[:, :2].mean(0) / found[:, :2].std(0, ddof=1)
    covered = (np.abs(found - found.mean(0)) <= 2 * errors)[:, 2:].mean(0)
    kind = "contrast" if is_contrast else "map"
    print(f"{kind}, {bias}: mean {found[:, :2].mean(0).round(2)}, error over sd "
          f"{ratio.round(2)}, differences covered {covered.round(3)}")  # fmt: skip
    assert (ratio > 0.9).all() and (ratio < 1.25).all()
    is_near_perfect = found[:, :2].mean(0) > 0.98
    assert (covered >= np.where(is_near_perfect, 0.8, 0.9)).all()
