"""Welch's t and its permutations: scipy's and nilearn's, and what has no variance."""

import numpy as np
import pandas as pd
import pytest
from nilearn.mass_univariate import permuted_ols
from scipy.stats import ttest_ind

from comparing import group_difference
from utils import InputError

N_VOXELS = 500


def make_values(n_patients: int, n_controls: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return values (n, voxels) far from 0 that differ in some voxels, and who is a patient."""
    rng = np.random.default_rng(seed)
    is_patient = rng.permutation(np.arange(n_patients + n_controls) < n_patients)
    values = 100 + rng.standard_normal((len(is_patient), N_VOXELS)) * (1 + is_patient[:, None])
    values[is_patient, :5] += 3
    return values, is_patient


@pytest.mark.parametrize(("n_patients", "n_controls"), [(7, 12), (2, 2), (9, 9)])
def test_t_is_scipys(n_patients, n_controls):
    values, is_patient = make_values(n_patients, n_controls)
    expected = ttest_ind(values[is_patient], values[~is_patient], equal_var=False).statistic
    found = group_difference.welch_t(values - values[0], is_patient[None])[0]
    assert found == pytest.approx(expected, rel=1e-9)


def test_t_is_0_where_no_group_varies():
    values, is_patient = make_values(5, 6)
    values[:, 7] = 0.1
    values[:, 8] = np.where(is_patient, 0.3, 0.1)
    found = group_difference.welch_t(values - values[0], is_patient[None])[0]
    assert found[7] == found[8] == 0
    assert (found != 0).sum() == N_VOXELS - 2


def test_p_is_nilearns_for_equal_groups():
    """There Welch's t is the pooled one; both draw 2,000 permutations of their own."""
    values, is_patient = make_values(10, 10, seed=4)
    values[is_patient, 5:60] += 2.0  # p between the extremes
    negative_log10_p = permuted_ols(
        is_patient[:, None].astype(float), values, n_perm=2000, two_sided_test=True, random_state=1
    )["logp_max_t"][0]
    expected = 10**-negative_log10_p
    subjects = group_difference.average_scans(pd.Series(range(20)), is_patient.astype(int))
    t = group_difference.welch_t(values - 100, is_patient[None])[0]
    exchanges = subjects.exchanged(2000, seed=0)
    largest = np.abs(subjects.t(values - 100, np.ones(20, bool), exchanges)).max(1)
    found = group_difference.familywise_p(t, largest)
    assert ((found > 0.01) & (found < 0.9)).sum() > 20
    error = np.sqrt(2 * expected * (1 - expected) / 2000)
    assert (np.abs(found - expected) <= 4 * error + 1e-3).all()


def test_p_counts_what_reaches_t():
    t, largest = np.array([0.0, 1.0, -2.0, 5.0]), np.array([3.0, 1.0, 2.0])
    assert group_difference.familywise_p(t, largest).tolist() == [1.0, 1.0, 0.75, 0.25]


def test_scans_of_a_subject_are_averaged_and_mixed_subjects_left_out():
    names = pd.Series(["b", "a", "b", "mixed", "c", "mixed", "b"])
    subjects = group_difference.average_scans(names, np.array([1, 0, 1, 0, 0, 1, 1]))
    scans = np.arange(14.0).reshape(7, 2)
    expected = [scans[[0, 2, 6]].mean(0), scans[1], scans[4]]
    assert (subjects.matrix @ scans) == pytest.approx(np.array(expected))
    assert subjects.labels.tolist() == [1, 0, 0]
    assert subjects.left_out == ["mixed"]
    assert subjects.having(np.arange(7) == 1).tolist() == [False, True, False]


def test_exchanges_keep_the_sizes_and_repeat():
    subjects = group_difference.average_scans(pd.Series(range(9)), np.arange(9) % 3 // 2)
    drawn = subjects.labels[subjects.exchanged(50, seed=3)] == 1
    assert drawn.shape == (50, 9) and (drawn.sum(1) == 3).all()
    assert len(np.unique(drawn, axis=0)) > 20
    assert (drawn == (subjects.labels[subjects.exchanged(50, seed=3)] == 1)).all()
    assert not (drawn == (subjects.labels[subjects.exchanged(50, seed=4)] == 1)).all()
    assert subjects.exchanged(0, seed=3).shape == (0, 9)


def test_too_few_subjects():
    group_difference.check_groups(np.array([0, 0, 1, 1]), "fold 3")
    with pytest.raises(InputError, match="fold 3 has 1 subjects of label 1: a t needs 2"):
        group_difference.check_groups(np.array([0, 0, 1]), "fold 3")


# With covariates


def make_model(seed: int = 0) -> tuple[np.ndarray, np.ndarray, pd.DataFrame]:
    """Return values, labels, and covariates that both of them follow."""
    values, is_patient = make_values(9, 14, seed)
    rng = np.random.default_rng(seed + 1)
    age = 60 + 5 * is_patient + rng.normal(0, 5, len(is_patient))
    site = rng.choice(["a", "b", "c"], len(is_patient))
    values += 0.2 * age[:, None] + (site == "b")[:, None]
    return values, is_patient.astype(int), pd.DataFrame({"age": age, "site": site})


def test_t_with_covariates_is_that_of_least_squares():
    values, labels, covariates = make_model()
    names = pd.Series(range(len(labels)))
    subjects = group_difference.average_scans(names, labels, covariates)
    everyone = np.ones(len(labels), dtype=bool)
    found = subjects.t(values - values[0], everyone, np.arange(len(labels))[None])[0]
    dummies = [(covariates["site"] == level).to_numpy(float) for level in "bc"]
    design = np.column_stack([labels, np.ones(len(labels)), covariates["age"], *dummies])
    inverse = np.linalg.inv(design.T @ design)
    for voxel in range(0, N_VOXELS, 25):
        weights = inverse @ design.T @ values[:, voxel]
        left = values[:, voxel] - design @ weights
        variance = left @ left / (len(labels) - design.shape[1])
        expected = weights[0] / np.sqrt(variance * inverse[0, 0])
        assert found[voxel] == pytest.approx(expected, rel=1e-6)


def test_p_with_covariates_is_nilearns():
    values, labels, covariates = make_model(seed=3)
    values[labels == 1, 5:60] += 3.0
    columns = pd.get_dummies(covariates, drop_first=True).to_numpy(float)
    expected = 10 ** -permuted_ols(
        labels[:, None].astype(float), values, columns, n_perm=2000, two_sided_test=True,
        random_state=1,
    )["logp_max_t"][0]  # fmt: skip
    subjects = group_difference.average_scans(pd.Series(range(23)), labels, covariates)
    everyone = np.ones(23, dtype=bool)
    t = subjects.t(values - 100, everyone, np.arange(23)[None])[0]
    largest = np.abs(subjects.t(values - 100, everyone, subjects.exchanged(2000, seed=0))).max(1)
    found = group_difference.familywise_p(t, largest)
    assert ((found > 0.01) & (found < 0.9)).sum() > 20
    error = np.sqrt(2 * expected * (1 - expected) / 2000)
    assert (np.abs(found - expected) <= 4 * error + 1e-3).all()


def test_covariates_that_determine_the_labels():
    labels = np.arange(12) % 2
    covariates = pd.DataFrame({"scanner": np.where(labels, "new", "old")})
    subjects = group_difference.average_scans(pd.Series(range(12)), labels, covariates)
    with pytest.raises(InputError, match="fold 2: the covariates determine the labels"):
        group_difference.check_model(subjects, np.ones(12, dtype=bool), "fold 2")
