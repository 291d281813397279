"""Input at fault: exit status 2, one message that says what to do, and nothing written."""

import gzip
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import AFFINE, N_SCANS, SHAPE, make_volume, save_scan, train_arguments

import heatmap
import models
import train_cv
import utils

REPOSITORY = Path(train_cv.__file__).parent


@pytest.fixture
def cohort(cohort_csv, tmp_path) -> Path:
    """Return a copy of the cohort's folder that a test may spoil."""
    return Path(shutil.copytree(cohort_csv.parent, tmp_path / "cohort"))


@pytest.fixture
def modelpath(run_path, tmp_path) -> Path:
    """Return a copy of the run's folder that a test may spoil."""
    return Path(shutil.copytree(run_path, tmp_path / "run"))


@pytest.fixture(params=["new", "existing"])
def outpath(request, tmp_path) -> Path:
    """Return an output folder: one that does not exist, then one that holds a file."""
    path = tmp_path / "out"
    if request.param == "existing":
        path.mkdir()
        (path / "run.json.txt").write_text("of another run")
    return path


def heatmap_arguments(csv_path: Path, modelpath: Path, outpath: Path, *more: str) -> list[str]:
    """Return the arguments of the cheapest heatmaps."""
    return [
        "--path", str(csv_path), "--modelpath", str(modelpath), "--outpath", str(outpath),
        "--model", "modelT8", "--method", "GGC", "--device", "cpu", "--workers", "0", *more,
    ]  # fmt: skip


