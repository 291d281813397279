"""Names of maps, fold maps beside them, grids, and atlases on them."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from comparing import maps as map_files
from comparing import space
from utils import InputError

SHAPE = (5, 6, 7)


def save(path: Path, data: np.ndarray, affine: np.ndarray = np.eye(4)) -> Path:  # noqa: B008
    path.parent.mkdir(exist_ok=True)
    nib.save(nib.Nifti1Image(np.asarray(data, dtype=np.float32), affine), path)
    return path


def test_names_of_maps():
    paths = [Path("a/LRP_map_all.nii.gz"), Path("b/LRP_map_all.nii.gz"), Path("b/SVM_f0.nii")]
    assert map_files.name_maps(paths) == ["a/LRP", "b/LRP", "SVM_f0"]
    with pytest.raises(InputError, match="two maps have one name"):
        map_files.name_maps([Path("x/a/LRP.nii"), Path("y/a/LRP.nii")])


def test_fold_maps_come_in_the_folds_order(tmp_path):
    """Only those of the same map: neither another's, nor one whose name goes on."""
    for name in ("M_f10", "M_f2", "M_f0", "M_f0_old", "XM_f1", "M_fx"):
        (tmp_path / f"{name}.nii.gz").touch()
    found = map_files.fold_paths(tmp_path / "M_all.nii.gz")
    assert [path.name for path in found] == ["M_f0.nii.gz", "M_f2.nii.gz", "M_f10.nii.gz"]
    assert map_files.fold_paths(tmp_path / "M_f0.nii.gz") == []


def test_background_is_the_mean_scan_beside_any_map_on_their_grid(tmp_path):
    """One on another grid is passed over; without any it is the template on the maps' grid."""
    data, reference = np.ones(SHAPE), np.arange(210).reshape(SHAPE)
    affine = np.diag([20, 20, 20, 1.0])
    affine[:3, 3] = -40, -60, -40
    paths = [save(tmp_path / name / f"{name}.nii", data * 0, affine) for name in "ab"]
    reference_path = save(tmp_path / "r.nii", reference, affine)
    save(tmp_path / "a" / "mean_scan.nii.gz", data)
    mask_path = save(tmp_path / "mask.nii", data, affine)
    maps = map_files.load_maps(paths)
    found = space.load_space(maps, reference_path, 99, mask_path)
    assert found.background_source == "the ICBM152 template"
    assert found.background_img.shape == SHAPE and found.background_img.get_fdata().max() > 0
    assert found.inside.sum() == 110 and len(found.inside) == 210
    data[0] = 0
    save(tmp_path / "b" / "mean_scan.nii.gz", data, affine)
    found = space.load_space(maps, reference_path, 99, None)
    assert found.background_source == "the mean scan" and len(found.inside) == 168


FINE = np.diag([2.0, 2, 2, 1])
COARSE = np.diag([-4.0, 4, 4, 1])


def save_coarse(path: Path, data: np.ndarray) -> Path:
    """Write an image whose voxels are eight of a grid of 20 voxels a side each."""
    affine = COARSE.copy()
    affine[:3, 3] = 37, 1, 1
    return save(path, data, affine)


@pytest.fixture
def blobs() -> np.ndarray:
    """Return a thresholded map with two blobs, one at the edge of its field of view."""
    z = np.zeros((10, 10, 10))
    z[2:5, 3:6, 4:7] = 2.5
    z[3, 4, 5], z[9, 8:, :2] = 4, 3
    return z


@pytest.mark.parametrize(
    ("change", "threshold"),
    [
        (lambda z: z, 0),
        (lambda z: z, 2.3),
        (lambda z: np.where(z > 0, z, np.nan), 0),
        (lambda z: z > 0, 0),
        (lambda z: np.where(z > 0, 1 + (np.arange(10) > 3), 0), 0),
    ],
    ids=["thresholded", "threshold given", "NaN outside", "binary", "numbered clusters"],
)
def test_reference_keeps_its_volume_on_a_finer_grid(tmp_path, caplog, blobs, change, threshold):
    reference_path = save_coarse(tmp_path / "r.nii", change(blobs))
    maps = map_files.load_maps([save(tmp_path / "m.nii", np.ones((20, 20, 20)), FINE)])
    mask_path = save(tmp_path / "mask.nii", np.ones((20, 20, 20)), FINE)
    found = space.load_space(maps, reference_path, threshold, mask_path)
    assert found.reference_data.sum() == 8 * (blobs > 0).sum()
    voxel = np.array([5, 8, 10])  # in the first blob: x runs the other way in the coarse image
    assert found.reference_data[10:16, 6:12, 8:14].all() and not found.reference_data[tuple(voxel)]
    assert "on its own grid and" not in caplog.text


