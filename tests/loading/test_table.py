"""Tables as people have them: separators, remarks, and the cohort's columns by their names."""

import logging
from pathlib import Path

import pandas as pd
import pytest
from conftest import exit_status, train_arguments

import dataset
import svm
import train_cv
from loading import table
from loading.table import Wanted
from utils import InputError

BIDS = """participant_id\tsession_id\tfilename\tdiagnosis\tage\tsex
sub-1\tM00\tscan00.nii.gz\tAD\t71\tF
sub-1\tM12\tscan02.nii.gz\tad\t72\tF
sub-2\tM00\tnot_downloaded.nii.gz\tMCI\t68\tM
sub-3\tM00\tscan01.nii.gz\tCN\t70\tM
sub-4\tM00\tscan03.nii.gz\tn/a\tn/a\tM
"""
ADNI = """RID,VISCODE,DX,AGE,PTGENDER,path
2,bl,Dementia,71.5,Female,scan00.nii.gz
2,m12,Dementia,72.5,Female,scan02.nii.gz
3,bl,CN,70.1,Male,scan01.nii.gz
"""
PATIENTS = Wanted(positive=("AD",), negative=("CN",))


def read(folder: Path, text: str, wanted: Wanted | None = None) -> dataset.Cohort:
    """Write a data.csv with this content into the folder and read it."""
    (folder / "data.csv").write_text(text, newline="")
    return dataset.read_cohort(folder / "data.csv", wanted)


def refused(folder: Path, text: str, wanted: Wanted | None = None) -> str:
    """Return the message with which a content is refused."""
    with pytest.raises(InputError) as caught:
        read(folder, text, wanted)
    return str(caught.value)


TABLES = {
    "bids": (BIDS, PATIENTS, ["sub-1", "sub-1", "sub-3"]),
    "adni": (ADNI, Wanted(positive=("dementia",), negative=("CN",)), ["2", "2", "3"]),
    "the-other-word-is-the-negative": (ADNI, Wanted(positive=("Dementia",)), ["2", "2", "3"]),
    "by-command": (
        "mri;x;who;y\nscan00.nii.gz;7;a;1\nscan02.nii.gz;8;a;1\nscan01.nii.gz;9;b;0\n",
        Wanted(columns=(("scan", "MRI"), ("label", "y"), ("subject", "who"))), ["a", "a", "b"],
    ),
    "numbers-as-words": (
        "Subject ID,DX,path\na,3.0,scan00.nii.gz\na,3,scan02.nii.gz\nb,1,scan01.nii.gz\nc,2,x\n",
        Wanted(positive=("3",), negative=("1.0",)), ["a", "a", "b"],
    ),
    "a-head-in-a-remark": (
        "# made in May\n#path,label,sub\nscan00.nii.gz,1,a\nscan02.nii.gz,1,a\n"
        "#scan03.nii.gz,0,b\nscan01.nii.gz,0,b\n",
        None, ["a", "a", "b"],
    ),
    "pandas-index-and-numbers": (
        ",0,1,2\n0,scan00.nii.gz,1,a\n1,scan02.nii.gz,1,a\n2,scan01.nii.gz,0,b\n",
        None, ["a", "a", "b"],
    ),
    "pandas-index": (
        ",label,family,file\n0,1,a,scan00.nii.gz\n1,1,a,scan02.nii.gz\n2,0,b,scan01.nii.gz\n",
        None, ["a", "a", "b"],
    ),
    "no-subjects": (BIDS, Wanted(positive=("AD",), negative=("CN",), no_subjects=True), None),
}  # fmt: skip


@pytest.mark.parametrize(("text", "wanted", "subjects"), TABLES.values(), ids=TABLES)
def test_columns_are_found_by_name(folder, text, wanted, subjects):
    found = read(folder, text, wanted).table
    assert found["path"].tolist() == ["scan00.nii.gz", "scan02.nii.gz", "scan01.nii.gz"]
    assert found["label"].tolist() == [1, 1, 0]
    assert (found["subject"].tolist() if subjects else found.get("subject")) == subjects


