"""Heatmaps: what is written, that it is the mean it says it is, and that it overlays the scans."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import (
    AFFINE,
    N_FOLDS,
    N_SCANS,
    SHAPE,
    exit_status,
    explain,
    explain_arguments,
    make_volume,
    save_scan,
    write_cohort,
)

import attribution
import dataset
import heatmap
import models
import utils
from reporting import mean_maps
from run_folder import checkpoints, files, trained_run
from run_folder import device as devices

ROOT = Path(heatmap.__file__).parent
METHODS = list(attribution.METHODS)
CPU = torch.device("cpu")
FOLD_0 = ("--only-fold", "0")  # no pictures, which take seconds each


def load(path: Path) -> np.ndarray:
    return nib.load(path).get_fdata(dtype=np.float32)


def assert_alike(found: np.ndarray, expected: np.ndarray, tolerance: float = 1e-6) -> None:
    """Hold two maps to each other but for a few voxels: near ties of poolings turn by rounding."""
    differences = np.abs(found - expected)
    assert np.quantile(differences, 0.99) <= tolerance * np.abs(expected).max()
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.999


def network_of(folder: Path, fold: int) -> torch.nn.Module:
    model = models.build_model("modelT8", SHAPE).eval()
    checkpoints.load_weights(folder / f"state_dict_f{fold}.pth", model)
    return model


def volume_of(cohort: dataset.Cohort, row: int) -> torch.Tensor:
    """Return a scan's volume, (1, 1, D, H, W)."""
    return torch.from_numpy(cohort.volumes(None, 0)[row])[None, None]


@pytest.fixture(scope="module")
def maps_path(cohort_csv, run_path, tmp_path_factory) -> Path:
    """Return the folder of all methods' maps, each scan's among them."""
    outpath = tmp_path_factory.mktemp("maps")
    more = ["--method", *METHODS, "--by-outcome", "--save-subjects"]
    explain(cohort_csv, run_path, outpath, *more)
    return outpath


# What is written


def test_files(maps_path):
    names = {"mean_scan.nii.gz", "mean_scan_f0.nii.gz", "mean_scan_f1.nii.gz", "heatmap.log"}
    for method in METHODS:
        names |= {
            f"{method}_map_all{suffix}" for suffix in (".nii.gz", ".json", ".png", ".pdf", ".html")
        }
        names |= {f"{method}_map_f{fold}.nii.gz" for fold in range(N_FOLDS)}
        names |= {f"{method}_predictions.csv", f"{method}_run.json", f"{method}_subjects"}
    assert names <= {path.name for path in maps_path.iterdir()}
    assert not [p for p in maps_path.rglob(".*") if p.name != ".locks" and p.suffix != ".lock"]
    for method in METHODS:
        record = json.loads((maps_path / f"{method}_run.json").read_text())
        assert record["start"] <= record["end"]


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
    options, fold_maps = {"IG": {"n_steps": 3}}.get(method, {}), []
    for fold in range(N_FOLDS):
        model, of_scans = network_of(run_path, fold), []
        for row in np.flatnonzero(splits[f"fold_{fold}"] == "test"):
            volume, label = volume_of(cohort, row), int(cohort.labels[row])
            if method == "SG":
                options["seed"] = utils.derived_seed(0, row, purpose="smoothgrad")
            of_scans.append(attribution.METHODS[method](model, volume, label, **options)[0, 0])
        fold_maps.append(torch.stack(of_scans).mean(0).numpy())
        assert_alike(load(maps_path / f"{method}_map_f{fold}.nii.gz"), fold_maps[-1])
    assert_alike(load(maps_path / f"{method}_map_all.nii.gz"), np.mean(fold_maps, axis=0))


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
    assert (table[["fold", "predicted"]] == trained[["fold", "predicted"]]).all(axis=None)
    assert table["probability"].to_numpy() == pytest.approx(trained["probability"].to_numpy(), 1e-5)
    right = table["label"] == table["predicted"]
    assert (table["outcome"].str[0] == np.where(right, "T", "F")).all()
    assert (table["outcome"].str[1] == np.where(table["predicted"] == 1, "P", "N")).all()
    sums = [load(maps_path / name).sum(dtype=np.float64) for name in table["map"]]
    assert table["map_sum"].to_numpy() == pytest.approx(sums, rel=1e-4, abs=1e-6)