def test_reference_is_averaged_over_coarser_voxels(tmp_path, caplog):
    """A voxel belongs to it where more than half of its volume does; what is lost is said."""
    fine = np.zeros((12, 12, 12))
    fine[2:8, 2:8, 2:8] = fine[10, 10, 10] = 1  # whole voxels of 2; an eighth of one
    fine[8, 2:8, 2:8] = 1  # half of a layer: not above a half
    reference_path = save(tmp_path / "r.nii", fine)
    affine = np.diag([2.0, 2, 2, 1])
    affine[:3, 3] = 0.5
    maps = map_files.load_maps([save(tmp_path / "m.nii", np.ones((6, 6, 6)), affine)])
    found = space.load_space(maps, reference_path, 0, None)
    assert found.reference_data.sum() == 27 and found.reference_data[1:4, 1:4, 1:4].all()
    fine[2:8, 2:8, 2:8] = 0
    fine[::2, ::2, ::2] = 1
    fine[2:4, 2:4, 2:4] = 1
    space.load_space(maps, save(tmp_path / "r.nii", fine), 0, None)
    assert "too small for their voxels" in caplog.text


def test_default_mask_is_where_most_scans_are_not_0(tmp_path, caplog):
    map_path = save(tmp_path / "m.nii", np.ones(SHAPE))  # GGC fills the volume
    reference_path = save(tmp_path / "r.nii", np.arange(210).reshape(SHAPE) > 100)
    coverage = np.zeros(SHAPE)
    coverage[1:4, 1:5, 1:6], coverage[0] = 1, 0.4
    mean_scan = 100 * coverage
    maps = map_files.load_maps([map_path])
    assert len(space.load_space(maps, reference_path, 0, None).inside) == 210
    assert "fills 100 % of the volume" in caplog.text
    save(tmp_path / "mean_scan.nii.gz", mean_scan)
    assert len(space.load_space(maps, reference_path, 0, None).inside) == 60 + 42
    save(tmp_path / "coverage.nii.gz", coverage)
    caplog.clear()
    found = space.load_space(maps, reference_path, 0, None)
    assert len(found.inside) == 60 and "half of the scans" in found.mask_source
    assert not caplog.text
    mask_path = save(tmp_path / "mask.nii", coverage > 0)
    space.load_space(maps, reference_path, 0, mask_path)
    assert "has 102 voxels, the default one 60" in caplog.text


def atlas_of(folder: Path, numbers: list[int], dtype: str, table: str) -> tuple:
    """Return regions and names as read for an atlas with the numbers in its first voxels."""
    data = np.zeros(SHAPE, dtype=dtype)
    data.reshape(-1)[: len(numbers)] = numbers
    nib.save(nib.Nifti1Image(data, np.eye(4)), folder / "atlas.nii")
    (folder / "names.csv").write_text(table)
    maps = map_files.load_maps([save(folder / "m.nii", np.ones(SHAPE))])
    reference_path = save(folder / "r.nii", np.arange(210).reshape(SHAPE) > 100)
    found = space.load_space(maps, reference_path, 0, None)
    regions, names = space.load_atlas(folder / "atlas.nii", folder / "names.csv", found)
    return regions[: len(numbers)].tolist(), names


def test_large_numbers_of_an_atlas_stay_apart(tmp_path):
    numbers = [2**24, 2**24 + 1, 2**31 - 1]
    found, names = atlas_of(
        tmp_path, numbers, "int32", "name,index\na,16777216\nb,16777217\nc,2147483647\n"
    )
    assert found == numbers and names == dict(zip(numbers, "abc", strict=True))


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("head", ["index", "Label", "ID"])
def test_table_of_regions_is_read_by_its_heads(tmp_path, separator, head):
    rows = [["network", "Name", head], ["9", "left, front", "1"], ["8", "right", "2"]]
    quoted = [[f'"{cell}"' for cell in row] for row in rows]
    table = "\n".join(separator.join(row) for row in quoted)
    assert atlas_of(tmp_path, [1, 2], "uint8", table)[1] == {1: "left, front", 2: "right"}


@pytest.mark.parametrize(
    "table",
    [
        "sep=;\r\nindex;name\r\n1;left, front\r\n2;right\r\n",
        "\ufeff# an atlas\nindex\tname\tcolour\n1\tleft, front\tred\n2\tright\tblue\n",
        '#id,name\n1,"left, front"\n\n# 3,gone\n2,right\n',
    ],
)
def test_table_of_regions_is_read_as_the_cohort_is(tmp_path, table):
    assert atlas_of(tmp_path, [1, 2], "uint8", table)[1] == {1: "left, front", 2: "right"}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("1,left\n2,right\n", "must have a header"),
        ("index,label,name\n1,1,a\n", "it has index, label, name"),
        ("index,name,name\n1,a,b\n", "must have a header"),
        ("index,name\none,a\n", "must have a header"),
        ("index,name\n1,a\n1,b\n", "names a region twice"),
        ("", "must have a header"),
    ],
)
def test_ambiguous_table_of_regions(tmp_path, table, message):
    with pytest.raises(InputError, match=message):
        atlas_of(tmp_path, [1, 2], "uint8", table)
