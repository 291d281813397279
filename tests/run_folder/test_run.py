"""The rules of a run's folder: begun or resumed, refused or replaced, one process a fold."""

import errno
import fcntl
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from filelock import FileLock, Timeout

from run_folder import files
from run_folder.run import LOCK_FOLDER, RunFolder, locked, new_record
from utils import InputError

COMPARED = ("lr", "val_fraction", "csv_sha256", "modelpath_sha256")
RESULTS = ("predictions_f*.csv", "predictions.csv", "state_dict_f*.pth", "splits.csv")
OPTIONS = {"lr": 0.1, "val_fraction": 0.2}
WEIGHTS = {"state_dict_f0.pth": "a1", "state_dict_f1.pth": "b2"}
SPLITS = pd.DataFrame({"path": ["a.nii", "b.nii"], "fold_0": ["test", "train"]})
HOLD = """
import sys, time
from filelock import FileLock
lock = FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
time.sleep(60)
"""


def make_run(path: Path, name: str = "run", script: str = "train_cv.py", **facts) -> RunFolder:
    """Return a run of two folds; `facts` are entries of its record, or of its arguments."""
    arguments = {"outpath": path, **OPTIONS, **{k: facts.pop(k) for k in OPTIONS if k in facts}}
    facts = {"n_folds": 2, "csv_sha256": 64 * "c", "modelpath_sha256": WEIGHTS, **facts}
    record = new_record(script, arguments, **facts)
    return RunFolder(path, name, record, COMPARED, RESULTS, ("mean_scan*.nii.gz",))


def write_fold(path: Path, *folds: int) -> None:
    """Write what says that folds are finished, and their weights."""
    for fold in folds:
        (path / f"predictions_f{fold}.csv").write_text("path\n")
        (path / f"state_dict_f{fold}.pth").write_bytes(b"weights")


def contents(path: Path) -> dict[str, bytes]:
    """Return every file's bytes, but for locks."""
    found = (p for p in path.rglob("*") if p.is_file() and p.parent.name != LOCK_FOLDER)
    return {str(p.relative_to(path)): p.read_bytes() for p in found}


# Begin, or resume


def test_new_record_equals_what_is_read_from_its_file(tmp_path):
    record = new_record(
        "x.py", {"outpath": tmp_path, "sides": (1, 2)}, affine=np.eye(2).tolist(), map={1: "ü"}
    )
    assert record["arguments"] == {"outpath": str(tmp_path), "sides": [1, 2]}
    assert record["end"] is None and record["versions"]["torch"]
    files.write_json(tmp_path / "run.json", record)
    assert files.read_json(tmp_path / "run.json") == record
    assert new_record("x.py", {})["run_id"] != new_record("x.py", {})["run_id"]


def test_run_from_its_start_to_its_end(tmp_path, caplog):
    caplog.set_level(logging.INFO, "heatmaps")
    run = make_run(tmp_path / "new" / "out")
    assert not run.check(overwrite=False) and not (tmp_path / "new").exists()
    assert run.start(tables={"splits.csv": SPLITS}) is run
    assert files.read_json(run.path / "run.json") == run.record and run.check(overwrite=False)
    assert (run.path / "splits.csv").read_text() == "path,fold_0\na.nii,test\nb.nii,train\n"
    assert run.unfinished([0, 1]) == [0, 1]
    for fold, is_last in ((1, False), (0, True)):
        with run.hold(fold) as is_unfinished:
            assert is_unfinished
            write_fold(run.path, fold)
        with run.hold(fold) as is_unfinished:
            assert not is_unfinished
        with suppress(KeyError), run.finish() as is_complete:
            assert is_complete == is_last
            if is_complete:
                raise KeyError  # an error while folds are put together
        assert files.read_json(run.path / "run.json")["end"] is None
    with run.finish() as is_complete:
        assert is_complete
    assert "run: folds [0] are still to be done" in caplog.text
    record = files.read_json(run.path / "run.json")
    assert record["end"] >= record["start"] and record | {"end": None} == run.record