def test_completeness_column(maps_path, run_path):
    """LRP's sums against the logit, IG's against its difference to the zero volume's."""
    zeros = torch.zeros(1, 1, *SHAPE)
    with torch.no_grad():
        zero_logits = torch.cat([network_of(run_path, fold)(zeros) for fold in range(N_FOLDS)])
    for method, weight in (("LRP", 0), ("IG", 1)):
        table = pd.read_csv(maps_path / f"{method}_predictions.csv")
        explained = table["logit"] - weight * zero_logits[table["fold"], table["label"]].numpy()
        expected = (table["map_sum"] - explained).abs() / explained.abs()
        if method == "IG":
            expected = expected.where(explained.abs() >= 0.01)
        found = table["completeness_error"].to_numpy()
        assert found == pytest.approx(expected.to_numpy(), rel=1e-4, nan_ok=True)
    assert pd.read_csv(maps_path / "GGC_predictions.csv")["completeness_error"].isna().all()


def test_sidecar(maps_path, run_path):
    sidecar = json.loads((maps_path / "IG_map_all.json").read_text())
    assert sidecar["method"] == "IG" and sidecar["parameters"]["n_steps"] == 3
    assert sidecar["target"] == "label" and not sidecar["random_weights"]
    assert sum(sidecar["scans_per_fold"].values()) == N_SCANS
    paths = [run_path / f"state_dict_f{fold}.pth" for fold in range(N_FOLDS)]
    assert sidecar["checkpoints_sha256"] == {path.name: files.sha256(path) for path in paths}


def test_viewer_works_offline(maps_path):
    page = (maps_path / "LRP_map_all.html").read_text()
    assert "LRP (β = 0.5) of the own class&#x27;s logit · modelT8 · 2 folds, 16 scans" in page
    assert not re.search(r"""(src|href)=["']?(https?:)?//|@import|rel="stylesheet" href""", page)


# Options


def test_batches_change_nothing(maps_path, cohort_csv, run_path, tmp_path):
    explain(cohort_csv, run_path, tmp_path, "--method", *METHODS, "--batch", "3", *FOLD_0)
    for method in METHODS:
        name = f"{method}_map_f0.nii.gz"
        assert_alike(load(tmp_path / name), load(maps_path / name))
        if method == "SG":  # whose noise is the scan's own
            assert (load(tmp_path / name) == load(maps_path / name)).all()


def test_random_weights(maps_path, cohort_csv, run_path, tmp_path):
    """They stand beside the trained ones, repeat with the seed, and are not the trained ones."""
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        more = ["--method", "LRP", "--randomize", "--seed", seed, *FOLD_0]
        explain(cohort_csv, run_path, tmp_path / name, *more)
    first, again, other = (load(tmp_path / n / "LRP_random_map_f0.nii.gz") for n in "abc")
    trained = load(maps_path / "LRP_map_f0.nii.gz")
    assert (first == again).all()
    assert np.corrcoef(first.ravel(), other.ravel())[0, 1] < 0.99
    assert np.corrcoef(first.ravel(), trained.ravel())[0, 1] < 0.99
    assert not (tmp_path / "a" / "LRP_map_f0.nii.gz").exists()
    assert json.loads((tmp_path / "a" / "LRP_random_run.json").read_text())["end"] is None


@pytest.mark.parametrize("target", ["predicted", "0", "1"])
def test_target(cohort_csv, run_path, tmp_path, target):
    """The logit in the table is that of the class asked for."""
    explain(cohort_csv, run_path, tmp_path, "--target", target, *FOLD_0)
    cohort, model = dataset.read_cohort(cohort_csv), network_of(run_path, 0)
    table = pd.read_csv(tmp_path / "GGC_predictions_f0.csv")
    for row in table.itertuples():
        with torch.no_grad():
            logits = model(volume_of(cohort, cohort.table["path"].tolist().index(row.path)))[0]
        chosen = int(logits.argmax()) if target == "predicted" else int(target)
        assert row.logit == pytest.approx(float(logits[chosen]), rel=1e-4)