def content_of(folder: Path) -> dict[str, bytes | None]:
    """Return every path below a folder with its bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.fixture
def refusal(tmp_path, capsys):
    """Return a function that runs a script, holds it to its promises and returns its message."""

    def run(script, arguments: list[str]) -> str:
        before = content_of(tmp_path)
        try:
            status = utils.run_script(script.main, script.parse_args(arguments))
        except SystemExit as stop:  # argparse
            status = stop.code
        output = capsys.readouterr()
        assert status == 2
        assert output.err.count("error: ") == 1
        assert output.out == ""
        assert content_of(tmp_path) == before
        return output.err

    return run


# Ways to spoil a cohort's folder


def set_row(row: int, text: str):
    """Return a function that replaces a row of data.csv."""

    def spoil(folder: Path) -> None:
        lines = (folder / "data.csv").read_text().splitlines()
        lines[row - 1] = text
        (folder / "data.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")

    return spoil


def set_csv(content: bytes):
    """Return a function that replaces data.csv."""
    return lambda folder: (folder / "data.csv").write_bytes(content)


def set_scan(data: np.ndarray, affine: np.ndarray = AFFINE):
    """Return a function that replaces the third scan."""
    return lambda folder: save_scan(folder / "scan02.nii.gz", data, affine)


def cut_gzip(folder: Path) -> None:
    """Cut the compressed third scan in half."""
    path = folder / "scan02.nii.gz"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_before_compression(folder: Path) -> None:
    """Leave the third scan a whole gzip file of half a volume."""
    path = folder / "scan02.nii.gz"
    content = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(content[: len(content) // 2]))


def cut_uncompressed(folder: Path) -> None:
    """Replace the third scan by an uncompressed one without its last byte."""
    path = save_scan(folder / "scan02.nii", make_volume(2, 0))
    path.write_bytes(path.read_bytes()[:-1])
    set_row(3, "scan02.nii,0")(folder)


def list_surface(folder: Path) -> None:
    """List a GIFTI surface, which nibabel reads but which is no volume."""
    nib.save(nib.gifti.GiftiImage(), folder / "scan02.gii")
    set_row(3, "scan02.gii,0")(folder)


OTHER_AFFINE = AFFINE + np.diag([0, 0, 0.5, 0])
SCANS = [b"scan%02d.nii.gz" % index for index in range(N_SCANS)]
COHORT_CASES = {
    "no-csv": (lambda folder: (folder / "data.csv").unlink(), ["no CSV file", "data.csv"]),
    "csv-is-a-folder": (
        lambda folder: [(folder / "data.csv").unlink(), (folder / "data.csv").mkdir()],
        ["data.csv cannot be read"],
    ),
    "empty-csv": (set_csv(b""), ["data.csv lists no scan"]),
    "header-alone": (set_csv(b"path,label\n"), ["data.csv lists no scan"]),
    "binary-csv": (set_csv(b"\x50\x4b\x03\x04\xff\xfe\x00"), ["cannot be read as a CSV file"]),
    "one-column": (set_csv(b"\n".join(SCANS)), ["row 1:", "row 16:", "a path and a label"]),
    "label-AD-in-row-1": (set_row(1, "scan00.nii.gz,AD"), ["row 1:", "must be 0 or 1, got 'AD'"]),
    "label-AD": (set_row(3, "scan02.nii.gz,AD"), ["row 3:", "must be 0 or 1, got 'AD'"]),
    "label-2": (set_row(3, "scan02.nii.gz,2"), ["row 3:", "must be 0 or 1, got '2'"]),
    "label-empty": (set_row(3, "scan02.nii.gz,"), ["row 3:", "must be 0 or 1, got ''"]),
    "missing-file": (set_row(3, "gone.nii.gz,0"), ["row 3:", "no file 'gone.nii.gz'"]),
    "file-is-a-folder": (set_row(3, ".,0"), ["row 3:", "no file '.'"]),
    "path-too-long": (set_row(3, "x" * 300 + ".nii,0"), ["row 3:", "no file 'xxx"]),
    "unknown-home": (set_row(3, "~nobody-here/a.nii,0"), ["row 3:", "no file '~nobody-here"]),
    "text-as-nii-gz": (
        lambda folder: (folder / "scan02.nii.gz").write_text("no image at all"),
        ["row 3: scan02.nii.gz", "not a readable image"],
    ),
    "empty-file": (
        lambda folder: (folder / "scan02.nii.gz").write_bytes(b""),
        ["row 3: scan02.nii.gz", "not a readable image"],
    ),
    "surface": (list_surface, ["row 3: scan02.gii"]),
    "cut-nii-gz": (cut_gzip, ["row 3: scan02.nii.gz", "damaged"]),
    "gzip-of-half-a-volume": (cut_before_compression, ["row 3: scan02.nii.gz", "damaged"]),
    "cut-nii": (cut_uncompressed, ["row 3: scan02.nii ", "truncated"]),
    "2d": (set_scan(make_volume(2, 0)[..., 0]), ["row 3:", "not a 3D volume", str(SHAPE[:2])]),
    "4d": (set_scan(np.ones((*SHAPE, 2))), ["row 3:", "not a 3D volume", str((*SHAPE, 2))]),
    "two-shapes": (
        set_scan(make_volume(2, 0, (24, 27, 25))),
        ["row 3: scan02.nii.gz has shape (24, 27, 25)", str(SHAPE)],
    ),
    "two-affines": (
        set_scan(make_volume(2, 0), OTHER_AFFINE),
        ["row 3: scan02.nii.gz has another affine", str(OTHER_AFFINE)],
    ),
    "affine-of-zeros": (
        set_scan(make_volume(2, 0), np.diag([1e-9, 1e-9, 1e-9, 1])),
        ["row 3: scan02.nii.gz", "affine that cannot be inverted"],
    ),
    "constant": (set_scan(np.full(SHAPE, 7.0)), ["row 3: scan02.nii.gz has no contrast"]),
    "all-nan": (set_scan(np.full(SHAPE, np.nan)), ["row 3: scan02.nii.gz has no contrast"]),
    "one-class": (set_csv(b",0\n".join([*SCANS, b""])), ["label 1 has 0 scans"]),
    "duplicate": (set_row(3, "scan00.nii.gz,0"), ["row 3:", "listed already, in row 1"]),
    "duplicate-spelled-otherwise": (
        set_row(3, "../cohort/./scan00.nii.gz,0"),
        ["row 3:", "listed already, in row 1"],
    ),
    "subject-missing": (set_row(3, "scan02.nii.gz,0,s1"), ["row 1:", "subject is empty"]),
}


@pytest.mark.parametrize(
    ("spoil", "fragments"), COHORT_CASES.values(), ids=COHORT_CASES.keys()
)  # fmt: skip
def test_spoilt_cohort(cohort, outpath, refusal, spoil, fragments):
    spoil(cohort)
    message = refusal(train_cv, train_arguments(cohort / "data.csv", outpath))
    for fragment in fragments:
        assert fragment in message


def test_heatmap_checks_the_cohort_too(cohort, modelpath, outpath, refusal):
    cut_gzip(cohort)
    message = refusal(heatmap, heatmap_arguments(cohort / "data.csv", modelpath, outpath))
    assert "row 3: scan02.nii.gz" in message


# Options


@pytest.mark.parametrize(
    ("option", "value", "rule"),
    [
        ("--fold", "1", "at least 2, got 1"),
        ("--fold", "2.5", "must be a number (int), got '2.5'"),
        ("--batch", "0", "at least 1, got 0"),
        ("--lr", "-1", "above 0, got -1"),
        ("--lr", "nan", "above 0, got nan"),
        ("--lr", "inf", "above 0, got inf"),
        ("--lr", "fast", "must be a number (float), got 'fast'"),
        ("--wd", "-1", "at least 0, got -1"),
        ("--delta", "-1", "at least 0, got -1"),
        ("--patience", "0", "at least 1, got 0"),
        ("--epochs", "0", "at least 1, got 0"),
        ("--val-fraction", "0", "above 0 and below 1, got 0"),
        ("--val-fraction", "1", "above 0 and below 1, got 1"),
        ("--seed", "-1", "at least 0, got -1"),
        ("--workers", "-1", "at least 0, got -1"),
    ],
)
def test_train_option_out_of_range(cohort_csv, outpath, refusal, option, value, rule):
    message = refusal(train_cv, train_arguments(cohort_csv, outpath, option, value))
    assert f"argument {option}: must be" in message
    assert rule in message


@pytest.mark.parametrize(
    ("option", "value", "rule"),
    [
        ("--method", "CAM", "'LRP', 'IG', 'GGC'"),
        ("--target", "2", "'predicted'"),
        ("--subjects", "train", "'all'"),
        ("--steps", "0", "must be at least"),
        ("--batch", "0", "at least 1, got 0"),
        ("--beta", "-1", "at least 0, got -1"),
    ],
)
def test_heatmap_option_out_of_range(
    cohort_csv, modelpath, outpath, refusal, option, value, rule
):  # fmt: skip
    arguments = heatmap_arguments(cohort_csv, modelpath, outpath, option, value)
    message = refusal(heatmap, arguments)
    assert f"argument {option}: " in message
    assert rule.replace("'", "") in message.replace("'", "")  # Python 3.12 dropped the quotes


def test_more_folds_than_scans_of_a_class(cohort_csv, outpath, refusal):
    message = refusal(train_cv, train_arguments(cohort_csv, outpath, "--fold", "9"))
    assert "label 0 has 8 scans, fewer than the 9 folds" in message


def test_unknown_model(cohort_csv, modelpath, outpath, refusal):
    for message in (
        refusal(train_cv, train_arguments(cohort_csv, outpath, "--model", "modelZ9")),
        refusal(
            heatmap, heatmap_arguments(cohort_csv, modelpath, outpath, "--model", "modelZ9")
        ),
    ):  # fmt: skip
        assert "unknown model 'modelZ9'" in message
        assert all(name in message for name in models.MODELS)


def test_volume_too_small_for_the_model(cohort_csv, outpath, refusal):
    message = refusal(train_cv, train_arguments(cohort_csv, outpath, "--model", "modelA24"))
    assert "24×27×23 voxels are too small for modelA24" in message
    assert "at least 110 voxels" in message
    assert "modelT8 takes 22 or more" in message


def test_volume_too_small_for_every_model(cohort, outpath, refusal):
    for index in range(N_SCANS):
        save_scan(cohort / f"scan{index:02d}.nii.gz", make_volume(index, 0, (24, 27, 21)))
    message = refusal(train_cv, train_arguments(cohort / "data.csv", outpath))
    assert "too small for modelT8: every side must be at least 22 voxels" in message
    assert "takes" not in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("device", ["0", "cuda", "cuda:1"])
def test_no_such_gpu(cohort_csv, modelpath, outpath, refusal, device):
    for message in (
        refusal(train_cv, train_arguments(cohort_csv, outpath, "--device", device)),
        refusal(heatmap, heatmap_arguments(cohort_csv, modelpath, outpath, "--device", device)),
    ):
        assert f"--device {device}" in message
        assert "use --device cpu" in message


@pytest.mark.parametrize("device", ["foo", "cuda:x", "-1", "", "mps", "meta"])
def test_unknown_device(cohort_csv, outpath, refusal, device):
    arguments = train_arguments(cohort_csv, outpath)
    arguments[arguments.index("--device") + 1] = device
    message = refusal(train_cv, arguments)
    assert "--device" in message
    assert device in message


def test_outpath_is_a_file(cohort_csv, modelpath, tmp_path, refusal):
    (tmp_path / "out").write_text("a file")
    for message in (
        refusal(train_cv, train_arguments(cohort_csv, tmp_path / "out")),
        refusal(heatmap, heatmap_arguments(cohort_csv, modelpath, tmp_path / "out")),
    ):
        assert f"--outpath {tmp_path / 'out'} cannot be used as a folder" in message


# A run of other options


@pytest.mark.parametrize(
    ("option", "value", "before"),
    [
        ("--lr", "0.005", "0.001"),
        ("--model", "modelT16", "modelT8"),
        ("--fold", "3", "2"),
        ("--batch", "5", "4"),
        ("--epochs", "3", "2"),
        ("--patience", "3", "10"),
        ("--val-fraction", "0.3", "0.2"),
        ("--seed", "1", "0"),
        ("--precision", "bf16", "fp32"),
        ("--wd", "0.5", "0.0001"),
        ("--delta", "0.5", "0.0"),
    ],
)
def test_outpath_holds_a_run_of_other_options(
    cohort_csv, modelpath, refusal, option, value, before
):  # fmt: skip
    message = refusal(train_cv, train_arguments(cohort_csv, modelpath, option, value))
    assert f"{option} {value} (the run has {before})" in message
    assert message.count("the run has") == 1
    assert "--overwrite" in message


def test_outpath_holds_a_run_of_another_csv(cohort, modelpath, refusal):
    set_row(3, "./scan02.nii.gz,0")(cohort)
    message = refusal(train_cv, train_arguments(cohort / "data.csv", modelpath))
    assert f"--path {cohort / 'data.csv'} (its content has changed)" in message


@pytest.mark.parametrize("content", ["", "{", "[]", '{"arguments": null}'])
def test_run_record_is_damaged(cohort_csv, modelpath, outpath, refusal, content):
    (modelpath / "run.json").write_text(content)
    assert str(modelpath) in refusal(train_cv, train_arguments(cohort_csv, modelpath))
    arguments = heatmap_arguments(cohort_csv, modelpath, outpath)
    assert str(modelpath / "run.json") in refusal(heatmap, arguments)


# Ways to spoil a run's folder


class SideEffect:
    """Unpickled without care, it creates a folder."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def pickle_with_side_effect(folder: Path) -> None:
    """Put a pickle that runs code in place of a checkpoint."""
    content = pickle.dumps({"features.0.weight": SideEffect(folder / "code-ran")})
    (folder / "state_dict_f1.pth").write_bytes(content)


