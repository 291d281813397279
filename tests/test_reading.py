"""What is read: spellings of the CSV, formats and headers of scans, and the same volumes always."""

import bz2
import gzip
import logging
import unicodedata
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from conftest import AFFINE, SHAPE, make_volume, save_scan, write_cohort
from nibabel.testing import data_path as NIBABEL_DATA

import csv_rows
import dataset
import scan_files
from errors import InputError, RunError

TWO_ROWS = "scan00.nii.gz,0\nscan01.nii.gz,1\n"


def read_text(folder: Path, text: str | bytes) -> dataset.Cohort:
    """Write a data.csv with this content into the folder and read it."""
    csv_path = folder / "data.csv"
    csv_path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return dataset.read_cohort(csv_path)


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the warnings that were logged."""
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


# The CSV


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("scan00.nii.gz,0\nscan01.nii.gz,1\n", id="no-header"),
        pytest.param("path,label\nscan00.nii.gz,0\nscan01.nii.gz,1\n", id="header"),
        pytest.param("Image File,Diagnosis\nscan00.nii.gz,0\nscan01.nii.gz,1", id="any-header"),
        pytest.param("\ufeffscan00.nii.gz,0\nscan01.nii.gz,1\n", id="byte-order-mark"),
        pytest.param("\ufeffpath,label\nscan00.nii.gz,0\nscan01.nii.gz,1\n", id="mark-and-header"),
        pytest.param("scan00.nii.gz,0\r\nscan01.nii.gz,1\r\n", id="windows-line-ends"),
        pytest.param("scan00.nii.gz,0\rscan01.nii.gz,1\r", id="old-mac-line-ends"),
        pytest.param("scan00.nii.gz;0\nscan01.nii.gz;1\n", id="semicolons"),
        pytest.param("path;label;subject\nscan00.nii.gz;0;\nscan01.nii.gz;1;\n", id="and-header"),
        pytest.param("scan00.nii.gz\t0\r\nscan01.nii.gz\t1\r\n", id="tabs"),
        pytest.param("\n\nscan00.nii.gz,0\n,\n\nscan01.nii.gz,1\n\n", id="empty-lines"),
        pytest.param('"scan00.nii.gz","0"\n"scan01.nii.gz", "1"\n', id="quotes"),
        pytest.param(" scan00.nii.gz , 0\nscan01.nii.gz\t, 1 \n", id="spaces"),
        pytest.param("scan00.nii.gz,0.0\nscan01.nii.gz,1.0\n", id="labels-as-floats"),
        pytest.param("scan00.nii.gz,0,\nscan01.nii.gz,1,\n", id="empty-third-column"),
        pytest.param("path,label,subject\nscan00.nii.gz,0,\nscan01.nii.gz,1,\n", id="no-subjects"),
    ],
)
def test_csv_spellings_mean_the_same(folder, text):
    cohort = read_text(folder, text)
    assert cohort.table.to_dict("list") == {
        "path": ["scan00.nii.gz", "scan01.nii.gz"],
        "file": [str(folder / "scan00.nii.gz"), str(folder / "scan01.nii.gz")],
        "label": [0, 1],
    }
    assert pd.api.types.is_integer_dtype(cohort.table["label"])
    assert cohort.subjects is None


def test_subject_column(folder, caplog):
    caplog.set_level(logging.INFO, "heatmaps")
    cohort = read_text(folder, "scan00.nii.gz,0,007\nscan01.nii.gz,1,s2\nscan02.nii.gz,0,007\n")
    assert cohort.subjects.tolist() == ["007", "s2", "007"]
    assert "2 subjects, 3 scans" in caplog.text
    assert warnings_in(caplog) == []


def test_subject_with_both_labels_is_a_warning(folder, caplog):
    cohort = read_text(folder, "scan00.nii.gz,0,anna\nscan01.nii.gz,1,anna\nscan02.nii.gz,0,ben\n")
    (warning,) = warnings_in(caplog)
    assert "both labels: anna" in warning
    assert len(cohort.table) == 3


@pytest.mark.parametrize("name", ["a, b c.nii.gz", "Jürgen Åß 脑.nii.gz", 'a "b".nii'])
def test_quoted_and_unicode_paths(folder, name):
    (folder / "sub dir, ä").mkdir()
    save_scan(folder / "sub dir, ä" / name, make_volume(9, 1))
    table = pd.DataFrame({"path": ["scan00.nii.gz", f"sub dir, ä/{name}"], "label": [0, 1]})
    table.to_csv(folder / "data.csv", index=False, header=False)
    cohort = dataset.read_cohort(folder / "data.csv")
    assert cohort.table["file"].tolist()[1] == str(folder / "sub dir, ä" / name)


def test_a_semicolon_in_a_path_and_a_comma_in_a_path(folder):
    for name in ("a;b.nii.gz", "a,b.nii.gz"):
        (folder / "scan00.nii.gz").replace(folder / name)
        save_scan(folder / "scan00.nii.gz", make_volume(0, 0))
    assert read_text(folder, "a;b.nii.gz,0\nscan01.nii.gz,1\n").table["path"][0] == "a;b.nii.gz"
    assert read_text(folder, "a,b.nii.gz;0\nscan01.nii.gz;1\n").table["path"][0] == "a,b.nii.gz"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(TWO_ROWS.encode("utf-16"), "it is UTF-16", id="utf-16"),
        pytest.param(TWO_ROWS.encode("utf-16-be"), "it is UTF-16", id="utf-16-without-mark"),
        pytest.param(
            (TWO_ROWS + "Jürgen.nii,0\n").encode("latin-1"), "row 3 has letters that are not UTF-8",
            id="latin-1",
        ),
    ],
)  # fmt: skip
def test_other_encodings_are_refused_with_what_to_do(folder, content, message):
    with pytest.raises(InputError, match=rf"data\.csv cannot be read.*{message}.*CSV UTF-8"):
        read_text(folder, content)


@pytest.mark.parametrize("on_disk", ["NFC", "NFD"])
@pytest.mark.parametrize("in_csv", ["NFC", "NFD"])
def test_letters_are_found_however_they_are_composed(folder, on_disk, in_csv):
    """A Mac decomposes ü in file names, a spreadsheet does not."""
    name = "Jürgen.nii.gz"
    save_scan(folder / unicodedata.normalize(on_disk, name), make_volume(0, 0))
    cohort = read_text(folder, unicodedata.normalize(in_csv, name) + ",0\nscan01.nii.gz,1\n")
    assert Path(cohort.table["file"][0]).name == unicodedata.normalize(on_disk, name)


@pytest.mark.parametrize("name", ["x.HEAD", "x.nii.bz2", "x.img.gz", "plain"])
def test_a_scan_in_row_1_is_no_header_row(folder, name):
    """Whatever the label's fault, a row that names a scan is never skipped."""
    (folder / "plain").write_bytes((folder / "scan00.nii.gz").read_bytes())
    with pytest.raises(InputError, match="row 1: label must be 0 or 1, got 'AD'"):
        read_text(folder, f"{name},AD\n{TWO_ROWS}")


