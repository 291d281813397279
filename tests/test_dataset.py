"""The cohort: spellings of its CSV, and the checks on its scans."""

import gzip
import logging
import unicodedata
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from conftest import AFFINE, SHAPE, make_volume, save_scan, write_cohort

import dataset
from loading import image
from loading.table import Wanted
from run_folder import files
from utils import InputError

TWO_ROWS = "scan00.nii.gz,0\nscan01.nii.gz,1\n"
OTHER_AFFINE = AFFINE + np.diag([0, 0, 0.5, 0])


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


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the warnings that were logged."""
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


# The CSV


SPELLINGS = {
    "no-header": "scan00.nii.gz,0\nscan01.nii.gz,1\n",
    "header": "path,label\nscan00.nii.gz,0\nscan01.nii.gz,1\n",
    "any-header": "Image File,Diagnosis\nscan00.nii.gz,0\nscan01.nii.gz,1",
    "byte-order-mark": "\ufeffscan00.nii.gz,0\nscan01.nii.gz,1\n",
    "mark-and-header": "\ufeffpath,label\nscan00.nii.gz,0\nscan01.nii.gz,1\n",
    "windows-line-ends": "scan00.nii.gz,0\r\nscan01.nii.gz,1\r\n",
    "old-mac-line-ends": "scan00.nii.gz,0\rscan01.nii.gz,1\r",
    "semicolons": "scan00.nii.gz;0\nscan01.nii.gz;1\n",
    "semicolons-and-header": "path;label;subject\nscan00.nii.gz;0;\nscan01.nii.gz;1;\n",
    "tabs": "scan00.nii.gz\t0\r\nscan01.nii.gz\t1\r\n",
    "empty-lines": "\n\nscan00.nii.gz,0\n,\n\nscan01.nii.gz,1\n\n",
    "quotes": '"scan00.nii.gz","0"\n"scan01.nii.gz", "1"\n',
    "spaces": " scan00.nii.gz , 0\nscan01.nii.gz\t, 1 \n",
    "labels-as-floats": "scan00.nii.gz,0.0\nscan01.nii.gz,1.0\n",
    "empty-third-column": "scan00.nii.gz,0,\nscan01.nii.gz,1,\n",
}


@pytest.mark.parametrize("text", SPELLINGS.values(), ids=SPELLINGS)
def test_csv_spellings_mean_the_same(folder, text):
    cohort = read_text(folder, text)
    assert cohort.table.to_dict("list") == {
        "path": ["scan00.nii.gz", "scan01.nii.gz"],
        "label": [0, 1],
    }
    assert cohort.scans == [str(folder / "scan00.nii.gz"), str(folder / "scan01.nii.gz")]
    assert (cohort.labels.dtype, cohort.labels.tolist()) == (np.int64, [0, 1])


def test_subject_column(folder, caplog):
    caplog.set_level(logging.INFO, "heatmaps")
    cohort = read_text(folder, "scan00.nii.gz,0,007\nscan01.nii.gz,1,s2\nscan02.nii.gz,0,007\n")
    assert cohort.table["subject"].tolist() == ["007", "s2", "007"]
    assert "3 scans: 1 of label 1, 2 of label 0; subject = column 3, 2" in caplog.text
    assert warnings_in(caplog) == []


def test_subject_with_both_labels_is_a_warning(folder, caplog):
    cohort = read_text(folder, "scan00.nii.gz,0,anna\nscan01.nii.gz,1,anna\nscan02.nii.gz,0,ben\n")
    (warning,) = warnings_in(caplog)
    assert "1 subjects have scans of both labels: anna" in warning
    assert len(cohort.table) == 3


@pytest.mark.parametrize("name", ["a, b c.nii.gz", "Jürgen Åß 脑.nii.gz", 'a "b".nii'])
def test_quoted_and_unicode_paths(folder, name):
    save_scan(folder / name, make_volume(9, 1))
    table = pd.DataFrame({"path": ["scan00.nii.gz", name], "label": [0, 1]})
    table.to_csv(folder / "data.csv", index=False, header=False)
    assert dataset.read_cohort(folder / "data.csv").scans[1] == str(folder / name)


def test_a_semicolon_in_a_path_and_a_comma_in_a_path(folder):
    for name in ("a;b.nii.gz", "a,b.nii.gz"):
        (folder / "scan00.nii.gz").replace(folder / name)
        save_scan(folder / "scan00.nii.gz", make_volume(0, 0))
    assert read_text(folder, "a;b.nii.gz,0\nscan01.nii.gz,1\n").table["path"][0] == "a;b.nii.gz"
    assert read_text(folder, "a,b.nii.gz;0\nscan01.nii.gz;1\n").table["path"][0] == "a,b.nii.gz"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (TWO_ROWS.encode("utf-16"), "it is UTF-16"),
        (TWO_ROWS.encode("utf-16-be"), "it is UTF-16"),  # without a mark
        ((TWO_ROWS + "Jürgen.nii,0\n").encode("latin-1"), "row 3 is not UTF-8"),
        ((TWO_ROWS + "übung.nii,0\n").encode("latin-1"), "row 3 is not UTF-8"),
        ("ü.nii,0\r\n".encode("latin-1"), "row 1 is not UTF-8"),
    ],
)
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
    assert Path(cohort.scans[0]).name == unicodedata.normalize(on_disk, name)


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


@pytest.mark.parametrize("text", ["", "\n\n", ",\n", "path,label\n"])
def test_a_csv_without_scans(folder, text):
    with pytest.raises(InputError, match=r"data\.csv lists no scan"):
        read_text(folder, text)


def test_paths_are_looked_up_from_the_csv_then_from_here(folder, tmp_path, monkeypatch):
    here = write_cohort(tmp_path / "here", 6).parent  # has scan00 too, and scan05 as the only one
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(folder))
    read_text(
        folder, f"scan00.nii.gz,0\nscan05.nii.gz,1\n{folder}/scan02.nii.gz,0\n~/scan03.nii.gz,1\n"
    )
    cohort = dataset.read_cohort(Path("../cohort/data.csv"))
    places = folder, here, folder, folder
    names = "scan00.nii.gz", "scan05.nii.gz", "scan02.nii.gz", "scan03.nii.gz"
    assert cohort.scans == [str(place / name) for place, name in zip(places, names, strict=True)]


def test_a_link_to_a_listed_scan_is_a_duplicate(folder):
    (folder / "link.nii.gz").symlink_to(folder / "scan00.nii.gz")
    with pytest.raises(InputError, match=r"row 2: 'link.nii.gz' is listed already, in row 1"):
        read_text(folder, "scan00.nii.gz,0\nlink.nii.gz,1\n")


@pytest.mark.parametrize("names", [("x.hdr", "x.img"), ("x.img", "x.hdr"), ("y.hdr", "x.img")])
@pytest.mark.parametrize("compression", ["", ".gz"])
def test_both_files_of_a_pair_are_one_scan(folder, names, compression):
    nib.save(nib.Nifti1Pair(make_volume(3, 1), AFFINE), folder / f"x.hdr{compression}")
    (folder / f"y.hdr{compression}").symlink_to(f"x.hdr{compression}")
    first, second = (name + compression for name in names)
    with pytest.raises(InputError, match=rf"row 3: '{second}' is listed already, in row 2"):
        read_text(folder, f"scan00.nii.gz,0\n{first},1\n{second},1\n")


def test_files_of_one_name_in_other_formats_are_several_scans():
    names = ["x.hdr", "x.nii", "x.mgz", "x.hdr.gz", "x.nii.gz", "y.hdr"]
    keys = [dataset.scan_keys(Path(name)) for name in names]
    assert len(set.union(*keys)) == sum(map(len, keys))


def store(folder: Path, name: str) -> None:
    """Replace a file by a link to its content in a store, whose names say nothing."""
    content = folder / "objects" / f"MD5-{name.replace('.', '-')}" / "content"
    content.parent.mkdir(parents=True)
    (folder / name).replace(content)
    (folder / name).symlink_to(content)


@pytest.mark.parametrize("names", [["x.nii.gz"], ["x.nii"], ["x.img", "x.hdr"], ["x.mgz"]])
def test_links_into_a_store_are_read_by_their_own_names(folder, names):
    data = make_volume(7, 1)
    kind = {".img": nib.Nifti1Pair, ".mgz": nib.MGHImage}.get(Path(names[0]).suffix)
    nib.save((kind or nib.Nifti1Image)(data, AFFINE), folder / names[0])
    for name in names:
        store(folder, name)
    cohort = read_text(folder, f"scan00.nii.gz,0\n{names[0]},1\n")
    assert cohort.scans[1] == str(folder / names[0])
    np.testing.assert_array_equal(cohort.volumes(None, 0)[1], data / data.max())
    (folder / f"again{Path(names[0]).suffix}").symlink_to((folder / names[0]).resolve())
    with pytest.raises(InputError, match=r"row 2: .* is listed already, in row 1"):
        read_text(folder, f"{names[0]},0\nagain{Path(names[0]).suffix},1\n")


# The scans


@pytest.mark.parametrize("odd", [0, 2])
def test_the_scan_of_another_shape_or_affine_is_the_one_named(folder, odd):
    path = folder / f"scan{odd:02d}.nii.gz"
    save_scan(path, make_volume(odd, 0, (24, 27, 25)))
    line, read_as = error_of(folder / "data.csv").splitlines()[1:]
    assert read_as == "  read as: scan = column 1, label = column 2"
    assert line == f"  row {odd + 1}: {path.name} has shape (24, 27, 25), the other scans {SHAPE}"
    save_scan(path, make_volume(odd, 0), OTHER_AFFINE)
    message = error_of(folder / "data.csv")
    assert message.count("another affine") == 1
    assert f"row {odd + 1}: {path.name} has another affine" in message
    assert f"{nib.load(folder / 'scan01.nii.gz').affine}" in message


def test_rounding_of_affines_and_trailing_axes_are_tolerated(folder):
    save_scan(folder / "scan01.nii.gz", make_volume(1, 1), AFFINE + 1e-4 * np.eye(4, 4, 3))
    save_scan(folder / "scan02.nii.gz", make_volume(2, 0)[..., None, None])
    cohort = dataset.read_cohort(folder / "data.csv")
    assert cohort.volume_shape == SHAPE
    np.testing.assert_allclose(cohort.like_img.affine, AFFINE, atol=1e-6)
    expected = make_volume(2, 0) / make_volume(2, 0).max()
    np.testing.assert_array_equal(cohort.volumes(None, 0)[2], expected)


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
    assert error_of(tmp_path / "data.csv").splitlines()[1:] == [
        *(f"  row {i + 1}: there is no file 'gone{i}.nii'" for i in range(3)),
        "  … and 47 more like these",
        "  read as: scan = column 1, label = column 2",
    ]


def test_facts_count_scans_by_size_not_by_time(folder):
    cohort = dataset.read_cohort(folder / "data.csv")
    facts = cohort.facts(folder / "data.csv")
    assert facts["csv_sha256"] == files.sha256(folder / "data.csv")
    assert (facts["n_scans"], facts["volume_shape"]) == (4, list(SHAPE))
    np.testing.assert_allclose(facts["affine"], AFFINE, atol=1e-5)
    path = folder / "scan02.nii.gz"
    path.write_bytes(path.read_bytes())  # copied: of another time
    assert cohort.facts(folder / "data.csv") == facts
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()), 0))
    other = cohort.facts(folder / "data.csv")
    assert [key for key in facts if facts[key] != other[key]] == ["scan_sizes_sha256"]
    path.unlink()
    with pytest.raises(InputError, match=r"scan02\.nii\.gz cannot be read any more"):
        cohort.facts(folder / "data.csv")


@pytest.mark.parametrize(("shift", "is_taken"), [(0.002, True), (0.02, False), (0.1, False)])
def test_the_minority_of_slightly_other_affines_is_named(folder, shift, is_taken):
    """The bound is a hundredth of a voxel; rounding to 0.01 mm used to part like from like."""
    affine = AFFINE.copy()
    affine[0, 3] += shift
    save_scan(folder / "scan02.nii.gz", make_volume(2, 0), affine)
    if is_taken:
        assert len(dataset.read_cohort(folder / "data.csv").scans) == 4
        return
    message = error_of(folder / "data.csv")
    assert message.count("another affine") == 1 and "row 3: scan02.nii.gz has another" in message


def test_a_turn_counts_where_it_moves_corners(folder):
    """A scaling by a thousandth moves the far corner by more than a hundredth of a voxel."""
    affine = AFFINE.copy()
    affine[:3, 0] *= 1.001
    save_scan(folder / "scan00.nii.gz", make_volume(0, 0), affine)
    assert "row 1: scan00.nii.gz has another affine" in error_of(folder / "data.csv")


def save_bids(folder: Path, names: list[str]) -> Path:
    """Write scans of these names, labels 0 and 1 in turn, and their CSV."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_scan(folder / name, make_volume(number, number % 2))
    rows = [f"{name},{number % 2}" for number, name in enumerate(names)]
    (folder / "data.csv").write_text("\n".join(rows))
    return folder / "data.csv"


