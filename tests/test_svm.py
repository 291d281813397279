"""The SVM: scikit-learn's on the full matrix, in the networks' folds and format."""

import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from conftest import N_FOLDS, N_SCANS, SHAPE, exit_status, train_arguments, write_cohort
from sklearn.svm import SVC

import dataset
import svm
import train_cv
from utils import InputError


def fit(csv_path: Path, outpath: Path, *more: str) -> None:
    argv = ["--path", str(csv_path), "--outpath", str(outpath), "--workers", "0", *more]
    svm.main(svm.parse_args(argv))


@pytest.fixture(scope="module")
def svm_path(cohort_csv, run_path, tmp_path_factory) -> Path:
    """Return the folder of an SVM on the network's folds; tests must not change it."""
    outpath = tmp_path_factory.mktemp("svm")
    fit(cohort_csv, outpath, "--modelpath", str(run_path), "--C", "0.01")
    return outpath


@pytest.fixture(scope="module")
def matrix(cohort_csv) -> tuple[np.ndarray, np.ndarray]:
    """Return all scans as rows, float64, and their labels."""
    cohort = dataset.read_cohort(cohort_csv)
    volumes = cohort.volumes(None, 0)
    return np.stack([volumes[i].ravel() for i in range(N_SCANS)]).astype(float), cohort.labels


def load(path: Path) -> np.ndarray:
    return nib.load(path).get_fdata().ravel()


@pytest.mark.parametrize("fold", range(N_FOLDS))
def test_weights_intercept_and_decisions_are_sklearns(svm_path, run_path, matrix, fold):
    volumes, labels = matrix
    train = (pd.read_csv(run_path / "splits.csv")[f"fold_{fold}"] != "test").to_numpy()
    centred = volumes - volumes[train].mean(0)  # libsvm keeps inner products in float32
    svc = SVC(kernel="linear", C=0.01, tol=1e-9).fit(centred[train], labels[train])
    found = load(svm_path / f"SVM_weights_f{fold}.nii.gz")
    assert np.abs(found - svc.coef_[0]).max() < 1e-6 * np.abs(svc.coef_).max()
    predictions = pd.read_csv(svm_path / "predictions.csv")[~train]
    decisions = predictions["decision"].to_numpy()
    assert decisions == pytest.approx(svc.decision_function(centred[~train]), abs=1e-6)
    assert (predictions["predicted"] == (decisions > 0)).all()
    assert predictions["probability"].to_numpy() == pytest.approx(1 / (1 + np.exp(-decisions)))
    intercepts = pd.read_csv(svm_path / "intercepts.csv")
    assert list(intercepts.columns) == ["fold", "intercept"] and list(intercepts["fold"]) == [0, 1]
    origin = volumes.mean(0)  # of all scans: the decisions' zero point
    expected = decisions - (volumes[~train] - origin) @ found
    assert intercepts["intercept"][fold] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("fold", range(N_FOLDS))
def test_pattern_is_the_covariances(svm_path, run_path, matrix, fold):
    """A = Cov(X)·w / Var(X·w), with the covariance written out on some of the voxels."""
    volumes, _ = matrix
    train = (pd.read_csv(run_path / "splits.csv")[f"fold_{fold}"] != "test").to_numpy()
    weights = load(svm_path / f"SVM_weights_f{fold}.nii.gz")
    some = slice(5000, 5800)
    centred = volumes[train] - volumes[train].mean(0)
    covariance = centred[:, some].T @ centred / (train.sum() - 1)
    expected = covariance @ weights / np.var(centred @ weights, ddof=1)
    found = load(svm_path / f"SVM_pattern_f{fold}.nii.gz")[some]
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def test_means_and_files(svm_path, matrix):
    for name in svm.MAPS:
        fold_maps = [load(svm_path / f"SVM_{name}_f{fold}.nii.gz") for fold in range(N_FOLDS)]
        found = load(svm_path / f"SVM_{name}_all.nii.gz")
        assert np.abs(found - np.mean(fold_maps, axis=0)).max() < 1e-6 * np.abs(found).max()
        for suffix in (".json", ".png", ".html"):
            assert (svm_path / f"SVM_{name}_all{suffix}").is_file()
    assert nib.load(svm_path / "SVM_weights_all.nii.gz").shape == SHAPE
    assert load(svm_path / "mean_scan.nii.gz") == pytest.approx(matrix[0].mean(0), abs=1e-6)
    assert (svm_path / "run.json").is_file() and (svm_path / "roc.png").is_file()
    assert not (svm_path / ".cache").exists()