def archive_with_side_effect(folder: Path) -> None:
    """Put a torch archive that runs code in place of a checkpoint."""
    content = {"features.0.weight": SideEffect(folder / "code-ran")}
    torch.save(content, folder / "state_dict_f1.pth")


def checkpoint_of(name: str, volume_shape: tuple[int, int, int] = SHAPE):
    """Return a function that puts another model's weights in place of a checkpoint."""

    def spoil(folder: Path) -> None:
        weights = models.build_model(name, volume_shape).state_dict()
        torch.save(weights, folder / "state_dict_f1.pth")

    return spoil


def set_checkpoint(content: bytes):
    """Return a function that replaces a checkpoint by these bytes."""
    return lambda folder: (folder / "state_dict_f1.pth").write_bytes(content)


def set_record(**values):
    """Return a function that changes run.json."""

    def spoil(folder: Path) -> None:
        run = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps(run | values))

    return spoil


CHECKPOINT = "state_dict_f1.pth"
RUN_CASES = {
    "no-folder": (shutil.rmtree, ["there is no folder --modelpath"]),
    "no-checkpoint": (
        lambda folder: (folder / CHECKPOINT).unlink(), ["there is no checkpoint", CHECKPOINT]
    ),
    "another-width": (checkpoint_of("modelT16"), [CHECKPOINT, "another model", "(16, 1, 3, 3, 3)"]),
    "another-family": (
        checkpoint_of("modelD24", (105, 106, 107)), [CHECKPOINT, "another model"]
    ),
    "another-shape": (
        checkpoint_of("modelT8", (30, 27, 23)), [CHECKPOINT, "volume shape", "classifier.0.weight"]
    ),
    "empty-checkpoint": (set_checkpoint(b""), [CHECKPOINT, "not a checkpoint"]),
    "random-bytes": (
        set_checkpoint(np.random.default_rng(0).bytes(5000)), [CHECKPOINT, "not a checkpoint"]
    ),
    "bytes-like-a-pickle": (set_checkpoint(b"a"), [CHECKPOINT, "not a checkpoint"]),
    "cut-pickle": (set_checkpoint(b"\x80\x02\x8a"), [CHECKPOINT, "not a checkpoint"]),
    "cut-checkpoint": (
        lambda folder: os.truncate(folder / CHECKPOINT, 4000), [CHECKPOINT, "not a checkpoint"]
    ),
    "a-tensor": (
        lambda folder: torch.save(torch.zeros(3), folder / CHECKPOINT),
        [CHECKPOINT, "not a state dict"],
    ),
    "pickle-with-code": (pickle_with_side_effect, [CHECKPOINT, "loaded safely"]),
    "archive-with-code": (archive_with_side_effect, [CHECKPOINT, "loaded safely"]),
    "no-splits": (
        lambda folder: (folder / "splits.csv").unlink(), ["splits.csv", "--subjects all"]
    ),
    "garbage-splits": (
        lambda folder: (folder / "splits.csv").write_bytes(b"\xff\xfe\x00"),
        ["splits.csv is not a table of folds"],
    ),
    "fold-lacks-in-splits": (set_record(n_folds=3), ["splits.csv has no column fold_2"]),
    "another-model-in-record": (set_record(model="modelT16"), ["modelT16", "not modelT8"]),
    "no-folds-in-record": (set_record(n_folds=None), ["run.json", "how many folds"]),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "fragments"), RUN_CASES.values(), ids=RUN_CASES.keys())
