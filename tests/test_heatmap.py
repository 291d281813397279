"""Heatmaps: what is written, that it is the mean it says it is, and that it overlays the scans."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import AFFINE, N_FOLDS, N_SCANS, SHAPE, make_volume, save_scan, write_cohort

import attribution
import checkpoints
import dataset
import files
import heatmap
import heatmap_run
import maps
import models
import scan_files
import utils

ROOT = Path(heatmap.__file__).parent
METHODS = ["LRP", "IG", "GGC"]


def explain(csv_path: Path, modelpath: Path, outpath: Path, *more: str, draw=False) -> None:
    """Run heatmap.py; without its pictures, which take seconds each, unless told."""
    args = heatmap.parse_args(
        ["--path", str(csv_path), "--modelpath", str(modelpath), "--model", "modelT8",
         "--outpath", str(outpath), "--device", "cpu", "--steps", "3", "--workers", "0", *more]
    )  # fmt: skip
    with (
        contextlib.nullcontext()
        if draw
        else mock.patch.object(heatmap_run, "draw_map", return_value=[])
    ):
        heatmap.main(args)


def load(path: Path) -> np.ndarray:
    return nib.load(path).get_fdata(dtype=np.float32)


@pytest.fixture(scope="module")
def maps_path(cohort_csv, run_path, tmp_path_factory):
    """Return the folder of all methods' maps, each scan's among them."""
    outpath = tmp_path_factory.mktemp("maps")
    more = ["--method", *METHODS, "--by-outcome", "--save-subjects"]
    explain(cohort_csv, run_path, outpath, *more, draw=True)
    return outpath


@pytest.mark.parametrize("method", METHODS)
def test_files(maps_path, method):
    for suffix in (".nii.gz", ".json", ".png", ".html"):
        assert (maps_path / f"{method}_map_all{suffix}").stat().st_size > 0
    assert all((maps_path / f"{method}_map_f{fold}.nii.gz").is_file() for fold in range(N_FOLDS))
    assert not list(maps_path.rglob(f"{files.TEMPORARY_PREFIX}*"))


@pytest.mark.parametrize("method", METHODS)
def test_map_overlays_the_scans(maps_path, cohort_csv, method):
    """Affine, sform, qform, codes and units are the scans' own."""
    scan = nib.load(cohort_csv.parent / "scan00.nii.gz")
    for name in (f"{method}_map_all", f"{method}_map_f1", "mean_scan"):
        img = nib.load(maps_path / f"{name}.nii.gz")
        assert img.shape == SHAPE and img.get_data_dtype() == np.float32
        assert (img.affine == scan.affine).all() and (img.affine == AFFINE).all()
        assert (img.get_qform() == scan.get_qform()).all()
        assert int(img.header["sform_code"]) == 4 and int(img.header["qform_code"]) == 2
        assert img.header.get_xyzt_units()[0] == "mm"


@pytest.mark.parametrize("method", METHODS)
def test_fold_map_is_the_mean_over_the_folds_test_scans(maps_path, run_path, cohort_csv, method):
    """Written out: each test scan explained by the weights that never saw it, for its own label."""
    cohort = dataset.read_cohort(cohort_csv)
    splits = pd.read_csv(run_path / "splits.csv")
    options = {"IG": {"n_steps": 3}}.get(method, {})
    fold_maps = []
    for fold in range(N_FOLDS):
        model = models.build_model("modelT8", SHAPE).eval()
        checkpoints.load_weights(model, run_path / f"state_dict_f{fold}.pth")
        maps = []
        for row in np.flatnonzero(splits[f"fold_{fold}"] == "test"):
            volume = torch.tensor(scan_files.load_volume(cohort.table["file"][row])[0])[None, None]
            label = int(cohort.table["label"][row])
            maps.append(attribution.METHODS[method](model, volume, label, **options)[0, 0].numpy())
        fold_maps.append(np.mean(maps, axis=0))
        found = load(maps_path / f"{method}_map_f{fold}.nii.gz")
        assert np.abs(found - fold_maps[-1]).max() <= 1e-6 * np.abs(found).max()
    found = load(maps_path / f"{method}_map_all.nii.gz")
    assert np.abs(found - np.mean(fold_maps, axis=0)).max() <= 1e-6 * np.abs(found).max()