def test_contrast(cohort_csv, run_path, tmp_path, caplog):
    """Patients' mean map less controls', in each fold, then the mean over folds; its record."""
    explain(cohort_csv, run_path, tmp_path, "--target", "1", "--save-subjects")
    table, folds = pd.read_csv(tmp_path / "GGC_predictions.csv"), []
    for fold, rows in table.groupby("fold"):
        groups = [
            np.mean([load(tmp_path / name) for name in rows.loc[rows["label"] == label, "map"]], 0)
            for label in (0, 1)
        ]
        folds.append(load(tmp_path / f"GGC_contrast_f{fold}.nii.gz"))
        assert np.abs(folds[-1] - (groups[1] - groups[0])).max() <= 1e-6 * np.abs(folds[-1]).max()
    found = load(tmp_path / "GGC_contrast_all.nii.gz")
    assert np.abs(found - np.mean(folds, 0)).max() <= 1e-6 * np.abs(found).max() and found.any()
    sidecar = json.loads((tmp_path / "GGC_contrast_all.json").read_text())
    assert (sidecar["map"], sidecar["target"]) == ("contrast", "1")
    assert (tmp_path / "GGC_contrast_all.png").is_file()


def test_there_is_no_contrast_of_two_targets(maps_path):
    assert not list(maps_path.glob("*contrast*"))
    assert "LRP: no contrast of patients' and" in (maps_path / "heatmap.log").read_text()


