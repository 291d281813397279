"""compare.py: grids, masks, references, folds, and the table."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from nilearn import image
from sklearn.metrics import average_precision_score

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


# Signs and smoothing


def test_a_map_is_smoothed_before_its_sign_is_taken(inputs, tmp_path):
    """A bright blob cancels the dark one beside it, in every row as computed by hand."""
    data = (
        -blob((2, 3, 4)) + 0.8 * blob((5, 3, 4)) + 1e-5 * np.arange(np.prod(SHAPE)).reshape(SHAPE)
    )
    path = save(tmp_path / "signed.nii.gz", data)
    argv = ["--maps", path, "--reference", inputs["reference"], "--mask", inputs["mask"]]
    table = run(*argv, "--sign", "neg", "abs", "--fwhm", "5", "0", outpath=tmp_path / "out")
    inside = (blob() > 0).ravel()
    smooth = image.smooth_img(nib.load(path), 5).get_fdata().ravel()
    plain = nib.load(path).get_fdata().ravel()
    expected = {("neg", 5): np.maximum(-smooth, 0), ("abs", 5): abs(smooth),
                ("neg", 0): np.maximum(-plain, 0), ("abs", 0): abs(plain)}  # fmt: skip
    assert [(row["sign"], row["fwhm"]) for _, row in table.iterrows()] == list(expected)
    for (_, row), values in zip(table.iterrows(), expected.values(), strict=True):
        found = average_precision_score(inside, values)
        assert row["average_precision"] == pytest.approx(found, rel=1e-4)
    late = image.smooth_img(nib.Nifti1Image(np.maximum(-nib.load(path).get_fdata(), 0), AFFINE), 5)
    late_value = average_precision_score(inside, late.get_fdata().ravel())
    assert abs(late_value - table["average_precision"].iloc[0]) > 0.01
    assert np.isfinite(table["shift_p"].to_numpy()).tolist() == [True, False, False, False]
    assert (tmp_path / "out" / "settings.png").stat().st_size > 5000


# Maps of single scans


@pytest.fixture
def scans_path(tmp_path) -> Path:
    """Return a folder with maps of scans, their mean maps and contrasts, trained and untrained.

    Patients' maps are darker where the reference is, through both kinds of networks.
    """
    folder, rng = tmp_path / "maps", np.random.default_rng(0)
    folder.mkdir()
    save(folder / "mean_scan.nii.gz", np.ones(SHAPE))
    save(folder / "coverage.nii.gz", np.ones(SHAPE))
    fold, label = np.repeat([0, 1], 8), np.arange(16) % 2
    for stem, effect in {"IG": 4.0, "IG_random": 2.0, "LRP": 0.0}.items():
        data = rng.standard_normal((16, *SHAPE)) - effect * label[:, None, None, None] * blob()
        names = [f"{stem}_subjects/{i}.nii.gz" for i in range(16)]
        (folder / f"{stem}_subjects").mkdir()
        for name, each in zip(names, data, strict=True):
            save(folder / name, each)
        table = {"path": names, "subject": np.arange(16) // 2 * 2 + label, "label": label,
                 "fold": fold, "map": names}  # fmt: skip
        table["path"] = [f"scan{i}" for i in range(16)]
        pd.DataFrame(table).to_csv(folder / f"{stem}_predictions.csv", index=False)
        kinds = {
            "map": [data[fold == f].mean(0) for f in (0, 1)],
            "contrast": [
                data[(fold == f) & (label == 1)].mean(0) - data[(fold == f) & (label == 0)].mean(0)
                for f in (0, 1)
            ],
        }
        for kind, folds in kinds.items():
            save(folder / f"{stem}_{kind}_all.nii.gz", np.mean(folds, axis=0))
            for number, each in enumerate(folds):
                save(folder / f"{stem}_{kind}_f{number}.nii.gz", each)
    return folder


def compare_scans(folder: Path, inputs: dict, *more: object) -> pd.DataFrame:
    """Compare the maps and contrasts of IG and LRP with the reference, as far as it is dark."""
    paths = [
        folder / f"{m}_{kind}_all.nii.gz" for m in ("IG", "LRP") for kind in ("map", "contrast")
    ]
    argv = ["--maps", *paths, "--sign", "neg", "--permutations", "99", *more]
    return run(*argv, outpath=folder.parent / "out")


def test_errors_labels_and_differences(scans_path, inputs, tmp_path, caplog):
    with caplog.at_level("INFO", logger="heatmaps"):
        table = compare_scans(scans_path, inputs, "--reference", inputs["reference"])
    assert list(table.index) == ["IG", "IG_contrast", "LRP", "LRP_contrast", "IG_random",
                                 "IG_random_contrast"]  # fmt: skip
    errors = table[["dice_matched_se", "average_precision_se"]]
    assert (errors >= 0).all(axis=None) and (errors.loc["LRP"] > 0).all()
    assert table["half_r"].between(-1, 1).all() and table["fold_r"].between(-1, 1).all()
    row = table.loc["IG_contrast"]
    assert row["dice_matched"] == 1 and row["label_p"] == row["label_p_untrained"] == 0.01
    assert table.loc["IG_random_contrast", "label_p"] == 0.01
    assert table.loc["LRP_contrast", "label_p"] > 0.05
    assert table["label_p"].notna().sum() == 3 and table["label_p_untrained"].notna().sum() == 1
    assert "LRP_contrast: its label_p says that the groups' maps differ" in caplog.text
    assert "added as controls: IG_random_map_all.nii.gz, IG_random_contrast" in caplog.text
    pairs = pd.read_csv(tmp_path / "out" / "differences.csv").set_index(["map", "other"])
    assert len(pairs) == 15
    pair = pairs.loc[("IG_contrast", "LRP_contrast")]
    expected = row["dice_matched"] - table.loc["LRP_contrast", "dice_matched"]
    assert pair["dice_matched_difference"] == pytest.approx(expected)
    assert pair["dice_matched_difference_se"] > 0
    assert not list((tmp_path / "out").glob(".tmp-*"))
    again = compare_scans(scans_path, inputs, "--reference", inputs["reference"])
    pd.testing.assert_frame_equal(table, again)


def test_without_a_reference(scans_path, inputs, tmp_path):
    table = compare_scans(scans_path, inputs)
    assert "dice_matched" not in table and table["half_r"].notna().all()
    of_maps = pd.read_csv(tmp_path / "out" / "correlations.csv").set_index("map")
    assert list(of_maps.columns) == list(of_maps.index) == list(table.index)
    values = [
        nib.load(scans_path / f"{m}_map_all.nii.gz").get_fdata().ravel() for m in ("IG", "LRP")
    ]
    assert of_maps.loc["IG", "LRP"] == pytest.approx(np.corrcoef(values)[0, 1], abs=1e-5)
    assert "No --reference was given" in (tmp_path / "out" / "report.html").read_text()
    pictures = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert pictures == {f"{m}{kind}.png" for m in ("IG", "LRP") for kind in ("", "_contrast")}


@pytest.mark.parametrize("name", ["map", "fold_r", "sign", "0"])
def test_a_map_of_any_name(inputs, tmp_path, name):
    """Names of maps are heads of columns in correlations.csv."""
    path = save(tmp_path / f"{name}.nii.gz", blob())
    run("--maps", path, inputs["map"], "--reference", inputs["reference"], outpath=tmp_path / "out")
    heads = (tmp_path / "out" / "correlations.csv").read_text().splitlines()[0]
    assert heads == f"map,{name},IG"


def test_other_scans_make_no_pair(scans_path, inputs, tmp_path, caplog):
    path = scans_path / "LRP_predictions.csv"
    table = pd.read_csv(path)
    table.assign(path=table["path"] + "b").to_csv(path, index=False)
    with caplog.at_level("INFO", logger="heatmaps"):
        compare_scans(scans_path, inputs, "--reference", inputs["reference"])
    assert "maps of different scans have no difference: IG and LRP, " in caplog.text
    assert len(pd.read_csv(tmp_path / "out" / "differences.csv")) == 7


def test_a_mean_of_scaled_folds_has_no_errors(scans_path, inputs, caplog):
    path = scans_path / "IG_map_all.nii.gz"
    save(path, 2 * nib.load(path).get_fdata())
    table = compare_scans(scans_path, inputs, "--reference", inputs["reference"])
    assert "IG is not the mean of its scans' maps" in caplog.text
    assert np.isnan(table.loc["IG", "dice_matched_se"]) and table.loc["LRP", "dice_matched_se"] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "IG_subjects/3.nii.gz, a scan's map that"),
        (np.ones((5, 6, 7)), "are not on one grid"),
        (["--permutations", "0"], "--permutations: must be at least 1"),
        (["--sign", "neg", "pos", "neg"], "--sign: a value is given twice"),
        (["--fwhm", "8", "8.0"], "--fwhm: a value is given twice"),
        (["--sign", "both"], "invalid choice: 'both'"),
    ],
)
def test_scans_and_settings_at_fault(scans_path, inputs, tmp_path, refusal, change, message):
    path = scans_path / "IG_subjects" / "3.nii.gz"
    if change is None:
        path.unlink()
    elif not isinstance(change, list):
        save(path, change)
    more = change if isinstance(change, list) else []
    argv = ["--maps", scans_path / "IG_map_all.nii.gz", "--reference", inputs["reference"], *more]
    assert message in refusal(compare, [*argv, "--outpath", tmp_path / "out"])
    assert not (tmp_path / "out").exists()
