"""What age, sex or site tell of the labels without any scan, and the networks within their strata.

Covariates have a row a scan and a column each: numbers, or words.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from reporting import metrics
from run_folder import files

FEW_NUMBERS = 5  # distinct values: a column of numbers with no more is one of codes
N_STRATA = 3  # of a number: tertiles
LEAST_OF_A_CLASS = 10  # in a stratum, for its ROC AUC
NEARLY = 0.05  # of a ROC AUC, below the networks'


def is_coded(values: pd.Series) -> bool:
    """Tell whether a covariate is one of levels: words, or a few numbers that stand for them."""
    return not pd.api.types.is_numeric_dtype(values) or values.nunique() <= FEW_NUMBERS


def describe(labels: np.ndarray, covariates: pd.DataFrame, splits: pd.DataFrame) -> pd.DataFrame:
    """Return cohort.csv: each covariate in patients and controls, in all scans and in each fold.

    Of a number it is the mean and the standard deviation, of a level its share. The standardised
    difference is that of the means over the root of the mean variance. A fold's scans are those it
    tests.
    """
    parts = {"all": np.ones(len(labels), dtype=bool)}
    parts |= {n.removeprefix("fold_"): (splits[n] == "test").to_numpy()
              for n in splits if n.startswith("fold_")}  # fmt: skip
    rows = []
    for name, values in covariates.items():
        columns = {"": values.astype(float)} if not is_coded(values) else {
            str(level): (values == level).astype(float) for level in sorted(values.unique())
        }  # fmt: skip
        for level, column in columns.items():
            for fold, is_member in parts.items():
                groups = [column[is_member & (labels == label)] for label in (1, 0)]
                difference = groups[0].mean() - groups[1].mean()
                spread = np.sqrt(sum(group.var(ddof=0) for group in groups) / 2)
                row = {"covariate": name, "level": level, "fold": fold}
                for group, each in zip(("patients", "controls"), groups, strict=True):
                    row |= {f"n_{group}": len(each), f"{group}_mean": each.mean(),
                            f"{group}_sd": each.std() if level == "" else np.nan}  # fmt: skip
                row["standardised_difference"] = difference / spread if spread else np.nan
                rows.append(row)
    return pd.DataFrame(rows)


def predict(labels: np.ndarray, covariates: pd.DataFrame, splits: pd.DataFrame) -> pd.DataFrame:
    """Return predictions by a logistic regression on the covariates alone, in the same folds.

    It is fitted on the scans that a fold trains and validates on; numbers are standardised, levels
    one-hot. A row a scan: label, fold, probability, predicted.
    """
    from sklearn.compose import make_column_transformer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    coded = [name for name in covariates if is_coded(covariates[name])]
    numbers = [name for name in covariates if name not in coded]
    tables = []
    for fold in range(len([name for name in splits if name.startswith("fold_")])):
        model = make_pipeline(
            make_column_transformer((StandardScaler(), numbers),
                                    (OneHotEncoder(handle_unknown="ignore"), coded)),
            LogisticRegression(max_iter=1000),
        )  # fmt: skip
        is_test = (splits[f"fold_{fold}"] == "test").to_numpy()
        model.fit(covariates[~is_test], labels[~is_test])
        probability = model.predict_proba(covariates[is_test])[:, 1]
        tables.append(
            pd.DataFrame(
                {"label": labels[is_test], "fold": fold, "probability": probability,
                 "predicted": (probability > 0.5).astype(int)}, index=np.flatnonzero(is_test),
            )
        )  # fmt: skip
    return pd.concat(tables).sort_index()


def strata(
    predictions: pd.DataFrame, covariates: pd.DataFrame, subjects: pd.Series | None, seed: int
) -> pd.DataFrame:
    """Return strata.csv: the networks' ROC AUC of all held-out scans within each stratum.

    Strata are levels, and tertiles of numbers. One with few scans of a class has no ROC AUC.
    """
    rows = []
    for name, values in covariates.items():
        if is_coded(values):
            stratum = values.astype(str)
        else:
            stratum = pd.qcut(values, N_STRATA, precision=1, duplicates="drop").astype(str)
        for level in dict.fromkeys(stratum[values.sort_values().index]):
            is_in = (stratum == level).to_numpy()
            of_stratum = predictions[is_in].reset_index(drop=True)
            n_patients = int(of_stratum["label"].sum())
            counts = {"n_patients": n_patients, "n_controls": len(of_stratum) - n_patients}
            row = {"covariate": name, "stratum": level, **counts,
                   **dict.fromkeys(("roc_auc", "low", "high"), np.nan)}  # fmt: skip
            if min(counts.values()) >= LEAST_OF_A_CLASS:
                of_whom = None if subjects is None else subjects[is_in].reset_index(drop=True)
                table = metrics.metrics_table(of_stratum, of_whom, seed).set_index("fold")
                pooled = table.loc[["pooled", "pooled_low", "pooled_high"], "roc_auc"]
                row |= dict(zip(("roc_auc", "low", "high"), pooled, strict=True))
            rows.append(row)
    return pd.DataFrame(rows)


def sentence(table: pd.DataFrame, names: list[str], networks: pd.DataFrame | None) -> str:
    """Return what covariates alone reach, and what it means if that is nearly the networks'.

    Both tables are `metrics.metrics_table`s.
    """
    alone, low, high = (table.set_index("fold")["roc_auc"][r] for r in metrics.SUMMARY_ROWS[:3])
    what = " and ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)
    said = f"{what} alone, without any scan: ROC AUC {alone:.2f} "
    said += f"[{low:.2f}, {high:.2f}] in the same folds."
    if networks is not None:
        found = networks.set_index("fold")["roc_auc"]["mean"]
        if alone > found - NEARLY and alone > metrics.CHANCE + NEARLY:
            said += (
                f" The networks' is {found:.2f}: they may have learned {what} from the scans "
                "instead of the disease, and their maps may show that."
            )
    return said


def write(
    outpath: Path, table: pd.DataFrame, covariates: pd.DataFrame, splits: pd.DataFrame, seed: int,
    networks: pd.DataFrame | None = None,
) -> str:  # fmt: skip
    """Write cohort.csv and covariates.csv; return what the covariates tell.

    `table` has label and, if known, subject of each scan.
    """
    labels = table["label"].to_numpy()
    files.write_csv(outpath / "cohort.csv", describe(labels, covariates, splits))
    found = metrics.metrics_table(predict(labels, covariates, splits), table.get("subject"), seed)
    files.write_csv(outpath / "covariates.csv", found)
    return sentence(found, list(covariates), networks)