def test_all_subjects_without_splits_or_run_record(cohort_csv, run_path, tmp_path):
    """A folder that holds only checkpoints, as the published ones do: every scan by every fold."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for fold in range(N_FOLDS):
        shutil.copy(run_path / f"state_dict_f{fold}.pth", folder)
    more = ["--subjects", "all", "--fold", str(N_FOLDS), *FOLD_0]
    explain(cohort_csv, folder, tmp_path / "maps", *more)
    assert len(pd.read_csv(tmp_path / "maps" / "GGC_predictions_f0.csv")) == N_SCANS


@pytest.mark.parametrize("method", METHODS)
def test_flipping_data_and_affine_changes_nothing_in_millimetres(tmp_path, method):
    """Scans stored from right to left, explained by a network mirrored likewise, give the same map.

    The network's blocks divide the side evenly; noise would not be mirrored. At IG's first step,
    the zero volume, all voxels of a pooling window tie and the first one wins: that step alone is
    not mirrored.
    """
    shape = (22, 27, 23)
    torch.manual_seed(0)
    weights = models.build_model("modelT8", shape).state_dict()
    rng = np.random.default_rng(0)
    scans = [rng.random(shape, dtype=np.float32) + 0.1 for _ in range(4)]
    mirror = np.diag([-1.0, 1, 1, 1])
    mirror[0, 3] = shape[0] - 1
    maps = []
    for name, affine, step in (("straight", AFFINE, 1), ("mirrored", AFFINE @ mirror, -1)):
        folder = tmp_path / name
        folder.mkdir()
        if name == "mirrored":
            for key in ("features.0.weight", "features.4.weight", "features.8.weight"):
                weights[key] = weights[key].flip(2)
            # at this side one voxel is left along the first axis: the classifier stays as it is
        for fold in range(2):
            checkpoints.write(folder / f"state_dict_f{fold}.pth", weights)
        for i, data in enumerate(scans):
            save_scan(folder / f"{i}.nii", data[::step], affine)
        (folder / "data.csv").write_text("".join(f"{i}.nii,{i % 2}\n" for i in range(len(scans))))
        more = ["--method", method, "--subjects", "all", "--fold", "2", "--steps", "60", *FOLD_0,
                "--noise", "0"]  # fmt: skip
        explain(folder / "data.csv", folder, folder, *more)
        maps.append(nib.as_closest_canonical(nib.load(folder / f"{method}_map_f0.nii.gz")))
    assert np.allclose(maps[0].affine, maps[1].affine)
    found, expected = maps[1].get_fdata(), maps[0].get_fdata()
    assert_alike(found, expected, 0.05 if method == "IG" else 1e-5)
    assert np.corrcoef(found[::-1].ravel(), expected.ravel())[0, 1] < 0.9


# What goes wrong


def test_a_map_that_is_not_finite_names_method_scan_and_fold(cohort_csv, modelpath, capsys):
    weights = torch.load(modelpath / "state_dict_f0.pth", weights_only=True)
    weights["features.4.weight"][0, 0, 0, 0, 0] = np.inf
    checkpoints.write(modelpath / "state_dict_f0.pth", weights)
    outpath = modelpath.parent / "maps"
    assert exit_status(heatmap, explain_arguments(cohort_csv, modelpath, outpath)) == 1
    splits = pd.read_csv(modelpath / "splits.csv")
    first = splits["path"][splits["fold_0"] == "test"].iloc[0]
    assert f"error: GGC of {first} in fold 0: " in capsys.readouterr().err
    assert not (outpath / "GGC_map_f0.nii.gz").exists()


def test_weights_that_change_while_they_are_explained(
    cohort_csv, modelpath, tmp_path, capsys, monkeypatch
):
    """They are not mixed with those that the maps were begun with, now or by a later command."""
    other = {k: v + 1 for k, v in network_of(modelpath, 1).state_dict().items()}
    n_loaded, load_file = 0, torch.load

    def load_and_change(*args, **options):
        nonlocal n_loaded
        n_loaded += 1
        if n_loaded == 2 * N_FOLDS + 1:  # each was tried and checked; now the first is explained
            checkpoints.write(modelpath / "state_dict_f1.pth", other)
        return load_file(*args, **options)

    arguments = explain_arguments(cohort_csv, modelpath, tmp_path / "maps")
    with monkeypatch.context() as patched:
        patched.setattr(torch, "load", load_and_change)
        assert exit_status(heatmap, arguments) == 1
    assert "state_dict_f1.pth has changed since these maps were begun" in capsys.readouterr().err
    assert not (tmp_path / "maps" / "GGC_map_all.nii.gz").exists()
    assert exit_status(heatmap, arguments) == 2
    assert "modelpath: other content of state_dict_f1.pth" in capsys.readouterr().err


# Real processes


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
            for method in ("LRP", "IG", "GGC")
        ),
    ]
    for command in commands:
        done = subprocess.run(
            [sys.executable, *command.split()], cwd=tmp_path, capture_output=True, text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert "GGC_map_all.nii.gz" in done.stdout
    for method in ("LRP", "IG", "GGC"):
        assert nib.load(tmp_path / "LRP" / f"{method}_map_all.nii.gz").shape == SHAPE


@pytest.mark.slow
def test_memory_does_not_grow_with_the_cohort(tmp_path):
    """Sixty more scans take less than a quarter of what keeping one volume of each would."""
    shape, n_scans, peaks = (72, 80, 70), (20, 80), []
    weights = models.build_model("modelT8", shape).state_dict()
    checkpoints.write(tmp_path / "state_dict_f0.pth", weights)
    for index in range(max(n_scans)):
        save_scan(tmp_path / f"{index}.nii", make_volume(index, index % 2, shape))
    for n in n_scans:
        csv_path = tmp_path / f"{n}.csv"
        csv_path.write_text("".join(f"{index}.nii,{index % 2}\n" for index in range(n)))
        more = ["--method", *METHODS, "--subjects", "all", "--fold", "1"]
        arguments = explain_arguments(csv_path, tmp_path, tmp_path / f"maps{n}", *more)
        command = [sys.executable, ROOT / "heatmap.py", *arguments]
        with subprocess.Popen(
            command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        ) as child:
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
        assert child.returncode == 0
        peaks.append(1024 * usage.ru_maxrss)
    kept_bytes = (n_scans[1] - n_scans[0]) * 4 * np.prod(shape)
    assert peaks[1] - peaks[0] < kept_bytes / 4


def trained_tensors(run_path: Path, fold: int) -> dict[str, torch.Tensor]:
    return torch.load(run_path / f"state_dict_f{fold}.pth", weights_only=True)


def test_untrained_weights_are_none_that_training_has_seen(cohort_csv, run_path, tmp_path):
    """|r| < 4/√n with the fold's first and last weights, in every tensor of n ≥ 100."""
    cohort = dataset.read_cohort(cohort_csv)
    args = heatmap.parse_args(explain_arguments(cohort_csv, run_path, tmp_path, "--randomize"))
    model = models.build_model("modelT8", SHAPE).eval()
    facts = {"model": "modelT8", "volume_shape": list(SHAPE), "affine": AFFINE.tolist()}
    for fold in trained_run.plan(
        run_path, facts, None, cohort.table, cohort.scans, subjects="test"
    ):
        heatmap.draw_weights(args, cohort, fold, model, CPU)
        drawn = {name: value.clone() for name, value in model.state_dict().items()}
        devices.seed_everything(0, fold.number, 0)
        at_start = models.build_model("modelT8", SHAPE).state_dict()
        n_compared = 0
        for other in (at_start, trained_tensors(run_path, fold.number)):
            for name, value in drawn.items():
                if name.endswith("weight") and value.numel() >= 100:
                    pair = torch.stack([value.flatten(), other[name].flatten()])
                    assert abs(torch.corrcoef(pair)[0, 1]) < 4 / value.numel() ** 0.5, name
                    n_compared += 1
        assert n_compared == 2 * 5
        assert model.features[1].momentum == 0.1 and not model.training