def test_resuming_takes_the_record_and_the_tables_that_stand_there(tmp_path):
    first = make_run(tmp_path).start(tables={"splits.csv": SPLITS})
    write_fold(tmp_path, 0)
    before = contents(tmp_path)
    second = make_run(tmp_path, outpath=Path("elsewhere")).start(tables={"splits.csv": SPLITS[:1]})
    assert second.record == first.record and contents(tmp_path) == before
    assert second.unfinished([0, 1]) == [1]


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"lr": 1.0, "val_fraction": 0.5},
         r"--lr 1.0 \(the run has 0.1\); --val-fraction 0.5 \(the run has 0.2\)\. Choose another "
         "--outpath, or start anew with --overwrite"),
        ({"csv_sha256": 64 * "d"}, r"csv_sha256 d{12} \(the run has c{12}\)"),
        ({"modelpath_sha256": WEIGHTS | {"state_dict_f1.pth": "x"}},
         r"modelpath: other content of state_dict_f1.pth\."),
        ({"modelpath_sha256": {"state_dict_f0.pth": "a1"}},
         r"modelpath: other content of state_dict_f1.pth\."),
    ],
    ids=["options", "csv", "weights", "fewer-weights"],
)  # fmt: skip
def test_another_run_is_refused_naming_each_difference(tmp_path, facts, message):
    make_run(tmp_path).start()
    before = contents(tmp_path)
    other = make_run(tmp_path, **facts)
    for refused in (lambda: other.check(overwrite=False), other.start):
        with pytest.raises(InputError, match=f"holds a run with other options: {message}"):
            refused()
    assert contents(tmp_path) == before
    assert other.start(overwrite=True).record == files.read_json(tmp_path / "run.json")


OWN_FILES = ("notes.txt", "predictions_f0.csv.bak", "my_splits.csv", "weights.pth", "x/splits.csv")


def test_results_without_a_record_are_replaced_only_with_overwrite(tmp_path):
    """As published weights are; and nothing else goes."""
    (tmp_path / "x").mkdir()
    write_fold(tmp_path, 0)
    for name in OWN_FILES:
        (tmp_path / name).write_text("mine")
    before, run = contents(tmp_path), make_run(tmp_path)
    message = (
        r"and no run\.json of the run that made .*: predictions_f0.csv, state_dict_f0.pth\. Ch"
    )
    for refused in (lambda: run.check(overwrite=False), run.start):
        with pytest.raises(InputError, match=message):
            refused()
    assert contents(tmp_path) == before
    run.start(overwrite=True)
    assert contents(tmp_path).keys() == {"run.json", *OWN_FILES}
    assert all((tmp_path / name).read_text() == "mine" for name in OWN_FILES)


def test_shared_files_belong_to_every_run_of_the_folder(tmp_path):
    """They are refused where no run tells of them, and never removed where one does."""
    (tmp_path / "mean_scan.nii.gz").write_bytes(b"mean")
    with pytest.raises(InputError, match=r"no LRP_run\.json .*: mean_scan\.nii\.gz\. Choose"):
        make_run(tmp_path, "LRP").start()
    make_run(tmp_path, "LRP").start(overwrite=True)
    make_run(tmp_path, "IG").start()
    make_run(tmp_path, "LRP", lr=1.0).start(overwrite=True)
    assert contents(tmp_path).keys() == {"mean_scan.nii.gz", "LRP_run.json", "IG_run.json"}


def test_the_run_of_another_script_is_refused_even_with_overwrite(tmp_path):
    make_run(tmp_path).start()
    before = contents(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(InputError, match=r"holds a run of train_cv\.py: choose another --out"):
            make_run(tmp_path, script="svm.py").start(overwrite)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "content",
    ["", "{", "[1]", "null", '"text"', "[" * 100_000, "\0", '{"script": "train_cv.py"}',
     '{"script": "train_cv.py", "arguments": []}'],
)  # fmt: skip
def test_a_damaged_record_is_refused(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(InputError, match=r"run\.json"):
        make_run(tmp_path).start()
    assert contents(tmp_path) == {"run.json": content.encode()}


@pytest.mark.parametrize(("n_replaced", "expected"), [(0, set()), (1, {"splits.csv"})])
def test_a_start_that_fails_leaves_no_record(tmp_path, monkeypatch, n_replaced, expected):
    """Tables come first, the record last; the old run's record goes before its results."""
    make_run(tmp_path, n_folds=3).start(tables={"splits.csv": SPLITS})
    write_fold(tmp_path, 0, 2)
    renamed, rename = [], Path.replace

    def stop(path, target):
        if len(renamed) == n_replaced:
            raise KeyboardInterrupt
        renamed.append(target.name)
        return rename(path, target)

    run = make_run(tmp_path, lr=1.0)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "replace", stop)
        run.start(overwrite=True, tables={"splits.csv": SPLITS})
    assert contents(tmp_path).keys() == set(renamed) == expected
    run.start(overwrite=True, tables={"splits.csv": SPLITS})
    assert files.read_json(tmp_path / "run.json") == run.record


def test_results_that_are_half_removed_are_no_run(tmp_path, monkeypatch):
    """The record goes first, then what says that folds are finished, then the rest."""
    run = make_run(tmp_path).start(tables={"splits.csv": SPLITS})
    write_fold(tmp_path, 0, 1)
    removed, unlink = [], Path.unlink

    def stop(path, missing_ok=False):
        if path.suffix == ".pth":
            raise KeyboardInterrupt
        removed.append(path.name)
        unlink(path, missing_ok)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "unlink", stop)
        run.start(overwrite=True)
    assert removed == ["run.json", "predictions_f0.csv", "predictions_f1.csv"]
    with pytest.raises(InputError, match=r"no run\.json .*: state_dict_f0\.pth, state_dict_f1"):
        run.check(overwrite=False)


