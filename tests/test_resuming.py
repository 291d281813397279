"""The same command typed again: what is finished stays, and the end is the same."""

import json
import os
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import N_FOLDS, N_SCANS, stop_at_call, train_arguments, write_cohort

import attribution
import checkpoints
import files
import heatmap
import heatmap_run
import linear_svm
import map_files
import pictures
import report
import svm
import train_cv
import utils
from errors import InputError

NO_PICTURES = pytest.mark.usefixtures("no_pictures")
TIMED = ("_run.json", "run.json", ".log")  # these files say when


@pytest.fixture
def no_pictures(monkeypatch):
    """Leave out the pictures, which take seconds each."""
    monkeypatch.setattr(heatmap_run, "draw_map", lambda *_: [])
    monkeypatch.setattr(pictures, "plot_mosaic", lambda *_: None)
    monkeypatch.setattr(report, "write_viewer", lambda *_: None)


def contents(outpath: Path) -> dict[str, bytes]:
    """Return every file's bytes, but for those that say when."""
    return {
        str(path.relative_to(outpath)): path.read_bytes()
        for path in sorted(outpath.rglob("*"))
        if path.is_file() and not path.name.endswith(TIMED) and ".locks" not in path.parts
    }


def heatmap_args(cohort_csv: Path, run_path: Path, outpath: Path, *more: str):
    return heatmap.parse_args(
        ["--path", str(cohort_csv), "--modelpath", str(run_path), "--model", "modelT8",
         "--outpath", str(outpath), "--method", "LRP", "GGC", "--device", "cpu", "--workers", "0",
         *more]
    )  # fmt: skip


def svm_args(cohort_csv: Path, run_path: Path, outpath: Path, *more: str):
    return svm.parse_args(
        ["--path", str(cohort_csv), "--modelpath", str(run_path), "--outpath", str(outpath),
         "--workers", "0", *more]
    )  # fmt: skip


# heatmap.py


