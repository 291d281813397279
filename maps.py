"""Means of maps that hold only their sums, and what the table says of each explained scan."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

import ranks

OUTCOMES = ("TP", "TN", "FP", "FN")


@dataclass
class RunningMean:
    """A mean of volumes that holds only their sum."""

    total: np.ndarray | None = None
    n: int = 0

    def add(self, data: np.ndarray, n: int = 1) -> None:
        """Take in a volume, shape (D, H, W), that is the mean of `n`."""
        if self.total is None:
            self.total = np.zeros(data.shape)
        self.total += data if n == 1 else n * data.astype(np.float64)
        self.n += n

    def mean(self) -> np.ndarray:
        """Return the mean volume, float64."""
        return self.total / self.n

    def gather(self, volume_shape: tuple[int, int, int]) -> None:
        """Add up what all processes of the job have taken in."""
        self.n = sum(ranks.gathered(self.n))
        if self.n:
            self.total = np.zeros(volume_shape) if self.total is None else self.total
            ranks.add_up(self.total)


@dataclass
class FoldResult:
    """What one method has gathered over a fold's scans.

    Attributes
    ----------
    mean : RunningMean
        Over all of the fold's scans.
    by_outcome : dict of str to RunningMean
        Over the fold's scans with that outcome.
    rows : dict of int to dict
        The scans' rows of {M}_predictions.csv, by their place in the cohort.
    """

    mean: RunningMean = field(default_factory=RunningMean)
    by_outcome: dict = field(default_factory=lambda: {name: RunningMean() for name in OUTCOMES})
    rows: dict[int, dict] = field(default_factory=dict)

    def add(self, row: int, described: dict, map_data: np.ndarray, by_outcome: bool) -> None:
        """Take in a scan's row of the table and its map."""
        self.rows[row] = described
        self.mean.add(map_data)
        if by_outcome:
            self.by_outcome[described["outcome"]].add(map_data)

    def gather(self, volume_shape: tuple[int, int, int]) -> None:
        """Put together what all processes of the job have."""
        for mean in (self.mean, *self.by_outcome.values()):
            mean.gather(volume_shape)
        rows = {k: row for part in ranks.gathered(self.rows) for k, row in part.items()}
        self.rows = dict(sorted(rows.items()))


# Scans


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


def describe_scans(
    method: str, fold: int, maps_data: np.ndarray, zero_logits: Tensor, paths: list[str],
    labels: Tensor, logits: Tensor, targets: Tensor,
) -> list[dict]:  # fmt: skip
    """Return the rows of {M}_predictions.csv of a batch of scans.

    Parameters
    ----------
    method : str
    fold : int
    maps_data : array, shape (N, D, H, W)
    zero_logits : Tensor, shape (2,)
        Of the zero volume.
    paths : list of str, length N
    labels : int Tensor, shape (N,)
    logits : Tensor, shape (N, 2)
    targets : int Tensor, shape (N,)
    """
    rows = []
    for i, path in enumerate(paths):
        label, predicted, target = int(labels[i]), int(logits[i].argmax()), int(targets[i])
        logit, total = float(logits[i, target]), float(maps_data[i].sum(dtype=np.float64))
        error = completeness_error(method, total, logit, float(zero_logits[target]))
        row = {
            "path": path,
            "label": label,
            "fold": fold,
            "predicted": predicted,
            "probability": float(torch.softmax(logits[i].double(), 0)[1]),
            "outcome": outcome_of(label, predicted),
            "logit": logit,
            "map_sum": total,
            "completeness_error": error,
        }
        rows.append(row)
    return rows