def test_statistics_of_untrained_networks_are_cumulative_averages(cohort_csv, run_path, tmp_path):
    cohort = dataset.read_cohort(cohort_csv)
    args = heatmap.parse_args(explain_arguments(cohort_csv, run_path, tmp_path, "--randomize"))
    facts = {"model": "modelT8", "volume_shape": list(SHAPE), "affine": AFFINE.tolist()}
    fold = trained_run.plan(run_path, facts, None, cohort.table, cohort.scans, subjects="test")[0]
    model = models.build_model("modelT8", SHAPE).eval()
    heatmap.draw_weights(args, cohort, fold, model, CPU)
    batches = cohort.volumes(None, 1).batches(fold.train_rows, 4, CPU)
    with torch.no_grad():
        outputs = [model.features[0](volumes) for volumes, _ in batches]
    means = torch.stack([output.mean((0, 2, 3, 4)) for output in outputs]).mean(0)
    torch.testing.assert_close(model.features[1].running_mean, means, rtol=1e-4, atol=1e-6)
    assert model.features[1].num_batches_tracked == len(outputs) > 1


def predict_otherwise(modelpath: Path, fold: int, place: int, change: float) -> str:
    """Change the probability in a run's predictions of a fold's test scan; return its path."""
    table = pd.read_csv(modelpath / "predictions.csv")
    row = table.index[table["fold"] == fold][place]
    table.loc[row, "probability"] += change
    table.to_csv(modelpath / "predictions.csv", index=False)
    return table.loc[row, "path"]


@pytest.mark.parametrize("more", [(), ("--randomize",), ("--dry-run",)])
def test_scans_that_the_run_saw_otherwise_are_refused(
    cohort_csv, modelpath, tmp_path, refusal, more
):
    """As those of another cohort with the same names and labels: nothing is written."""
    path = predict_otherwise(modelpath, 1, 0, 0.012)
    arguments = explain_arguments(cohort_csv, modelpath, tmp_path / "maps", *more)
    message = refusal(heatmap, arguments)
    assert f"{path} is not the scan that fold 1 was tested on" in message


def test_rounding_in_training_is_no_other_scan(cohort_csv, modelpath, tmp_path):
    for fold in range(N_FOLDS):
        predict_otherwise(modelpath, fold, 0, 0.04)
    record = json.loads((modelpath / "run.json").read_text())
    record["arguments"]["precision"] = "bf16"
    files.write_json(modelpath / "run.json", record)
    explain(cohort_csv, modelpath, tmp_path / "maps", "--only-fold", "0")


def test_a_later_scan_of_another_cohort_enters_no_file(cohort_csv, modelpath, tmp_path, capsys):
    path = predict_otherwise(modelpath, 0, -1, -0.012)
    arguments = explain_arguments(cohort_csv, modelpath, tmp_path / "maps", "--save-subjects")
    assert exit_status(heatmap, arguments) == 2
    assert f"{path} is not the scan" in capsys.readouterr().err
    names = [path.name for path in (tmp_path / "maps").rglob("*.nii.gz")]
    assert names and not any(Path(path).name.split(".")[0] in name for name in names)
    assert not any("_map_f" in name for name in names)


