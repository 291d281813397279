"""Covariates: the table by hand, a logistic regression in the folds, strata, and the sentence."""

import numpy as np
import pandas as pd
import pytest

from reporting import covariates, metrics

N = 120
LABELS = np.arange(N) % 2
RNG = np.random.default_rng(0)
SPLITS = pd.DataFrame({
    f"fold_{fold}": np.where(np.arange(N) // 2 % 3 == fold, "test", "train") for fold in range(3)
})  # fmt: skip


def test_cohort_table_by_hand():
    labels = np.array([1, 1, 0, 0])
    values = pd.DataFrame({"age": [70.0, 74, 60, 66], "sex": ["f", "m", "m", "m"]})
    values = pd.concat([values, values.assign(age=values["age"] + [1, 2, 3, 4])])
    splits = pd.DataFrame({"fold_0": ["test"] * 4 + ["train"] * 4})
    table = covariates.describe(np.tile(labels, 2), values.reset_index(drop=True), splits)
    table = table.set_index(["covariate", "level", "fold"])
    row = table.loc[("age", "", "0")]
    assert (row["n_patients"], row["patients_mean"], row["controls_mean"]) == (2, 72, 63)
    assert row["patients_sd"] == pytest.approx(np.sqrt(8))
    assert row["standardised_difference"] == pytest.approx(9 / np.sqrt((4 + 9) / 2))
    row = table.loc[("sex", "f", "all")]
    assert (row["patients_mean"], row["controls_mean"]) == (0.5, 0)
    assert row["standardised_difference"] == pytest.approx(0.5 / np.sqrt(0.25 / 2))


def test_a_covariate_that_gives_the_label_away():
    values = pd.DataFrame({"age": 60 + 20 * LABELS + RNG.random(N), "sex": RNG.choice([*"fm"], N)})
    found = covariates.predict(LABELS, values, SPLITS)
    assert len(found) == N and (found["label"] == LABELS).all()
    table = metrics.metrics_table(found, None, 0)
    assert table.set_index("fold").loc["mean", "roc_auc"] == 1
    networks = table.assign(roc_auc=0.9)
    said = covariates.sentence(table, ["age", "sex"], networks)
    assert "age and sex alone, without any scan: ROC AUC 1.00" in said
    assert "The networks' is 0.90: they may have learned age and sex from the scans" in said


def test_covariates_that_tell_nothing_are_no_excuse():
    values = pd.DataFrame({"site": RNG.choice([*"abc"], N), "age": RNG.normal(70, 5, N)})
    table = metrics.metrics_table(covariates.predict(LABELS, values, SPLITS), None, 0)
    auc = table.set_index("fold").loc["mean", "roc_auc"]
    assert 0.3 < auc < 0.65
    said = covariates.sentence(table, ["site", "age"], table.assign(roc_auc=0.9))
    assert "may have learned" not in said


def test_a_level_that_training_has_not_seen_is_no_error():
    site = np.where(SPLITS["fold_1"] == "test", "new", "old")
    values = pd.DataFrame({"site": site, "age": RNG.normal(70, 5, N)})
    assert covariates.predict(LABELS, values, SPLITS)["probability"].notna().all()


def test_strata_by_hand():
    """Tertiles and levels; one with fewer than ten of a class is named without a number."""
    age = np.repeat([60.0, 70, 80], N // 3) + np.linspace(0, 5, N)
    sex = np.where(np.arange(N) < 12, "x", "f")
    predictions = pd.DataFrame({"label": LABELS, "fold": 0, "probability": RNG.random(N)})
    predictions["probability"] += 0.3 * LABELS * (age > 78)
    predictions["predicted"] = (predictions["probability"] > 0.5).astype(int)
    values = pd.DataFrame({"age": age, "sex": sex})
    table = covariates.strata(predictions, values, None, 0)
    assert table["covariate"].tolist() == ["age"] * 3 + ["sex"] * 2
    for row, is_in in zip(table.itertuples(), (age < 68, (age > 68) & (age < 78), age > 78),
                          strict=False):  # fmt: skip
        part = predictions[is_in]
        expected = metrics.roc_auc(
            part["label"].to_numpy(), part["probability"].to_numpy(), np.ones((1, len(part)))
        )[0]
        assert (row.n_patients, row.n_controls) == (20, 20)
        assert row.roc_auc == pytest.approx(expected) and row.low < row.roc_auc < row.high
    few = table.set_index("stratum").loc["x"]
    assert (few["n_patients"], few["n_controls"]) == (6, 6) and np.isnan(few["roc_auc"])