@NO_PICTURES
@pytest.mark.parametrize("n_done", [0, 3, N_SCANS // 2 + 2])
def test_heatmaps_go_on(cohort_csv, run_path, tmp_path, monkeypatch, n_done):
    """Stopped at the first scan, in the first fold and in the second: the same files at the end."""
    more = ["--by-outcome", "--save-subjects"]
    heatmap.main(heatmap_args(cohort_csv, run_path, tmp_path / "whole", *more))
    args = heatmap_args(cohort_csv, run_path, tmp_path / "stopped", *more)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        stopping = stop_at_call(n_done + 1, attribution.lrp)
        patched.setitem(attribution.METHODS, "LRP", stopping)
        heatmap.main(args)
    assert not (tmp_path / "stopped" / "LRP_map_all.nii.gz").exists()
    explained = []

    def counting(*arguments, **options):
        explained.append(1)
        return attribution.lrp(*arguments, **options)

    monkeypatch.setitem(attribution.METHODS, "LRP", counting)
    heatmap.main(args)
    assert len(explained) == N_SCANS - n_done
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


@NO_PICTURES
def test_finished_heatmaps_are_not_made_again(cohort_csv, run_path, tmp_path, monkeypatch):
    args = heatmap_args(cohort_csv, run_path, tmp_path)
    heatmap.main(args)
    before = contents(tmp_path)
    monkeypatch.setattr(heatmap, "explain_fold", None)
    heatmap.main(args)
    assert contents(tmp_path) == before


@NO_PICTURES
def test_another_method_joins_and_other_options_are_refused(cohort_csv, run_path, tmp_path):
    heatmap.main(heatmap_args(cohort_csv, run_path, tmp_path))
    before = contents(tmp_path)
    refused = heatmap_args(cohort_csv, run_path, tmp_path, "--beta", "1", "--target", "1")
    with pytest.raises(InputError, match=r"--target 1 \(the run has label\); --beta 1.0 .*0.5"):
        heatmap.main(refused)
    assert contents(tmp_path) == before
    joined = heatmap_args(cohort_csv, run_path, tmp_path, "--steps", "2")
    joined.method = ["IG"]
    heatmap.main(joined)
    after = contents(tmp_path)
    assert after.items() >= before.items() and "IG_map_all.nii.gz" in after


@NO_PICTURES
def test_heatmaps_of_other_checkpoints_are_refused(cohort_csv, run_path, tmp_path):
    folder = Path(shutil.copytree(run_path, tmp_path / "run"))
    args = heatmap_args(cohort_csv, folder, tmp_path / "maps")
    heatmap.main(args)
    weights = checkpoints.load(folder / "state_dict_f0.pth")
    weights["classifier.3.bias"] += 1
    checkpoints.save(folder / "state_dict_f0.pth", weights)
    with pytest.raises(InputError, match="its files have changed"):
        heatmap.main(args)
    args.overwrite = True
    before = contents(tmp_path / "maps")
    heatmap.main(args)
    assert contents(tmp_path / "maps") != before


# svm.py


@NO_PICTURES
def test_the_svm_goes_on(cohort_csv, run_path, tmp_path, monkeypatch):
    svm.main(svm_args(cohort_csv, run_path, tmp_path / "whole"))
    args = svm_args(cohort_csv, run_path, tmp_path / "stopped")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(svm, "write_fold", stop_at_call(2, svm.write_fold))
        svm.main(args)
    fitted = []
    fit_fold = linear_svm.fit_fold
    monkeypatch.setattr(linear_svm, "fit_fold", lambda *a: fitted.append(1) or fit_fold(*a))
    svm.main(args)
    assert len(fitted) == N_FOLDS - 1
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


@NO_PICTURES
def test_the_svm_refuses_other_options_and_a_run_of_another_script(cohort_csv, run_path, tmp_path):
    svm.main(svm_args(cohort_csv, run_path, tmp_path))
    with pytest.raises(InputError, match=r"--C 2.0 \(the run has 1.0\)"):
        svm.main(svm_args(cohort_csv, run_path, tmp_path, "--C", "2"))
    before = contents(run_path)
    with pytest.raises(InputError, match=r"holds a run of train_cv\.py"):
        svm.main(svm_args(cohort_csv, run_path, run_path, "--overwrite"))
    assert contents(run_path) == before


# train_cv.py


def test_scans_that_changed_are_named(tmp_path):
    csv_path = write_cohort(tmp_path / "cohort")
    args = train_cv.parse_args(train_arguments(csv_path, tmp_path / "run"))
    train_cv.main(args)
    scan_path = csv_path.parent / "scan03.nii.gz"
    img = nib.load(scan_path)
    nib.save(nib.Nifti1Image(np.asarray(img.dataobj) + 1, img.affine, img.header), scan_path)
    os.utime(scan_path, (2e9, 2e9))
    with pytest.raises(InputError, match=r"the scans have changed \(scan03.nii.gz\)"):
        train_cv.main(args)


def test_every_differing_option_is_named_with_both_values(cohort_csv, run_path):
    args = train_cv.parse_args(train_arguments(cohort_csv, run_path, "--lr", "1", "--wd", "2"))
    expected = r"--lr 1.0 \(the run has 0.001\); --wd 2.0 \(the run has 0.0001\).*--overwrite"
    with pytest.raises(InputError, match=expected):
        train_cv.main(args)


def test_temporary_files_of_killed_processes_are_removed(cohort_csv, tmp_path):
    """Those of a process that runs, here or on another host, are left alone.

    Another host's name may begin like this one's; a killed process's number may be used again, by
    another process or by this one.
    """
    args = train_cv.parse_args(train_arguments(cohort_csv, tmp_path))
    here, dead = os.uname().nodename, 999_999_999
    running = [f"{here}@{os.getppid()}@x.csv", "other@1@x.csv", f"{here}-{dead}@{dead}@x.csv"]
    killed = [f"{here}@{dead}@x.csv", f"{here}@{os.getpid()}@x.csv"]
    reused = [f"{here}@{os.getppid()}@old.csv", "other@1@old.csv"]
    for name in (*running, *killed, *reused):
        (tmp_path / f"{files.TEMPORARY_PREFIX}{name}").write_text("half")
    for name in reused:
        os.utime(tmp_path / f"{files.TEMPORARY_PREFIX}{name}", (1e9, 1e9))
    train_cv.main(args)
    left = {path.name for path in tmp_path.glob(f"{files.TEMPORARY_PREFIX}*")}
    assert left == {f"{files.TEMPORARY_PREFIX}{name}" for name in running}
    with files.whole_file(tmp_path / "y.csv") as temporary_path:
        assert temporary_path.name == f"{files.TEMPORARY_PREFIX}{here}@{os.getpid()}@y.csv"
        temporary_path.write_text("whole")


# Job arrays


@NO_PICTURES
def test_job_arrays_come_to_the_same_files(cohort_csv, run_path, tmp_path):
    """Each task does one fold, in any order; whoever is last puts all together."""
    for fold in (1, 0):
        assert not (tmp_path / "run" / "metrics.csv").exists()
        args = train_arguments(cohort_csv, tmp_path / "run", "--only-fold", str(fold))
        train_cv.main(train_cv.parse_args(args))
    expected = contents(run_path)
    found = contents(tmp_path / "run")
    histories = {name for name in expected if name.startswith("history")}
    assert found.keys() == expected.keys()
    assert all(found[name] == expected[name] for name in expected.keys() - histories)
    heatmap.main(heatmap_args(cohort_csv, run_path, tmp_path / "maps"))
    svm.main(svm_args(cohort_csv, run_path, tmp_path / "svm"))
    for fold in ("1", "0"):
        more = ["--only-fold", fold]
        heatmap.main(heatmap_args(cohort_csv, run_path, tmp_path / "maps_by_fold", *more))
        svm.main(svm_args(cohort_csv, run_path, tmp_path / "svm_by_fold", *more))
    for name in ("maps", "svm"):
        assert contents(tmp_path / f"{name}_by_fold") == contents(tmp_path / name)


@pytest.mark.parametrize("script", [train_cv, heatmap, svm])
def test_a_fold_that_is_not_there(cohort_csv, run_path, tmp_path, script, capsys):
    args = {
        train_cv: lambda *m: train_cv.parse_args(train_arguments(cohort_csv, tmp_path, *m)),
        heatmap: lambda *m: heatmap_args(cohort_csv, run_path, tmp_path, *m),
        svm: lambda *m: svm_args(cohort_csv, run_path, tmp_path, *m),
    }[script]("--only-fold", "2")
    assert utils.run_script(script.main, args) == 2
    assert "--only-fold 2: the" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_overwriting_one_fold_only_is_refused(cohort_csv, run_path):
    more = ["--only-fold", "0", "--overwrite"]
    before = contents(run_path)
    with pytest.raises(InputError, match="--only-fold"):
        train_cv.main(train_cv.parse_args(train_arguments(cohort_csv, run_path, *more)))
    assert contents(run_path) == before


def test_records_of_each_method(cohort_csv, run_path, tmp_path, no_pictures):
    heatmap.main(heatmap_args(cohort_csv, run_path, tmp_path, "--beta", "0.25"))
    record = json.loads((tmp_path / "LRP_run.json").read_text())
    assert record["arguments"]["beta"] == 0.25 and record["n_folds"] == N_FOLDS
    assert map_files.is_finished(tmp_path, "LRP", N_FOLDS - 1)
