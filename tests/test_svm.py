"""The SVM against scikit-learn on the full matrix, and its pattern against the full covariance."""

import logging
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from conftest import N_FOLDS, N_SCANS, SHAPE, write_cohort
from sklearn.svm import SVC

import dataset
import linear_svm
import scan_files
import svm
import utils
from volume_file import Volumes


def fit(csv_path: Path, outpath: Path, *more: str) -> None:
    argv = ["--path", str(csv_path), "--outpath", str(outpath), "--workers", "0", *more]
    svm.main(svm.parse_args(argv))


@pytest.fixture(scope="module")
def svm_path(cohort_csv, run_path, tmp_path_factory):
    outpath = tmp_path_factory.mktemp("svm")
    fit(cohort_csv, outpath, "--modelpath", str(run_path), "--C", "0.01")
    return outpath


@pytest.fixture(scope="module")
def matrix(cohort_csv) -> tuple[np.ndarray, np.ndarray]:
    """Return all scans as rows, float64, and their labels."""
    table = dataset.read_cohort(cohort_csv).table
    rows = [scan_files.load_volume(file)[0].ravel() for file in table["file"]]
    return np.array(rows, dtype=np.float64), table["label"].to_numpy()


def load(path: Path) -> np.ndarray:
    return nib.load(path).get_fdata().ravel()


@pytest.mark.parametrize("fold", range(N_FOLDS))
def test_weights_and_decisions_are_sklearns(svm_path, run_path, matrix, fold):
    volumes, labels = matrix
    train = (pd.read_csv(run_path / "splits.csv")[f"fold_{fold}"] != "test").to_numpy()
    centred = volumes - volumes[train].mean(0)  # libsvm keeps inner products in float32
    svc = SVC(kernel="linear", C=0.01, tol=1e-9).fit(centred[train], labels[train])
    found = load(svm_path / f"SVM_weights_f{fold}.nii.gz")
    assert np.abs(found - svc.coef_[0]).max() < 1e-6 * np.abs(svc.coef_).max()
    predictions = pd.read_csv(svm_path / "predictions.csv")[~train]
    expected = svc.decision_function(centred[~train])
    assert predictions["decision"].to_numpy() == pytest.approx(expected, abs=1e-6)
    assert (predictions["predicted"] == svc.predict(centred[~train])).all()


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


def test_means_and_files(svm_path):
    for name in svm.MAPS:
        fold_maps = [load(svm_path / f"SVM_{name}_f{fold}.nii.gz") for fold in range(N_FOLDS)]
        found = load(svm_path / f"SVM_{name}_all.nii.gz")
        assert np.abs(found - np.mean(fold_maps, axis=0)).max() < 1e-6 * np.abs(found).max()
        assert (svm_path / f"SVM_{name}_all.png").is_file()
    assert not list(svm_path.glob(".cache-*"))
    assert nib.load(svm_path / "SVM_weights_all.nii.gz").shape == SHAPE


def test_mean_scan(svm_path, matrix):
    assert load(svm_path / "mean_scan.nii.gz") == pytest.approx(matrix[0].mean(0), abs=1e-6)


def test_same_folds_and_format_as_the_networks(svm_path, run_path):
    ours, theirs = (pd.read_csv(p / "predictions.csv") for p in (svm_path, run_path))
    assert (ours[["path", "label", "fold"]] == theirs[["path", "label", "fold"]]).all(axis=None)
    assert list(ours.columns[:5]) == list(theirs.columns)
    ours, theirs = (pd.read_csv(p / "metrics.csv") for p in (svm_path, run_path))
    assert list(ours.columns) == list(theirs.columns) and list(ours.fold) == list(theirs.fold)


def test_folds_drawn_without_a_run_are_train_cvs(cohort_csv, run_path, tmp_path):
    fit(cohort_csv, tmp_path, "--fold", str(N_FOLDS))
    assert (tmp_path / "splits.csv").read_bytes() == (run_path / "splits.csv").read_bytes()


def test_blocks_change_nothing(svm_path, cohort_csv, run_path, tmp_path, monkeypatch):
    """With blocks of a few hundred voxels instead of all at once."""
    monkeypatch.setattr(linear_svm, "BLOCK_BYTES", 4 * N_SCANS * 777)
    monkeypatch.setattr(linear_svm, "MIN_RANGE_VOXELS", 1)
    monkeypatch.setattr(linear_svm, "TILE_ROWS", 3)
    fit(cohort_csv, tmp_path, "--modelpath", str(run_path), "--C", "0.01")
    for name in ("SVM_weights_f0.nii.gz", "SVM_pattern_all.nii.gz"):
        expected = load(svm_path / name)
        assert np.abs(load(tmp_path / name) - expected).max() < 1e-6 * np.abs(expected).max()


