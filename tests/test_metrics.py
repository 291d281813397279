"""Metrics against hand-counted tables and scikit-learn."""

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as reference

import metrics


def predictions(seed: int = 0, n: int = 60) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    label = rng.integers(2, size=n)
    probability = np.clip(0.5 + 0.2 * (2 * label - 1) + 0.3 * rng.standard_normal(n), 0, 1)
    return pd.DataFrame(
        {
            "path": [f"{i}.nii" for i in range(n)],
            "fold": np.arange(n) % 3,
            "label": label,
            "probability": probability,
            "predicted": (probability > 0.5).astype(int),
        }
    )


def test_hand_counted():
    label = np.array([1, 1, 1, 0, 0])
    found = metrics.binary_metrics(
        label, np.array([0.9, 0.8, 0.1, 0.2, 0.7]), np.array([1, 1, 0, 0, 1])
    )
    assert (found["tp"], found["fn"], found["tn"], found["fp"]) == (2, 1, 1, 1)
    assert found["sensitivity"] == pytest.approx(2 / 3)
    assert found["specificity"] == pytest.approx(1 / 2)
    assert found["balanced_accuracy"] == pytest.approx(7 / 12)
    assert found["roc_auc"] == pytest.approx(4 / 6)  # pairs ranked right: 4 of 3 × 2


def test_auc_with_ties_is_sklearns():
    rng = np.random.default_rng(3)
    label, score = rng.integers(2, size=50), rng.integers(6, size=50)
    assert metrics.roc_auc(label, score) == pytest.approx(reference.roc_auc_score(label, score))


def test_one_class_only_has_no_auc():
    found = metrics.binary_metrics(np.ones(3, int), np.full(3, 0.5), np.array([1, 0, 1]))
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert np.isnan(found["roc_auc"]) and np.isnan(found["specificity"])


def test_table_against_sklearn():
    table = predictions()
    found = metrics.metrics_table(table, None, seed=1).set_index("fold")
    assert list(found.index) == ["0", "1", "2", "mean", "sd", "pooled", "pooled_low", "pooled_high"]
    expected = reference.roc_auc_score(table.label, table.probability)
    assert found.loc["pooled", "roc_auc"] == pytest.approx(expected, rel=1e-12)
    for fold, rows in table.groupby("fold"):
        expected = reference.balanced_accuracy_score(rows.label, rows.predicted)
        assert found.loc[str(fold), "balanced_accuracy"] == pytest.approx(expected)
    folds = found.loc[["0", "1", "2"], "accuracy"]
    assert found.loc["mean", "accuracy"] == pytest.approx(folds.mean())
    assert found.loc["sd", "accuracy"] == pytest.approx(folds.std(ddof=1))
    assert (found.loc["pooled_low"] <= found.loc["pooled"]).all()
    assert (found.loc["pooled_high"] >= found.loc["pooled"]).all()


def test_interval_of_accuracy_is_the_binomial_one():
    """For one proportion the bootstrap interval is the binomial's, up to sampling."""
    table = predictions(n=400)
    found = metrics.metrics_table(table, None, seed=1).set_index("fold")["accuracy"]
    half_width = 1.96 * np.sqrt(found["pooled"] * (1 - found["pooled"]) / 400)
    assert found["pooled_high"] - found["pooled_low"] == pytest.approx(2 * half_width, rel=0.15)


def test_subjects_widen_the_interval():
    """Ten copies of each scan under one subject tell no more than one copy."""
    table = pd.concat([predictions(n=40)] * 10, ignore_index=True)
    subjects = table["path"]
    with_subjects = metrics.metrics_table(table, subjects, 0).set_index("fold")["accuracy"]
    without = metrics.metrics_table(table, None, 0).set_index("fold")["accuracy"]
    width_with = with_subjects["pooled_high"] - with_subjects["pooled_low"]
    assert width_with > 2 * (without["pooled_high"] - without["pooled_low"])
