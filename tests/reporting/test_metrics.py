"""Metrics against hand-counted tables and scikit-learn."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest, norm
from sklearn import metrics as reference

from reporting import bootstrap, metrics
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


def table_of(label: list, probability: list, predicted: list) -> pd.DataFrame:
    columns = {"label": label, "probability": probability, "predicted": predicted}
    return pd.DataFrame(columns).assign(fold=0)


def test_hand_counted():
    table = table_of([1, 1, 1, 0, 0], [0.9, 0.8, 0.1, 0.2, 0.7], [1, 1, 0, 0, 1])
    found = metrics.binary_metrics(table).iloc[0]
    assert found[["n", "tp", "fn", "tn", "fp"]].tolist() == [5, 2, 1, 1, 1]
    assert found["sensitivity"] == pytest.approx(2 / 3)
    assert found["specificity"] == pytest.approx(1 / 2)
    assert found["balanced_accuracy"] == pytest.approx(7 / 12)
    assert found["roc_auc"] == pytest.approx(4 / 6)  # pairs ranked right: 4 of 3 × 2


def test_one_class_only_has_no_auc():
    found = metrics.binary_metrics(table_of([1, 1, 1], [0.5] * 3, [1, 0, 1])).iloc[0]
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert np.isnan(found["roc_auc"]) and np.isnan(found["specificity"])


def test_weights_count_scans_as_often_as_they_are_drawn():
    """Ties among scores included: the same as a table in which drawn scans are repeated."""
    table, rng = predictions(n=30), np.random.default_rng(1)
    table["probability"] = table["probability"].round(1)
    weights = rng.integers(0, 3, size=(5, len(table)))
    found = metrics.binary_metrics(table, weights)
    for row, counts in enumerate(weights):
        repeated = table.loc[np.repeat(table.index, counts)]
        expected = metrics.binary_metrics(repeated).iloc[0]
        assert found.iloc[row].tolist() == pytest.approx(expected.tolist())
        auc = reference.roc_auc_score(repeated["label"], repeated["probability"])
        assert found["roc_auc"][row] == pytest.approx(auc)


def test_draws_are_of_whole_units_within_strata():
    unit, stratum = np.array(list("aabbccdd")), np.array([0, 0, 0, 0, 1, 1, 1, 1])
    draws = np.concatenate(list(bootstrap.draws(unit, stratum, 0)))
    assert draws.shape == (bootstrap.N_DRAWS, 8)
    assert (draws[:, ::2] == draws[:, 1::2]).all()
    assert (draws[:, :4:2].sum(1) == 2).all() and (draws[:, 4::2].sum(1) == 2).all()
    assert set(draws[:, 0]) == {0, 1, 2}


def test_table_against_sklearn():
    table = predictions()
    found = metrics.metrics_table(table, None, seed=1).set_index("fold")
    assert list(found.index) == ["0", "1", "2", *metrics.SUMMARY_ROWS]
    expected = reference.roc_auc_score(table.label, table.probability)
    assert found.loc["pooled", "roc_auc"] == pytest.approx(expected, rel=1e-12)
    for fold, rows in table.groupby("fold"):
        expected = reference.balanced_accuracy_score(rows.label, rows.predicted)
        assert found.loc[str(fold), "balanced_accuracy"] == pytest.approx(expected)
    folds = found.loc[["0", "1", "2"], "accuracy"]
    assert found.loc["mean", "accuracy"] == pytest.approx(folds.mean())
    assert found.loc["sd", "accuracy"] == pytest.approx(folds.std(ddof=1))
    shares = found.drop(columns=list(metrics.COUNTS)).astype(float)
    for row in ("mean", "pooled"):
        assert (shares.loc[f"{row}_low"] < shares.loc[row]).all()
        assert (shares.loc[f"{row}_high"] > shares.loc[row]).all()


def test_the_interval_of_a_mean_is_wilsons():
    """Of five right of five, each a unit, 95 %: as scipy has it for ten trials, two a unit."""
    mean, draws = pd.Series({"accuracy": 1.0}), pd.DataFrame({"accuracy": [1.0, 1.0]})
    draws = draws.assign(**dict.fromkeys(metrics.COUNTS, 0.0))
    mean = mean.reindex(draws.columns)
    low, high = metrics.interval_of_mean(mean, draws, 5)[:, 0]
    expected = binomtest(10, 10).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx((expected.low, expected.high))
    draws["accuracy"] = [0.6, 0.8]  # a variance of 0.02, that of 0.7 in 10.5 trials
    low, high = metrics.interval_of_mean(mean.where(mean != 1, 0.7), draws, 50)[:, 0]
    n, z = 0.21 / 0.02, 1.959964
    half = z * np.sqrt(0.21 / n + z**2 / n**2 / 4) / (1 + z**2 / n)
    assert high - low == pytest.approx(2 * half) and low < 0.7 < high


def simulated(seed: int, n_scans: int, separations: list[float]) -> pd.DataFrame:
    """Return scores of five networks, each on a scale of its own."""
    rng = np.random.default_rng(seed)
    label, fold = np.arange(n_scans) % 2, np.arange(n_scans) // 2 % 5
    score = np.take(separations, fold) * label + rng.standard_normal(n_scans) + 3 * fold
    return pd.DataFrame({"fold": fold, "label": label, "probability": score, "predicted": label})


def covered(n_cohorts: int, n_scans: int, separations: list[float]) -> float:
    """Return how often the interval holds the true mean of the folds' ROC AUCs."""
    truth = norm.cdf(np.array(separations) / np.sqrt(2)).mean()
    hits = []
    for seed in range(n_cohorts):
        table = simulated(seed, n_scans, separations)
        unit, stratum = bootstrap.units_and_strata(table, None)
        draws = [metrics.fold_means(table, w) for w in bootstrap.draws(unit, stratum, seed)]
        mean = metrics.fold_means(table, np.ones((1, n_scans))).iloc[0]
        ends = metrics.interval_of_mean(mean, pd.concat(draws), n_scans)
        low, high = ends[:, mean.index.get_loc("roc_auc")]
        hits.append(low <= truth <= high)
    return float(np.mean(hits))


