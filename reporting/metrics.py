"""How well a classifier did on the scans that it had not seen, and what its maps are worth."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pandas as pd
from scipy.special import log_softmax

from reporting import bootstrap
from run_folder import files
from utils import InputError, RunError, named

CONFIDENCE_PERCENT = 95
LEARNED_GAIN = 0.05  # of the labels' entropy, by which the kept weights' training loss is below it
CHANCE = 0.5  # of the area under the ROC curve
SUMMARY_ROWS = ("mean", "mean_low", "mean_high", "sd", "pooled", "pooled_low", "pooled_high")
COUNTS = ("n", "tp", "tn", "fp", "fn")
WHOLE = ("epoch", "learned", "draw")
SCORED = ("label", "probability", "predicted")
DRAW_COLUMNS = {  # of training_f*.csv, a row a draw of weights
    "draw": int, "epoch": int, "valid_loss": float, "valid_roc_auc": float,
    "train_loss_kept": float, "label_entropy": float, "learned": int, "kept": int,
}  # fmt: skip
PREDICTION_COLUMNS = {
    "path": str, "label": int, "fold": int, "probability": float, "predicted": int,
}  # fmt: skip


def roc_auc(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the share of pairs of labels 1, 0 ranked right, ties half; NaN without a class.

    Labels and scores have shape (n,); weights, (draws, n), say how often each scan counts.
    """
    order = np.argsort(scores)
    starts = np.flatnonzero(np.diff(scores[order], prepend=np.nan) != 0)  # of equal scores
    positive, negative = (
        np.add.reduceat(weights[:, order] * (labels[order] == label), starts, axis=1)
        for label in (1, 0)
    )
    below = negative.cumsum(1) - negative / 2
    with np.errstate(invalid="ignore"):
        return (positive * below).sum(1) / (positive.sum(1) * negative.sum(1))


def binary_metrics(predictions: pd.DataFrame, weights: np.ndarray | None = None) -> pd.DataFrame:
    """Return the metrics of predictions, label 1 positive, a row a draw; NaN without a class.

    The predictions have a row a scan; weights, (draws, n), say how often each scan counts in each
    draw (left out: once, in one draw).
    """
    labels, probabilities, predicted = (predictions[column].to_numpy() for column in SCORED)
    weights = np.ones((1, len(labels))) if weights is None else weights
    tp, tn, fp, fn = (
        weights @ ((labels == label) & (predicted == said)).astype(float)
        for label, said in ((1, 1), (0, 0), (0, 1), (1, 0))
    )
    with np.errstate(invalid="ignore"):
        sensitivity, specificity = tp / (tp + fn), tn / (tn + fp)
    metrics = {
        "n": weights.sum(1),
        "accuracy": (tp + tn) / weights.sum(1),
        "balanced_accuracy": (sensitivity + specificity) / 2,
        "sensitivity": sensitivity,
        "specificity": specificity,
        "roc_auc": roc_auc(labels, probabilities, weights),
        "tp": tp, "tn": tn, "fp": fp, "fn": fn,
    }  # fmt: skip
    return pd.DataFrame(metrics)


def fold_means(predictions: pd.DataFrame, weights: np.ndarray) -> pd.DataFrame:
    """Return each metric's mean over the folds that have it, a row a draw."""
    rows_of_fold = predictions.groupby("fold").indices.values()
    of_folds = [binary_metrics(predictions.iloc[rows], weights[:, rows]) for rows in rows_of_fold]
    return pd.concat(of_folds).groupby(level=0).mean()


