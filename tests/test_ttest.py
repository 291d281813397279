"""The plain group difference, as a script: in the networks' folds, by subject, with its p."""

import json
import shutil

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from conftest import N_FOLDS, N_SCANS, SHAPE, exit_status, write_cohort
from scipy.stats import ttest_ind

import dataset
import ttest
from comparing import group_difference


def compare_groups(csv_path, outpath, *more) -> None:
    argv = ["--path", str(csv_path), "--outpath", str(outpath), "--workers", "0", *map(str, more)]
    ttest.main(ttest.parse_args(argv))


@pytest.fixture(scope="module")
def ttest_path(cohort_csv, run_path, tmp_path_factory):
    """Return what ttest.py wrote in the network's folds; tests must not change it."""
    outpath = tmp_path_factory.mktemp("ttest")
    compare_groups(cohort_csv, outpath, "--modelpath", run_path, "--permutations", 60)
    return outpath


def rows_of(csv_path) -> tuple[np.ndarray, np.ndarray]:
    """Return all scaled scans as rows, float64, and their labels."""
    cohort = dataset.read_cohort(csv_path)
    volumes = cohort.volumes(None, 0)
    return np.stack([volumes[i].ravel() for i in range(N_SCANS)]).astype(float), cohort.labels


def load(path) -> np.ndarray:
    return nib.load(path).get_fdata().ravel()


def welch(rows, labels) -> np.ndarray:
    """Return scipy's t, 0 where nothing varies."""
    with np.errstate(all="ignore"):
        t = ttest_ind(rows[labels == 1], rows[labels == 0], equal_var=False).statistic
    return np.where(np.ptp(rows, axis=0) > 0, t, 0)


def test_t_of_each_fold_their_mean_and_that_of_all_scans(ttest_path, run_path, cohort_csv):
    rows, labels = rows_of(cohort_csv)
    splits, of_folds = pd.read_csv(run_path / "splits.csv"), []
    for fold in range(N_FOLDS):
        used = (splits[f"fold_{fold}"] != "test").to_numpy()
        of_folds.append(welch(rows[used], labels[used]))
        found = load(ttest_path / f"TTEST_map_f{fold}.nii.gz")
        assert found == pytest.approx(of_folds[-1], rel=1e-5, abs=1e-5)
    mean = np.mean(of_folds, axis=0)
    assert load(ttest_path / "TTEST_map_all.nii.gz") == pytest.approx(mean, rel=1e-5, abs=1e-5)
    of_all = load(ttest_path / "TTEST_t_all.nii.gz")
    assert of_all == pytest.approx(welch(rows, labels), rel=1e-5, abs=1e-5)
    assert load(ttest_path / "mean_scan.nii.gz") == pytest.approx(rows.mean(0), abs=1e-6)
    assert load(ttest_path / "coverage.nii.gz") == pytest.approx((rows != 0).mean(0), abs=1e-6)
    hole = np.zeros(SHAPE, dtype=bool)
    hole[6:12, 14:20, 8:14] = True
    assert of_all.argmin() in np.flatnonzero(hole), "patients are darker there"


def test_p_is_that_of_the_largest_t(ttest_path, cohort_csv):
    """The permutations written out, over all voxels at once."""
    rows, labels = rows_of(cohort_csv)
    subjects = group_difference.average_scans(pd.Series(range(N_SCANS)), labels)
    exchanges = subjects.exchanged(60, seed=0)
    largest = [np.abs(welch(rows, labels[each])).max() for each in exchanges]
    t = welch(rows, labels)
    expected = [(1 + np.sum(largest >= np.abs(value))) / 61 for value in t]
    found = load(ttest_path / "TTEST_p_all.nii.gz")
    assert found == pytest.approx(expected, abs=1e-6)
    assert found.min() <= 2 / 61
    sidecar = json.loads((ttest_path / "TTEST_t_all.json").read_text())
    assert sidecar["n_voxels_significant"] == (found <= 0.05).sum() > 0
    is_reached = np.abs(t) >= sidecar["t_at_familywise_0.05"] * (1 + 1e-9)
    assert (found[is_reached] <= 0.05).all()
    assert "circular" in json.dumps(sidecar["notes"])


def test_scans_are_averaged_by_subject(tmp_path, caplog):
    """One subject with scans of both labels is left out, and named."""
    csv_path = write_cohort(tmp_path / "cohort", columns=("path", "label", "subject"))
    table = pd.read_csv(csv_path, names=["path", "label", "subject"])
    table.loc[[0, 1], "subject"] = "both"
    table.to_csv(csv_path, index=False, header=False)
    compare_groups(csv_path, tmp_path / "out", "--fold", "2")
    assert "1 subjects have scans of both labels and are left out: both" in caplog.text
    rows, _ = rows_of(csv_path)
    means = pd.DataFrame(rows).groupby(table["subject"]).mean().drop("both")
    of_subject = table.groupby("subject")["label"].first()[means.index].to_numpy()
    assert len(means) < N_SCANS - 2
    found = load(tmp_path / "out" / "TTEST_t_all.nii.gz")
    assert found == pytest.approx(welch(means.to_numpy(), of_subject), rel=1e-5, abs=1e-5)
    assert not (tmp_path / "out" / "TTEST_p_all.nii.gz").exists()


def test_a_class_with_one_subject_in_a_fold_is_refused(tmp_path, refusal):
    csv_path = write_cohort(tmp_path / "cohort", columns=("path", "label", "subject"))
    table = pd.read_csv(csv_path, names=["path", "label", "subject"])
    is_patient = table["label"] == 1
    table.loc[is_patient, "subject"] = np.where(np.arange(is_patient.sum()) % 2, "p1", "p2")
    table.to_csv(csv_path, index=False, header=False)
    is_fold_0 = table["subject"].isin(["p1", "s0_0", "s1_0"])
    part = np.where(table["subject"] == "s2_0", "val", "train")
    (tmp_path / "run").mkdir()
    for fold, is_test in enumerate((is_fold_0, ~is_fold_0)):
        table[f"fold_{fold}"] = np.where(is_test, "test", part)
    table.to_csv(tmp_path / "run" / "splits.csv", index=False)
    argv = ["--path", csv_path, "--outpath", tmp_path / "out", "--modelpath", tmp_path / "run"]
    assert "fold 0 has 1 subjects of label 1: a t needs 2" in refusal(ttest, argv)


def test_results_are_replaced_only_with_overwrite(cohort_csv, ttest_path, tmp_path, refusal):
    copy = shutil.copytree(ttest_path, tmp_path / "ttest")
    argv = ["--path", cohort_csv, "--outpath", copy, "--fold", "3", "--workers", "0"]
    assert "choose another --outpath, or --overwrite" in refusal(ttest, argv)
    assert exit_status(ttest, [*argv, "--overwrite"]) == 0
    assert (copy / "TTEST_map_f2.nii.gz").is_file()
    assert not (copy / "TTEST_p_all.nii.gz").exists()
