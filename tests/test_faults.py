"""What goes wrong in days of running: signals, kills, lost scans, full disks, no memory."""

import errno
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import N_SCANS, train_arguments, write_cohort

import attribution
import checkpoints
import explaining
import files
import heatmap
import heatmap_run
import models
import scan_files
import train_cv
import utils
from errors import RunError

ROOT = Path(train_cv.__file__).parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
N_KILLS = 10


def contents(outpath: Path) -> dict[str, bytes]:
    """Return the bytes of what a finished run leaves, but for times."""
    timed = ("run.json", "train_cv.log")
    found = {p.name: p for p in outpath.iterdir() if p.is_file() and p.name not in timed}
    return {
        name: re.sub(rb",[^,]*\n", b"\n", path.read_bytes())  # seconds stand last
        if name.startswith("history") else path.read_bytes()
        for name, path in found.items()
    }  # fmt: skip


def start(script: str, *arguments: object, **options) -> subprocess.Popen:
    """Start a script as a process."""
    command = [sys.executable, ROOT / script, *map(str, arguments)]
    return subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT,
        **options,
    )  # fmt: skip


def wait_for(condition, process: subprocess.Popen, seconds: float = 60) -> None:
    """Wait until something has come true while a process runs."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


def heatmap_arguments(cohort_csv: Path, run_path: Path, outpath: Path, *more: str) -> list[str]:
    return ["--path", str(cohort_csv), "--modelpath", str(run_path), "--model", "modelT8",
            "--outpath", str(outpath), "--method", "LRP", "--device", "cpu", "--workers", "0",
            *more]  # fmt: skip


# Signals


@pytest.mark.parametrize(
    ("number", "status", "more", "advice"),
    [
        (signal.SIGTERM, 143, [], "the same command goes on"),
        (signal.SIGINT, 130, ["--overwrite"], "the same command without --overwrite goes on"),
    ],
)
def test_signals_stop_a_run_that_can_be_continued(
    cohort_csv, tmp_path, number, status, more, advice
):
    """The message says how; the checkpoint of the last whole epoch is there; no traceback."""
    more = ["--epochs", "500", "--patience", "500", *more]
    arguments = train_arguments(cohort_csv, tmp_path, *more)
    with start("train_cv.py", *arguments) as process:
        wait_for((tmp_path / "checkpoint_f0.pt").is_file, process)
        process.send_signal(number)
        _, message = process.communicate(timeout=60)
    assert process.returncode == status
    assert f"stopped by {number.name}" in message and advice in message
    assert "Traceback" not in message
    state = checkpoints.load(tmp_path / "checkpoint_f0.pt")["state"]
    assert [epoch["epoch"] for epoch in state["history"]] == list(
        range(1, len(state["history"]) + 1)
    )
    assert not list(tmp_path.rglob(f"{files.TEMPORARY_PREFIX}*"))


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_the_same(cohort_csv, run_path, tmp_path):
    """SIGKILL, ten times: the same command goes on, and nothing is left behind."""
    chance = random.Random(0)
    arguments = train_arguments(cohort_csv, tmp_path)
    n_killed = 0
    for _ in range(N_KILLS):
        with start("train_cv.py", *arguments) as process:
            time.sleep(chance.uniform(0.5, 7))
            n_killed += process.poll() is None
            process.kill()
        for path in tmp_path.glob("*.csv"):
            assert path.read_bytes().endswith(b"\n")
    with start("train_cv.py", *arguments) as process:
        _, message = process.communicate(timeout=300)
    assert process.returncode == 0, message
    assert n_killed >= N_KILLS // 2
    assert contents(tmp_path) == contents(run_path)
    assert not list(tmp_path.rglob(f"{files.TEMPORARY_PREFIX}*"))


def everything(outpath: Path) -> dict[str, bytes]:
    """Return the bytes of all files below a folder, but for times and locks."""
    return {
        str(path.relative_to(outpath)): path.read_bytes()
        for path in outpath.rglob("*")
        if path.is_file() and not path.name.endswith(("run.json", ".log", ".lock", ".owner"))
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "begun", "number"),
    [
        ("heatmap.py", "IG_subjects/*_f0.nii.gz", signal.SIGKILL),
        ("heatmap.py", "IG_subjects/*_f1.nii.gz", signal.SIGTERM),
        ("svm.py", "predictions_f0.csv", signal.SIGTERM),
    ],
)
def test_maps_that_are_stopped_end_the_same(cohort_csv, run_path, tmp_path, script, begun, number):
    """At the first scan of a fold and, for the SVM, after its first fold."""

    def arguments(name: str) -> list[str]:
        if script == "svm.py":
            return ["--path", str(cohort_csv), "--modelpath", str(run_path), "--workers", "0",
                    "--outpath", str(tmp_path / name)]  # fmt: skip
        found = heatmap_arguments(cohort_csv, run_path, tmp_path / name, "--save-subjects")
        found[found.index("LRP")] = "IG"  # whose scans take long enough
        return [*found, "--steps", "60"]

    with start(script, *arguments("stopped")) as process:
        wait_for(lambda: any((tmp_path / "stopped").glob(begun)), process)
        process.send_signal(number)
        _, message = process.communicate(timeout=60)
    assert process.returncode == (143 if number == signal.SIGTERM else -number)
    assert "Traceback" not in message
    assert not list((tmp_path / "stopped").glob("*_all.html"))
    for name in ("stopped", "whole"):
        with start(script, *arguments(name)) as process:
            _, message = process.communicate(timeout=120)
        assert process.returncode == 0, message
    assert everything(tmp_path / "stopped") == everything(tmp_path / "whole")


@pytest.mark.slow
def test_a_second_process_is_told_of_the_first(cohort_csv, tmp_path):
    arguments = train_arguments(cohort_csv, tmp_path, "--epochs", "500", "--patience", "500")
    with start("train_cv.py", *arguments) as first:
        wait_for((tmp_path / "checkpoint_f0.pt").is_file, first)
        with start("train_cv.py", *arguments) as second:
            _, message = second.communicate(timeout=60)
        assert second.returncode == 2
        assert f"process {first.pid} on host {os.uname().nodename} is at work" in message
        first.kill()
    with start("train_cv.py", *arguments) as third:  # takes over at once
        n_epochs = (tmp_path / "train_cv.log").read_text().count("epoch")
        wait_for(lambda: (tmp_path / "train_cv.log").read_text().count("epoch") > n_epochs, third)
        third.kill()


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
def test_a_disk_that_fills_damages_nothing(cohort_csv, run_path, small_disk):
    """The message says how much is needed; with more space the same command ends the same."""
    arguments = train_arguments(cohort_csv, small_disk / "run", "--no-cache")
    with start("train_cv.py", *arguments, "--epochs", "500", "--patience", "500") as process:
        wait_for((small_disk / "run" / "checkpoint_f0.pt").is_file, process)
        process.terminate()
    ballast = small_disk / "ballast"
    before = checkpoints.load(small_disk / "run" / "checkpoint_f0.pt")
    with ballast.open("wb", buffering=0) as file, pytest.raises(OSError, match="space"):
        while True:
            file.write(bytes(4096))
    with start("train_cv.py", *arguments, "--epochs", "500", "--patience", "500") as process:
        _, message = process.communicate(timeout=60)
    assert process.returncode == 1
    assert re.search(r"the disk is full: up to [\d.]+ MB are needed, [\d.]+ MB are free", message)
    assert "Traceback" not in message
    after = checkpoints.load(small_disk / "run" / "checkpoint_f0.pt")
    assert len(after["state"]["history"]) >= len(before["state"]["history"])
    ballast.unlink()
    with start(
        "train_cv.py", *train_arguments(cohort_csv, small_disk / "other", "--no-cache")
    ) as p:
        _, message = p.communicate(timeout=120)
    assert p.returncode == 0, message
    assert contents(small_disk / "other") == contents(run_path)


def test_a_full_disk_is_said(tmp_path, monkeypatch):
    """What stood there before stays, whole."""
    path = tmp_path / "table.csv"
    path.write_text("before")

    def full(self, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    expected = r"table.csv cannot be written, the disk is full: up to 5\.0 MB are needed"
    with pytest.raises(RunError, match=expected):
        files.write_bytes(path, bytes(5_000_000))
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["table.csv"]


@pytest.fixture
def closed_folder(tmp_path):
    """Return a folder that this user may not write in: for root one on a read-only disk."""
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o555)
    if os.getuid():
        yield folder
        return
    mounting = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mounting, capture_output=True).returncode:
        pytest.skip("root may write everywhere, and mounting a read-only disk is not allowed")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("below", ["", "new/folder"])
@pytest.mark.parametrize("script", ["train_cv.py", "heatmap.py"])
def test_a_folder_without_write_permission(cohort_csv, run_path, closed_folder, script, below):
    outpath = closed_folder / below
    arguments = {
        "train_cv.py": train_arguments(cohort_csv, outpath),
        "heatmap.py": heatmap_arguments(cohort_csv, run_path, outpath),
    }[script]
    with start(script, *arguments) as process:
        output, message = process.communicate(timeout=120)
    assert process.returncode == 2, message
    assert f"error: --outpath {outpath} cannot be used as a folder: " in message
    assert "Traceback" not in message and output == ""
    assert not list(closed_folder.iterdir())


# Scans and their readers


@pytest.mark.parametrize("n_workers", ["0", "2"])
def test_a_scan_that_disappears_is_named_and_the_rest_kept(
    tmp_path, capsys, monkeypatch, n_workers
):
    """In one sentence, without the traceback of the process that read it; the rest is kept."""
    csv_path = write_cohort(tmp_path / "cohort")
    arguments = train_arguments(csv_path, tmp_path / "run", "--no-cache", "--workers", n_workers)
    args = train_cv.parse_args(arguments)
    log_epoch = train_cv.log_epoch

    def lose_a_scan(fold, *rest):
        log_epoch(fold, *rest)
        if fold == 1:
            (csv_path.parent / "scan05.nii.gz").unlink(missing_ok=True)

    monkeypatch.setattr(train_cv, "log_epoch", lose_a_scan)
    assert utils.run_script(train_cv.main, args) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: ") and "scan05.nii.gz cannot be read: " in message
    assert (tmp_path / "run" / "predictions_f0.csv").is_file()
    assert (tmp_path / "run" / "checkpoint_f1.pt").is_file()


def test_a_reading_process_that_is_killed(cohort_csv, tmp_path, capsys, monkeypatch):
    main_process, load_volume = os.getpid(), scan_files.load_volume

    def die(file):
        if os.getpid() != main_process and file.endswith("scan07.nii.gz"):
            os.kill(os.getpid(), signal.SIGKILL)
        return load_volume(file)

    monkeypatch.setattr(scan_files, "load_volume", die)
    arguments = train_arguments(cohort_csv, tmp_path, "--no-cache", "--workers", "1")
    assert utils.run_script(train_cv.main, train_cv.parse_args(arguments)) == 1
    assert "error: a process that reads scans was killed" in capsys.readouterr().err


# Memory


def test_training_without_memory_names_the_batch(cohort_csv, tmp_path, capsys, monkeypatch):
    def no_memory(self, volumes):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(models.CNN3D, "forward", no_memory)
    assert utils.run_script(
        train_cv.main, train_cv.parse_args(train_arguments(cohort_csv, tmp_path))
    ) == 1  # fmt: skip
    assert "out of memory in fold 0: use less than --batch 4 (CUDA" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["LRP", "IG"])
def test_heatmaps_halve_their_batch(cohort_csv, run_path, tmp_path, monkeypatch, caplog, method):
    """Down to what fits; the maps are those of small batches."""
    monkeypatch.setattr(heatmap_run, "draw_map", lambda *_: [])
    more = ["--steps", "8", "--batch"]
    arguments = heatmap_arguments(cohort_csv, run_path, tmp_path / "small", *more, "2")
    arguments[arguments.index("LRP")] = method
    heatmap.main(heatmap.parse_args(arguments))
    forward, largest = torch.nn.Conv3d.forward, []

    def limited(layer, values):
        if len(values) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        largest.append(len(values))
        return forward(layer, values)

    monkeypatch.setattr(torch.nn.Conv3d, "forward", limited)
    arguments = heatmap_arguments(cohort_csv, run_path, tmp_path / "large", *more, "8")
    arguments[arguments.index("LRP")] = method
    heatmap.main(heatmap.parse_args(arguments))
    assert max(largest) == 2
    for work in ("forward pass", method):
        assert f"{work}: out of memory, 4 at once from here on" in caplog.text
    name = f"{method}_map_all.nii.gz"
    found = [scan_files.nib.load(tmp_path / f / name).get_fdata() for f in ("small", "large")]
    assert np.abs(found[0] - found[1]).max() <= 1e-5 * np.abs(found[0]).max()


def test_a_single_pass_that_does_not_fit(monkeypatch):
    """Real lack of memory: torch's own message for an allocation that no machine has."""
    monkeypatch.setitem(
        attribution.METHODS, "LRP", lambda model, volumes, targets, **_: torch.empty(2**50)
    )
    explainer = explaining.Explainer(torch.nn.Identity(), {"LRP": {}}, {"LRP": 2})
    volumes, targets = torch.zeros(2, 1, 3, 3, 3), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(RunError, match=r"LRP of a or b: memory does not suffice"):
        explainer.maps("LRP", volumes, targets, ["a", "b"])
    assert explainer.n_at_once == {"LRP": 1}


def test_a_fault_of_the_background_writer_stops_the_run(tmp_path):
    def fail():
        raise RunError("the disk is full")

    with pytest.raises(RunError, match="full"), files.Background() as writer:
        writer.submit(fail)
    assert N_SCANS > files.MAX_WAITING  # so that a fault shows before a fold ends
