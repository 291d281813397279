"""The reader and the writer of volumes: formats, headers, damage, scaling, what is written."""

import bz2
import errno
import gzip
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import AFFINE, SHAPE, make_volume, save_scan
from nibabel.arrayproxy import ArrayProxy
from nibabel.testing import data_path as NIBABEL_DATA

from loading import image
from utils import InputError, RunError

KINDS = {"hdr": nib.Nifti1Pair, "mgz": nib.MGHImage, "mgh": nib.MGHImage}


def save_as(path: Path, data: np.ndarray) -> Path:
    """Write a scan in the format that the path's suffix says."""
    suffix = path.name.lower().partition(".")[2].removesuffix(".gz")
    nib.save(KINDS.get(suffix, nib.Nifti1Image)(data, AFFINE), path)
    return path


def scaled(data: np.ndarray) -> np.ndarray:
    """Return data on [0, 1], the definition."""
    return (data - data.min()) / (data.max() - data.min())


# Formats and headers


@pytest.mark.parametrize(
    ("name", "listed"),
    [
        ("x.nii", "x.nii"), ("x.nii.gz", "x.nii.gz"), ("x.nii.bz2", "x.nii.bz2"),
        ("x.NII", "x.NII"), ("x.NII.GZ", "x.NII.GZ"), ("x.NII.BZ2", "x.NII.BZ2"),
        ("x.mgz", "x.mgz"), ("x.mgh", "x.mgh"), ("x.hdr", "x.hdr"), ("x.hdr", "x.img"),
        ("x.hdr.gz", "x.img.gz"),
    ],
)  # fmt: skip
def test_formats_give_the_same_volume(tmp_path, name, listed):
    data = make_volume(3, 1) * 700 - 100
    save_as(tmp_path / name, data)
    img = image.open_scan(tmp_path / listed)
    shape = image.volume_shape(img)
    assert shape == SHAPE
    assert all(type(side) is int for side in shape)  # run.json can hold it
    np.testing.assert_allclose(img.affine, AFFINE, atol=1e-4)
    volume_data, n_nonfinite = image.load_volume(tmp_path / listed)
    assert (volume_data.min(), volume_data.max()) == (0, 1)
    np.testing.assert_array_equal(volume_data, scaled(data))
    assert n_nonfinite == 0


@pytest.mark.parametrize("slope_inter", [(1, 0), (0.37, -20), (-0.5, 10)])
@pytest.mark.parametrize("kind", ["u1", "<i2", ">i2", "<u4", ">i8", "<f4", ">f4", ">f8"])
@pytest.mark.parametrize("name", ["x.nii", "x.nii.gz", "nifti2.nii.gz", "x.hdr"])
def test_read_data_equals_get_fdata(tmp_path, name, kind, slope_inter):
    kinds = {"x.hdr": nib.Nifti1Pair, "nifti2.nii.gz": nib.Nifti2Image}
    image_class = kinds.get(name, nib.Nifti1Image)
    header = image_class.header_class(endianness=kind[0] if kind[0] in "<>" else "<")
    header.set_data_dtype(kind)
    raw_data = np.random.default_rng(0).integers(0, 120, SHAPE).astype(kind)
    img = image_class(raw_data, AFFINE, header)
    img.header.set_slope_inter(*slope_inter)
    nib.save(img, tmp_path / name)
    assert image.open_scan(tmp_path / name).get_data_dtype() == np.dtype(kind)
    data = image.read_data(tmp_path / name)
    assert data.dtype == np.float32
    np.testing.assert_array_equal(data, nib.load(tmp_path / name).get_fdata(dtype=np.float32))
    values = raw_data * float(slope_inter[0]) + slope_inter[1]
    np.testing.assert_allclose(data, values, rtol=1e-6, atol=1e-5)
    volume_data, _ = image.load_volume(tmp_path / name)
    assert volume_data.flags.c_contiguous
    np.testing.assert_array_equal(volume_data, scaled(data))