@pytest.mark.parametrize(
    "text",
    [
        "sep=;\r\npath;label\r\nscan00.nii.gz;1\r\nscan01.nii.gz;0\r\n",
        '"sep=|"\nscan00.nii.gz|1\nscan01.nii.gz|0\n',
        "sep=,\nscan00.nii.gz,1\nscan01.nii.gz,0\n",
        '# remarks, with "one quote, "\n#\n\nscan00.nii.gz,1\nscan01.nii.gz,0\n',
        "0,1\nscan00.nii.gz,1\nscan01.nii.gz,0\n",
        "scan00.nii.gz;1,0\nscan01.nii.gz;0,0\n",
        "scan00.nii.gz\t1,0\nscan01.nii.gz\t0,\n",
        'path,label\nscan00.nii.gz,"1,0"\nscan01.nii.gz,"0,0"\n',
    ],
)
def test_what_spreadsheets_and_pandas_write(folder, text):
    found = read(folder, text).table
    assert found.to_dict("list") == {"path": ["scan00.nii.gz", "scan01.nii.gz"], "label": [1, 0]}


def test_remarks_and_a_separator_line_keep_the_rows_numbers(folder):
    assert "row 4: there is no file 'gone.nii'" in refused(
        folder, "sep=;\n# a remark\npath;label\ngone.nii;1\n"
    )


def test_a_scan_that_begins_with_the_sign_of_remarks_is_a_scan(folder):
    (folder / "scan00.nii.gz").replace(folder / "#1.nii.gz")
    assert read(folder, "#1.nii.gz,1\nscan01.nii.gz,0\n").table["path"][0] == "#1.nii.gz"


def test_one_line_says_what_was_taken(folder, caplog):
    caplog.set_level(logging.INFO, "heatmaps")
    read(folder, BIDS, PATIENTS)
    assert caplog.messages[-1] == (
        "3 scans: AD 2 → 1, CN 1 → 0; left out: MCI 1, n/a 1; "
        "subject = participant_id, 2; session_id, age, sex not used"
    )
    read(folder, "path,label,age\nscan00.nii.gz,1,70\nscan01.nii.gz,0,70\n")
    assert caplog.messages[-2].startswith("column 3, 'age', is not taken as the subject")
    assert caplog.messages[-1] == ("2 scans: 1 of label 1, 1 of label 0; no subjects; age not used")