@pytest.mark.parametrize("method", METHODS)
def test_saved_scan_maps_average_to_the_outcome_maps(maps_path, method):
    table = pd.read_csv(maps_path / f"{method}_predictions.csv")
    assert len(table) == N_SCANS and table["map"].is_unique
    for outcome in ("TP", "TN", "FP", "FN"):
        rows = table[table["outcome"] == outcome]
        path = maps_path / f"{method}_map_{outcome}.nii.gz"
        assert path.is_file() == (len(rows) > 0)
        if len(rows):
            expected = np.mean([load(maps_path / name) for name in rows["map"]], axis=0)
            assert np.abs(load(path) - expected).max() <= 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize("method", METHODS)
def test_predictions(maps_path, run_path, method):
    """They agree with train_cv.py's, and the sums with the maps that they tell of."""
    table = pd.read_csv(maps_path / f"{method}_predictions.csv").set_index("path")
    trained = pd.read_csv(run_path / "predictions.csv").set_index("path").loc[table.index]
    assert (table["fold"] == trained["fold"]).all()
    assert (table["predicted"] == trained["predicted"]).all()
    assert table["probability"].to_numpy() == pytest.approx(trained["probability"].to_numpy(), 1e-5)
    right = table["label"] == table["predicted"]
    assert (table["outcome"].str[0] == np.where(right, "T", "F")).all()
    assert (table["outcome"].str[1] == np.where(table["predicted"] == 1, "P", "N")).all()
    sums = [load(maps_path / name).sum(dtype=np.float64) for name in table["map"]]
    assert table["map_sum"].to_numpy() == pytest.approx(sums, rel=1e-4, abs=1e-6)


def test_completeness_error():
    """LRP against the logit, IG against its difference to the zero volume's, none for GGC."""
    assert maps.completeness_error("LRP", 1.9, 2.0, 5.0) == pytest.approx(0.05)
    assert maps.completeness_error("IG", 1.2, 2.0, 1.0) == pytest.approx(0.2)
    assert np.isnan(maps.completeness_error("GGC", 1.0, 2.0, 1.0))


def test_completeness_column(maps_path):
    lrp = pd.read_csv(maps_path / "LRP_predictions.csv")
    expected = (lrp["map_sum"] - lrp["logit"]).abs() / lrp["logit"].abs()
    assert lrp["completeness_error"].to_numpy() == pytest.approx(expected.to_numpy(), rel=1e-6)
    assert pd.read_csv(maps_path / "GGC_predictions.csv")["completeness_error"].isna().all()


def test_sidecar(maps_path, run_path):
    sidecar = json.loads((maps_path / "IG_map_all.json").read_text())
    assert sidecar["method"] == "IG" and sidecar["parameters"]["n_steps"] == 3
    assert sum(sidecar["scans_per_fold"].values()) == N_SCANS
    checkpoint = run_path / "state_dict_f0.pth"
    assert sidecar["checkpoints_sha256"][checkpoint.name] == files.sha256(checkpoint)


def test_viewer_works_offline(maps_path):
    """The page loads nothing from elsewhere."""
    page = (maps_path / "LRP_map_all.html").read_text()
    assert "LRP, mean over folds" in page
    for attribute in ('src="http', 'href="http', 'src="//', "@import", 'rel="stylesheet" href'):
        assert attribute not in page