def test_spoilt_run(cohort_csv, modelpath, outpath, refusal, spoil, fragments):
    spoil(modelpath)
    message = refusal(heatmap, heatmap_arguments(cohort_csv, modelpath, outpath))
    for fragment in fragments:
        assert fragment in message
    assert not (modelpath / "code-ran").exists()


@pytest.mark.parametrize(
    ("option", "value", "fragment"),
    [
        ("--model", "modelT16", "trained modelT8, not modelT16"),
        ("--fold", "3", "has 2 folds, not 3"),
        ("--fold", "1", "has 2 folds, not 1"),
    ],
)
def test_option_differs_from_the_run(
    cohort_csv, modelpath, outpath, refusal, option, value, fragment
):  # fmt: skip
    arguments = heatmap_arguments(cohort_csv, modelpath, outpath, option, value)
    message = refusal(heatmap, arguments)
    assert str(modelpath / "run.json") in message
    assert fragment in message


@pytest.mark.parametrize(
    ("spoil", "fragment"),
    [
        (set_row(3, "more.nii.gz,0"), "are not in splits.csv, such as 'more.nii.gz'"),
        (set_row(3, ""), "are not in the CSV, such as 'scan02.nii.gz'"),
        (set_row(3, "scan02.nii.gz,1"), "'scan02.nii.gz' has another label"),
    ],
    ids=["another-scan", "a-scan-less", "another-label"],
)
def test_scans_are_not_those_of_the_run(cohort, modelpath, outpath, refusal, spoil, fragment):
    save_scan(cohort / "more.nii.gz", make_volume(99, 0))
    spoil(cohort)
    message = refusal(heatmap, heatmap_arguments(cohort / "data.csv", modelpath, outpath))
    assert fragment in message
    assert str(modelpath / "splits.csv") in message


# Real processes


@pytest.mark.parametrize(
    ("script", "option", "value", "fragment"),
    [
        ("train_cv.py", "--path", "gone.csv", "error: there is no CSV file gone.csv\n"),
        ("heatmap.py", "--modelpath", "gone", "error: there is no folder --modelpath gone\n"),
    ],
)
def test_process(cohort_csv, modelpath, tmp_path, script, option, value, fragment):
    arguments = {
        "train_cv.py": train_arguments(cohort_csv, tmp_path / "out"),
        "heatmap.py": heatmap_arguments(cohort_csv, modelpath, tmp_path / "out"),
    }[script]
    process = subprocess.run(
        [sys.executable, REPOSITORY / script, *arguments, option, value],
        cwd=tmp_path, capture_output=True, encoding="utf-8",
    )  # fmt: skip
    assert process.returncode == 2
    assert process.stderr.endswith(fragment)
    assert "Traceback" not in process.stderr
    assert process.stdout == ""
    assert not (tmp_path / "out").exists()
