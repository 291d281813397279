"""Runs of train_cv.py and svm.py side by side: chosen among by validation, tested in pairs."""

from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd

from reporting import bootstrap, metrics
from run_folder import files
from utils import InputError, printable

METRICS_SHOWN = ("roc_auc", "accuracy", "balanced_accuracy", "sensitivity", "specificity")
OF_TRAINING = ("valid_loss", "valid_roc_auc", "learned")
STRATA_COLUMNS = {
    "covariate": str, "stratum": str, "n_patients": int, "n_controls": int, "roc_auc": float,
    "low": float, "high": float,
}  # fmt: skip
PICTURES = {
    "loss_curves.png": "losses per epoch", "roc.png": "ROC curves of held-out scans",
    "cohort.png": "the cohort at a glance",
}  # fmt: skip
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
    covariates: pd.DataFrame | None = None  # a metrics_table of what they tell without any scan
    strata: pd.DataFrame | None = None

    @property
    def names(self) -> list[str]:
        """Of its covariates."""
        known = (
            [] if self.strata is None else dict.fromkeys(map(printable, self.strata["covariate"]))
        )
        return list(known) or ["the covariates"]


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
        of_strata, of_covariates = (
            files.read_csv(folder / name, columns) if (folder / name).is_file() else None
            for name, columns in (("strata.csv", STRATA_COLUMNS),
                                  ("covariates.csv", {"fold": str, "roc_auc": float}))
        )  # fmt: skip
        verdict = metrics.verdict(table)
        if verdict is None or predictions["path"].duplicated().any():
            raise InputError("metrics.csv and predictions.csv are not those of a run")
    except InputError as error:
        raise InputError(f"--run {folder} is no finished run: {error}") from None
    if splits is not None and "subject" in splits and splits["path"].is_unique:
        subjects = splits.set_index("path")["subject"].astype(str)
        subjects = subjects.reindex(predictions["path"])
        if subjects.notna().all():
            predictions["subject"] = subjects.to_numpy()
    name = printable(str(record.get("model", folder.name)))[:MAX_NAME_SHOWN]
    pictures = [folder / each for each in PICTURES if (folder / each).is_file()]
    pictures = [path for path in pictures if path.read_bytes().startswith(PNG_SIGNATURE)]
    table = table.set_index("fold")
    return Run(name, folder, table, predictions, verdict, pictures, of_covariates, of_strata)


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
    tables = [run.predictions.sort_values("path", ignore_index=True) for run in runs]
    drawn: dict[tuple, np.ndarray] = {}  # mean fold ROC AUCs, by run, strata and whose subjects

    def draws_of(index: int, are_same_folds: bool, owner: int) -> np.ndarray:
        table = tables[index]
        if (index, are_same_folds, owner) not in drawn:
            strata = table if are_same_folds else table.assign(fold=0)
            unit, stratum = bootstrap.units_and_strata(strata, tables[owner].get("subject"))
            weights = bootstrap.draws(unit, stratum, seed)
            auc = [metrics.fold_means(table, each)["roc_auc"] for each in weights]
            drawn[index, are_same_folds, owner] = np.concatenate(auc)
        return drawn[index, are_same_folds, owner]

    tail, rows = (100 - metrics.CONFIDENCE_PERCENT) / 200, []
    for first, second in combinations(range(len(runs)), 2):
        one, other = tables[first], tables[second]
        if not one[["path", "label"]].equals(other[["path", "label"]]):
            continue
        alike = [i for i, table in enumerate(tables) if table["path"].equals(one["path"])]
        owner = next((i for i in alike if "subject" in tables[i]), alike[0])
        are_same_folds = one["fold"].equals(other["fold"])
        draws = draws_of(first, are_same_folds, owner) - draws_of(second, are_same_folds, owner)
        auc = [runs[i].metrics.loc["mean", "roc_auc"] for i in (first, second)]
        rows.append(
            {
                "run": runs[first].name,
                "other": runs[second].name,
                "difference": auc[0] - auc[1],
                "low": np.nanquantile(draws, tail),
                "high": np.nanquantile(draws, 1 - tail),
                "n_scans": len(one),
                "n_subjects": tables[owner].get("subject", one["path"]).nunique(),
                "same_folds": are_same_folds,
            }
        )
    return pd.DataFrame(rows)
