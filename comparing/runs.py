"""Runs of train_cv.py and svm.py side by side: chosen among by validation, tested in pairs."""

from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd

from reporting import metrics
from run_folder import files
from utils import InputError, printable

METRICS_SHOWN = ("roc_auc", "accuracy", "balanced_accuracy", "sensitivity", "specificity")
OF_TRAINING = ("valid_loss", "valid_roc_auc", "learned")
PICTURES = {"loss_curves.png": "losses per epoch", "roc.png": "ROC curves of held-out scans"}
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_NAME_SHOWN = 80


@dataclass(frozen=True)
class Run:
    """What a run left: `metrics` is indexed by fold, `predictions` has a row a scan."""

    name: str
    folder: Path
    metrics: pd.DataFrame
    predictions: pd.DataFrame
    verdict: metrics.Verdict
    pictures: list[Path]


def load_runs(folders: list[Path]) -> list[Run]:
    """Read what runs left; an InputError if one is no finished run, or given twice."""
    runs = [_load_run(folder) for folder in folders]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise InputError("--run: a folder is given twice")
    return runs


def _load_run(folder: Path) -> Run:
    """Read what a run left."""
    record_path, splits_path = folder / "run.json", folder / "splits.csv"
    try:
        table = files.read_csv(folder / "metrics.csv", {"fold": str, "n": float} |
                               dict.fromkeys(METRICS_SHOWN, float))  # fmt: skip
        table = table.dropna(subset="fold")
        predictions = files.read_csv(folder / "predictions.csv", metrics.PREDICTION_COLUMNS)
        record = files.read_json(record_path) if record_path.is_file() else {}
        splits = files.read_csv(splits_path, {"path": str}) if splits_path.is_file() else None
        missing = set(metrics.SUMMARY_ROWS) - set(table["fold"])
        if not table["fold"].is_unique or missing:
            raise InputError(f"metrics.csv must have one row each of {', '.join(sorted(missing))}")
        verdict = metrics.verdict(table)
        if verdict is None or predictions["path"].duplicated().any():
            raise InputError("metrics.csv and predictions.csv are not those of a run")
    except InputError as error:
        raise InputError(f"--run {folder} is no finished run: {error}") from None
    if splits is not None and "subject" in splits and splits["path"].is_unique:
        subjects = splits.set_index("path")["subject"].astype(str)
        predictions["subject"] = subjects.reindex(predictions["path"]).to_numpy()
    name = printable(str(record.get("model", folder.name)))[:MAX_NAME_SHOWN]
    pictures = [folder / each for each in PICTURES if (folder / each).is_file()]
    pictures = [path for path in pictures if path.read_bytes().startswith(PNG_SIGNATURE)]
    return Run(name, folder, table.set_index("fold"), predictions, verdict, pictures)


def runs_table(runs: list[Run]) -> pd.DataFrame:
    """Return a row a run, lowest mean validation loss first: to choose by, and what was tested.

    The columns test_… say how well the held-out scans were told apart: whoever chooses by them
    reports what luck added.
    """
    rows = []
    for run in runs:
        folds = run.metrics[run.metrics.index.str.isdigit()]
        of_training = {name: folds[name].astype(float) for name in OF_TRAINING if name in folds}
        auc = [run.metrics.loc[row, "roc_auc"] for row in metrics.SUMMARY_ROWS[:3]]
        rows.append(
            {
                "run": run.name,
                "folder": str(run.folder),
                "folds": len(folds),
                **{name: of_training.get(name, pd.Series([np.nan])).mean()
                   for name in OF_TRAINING},
                **dict(zip(("test_roc_auc", "test_low", "test_high"), auc, strict=True)),
            }
        )  # fmt: skip
    return pd.DataFrame(rows).sort_values("valid_loss", kind="stable", ignore_index=True)


def differences(runs: list[Run], seed: int) -> pd.DataFrame:
    """Return for each pair of runs of the same scans the difference of their mean fold ROC AUCs.

    The ends of the 95 % interval are percentiles of bootstrap draws of subjects, the same for both
    runs, within folds and labels where both have the same folds, else within labels.
    """
    rows = []
    for first, second in combinations(runs, 2):
        one, other = (run.predictions.set_index("path") for run in (first, second))
        if set(one.index) != set(other.index):
            continue
        other = other.loc[one.index]
        if (one["label"] != other["label"]).any():
            continue
        is_paired = (one["fold"] == other["fold"]).all()
        one, other = one.reset_index(), other.reset_index()
        subjects = one.get("subject")
        subjects = None if subjects is None or subjects.isna().any() else subjects
        table = one if is_paired else one.assign(fold=0)
        unit, stratum = metrics.units_and_strata(table, subjects)
        values = [metrics.fold_means(each, np.ones((1, len(unit))))["roc_auc"][0]
                  for each in (one, other)]  # fmt: skip
        draws = pd.concat(
            metrics.fold_means(one, weights)["roc_auc"]
            - metrics.fold_means(other, weights)["roc_auc"]
            for weights in metrics.bootstrap_weights(unit, stratum, seed)
        )
        tail = (100 - metrics.CONFIDENCE_PERCENT) / 200
        rows.append(
            {
                "run": first.name,
                "other": second.name,
                "difference": values[0] - values[1],
                "low": draws.quantile(tail),
                "high": draws.quantile(1 - tail),
                "n_scans": len(unit),
                "n_subjects": len(np.unique(unit)),
                "same_folds": bool(is_paired),
            }
        )
    return pd.DataFrame(rows)
