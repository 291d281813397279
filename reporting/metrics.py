"""How well a classifier did on the scans that it had not seen: metrics per fold and pooled."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import rankdata

from run_folder import files
from utils import InputError, RunError, derived_seed

N_BOOTSTRAP = 1000
CONFIDENCE_PERCENT = 95
PREDICTION_COLUMNS = {
    "path": str, "label": int, "fold": int, "probability": float, "predicted": int,
}  # fmt: skip


def roc_auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Return the share of pairs of labels 1, 0 ranked right, ties half; NaN without a class."""
    n_positive = int(labels.sum())
    n_pairs = n_positive * (len(labels) - n_positive)
    if n_pairs == 0:
        return np.nan
    rank_sum = rankdata(scores)[labels == 1].sum()
    return float((rank_sum - n_positive * (n_positive + 1) / 2) / n_pairs)


def binary_metrics(labels: np.ndarray, probabilities: np.ndarray, predicted: np.ndarray) -> dict:
    """Return the metrics of predictions, arrays (n,), label 1 positive; NaN without a class."""
    tp = int(np.sum((labels == 1) & (predicted == 1)))
    tn = int(np.sum((labels == 0) & (predicted == 0)))
    fp = int(np.sum((labels == 0) & (predicted == 1)))
    fn = int(np.sum((labels == 1) & (predicted == 0)))
    sensitivity = tp / (tp + fn) if tp + fn else np.nan
    specificity = tn / (tn + fp) if tn + fp else np.nan
    return {
        "n": len(labels),
        "accuracy": (tp + tn) / len(labels),
        "balanced_accuracy": (sensitivity + specificity) / 2,
        "sensitivity": sensitivity,
        "specificity": specificity,
        "roc_auc": roc_auc(labels, probabilities),
        "tp": tp, "tn": tn, "fp": fp, "fn": fn,
    }  # fmt: skip


def bootstrap_intervals(predictions: pd.DataFrame, unit: pd.Series, seed: int) -> pd.DataFrame:
    """Return each pooled metric's interval; drawn with replacement is `unit`, a value a scan."""
    rng = np.random.default_rng(derived_seed(seed, purpose="bootstrap"))
    rows_of_unit = list(predictions.groupby(unit.to_numpy()).indices.values())
    columns = [predictions[c].to_numpy() for c in ("label", "probability", "predicted")]
    draws = []
    for _ in range(N_BOOTSTRAP):
        drawn = rng.integers(len(rows_of_unit), size=len(rows_of_unit))
        rows = np.concatenate([rows_of_unit[i] for i in drawn])
        draws.append(binary_metrics(*(column[rows] for column in columns)))
    tail = (100 - CONFIDENCE_PERCENT) / 200
    return pd.DataFrame(draws).quantile([tail, 1 - tail])


def gather_predictions(
    outpath: Path, folds: Iterable[int], paths: pd.Series, columns: dict = PREDICTION_COLUMNS
) -> pd.DataFrame:
    """Return all folds' predictions in the order of paths; an InputError unless each has one."""
    table = pd.concat(
        files.read_csv(outpath / f"predictions_f{fold}.csv", columns) for fold in folds
    )
    if sorted(table["path"], key=str) != sorted(paths):
        raise InputError(f"{outpath / 'predictions_f*.csv'} do not predict each scan exactly once")
    return table.set_index("path").loc[paths].reset_index()


def metrics_table(predictions: pd.DataFrame, subjects: pd.Series | None, seed: int) -> pd.DataFrame:
    """Return metrics per fold 0 … k−1, then mean, sd, pooled, pooled_low and pooled_high.

    The last two are a 95 % bootstrap interval, for which whole subjects are drawn, if there are
    any. The predictions have a row a scan, with columns fold, label, probability and predicted.
    """

    def metrics_of(rows: pd.DataFrame) -> dict:
        return binary_metrics(*(rows[c].to_numpy() for c in ("label", "probability", "predicted")))

    per_fold = pd.DataFrame(
        {str(fold): metrics_of(rows) for fold, rows in predictions.groupby("fold")}
    ).T
    unit = pd.Series(range(len(predictions))) if subjects is None else subjects
    intervals = bootstrap_intervals(predictions, unit, seed)
    summary = pd.DataFrame(
        {
            "mean": per_fold.mean(),
            "sd": per_fold.std(),
            "pooled": metrics_of(predictions),
            "pooled_low": intervals.iloc[0],
            "pooled_high": intervals.iloc[1],
        }
    ).T
    return pd.concat([per_fold, summary]).rename_axis("fold").reset_index()


def mean_loss(losses: list[torch.Tensor], sizes: list[int], place: str) -> float:
    """Return an epoch's mean loss per scan; a RunError naming `place` if one is not finite."""
    losses, sizes = torch.stack(losses).double().cpu(), torch.tensor(sizes, dtype=torch.float64)
    bad_batches = (~torch.isfinite(losses)).nonzero().flatten()
    if len(bad_batches):
        raise RunError(
            f"the training loss is not finite in {place}, batch {int(bad_batches[0])}; a smaller "
            "--lr may help"
        )
    return float((losses * sizes).sum() / sizes.sum())


def predictions_of(
    fold: int, paths: pd.Series, labels: np.ndarray, logits: torch.Tensor
) -> pd.DataFrame:
    """Return a fold's predictions, one row a test scan, from its logits (n, 2)."""
    return pd.DataFrame(
        {
            "path": paths.to_numpy(),
            "label": labels,
            "fold": fold,
            "probability": torch.softmax(logits.double(), 1)[:, 1].numpy(),
            "predicted": logits.argmax(1).numpy(),
        }
    )
