"""Reading the CSV, checking the scans, and scaling them."""

import gzip
import logging
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import AFFINE, SHAPE, make_volume, save_scan, write_cohort
from nibabel.arrayproxy import ArrayProxy
from nibabel.testing import data_path as NIBABEL_DATA

import dataset
import scan_files
from utils import InputError, RunError

OTHER_AFFINE = AFFINE + np.diag([0, 0, 0.5, 0])


@pytest.fixture
def folder(tmp_path) -> Path:
    """Return a folder with four scans, labels 0 1 0 1, that a test may spoil."""
    return write_cohort(tmp_path / "cohort", 4).parent


def read_text(folder: Path, text: str | bytes) -> dataset.Cohort:
    """Write a data.csv with this content into the folder and read it."""
    csv_path = folder / "data.csv"
    csv_path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return dataset.read_cohort(csv_path)


def error_of(csv_path: Path) -> str:
    """Return the message with which a CSV is refused."""
    with pytest.raises(InputError) as caught:
        dataset.read_cohort(csv_path)
    return str(caught.value)


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
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_subject_with_both_labels_is_a_warning(folder, caplog):
    cohort = read_text(folder, "scan00.nii.gz,0,anna\nscan01.nii.gz,1,anna\nscan02.nii.gz,0,ben\n")
    (warning,) = (r.getMessage() for r in caplog.records if r.levelno == logging.WARNING)
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


# What scans may be


def save_as(path: Path, data: np.ndarray) -> None:
    """Write a scan in the format that the path's suffix says."""
    kind = {".hdr": nib.Nifti1Pair, ".mgz": nib.MGHImage}.get(path.suffix, nib.Nifti1Image)
    nib.save(kind(data, AFFINE), path)


@pytest.mark.parametrize("name", ["x.nii", "x.nii.gz", "x.hdr", "x.mgz"])
def test_formats_give_the_same_volume(tmp_path, name):
    data = make_volume(3, 1)
    save_as(tmp_path / name, data)
    (tmp_path / "data.csv").write_text(f"{name},1\n")
    cohort = dataset.read_cohort(tmp_path / "data.csv")
    assert cohort.volume_shape == SHAPE
    assert all(type(side) is int for side in cohort.volume_shape)  # run.json can hold it
    np.testing.assert_allclose(cohort.like_img.affine, AFFINE, atol=1e-4)
    volume_data, n_nonfinite = scan_files.load_volume(cohort.table["file"][0])
    np.testing.assert_array_equal(volume_data, (data - data.min()) / (data.max() - data.min()))
    assert n_nonfinite == 0


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


# The checks


@pytest.mark.parametrize("odd", [0, 2])
def test_the_scan_of_another_shape_is_the_one_named(folder, odd):
    save_scan(folder / f"scan{odd:02d}.nii.gz", make_volume(odd, 0, (24, 27, 25)))
    message = error_of(folder / "data.csv")
    (line,) = message.splitlines()[1:]
    assert f"row {odd + 1}: scan{odd:02d}.nii.gz has shape (24, 27, 25)" in line
    assert str(SHAPE) in line


@pytest.mark.parametrize("odd", [0, 2])
def test_the_scan_of_another_affine_is_the_one_named(folder, odd):
    save_scan(folder / f"scan{odd:02d}.nii.gz", make_volume(odd, 0), OTHER_AFFINE)
    message = error_of(folder / "data.csv")
    assert message.count("another affine") == 1
    assert f"row {odd + 1}: scan{odd:02d}.nii.gz has another affine" in message


def test_rounding_of_affines_is_tolerated(folder):
    save_scan(folder / "scan01.nii.gz", make_volume(1, 1), AFFINE + 1e-4 * np.eye(4, 4, 3))
    cohort = dataset.read_cohort(folder / "data.csv")
    np.testing.assert_allclose(cohort.like_img.affine, AFFINE, atol=1e-6)


def test_every_problem_is_collected_with_its_row(tmp_path):
    folder = write_cohort(tmp_path / "cohort", 8).parent
    save_scan(folder / "scan03.nii.gz", make_volume(3, 1, (24, 27, 25)))
    save_scan(folder / "scan04.nii.gz", make_volume(4, 0), OTHER_AFFINE)
    save_scan(folder / "scan05.nii.gz", np.ones(SHAPE, np.float32))
    (folder / "scan06.nii.gz").write_text("no image")
    rows = [
        "path,label,subject", "scan00.nii.gz,0,a", "", "scan01.nii.gz,AD,b", "gone.nii.gz,0,c",
        "./scan00.nii.gz,0,a", "scan02.nii.gz", "scan03.nii.gz,1,d", "scan04.nii.gz,0,e",
        "scan05.nii.gz,1,f", "scan06.nii.gz,0,g", "scan07.nii.gz,1,", "scan02.nii.gz,2,h",
    ]  # fmt: skip
    (folder / "data.csv").write_text("\n".join(rows))
    message = error_of(folder / "data.csv")
    for line, text in {
        4: "label must be 0 or 1, got 'AD'",
        5: "no file 'gone.nii.gz'",
        6: "'./scan00.nii.gz' is listed already, in row 2",
        7: "needs a path and a label",
        8: "scan03.nii.gz has shape (24, 27, 25)",
        9: "scan04.nii.gz has another affine",
        10: "scan05.nii.gz has no contrast",
        11: "scan06.nii.gz is not a readable image",
        12: "subject is empty",
        13: "label must be 0 or 1, got '2'",
    }.items():
        (found,) = [part for part in message.splitlines() if part.startswith(f"  row {line}: ")]
        assert text in found
    assert message.startswith(str(folder / "data.csv"))