def interval_of_mean(mean: pd.Series, draws: pd.DataFrame, n_units: int) -> np.ndarray:
    """Return the ends of each metric's interval, (2, metrics): Wilson's, doi:10.2307/2276774.

    Its number of trials is that of a proportion whose standard deviation is the draws', at most two
    a unit: so a mean of 1.00 has an interval, too. Counts have none.
    """
    z = NormalDist().inv_cdf(0.5 + CONFIDENCE_PERCENT / 200)
    variance = draws.var().clip(lower=mean * (1 - mean) / (2 * n_units))
    with np.errstate(invalid="ignore", divide="ignore"):
        n = (mean * (1 - mean) / variance).fillna(2 * n_units)
        half = z / (1 + z**2 / n) * np.sqrt(mean * (1 - mean) / n + (z / n / 2) ** 2)
    middle = (mean + z**2 / n / 2) / (1 + z**2 / n)
    ends = pd.DataFrame([middle - half, middle + half])
    ends[list(COUNTS)] = np.nan
    return ends.to_numpy()


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


def metrics_table(
    predictions: pd.DataFrame, subjects: pd.Series | None, seed: int,
    of_training: pd.DataFrame | None = None,
) -> pd.DataFrame:  # fmt: skip
    """Return metrics per fold 0 … k−1, then their mean and sd, and those of all scans pooled.

    `_low` and `_high` are the ends of 95 % intervals from bootstrap draws of whole subjects, if
    there are any: for means within folds and labels, for pooled values among all scans.

    Parameters
    ----------
    predictions : DataFrame
        A row a scan: fold, label, probability and predicted.
    of_training : DataFrame, optional
        Columns to add to the rows of folds 0 … k−1.
    """
    unit, stratum = bootstrap.units_and_strata(predictions, subjects)
    by_fold = predictions.groupby("fold")
    per_fold = pd.concat([binary_metrics(rows) for _, rows in by_fold])
    mean, one = per_fold.mean(), np.zeros_like(stratum)
    of_mean = [fold_means(predictions, w) for w in bootstrap.draws(unit, stratum, seed)]
    of_all = [binary_metrics(predictions, w) for w in bootstrap.draws(unit, one, seed)]
    tail = (100 - CONFIDENCE_PERCENT) / 200
    rows = [
        mean,
        *interval_of_mean(mean, pd.concat(of_mean), len(np.unique(unit))),
        per_fold.std(),
        binary_metrics(predictions).iloc[0],
        *pd.concat(of_all).quantile([tail, 1 - tail]).to_numpy(),
    ]
    summary = pd.DataFrame(np.array(rows), index=SUMMARY_ROWS, columns=per_fold.columns)
    per_fold.index = [str(fold) for fold, _ in by_fold]
    if of_training is not None:
        per_fold = per_fold.join(of_training.set_axis(per_fold.index))
    table = pd.concat([per_fold, summary]).rename_axis("fold").reset_index()
    for name in {*COUNTS, *WHOLE} & {*table}:  # a column of floats would show 5 as 5.0
        values = (int(value) if value % 1 == 0 else value for value in table[name])
        table[name] = pd.Series(list(values), dtype=object)
    return table


def as_text(table: pd.DataFrame) -> str:
    """Return a table for the terminal and the log."""
    return table.to_string(index=False, float_format="{:.3f}".format, na_rep="–")


@dataclass(frozen=True)
class Verdict:
    """What classifiers found in scans that they had not seen, and whether maps of them can tell."""

    sentence: str
    short: str  # for the title of a map
    is_void: bool  # maps explain nothing
    is_doubtful: bool  # nor do those of some folds