ROWS = "scan00.nii.gz,1,a\nscan01.nii.gz,0,b\n"
REFUSED = {
    "no-such-column": (BIDS, Wanted(columns=(("label", "status"),)),
                       "--columns label=status: no column is called that; the columns of .* are "
                       "'participant_id', 'session_id'"),
    "two-columns-of-one-name": ("path,label,Label\n" + ROWS, Wanted(columns=(("label", "label"),)),
                                "--columns label=label: several columns are called that"),
    "two-labels": ("path,dx,group\n" + ROWS, None,
                   "'dx' and 'group' in .* could each be the label: .* --columns label=dx"),
    "two-subjects": ("path,dx,PTID,family\nscan00.nii.gz,1,a,b\n", None,
                     "'PTID' and 'family' in .* could each be the subject: .* subject=PTID"),
    "no-label": ("path,age,sex\n" + ROWS, None,
                 "no column is called one of label, diagnosis, .*--columns label=NAME; the columns "
                 "of .* are 'path', 'age', 'sex'"),
    "no-scan-below-a-head": ("age,label\n1,1,scan00.nii.gz\n", None, "no column is called one of"),
    "no-scan": ("a,b,label\n1,2,1\n", None, "no column is called one of path, .*--columns scan="),
    "one-column-twice": (BIDS, Wanted(columns=(("label", "sex"), ("subject", "sex"))),
                         "--columns gives one column two roles"),
    "no-header": (ROWS, PATIENTS, "--positive needs a row in .* that names the columns"),
    "no-header-for-columns": (ROWS, Wanted(columns=(("scan", "a"),)), "--columns needs a row in"),
    "no-such-word": (BIDS, Wanted(positive=("AD", "Alzheimer"), negative=("CN",)),
                     r"--positive Alzheimer: no row has that; .* holds AD 1, ad 1, MCI 1, CN 1"),
    "no-such-negative": (BIDS, Wanted(positive=("AD",), negative=("NC",)),
                         "--negative NC: no row has that"),
    "words-without-meaning": (BIDS, None, r"holds AD 1, ad 1, MCI 1, CN 1, n/a 1: say what they "
                              "mean with --positive WORD… --negative WORD…"),
    "two-words-without-meaning": (ADNI, None, "holds Dementia 2, CN 1: say what they mean"),
    "several-other-words": (BIDS, Wanted(positive=("AD",)), "say what they mean with --positive"),
    "more-words-than-0-and-1": ("path,label\nscan00.nii.gz,1\nscan01.nii.gz,0\nscan02.nii.gz,2\n",
                                None, r"(?s)row 4: label must be 0 or 1, got '2'.*holds 1 1, 0 1"),
    "an-empty-subject": (BIDS.replace("sub-3", "n/a"), PATIENTS,
                         r"(?s)row 5: the subject is empty.*read as: scan = filename, label = "
                         "diagnosis, subject = participant_id"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "wanted", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_meant_is_refused(folder, text, wanted, message):
    with pytest.raises(InputError, match=message):
        read(folder, text, wanted)


@pytest.mark.parametrize("more", [["--positive", "AD", "--negative", "ad", "CN"],
                                  ["--negative", "CN"], ["--columns", "age=x"],
                                  ["--columns", "scan=a", "scan=b"], ["--columns", "label="],
                                  ["--columns", "label=status"], ["--positive", "XX"]])  # fmt: skip
def test_options_that_contradict_are_refused_before_anything_is_written(folder, capsys, more):
    (folder / "data.csv").write_text(BIDS)
    for script, outpath in ((train_cv, folder / "run"), (svm, folder / "svm")):
        arguments = train_arguments(folder / "data.csv", outpath, *more)
        if script is svm:
            arguments = ["--path", str(folder / "data.csv"), "--outpath", str(outpath), *more]
        assert exit_status(script, arguments) == 2
        assert capsys.readouterr().err.count("error:") == 1 and not outpath.exists()


def test_problems_are_grouped_by_kind(folder):
    rows = [f"gone{i}.nii,{i % 2},s" for i in range(9)] + ["scan00.nii.gz,AD,s"] * 5
    lines = refused(folder, "path,label,sub\nscan00.nii.gz,1,a\n" + "\n".join(rows)).splitlines()
    assert lines[1:] == [
        *(f"  row {i + 3}: there is no file 'gone{i}.nii'" for i in range(3)),
        "  … and 6 more like these",
        *(f"  row {i + 12}: label must be 0 or 1, got 'AD'" for i in range(3)),
        "  … and 2 more like these",
        *(f"  row {i + 12}: 'scan00.nii.gz' is listed already, in row 2" for i in range(3)),
        "  … and 2 more like these",
        f"  read as: scan = path, label = label, subject = sub; the label's column holds 1 5, "
        f"0 5, AD 5: {table.MEANING}",
    ]


def test_a_link_to_nothing_is_said(folder):
    (folder / "link.nii.gz").symlink_to("annex/objects/not/here")
    message = refused(folder, "link.nii.gz,1\nscan01.nii.gz,0\n")
    assert "row 1: there is no file 'link.nii.gz': it is a link to nothing" in message


@pytest.mark.parametrize("text", [BIDS, ADNI])
def test_a_table_as_a_lab_has_it_trains_with_one_command(cohort_csv, tmp_path, text):
    """With MCI in it whose scans are not here."""
    header, separator = text.splitlines()[0], "\t" if "\t" in text else ","
    heads = header.split(separator)
    rows = []
    for i in range(16):
        dx = ("CN", "AD")[i % 2]
        row = {"participant_id": f"sub-{i}", "RID": str(i), "diagnosis": dx, "DX": dx,
               "filename": str(cohort_csv.parent / f"scan{i:02d}.nii.gz")}  # fmt: skip
        row["path"] = row["filename"]
        rows += [row, row | {"diagnosis": "MCI", "DX": "MCI", "filename": "no", "path": "no"}]
    pd.DataFrame(rows).reindex(columns=heads).to_csv(
        tmp_path / "data.csv", sep=separator, index=False
    )
    arguments = train_arguments(
        tmp_path / "data.csv", tmp_path / "run", "--positive", "AD", "--negative", "CN"
    )
    assert exit_status(train_cv, arguments) == 0
    splits = pd.read_csv(tmp_path / "run" / "splits.csv")
    assert len(splits) == 16 and splits["subject"].nunique() == 16
    other = train_arguments(
        tmp_path / "data.csv", tmp_path / "run", "--positive", "CN", "--negative", "AD"
    )
    assert exit_status(train_cv, other) == 2  # labels the other way round are another run
