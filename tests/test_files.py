"""Files that appear whole or not at all, and headers that maps inherit."""

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch

import checkpoints
import files
from errors import InputError

SHAPE = (5, 6, 7)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), files.whole_file(path) as temporary_path:
        temporary_path.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["table.csv"]


def test_missing_values_are_empty_cells(tmp_path):
    files.write_csv(tmp_path / "t.csv", pd.DataFrame({"a": [1, 2], "b": [np.nan, 0.5]}))
    assert (tmp_path / "t.csv").read_text() == "a,b\n1,\n2,0.5\n"


def test_equal_weights_give_equal_bytes(tmp_path):
    for name in ("a.pth", "other_name.pth"):
        checkpoints.save(tmp_path / name, {"w": torch.arange(5.0)})
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "other_name.pth").read_bytes()


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 no archive"])
def test_what_is_no_checkpoint_is_an_input_error(tmp_path, content):
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(InputError, match=r"w\.pth is not a checkpoint"):
        checkpoints.load(tmp_path / "w.pth")


def test_a_checkpoint_must_be_a_dict(tmp_path):
    torch.save(torch.ones(2), tmp_path / "w.pth")
    with pytest.raises(InputError, match="not a state dict but a Tensor"):
        checkpoints.load(tmp_path / "w.pth")


@pytest.mark.parametrize("content", ["", "[1, 2]", "{"])
def test_what_is_no_record_is_an_input_error(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(InputError, match=r"run\.json"):
        files.read_json(tmp_path / "run.json")


@pytest.mark.parametrize(("sform_code", "qform_code"), [(4, 1), (0, 3), (2, 0), (0, 0)])
def test_map_header_is_the_scans(tmp_path, sform_code, qform_code):
    """Both transforms keep their own matrix and code, also where they disagree or are missing."""
    sform = np.array([[0, -2.0, 0, 9], [3, 0, 0, -8], [0, 0, 1.5, 7], [0, 0, 0, 1]])
    qform = np.diag([2.0, 3, 1.5, 1])
    scan_img = nib.Nifti1Image(np.ones(SHAPE, np.int16), None)
    scan_img.header.set_xyzt_units("mm", "sec")
    scan_img.set_qform(qform, qform_code)
    scan_img.set_sform(sform, sform_code)
    nib.save(scan_img, tmp_path / "scan.nii.gz")
    scan_img = nib.load(tmp_path / "scan.nii.gz")
    files.write_map(tmp_path / "map.nii.gz", np.ones(SHAPE), scan_img)
    map_img = nib.load(tmp_path / "map.nii.gz")
    assert (map_img.affine == scan_img.affine).all()
    assert map_img.get_data_dtype() == np.float32
    for field in files.ORIENTATION_FIELDS:
        assert (map_img.header[field] == scan_img.header[field]).all(), field


def test_map_of_a_scan_that_is_not_nifti(tmp_path):
    affine = np.diag([-1.0, 1, 1, 1])
    nib.save(nib.MGHImage(np.ones(SHAPE, np.float32), affine), tmp_path / "scan.mgz")
    files.write_map(tmp_path / "map.nii.gz", np.ones(SHAPE), nib.load(tmp_path / "scan.mgz"))
    map_img = nib.load(tmp_path / "map.nii.gz")
    assert (map_img.affine == affine).all()
    assert map_img.header.get_xyzt_units()[0] == "mm"