def test_same_folds_and_format_as_the_networks(svm_path, run_path):
    ours, theirs = (pd.read_csv(p / "predictions.csv") for p in (svm_path, run_path))
    assert (ours[["path", "label", "fold"]] == theirs[["path", "label", "fold"]]).all(axis=None)
    assert list(ours.columns[:5]) == list(theirs.columns)
    ours, theirs = (pd.read_csv(p / "metrics.csv") for p in (svm_path, run_path))
    assert list(ours) == list(theirs)[: len(ours.columns)] and list(ours.fold) == list(theirs.fold)


def test_a_cache_shared_with_training_is_decoded_once_and_stays(
    cohort_csv, svm_path, run_path, tmp_path
):
    """And folds drawn without a run are train_cv.py's."""
    cache = ["--cache-dir", str(tmp_path / "cache")]
    more = ["--epochs", "1", "--only-fold", "0", *cache]
    train_cv.main(train_cv.parse_args(train_arguments(cohort_csv, tmp_path / "run", *more)))
    held = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*.npy")}
    assert len(held) == N_SCANS
    fit(cohort_csv, tmp_path / "svm", "--fold", str(N_FOLDS), "--C", "0.01", *cache)
    assert held == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "cache").glob("*.npy")}
    splits, expected = (p / "splits.csv" for p in (tmp_path / "svm", run_path))
    assert splits.read_bytes() == expected.read_bytes()
    for name in ("predictions.csv", "metrics.csv", "intercepts.csv"):  # repeated: the same tables
        assert (tmp_path / "svm" / name).read_bytes() == (svm_path / name).read_bytes()


@pytest.mark.parametrize(
    ("run", "more", "message"),
    [
        ("nothing", [], "there is no folder"),
        ("more", [], "splits.csv"),
        ("run", [], "the CSV's scans are not those of"),
        ("run", ["--C", "0"], "--C: must be above 0"),
    ],
)
def test_input_at_fault(modelpath, tmp_path, refusal, run, more, message):
    csv_path = write_cohort(tmp_path / "more", N_SCANS + 2)
    argv = ["--path", csv_path, "--modelpath", tmp_path / run, "--outpath", tmp_path / "out", *more]
    assert message in refusal(svm, argv)


def test_results_are_replaced_only_with_overwrite(cohort_csv, svm_path, tmp_path, refusal):
    copy = shutil.copytree(svm_path, tmp_path / "svm")
    argv = ["--path", cohort_csv, "--outpath", copy, "--fold", "3", "--workers", "0"]
    message = refusal(svm, argv)
    assert "holds an SVM: choose another --outpath, or --overwrite" in message
    assert exit_status(svm, [*argv, "--overwrite"]) == 0
    assert (copy / "SVM_weights_f2.nii.gz").is_file()


def test_no_place_under_torchrun(cohort_csv, tmp_path, monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, {"WORLD_SIZE": "2"}.get(name, "0"))
    with pytest.raises(InputError, match="without torchrun"):
        fit(cohort_csv, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_scans_of_another_cohort_are_refused(cohort_csv, modelpath, tmp_path, capsys):
    """Where names and labels are the same, what the networks were trained on tells."""
    table = pd.read_csv(modelpath / "scans.csv")
    table.loc[[3, 5], "crc32"] += 1
    table.to_csv(modelpath / "scans.csv", index=False)
    arguments = ["--path", cohort_csv, "--modelpath", modelpath, "--outpath", tmp_path / "svm"]
    assert exit_status(svm, arguments) == 2
    message = capsys.readouterr().err
    assert f"2 scans have other voxels than those in {modelpath / 'scans.csv'}" in message
    assert table.loc[3, "path"] in message and table.loc[5, "path"] in message