@pytest.mark.parametrize("separations", [[1.0] * 5, [3.0] * 5], ids=["0.76", "0.98"])
def test_the_interval_of_the_mean_covers_the_truth(monkeypatch, separations):
    monkeypatch.setattr(bootstrap, "N_DRAWS", 200)
    assert 0.88 <= covered(100, 60, separations) <= 1.0


@pytest.mark.slow
@pytest.mark.parametrize("n_scans", [60, 500])
@pytest.mark.parametrize("separations", [[1.0] * 5, [0.0] * 5, [1, 2, 0.5, 0, 3], [3.0] * 5])
def test_the_interval_of_the_mean_covers_the_truth_in_1000_cohorts(n_scans, separations):
    assert 0.90 <= covered(1000, n_scans, separations) <= 0.98


def folds_of(**columns: list) -> pd.DataFrame:
    """Return a table of metrics with two folds whose mean ROC AUC is 0.8 [0.7, 0.9]."""
    table = pd.DataFrame({"fold": ["0", "1", "mean", "mean_low", "mean_high"],
                          "roc_auc": [0.7, 0.9, 0.8, 0.7, 0.9]})  # fmt: skip
    for name, values in (
        {"tp": [1, 1], "fp": [1, 1], "tn": [1, 1], "fn": [1, 1]} | columns
    ).items():
        table[name] = pd.Series(values, dtype=float)
    return table


@pytest.mark.parametrize(
    ("columns", "sentence", "short", "is_void"),
    [
        ({}, "the mean of 2 folds on 8 held-out scans.", "ROC AUC 0.80 [0.70, 0.90]", False),
        ({"roc_auc": [0.4, 0.6, 0.5, 0.3, 0.7]},
         "its interval does not lie above 0.5, which is chance. Maps explain nothing.",
         "ROC AUC 0.50 [0.30, 0.70]: explains nothing", True),
        ({"learned": [1, 0]}, "fold 1 did not learn. Maps of fold 1 explain nothing.",
         "ROC AUC 0.80 [0.70, 0.90], fold 1 not learned", False),
        ({"learned": [0, 0]}, "folds 0, 1 did not learn. Maps explain nothing.",
         "ROC AUC 0.80 [0.70, 0.90]: explains nothing", True),
        ({"tp": [0, 1], "fp": [0, 1], "learned": [1, 1]}, "fold 0 predicted one class only.",
         "ROC AUC 0.80 [0.70, 0.90]", False),
    ],
)  # fmt: skip
def test_verdict(columns, sentence, short, is_void):
    found = metrics.verdict(folds_of(**columns))
    assert found.sentence.startswith("ROC AUC 0.") and found.sentence.endswith(sentence)
    assert (found.short, found.is_void) == (short, is_void)


def test_no_verdict_of_other_tables():
    assert metrics.verdict(predictions()) is None
    assert metrics.verdict(folds_of().iloc[:3]) is None


def test_whole_numbers_are_shown_as_such():
    table = metrics.metrics_table(predictions(), None, 0)
    text = metrics.as_text(table)
    assert " 60 " in text and "60.0" not in text and " 20 " in text
    assert not table["n"].map(type).eq(float).iloc[0] and "nan" not in text


def test_subjects_widen_the_interval():
    """Ten copies of each scan under one subject tell no more than one copy."""
    table = pd.concat([predictions(n=40)] * 10, ignore_index=True)
    with_subjects, without = (
        metrics.metrics_table(table, subjects, 0).set_index("fold")["accuracy"]
        for subjects in (table["path"], None)
    )
    for row in ("mean", "pooled"):
        width_with = with_subjects[f"{row}_high"] - with_subjects[f"{row}_low"]
        assert width_with > 2 * (without[f"{row}_high"] - without[f"{row}_low"])


def test_mean_loss_counts_a_smaller_batch_by_its_scans():
    losses = np.array([1.0, 2.0, 7.0])
    assert metrics.mean_loss(losses, [3, 3, 1], "") == pytest.approx((3 * 1 + 3 * 2 + 7) / 7)
    with pytest.raises(RunError, match=r"not finite in fold 0, epoch 4, batch 1"):
        metrics.mean_loss(losses * [1, np.nan, 1], [3, 3, 1], "fold 0, epoch 4")


def test_predictions_are_gathered_in_the_cohorts_order(tmp_path):
    table = predictions(n=9)
    for fold, rows in table.groupby("fold"):
        rows.to_csv(tmp_path / f"predictions_f{fold}.csv", index=False)
    found = metrics.gather_predictions(tmp_path, range(3), table["path"])
    assert (found[table.columns] == table).all(axis=None)
    for paths in (table["path"][:-1], pd.concat([table["path"][1:], table["path"][1:2]])):
        with pytest.raises(InputError, match="each scan exactly once"):
            metrics.gather_predictions(tmp_path, range(3), paths)
