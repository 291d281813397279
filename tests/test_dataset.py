"""The checks on a cohort's scans, and the dataset that reads them."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import AFFINE, SHAPE, make_volume, save_scan, write_cohort
from nibabel.arrayproxy import ArrayProxy

import dataset
import loading
import scan_files
from errors import InputError, RunError

OTHER_AFFINE = AFFINE + np.diag([0, 0, 0.5, 0])


def error_of(csv_path: Path) -> str:
    """Return the message with which a CSV is refused."""
    with pytest.raises(InputError) as caught:
        dataset.read_cohort(csv_path)
    return str(caught.value)


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
    loader = torch.utils.data.DataLoader(scans, 3, collate_fn=loading.BatchStacker())
    plain = list(torch.utils.data.DataLoader(scans, 3))
    for held in (list(loader), list(loader)):
        for found, expected in zip(held, plain, strict=True):
            assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    del held, found
    addresses = {volumes.data_ptr() for _ in range(5) for volumes, _, _ in loader}
    assert len(addresses) <= 3
