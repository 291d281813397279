"""What a comparison found, in sentences: whether to believe the maps, which find the reference."""

from pathlib import Path

import numpy as np
import pandas as pd

from comparing.maps import Map, control_path
from comparing.measures import Settings
from comparing.runs import Run
from comparing.space import Space
from reporting import covariates
from reporting.maps import IG_TOLERANCE, LOGITS
from run_folder import files
from utils import InputError, printable

N_ERRORS = 2  # that a map's Dice must lie above chance and above the untrained networks'
REFERENCES = {
    "IG": "integrated gradients (Sundararajan et al. 2017, arXiv:1703.01365)",
    "LRP": "layer-wise relevance propagation with the beta rule (Bach et al. 2015, "
    "doi:10.1371/journal.pone.0130140)",
    "GGC": "guided Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391)",
    "SG": "SmoothGrad (Smilkov et al. 2017, arXiv:1706.03825)",
    "SVM weights": "the weights of a linear support vector machine",
    "SVM pattern": "the activation pattern of a linear support vector machine (Haufe et al. 2014, "
    "doi:10.1016/j.neuroimage.2013.10.067)",
    "Welch's t": "Welch's t of patients minus controls in every voxel",
    "t beside covariates": "the t of the label in every voxel, in a linear model with covariates",
}
OF_PAPER = "Wang et al. 2023, doi:10.1016/j.neuroimage.2023.119929"


def sidecar_path_of(each: Map) -> Path:
    """Return where what is known of a map stands."""
    return each.path.with_name(each.path.name.split(".nii")[0] + ".json")


def read_sidecars(maps: dict[str, Map]) -> dict[str, dict]:
    """Return what is known of each map, nothing without a file; an InputError if it is damaged."""
    sidecars = {}
    for name, each in maps.items():
        path = sidecar_path_of(each)
        sidecars[name] = files.read_json(path) if path.is_file() else {}
        error = sidecars[name].get("median_completeness_error")
        try:
            float(0 if error is None else error)
        except (TypeError, ValueError, OverflowError):
            rule = "median_completeness_error must be a number"
            raise InputError(f"{path}: {rule}") from None
    return sidecars


def verdicts(runs: list[Run], sidecars: dict[str, dict]) -> list[str]:
    """Return what the classifiers found, of the runs and of those that the maps explain."""
    said = [f"{run.name}: {run.verdict.sentence}" for run in runs]
    known = {run.verdict.sentence for run in runs}
    for name, sidecar in sidecars.items():
        verdict = printable(str(sidecar.get("verdict") or ""))
        if verdict and verdict not in known:
            known.add(verdict)
            said.append(f"{name}: {verdict}")
    for run in runs:
        if run.covariates is not None:
            networks = run.metrics.reset_index()
            said.append(f"{run.name}: {covariates.sentence(run.covariates, run.names, networks)}")
    return said or ["No --run was given: nothing says whether these maps are worth a look."]


def warnings_of(runs: list[Run], sidecars: dict[str, dict]) -> list[str]:
    """Return what a reader must know before believing the maps of trained networks."""
    warnings = []
    for run in runs:
        auc = run.metrics.loc[run.metrics.index.str.isdigit(), "roc_auc"]
        warnings += [
            f"{run.name}: fold {fold} is below chance on its held-out scans (ROC AUC {value:.2f})."
            for fold, value in auc[auc < 0.5].items()
        ]
    for name, sidecar in sidecars.items():
        error = float(sidecar.get("median_completeness_error") or 0)
        is_trained_ig = sidecar.get("method") == "IG" and not sidecar.get("random_weights")
        if is_trained_ig and error > IG_TOLERANCE:
            text = f"incomplete attributions, median error {error:.2g}; more --steps lower it."
            warnings.append(f"{name}: {text}")
    return warnings


