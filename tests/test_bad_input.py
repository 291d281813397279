"""Input at fault: exit status 2, one message that says what to do, and nothing written.

Of scans and CSVs tests/test_dataset.py and tests/loading have more cases, of runs tests/run_folder.
"""

import gzip
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import AFFINE, SHAPE, explain_arguments, make_volume, save_scan, train_arguments

import heatmap
import models
import train_cv

ROOT = Path(train_cv.__file__).parent


@pytest.fixture
def cohort(cohort_csv, tmp_path) -> Path:
    """Return a copy of the cohort's folder that a test may spoil."""
    return Path(shutil.copytree(cohort_csv.parent, tmp_path / "cohort"))


@pytest.fixture
def outpath(tmp_path) -> Path:
    """Return an output folder that holds a file already."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json.txt").write_text("of another run")
    return tmp_path / "out"


def set_row(row: int, text: str):
    """Return a function that replaces a row of data.csv."""

    def spoil(folder: Path) -> None:
        lines = (folder / "data.csv").read_text().splitlines()
        lines[row - 1] = text
        (folder / "data.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")

    return spoil


def set_scan(data: np.ndarray, affine: np.ndarray = AFFINE):
    """Return a function that replaces the third scan."""
    return lambda folder: save_scan(folder / "scan02.nii.gz", data, affine)


def halve_voxels(folder: Path) -> None:
    """Leave the third scan a whole gzip file of half a volume."""
    path = folder / "scan02.nii.gz"
    content = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(content[: len(content) // 2]))


OTHER_AFFINE = AFFINE + np.diag([0, 0, 0.5, 0])
COHORTS = {
    "no csv": (lambda folder: (folder / "data.csv").unlink(), ["data.csv", "No such file"]),
    "label": (set_row(3, "scan02.nii.gz,AD"), ["row 3:", "must be 0 or 1, got 'AD'"]),
    "no file": (set_row(3, "gone.nii.gz,0"), ["row 3:", "no file 'gone.nii.gz'"]),
    "too long": (set_row(3, "x" * 300 + ".nii,0"), ["row 3:", "no file 'xxx"]),
    "no home": (set_row(3, "~nobody-here/a.nii,0"), ["row 3:", "no file '~nobody-here"]),
    "no image": (lambda folder: (folder / "scan02.nii.gz").write_text("text"), ["not a readable"]),
    "half": (halve_voxels, ["row 3: ", "scan02.nii.gz is truncated or damaged"]),
    "4d": (set_scan(np.ones((*SHAPE, 2))), ["row 3: ", "not a 3D volume", str((*SHAPE, 2))]),
    "shape": (set_scan(make_volume(2, 0, (24, 27, 25))), ["row 3: ", "(24, 27, 25)", str(SHAPE)]),
    "affine": (set_scan(make_volume(2, 0), OTHER_AFFINE), ["another affine", str(OTHER_AFFINE)]),
    "constant": (set_scan(np.full(SHAPE, 7.0)), ["row 3: ", "scan02.nii.gz has no contrast"]),
    "twice": (set_row(3, "../cohort/./scan00.nii.gz,0"), ["row 3:", "listed already, in row 1"]),
    "no subject": (set_row(3, "scan02.nii.gz,0,s1"), ["row 1:", "subject is empty"]),
}


@pytest.mark.parametrize(("spoil", "fragments"), COHORTS.values(), ids=COHORTS.keys())
def test_spoilt_cohort(cohort, outpath, refusal, spoil, fragments):
    spoil(cohort)
    message = refusal(train_cv, train_arguments(cohort / "data.csv", outpath))
    for fragment in fragments:
        assert fragment in message


def test_heatmap_checks_the_cohort_too(cohort, run_path, outpath, refusal):
    halve_voxels(cohort)
    message = refusal(heatmap, explain_arguments(cohort / "data.csv", run_path, outpath))
    assert "row 3: " in message and "scan02.nii.gz" in message


@pytest.mark.parametrize(
    ("option", "value", "rule"),
    [
        ("--fold", "1", "must be at least 2, got 1"),
        ("--batch", "0", "must be at least 1, got 0"),
        ("--lr", "nan", "must be above 0, got nan"),
        ("--wd", "-1", "must be at least 0, got -1"),
        ("--delta", "-1", "must be at least 0, got -1"),
        ("--patience", "0", "must be at least 1, got 0"),
        ("--epochs", "2.5", "must be a number (int), got '2.5'"),
        ("--val-fraction", "1", "must be above 0 and below 1, got 1"),
        ("--method", "CAM", "choose from"),
        ("--target", "2", "choose from"),
        ("--subjects", "train", "choose from"),
        ("--steps", "0", "must be at least 2, got 0"),
        ("--beta", "-1", "must be at least 0, got -1"),
    ],
)
def test_option_out_of_range(cohort_csv, run_path, outpath, refusal, option, value, rule):
    is_heatmaps = option in ("--method", "--target", "--subjects", "--steps", "--beta")
    if is_heatmaps:
        message = refusal(heatmap, explain_arguments(cohort_csv, run_path, outpath, option, value))
    else:
        message = refusal(train_cv, train_arguments(cohort_csv, outpath, option, value))
    assert f"argument {option}: " in message and rule in message


@pytest.mark.parametrize(
    ("more", "fragments"),
    [
        (["--fold", "9"], ["label 0 has 8 scans, fewer than the 9 folds"]),
        (["--only-fold", "2"], ["--only-fold 2: the folds are 0 to 1"]),
        (["--only-fold", "1", "--overwrite"], ["--overwrite", "--only-fold"]),
        (["--model", "modelZ9"], ["unknown model 'modelZ9'", *models.MODELS]),
        (["--model", "modelA24"], ["24×27×23 voxels are too small for modelA24", "at least 110"]),
        *(([f"--device={name}"], ["--device", name]) for name in ("foo", "cuda:x", "-1", "mps")),
    ],
)
def test_options_that_cannot_be(cohort_csv, outpath, refusal, more, fragments):
    message = refusal(train_cv, train_arguments(cohort_csv, outpath, *more))
    for fragment in fragments:
        assert fragment in message


@pytest.mark.parametrize("name", ["file", "file/below", "x" * 300])
def test_outpath_that_cannot_be(cohort_csv, run_path, tmp_path, refusal, name):
    (tmp_path / "file").write_text("a file")
    for message in (
        refusal(train_cv, train_arguments(cohort_csv, tmp_path / name)),
        refusal(heatmap, explain_arguments(cohort_csv, run_path, tmp_path / name)),
    ):
        assert f"--outpath {tmp_path / name} cannot be used as a folder" in message


OTHER_OPTIONS = {
    "lr": ("0.005", "0.001"), "model": ("modelT16", "modelT8"), "fold": ("3", "2"),
    "batch": ("5", "4"), "epochs": ("3", "2"), "patience": ("3", "10"), "seed": ("1", "0"),
    "val-fraction": ("0.3", "0.2"), "precision": ("bf16", "left out"), "wd": ("0.5", "0.0001"),
    "delta": ("0.5", "0.0"), "restarts": ("2", "0"),
}  # fmt: skip


@pytest.mark.parametrize("option", OTHER_OPTIONS)
def test_outpath_holds_a_run_of_other_options(cohort_csv, modelpath, refusal, option):
    value, before = OTHER_OPTIONS[option]
    message = refusal(train_cv, train_arguments(cohort_csv, modelpath, f"--{option}", value))
    assert f"--{option} {value} (the run has {before})" in message
    assert message.count("the run has") == 1 and "--overwrite" in message


def test_outpath_holds_a_run_of_another_csv(cohort, modelpath, refusal):
    set_row(3, "./scan02.nii.gz,0")(cohort)
    message = refusal(train_cv, train_arguments(cohort / "data.csv", modelpath))
    assert "csv_sha256" in message and "--overwrite" in message


CHECKPOINT = "state_dict_f1.pth"
RUNS = {
    "no folder": (shutil.rmtree, "there is no folder --modelpath"),
    "no checkpoint": (lambda run: (run / CHECKPOINT).unlink(), f"/{CHECKPOINT}"),
    "cut": (lambda run: os.truncate(run / CHECKPOINT, 4000), f"{CHECKPOINT} holds no weights"),
    "no splits": (lambda run: (run / "splits.csv").unlink(), "--subjects all"),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "fragment"), RUNS.values(), ids=RUNS.keys())
def test_spoilt_run(cohort_csv, modelpath, outpath, refusal, spoil, fragment):
    spoil(modelpath)
    assert fragment in refusal(heatmap, explain_arguments(cohort_csv, modelpath, outpath))


@pytest.mark.parametrize("script", ["train_cv.py", "heatmap.py"])
def test_real_process(cohort_csv, run_path, tmp_path, script):
    arguments, option, message = {
        "train_cv.py": (train_arguments(cohort_csv, tmp_path / "out"),
                        ["--path", "gone.csv"], "gone.csv cannot be read as a CSV file"),
        "heatmap.py": (explain_arguments(cohort_csv, run_path, tmp_path / "out"),
                       ["--modelpath", "gone"], "there is no folder --modelpath gone"),
    }[script]  # fmt: skip
    process = subprocess.run(
        [sys.executable, ROOT / script, *arguments, *option],
        cwd=tmp_path, capture_output=True, encoding="utf-8",
    )  # fmt: skip
    assert process.returncode == 2 and process.stdout == ""
    assert f"error: {message}" in process.stderr.splitlines()[-1]
    assert "Traceback" not in process.stderr and not (tmp_path / "out").exists()
