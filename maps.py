"""Means of maps that hold only their sums, and what the table says of each explained scan."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

OUTCOMES = ("TP", "TN", "FP", "FN")


@dataclass
class RunningMean:
    """A mean of volumes that holds only their sum."""

    total: np.ndarray | None = None
    n: int = 0

    def add(self, data: np.ndarray) -> None:
        """Take in one volume, shape (D, H, W)."""
        self.total = data.astype(np.float64) if self.total is None else self.total + data
        self.n += 1

    def mean(self) -> np.ndarray:
        """Return the mean volume, float64."""
        return self.total / self.n


@dataclass
class MethodResults:
    """What one method has gathered so far.

    Attributes
    ----------
    of_fold : RunningMean
        Over the scans of the fold at work.
    over_folds : RunningMean
        Over the means of the finished folds.
    by_outcome : dict of str to RunningMean
        Over all scans with that outcome.
    rows : list of dict
        Of {M}_predictions.csv.
    """

    of_fold: RunningMean = field(default_factory=RunningMean)
    over_folds: RunningMean = field(default_factory=RunningMean)
    by_outcome: dict = field(default_factory=lambda: {name: RunningMean() for name in OUTCOMES})
    rows: list[dict] = field(default_factory=list)


def choose_targets(target: str, labels: Tensor, predicted: Tensor) -> Tensor:
    """Return the class to explain for each scan, int64 of shape (N,)."""
    if target == "label":
        return labels
    return predicted if target == "predicted" else torch.full_like(labels, int(target))


def outcome_of(label: int, predicted: int) -> str:
    """Return TP, TN, FP or FN; label 1 is positive."""
    return ("T" if label == predicted else "F") + ("P" if predicted == 1 else "N")


def completeness_error(method: str, total: float, logit: float, zero_logit: float) -> float:
    """Return how far a map's sum is from what it explains, relative to that; NaN for GGC."""
    explained = {"LRP": logit, "IG": logit - zero_logit}.get(method, np.nan)
    return abs(total - explained) / abs(explained) if explained else np.inf


def describe_scan(
    method: str, fold: int, path: str, label: int, logits: Tensor, target: int, total: float,
    zero_logit: float,
) -> dict:  # fmt: skip
    """Return a scan's row of {M}_predictions.csv."""
    predicted, logit = int(logits.argmax()), float(logits[target])
    return {
        "path": path,
        "label": label,
        "fold": fold,
        "predicted": predicted,
        "probability": float(torch.softmax(logits.double(), 0)[1]),
        "outcome": outcome_of(label, predicted),
        "logit": logit,
        "map_sum": total,
        "completeness_error": completeness_error(method, total, logit, zero_logit),
    }