def judge(table: pd.DataFrame, maps: dict[str, Map]) -> pd.DataFrame:
    """Return by map, controls left out, its Dice, error, control's Dice, and why it `fails`, or "".

    A map finds the reference if its Dice lies above chance, and above that of the untrained
    networks where it is known, by two standard errors; of maps without any, by two standard
    deviations over the folds.
    """
    first = table.drop_duplicates("map").set_index("map")
    name_of = {each.path: name for name, each in maps.items()}
    rows = {}
    for name, each in maps.items():
        if each.is_control:
            continue
        row, control = first.loc[name], name_of.get(control_path(each.path), name)
        error = row.get("dice_matched_se", np.nan)
        error = row.get("dice_matched_folds_sd", np.nan) if np.isnan(error) else error
        floors = [(row["p"], error)]
        if control != name:
            row_of_control = first.loc[control]
            its_error = row_of_control.get("dice_matched_se", 0.0)
            floors.append((row_of_control["dice_matched"], np.hypot(error, its_error)))
        is_above = [row["dice_matched"] > f + N_ERRORS * np.nan_to_num(e) for f, e in floors]
        untrained = floors[1][0] if len(floors) > 1 else np.nan
        fails = "" if is_above[-1] else f"not surely above untrained networks' {untrained:.2f}"
        fails = fails if is_above[0] else "not surely above chance"
        fails = "fewer voxels than the reference" if row["degenerate"] else fails
        rows[name] = {
            "dice": row["dice_matched"], "error": error, "chance": row["p"],
            "untrained": untrained, "fails": fails,
        }  # fmt: skip
    return pd.DataFrame.from_dict(rows, orient="index")


def sentence_of(judged: pd.DataFrame, settings: Settings, is_void: bool) -> str:
    """Return which maps find the reference, and which do not."""
    ranked = judged.sort_values("dice", ascending=False)
    found, others = ranked[ranked["fails"] == ""], ranked[ranked["fails"] != ""]
    said = f"{len(found)} of {len(ranked)} maps overlap the reference better than chance"
    if len(found):
        said += f": {', '.join(f'{name} {dice:.2f}' for name, dice in found['dice'].items())}"
    said += f" (Dice of {settings.how}; chance is {judged['chance'].iloc[0]:.3f})."
    if len(others):
        named = [f"{name} {row['dice']:.2f} ({row['fails']})" for name, row in others.iterrows()]
        said += f" Not so: {', '.join(named)}."
    if is_void:
        said += " But the networks are at chance: do not read their maps."
    return said


def of_stability(table: pd.DataFrame) -> str:
    """Return how stable the maps are, where there is no reference to find."""
    first = table.drop_duplicates("map").set_index("map")
    known = first["fold_r"].dropna()
    said = ", ".join(f"{name} {r:.2f}" for name, r in known.items())
    return f"No reference was given. Correlation of the folds' maps: {said or 'not known'}."


def methods_paragraph(
    table: pd.DataFrame, runs: list[Run], sidecars: dict[str, dict], space: Space,
    settings: Settings, versions: dict[str, str],
) -> str:  # fmt: skip
    """Return a paragraph for a paper: who, what was made, how it was measured, with what."""
    said = []
    for run in runs:
        n_patients, n = int(run.predictions["label"].sum()), len(run.predictions)
        n_folds = int(run.metrics.index.str.isdigit().sum())
        subjects = run.predictions.get("subject")
        of_whom = f" of {subjects.nunique()} subjects" if subjects is not None else ""
        said.append(
            f"{run.name} was trained and tested on {n} T1-weighted scans{of_whom} ({n_patients} of "
            f"patients, {n - n_patients} of controls) in {n_folds}-fold cross-validation (ROC AUC "
            f"{run.verdict.short.removeprefix('ROC AUC ')})."
        )
    made = {}
    for sidecar in sidecars.values():
        method = str(sidecar.get("method"))
        if method in REFERENCES and not sidecar.get("random_weights"):
            given = sidecar.get("parameters")
            given = given if isinstance(given, dict) else {}
            text = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in given.items())
            logit = LOGITS.get(str(sidecar.get("target")), "")
            parts = [part for part in (text, f"explaining {logit}" * bool(logit)) if part]
            made[method] = REFERENCES[method] + (f" [{'; '.join(parts)}]" if parts else "")
    if made:
        said.append(
            f"Maps were made by {'; '.join(made.values())}. Maps of networks are means over "
            "held-out scans within a fold, then over folds."
        )
    signs, widths = ", ".join(settings.signs), ", ".join(f"{w:g}" for w in settings.fwhms_mm)
    said.append(
        f"Signed maps were smoothed by a Gaussian of {widths} mm (full width at half maximum); "
        f"evidence was {signs} of the smoothed map, and all of these settings are reported."
    )
    if space.inside is not None:
        said.append(
            f"Overlap with the reference ({int(space.inside.sum())} of {len(space.inside)} voxels "
            "of the analysis mask) was measured by the Dice coefficient with as many voxels as the "
            "reference has, and by average precision; standard errors are over scans, with the "
            f"networks held fixed ({settings.n_permutations} permutations for p values)."
        )
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    said.append(f"The method is that of {OF_PAPER}. Software: {packages}.")
    return printable(" ".join(said))