def test_the_gram_matrix(tmp_path, monkeypatch):
    """Tile by tile and range by range it is that of the centred scans, and symmetric to the bit."""
    monkeypatch.setattr(linear_svm, "BLOCK_BYTES", 4 * 10 * 50)
    monkeypatch.setattr(linear_svm, "MIN_RANGE_VOXELS", 1)
    monkeypatch.setattr(linear_svm, "TILE_ROWS", 4)
    scans = np.random.default_rng(0).random((10, 4 * 5 * 6), dtype=np.float32)
    (tmp_path / "volumes.f32").write_bytes(scans.tobytes())
    volumes = Volumes(tmp_path / "volumes.f32", 10, (4, 5, 6), np.zeros(10, dtype=int))
    gram, mean = linear_svm.gram_matrix(volumes)
    centred = scans - scans.mean(0, dtype=np.float64)
    assert gram == pytest.approx(centred @ centred.T, abs=1e-12)
    assert (gram == gram.T).all()
    assert mean == pytest.approx(scans.mean(0), abs=1e-6)


def test_every_scan_is_read_once(cohort_csv, run_path, tmp_path, monkeypatch):
    read = []
    original = scan_files.load_volume
    monkeypatch.setattr(scan_files, "load_volume", lambda file: read.append(file) or original(file))
    fit(cohort_csv, tmp_path, "--modelpath", str(run_path))
    assert len(read) == len(set(read)) == N_SCANS


def test_the_same_command_twice_gives_identical_tables(svm_path, cohort_csv, run_path, tmp_path):
    fit(cohort_csv, tmp_path, "--modelpath", str(run_path), "--C", "0.01")
    for name in ("predictions.csv", "metrics.csv"):
        assert (tmp_path / name).read_bytes() == (svm_path / name).read_bytes()


def test_the_origin_does_not_matter_and_one_copy_is_made():
    rng = np.random.default_rng(0)
    labels = np.arange(1200) % 2
    volumes = rng.standard_normal((1200, 900)) + 0.2 * labels[:, None]
    train = np.flatnonzero(rng.random(1200) < 0.8)
    centred = volumes - volumes[train].mean(0)
    fits = []
    for scans in (centred, volumes - volumes.mean(0), volumes - 3):
        gram = np.asfortranarray(scans @ scans.T)
        tracemalloc.start()
        fits.append(linear_svm.fit_fold(gram, labels, train, 1.0))
        assert tracemalloc.get_traced_memory()[1] < 1.1 * 8 * len(train) ** 2
        tracemalloc.stop()
    for other in fits[1:]:
        for name in ("weight_coefficients", "pattern_coefficients", "decisions"):
            expected = getattr(fits[0], name)
            difference = np.abs(getattr(other, name) - expected).max()
            assert difference < 1e-5 * np.abs(expected).max(), name


@pytest.mark.parametrize("case", ["no folder", "no splits", "another cohort", "C"])
def test_bad_input(case, cohort_csv, run_path, tmp_path, capsys):
    outpath, more = tmp_path / "out", ["--modelpath", str(run_path)]
    if case == "no folder":
        more, message = ["--modelpath", str(tmp_path / "nothing")], "there is no folder"
    elif case == "no splits":
        more, message = ["--modelpath", str(cohort_csv.parent)], "splits.csv"
    elif case == "another cohort":
        cohort_csv = write_cohort(tmp_path / "cohort", N_SCANS + 2)
        message = "the CSV's scans are not those of"
    else:
        more, message = ["--C", "0"], "--C: must be above 0"
    try:
        args = svm.parse_args(["--path", str(cohort_csv), "--outpath", str(outpath), *more])
        status = utils.run_script(svm.main, args)
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert message in capsys.readouterr().err
    assert not outpath.exists()


def test_memory_of_a_host_with_several_processes(monkeypatch, caplog):
    """Each process holds the Gram matrix: the message says so."""
    volumes = SimpleNamespace(n_scans=3, n_voxels=5, read=lambda *_: np.eye(3, 5, dtype="f4"))
    caplog.set_level(logging.INFO, "heatmaps")
    linear_svm.gram_matrix(volumes)
    assert "processes" not in caplog.text
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, {"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "4"}.get(name, "0"))
    linear_svm.gram_matrix(volumes)
    assert "is fitted, in each of this host's 4 processes" in caplog.text
