"""Several processes through torchrun: the same results as one process, and how they end."""

import os
import re
import signal

import nibabel as nib
import pandas as pd
import pytest
import torch
from conftest import N_SCANS, train_arguments
from processes import finish, heatmap_arguments, significant, torchrun, wait_for

import heatmap
import svm
import train_cv
from utils import InputError


@pytest.fixture
def two_processes(monkeypatch):
    """Make this process think that it is the first of two."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")


# Training


def test_two_processes_train_the_folds_of_one(cohort_csv, run_path, tmp_path):
    """Bit for bit; the metrics are printed once, the second process logs to a file of its own."""
    output, messages = finish(torchrun(2, "train_cv.py", *train_arguments(cohort_csv, tmp_path)))
    assert significant(tmp_path) == significant(run_path)
    assert output.count("pooled_low") == 1
    assert "[rank 0] fold 0 epoch 1/2: " in messages and "[rank 1] fold 1 epoch" not in messages
    assert "[rank 1] INFO fold 1 epoch 1/2: " in (tmp_path / "train_cv.rank1.log").read_text()
    assert not (tmp_path / ".cache").exists()


@pytest.mark.parametrize(
    ("script", "more", "message"),
    [
        (train_cv, ("--only-fold", "1"), "2 processes are more than the 1 folds to train: start 1"),
        (train_cv, ("--device", "0"), "leave --device out under torchrun"),
        (svm, (), "svm.py runs as one process: start it without torchrun"),
    ],
)
def test_what_does_not_go_with_torchrun(two_processes, cohort_csv, tmp_path, script, more, message):
    cohort = ("--path", str(cohort_csv), "--outpath", str(tmp_path / "out"))
    arguments = cohort if script is svm else train_arguments(cohort_csv, tmp_path / "out", *more)
    with pytest.raises(InputError, match=message):
        script.main(script.parse_args(arguments))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_more_processes_than_folds_are_refused_in_one_sentence(cohort_csv, tmp_path):
    with torchrun(3, "train_cv.py", *train_arguments(cohort_csv, tmp_path / "run")) as process:
        output, messages = process.communicate(timeout=120)
    assert "3 processes are more than the 2 folds to train: start 2, or one job" in messages
    assert messages.count("error: ") == 1
    assert re.search(r"Root Cause.*exitcode *: 2 ", messages, re.DOTALL)
    assert output == "" and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_killed_rank_ends_the_job_and_the_same_command_resumes(cohort_csv, tmp_path):
    arguments = train_arguments(cohort_csv, tmp_path, "--epochs", "200", "--patience", "200")
    with torchrun(2, "train_cv.py", *arguments) as process:
        wait_for((tmp_path / "checkpoint_f1.pt").is_file, process)
        owner = (tmp_path / ".locks" / "run_fold_1.owner").read_text()
        os.kill(int(owner.split()[1]), signal.SIGKILL)
        process.communicate(timeout=90)
    assert process.returncode == 1
    content = torch.load(tmp_path / "checkpoint_f1.pt", weights_only=True)
    n_epochs = len(content["draw"]["history"])
    finish(torchrun(2, "train_cv.py", *arguments))
    assert list(pd.read_csv(tmp_path / "history_f1.csv")["epoch"]) == list(range(1, 201))
    assert f"fold 1 epoch {n_epochs + 1}/200" in (tmp_path / "train_cv.rank1.log").read_text()
    assert n_epochs < 200


# Maps


@pytest.mark.parametrize(
    "n_processes", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 9))]
)
def test_processes_share_the_scans(cohort_csv, run_path, tmp_path, n_processes):
    """Eight scans a fold among two, three, or more than there are; each is explained once."""
    alone, shared = tmp_path / "1", tmp_path / "n"
    more = ["--method", "LRP", "SG", "--samples", "3"]
    arguments = heatmap_arguments(cohort_csv, run_path, shared, *more)
    finish(torchrun(n_processes, "heatmap.py", *arguments))
    arguments = heatmap_arguments(cohort_csv, run_path, alone, *more)
    heatmap.main(heatmap.parse_args(list(map(str, arguments))))
    table = pd.read_csv(shared / "LRP_predictions.csv")
    pd.testing.assert_frame_equal(table, pd.read_csv(alone / "LRP_predictions.csv"), rtol=1e-6)
    assert len(table) == N_SCANS and all((shared / name).is_file() for name in table["map"])
    paths = [path.relative_to(alone) for path in alone.rglob("*.nii.gz")]
    assert set(paths) == {path.relative_to(shared) for path in shared.rglob("*.nii.gz")}
    for path in paths:
        expected, found = (nib.load(folder / path).get_fdata() for folder in (alone, shared))
        assert abs(found - expected).max() <= 1e-6 * abs(expected).max(), path
        if path.parent.name == "SG_subjects":  # whose noise is the scan's own
            assert (found == expected).all(), path


@pytest.mark.slow
def test_what_every_process_checks_is_said_once(cohort_csv, tmp_path):
    """Such as a checkpoint that is not there."""
    arguments = heatmap_arguments(cohort_csv, tmp_path, tmp_path / "maps", "--subjects", "all")
    with torchrun(2, "heatmap.py", *arguments) as process:
        _, messages = process.communicate(timeout=120)
    assert messages.count("there is no checkpoint") == messages.count("error: ") == 1
    assert not list(tmp_path.iterdir())
