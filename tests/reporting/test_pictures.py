"""Pictures: they are drawn of odd input too, and scales and cuts are where they should be."""

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from conftest import AFFINE, SHAPE, make_volume, save_scan

from loading.image import write_image
from reporting import map_pictures, pictures

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def test_color_limit():
    assert map_pictures.color_limit(np.arange(-1000, 1001)) == pytest.approx(1000, rel=0.01)
    assert map_pictures.color_limit(np.zeros(5)) == 1
    outlier = np.append(np.ones(10_000), 1e6)
    assert map_pictures.color_limit(outlier) == pytest.approx(1)


def test_cuts_go_through_the_peaks_or_evenly_through_the_head():
    data, nothing = np.zeros(SHAPE), np.zeros(SHAPE)
    data[4:20, 6:8, 10:20] = 1
    scan_img = nib.Nifti1Image(data, AFFINE)
    cuts = map_pictures.slice_cuts(nib.Nifti1Image(nothing, AFFINE), scan_img, 0.5)
    assert cuts["x"].min() >= 30 - 2 * 19 and cuts["x"].max() <= 30 - 2 * 4
    assert cuts["y"].min() >= -40 + 2.5 * 6 and cuts["y"].max() <= -40 + 2.5 * 7
    assert np.diff(cuts["z"]) == pytest.approx(np.diff(cuts["z"])[0]) and len(cuts["z"]) == 7
    nothing[15:18, 7:10, 11:14] = -2
    cuts = map_pictures.slice_cuts(nib.Nifti1Image(nothing, AFFINE), scan_img, 0.5)
    for axis, centre in zip("xyz", AFFINE @ (16, 8, 12, 1), strict=False):
        assert np.abs(cuts[axis] - centre).min() <= 2.5


def test_cuts_through_the_peak_of_an_oblique_map():
    """In mm of the scanner, not of the map's own axes."""
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(0.3), -np.sin(0.3)], [np.sin(0.3), np.cos(0.3)]]
    data = np.zeros(SHAPE)
    data[15:18, 7:10, 11:14] = 2
    map_img = nib.Nifti1Image(data, turn @ AFFINE)
    cuts = map_pictures.slice_cuts(map_img, map_img, 0.5)
    for axis, centre in zip("xyz", turn @ AFFINE @ (16, 8, 12, 1), strict=False):
        assert np.abs(cuts[axis] - centre).min() <= 2.5


def test_map_of_zeros_is_drawn(tmp_path):
    save_scan(tmp_path / "m.nii.gz", np.zeros(SHAPE, dtype=np.float32))
    save_scan(tmp_path / "scan.nii.gz", make_volume(0, 0))
    png_path, _, html_path = map_pictures.draw_map(
        tmp_path / "m", tmp_path / "scan.nii.gz", "a title", "a unit"
    )
    assert png_path.read_bytes().startswith(PNG_SIGNATURE) and "a title" in html_path.read_text()


@pytest.mark.filterwarnings("error")
def test_a_map_with_a_qform_only_is_drawn_without_nilearns_warning(tmp_path):
    """Which the user could do nothing about; here with oblique axes, as scanners write them."""
    affine = np.array([[2, 0.2, 0, -9], [-0.2, 2, 0, -9], [0, 0, 2, -9], [0, 0, 0, 1.0]])
    for name in ("m.nii.gz", "scan.nii.gz"):
        img = nib.Nifti1Image(np.random.default_rng(0).random((9, 10, 11), np.float32), affine)
        img.set_qform(affine, 1)
        img.set_sform(None, 0)
        nib.save(img, tmp_path / name)
    map_pictures.draw_map(tmp_path / "m", tmp_path / "scan.nii.gz", "a title", "a unit")


def test_loss_curves_mark_folds_that_have_not_learned(tmp_path, monkeypatch):
    """A line is the labels' entropy; the dot is the kept epoch, which need not be the lowest."""
    history = pd.DataFrame({"epoch": [1, 2, 3], "train_loss": [0.7, 0.6, 0.5],
                            "valid_loss": [0.7, 0.65, 0.649], "best": [1, 1, 0]})  # fmt: skip
    drawn = []
    monkeypatch.setattr(pictures, "save_figure", lambda figure, *path: drawn.append(figure))
    pictures.plot_loss_curves(tmp_path / "a.png", {0: history, 3: history}, 0.5623, [3], 0)
    first, second = drawn[0].axes
    assert (first.get_title(), second.get_title()) == ("fold 0", "fold 3: not learned")
    assert second.title.get_color() != first.title.get_color()
    lines = {line.get_label(): line for line in first.get_lines()}
    assert set(lines["nothing learned"].get_ydata()) == {0.5623}
    assert lines["kept"].get_xydata().tolist() == [[2, 0.65]]


def test_viewers_find_colours_and_names_in_a_maps_header(tmp_path):
    """As nibabel and, where it is installed, ITK read them."""
    data = make_volume(0, 1) - 0.5
    labels = map_pictures.color_labels(
        data, "IG map", "IG of the patients' logit, modelA24 · 5 folds"
    )
    like_img = nib.load(save_scan(tmp_path / "scan.nii.gz", data))
    write_image(tmp_path / "m.nii.gz", data, like_img, labels=labels)
    header = nib.load(tmp_path / "m.nii.gz").header
    assert float(header["cal_max"]) == pytest.approx(map_pictures.color_limit(data))
    assert float(header["cal_min"]) == -float(header["cal_max"])
    assert bytes(header["intent_name"]).rstrip(b"\0") == b"IG map"
    description = bytes(header["descrip"]).rstrip(b"\0")
    assert description == b"IG of the patients' logit, modelA24, 5 folds"
    itk = pytest.importorskip("SimpleITK", reason="SimpleITK is not installed")
    img = itk.ReadImage(str(tmp_path / "m.nii.gz"))
    assert img.GetMetaData("intent_name") == "IG map" and "logit" in img.GetMetaData("descrip")
    assert float(img.GetMetaData("cal_max")) == pytest.approx(float(header["cal_max"]), rel=1e-4)
    assert np.allclose(itk.GetArrayFromImage(img).T, data)
