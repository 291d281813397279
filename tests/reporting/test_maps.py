"""Running means, a fold's maps and tables, and what is read back of them."""

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import AFFINE

from reporting import maps, mean_maps
from utils import InputError

SHAPE = (3, 4, 5)
LIKE_IMG = nib.Nifti1Image(np.zeros(SHAPE, dtype=np.float32), AFFINE)


def random_maps(n: int) -> list[np.ndarray]:
    return list(np.random.default_rng(0).standard_normal((n, *SHAPE)).astype(np.float32))


def make_fold(outpath, fold: int, saves_scans: bool = True) -> maps.FoldMaps:
    by_outcome = {name: maps.RunningMean() for name in maps.OUTCOMES}
    return maps.FoldMaps("LRP", "LRP", fold, outpath, LIKE_IMG, saves_scans, by_outcome)


def make_scan(row: int, label: int, logits: tuple) -> maps.ExplainedScan:
    return maps.ExplainedScan(row, f"in/{row}.nii", label, "test", label, np.array(logits))


def test_running_mean_of_single_and_weighted_volumes():
    found, data = maps.RunningMean(), random_maps(3)
    for each, n in zip(data, (1, 2, 1), strict=True):
        found.add(each, n)
    expected = (data[0] + 2 * data[1].astype(float) + data[2]) / 4
    assert found.n == 4 and found.mean() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("label", "logits", "outcome"),
    [(1, (0.0, 1.0), "TP"), (0, (1.0, 0.0), "TN"), (0, (0.0, 1.0), "FP"), (1, (1.0, 0.0), "FN")],
)
def test_outcome(label, logits, outcome):
    scan = make_scan(0, label, logits)
    assert scan.outcome == outcome and scan.predicted == int(logits[1])


def test_completeness_error():
    """LRP against the logit, IG against its difference to the zero volume's, none for GGC."""
    assert maps.completeness_error("LRP", 1.9, 2.0, 5.0) == pytest.approx(0.05)
    assert maps.completeness_error("IG", 1.2, 2.0, 1.0) == pytest.approx(0.2)
    assert np.isnan(maps.completeness_error("GGC", 1.0, 2.0, 1.0))
    assert np.isnan(maps.completeness_error("IG", 1.0, 2.0, 1.991))
    assert maps.completeness_error("IG", 1.0, 2.0, 1.989) == pytest.approx(0.989 / 0.011)
    assert maps.completeness_error("LRP", 1.0, 0.0, 1.0) == np.inf


def test_folds_of_unequal_size(tmp_path):
    """A fold counts once in the mean over folds, a scan once in those by outcome and of scans."""
    data = random_maps(3)
    for fold, rows in enumerate(([0], [1, 2])):
        of_fold = make_fold(tmp_path, fold)
        for row in rows:
            of_fold.add(make_scan(row, 1, (0.0, 1.0)), data[row], torch.zeros(2))
        of_fold.write()
        mean_scan = np.full(SHAPE, fold, dtype=np.float32)
        for name in ("mean_scan", "coverage"):
            nib.save(nib.Nifti1Image(mean_scan, AFFINE), tmp_path / f"{name}_f{fold}.nii.gz")
    table, shares, written = mean_maps.assemble(
        tmp_path, "LRP", 2, LIKE_IMG, by_outcome=True, equal=False, described="LRP"
    )
    powers = [np.square(data[0]).sum(), np.square((data[1] + data[2]) / 2).sum()]
    assert shares == pytest.approx(dict(enumerate(powers / np.sum(powers))), rel=1e-5)
    found = {path.name: maps.read_map(path, SHAPE) for path in written if path.suffix == ".gz"}
    names = {"mean_scan.nii.gz", "coverage.nii.gz", "LRP_map_all.nii.gz", "LRP_map_TP.nii.gz"}
    assert set(found) == names
    expected = (data[0] + (data[1] + data[2]) / 2) / 2
    assert found["LRP_map_all.nii.gz"] == pytest.approx(expected, abs=1e-6)
    assert found["LRP_map_TP.nii.gz"] == pytest.approx(sum(data) / 3, abs=1e-6)
    assert found["mean_scan.nii.gz"] == pytest.approx(np.full(SHAPE, 2 / 3))
    assert list(table["fold"]) == [0, 1, 1] and list(table["logit"]) == [1, 1, 1]
    assert table["map_sum"].to_numpy() == pytest.approx([each.sum() for each in data], rel=1e-4)


def test_a_fold_of_one_label_has_no_contrast(tmp_path, caplog):
    """The contrast is that of the other folds, and the fold is named."""
    data = random_maps(4)
    for fold, labels in enumerate([(0, 1), (0, 0)]):
        of_fold = make_fold(tmp_path, fold)
        of_fold.groups |= {name: maps.RunningMean() for name in maps.GROUPS}
        for i, label in enumerate(labels):
            of_fold.add(make_scan(2 * fold + i, label, (1.0, 0.0)), data[2 * fold + i], np.zeros(2))
        of_fold.write()
        for name in ("mean_scan", "coverage"):
            nib.save(LIKE_IMG, tmp_path / f"{name}_f{fold}.nii.gz")
    mean_maps.assemble(tmp_path, "LRP", 2, LIKE_IMG, by_outcome=False, equal=False, described="LRP")
    found = maps.read_map(tmp_path / "LRP_contrast_all.nii.gz", SHAPE)
    assert found == pytest.approx(data[1] - data[0], abs=1e-6)
    assert "LRP: the contrast leaves out fold 1, where all scans" in caplog.text


def test_maps_that_an_earlier_command_left_are_read_back(tmp_path):
    """To the bit, in C order, and only where all of a batch are there."""
    fold, scans = make_fold(tmp_path, 0), [make_scan(i, 1, (0.0, 1.0)) for i in (0, 1)]
    data = random_maps(2)
    fold.add(scans[0], data[0], torch.zeros(2))
    assert fold.saved(scans) is None
    fold.add(scans[1], data[1], torch.zeros(2))
    found = fold.saved(scans)
    assert all((one == other).all() for one, other in zip(found, data, strict=True))
    assert all(each.flags.c_contiguous for each in found)
    assert make_fold(tmp_path, 0, saves_scans=False).saved(scans) is None
    (tmp_path / fold.name_of(scans[0])).write_bytes(b"no image")
    with pytest.raises(InputError, match="--overwrite"):
        fold.saved(scans)


def test_a_map_of_another_shape_is_refused(tmp_path):
    nib.save(LIKE_IMG, tmp_path / "x.nii")
    with pytest.raises(InputError, match="another shape than the scans"):
        maps.read_map(tmp_path / "x.nii", (3, 4, 6))
