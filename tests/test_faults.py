"""What goes wrong in days of running: kills, signals, two writers, lost scans, full disks."""

import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import nibabel as nib
import pytest
import torch
from conftest import N_FOLDS, N_SCANS, exit_status, train_arguments, write_cohort
from processes import finish, heatmap_arguments, significant, start, wait_for

import train_cv
from run_folder import checkpoints
from utils import InputError

LONG = ("--epochs", "500", "--patience", "500")  # for longer than any test lasts


def epochs_of(outpath: Path, fold: int = 0) -> list[int]:
    """Return the epochs that a fold's checkpoint tells of."""
    path = checkpoints.checkpoint_path(outpath, fold)
    content = torch.load(path, map_location="cpu", weights_only=True)
    return [epoch["epoch"] for epoch in content["draw"]["history"]]


# Kills and signals


@pytest.mark.parametrize("n_kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_training_killed_at_random_moments_ends_the_same(cohort_csv, run_path, tmp_path, n_kills):
    """SIGKILL while it decodes, trains or puts together; at the end nothing is left behind."""
    chance = random.Random(n_kills)
    log_path = tmp_path / "train_cv.log"

    def n_starts() -> int:
        return log_path.read_text().count("folds to train") if log_path.is_file() else 0

    n_killed = 0
    for _ in range(n_kills):
        before = n_starts()
        with start("train_cv.py", *train_arguments(cohort_csv, tmp_path)) as process:
            wait_for(lambda before=before: n_starts() > before, process)
            time.sleep(chance.uniform(0, 1))
            n_killed += process.poll() is None
            process.kill()
        for path in tmp_path.glob("*.csv"):
            assert path.read_bytes().endswith(b"\n")
    finish(start("train_cv.py", *train_arguments(cohort_csv, tmp_path)))
    assert n_killed >= n_kills // 2
    assert significant(tmp_path) == significant(run_path)
    assert not list(tmp_path.glob(".tmp-*")) and not (tmp_path / ".cache").exists()


def test_sigterm_stops_a_run_that_the_same_command_resumes(cohort_csv, tmp_path):
    """The message says so; the checkpoint of the last whole epoch is there; no traceback."""
    with start("train_cv.py", *train_arguments(cohort_csv, tmp_path, *LONG)) as process:
        wait_for((tmp_path / "checkpoint_f0.pt").is_file, process)
        process.terminate()
        _, message = process.communicate(timeout=60)
    assert process.returncode == 143 and "Traceback" not in message
    assert "stopped by SIGTERM. Every whole epoch is kept; the same command resumes." in message
    assert epochs_of(tmp_path) == list(range(1, len(epochs_of(tmp_path)) + 1))
    assert not list(tmp_path.glob(".tmp-*"))


@pytest.mark.slow
def test_heatmaps_that_are_killed_end_the_same(cohort_csv, run_path, tmp_path):
    """At the first scan of the second fold; the scans' own maps are kept."""

    def arguments(name: str) -> list[object]:
        more = ("--method", "IG", "--steps", "60")  # whose scans take long enough
        return heatmap_arguments(cohort_csv, run_path, tmp_path / name, *more)

    with start("heatmap.py", *arguments("stopped")) as process:
        wait_for(lambda: any((tmp_path / "stopped").glob("IG_subjects/*_f1.nii.gz")), process)
        process.kill()
    assert not list((tmp_path / "stopped").glob("*_all.*"))
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "stopped" / "IG_subjects").glob("0*")}
    for name in ("stopped", "whole"):
        finish(start("heatmap.py", *arguments(name)))
    assert kept and all(path.stat().st_mtime_ns == then for path, then in kept.items())
    assert significant(tmp_path / "stopped") == significant(tmp_path / "whole")


# Two writers


def test_a_second_process_is_told_of_the_first(cohort_csv, tmp_path):
    """The same command, and one that would start anew; the first goes on, until SIGINT."""
    arguments = train_arguments(cohort_csv, tmp_path, *LONG)
    with start("train_cv.py", *arguments, "--overwrite") as first:
        wait_for((tmp_path / "checkpoint_f0.pt").is_file, first)
        record = (tmp_path / "run.json").read_bytes()
        others = [start("train_cv.py", *arguments, *more) for more in ([], ["--overwrite"])]
        for other in others:
            _, message = other.communicate(timeout=120)
            assert other.returncode == 2
            owner = f"process {first.pid} on host {os.uname().nodename}"
            assert f"error: {owner} works on {tmp_path} (run_fold_0)" in message
        assert (tmp_path / "run.json").read_bytes() == record
        n_epochs = len(epochs_of(tmp_path))
        wait_for(lambda: len(epochs_of(tmp_path)) > n_epochs, first)
        first.send_signal(signal.SIGINT)
        _, message = first.communicate(timeout=60)
    assert first.returncode == 130
    assert "stopped by SIGINT." in message
    assert "the same command without --overwrite resumes." in message