def test_many_problems_are_cut_short_and_counted(tmp_path):
    (tmp_path / "data.csv").write_text("".join(f"gone{i}.nii,0\n" for i in range(50)))
    lines = error_of(tmp_path / "data.csv").splitlines()[1:]
    assert len(lines) == dataset.MAX_PROBLEMS_SHOWN + 1
    assert f"{50 - dataset.MAX_PROBLEMS_SHOWN} more problems" in lines[-1]


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


def test_a_good_scan_is_not_read_whole(tmp_path, monkeypatch):
    path = save_scan(tmp_path / "x.nii.gz", make_volume(0, 0))
    read_slab = ArrayProxy.__getitem__
    stops = []

    def record(proxy: ArrayProxy, slices: tuple) -> np.ndarray:
        stops.append(slices[2].stop)
        return read_slab(proxy, slices)

    monkeypatch.setattr(ArrayProxy, "__getitem__", record)
    monkeypatch.setattr(ArrayProxy, "__array__", lambda *_: pytest.fail("the scan was read whole"))
    assert scan_files.check_scan(str(path))[1] == ""
    assert max(stops) < SHAPE[2] / 2


def test_contrast_in_the_last_slice_alone_is_found(tmp_path):
    data = np.ones(SHAPE, np.float32)
    data[3, 4, -1] = 2
    path = save_scan(tmp_path / "x.nii.gz", data)
    assert scan_files.check_scan(str(path))[1] == ""


def flip_bytes(content: bytes) -> bytes:
    """Return a file's bytes with some inverted, past what a look at the header decompresses."""
    return content[:3500] + bytes(byte ^ 0xFF for byte in content[3500:3600]) + content[3600:]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("x.nii.gz", flip_bytes),
        ("x.nii.gz", lambda content: content[: len(content) // 2]),
        ("x.nii", lambda content: content[: len(content) // 2]),
        ("x.nii.gz", lambda _: b"no image"),
        ("x.nii.gz", None),
    ],
    ids=["flipped", "cut", "cut-uncompressed", "no-gzip", "gone"],
)
def test_a_scan_damaged_after_the_checks_is_named(tmp_path, name, damage):
    path = save_scan(tmp_path / name, make_volume(0, 0))
    content = path.read_bytes()
    path.unlink()
    if damage:
        path.write_bytes(damage(content))
    with pytest.raises(RunError, match=rf"{name} cannot be read: "):
        scan_files.load_volume(str(path))


@pytest.mark.parametrize("slope_inter", [(1, 0), (0.37, -20)])
@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int32, np.float32, np.float64])
def test_voxels_are_nibabels(tmp_path, kind, slope_inter):
    path = tmp_path / "x.nii.gz"
    img = nib.Nifti1Image(np.random.default_rng(0).integers(0, 200, SHAPE).astype(kind), AFFINE)
    img.header.set_slope_inter(*slope_inter)
    nib.save(img, path)
    voxels = scan_files.read_voxels(str(path))
    assert voxels.dtype == np.float32
    np.testing.assert_allclose(voxels, nib.load(path).get_fdata(), rtol=1e-6, atol=1e-5)
    low, high = voxels.min(), voxels.max()
    volume_data, _ = scan_files.load_volume(str(path))
    assert volume_data.flags.c_contiguous
    np.testing.assert_array_equal(volume_data, (voxels - low) / (high - low))


# The dataset


def test_dataset_gives_volume_label_and_cohort_row(cohort_csv):
    cohort = dataset.read_cohort(cohort_csv)
    scans = dataset.ScanDataset(cohort.table, np.array([5, 2]))
    assert len(scans) == 2
    volume, label, row = scans[0]
    assert (volume.shape, volume.dtype, label, row) == ((1, *SHAPE), torch.float32, 1, 5)
    expected = make_volume(5, 1)
    np.testing.assert_array_equal(volume[0].numpy(), expected / expected.max())
    assert scans[1][1:] == (0, 2)


@pytest.mark.parametrize("n_workers", [0, 1])
def test_dataset_counts_nonfinite_voxels_in_any_process(folder, n_workers):
    data = make_volume(1, 1)
    data[12, 13, :2] = np.nan
    save_scan(folder / "scan01.nii.gz", data)
    cohort = dataset.read_cohort(folder / "data.csv")
    scans = dataset.ScanDataset(cohort.table, np.arange(4))
    for volumes, _, _ in torch.utils.data.DataLoader(scans, 2, num_workers=n_workers):
        assert torch.isfinite(volumes).all()
    assert scans.n_nonfinite.tolist() == [0, 2, 0, 0]


def test_batches_keep_their_volumes_and_give_their_memory_back(cohort_csv):
    cohort = dataset.read_cohort(cohort_csv)
    scans = dataset.ScanDataset(cohort.table, np.arange(8))
    loader = torch.utils.data.DataLoader(scans, 3, collate_fn=dataset.BatchStacker())
    plain = list(torch.utils.data.DataLoader(scans, 3))
    for held in (list(loader), list(loader)):
        for found, expected in zip(held, plain, strict=True):
            assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    del held, found
    addresses = {volumes.data_ptr() for _ in range(5) for volumes, _, _ in loader}
    assert len(addresses) <= 3
