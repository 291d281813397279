"""A tiny cohort and a tiny run that all tests share, and how tests start scripts on them."""

import gc
import re
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch

import heatmap
import train_cv
from run_folder.processes import run_script

torch.set_num_threads(1)  # tiny volumes: a second thread costs more than it gives

SHAPE = (24, 27, 23)  # three different sides: equal ones hide swapped axes
AFFINE = np.array(
    [[-2.0, 0, 0, 30], [0, 2.5, 0, -40], [0, 0, 1.5, -20], [0, 0, 0, 1]]
)  # left-handed and anisotropic, as scans can be
N_SCANS = 16
N_FOLDS = 2


def make_volume(seed: int, label: int, shape: tuple = SHAPE) -> np.ndarray:
    """Return a noisy ball on zero background; label 1 has a dark hole."""
    rng = np.random.default_rng(seed)
    grid = np.indices(shape).reshape(3, -1).T / np.array(shape) - 0.5
    data = (np.linalg.norm(grid, axis=1) < 0.45).reshape(shape) * (1 + 0.1 * rng.random(shape))
    if label:
        data[6:12, 14:20, 8:14] *= 0.4
    return data.astype(np.float32)


def save_scan(path: Path, data: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    """Write a NIfTI scan in MNI space."""
    img = nib.Nifti1Image(data, affine)
    img.set_sform(affine, 4)
    img.set_qform(affine, 2)
    img.header.set_xyzt_units("mm")
    nib.save(img, path)
    return path


def write_cohort(folder: Path, n_scans: int = N_SCANS, columns: tuple = ("path", "label")) -> Path:
    """Write scans with alternating labels and their data.csv; return the CSV's path."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(n_scans):
        name = f"scan{index:02d}.nii.gz"
        save_scan(folder / name, make_volume(index, index % 2))
        rows.append({"path": name, "label": index % 2, "subject": f"s{index // 2 % 5}_{index % 2}"})
    csv_path = folder / "data.csv"
    pd.DataFrame(rows)[list(columns)].to_csv(csv_path, index=False, header=False)
    return csv_path


def train_arguments(csv_path: Path, outpath: Path, *more: str) -> list[str]:
    """Return the arguments of a training run of seconds."""
    return [
        "--path", str(csv_path), "--outpath", str(outpath), "--model", "modelT8", "--device", "cpu",
        "--fold", str(N_FOLDS), "--epochs", "2", "--batch", "4", "--lr", "1e-3", "--workers", "0",
        *more,
    ]  # fmt: skip


def explain_arguments(csv_path: Path, modelpath: Path, outpath: Path, *more: str) -> list[str]:
    """Return the arguments of heatmaps of a run, by the cheapest method unless told."""
    return [
        "--path", str(csv_path), "--modelpath", str(modelpath), "--outpath", str(outpath),
        "--model", "modelT8", "--method", "GGC", "--steps", "3", "--device", "cpu",
        "--workers", "0", *more,
    ]  # fmt: skip


def explain(*arguments) -> None:
    """Run heatmap.py; the arguments are those of `explain_arguments`."""
    heatmap.main(heatmap.parse_args(explain_arguments(*arguments)))


def exit_status(script, arguments: list) -> int:
    """Run a script in this process and return its exit status."""
    try:
        args = script.parse_args(list(map(str, arguments)))
    except SystemExit as stop:  # argparse
        return stop.code
    return run_script(script.main, args)


def contents_below(folder: Path) -> dict[str, bytes | None]:
    """Return every path below a folder with its bytes, None for a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def stop_at_call(n: int, function):
    """Return a function that stands in for another and raises at its n-th call."""
    n_calls = 0

    def stand_in(*args, **kwargs):
        nonlocal n_calls
        n_calls += 1
        if n_calls == n:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    return stand_in


@pytest.fixture(scope="session")
def cohort_csv(tmp_path_factory) -> Path:
    """Return the data.csv of the tiny cohort; tests must not change it or its scans."""
    return write_cohort(tmp_path_factory.mktemp("cohort"))


@pytest.fixture(scope="session")
def run_path(cohort_csv, tmp_path_factory) -> Path:
    """Return the folder of a finished run on the tiny cohort; tests must not change it."""
    outpath = tmp_path_factory.mktemp("run")
    train_cv.main(train_cv.parse_args(train_arguments(cohort_csv, outpath)))
    gc.freeze()  # nilearn collects garbage 14 times a picture, which takes most of its time
    return outpath


@pytest.fixture
def folder(tmp_path) -> Path:
    """Return a folder with four scans, labels 0 1 0 1, that a test may spoil."""
    return write_cohort(tmp_path / "cohort", 4).parent


@pytest.fixture
def modelpath(run_path, tmp_path) -> Path:
    """Return a copy of the run's folder that a test may spoil."""
    return Path(shutil.copytree(run_path, tmp_path / "run"))


@pytest.fixture
def refusal(tmp_path, capsys):
    """Return a function that runs a script on input at fault and returns its message.

    It must be one sentence, with exit status 2, and nothing may be written below tmp_path.
    """

    def run(script, arguments: list) -> str:
        before = contents_below(tmp_path)
        status = exit_status(script, arguments)
        output = capsys.readouterr()
        assert status == 2, output.err
        assert len(re.findall(r"^(\S+: )?error: ", output.err, re.MULTILINE)) == 1
        assert output.out == ""
        assert "Traceback" not in output.err and len(output.err) < 20_000
        assert contents_below(tmp_path) == before
        return output.err

    return run