@pytest.mark.parametrize(
    "text", ['"scan00.nii.gz,0\n' + TWO_ROWS * 1000, "x" * 10_000 + ",0\n", TWO_ROWS + '"' * 9999]
)
def test_a_lost_quote_gives_a_short_message(folder, text):
    with pytest.raises(InputError) as caught:
        read_text(folder, text)
    assert len(str(caught.value)) < 1000


def test_paths_are_looked_up_from_the_csv_then_from_here(folder, tmp_path, monkeypatch):
    here = write_cohort(tmp_path / "here", 6).parent  # has scan00 too, and scan05 as the only one
    monkeypatch.chdir(here)
    cohort = read_text(folder, f"scan00.nii.gz,0\nscan05.nii.gz,1\n{folder / 'scan02.nii.gz'},0\n")
    assert cohort.table["file"].tolist() == [
        str(folder / "scan00.nii.gz"),
        str(here / "scan05.nii.gz"),
        str(folder / "scan02.nii.gz"),
    ]


def test_csv_given_relative_to_here(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    cohort = dataset.read_cohort(Path("cohort/data.csv"))
    assert cohort.table["file"].iloc[0] == str(folder / "scan00.nii.gz")


def test_tilde_is_the_home_folder(folder, tmp_path, monkeypatch):
    home = write_cohort(tmp_path / "home", 2).parent
    monkeypatch.setenv("HOME", str(home))
    cohort = read_text(folder, "~/scan00.nii.gz,0\nscan01.nii.gz,1\n")
    assert cohort.table["file"].iloc[0] == str(home / "scan00.nii.gz")


def test_a_link_to_a_listed_scan_is_a_duplicate(folder):
    (folder / "link.nii.gz").symlink_to(folder / "scan00.nii.gz")
    with pytest.raises(InputError, match=r"row 2: 'link.nii.gz' is listed already, in row 1"):
        read_text(folder, "scan00.nii.gz,0\nlink.nii.gz,1\n")


@pytest.mark.parametrize("names", [("x.hdr", "x.img"), ("x.img", "x.hdr"), ("y.hdr", "x.img")])
@pytest.mark.parametrize("compression", ["", ".gz"])
def test_both_files_of_a_pair_are_one_scan(folder, names, compression):
    save_as(folder / f"x.hdr{compression}", make_volume(3, 1))
    (folder / f"y.hdr{compression}").symlink_to(f"x.hdr{compression}")
    first, second = (name + compression for name in names)
    with pytest.raises(InputError, match=rf"row 3: '{second}' is listed already, in row 2"):
        read_text(folder, f"scan00.nii.gz,0\n{first},1\n{second},1\n")


def test_files_of_one_name_in_other_formats_are_several_scans():
    names = ["x.hdr", "x.nii", "x.mgz", "x.PAR", "x.HEAD", "x.hdr.gz", "y.hdr"]
    assert len({csv_rows.scan_key(Path(name)) for name in names}) == len(names)
    for voxels, header in (("x.REC", "x.PAR"), ("x.BRIK", "x.HEAD"), ("x.IMG", "x.HDR")):
        assert csv_rows.scan_key(Path(voxels)) == csv_rows.scan_key(Path(header))


# What scans may be


def save_as(path: Path, data: np.ndarray) -> None:
    """Write a scan in the format that the path's suffix says."""
    suffix = path.name.partition(".")[2].removesuffix(".gz")
    kinds = {"hdr": nib.Nifti1Pair, "mgz": nib.MGHImage, "mgh": nib.MGHImage}
    nib.save(kinds.get(suffix, nib.Nifti1Image)(data, AFFINE), path)


@pytest.mark.parametrize(
    ("name", "listed"),
    [
        ("x.nii", "x.nii"), ("x.nii.gz", "x.nii.gz"), ("x.nii.bz2", "x.nii.bz2"),
        ("x.mgz", "x.mgz"), ("x.mgh", "x.mgh"), ("x.hdr", "x.hdr"), ("x.hdr", "x.img"),
        ("x.hdr.gz", "x.img.gz"),
    ],
)  # fmt: skip
def test_formats_give_the_same_volume(tmp_path, name, listed):
    data = make_volume(3, 1)
    save_as(tmp_path / name, data)
    (tmp_path / "data.csv").write_text(f"{listed},1\n")
    cohort = dataset.read_cohort(tmp_path / "data.csv")
    assert cohort.volume_shape == SHAPE
    assert all(type(side) is int for side in cohort.volume_shape)  # run.json can hold it
    np.testing.assert_allclose(cohort.like_img.affine, AFFINE, atol=1e-4)
    volume_data, n_nonfinite = scan_files.load_volume(cohort.table["file"][0])
    np.testing.assert_array_equal(volume_data, (data - data.min()) / (data.max() - data.min()))
    assert n_nonfinite == 0


KINDS = ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"]


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", KINDS)
def test_voxel_types_in_both_byte_orders(tmp_path, order, kind):
    """NIfTI-1's integers and floats, little- and big-endian, give the values that were stored."""
    raw_data = (np.arange(np.prod(SHAPE)).reshape(SHAPE) % 120).astype(kind)
    header = nib.Nifti1Header(endianness=order)
    header.set_data_dtype(np.dtype(kind))
    nib.save(nib.Nifti1Image(raw_data, AFFINE, header), tmp_path / "x.nii.gz")
    img, problem = scan_files.check_scan(str(tmp_path / "x.nii.gz"))
    assert (problem, img.header.endianness, img.get_data_dtype().str[1:]) == ("", order, kind)
    volume_data, _ = scan_files.load_volume(str(tmp_path / "x.nii.gz"))
    np.testing.assert_allclose(volume_data, raw_data / 119, rtol=0, atol=1e-7)


SHEAR = np.array([[1, 0.2, 0, 0], [0, 1, 0, 0], [0.1, 0, 1, 0], [0, 0, 0, 1]])
TURN = np.array([[0.8, -0.6, 0, 0], [0.6, 0.8, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])


@pytest.mark.parametrize(
    "affine",
    [
        AFFINE, AFFINE * [[-1], [1], [1], [1]], AFFINE * [[-1], [-1], [-1], [1]], TURN @ AFFINE,
        AFFINE[[2, 0, 1, 3]], SHEAR @ AFFINE,
    ],
    ids=["left-handed", "right-handed", "all-flipped", "oblique", "axes-swapped", "sheared"],
)  # fmt: skip
def test_affines_are_taken_as_they_are(tmp_path, affine, caplog):
    """No scan is turned or resampled: voxels and affine are those of the file."""
    data = make_volume(4, 1)
    nib.save(nib.Nifti1Image(data, affine), tmp_path / "x.nii.gz")
    cohort = read_text(tmp_path, "x.nii.gz,1\n")
    np.testing.assert_allclose(cohort.like_img.affine, affine, atol=1e-5)
    volume_data, _ = scan_files.load_volume(cohort.table["file"][0])
    np.testing.assert_array_equal(volume_data, data / data.max())
    assert warnings_in(caplog) == []


def save_forms(path: Path, sform_code: int, qform_code: int, qform: np.ndarray) -> None:
    """Write a scan with the cohort's affine as sform and another qform."""
    img = nib.Nifti1Image(make_volume(0, 0), None)
    img.set_sform(AFFINE, sform_code)
    img.set_qform(qform, qform_code)
    nib.save(img, path)


def test_sform_and_qform_that_disagree_are_one_warning(folder, caplog):
    """Moved by 3 mm in one scan and by 5 mm in another: said once, with the larger distance."""
    for name, mm in (("scan00.nii.gz", 3), ("scan02.nii.gz", 5)):
        moved = AFFINE.copy()
        moved[1, 3] += mm
        save_forms(folder / name, 4, 1, moved)
    cohort = dataset.read_cohort(folder / "data.csv")
    np.testing.assert_allclose(cohort.like_img.affine, AFFINE, atol=1e-5)
    (warning,) = warnings_in(caplog)
    assert "2 of 4 scans up to 5 mm apart; the sform is used (first: scan00.nii.gz)" in warning


def test_a_qform_that_is_no_rotation_is_a_warning(folder, caplog):
    img = nib.load(folder / "scan01.nii.gz")
    img.header["quatern_b"] = 2  # b² + c² + d² must not be more than 1
    nib.save(nib.Nifti1Image(img.get_fdata(), None, img.header), folder / "scan01.nii.gz")
    dataset.read_cohort(folder / "data.csv")
    (warning,) = warnings_in(caplog)
    assert "1 of 4 scans up to inf mm apart" in warning


@pytest.mark.parametrize(("sform_code", "qform_code"), [(4, 0), (0, 4), (2, 1)])
def test_forms_that_agree_or_stand_alone_are_no_warning(
    folder, caplog, sform_code, qform_code
):  # fmt: skip
    """Of two forms of which one is unset the other is used; near means within 0.1 mm."""
    near = AFFINE.copy()
    near[0, 3] += 0.05 if sform_code and qform_code else 0
    other = AFFINE + 7 * np.eye(4, 4, 3) if qform_code == 0 else near
    save_forms(folder / "scan00.nii.gz", sform_code, qform_code, other)
    cohort = dataset.read_cohort(folder / "data.csv")
    np.testing.assert_allclose(cohort.like_img.affine, AFFINE, atol=1e-5)
    assert warnings_in(caplog) == []


def test_minc_is_read():
    img, problem = scan_files.check_scan(str(Path(NIBABEL_DATA) / "tiny.mnc"))
    assert (img.shape, problem) == ((10, 20, 20), "")


def test_trailing_axes_of_length_one_are_dropped(folder):
    save_scan(folder / "scan01.nii.gz", make_volume(1, 1)[..., None])
    save_scan(folder / "scan02.nii.gz", make_volume(2, 0)[..., None, None])
    cohort = dataset.read_cohort(folder / "data.csv")
    assert cohort.volume_shape == SHAPE
    volume_data, _ = scan_files.load_volume(cohort.table["file"][1])
    expected = make_volume(1, 1)
    np.testing.assert_array_equal(volume_data, expected / expected.max())


def test_integer_scan_with_slope_and_intercept(tmp_path):
    raw_data = (np.arange(np.prod(SHAPE)).reshape(SHAPE) % 1000).astype(np.int16)
    img = nib.Nifti1Image(raw_data, AFFINE)
    img.header.set_slope_inter(-0.5, 10)  # a negative slope turns dark into bright
    nib.save(img, tmp_path / "x.nii.gz")
    assert scan_files.check_scan(str(tmp_path / "x.nii.gz"))[1] == ""
    volume_data, _ = scan_files.load_volume(str(tmp_path / "x.nii.gz"))
    assert volume_data.dtype == np.float32
    np.testing.assert_allclose(volume_data, 1 - raw_data / 999, rtol=0, atol=1e-6)


def test_min_max_scaling_is_exact(tmp_path):
    data = make_volume(5, 1) * 700 - 100
    save_scan(tmp_path / "x.nii", data)
    volume_data, _ = scan_files.load_volume(str(tmp_path / "x.nii"))
    assert volume_data.dtype == np.float32
    assert (volume_data.min(), volume_data.max()) == (0, 1)
    np.testing.assert_array_equal(volume_data, (data - data.min()) / (data.max() - data.min()))


def test_nonfinite_voxels_become_zero_and_are_counted(tmp_path):
    data = make_volume(5, 0) + 1
    bad = (np.array([2, 11, 20]), np.array([3, 12, 25]), np.array([4, 13, 22]))
    data[bad] = np.nan, np.inf, -np.inf
    save_scan(tmp_path / "x.nii.gz", data)
    assert scan_files.check_scan(str(tmp_path / "x.nii.gz"))[1] == ""
    volume_data, n_nonfinite = scan_files.load_volume(str(tmp_path / "x.nii.gz"))
    data[bad] = 0
    assert n_nonfinite == 3
    np.testing.assert_array_equal(volume_data, data / data.max())


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_a_range_beyond_float32_is_an_error(tmp_path):
    data = make_volume(5, 0)
    data[0, 0, :2] = -3e38, 3e38  # their difference is more than float32 can hold
    save_scan(tmp_path / "x.nii", data)
    with pytest.raises(RunError, match=r"from -3e\+38 to 3e\+38"):
        scan_files.load_volume(str(tmp_path / "x.nii"))


def test_contrast_is_judged_in_the_precision_of_training(folder):
    data = np.full(SHAPE, 1e6)
    data[5, 6, 7] += 1e-6  # float32 does not see it
    save_scan(folder / "scan01.nii.gz", data)
    with pytest.raises(InputError, match=r"row 2: scan01.nii.gz has no contrast"):
        dataset.read_cohort(folder / "data.csv")


def test_pair_without_its_voxels_is_refused(tmp_path):
    save_as(tmp_path / "x.hdr", make_volume(0, 0))
    (tmp_path / "x.img").unlink()
    assert "not a readable image" in scan_files.check_scan(str(tmp_path / "x.hdr"))[1]


def test_gzip_of_several_members_is_read(tmp_path):
    content = save_scan(tmp_path / "x.nii", make_volume(0, 0)).read_bytes()
    half = len(content) // 2
    path = tmp_path / "x.nii.gz"
    path.write_bytes(gzip.compress(content[:half]) + gzip.compress(content[half:]))
    assert scan_files.check_scan(str(path))[1] == ""
    path.write_bytes(gzip.compress(content[:half]) + gzip.compress(content[half:-100]))
    assert "damaged" in scan_files.check_scan(str(path))[1]


def test_bytes_after_the_end_of_a_gzip_file_are_ignored(tmp_path):
    path = save_scan(tmp_path / "x.nii.gz", make_volume(0, 0))
    path.write_bytes(path.read_bytes() + bytes(512))
    assert scan_files.check_scan(str(path))[1] == ""
    assert scan_files.load_volume(str(path))[0].shape == SHAPE


def test_voxels_that_fail_their_checksum_are_refused(tmp_path):
    """Stored without compression, a changed byte decodes all the same: only the checksum tells."""
    save_scan(tmp_path / "x.nii", make_volume(0, 0))
    content = bytearray(gzip.compress((tmp_path / "x.nii").read_bytes(), 0))
    (tmp_path / "x.nii.gz").write_bytes(content)
    scan_files.load_volume(str(tmp_path / "x.nii.gz"))
    content[len(content) // 2] ^= 1
    (tmp_path / "x.nii.gz").write_bytes(content)
    with pytest.raises(RunError, match=r"x\.nii\.gz cannot be read"):
        scan_files.load_volume(str(tmp_path / "x.nii.gz"))


def test_a_cut_bzip2_file_is_damaged(tmp_path):
    content = save_scan(tmp_path / "x.nii", make_volume(0, 0)).read_bytes()
    path = tmp_path / "x.nii.bz2"
    for cut in (bz2.compress(content[:-4]), bz2.compress(content)[:-4000]):
        path.write_bytes(cut)
        assert "damaged" in scan_files.check_scan(str(path))[1]
