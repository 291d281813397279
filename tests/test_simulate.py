"""The simulated cohort: its grid, its truth, and that patients differ where the truth says."""

import json

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

import dataset
import simulate
from run_folder.processes import run_script

N_SCANS = 8


@pytest.fixture(scope="module")
def cohort_path(tmp_path_factory):
    outpath = tmp_path_factory.mktemp("simulated")
    argv = ["--outpath", str(outpath), "--n", str(N_SCANS), "--voxel", "6"]
    simulate.main(simulate.parse_args(argv))
    return outpath


def load(path) -> np.ndarray:
    return nib.load(path).get_fdata()


def test_files_and_grid(cohort_path):
    cohort = dataset.read_cohort(cohort_path / "data.csv")
    table = cohort.table
    assert list(table["path"]) == [f"sub-{i:04d}.nii.gz" for i in range(1, N_SCANS + 1)]
    assert table["label"].sum() == N_SCANS / 2
    affine = [[6, 0, 0, -96], [0, 6, 0, -132], [0, 0, 6, -78], [0, 0, 0, 1]]
    for name in ("sub-0001", "truth", "truth_weights", "brain"):
        img = nib.load(cohort_path / f"{name}.nii.gz")
        assert img.shape == (33, 39, 33)
        assert img.affine.tolist() == affine
        assert int(img.header["sform_code"]) == 4
        assert img.get_data_dtype() == (np.uint8 if name in ("truth", "brain") else np.float32)
    facts = json.loads((cohort_path / "simulation.json").read_text())
    assert facts["arguments"] == {"n": N_SCANS, "voxel": 6, "severity": [0.3, 0.7], "seed": 0}
    assert facts["n_true_voxels"] == load(cohort_path / "truth.nii.gz").sum()
    assert set(facts["severities"]) == set(table["path"])


def test_one_millimetre_is_the_papers_grid():
    img = simulate.cohort_grid(1.0)
    assert img.shape == (193, 229, 193)
    assert img.affine[:3, 3].tolist() == [-96, -132, -78]


def test_patients_are_darker_where_the_truth_is_and_nowhere_else(cohort_path):
    table = pd.read_csv(cohort_path / "data.csv")
    scans = np.stack([load(cohort_path / p) / load(cohort_path / p).mean() for p in table["path"]])
    difference = scans[table.label == 1].mean(0) - scans[table.label == 0].mean(0)
    truth, weights = load(cohort_path / "truth.nii.gz"), load(cohort_path / "truth_weights.nii.gz")
    in_brain = scans.min(0) > 0
    assert set(np.unique(truth)) == {0, 1}
    assert (truth == (weights > simulate.TRUTH_THRESHOLD)).all()
    assert difference[in_brain & (truth == 1)].mean() < -0.2
    assert abs(difference[in_brain & (weights < 0.01)].mean()) < 0.05


def test_truth_lies_in_the_hippocampi_on_both_sides(cohort_path):
    img = nib.load(cohort_path / "truth.nii.gz")
    for x_mm in (-27, 27):
        voxel = np.round(nib.affines.apply_affine(np.linalg.inv(img.affine), (x_mm, -22, -15)))
        near = tuple(slice(int(v) - 1, int(v) + 2) for v in voxel)
        assert img.get_fdata()[near].any()


def test_seed_alone_decides_on_a_scan(cohort_path, tmp_path):
    """However many scans are simulated."""
    expected = (cohort_path / "sub-0002.nii.gz").read_bytes()
    for seed in "0", "1":
        argv = ["--outpath", str(tmp_path), "--n", "2", "--voxel", "6", "--seed", seed]
        simulate.main(simulate.parse_args(argv))
        assert ((tmp_path / "sub-0002.nii.gz").read_bytes() == expected) == (seed == "0")


@pytest.mark.parametrize("severity", [("0.7", "0.3"), ("0.3", "1.2"), ("-1", "0.5")])
def test_impossible_severity(severity, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        simulate.parse_args(["--outpath", str(tmp_path / "x"), "--severity", *severity])
    assert stop.value.code == 2
    assert "severity" in capsys.readouterr().err


def test_outpath_that_is_a_file(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    args = simulate.parse_args(["--outpath", str(tmp_path / "file")])
    assert run_script(simulate.main, args) == 2
    assert "cannot be used as a folder" in capsys.readouterr().err
