"""What train_cv.py left, as heatmap.py sees it: whose checkpoints explain which scans."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from run_folder import checkpoints, files, folds
from utils import InputError


@dataclass(frozen=True)
class TrainedFold:
    """One fold to explain: its number, its checkpoint, and the rows of the scans it explains."""

    number: int
    checkpoint_path: Path
    rows: np.ndarray


def plan(
    modelpath: Path, facts: dict, n_folds: int | None, table: pd.DataFrame, only_held_out: bool
) -> list[TrainedFold]:
    """Return the folds to explain; an InputError if the run is of another model, scans or folds.

    Parameters
    ----------
    modelpath : Path
        The --outpath of train_cv.py, or a folder of checkpoints without run.json.
    facts : dict
        Of the scans and the model to explain: model, volume_shape, affine as run.json has them.
    n_folds : int or None
        --fold.
    table : DataFrame
        The scans: path, label.
    only_held_out : bool
        Each fold explains its test scans only, as splits.csv has them.
    """
    n_folds = _count_folds(modelpath, facts, n_folds)
    if n_folds > len(table):
        raise InputError(f"{n_folds} folds are more than there are scans")
    rows_of_fold = [np.arange(len(table))] * n_folds
    if only_held_out:
        path = modelpath / "splits.csv"
        splits = folds.read(path, table)
        if folds.count(splits) != n_folds:
            raise InputError(f"{path} has {folds.count(splits)} folds, not {n_folds}")
        rows_of_fold = [np.flatnonzero(splits[f"fold_{f}"] == "test") for f in range(n_folds)]
        if not all(map(len, rows_of_fold)):
            raise InputError(f"{path} has a fold that tests no scan")
    return [
        TrainedFold(number, checkpoints.weights_path(modelpath, number), rows)
        for number, rows in enumerate(rows_of_fold)
    ]


def _count_folds(modelpath: Path, facts: dict, n_folds: int | None) -> int:
    """Return how many folds a trained run has, after comparing its record with the facts."""
    if not modelpath.is_dir():
        raise InputError(f"there is no folder --modelpath {modelpath}")
    path = modelpath / "run.json"
    if not path.is_file():
        return n_folds or folds.N_FOLDS
    run = files.read_json(path)
    for key, value in facts.items():
        if not _is_same(run.get(key), value):
            raise InputError(f"{path} says that {key} is {run.get(key)}, not {value}")
    if type(run.get("n_folds")) is not int or run["n_folds"] < 1:
        raise InputError(f"{path} does not say how many folds there are (n_folds)")
    if n_folds not in (None, run["n_folds"]):
        raise InputError(f"{path} says that the run has {run['n_folds']} folds, not {n_folds}")
    return run["n_folds"]


def _is_same(then: object, now: object) -> bool:
    """Tell whether an entry of run.json is this value; numbers may differ by rounding."""
    try:
        return then == now or np.allclose(then, now, rtol=0, atol=1e-3)
    except (TypeError, ValueError, ArithmeticError):
        return False


def checksums(modelpath: Path, plan: list[TrainedFold], only_held_out: bool) -> dict[str, str]:
    """Return the SHA-256 of each file that maps depend on, by its name."""
    paths = [fold.checkpoint_path for fold in plan] + [modelpath / "splits.csv"] * only_held_out
    return {path.name: files.sha256(path) for path in paths}