TURN = np.array([[0.8, -0.6, 0, 0], [0.6, 0.8, 0.1, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
RIGHT_HANDED = AFFINE * [[-1], [1], [1], [1]]


@pytest.mark.parametrize("affine", [AFFINE, RIGHT_HANDED, TURN @ AFFINE, AFFINE[[2, 0, 1, 3]]])
def test_affines_are_taken_as_they_are(tmp_path, affine):
    """No scan is turned or resampled: voxels and affine are those of the file."""
    data = make_volume(4, 1)
    nib.save(nib.Nifti1Image(data, affine), tmp_path / "x.nii.gz")
    np.testing.assert_allclose(image.open_scan(tmp_path / "x.nii.gz").affine, affine, atol=1e-5)
    np.testing.assert_array_equal(image.load_volume(tmp_path / "x.nii.gz")[0], scaled(data))


def test_minc_is_read():
    path = Path(NIBABEL_DATA) / "tiny.mnc"
    assert image.open_scan(path).shape == (10, 20, 20)
    assert image.load_volume(path)[0].shape == (10, 20, 20)


@pytest.mark.parametrize("n_axes", [1, 2])
@pytest.mark.parametrize("name", ["x.nii.gz", "x.hdr"])
def test_trailing_axes_of_length_one_are_dropped(tmp_path, name, n_axes):
    data = make_volume(1, 1)
    save_as(tmp_path / name, data.reshape(SHAPE + (1,) * n_axes))
    assert image.volume_shape(image.open_scan(tmp_path / name)) == SHAPE
    np.testing.assert_array_equal(image.load_volume(tmp_path / name)[0], scaled(data))


@pytest.mark.parametrize("kind", ["complex64", [("R", "u1"), ("G", "u1"), ("B", "u1")]])
def test_open_image_refuses_voxels_that_are_no_numbers(tmp_path, kind):
    nib.save(nib.Nifti1Image(np.zeros(SHAPE, kind), AFFINE), tmp_path / "x.nii.gz")
    with pytest.raises(InputError, match=r"x\.nii\.gz has voxels of type .*not one real number"):
        image.open_image(tmp_path / "x.nii.gz")


# Scaling and contrast


def test_nonfinite_voxels_become_zero_and_are_counted(tmp_path):
    data = make_volume(5, 0) + 1
    bad = (np.array([2, 11, 20]), np.array([3, 12, 25]), np.array([4, 13, 22]))
    data[bad] = np.nan, np.inf, -np.inf
    path = save_scan(tmp_path / "x.nii.gz", data)
    image.open_scan(path)
    volume_data, n_nonfinite = image.load_volume(path)
    data[bad] = 0
    assert n_nonfinite == 3
    np.testing.assert_array_equal(volume_data, data / data.max())
    np.testing.assert_array_equal(image.read_image(path, "mask").get_fdata(), data)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_a_range_beyond_float32_is_an_error(tmp_path):
    data = make_volume(5, 0)
    data[0, 0, :2] = -3e38, 3e38  # their difference is more than float32 can hold
    with pytest.raises(RunError, match=r"from -3e\+38 to 3e\+38"):
        image.load_volume(save_scan(tmp_path / "x.nii", data))


def test_contrast_is_judged_in_the_precision_of_training(tmp_path):
    data = np.full(SHAPE, 1e6)
    data[5, 6, 7] += 1e-6  # float32 does not see it
    path = save_scan(tmp_path / "x.nii.gz", data)
    image.open_image(path)
    with pytest.raises(InputError, match=r"x.nii.gz has no contrast"):
        image.open_scan(path)


@pytest.mark.parametrize("rest", [1, np.nan])
def test_contrast_in_the_last_slice_alone_is_found(tmp_path, rest):
    data = np.full(SHAPE, rest, np.float32)
    data[3, 4, -1] = 2
    image.open_scan(save_scan(tmp_path / "x.nii.gz", data))


def test_open_scan_does_not_read_a_good_scan_whole(tmp_path, monkeypatch):
    path = save_scan(tmp_path / "x.nii.gz", make_volume(0, 0))
    read_slab, stops = ArrayProxy.__getitem__, []

    def record(proxy: ArrayProxy, slices: tuple) -> np.ndarray:
        stops.append(slices[2].stop)
        return read_slab(proxy, slices)

    monkeypatch.setattr(ArrayProxy, "__getitem__", record)
    monkeypatch.setattr(ArrayProxy, "__array__", lambda *_: pytest.fail("the scan was read whole"))
    image.open_scan(path)
    assert 0 < max(stops) < SHAPE[2] / 2


# Damage


def test_pair_without_its_voxels_is_refused(tmp_path):
    save_as(tmp_path / "x.hdr", make_volume(0, 0))
    (tmp_path / "x.img").unlink()
    with pytest.raises(InputError, match=r"x\.hdr is not a readable image"):
        image.open_scan(tmp_path / "x.hdr")


def test_gzip_of_several_members_with_zeros_after_the_end_is_read(tmp_path):
    data = make_volume(0, 0)
    content = save_scan(tmp_path / "x.nii", data).read_bytes()
    half, path = len(content) // 2, tmp_path / "x.nii.gz"
    path.write_bytes(gzip.compress(content[:half]) + gzip.compress(content[half:]) + bytes(512))
    image.open_scan(path)
    np.testing.assert_array_equal(image.read_data(path), data)
    path.write_bytes(gzip.compress(content[:half]) + gzip.compress(content[half:-100]))
    with pytest.raises(InputError, match=r"x\.nii\.gz is truncated or damaged"):
        image.open_scan(path)


def test_voxels_that_fail_their_checksum_are_refused(tmp_path):
    """Stored without compression, a changed byte decodes all the same: only the checksum tells."""
    path = tmp_path / "x.nii.gz"
    content = save_scan(tmp_path / "x.nii", make_volume(0, 0)).read_bytes()
    content = bytearray(gzip.compress(content + bytes(2**20), 0))  # more than voxels
    path.write_bytes(content)
    image.load_volume(path)
    content[20_000] ^= 1
    path.write_bytes(content)
    with pytest.raises(RunError, match=r"x\.nii\.gz is not a readable image, or damaged"):
        image.load_volume(path)


def test_a_cut_bzip2_file_is_damaged(tmp_path):
    content = save_scan(tmp_path / "x.nii", make_volume(0, 0)).read_bytes()
    path = tmp_path / "x.nii.bz2"
    for cut in (bz2.compress(content[:-4]), bz2.compress(content)[:-4000]):
        path.write_bytes(cut)
        with pytest.raises(InputError, match="damaged"):
            image.open_scan(path)


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
def test_load_volume_names_a_scan_damaged_after_the_checks(tmp_path, name, damage):
    path = save_scan(tmp_path / name, make_volume(0, 0))
    content = path.read_bytes()
    path.unlink()
    if damage:
        path.write_bytes(damage(content))
    with pytest.raises(RunError, match=rf"a scan cannot be read: .*{name} is not a readable") as e:
        image.load_volume(path)
    assert len(str(e.value).splitlines()) == 1


def test_read_image_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match=r"there is no mask .*gone\.nii"):
        image.read_image(tmp_path / "gone.nii", "mask")


# Writing


@pytest.mark.parametrize("image_class", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("name", ["map.nii", "map.nii.gz"])
def test_write_image_keeps_the_space_of_the_scan(tmp_path, name, image_class):
    like_img = image_class(np.zeros(SHAPE, np.int16), AFFINE)
    like_img.set_sform(AFFINE, 4)
    like_img.set_qform(TURN @ AFFINE, 2)
    like_img.header.set_xyzt_units("micron", "sec")
    like_img.header.set_slope_inter(2, 3)
    data = make_volume(7, 1).astype(np.float64) - 0.5
    image.write_image(tmp_path / name, data, like_img)
    map_img = nib.load(tmp_path / name)
    assert map_img.get_data_dtype() == np.float32
    np.testing.assert_array_equal(map_img.get_fdata(), data.astype(np.float32))
    np.testing.assert_array_equal(map_img.affine, like_img.affine)
    assert map_img.header.get_sform(coded=True)[1] == 4
    qform, qform_code = map_img.header.get_qform(coded=True)
    assert qform_code == 2
    np.testing.assert_allclose(qform, like_img.get_qform(), atol=1e-4)
    assert map_img.header.get_xyzt_units() == ("micron", "sec")
    content = (tmp_path / name).read_bytes()
    image.write_image(tmp_path / name, data, like_img)
    assert (tmp_path / name).read_bytes() == content
    assert name == "map.nii" or content[4:8] == bytes(4)  # no time stands in the gzip header


def test_write_image_like_a_scan_that_is_no_nifti(tmp_path):
    like_img = nib.MGHImage(make_volume(0, 0), AFFINE)
    image.write_image(tmp_path / "map.nii.gz", make_volume(1, 1) > 0.5, like_img, np.uint8)
    map_img = nib.load(tmp_path / "map.nii.gz")
    np.testing.assert_allclose(map_img.affine, AFFINE, atol=1e-4)
    assert map_img.header.get_xyzt_units()[0] == "mm"
    assert map_img.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(map_img.get_fdata(), make_volume(1, 1) > 0.5)


def test_write_image_is_whole_or_not_at_all(tmp_path, monkeypatch):
    like_img, path = nib.Nifti1Image(make_volume(0, 0), AFFINE), tmp_path / "map.nii.gz"
    image.write_image(path, make_volume(1, 1), like_img)
    content = path.read_bytes()

    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(RunError, match=r"map\.nii\.gz cannot be written.*the disk is full"):
        image.write_image(path, make_volume(2, 0), like_img)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_orientation_is_stated_or_not(tmp_path):
    """By the codes of sform and qform, MGH's flag; Analyze has none."""
    data, cases = make_volume(0, 0), {}
    for codes in ((0, 0), (1, 0), (0, 2), (4, 1)):
        img = nib.Nifti1Image(data, AFFINE)
        img.header["sform_code"], img.header["qform_code"] = codes
        cases[img] = codes != (0, 0)
    for flag in (0, 1):
        img = nib.MGHImage(data, AFFINE)
        img.header["goodRASFlag"] = flag
        cases[img] = bool(flag)
    cases[nib.Spm99AnalyzeImage(data, AFFINE)] = False
    for img, is_stated in cases.items():
        assert image.states_orientation(img) is is_stated
        assert (image.orientation_of(img) == "stated") is is_stated


@pytest.mark.parametrize("name", ["x.nii", "x.nii.gz", "nifti2.nii"])
def test_voxels_inside_the_header_are_refused(tmp_path, name):
    image_class = nib.Nifti2Image if "2" in name else nib.Nifti1Image
    path, content = tmp_path / name, image_class(make_volume(0, 0), AFFINE).to_bytes()
    kind = image_class.header_class
    header = kind(content[: kind.sizeof_hdr], check=False)
    for offset in (0, 16):
        header["vox_offset"] = offset
        changed = header.binaryblock + content[header.sizeof_hdr :]
        path.write_bytes(gzip.compress(changed) if name == "x.nii.gz" else changed)
        with pytest.raises(InputError, match="damaged"):
            image.open_scan(path)


def test_describe_volume():
    rng = np.random.default_rng(0)
    volume = rng.random((60, 70, 80), dtype=np.float32)
    volume[:20] = 0
    facts = image.describe_volume(volume, 3)
    assert facts["n_nonfinite"] == 3 and facts["filling"] is None and 0.99 < facts["top"] < 1
    assert facts["crc32"] == zlib.crc32(volume.tobytes())
    assert facts["crc32"] == image.describe_volume(np.asfortranarray(volume), 0)["crc32"]
    hot = volume / 1000
    hot[30, 30, 30] = 1
    assert image.describe_volume(hot, 0)["top"] < 0.2
    volume[:20] = 0.25
    assert image.describe_volume(volume, 0)["filling"] == 0.25


BYTES = nib.Nifti1Image(make_volume(1, 1), AFFINE).to_bytes()
DISGUISES = {
    "gzip-inside": ("x.nii", gzip.compress(BYTES), "is gzip-compressed: its name should end in"),
    "not-gzip": ("x.nii.gz", BYTES, "is not compressed: its name should not end in .gz"),
    "bzip2-inside": ("x.nii.gz", bz2.compress(BYTES), "is bzip2-compressed"),
    "a-tail": ("x.nii.gz", gzip.compress(BYTES) + b"tail" * 9, "after its gzip content are none"),
    "a-tail-after-zeros": ("x.nii.gz", gzip.compress(BYTES) + bytes(9) + b"tail", "are none of it"),
    "a-tail-of-a-small-file": ("x.nii.gz", gzip.compress(BYTES[:400]) + b"tail", "are none of it"),
    "a-pointer": ("x.nii.gz", b"version https://git-lfs.github.com/spec/v1\n", "`git lfs pull`"),
    "a-web-page": ("x.nii.gz", b"<!DOCTYPE html><html>", "a web page"),
    "a-zip": ("x.nii", b"PK\x03\x04" + bytes(400), "a zip archive"),
    "dicom": ("x.nii", bytes(128) + b"DICM" + bytes(400), "is DICOM"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), DISGUISES.values(), ids=DISGUISES)
def test_what_a_file_is_in_truth_is_said(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        image.open_scan(tmp_path / name)


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("sform_code", [0, 4])
def test_a_quaternion_a_rounding_error_too_long(tmp_path, kind, sform_code):
    """As in scans of MICCAI 2012; in a map it is of length 1."""
    img = kind(make_volume(1, 1), np.diag([-2.0, 2.5, -1.5, 1]))
    img.set_qform(img.affine, 1)
    img.header["sform_code"], img.header["quatern_c"] = sform_code, 1.0000012**0.5
    img.header["vox_offset"] = 352 if kind is nib.Nifti1Image else 544
    with (tmp_path / "x.nii").open("wb") as file:
        img.header.write_to(file)
        file.write(bytes(int(img.header["vox_offset"]) - file.tell()))
        file.write(np.asarray(img.dataobj).tobytes(order="F"))
    found = image.open_scan(tmp_path / "x.nii")
    np.testing.assert_allclose(found.affine, img.affine, atol=1e-5)
    image.write_image(tmp_path / "map.nii.gz", make_volume(2, 0), found)
    header = nib.load(tmp_path / "map.nii.gz").header
    assert sum(float(header[field]) ** 2 for field in image.QUATERNION_FIELDS) <= 1 + 2e-7
    np.testing.assert_allclose(header.get_qform(), img.affine, atol=1e-5)


def test_a_quaternion_much_too_long_is_damage(tmp_path):
    img = nib.Nifti1Image(make_volume(1, 1), AFFINE)
    img.header["qform_code"], img.header["sform_code"], img.header["quatern_c"] = 1, 0, 1.5
    content = bytearray(BYTES)
    content[:348] = img.header.binaryblock
    (tmp_path / "x.nii").write_bytes(bytes(content))
    with pytest.raises(InputError, match="is not a readable image, or damaged"):
        image.open_scan(tmp_path / "x.nii")