def verdict(table: pd.DataFrame) -> Verdict | None:
    """Judge a `metrics_table`; None where it is none, or older than the interval of its mean."""
    rows = table.set_index("fold")
    try:
        value, low, high = (float(rows["roc_auc"][row]) for row in SUMMARY_ROWS[:3])
        folds = rows[rows.index.str.isdigit()]
        n_patients, n_controls = folds["tp"] + folds["fp"], folds["tn"] + folds["fn"]
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    of_one_class = folds.index[(n_patients == 0) | (n_controls == 0)]
    unlearned = named("fold", folds.index[folds["learned"] == 0]) if "learned" in folds else ""
    auc = f"ROC AUC {value:.2f} [{low:.2f}, {high:.2f}]"
    n_scans = int(sum(folds[count].sum() for count in COUNTS[1:]))
    found = [f"{auc}, the mean of {len(folds)} folds on {n_scans} held-out scans"]
    if not low > CHANCE:
        found.append(f"its interval does not lie above {CHANCE}, which is chance")
    if len(of_one_class):
        found.append(f"{named('fold', of_one_class)} predicted one class only")
    if unlearned:
        found.append(f"{unlearned} did not learn")
    is_void = not low > CHANCE or ("learned" in folds and not folds["learned"].any())
    sentence, short = "; ".join(found) + ".", auc
    if is_void:
        sentence, short = f"{sentence} Maps explain nothing.", f"{auc}: explains nothing"
    elif unlearned:
        sentence = f"{sentence} Maps of {unlearned} explain nothing."
        short = f"{auc}, {unlearned} not learned"
    return Verdict(sentence, short, is_void, is_void or bool(unlearned))


def read_verdict(folder: Path) -> Verdict | None:
    """Judge a run by its metrics.csv; None where there is none that can be judged."""
    try:
        return verdict(files.read_csv(folder / "metrics.csv", {"fold": str, "roc_auc": float}))
    except InputError:
        return None


def entropy(labels: np.ndarray) -> float:
    """Return the entropy of labels 0 and 1: the loss of knowing only how many are patients."""
    shares = np.bincount(labels, minlength=2) / len(labels)
    return float(-sum(share * np.log(share) for share in shares if share))


def _loss(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean cross-entropy of logits (n, 2)."""
    return float(-log_softmax(logits, axis=1)[np.arange(len(labels)), labels].mean())


def of_training(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Judge kept weights by the scans that they were trained on: have they learned?"""
    loss, of_labels = _loss(logits, labels), entropy(labels)
    is_learned = loss <= (1 - LEARNED_GAIN) * of_labels
    return {"train_loss_kept": loss, "label_entropy": of_labels, "learned": int(is_learned)}


def of_validation(logits: np.ndarray, labels: np.ndarray, place: str) -> dict[str, float]:
    """Return an epoch's validation loss, accuracy and ROC AUC; a RunError unless it is finite."""
    loss = _loss(logits, labels)
    if not np.isfinite(loss):
        raise RunError(f"the validation loss is not finite in {place}; a smaller --lr may help")
    scores = logits[:, 1] - logits[:, 0]
    return {
        "valid_loss": loss,
        "valid_accuracy": float((logits.argmax(1) == labels).mean()),
        "valid_roc_auc": float(roc_auc(labels, scores, np.ones((1, len(labels))))[0]),
    }


def read_kept(outpath: Path, fold: int) -> pd.Series:
    """Return what training_f*.csv says of the draw of weights that a finished fold kept."""
    table = files.read_csv(outpath / f"training_f{fold}.csv", DRAW_COLUMNS)
    return table.loc[table["kept"].idxmax()].drop(["kept", "label_entropy"])


def mean_loss(losses: np.ndarray, sizes: list[int], place: str) -> float:
    """Return an epoch's mean loss per scan; a RunError naming `place` if one is not finite."""
    bad_batches = np.flatnonzero(~np.isfinite(losses))
    if len(bad_batches):
        raise RunError(
            f"the training loss is not finite in {place}, batch {bad_batches[0]}; a smaller --lr "
            "may help"
        )
    return float(np.average(losses, weights=sizes))


def predictions_of(
    fold: int, paths: pd.Series, labels: np.ndarray, logits: np.ndarray
) -> pd.DataFrame:
    """Return a fold's predictions, one row a test scan, from its logits (n, 2)."""
    return pd.DataFrame(
        {
            "path": paths.to_numpy(),
            "label": labels,
            "fold": fold,
            "probability": np.exp(log_softmax(logits, axis=1))[:, 1],
            "predicted": logits.argmax(1),
        }
    )
