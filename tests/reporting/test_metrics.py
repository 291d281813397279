"""Metrics against hand-counted tables and scikit-learn."""

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn import metrics as reference

from reporting import metrics
from utils import InputError, RunError


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


def test_subjects_widen_the_interval():
    """Ten copies of each scan under one subject tell no more than one copy."""
    table = pd.concat([predictions(n=40)] * 10, ignore_index=True)
    with_subjects, without = (
        metrics.metrics_table(table, subjects, 0).set_index("fold")["accuracy"]
        for subjects in (table["path"], None)
    )
    width_with = with_subjects["pooled_high"] - with_subjects["pooled_low"]
    assert width_with > 2 * (without["pooled_high"] - without["pooled_low"])


def test_mean_loss_counts_a_smaller_batch_by_its_scans():
    losses = [torch.tensor(loss) for loss in (1.0, 2.0, 7.0)]
    assert metrics.mean_loss(losses, [3, 3, 1], "") == pytest.approx((3 * 1 + 3 * 2 + 7) / 7)
    with pytest.raises(RunError, match=r"not finite in fold 0, epoch 4, batch 1"):
        metrics.mean_loss([losses[0], losses[1] * np.nan], [3, 3], "fold 0, epoch 4")


def test_predictions_are_gathered_in_the_cohorts_order(tmp_path):
    table = predictions(n=9)
    for fold, rows in table.groupby("fold"):
        rows.to_csv(tmp_path / f"predictions_f{fold}.csv", index=False)
    found = metrics.gather_predictions(tmp_path, range(3), table["path"])
    assert (found[table.columns] == table).all(axis=None)
    for paths in (table["path"][:-1], pd.concat([table["path"][1:], table["path"][1:2]])):
        with pytest.raises(InputError, match="each scan exactly once"):
            metrics.gather_predictions(tmp_path, range(3), paths)