@pytest.mark.parametrize(
    ("names", "subjects"),
    [
        (["sub-1_ses-a.nii", "sub-1_ses-b.nii", "sub-2_ses-a.nii"], ["sub-1", "sub-1", "sub-2"]),
        (["sub-1/a/T1w.nii", "sub-1/b/T1w.nii", "sub-10/T1w.nii"], ["sub-1", "sub-1", "sub-10"]),
        (["copy_sub-03.nii", "sub-03.nii", "x/sub-4.nii"], ["sub-03", "sub-03", "sub-4"]),
        (["sub-1.nii", "sub-2.nii", "sub-3.nii"], None),
        (["sub-1_a.nii", "sub-1_b.nii", "other.nii"], None),
    ],
)  # fmt: skip
def test_subjects_of_bids_names(tmp_path, caplog, names, subjects):
    csv_path = save_bids(tmp_path, names)
    caplog.set_level("INFO", logger="heatmaps")
    table = dataset.read_cohort(csv_path).table
    if subjects is None:
        assert "subject" not in table and "--no-subjects" not in caplog.text
        return
    assert table["subject"].tolist() == subjects
    assert caplog.text.count("subject = sub-… in the paths") == 1
    assert "subject" not in dataset.read_cohort(csv_path, Wanted(no_subjects=True)).table


def test_column_3_comes_before_bids_names(tmp_path):
    csv_path = save_bids(tmp_path, ["sub-1_a.nii", "sub-1_b.nii", "sub-2.nii"])
    csv_path.write_text("sub-1_a.nii,0,x\nsub-1_b.nii,1,y\nsub-2.nii,0,z\n")
    assert dataset.read_cohort(csv_path).table["subject"].tolist() == ["x", "y", "z"]


def test_scans_without_orientation_are_one_warning(folder, caplog):
    for number in range(3):
        path = folder / f"scan{number:02d}.nii.gz"
        img = nib.load(path)
        img.header["sform_code"] = img.header["qform_code"] = 0
        nib.save(nib.Nifti1Image(img.get_fdata(), None, img.header), path)
    image.warn_of_orientation.cache_clear()
    with pytest.raises(InputError, match="another affine"):
        dataset.read_cohort(folder / "data.csv")
    assert [line for line in warnings_in(caplog) if "no orientation" in line] == [
        f"a scan {image.UNKNOWN_ORIENTATION}"
    ]
