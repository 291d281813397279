"""Whatever a CSV or a scan's header holds: a good read or an input error, and little memory."""

import gzip
import io
import tracemalloc
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import save_scan
from hypothesis import example, given, settings
from hypothesis import strategies as st

import dataset
from loading import damage, image
from loading.table import Wanted
from utils import InputError

SHAPE = (5, 4, 3)
REPEATABLE = settings(derandomize=True, deadline=None, database=None)
SLACK_BYTES = 2**21  # of memory that reading any cohort takes
N_COPIES = 24  # of a volume, in bytes per byte: raw, float64 and float32, where voxels are int8


def read(csv_path: Path, wanted: Wanted | None = None) -> dataset.Cohort | None:
    """Return the cohort, or None for an input error; anything else fails the test."""
    try:
        return dataset.read_cohort(csv_path, wanted)
    except InputError as error:
        assert len(str(error)) < 30_000
        return None


# CSVs

PATHS = [
    "a.nii", "b.nii.gz", "./a.nii", "c ü.nii", "gone.nii", "text.nii", "", ".", "..", "~",
    "~nobody", "~\0", "a.nii\0", "/", "/dev/null", "//", "a.nii/", "x" * 300, "../" * 400,
    "\ud7ff", "🧠", "a\nb", "=1+1", "-", "*", "%s", "path", '"', "'", "\\", ",", ";", "\t",
]  # fmt: skip
HEADS = [
    "path,label\n", "label;path;subject\n", "participant_id\tfilename\tdiagnosis\tage\n", "0,1\n",
    ",0,1\n", "sep=;\n", "sep=|\n", "# a remark\n", "#path,label\n", "path,dx,dx\n", "dx,group\n",
]  # fmt: skip
WANTED = [
    None,
    None,
    None,
    Wanted(positive=("AD",)),
    Wanted((("scan", "path"),), ("1",), ("0", "AD"), True),
]
CELLS = ["0", "1", "0.0", "1.0", "2", "-1", "nan", "1e400", "AD", "", " 1 ", "NULL", "٠", "s 1"]
SEPARATORS = [",", ",", ",", ";", "\t", " ", ""]
LINE_ENDS = ["\n", "\n", "\r\n", "\r", "", "\n\n", "\x0b", "\u2028"]
CODECS = ["utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"]


def quoted(text: str) -> str:
    """Return a cell in quotes."""
    return '"' + text.replace('"', '""') + '"'


def rows() -> st.SearchStrategy[str]:
    """Return a strategy of rows: known or any cells, quoted or not, and their line end."""
    cell = st.sampled_from(PATHS) | st.sampled_from(CELLS) | st.text(max_size=6)
    cell = cell | cell.map(quoted)
    good = st.tuples(st.sampled_from(PATHS[:4]), st.sampled_from(["0", "1"])).map(list)
    cells = good | good | st.lists(cell, max_size=4)
    return st.builds(
        lambda cells, separator, end: separator.join(cells) + end,
        cells, st.sampled_from(SEPARATORS), st.sampled_from(LINE_ENDS),
    )  # fmt: skip


def csv_contents() -> st.SearchStrategy[bytes]:
    """Return a strategy of what a file called data.csv can hold."""
    head = st.sampled_from(HEADS) | st.lists(st.sampled_from(HEADS), max_size=3).map("".join)
    texts = st.builds(str.__add__, st.just("") | head, st.lists(rows(), max_size=6).map("".join))
    words = st.sampled_from(["0", "1"]) | st.sampled_from(["AD", "CN", "MCI", ""])
    named = st.tuples(st.sampled_from(["s1", "s2"]), st.sampled_from(PATHS[:4]), words)
    lines = st.lists(named, min_size=1, max_size=3, unique_by=lambda row: row[1][-5:])
    table = lines.map(lambda rows: "sub,file,dx\n" + "\n".join(map(",".join, rows)))
    texts = texts | table | table
    encoded = st.builds(lambda t, codec: t.encode(codec), texts, st.sampled_from(CODECS))
    cut = st.builds(lambda content, n: content[n:], encoded, st.integers(0, 3))
    return encoded | encoded | cut | st.binary(max_size=40)