# Who may work in it


@pytest.mark.parametrize("work", ["fold_1", "fold_7", "finish"])
def test_overwrite_is_refused_while_another_process_works(tmp_path, work):
    """On any fold, also one that the new run has not, or on putting them together."""
    make_run(tmp_path).start(tables={"splits.csv": SPLITS})
    write_fold(tmp_path, 0)
    before = contents(tmp_path)
    with (
        locked(tmp_path, f"run_{work}"),
        pytest.raises(InputError, match=rf"process {os.getpid()} on host .* \(run_{work}\)"),
    ):
        make_run(tmp_path, lr=1.0).start(overwrite=True)
    assert contents(tmp_path) == before
    make_run(tmp_path, lr=1.0).start(overwrite=True)


def test_a_fold_is_held_by_one_process(tmp_path):
    """And the other folds, and other runs of the folder, are free."""
    run, other = make_run(tmp_path, "LRP").start(), make_run(tmp_path, "IG").start()
    host = os.uname().nodename
    with run.hold(0):
        with (
            pytest.raises(InputError, match=rf"^process {os.getpid()} on host {host} works on "),
            run.hold(0),
        ):
            pass
        with run.hold(1) as is_unfinished, other.hold(0):
            assert is_unfinished
    with run.hold(0):
        pass


def test_a_run_that_was_started_anew_stops_the_first_process(tmp_path):
    """It writes no fold into the new run, and no end into its record."""
    first = make_run(tmp_path).start()
    second = make_run(tmp_path).start(overwrite=True)
    with pytest.raises(InputError, match="another process has started the run in"), first.hold(0):
        write_fold(tmp_path, 0)
    assert second.unfinished([0, 1]) == [0, 1]
    write_fold(tmp_path, 0, 1)
    with pytest.raises(InputError, match="another process has started the run in"), first.finish():
        pass
    assert files.read_json(tmp_path / "run.json") == second.record
    (tmp_path / "run.json").unlink()
    with pytest.raises(InputError, match="another process has started"), second.hold(0):
        pass


# Locks


@pytest.fixture
def holder(tmp_path):
    """Start another process that holds the lock of fold 3."""
    (tmp_path / LOCK_FOLDER).mkdir()
    lock_path = tmp_path / LOCK_FOLDER / "fold_3.lock"
    lock_path.with_suffix(".owner").write_text("process 7 on host elsewhere")
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, lock_path], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout.readline() == "held\n"
        yield child
        child.kill()


def test_a_lock_names_the_process_that_holds_it(tmp_path, holder):
    with (
        pytest.raises(InputError, match=r"^process 7 on host elsewhere works on .*\(fold_3\);"),
        locked(tmp_path, "fold_3"),
    ):
        pass
    (tmp_path / LOCK_FOLDER / "fold_3.owner").unlink()  # killed before it has said its name
    with pytest.raises(InputError, match=r"^another process works on"), locked(tmp_path, "fold_3"):
        pass


def test_the_lock_of_a_killed_process_is_free(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with locked(tmp_path, "fold_3"):
        owner = (tmp_path / LOCK_FOLDER / "fold_3.owner").read_text()
        assert owner == f"process {os.getpid()} on host {os.uname().nodename}"


def test_a_lock_is_waited_for_if_asked(tmp_path, holder, caplog):
    caplog.set_level(logging.INFO, "heatmaps")
    start = time.perf_counter()
    threading.Timer(0.4, holder.kill).start()
    with locked(tmp_path, "fold_3", wait=True):
        assert 0.3 < time.perf_counter() - start < 10
    assert "waiting for process 7 on host elsewhere (fold_3 in" in caplog.text


def test_a_lock_that_is_never_released_is_refused_in_the_end(tmp_path, monkeypatch, caplog):
    def never(self, timeout=None, *args, **kwargs):
        waited.append(timeout)
        raise Timeout(self.lock_file)

    waited = []
    monkeypatch.setattr(FileLock, "acquire", never)
    with pytest.raises(InputError, match="works on"), locked(tmp_path, "fold_3", wait=True):
        pass
    assert waited == [0, 24 * 3600] and "cannot be locked" not in caplog.text


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_warned_of_once(tmp_path, monkeypatch, caplog, number):
    """And nothing is left whose mere being there would lock."""

    def not_here(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", not_here)
    run = make_run(tmp_path).start()
    for fold in (0, 1):
        with run.hold(fold) as is_unfinished, run.hold(fold):
            assert is_unfinished
    message = f"{tmp_path} cannot be locked ([Errno {number}] {os.strerror(number)})"
    assert [r.getMessage() for r in caplog.records] == [f"{message}: start no second process on it"]