def test_a_run_without_predictions_is_not_checked(cohort_csv, modelpath, tmp_path, caplog):
    predict_otherwise(modelpath, 0, 0, 0.5)
    for path in modelpath.glob("predictions*.csv"):
        path.unlink()
    caplog.set_level("INFO", logger="heatmaps")
    explain(cohort_csv, modelpath, tmp_path / "maps", "--only-fold", "0")
    assert "fold 0 has no predictions: its scans are not checked" in caplog.text


@pytest.mark.parametrize(
    ("shares", "named"),
    [
        ({0: 0.7, 1: 0.2, 2: 0.1}, ["fold 0 has 70 %"]),
        ({0: 0.6, 1: 0.3, 2: 0.1}, []),  # not twice an even share
        ({0: 0.45, 1: 0.25, 2: 0.1, 3: 0.1, 4: 0.1}, []),  # not above half
        ({0: 0.5, 1: 0.5, 2: 0.0}, ["fold 2 has 0 %"]),
    ],
)
def test_folds_that_speak_for_all_or_not_at_all_are_named(caplog, shares, named):
    mean_maps.warn_of("IG", pd.Series(0, index=list(shares)), shares, {"test"})
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == len(named)
    assert all(text in line for text, line in zip(named, lines, strict=True))


def test_maps_that_are_0_are_counted_and_named_by_fold(maps_path, caplog):
    for method in METHODS:
        table = pd.read_csv(maps_path / f"{method}_predictions.csv")
        n_zero = (table["map_sum"] == 0).groupby(table["fold"]).sum()
        sidecar = json.loads((maps_path / f"{method}_map_all.json").read_text())
        assert sidecar["zero_maps_per_fold"] == {str(f): n for f, n in n_zero.items()}
    mean_maps.warn_of("GGC", pd.Series({0: 3, 1: 0, 2: 1}), {0: 0.3, 1: 0.3, 2: 0.4}, {"test"})
    assert caplog.text.count("WARNING") == 1 and ": 3 of fold 0, 1 of fold 2" in caplog.text


def test_all_subjects_of_the_training_cohort_are_not_held_out(
    cohort_csv, run_path, tmp_path, caplog
):
    explain(cohort_csv, run_path, tmp_path, "--subjects", "all")
    table = pd.read_csv(tmp_path / "GGC_predictions.csv")
    splits = pd.read_csv(run_path / "splits.csv").set_index("path")
    expected = [
        splits.loc[p, f"fold_{f}"] for p, f in zip(table["path"], table["fold"], strict=True)
    ]
    assert table["part"].tolist() == expected
    assert json.loads((tmp_path / "GGC_map_all.json").read_text())["held_out"] is False
    assert "not all explained scans were held out" in caplog.text


def test_equal_mean_only_puts_together_again(cohort_csv, run_path, tmp_path):
    explain(cohort_csv, run_path, tmp_path, "--method", "IG")
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("IG_map_f*.nii.gz")}
    plain = load(tmp_path / "IG_map_all.nii.gz")
    explain(cohort_csv, run_path, tmp_path, "--method", "IG", "--mean", "equal")
    assert before == {p: p.stat().st_mtime_ns for p in before}
    inside = load(tmp_path / "coverage.nii.gz") >= 0.5
    folds = [load(path) for path in sorted(before)]
    roots = [np.sqrt(np.square(data[inside]).sum()) for data in folds]
    expected = np.mean([np.mean(roots) / r * d for r, d in zip(roots, folds, strict=True)], 0)
    found = load(tmp_path / "IG_map_all.nii.gz")
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    assert np.abs(found - plain).max() > 1e-3 * np.abs(plain).max()
    shares = json.loads((tmp_path / "IG_map_all.json").read_text())["power_share_per_fold"]
    assert sum(shares.values()) == pytest.approx(1, abs=1e-3)
    assert shares["0"] == pytest.approx(roots[0] ** 2 / sum(r**2 for r in roots), abs=1e-4)


def test_coverage_is_the_share_of_scans_that_are_not_0(cohort_csv, run_path, tmp_path):
    explain(cohort_csv, run_path, tmp_path)
    volumes = dataset.read_cohort(cohort_csv).volumes(None, 1)
    expected = np.mean([volumes[row] != 0 for row in range(len(volumes))], 0)
    np.testing.assert_allclose(load(tmp_path / "coverage.nii.gz"), expected, atol=1e-6)