@pytest.fixture(scope="module")
def cohort_path(tmp_path_factory) -> Path:
    """Return a folder with three good scans and a text."""
    folder = tmp_path_factory.mktemp("fuzz")
    rng = np.random.default_rng(0)
    for name in ("a.nii", "b.nii.gz", "c ü.nii"):
        save_scan(folder / name, rng.random(SHAPE).astype(np.float32))
    (folder / "text.nii").write_text("no image")
    return folder


@pytest.mark.parametrize("n_examples", [250, pytest.param(10_000, marks=pytest.mark.slow)])
def test_any_csv(cohort_path, n_examples):
    outcomes = []

    @settings(REPEATABLE, max_examples=n_examples)
    @given(csv_contents(), st.sampled_from(WANTED))
    def check(content: bytes, wanted: Wanted | None) -> None:
        (cohort_path / "data.csv").write_bytes(content)
        cohort = read(cohort_path / "data.csv", wanted)
        outcomes.append(cohort is not None)
        if cohort is not None:
            assert set(cohort.table["label"]) <= {0, 1}
            assert len(set(cohort.scans)) == len(cohort.table)
            assert all(Path(scan).parent == cohort_path for scan in cohort.scans)
            assert cohort.volume_shape == SHAPE

    check()
    assert 0.02 < np.mean(outcomes) < 0.98  # both ends were tried


# Headers


def make_formats() -> dict[str, tuple[bytes, bytes]]:
    """Return header file and voxel file (empty if it is one file) of a scan in each format."""
    data = np.random.default_rng(1).random(SHAPE).astype(np.float32)
    affine = np.diag([2.0, 3, 1.5, 1])
    extended_img = nib.Nifti1Image(data, affine)
    extended_img.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"n" * 40))
    single, pair = nib.Nifti1Image(data, affine), nib.Nifti1Pair(data, affine)
    swapped = nib.Nifti1Image(data, affine, nib.Nifti1Header(endianness=">"))
    pair_map = pair.make_file_map({"header": io.BytesIO(), "image": io.BytesIO()})
    pair.to_file_map(pair_map)
    header, voxels = (pair_map[part].fileobj.getvalue() for part in ("header", "image"))
    return {
        "nii": (single.to_bytes(), b""),
        "nii.gz": (single.to_bytes(), b""),
        "extended.nii": (extended_img.to_bytes(), b""),
        "extended.nii.gz": (extended_img.to_bytes(), b""),
        "big-endian.nii": (swapped.to_bytes(), b""),
        "nifti2.nii": (nib.Nifti2Image(data, affine).to_bytes(), b""),
        "mgz": (nib.MGHImage(data, affine).to_bytes(), b""),
        "hdr": (header, voxels),
        "hdr.gz": (header, voxels),
    }


FORMATS = make_formats()
N_HEADER_BYTES = {"nifti2.nii": 552, "extended.nii": 408, "extended.nii.gz": 408, "mgz": 284}


def save_bytes(folder: Path, name: str, header: bytes, voxels: bytes) -> Path:
    """Write a scan's one or two files, compressed if the name says so; return its data.csv."""
    path = folder / f"x.{name}"
    parts = [(path, header)]
    if voxels:
        parts.append((path.with_name(path.name.replace(".hdr", ".img")), voxels))
    for part_path, content in parts:
        packed = path.suffix in (".gz", ".mgz")
        part_path.write_bytes(gzip.compress(content, 1) if packed else content)
    (folder / "data.csv").write_text(f"{path.name},1\n")
    return folder / "data.csv"


