"""Text files of coordinates, in every way that people have them, and what cannot be meant."""

import pytest

from comparing import sleuth
from utils import InputError

PLAIN = """//Reference=MNI
//Smith et al., 2010: patients < controls
//Subjects=24
-24 -22 -14
30.5 -20 -12

//Jones, 2012
//Subjects=12
0 -50 28
"""
EXPECTED = [
    ("Smith et al., 2010: patients < controls", 24, "MNI", [(-24, -22, -14), (30.5, -20, -12)]),
    ("Jones, 2012", 12, "MNI", [(0, -50, 28)]),
]


def read(tmp_path, content: str | bytes) -> list[tuple]:
    """Return name, subjects, space and foci of each experiment of a file."""
    path = tmp_path / "foci.txt"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    found = sleuth.read_experiments(path)
    return [(each.name, each.n_subjects, each.space, each.foci) for each in found]


@pytest.mark.parametrize(
    "content",
    [
        PLAIN,
        PLAIN.replace("\n", "\r\n"),
        PLAIN.replace("\n", "\r"),
        "\ufeff" + PLAIN,
        PLAIN.replace("\n", "\n\n"),
        PLAIN.replace("\n", "\n# a remark\n"),
        PLAIN.replace("-22 -14", "-22\t-14").replace("0 -50 28", "0, -50 ,28"),
        PLAIN.replace("-", "\u2212"),
        PLAIN.replace("24\n", "24.0\n").replace("=12", " = 12 AD"),
        PLAIN.replace("//Subjects", "// SUBJECTS").replace("//Ref", "//  ref"),
        PLAIN.replace("-24 -22 -14", "-24.0 -22 -14.00"),
        PLAIN.replace("patients < controls", "\n//patients < controls").replace(": \n", ":\n"),
        PLAIN.replace("//Jones, 2012\n//Subjects=12", "//Subjects=12\n//Jones, 2012"),
        PLAIN.replace("patients < controls\n//Subjects=24", "\n//Subjects=24").replace(
            "//Smith et al., 2010: \n//Subjects=24", "//Subjects=24\n//Smith et al., 2010:\n"
            "//patients < controls"),
        PLAIN.replace("Subjects=24", "Subject: 24").replace("-", "\u2013"),
        PLAIN.replace("//Jones", "//Reference=MNI152\n//Jones"),
        PLAIN.replace("//Jones, 2012\n", "//Jones, 2012\n//Reference=mni\n"),
    ],
    ids=["plain", "crlf", "cr", "mark", "blank", "remarks", "separators", "minus", "counts", "case",
         "decimals", "title-lines", "subjects-first", "subjects-before-titles", "dash-and-colon",
         "reference-again", "reference-inside"],
)  # fmt: skip
def test_variants_of_one_file(tmp_path, content):
    assert read(tmp_path, content) == EXPECTED


@pytest.mark.parametrize(
    ("text", "space"),
    [("MNI", "MNI"), ("mni152", "MNI"), (" MNI ", "MNI"), ("Talairach", "Talairach"),
     ("TAL", "Talairach"), ("talairach (1988)", "Talairach")],
)  # fmt: skip
def test_reference_spaces(tmp_path, text, space):
    found = read(tmp_path, PLAIN.replace("Reference=MNI", f"Reference={text}"))
    assert {each[2] for each in found} == {space}


def test_latin_1(tmp_path):
    found = read(tmp_path, PLAIN.replace("Jones", "Müller").encode("latin-1"))
    assert found[1][0] == "Müller, 2012"


def test_a_reference_that_changes_is_that_of_what_follows(tmp_path):
    found = read(tmp_path, PLAIN.replace("//Jones", "//Reference=Talairach\n//Jones"))
    assert [each[2] for each in found] == ["MNI", "Talairach"]


def test_experiments_of_one_name_stay_two(tmp_path):
    found = read(tmp_path, PLAIN.replace("Jones, 2012", "Smith et al., 2010: patients < controls"))
    assert len(found) == 2 and found[0][0] == found[1][0]


@pytest.mark.parametrize("header", ["//Lee\n//Subjects=9\n", "//Subjects=9\n//Lee\n"])
def test_an_experiment_without_foci(tmp_path, header):
    """Wherever the next one begins, or at the end of the file."""
    text = PLAIN.replace(
        "//Jones, 2012\n//Subjects=12\n", f"{header}//Jones, 2012\n//Subjects=12\n"
    )
    if header.startswith("//S"):
        text = text.replace("//Jones, 2012\n//Subjects=12", "//Subjects=12\n//Jones, 2012")
    assert read(tmp_path, text) == [EXPECTED[0], ("Lee", 9, "MNI", []), EXPECTED[1]]
    assert read(tmp_path, PLAIN + header)[2] == ("Lee", 9, "MNI", [])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("//Reference=MNI\n", "", "line 3: no line //Reference"),
        ("=MNI", "=native", "line 1: the reference must be MNI or Talairach, got 'native'"),
        ("30.5 -20 -12", "30.5 -20", "line 5: a focus is three numbers"),
        ("30.5 -20 -12", "30.5 -20 -12 4", "line 5: a focus is three numbers"),
        ("30.5 -20 -12", "left hippocampus", "line 5: a focus is three numbers"),
        ("30.5 -20 -12", "nan -20 -12", "line 5: a focus is three numbers"),
        ("//Subjects=12\n", "", "line 7: an experiment with foci has no line //Subjects=n: 'Jones"),
        ("=12", "=0", "line 8: the number of subjects must be at least 1, got '0'"),
        ("=MNI", "=Tallinn", "line 1: the reference must be MNI or Talairach, got 'Tallinn'"),
        ("30.5 -20 -12", "1e300 -20 -12", "line 5: a focus is three numbers"),
        ("//Subjects=24", "//Subjects=24\n//Subjects=25", "line 4: .* given twice in a row"),
        ("30.5 -20", "//Reference=TAL\n30.5 -20", "line 6: the reference changes within"),
        ("=12", "=many", "line 8: the number of subjects must be at least 1, got 'many'"),
        ("=12", "=12.5", "line 8: the number of subjects must be at least 1, got '12.5'"),
        ("//Smith et al., 2010: patients < controls\n//Subjects=24\n", "",
         "line 2: a focus before any experiment's title"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant(tmp_path, old, new, message):
    assert old in PLAIN
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        read(tmp_path, PLAIN.replace(old, new, 1))


def test_a_large_number_of_subjects(tmp_path):
    assert read(tmp_path, PLAIN.replace("=24", "=1,200"))[0][1] == 1200


def test_utf_16(tmp_path):
    with pytest.raises(InputError, match="is UTF-16 or no text; save it as UTF-8"):
        read(tmp_path, PLAIN.encode("utf-16"))


def test_files_without_foci(tmp_path):
    with pytest.raises(InputError, match="has no focus"):
        read(tmp_path, "//Reference=MNI\n//Lee\n//Subjects=9\n")
    with pytest.raises(InputError, match="cannot be read"):
        sleuth.read_experiments(tmp_path / "nothing.txt")