def test_a_job_array_on_one_folder_and_one_cache(cohort_csv, tmp_path):
    """Each fold by a process, which start together: the same files as of one process."""
    args = train_arguments(cohort_csv, tmp_path / "one")
    train_cv.main(train_cv.parse_args(args))
    arguments = train_arguments(cohort_csv, tmp_path / "two")
    arguments += ["--cache-dir", tmp_path / "cache"]
    tasks = [start("train_cv.py", *arguments, "--only-fold", fold) for fold in range(N_FOLDS)]
    finish(*tasks)
    assert significant(tmp_path / "two") == significant(tmp_path / "one")
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".npy", ".json"}
    assert len(list((tmp_path / "cache").glob("*.npy"))) == N_SCANS
    logs = {path.name for path in (tmp_path / "two").glob("*.log")}
    assert logs == {f"train_cv_f{fold}.log" for fold in range(N_FOLDS)}


@pytest.mark.slow
def test_three_methods_on_one_folder_at_once(cohort_csv, run_path, tmp_path):
    """They share the mean scan; the same files as of one process with all three."""

    def arguments(name: str, *methods: str) -> list[object]:
        more = ("--steps", "4", "--method", *methods)
        return heatmap_arguments(cohort_csv, run_path, tmp_path / name, *more)

    methods = ("LRP", "IG", "GGC")
    finish(*[start("heatmap.py", *arguments("three", method)) for method in methods])
    finish(start("heatmap.py", *arguments("one", *methods)))
    assert significant(tmp_path / "three") == significant(tmp_path / "one")


# Scans


def test_a_run_resumes_on_a_copy_of_its_scans(cohort_csv, run_path, modelpath, tmp_path):
    """Elsewhere, with other times: what counts is their sizes and the CSV's content."""
    folder = Path(shutil.copytree(cohort_csv.parent, tmp_path / "copy"))
    for path in folder.iterdir():
        os.utime(path, (2e9, 2e9))  # a copy has times of its own
    for path in [*modelpath.glob("*_f1.*"), modelpath / "metrics.csv"]:
        path.unlink()
    (modelpath / "checkpoint_f0.pt").write_bytes(b"left by a process killed just before it goes")
    train_cv.main(train_cv.parse_args(train_arguments(folder / "data.csv", modelpath)))
    assert significant(modelpath) == significant(run_path)
    (folder / "scan03.nii.gz").write_bytes((folder / "scan03.nii.gz").read_bytes() + bytes(4))
    with pytest.raises(InputError, match=r"scan_sizes_sha256 \w{12} \(the run has \w{12}\)"):
        train_cv.main(train_cv.parse_args(train_arguments(folder / "data.csv", modelpath)))


@pytest.mark.parametrize("n_workers", ["0", "2"])
def test_a_scan_that_disappears_is_named_and_the_rest_kept(
    tmp_path, capsys, monkeypatch, n_workers
):
    """In one sentence, at the first epoch that lacks it."""
    csv_path, outpath = write_cohort(tmp_path / "cohort"), tmp_path / "run"
    scan_path, load = csv_path.parent / "scan05.nii.gz", nib.load

    def lose_a_scan(path, *rest, **options):
        if (outpath / "predictions_f0.csv").is_file() and Path(path) == scan_path:
            scan_path.unlink(missing_ok=True)
        return load(path, *rest, **options)

    arguments = train_arguments(csv_path, outpath, "--no-cache", "--workers", n_workers)
    monkeypatch.setattr(nib, "load", lose_a_scan)
    assert exit_status(train_cv, arguments) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(f"error: a scan cannot be read: {scan_path}")
    assert (outpath / "state_dict_f0.pth").is_file() and not list(outpath.glob("*_f1.*"))


# Disks


@pytest.fixture
def small_disk(tmp_path):
    """Mount a file system of 3 MB, where that is allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mounting, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_a_disk_that_fills_damages_nothing(cohort_csv, small_disk):
    """The message says how much is needed; with more space the same command resumes."""
    outpath, more = small_disk / "run", ("--no-cache", *LONG)
    with start("train_cv.py", *train_arguments(cohort_csv, outpath, *more)) as process:
        wait_for((outpath / "checkpoint_f0.pt").is_file, process)
        process.terminate()
    ballast, before = small_disk / "ballast", epochs_of(outpath)
    with ballast.open("wb", buffering=0) as file, pytest.raises(OSError, match="space"):
        while True:
            file.write(bytes(4096))
    with start("train_cv.py", *train_arguments(cohort_csv, outpath, *more)) as process:
        _, message = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in message
    assert re.search(r"the disk is full: up to [\d.]+ MB are needed, [\d.]+ MB are free", message)
    assert len(epochs_of(outpath)) >= len(before)
    assert not list(outpath.glob(".tmp-*"))
    ballast.unlink()
    with start("train_cv.py", *train_arguments(cohort_csv, outpath, *more)) as process:
        n_epochs = len(epochs_of(outpath))
        wait_for(lambda: len(epochs_of(outpath)) > n_epochs, process)
        process.kill()