def test_batches_change_nothing(maps_path, cohort_csv, run_path, tmp_path):
    explain(cohort_csv, run_path, tmp_path, "--method", *METHODS, "--batch", "3")
    for method in METHODS:
        expected, found = (load(p / f"{method}_map_all.nii.gz") for p in (maps_path, tmp_path))
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_random_weights(maps_path, cohort_csv, run_path, tmp_path):
    """They stand beside the trained ones, repeat with the seed, and are not the trained ones."""
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        more = ["--method", "LRP", "--randomize", "--seed", seed]
        explain(cohort_csv, run_path, tmp_path / name, *more)
    found = [load(tmp_path / name / "LRP_random_map_all.nii.gz") for name in "abc"]
    trained = load(maps_path / "LRP_map_all.nii.gz")
    assert (found[0] == found[1]).all()
    assert np.abs(found[0] - found[2]).max() > 0.1 * np.abs(found[0]).max()
    assert np.abs(found[0] - trained).max() > 0.1 * np.abs(trained).max()
    assert not (tmp_path / "a" / "LRP_map_all.nii.gz").exists()
    assert json.loads((tmp_path / "a" / "LRP_random_map_all.json").read_text())["random_weights"]


@pytest.mark.parametrize("target", ["predicted", "0", "1"])
def test_target(cohort_csv, run_path, tmp_path, target):
    """The logit in the table is that of the class asked for."""
    explain(cohort_csv, run_path, tmp_path, "--method", "GGC", "--target", target)
    table = pd.read_csv(tmp_path / "GGC_predictions.csv")
    odds = np.log(table["probability"] / (1 - table["probability"]))  # logit 1 − logit 0
    if target == "predicted":
        chosen = table["predicted"]
    else:
        chosen = pd.Series(int(target), index=table.index)
    cohort = dataset.read_cohort(cohort_csv)
    for fold, rows in table.groupby("fold"):
        model = models.build_model("modelT8", SHAPE).eval()
        checkpoints.load_weights(model, run_path / f"state_dict_f{fold}.pth")
        for row in rows.itertuples():
            file = cohort.table.set_index("path")["file"][row.path]
            with torch.no_grad():
                logits = model(torch.tensor(scan_files.load_volume(file)[0])[None, None])[0]
            assert row.logit == pytest.approx(float(logits[chosen[row.Index]]), rel=1e-4)
            assert odds[row.Index] == pytest.approx(float(logits[1] - logits[0]), abs=1e-4)