def read_and_load(csv_path: Path, has_extensions: bool = False) -> str:
    """Read a cohort of one scan and then the scan, holding both to their promises and to memory.

    What the check lets through must load: damage is the input's fault, exit 2, never a RunError.
    Peak memory is at most what the scan's files, decompressed, could hold, a few times; nibabel
    asks for what a header extension claims, up to 2 GiB, but fills no more of it than the file has.
    """
    paths = list(csv_path.parent.glob("x.*"))
    n_capacity = sum(path.stat().st_size * damage.MAX_RATIOS.get(path.suffix, 1) for path in paths)
    tracemalloc.start()
    try:
        cohort = read(csv_path)
        outcome = "refused" if cohort is None else "read"
        if cohort is not None:
            volume_data, _ = image.load_volume(cohort.scans[0])
            assert volume_data.shape == cohort.volume_shape
            assert (volume_data.min(), volume_data.max()) == (0, 1)
    finally:
        _, n_peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert has_extensions or n_peak < SLACK_BYTES + N_COPIES * n_capacity
    return outcome


def damages() -> st.SearchStrategy[tuple[int, bytes]]:
    """Return a strategy of bytes to write over a header, and where."""
    odd = st.sampled_from([b"\xff", b"\x7f", b"\x80", b"\0", b"\x01"])
    runs = st.builds(lambda byte, n: byte * n, odd, st.integers(1, 8))
    place = st.integers(0, 600) | st.integers(40, 56)  # the dimensions twice as often
    return st.tuples(place, runs | st.binary(min_size=1, max_size=8))


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning")
@pytest.mark.parametrize("n_examples", [200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_any_header(tmp_path_factory, n_examples):
    folders = {name: tmp_path_factory.mktemp("header") for name in FORMATS}
    outcomes = []

    @settings(REPEATABLE, max_examples=n_examples)
    @given(st.sampled_from(list(FORMATS)), st.lists(damages(), min_size=1, max_size=5))
    @example("mgz", [(0, bytes(8))])  # errors of nibabel's that few examples meet
    @example("mgz", [(20, bytes([7, 7, 7, 7]))])
    @example("nifti2.nii", [(16, b"\xff" * 7 + b"\x7f")])
    @example("nifti2.nii", [(168, bytes(8))])  # voxels from byte 0, fewer than the header has
    def check(name: str, damage: list[tuple[int, bytes]]) -> None:
        header, voxels = FORMATS[name]
        damaged = bytearray(header)
        for place, content in damage:
            start = place % N_HEADER_BYTES.get(name, 348)
            damaged[start : start + len(content)] = content
        start = 540 if name == "nifti2.nii" else 348
        has_extensions = name != "mgz" and damaged[start : start + 1] not in (b"", b"\0")
        csv_path = save_bytes(folders[name], name, bytes(damaged), voxels)
        outcomes.append(read_and_load(csv_path, has_extensions))

    check()
    assert outcomes.count("read") > n_examples / 10 and outcomes.count("refused") > n_examples / 10


def header_of(name: str, **fields) -> bytes:
    """Return a format's file with other header fields."""
    content = FORMATS[name][0]
    kind = nib.Nifti2Header if name == "nifti2.nii" else nib.Nifti1Header
    header = kind(content[: kind.sizeof_hdr], check=False)
    for field, value in fields.items():
        header[field] = value
    return header.binaryblock + content[kind.sizeof_hdr :]


HUGE = [3, 32767, 32767, 32767, 1, 1, 1, 1]
LARGE = [3, 1024, 512, 512, 1, 1, 1, 1]  # 1 GiB of float32
CLAIMS = {
    "voxels": ("nii", {"dim": HUGE, "datatype": 64, "bitpix": 64}),
    "voxels-that-memory-could-hold": ("nii", {"dim": LARGE}),
    "voxels-that-memory-could-hold-compressed": ("nii.gz", {"dim": LARGE}),
    "voxels-compressed": ("nii.gz", {"dim": HUGE, "datatype": 64, "bitpix": 64}),
    "voxels-of-a-pair": ("hdr", {"dim": HUGE}),
    "voxels-of-a-compressed-pair": ("hdr.gz", {"dim": HUGE}),
    "voxels-beyond-64-bits": ("nifti2.nii", {"dim": [3, 2**40, 2**40, 2**40, 1, 1, 1, 1]}),
    "axes-that-wrap-to-0": ("nifti2.nii", {"dim": [3, 2**32, 2**32, 4, 1, 1, 1, 1]}),
    "one-long-axis": ("nii.gz", {"dim": [3, 32767, 1, 1, 1, 1, 1, 1]}),
    "an-offset": ("nii.gz", {"vox_offset": 1e30}),
    "an-infinite-offset": ("nii", {"vox_offset": np.inf}),
    "no-offset": ("nii", {"vox_offset": np.nan}),
    "a-negative-offset": ("nifti2.nii", {"vox_offset": -(2**62)}),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("name", "fields"), CLAIMS.values(), ids=CLAIMS.keys())
def test_headers_that_claim_more_than_the_file_holds(tmp_path, name, fields):
    csv_path = save_bytes(tmp_path, name, header_of(name, **fields), FORMATS[name][1])
    assert read_and_load(csv_path) == "refused"
    if "dim" in fields:
        with pytest.raises(InputError, match="it holds fewer voxels than its header says"):
            dataset.read_cohort(csv_path)


@pytest.mark.filterwarnings("ignore:Extension size")
@pytest.mark.parametrize("name", ["extended.nii", "extended.nii.gz"])
@pytest.mark.parametrize("n_bytes", [2**31 - 1, 2**30, -8, 0, 16, 64, 208])
def test_extensions_that_claim_more_than_the_file_holds(tmp_path, name, n_bytes):
    content = bytearray(FORMATS[name][0])
    content[352:356] = n_bytes.to_bytes(4, "little", signed=True)
    if n_bytes == 208:  # past the voxels' start: nibabel goes on reading extensions in the voxels
        content[560:564] = (2**30).to_bytes(4, "little")
    assert read_and_load(save_bytes(tmp_path, name, bytes(content), b""), True) == "refused"


@pytest.mark.parametrize("dim", [HUGE, [3, 100, 100, 32, 1, 1, 1, 1]], ids=["huge", "large"])
def test_a_gzip_trailer_that_confirms_the_claim(tmp_path, dim):
    """The last bytes say, wrongly, that the file holds what its header claims."""
    csv_path = save_bytes(tmp_path, "nii.gz", header_of("nii.gz", dim=dim), b"")
    path = tmp_path / "x.nii.gz"
    n_claimed = 352 + int(np.prod(dim[1:4])) * 4
    path.write_bytes(path.read_bytes()[:-4] + (n_claimed % 2**32).to_bytes(4, "little"))
    assert read_and_load(csv_path) == "refused"


def test_a_gzip_bomb_is_no_more_than_its_header_says(tmp_path):
    """64 MiB of zeros in 64 KiB: neither as voxels nor after the voxels do they fill memory."""
    zeros = bytes(2**26)
    csv_path = save_bytes(tmp_path, "nii.gz", FORMATS["nii.gz"][0] + zeros, b"")
    assert (tmp_path / "x.nii.gz").stat().st_size < 2**19
    tracemalloc.start()
    assert read(csv_path).volume_shape == SHAPE
    assert tracemalloc.get_traced_memory()[1] < 2 * SLACK_BYTES
    tracemalloc.stop()
    packer = zlib.compressobj(wbits=31)
    header = header_of("nii.gz", dim=[3, 256, 256, 256, 1, 1, 1, 1])
    bomb = packer.compress(header[:352] + zeros) + packer.flush()
    (tmp_path / "x.nii.gz").write_bytes(bomb)
    with pytest.raises(InputError, match="no contrast"):
        dataset.read_cohort(csv_path)
