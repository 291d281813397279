"""compare.py: grids, masks, references, folds, and the table."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

import compare

SHAPE = (13, 16, 11)
AFFINE = np.array([[-2.0, 0, 0, 12], [0, 2, 0, -16], [0, 0, 2, -10], [0, 0, 0, 1]])


def save(path: Path, data: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    nib.save(nib.Nifti1Image(np.asarray(data, dtype=np.float32), affine), path)
    return path


def run(*argv, outpath: Path) -> pd.DataFrame:
    compare.main(compare.parse_args([*map(str, argv), "--outpath", str(outpath)]))
    return pd.read_csv(outpath / "comparison.csv").set_index("map")


def blob(start: tuple = (2, 3, 4)) -> np.ndarray:
    data = np.zeros(SHAPE)
    data[tuple(slice(s, s + 3) for s in start)] = 1
    return data


@pytest.fixture
def inputs(tmp_path) -> dict[str, Path]:
    """Return a map with two fold maps, a reference, a mask and an atlas, all on one grid."""
    folder = tmp_path / "inputs"
    folder.mkdir()
    rng = np.random.default_rng(0)
    found = {
        "map": save(folder / "IG_map_all.nii.gz", blob() + 0.5 * rng.random(SHAPE)),
        "f0": save(folder / "IG_map_f0.nii.gz", blob()),
        "f1": save(folder / "IG_map_f1.nii.gz", blob()[::-1]),
        "reference": save(folder / "reference.nii.gz", blob()),
        "mask": save(folder / "mask.nii.gz", np.ones(SHAPE)),
        "atlas": save(folder / "atlas.nii.gz", blob() * 3),
        "labels": folder / "labels.csv",
    }
    found["labels"].write_text("index,name\n3,hippocampus\n")
    return found


@pytest.fixture
def against(inputs, tmp_path):
    """Return a function that compares a map with the reference in the whole mask."""

    def compare_map(path: Path, *more, reference: Path = inputs["reference"]) -> pd.Series:
        argv = ["--maps", path, "--reference", reference, "--mask", inputs["mask"], *more]
        return run(*argv, outpath=tmp_path / "out").iloc[0]

    return compare_map


def test_a_map_against_itself(inputs, against):
    row = against(inputs["reference"])
    assert row["dice_matched"] == row["average_precision"] == row["roc_auc"] == row["mass"] == 1
    assert row["n_reference"] == 27 and row["n_mask"] == np.prod(SHAPE)
    assert row["p"] == pytest.approx(27 / np.prod(SHAPE))


def test_a_map_against_its_mirror_image(inputs, against):
    """27 voxels rank first, all wrong; all others tie, so the one step left has precision p."""
    row, n_voxels = against(inputs["f1"]), np.prod(SHAPE)
    assert row["dice_matched"] == row["mass"] == 0
    assert row["average_precision"] == pytest.approx(27 / n_voxels)
    assert row["roc_auc"] == pytest.approx(0.5 * (n_voxels - 54) / (n_voxels - 27))


def test_fold_maps_beside_the_map(inputs, against):
    row = against(inputs["map"])
    assert row["n_folds"] == 2
    assert row["dice_matched_folds_mean"] == 0.5  # 1 and 0
    assert row["dice_matched_folds_sd"] == pytest.approx(np.sqrt(0.5))


def test_reference_in_another_space_is_resampled(inputs, against, tmp_path):
    """The same blob at 1 mm, stored with other axes, gives the same voxels at 2 mm."""
    fine = blob().repeat(2, 0).repeat(2, 1).repeat(2, 2)
    affine = AFFINE @ np.diag([0.5, 0.5, 0.5, 1])
    affine[:3, 3] = nib.affines.apply_affine(AFFINE, [-0.25] * 3)
    turned = nib.as_closest_canonical(nib.Nifti1Image(fine, affine))
    fine_path = save(tmp_path / "fine.nii.gz", turned.get_fdata(), turned.affine)
    expected, found = against(inputs["map"]), against(inputs["map"], reference=fine_path)
    assert found["n_reference"] == 27 and found["dice_matched"] == expected["dice_matched"]


def test_reference_threshold(inputs, against, tmp_path):
    """Of a statistical map only what is above the threshold counts."""
    z_map = save(tmp_path / "z.nii.gz", 4 * blob() + 2 * blob((8, 3, 4)))
    assert against(inputs["map"], reference=z_map)["n_reference"] == 54
    row = against(inputs["map"], "--reference-threshold", "3.1", reference=z_map)
    assert row["n_reference"] == 27


def test_default_mask_and_what_lies_outside(inputs, tmp_path):
    brain = np.zeros(SHAPE)
    brain[1:9] = 1
    save(tmp_path / "mean_scan.nii.gz", brain)
    sparse = save(tmp_path / "sparse.nii.gz", blob((8, 3, 4)))
    more = ["--maps", sparse, "--reference", inputs["reference"]]
    row = run(*more, outpath=tmp_path / "out").iloc[0]
    assert row["n_mask"] == 8 * 16 * 11 and row["outside"] == pytest.approx(18 / 27)
    assert "mask: voxels where the mean scan" in (tmp_path / "out" / "compare.log").read_text()


def test_sign_and_smoothing(against, tmp_path):
    """A negative blob on the reference counts for abs, not for pos; smoothing spreads it."""
    negative = save(tmp_path / "negative.nii.gz", -blob())
    assert against(negative)["mass"] == 1
    assert np.isnan(against(negative, "--sign", "pos")["mass"])
    assert 0.1 < against(negative, "--fwhm", "6")["mass"] < 0.9


def test_regions(inputs, against, tmp_path, caplog):
    more = ["--atlas", inputs["atlas"], "--atlas-labels", inputs["labels"]]
    against(inputs["f0"], *more)
    assert pd.read_csv(tmp_path / "out" / "regions.csv").to_dict("records") == [
        {"map": "IG_map_f0", "region": 3, "name": "hippocampus", "n_voxels": 27, "sum": 27.0,
         "share": 1.0, "mean": 1.0, "dice": 1.0}
    ]  # fmt: skip
    inputs["labels"].write_text("index,name\n4,amygdala\n")
    with caplog.at_level("WARNING", logger="heatmaps"):
        against(inputs["f0"], *more)
    assert "regions without a name in" in caplog.text and ": 3\n" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"map": None}, "there is no map"),
        ({"reference": np.zeros(SHAPE)}, "has no voxel above 0"),
        ({"reference": np.ones(SHAPE)}, "fills the whole analysis mask"),
        ({"mask": np.ones((5, 6, 7))}, "(5, 6, 7)\n[[ -2. "),  # with its affine
        ({"f1": np.ones((5, 6, 7))}, "are not on one grid"),
        ({"labels": "one column\n1\n"}, "must have a header"),
        (["--fwhm", "-1"], "--fwhm: must be at least 0"),
        (["--run", "nowhere"], "is no finished run"),
    ],
)
def test_input_at_fault(inputs, tmp_path, refusal, change, message):
    more = change if isinstance(change, list) else []
    for name, content in {} if more else change.items():
        if content is None:
            inputs[name].unlink()
        elif isinstance(content, str):
            inputs[name].write_text(content)
        else:
            save(inputs[name], content)
    argv = ["--maps", inputs["map"], "--reference", inputs["reference"], "--mask", inputs["mask"],
            "--atlas", inputs["atlas"], "--atlas-labels", inputs["labels"], "--outpath",
            tmp_path / "out", *more]  # fmt: skip
    assert message in refusal(compare, argv)