def test_all_subjects_without_splits_or_run_record(cohort_csv, run_path, tmp_path):
    """A folder that holds only checkpoints, as the published ones do: every scan by every fold."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for fold in range(N_FOLDS):
        shutil.copy(run_path / f"state_dict_f{fold}.pth", folder)
    more = ["--method", "LRP", "--subjects", "all", "--fold", str(N_FOLDS)]
    explain(cohort_csv, folder, tmp_path / "maps", *more)
    table = pd.read_csv(tmp_path / "maps" / "LRP_predictions.csv")
    assert len(table) == N_FOLDS * N_SCANS


@pytest.mark.parametrize("method", METHODS)
def test_flipping_data_and_affine_changes_nothing_in_millimetres(tmp_path, method):
    """Scans stored from right to left, explained by a network mirrored likewise, give the same map.

    The side is one that the network's blocks divide evenly, and no two voxels are equal, so that
    the mirrored network is the same function of space. At IG's first step, the zero volume, all
    voxels of a pooling window tie and the first one wins: that step alone is not mirrored.
    """
    shape = (22, 27, 23)
    torch.manual_seed(0)
    model = models.build_model("modelT8", shape)
    rng = np.random.default_rng(0)
    scans = [rng.random(shape, dtype=np.float32) + 0.1 for _ in range(4)]
    mirror = np.diag([-1.0, 1, 1, 1])
    mirror[0, 3] = shape[0] - 1
    found = {}
    for name in ("straight", "mirrored"):
        folder = tmp_path / name
        folder.mkdir()
        weights = {key: value.clone() for key, value in model.state_dict().items()}
        affine = AFFINE
        if name == "mirrored":
            affine = AFFINE @ mirror
            for key in ("features.0.weight", "features.4.weight", "features.8.weight"):
                weights[key] = weights[key].flip(2)
            # at this side one voxel is left along the first axis: the classifier stays as it is
        checkpoints.save(folder / "state_dict_f0.pth", weights)
        for i, data in enumerate(scans):
            save_scan(folder / f"{i}.nii", data[::-1] if name == "mirrored" else data, affine)
        rows = "".join(f"{i}.nii,{i % 2}\n" for i in range(len(scans)))
        (folder / "data.csv").write_text(rows)
        more = ["--method", method, "--subjects", "all", "--fold", "1", "--steps", "60"]
        explain(folder / "data.csv", folder, folder, *more)
        found[name] = nib.load(folder / f"{method}_map_all.nii.gz")
    straight, mirrored = (nib.as_closest_canonical(img) for img in found.values())
    assert np.allclose(straight.affine, mirrored.affine)
    expected = straight.get_fdata()
    tolerance = 0.05 if method == "IG" else 1e-5
    assert np.abs(mirrored.get_fdata() - expected).max() <= tolerance * np.abs(expected).max()


def test_a_map_that_is_not_finite_names_scan_and_layer(cohort_csv, run_path, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(run_path, folder)
    weights = checkpoints.load(folder / "state_dict_f0.pth")
    weights["features.4.weight"][0, 0, 0, 0, 0] = np.inf
    checkpoints.save(folder / "state_dict_f0.pth", weights)
    argv = ["--path", str(cohort_csv), "--modelpath", str(folder), "--model", "modelT8",
            "--method", "GGC", "--outpath", str(tmp_path / "maps"), "--device", "cpu"]  # fmt: skip
    assert utils.run_script(heatmap.main, heatmap.parse_args(argv)) == 1
    message = capsys.readouterr().err
    assert "features.4" in message and "scan" in message


def test_the_first_readmes_commands_as_they_stand(tmp_path):
    """Four commands, typed in the cohort's folder; all three methods' maps stand together."""
    write_cohort(tmp_path)
    for name in ("train_cv.py", "heatmap.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    commands = [
        "train_cv.py --path ./data.csv --outpath ./output/ --device cpu --model modelT8"
        " --epochs 1 --fold 2",
        *(
            f"heatmap.py --path ./data.csv --modelpath ./output/ --model modelT8 --method {method}"
            " --outpath ./LRP/ --device cpu --steps 2"
            for method in METHODS
        ),
    ]
    for command in commands:
        done = subprocess.run(
            [sys.executable, *command.split()], cwd=tmp_path, capture_output=True, text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert "roc_auc" not in done.stdout and "GGC_map_all.nii.gz" in done.stdout
    for method in METHODS:
        assert nib.load(tmp_path / "LRP" / f"{method}_map_all.nii.gz").shape == SHAPE


@pytest.mark.slow
def test_memory_does_not_grow_with_the_cohort(tmp_path):
    """Sixty more scans take less than a quarter of what keeping one volume of each would."""
    shape, n_scans, peaks = (72, 80, 70), (20, 80), []
    weights = models.build_model("modelT8", shape).state_dict()
    checkpoints.save(tmp_path / "state_dict_f0.pth", weights)
    for index in range(max(n_scans)):
        save_scan(tmp_path / f"{index}.nii", make_volume(index, index % 2, shape))
    for n in n_scans:
        csv_path = tmp_path / f"{n}.csv"
        csv_path.write_text("".join(f"{index}.nii,{index % 2}\n" for index in range(n)))
        command = [
            sys.executable, ROOT / "heatmap.py", "--path", csv_path, "--modelpath", tmp_path,
            "--model", "modelT8", "--outpath", tmp_path / f"maps{n}", "--method", "LRP", "IG",
            "GGC", "--steps", "3", "--device", "cpu", "--subjects", "all", "--fold", "1",
        ]  # fmt: skip
        with subprocess.Popen(
            command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        ) as child:
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
        assert child.returncode == 0
        peaks.append(1024 * usage.ru_maxrss)
    kept_bytes = (n_scans[1] - n_scans[0]) * 4 * np.prod(shape)
    assert peaks[1] - peaks[0] < kept_bytes / 4
