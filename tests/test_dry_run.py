"""--dry-run: everything is checked and measured, and nothing is written."""

import re
import shutil

from conftest import exit_status, explain_arguments, train_arguments, write_cohort

import heatmap
import train_cv

MORE = ["--method", "LRP", "IG", "GGC", "--batch", "3", "--save-subjects", "--dry-run"]


def snapshot(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*")}


def test_training(cohort_csv, tmp_path, capsys):
    before = snapshot(cohort_csv.parent)
    more = ["--dry-run", "--cache-dir", str(tmp_path / "cache")]
    arguments = train_arguments(cohort_csv, tmp_path / "new" / "run", *more)
    assert exit_status(train_cv, arguments) == 0
    shown = capsys.readouterr().out
    assert "16 scans, 6 of them to train on in the largest fold" in shown
    assert re.search(r"a training step of 4 scans: [\d.]+ s, peak memory [\d.]+ GB", shown)
    assert re.search(
        r"models that should fit into the [\d.]+ GB that are free, at --batch 4: modelT8", shown
    )
    assert re.search(r"an epoch of training: about [\d.]+ s; 2 folds: [\d.]+ s if no", shown)
    assert re.search(r"disk: at most [\d.e-]+ GB of weights; free: .* below .*new/run", shown)
    assert re.search(r"disk: at most 0.000956 GB of decoded scans; free: .* below .*cache", shown)
    assert not list(tmp_path.iterdir()) and snapshot(cohort_csv.parent) == before


def test_heatmaps(cohort_csv, run_path, tmp_path, capsys):
    before = snapshot(run_path)
    arguments = explain_arguments(cohort_csv, run_path, tmp_path / "maps", *MORE)
    assert exit_status(heatmap, arguments) == 0
    shown = capsys.readouterr().out
    for method in ("LRP", "IG", "GGC"):
        assert re.search(rf"{method}: [\d.]+ s a scan, [\d.]+ s in all, peak memory", shown)
    assert "scans to explain, over all folds: 16" in shown
    assert not list(tmp_path.iterdir()) and snapshot(run_path) == before


def test_what_does_not_fit_on_a_disk_is_refused(
    cohort_csv, run_path, tmp_path, monkeypatch, capsys
):
    """Judged together where it goes to one disk."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    for arguments, what in (
        ([train_cv, train_arguments(cohort_csv, tmp_path / "run", "--dry-run")], "weights"),
        ([heatmap, explain_arguments(cohort_csv, run_path, tmp_path / "maps", *MORE)], "maps"),
    ):
        assert exit_status(*arguments) == 2
        message = capsys.readouterr().err
        assert what in message and "0.001 GB are free" in message
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**9))
    assert (
        exit_status(heatmap, explain_arguments(cohort_csv, run_path, tmp_path / "maps", *MORE)) == 0
    )


def test_input_is_refused_as_ever(modelpath, cohort_csv, tmp_path, refusal):
    """Also options that differ from those of the run that is there."""
    arguments = train_arguments(cohort_csv, modelpath, "--dry-run", "--lr", "1")
    assert "--lr 1.0 (the run has 0.001)" in refusal(train_cv, arguments)
    csv_path = write_cohort(tmp_path / "cohort")
    (csv_path.parent / "scan03.nii.gz").write_text("no scan")
    arguments = train_arguments(csv_path, tmp_path / "out", "--dry-run")
    assert "scan03.nii.gz is not a readable image" in refusal(train_cv, arguments)
