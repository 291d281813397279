"""--dry-run: everything is checked and measured, and nothing is written."""

import re
import shutil

import pytest
import torch
from conftest import train_arguments, write_cohort

import heatmap
import models
import train_cv
import utils


def snapshot(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*")}


def heatmap_arguments(cohort_csv, run_path, outpath):
    return ["--path", str(cohort_csv), "--modelpath", str(run_path), "--model", "modelT8",
            "--outpath", str(outpath), "--method", "LRP", "IG", "GGC", "--steps", "4",
            "--device", "cpu", "--workers", "0", "--save-subjects", "--dry-run"]  # fmt: skip


def test_training(cohort_csv, tmp_path, capsys):
    before = snapshot(cohort_csv.parent)
    more = ["--dry-run", "--cache-dir", str(tmp_path / "cache")]
    arguments = train_arguments(cohort_csv, tmp_path / "new" / "run", *more)
    assert utils.run_script(train_cv.main, train_cv.parse_args(arguments)) == 0
    shown = capsys.readouterr().out
    assert "scans: 16; train, val, test per fold, at the most: 6, 2, 8" in shown
    n_parameters = sum(p.numel() for p in models.build_model("modelT8", (24, 27, 23)).parameters())
    assert f"model: {n_parameters:,} parameters" in shown
    assert re.search(r"a training step of 4 scans: [\d.e-]+ s, peak memory [\d.]+ GB", shown)
    assert re.search(r"decoding the scans: about [\d.e-]+ s, once", shown)
    assert re.search(r"an epoch: about [\d.e-]+ s", shown)
    assert re.search(r"disk: at most [\d.e-]+ GB of weights; free: .* below .*new/run", shown)
    assert re.search(r"disk: at most 0.000954 GB of decoded scans; free: .* below .*cache", shown)
    assert not list(tmp_path.iterdir()) and snapshot(cohort_csv.parent) == before


@pytest.mark.parametrize("more", [[], ["--batch", "3"]])
def test_heatmaps(cohort_csv, run_path, tmp_path, capsys, more):
    before = snapshot(run_path)
    arguments = heatmap_arguments(cohort_csv, run_path, tmp_path / "maps") + more
    assert utils.run_script(heatmap.main, heatmap.parse_args(arguments)) == 0
    shown = capsys.readouterr().out
    for method in ("LRP", "IG", "GGC"):
        assert re.search(rf"{method}: [\d.e-]+ s a scan, [\d.e-]+ h in all, peak memory", shown)
    assert "scans to explain, over all folds: 16" in shown
    assert not list(tmp_path.iterdir()) and snapshot(run_path) == before


def test_what_does_not_fit_on_a_disk_is_refused(
    cohort_csv, run_path, tmp_path, capsys, monkeypatch
):
    """Judged together where it goes to one disk."""
    usage = shutil.disk_usage(tmp_path)
    free = {"bytes": 1_000_000}  # decoded scans alone would fit, without the weights
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free["bytes"]))
    arguments = train_arguments(cohort_csv, tmp_path / "run", "--dry-run")
    assert utils.run_script(train_cv.main, train_cv.parse_args(arguments)) == 2
    assert "GB of weights and decoded scans do not fit: 0.001 GB" in capsys.readouterr().err
    arguments = heatmap_arguments(cohort_csv, run_path, tmp_path / "maps")
    assert utils.run_script(heatmap.main, heatmap.parse_args(arguments)) == 2
    assert "GB of maps do not fit" in capsys.readouterr().err
    free["bytes"] = 10**9
    assert utils.run_script(heatmap.main, heatmap.parse_args(arguments)) == 0


def test_input_is_refused_as_ever(cohort_csv, tmp_path, capsys):
    """Also options that differ from those of the run that is there."""
    csv_path = write_cohort(tmp_path / "cohort")
    (csv_path.parent / "scan03.nii.gz").write_text("no scan")
    arguments = train_arguments(csv_path, tmp_path / "run", "--dry-run")
    assert utils.run_script(train_cv.main, train_cv.parse_args(arguments)) == 2
    assert "scan03.nii.gz is not a readable image" in capsys.readouterr().err
    train_cv.main(train_cv.parse_args(train_arguments(cohort_csv, tmp_path / "run")))
    arguments = train_arguments(cohort_csv, tmp_path / "run", "--dry-run", "--lr", "1")
    assert utils.run_script(train_cv.main, train_cv.parse_args(arguments)) == 2
    assert "--lr 1.0 (the run has 0.001)" in capsys.readouterr().err


def test_a_step_that_does_not_fit_is_said(cohort_csv, tmp_path, capsys, monkeypatch):
    def no_memory(self, volumes):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(models.CNN3D, "forward", no_memory)
    arguments = train_arguments(cohort_csv, tmp_path, "--dry-run")
    assert utils.run_script(train_cv.main, train_cv.parse_args(arguments)) == 1
    assert "out of memory in a training step: use less than --batch 4" in capsys.readouterr().err


@pytest.mark.parametrize("script", [train_cv, heatmap])
def test_help_names_it(script, capsys):
    with pytest.raises(SystemExit):
        script.parse_args(["-h"])
    assert "--dry-run" in capsys.readouterr().out
