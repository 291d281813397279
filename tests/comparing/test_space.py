"""Names of maps, fold maps beside them, grids, and atlases on them."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from comparing import space
from utils import InputError

SHAPE = (5, 6, 7)


def save(path: Path, data: np.ndarray, affine: np.ndarray = np.eye(4)) -> Path:  # noqa: B008
    path.parent.mkdir(exist_ok=True)
    nib.save(nib.Nifti1Image(np.asarray(data, dtype=np.float32), affine), path)
    return path


def test_names_of_maps():
    paths = [Path("a/LRP_map_all.nii.gz"), Path("b/LRP_map_all.nii.gz"), Path("b/SVM_f0.nii")]
    assert space.name_maps(paths) == ["a/LRP", "b/LRP", "SVM_f0"]
    with pytest.raises(InputError, match="two maps have one name"):
        space.name_maps([Path("x/a/LRP.nii"), Path("y/a/LRP.nii")])


def test_fold_maps_come_in_the_folds_order(tmp_path):
    """Only those of the same map: neither another's, nor one whose name goes on."""
    for name in ("M_f10", "M_f2", "M_f0", "M_f0_old", "XM_f1", "M_fx"):
        (tmp_path / f"{name}.nii.gz").touch()
    found = space.fold_paths(tmp_path / "M_all.nii.gz")
    assert [path.name for path in found] == ["M_f0.nii.gz", "M_f2.nii.gz", "M_f10.nii.gz"]
    assert space.fold_paths(tmp_path / "M_f0.nii.gz") == []


def test_background_is_the_mean_scan_beside_any_map_on_their_grid(tmp_path):
    """One on another grid is passed over; without any it is the template on the maps' grid."""
    data, reference = np.ones(SHAPE), np.arange(210).reshape(SHAPE)
    affine = np.diag([20, 20, 20, 1.0])
    affine[:3, 3] = -40, -60, -40
    paths = [save(tmp_path / name / f"{name}.nii", data * 0, affine) for name in "ab"]
    reference_path = save(tmp_path / "r.nii", reference, affine)
    save(tmp_path / "a" / "mean_scan.nii.gz", data)
    mask_path = save(tmp_path / "mask.nii", data, affine)
    maps = space.load_maps(paths)
    found = space.load_space(maps, reference_path, 99, mask_path)
    assert found.background_source == "the ICBM152 template"
    assert found.background_img.shape == SHAPE and found.background_img.get_fdata().max() > 0
    assert found.inside.sum() == 110 and len(found.inside) == 210
    data[0] = 0
    save(tmp_path / "b" / "mean_scan.nii.gz", data, affine)
    found = space.load_space(maps, reference_path, 99, None)
    assert found.background_source == "the mean scan" and len(found.inside) == 168
