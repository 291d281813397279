"""The simulated cohort: its grid, its truth, and that patients differ where the truth says."""

import functools
import json

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from nilearn.image import resample_to_img

import dataset
import simulate
from run_folder.processes import run_script

N_SCANS = 8


@pytest.fixture(scope="module", autouse=True)
def template_prepared_once():
    """Spare the tests the seconds that every simulation spends on its template."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulate, "load_template", functools.cache(simulate.load_template))
        yield


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
    assert facts["arguments"] == {
        "n": N_SCANS, "voxel": 6, "severity": [0.3, 0.7], "spare": 0, "deformation": 1.5, "seed": 0
    }  # fmt: skip
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


# Patients differ, and so do anatomies


def simulated(outpath, *more):
    """Simulate a small cohort of 6 mm; return its folder."""
    argv = ["--outpath", str(outpath), "--n", "6", "--voxel", "6", *map(str, more)]
    simulate.main(simulate.parse_args(argv))
    return outpath


def test_spared_regions_lose_nothing_and_the_rest_is_as_before(cohort_path, tmp_path):
    facts = [
        json.loads((path / "simulation.json").read_text())["severities"]
        for path in (simulated(tmp_path, "--spare", "0.5"), cohort_path)
    ]
    n_spared = 0
    for index in range(1, 7):
        spared, full = (each[f"sub-{index:04d}.nii.gz"] for each in facts)
        zeros = [region for region in spared if spared[region] == 0]
        assert index % 2 == 0 or not zeros, "controls are spared nothing"
        assert all(spared[region] == full[region] for region in spared if region not in zeros)
        n_spared += len(zeros)
    assert 7 <= n_spared <= 20  # of 27
    same = (tmp_path / "sub-0001.nii.gz").read_bytes()
    assert same == (cohort_path / "sub-0001.nii.gz").read_bytes()


def test_deformation_moves_anatomy(tmp_path):
    """Two scans are less alike the more they are deformed."""
    apart = []
    for mm in (0, 1.5, 6):
        folder = simulated(tmp_path / str(mm), "--n", 3, "--deformation", mm, "--severity", 0, 0)
        first, second = (load(folder / f"sub-000{i}.nii.gz") for i in (1, 3))
        in_both = (first > 0) & (second > 0)
        apart.append(1 - np.corrcoef(first[in_both], second[in_both])[0, 1])
    assert apart[0] < apart[1] < apart[2]


# Atrophy planted into given scans


@pytest.fixture(scope="module")
def controls_csv(tmp_path_factory):
    """Return a CSV of five controls, two of one subject, on a grid of three voxel sizes."""
    folder = simulated(tmp_path_factory.mktemp("controls"), "--n", 10, "--severity", 0, 0)
    affine = np.diag([-6.0, 6, 7, 1])  # another grid than the template cohort's, left-handed
    affine[:3, 3] = (96, -130, -75)
    rows = []
    for index in range(1, 10, 2):
        like = nib.Nifti1Image(np.zeros((33, 37, 28), np.float32), affine)
        img = resample_to_img(
            nib.load(folder / f"sub-{index:04d}.nii.gz"), like, interpolation="nearest",
            force_resample=True, copy_header=True,
        )  # fmt: skip
        img.set_sform(affine, 4)
        nib.save(img, folder / f"own{index}.nii")
        rows.append(f"own{index}.nii,0,{'twin' if index < 4 else f's{index}'}\n")
    csv_path = folder / "controls.csv"
    csv_path.write_text("".join(rows))
    return csv_path


def plant(controls_csv, outpath, *more):
    """Plant atrophy into the controls; return the table of the new cohort."""
    argv = ["--scans", controls_csv, "--outpath", outpath, *more]
    simulate.main(simulate.parse_args(list(map(str, argv))))
    return pd.read_csv(outpath / "data.csv")


def test_planted_scans(controls_csv, tmp_path):
    """Half of the subjects lose tissue, where the truth is; copies are theirs; the grid is kept."""
    table = plant(controls_csv, tmp_path, "--copies", 2, "--severity", 0.6, 0.9)
    cohort = dataset.read_cohort(tmp_path / "data.csv")
    assert len(table) == 10 and list(cohort.table["subject"]) == list(table["subject"])
    by_subject = table.groupby("subject")["label"]
    assert (by_subject.nunique() == 1).all() and by_subject.first().sum() == 2  # of 4
    assert by_subject.size().to_dict() == {"twin": 4, "s5": 2, "s7": 2, "s9": 2}
    weights, truth, brain = (
        load(tmp_path / f"{name}.nii.gz") for name in ("truth_weights", "truth", "brain")
    )
    assert (truth == (weights > simulate.TRUTH_THRESHOLD)).all() and truth.sum() > 20
    assert brain[truth == 1].all()
    drawn = json.loads((tmp_path / "simulation.json").read_text())["severities"]
    for path, label in zip(table["path"], table["label"], strict=True):
        source, found = nib.load(drawn[path]["scan"]), nib.load(tmp_path / path)
        assert (found.affine == source.affine).all() and found.shape == source.shape
        assert int(found.header["sform_code"]) == 4
        before, after = source.get_fdata(), found.get_fdata()
        if "copy-2" in path:
            inside = (before > 0) & (after > 0)
            assert 0.8 < np.corrcoef(before[inside], after[inside])[0, 1] < 0.9999
            continue
        is_changed = before != after
        assert is_changed.any() == bool(label)
        if label:
            assert not is_changed[weights == 0].any(), "spared voxels are the scan's own"
            assert not is_changed[before == 0].any()
            fluid = drawn[path]["fluid"]
            assert (
                np.abs(after - fluid)[is_changed].mean() < np.abs(before - fluid)[is_changed].mean()
            )
            assert (after - before)[truth == 1].mean() < 0, "tissue is brighter than fluid"


def test_loss_by_its_formula(controls_csv, tmp_path):
    """T1·(1 − s·w) + fluid·s·w, with one region of the user's own."""
    scan = nib.load(controls_csv.parent / "own1.nii")
    region_data = np.zeros(scan.shape, np.float32)
    region_data[10:14, 12:15, 9:11], region_data[14, 12:15, 9:11] = 1, 0.5
    region_data[:2, :2, :2] = 1  # outside the head, where nothing can be lost
    assert not scan.get_fdata()[:2, :2, :2].any()
    nib.save(nib.Nifti1Image(region_data, scan.affine), tmp_path / "region.nii")
    table = plant(controls_csv, tmp_path / "out", "--region", tmp_path / "region.nii")
    drawn = json.loads((tmp_path / "out" / "simulation.json").read_text())["severities"]
    assert table["label"].sum() >= 2
    for path in table["path"][table["label"] == 1]:
        facts, after = drawn[path], load(tmp_path / "out" / path)
        before, lost = load(facts["scan"]), facts["region.nii"] * region_data
        expected = np.where(before != 0, before * (1 - lost) + facts["fluid"] * lost, 0)
        assert 0.3 <= facts["region.nii"] <= 0.7
        assert after == pytest.approx(expected, abs=1e-6)
    assert (load(tmp_path / "out" / "truth.nii.gz") == (region_data > 0.25)).all()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--copies", "0"], "--copies: must be at least 1, got 0"),
        (["--n", "3"], "--n: not with --scans"),
        (["--region", "elsewhere.nii"], "is not on the scans' grid"),
        (["--region", "empty.nii"], "has no voxel above 0.25"),
        (["--region", "nothing.nii"], "there is no region mask"),
        (["--spare", "1.5"], "--spare: must be at most 1"),
        (["--outpath", "."], "holds the given scans: choose another"),
    ],
)
def test_planting_with_options_at_fault(
    controls_csv, tmp_path, refusal, monkeypatch, more, message
):
    monkeypatch.chdir(controls_csv.parent)
    nib.save(nib.Nifti1Image(np.ones((33, 37, 29), np.float32), np.eye(4)), "elsewhere.nii")
    like = nib.load("own1.nii")
    nib.save(nib.Nifti1Image(np.full(like.shape, 0.2, np.float32), like.affine), "empty.nii")
    argv = ["--scans", "controls.csv", "--outpath", tmp_path / "out", *more]
    assert message in refusal(simulate, argv)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("own1.nii,0\nown3.nii,1\n", "1 scans have label 1: own3.nii"),
        ("own1.nii,0,a\nown3.nii,0,a\n", "has one subject"),
        ("far1.nii,0\nfar2.nii,0\n", "less than half of the template's brain is in far1.nii, far2"),
    ],
)
def test_planting_into_scans_at_fault(controls_csv, tmp_path, refusal, table, message):
    for name in ("own1", "own3"):
        (tmp_path / f"{name}.nii").write_bytes((controls_csv.parent / f"{name}.nii").read_bytes())
    img = nib.load(tmp_path / "own1.nii")
    affine = img.affine.copy()
    affine[:3, 3] += 100
    for number in (1, 2):
        nib.save(nib.Nifti1Image(img.get_fdata() * number, affine), tmp_path / f"far{number}.nii")
    (tmp_path / "data.csv").write_text(table)
    argv = ["--scans", tmp_path / "data.csv", "--outpath", tmp_path / "out"]
    assert message in refusal(simulate, argv)


def test_region_without_scans(tmp_path, capsys):
    with pytest.raises(SystemExit):
        simulate.parse_args(["--outpath", str(tmp_path), "--region", "mask.nii"])
    assert "--region: only with --scans" in capsys.readouterr().err
