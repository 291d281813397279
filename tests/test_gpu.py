"""The scripts on a GPU, or on a pretended one: the same results as on a CPU."""

import copy
import json
import re
import shutil

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import N_FOLDS, explain, explain_arguments, train_arguments
from processes import finish, significant, start
from torch.nn.functional import cross_entropy

import models
import predict
from run_folder import device as devices

IS_REAL = torch.cuda.is_available()
PRETEND = "tests/pretend_cuda.py"
LARGE = (113, 115, 117)
METHODS = ("LRP", "IG", "GGC", "SG")
TOLERANCE = 1e-3 if IS_REAL else 1e-5  # of a map's maximum


def start_on_gpu(script: str, arguments: list, n_gpus: int = 1, launcher: tuple = ()):
    """Start a script with the first GPU instead of the CPU."""
    where = arguments.index("--device")
    arguments = [*arguments[:where], *arguments[where + 2 :]]
    if not launcher:
        arguments += ["--device", "0"]
    if IS_REAL:
        return start(script, *arguments, launcher=launcher)
    return start(PRETEND, n_gpus, script, *arguments, launcher=launcher)


def train(csv_path, outpath, *more):
    """Train on the GPU; return stdout and stderr."""
    return finish(start_on_gpu("train_cv.py", train_arguments(csv_path, outpath, *more)))


@pytest.fixture(scope="module")
def gpu_run(cohort_csv, tmp_path_factory):
    """Return a run that was trained on the GPU."""
    outpath = tmp_path_factory.mktemp("gpu") / "run"
    train(cohort_csv, outpath)
    return outpath


@pytest.mark.parametrize("precision", [(), ("--precision", "bf16")], ids=["fp32", "bf16"])
def test_training(cohort_csv, run_path, gpu_run, tmp_path, precision):
    """Losses as on the CPU, where it is exact; scans are copied to the GPU once."""
    outpath = gpu_run
    if precision:
        outpath = tmp_path / "run"
        train(cohort_csv, outpath, *precision)
    found, expected = (pd.read_csv(p / "history_f0.csv") for p in (outpath, run_path))
    for name in ("train_loss", "valid_loss"):
        losses = found[name].to_numpy()
        assert np.isfinite(losses).all()
        if not IS_REAL:  # a GPU draws other units for dropout
            tolerance = 2e-2 if precision else 1e-3
            assert losses == pytest.approx(expected[name].to_numpy(), abs=tolerance)
    record = json.loads((outpath / "run.json").read_text())
    assert record["device"].startswith("cuda:0 (") and {"cudnn", "driver"} <= set(record["gpu"])
    weights = torch.load(outpath / "state_dict_f0.pth", weights_only=True)
    assert all(weight.device.type == "cpu" for weight in weights.values())


@pytest.mark.skipif(not IS_REAL, reason="there is no GPU here")
@pytest.mark.parametrize("name", ["modelA24", "modelB24", "modelC24", "modelD24", "modelT8"])
def test_steps_are_the_cpus(monkeypatch, name):
    """Without dropout, in exact arithmetic; and a GPU repeats them to the bit."""
    monkeypatch.setattr(models, "DROPOUT", 0.0)
    devices.find_device("0")
    devices.set_precision("fp32")
    torch.manual_seed(0)
    fresh, volumes = models.build_model(name, LARGE), torch.rand(4, 1, *LARGE)
    weights = []
    for device in ("cpu", "cuda", "cuda"):
        model = copy.deepcopy(fresh).to(device, memory_format=torch.channels_last_3d).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            labels = torch.arange(4, device=device) % 2
            cross_entropy(model(volumes.to(device)), labels).backward()
            optimizer.step()
        weights.append([parameter.detach().cpu() for parameter in model.parameters()])
    for expected, found, again in zip(*weights, strict=True):
        assert abs(found - expected).max() <= 1e-3 * abs(expected).max()
        assert torch.equal(found, again)


def test_a_run_repeats_and_resumes(cohort_csv, gpu_run, tmp_path):
    """Of the second run one fold comes first; it ends with the same bits."""
    shown, _ = train(cohort_csv, tmp_path / "run", "--dry-run")
    assert re.search(r"[\d.]+ GB; besides, 0\.000956 GB of scans stay on the GPU", shown)
    assert not (tmp_path / "run").exists()
    train(cohort_csv, tmp_path / "run", "--only-fold", "1")
    train(cohort_csv, tmp_path / "run")
    found, expected = significant(tmp_path / "run"), significant(gpu_run)
    differing = {name for name in expected if found[name] != expected[name]}
    assert not {name for name in differing if name.endswith((".csv", ".pth", ".npy"))}


def test_scans_that_are_decoded_in_every_epoch_train_alike(cohort_csv, gpu_run, tmp_path):
    train(cohort_csv, tmp_path / "run", "--no-cache")
    for fold in range(N_FOLDS):
        found, expected = (
            np.load(path / f"valid_loss_f{fold}.npy") for path in (tmp_path / "run", gpu_run)
        )
        assert found == pytest.approx(expected, rel=1e-6)


def test_a_run_of_the_cpu_resumes_with_a_warning(cohort_csv, run_path, tmp_path):
    shutil.copytree(run_path, tmp_path / "run")
    for name in ("predictions_f1.csv", "state_dict_f1.pth"):
        (tmp_path / "run" / name).unlink()
    _, messages = train(cohort_csv, tmp_path / "run")
    assert re.search(r"the run was begun on cpu .*, and goes on on cuda:0", messages)


@pytest.mark.parametrize("batch", [pytest.param("1", marks=pytest.mark.slow), "3"])
def test_maps(cohort_csv, run_path, tmp_path, batch):
    """Of every method, per fold and per scan, as the CPU makes them."""
    more = (
        "--method",
        *METHODS,
        "--steps",
        "4",
        "--save-subjects",
        *(["--by-outcome"] if batch == "1" else []),
        "--cam",
        "seen",
    )
    explain(cohort_csv, run_path, tmp_path / "cpu", *more)
    arguments = explain_arguments(cohort_csv, run_path, tmp_path / "gpu", *more, "--batch", batch)
    finish(start_on_gpu("heatmap.py", [*arguments, "--dry-run"]))
    assert not (tmp_path / "gpu").exists()
    finish(start_on_gpu("heatmap.py", [*arguments, "--only-fold", "0"]))
    finish(start_on_gpu("heatmap.py", arguments))
    paths = [path.relative_to(tmp_path / "cpu") for path in (tmp_path / "cpu").rglob("*.nii.gz")]
    assert len(paths) > 3 * 16
    for path in paths:
        found, expected = (nib.load(tmp_path / d / path).get_fdata() for d in ("gpu", "cpu"))
        assert abs(found - expected).max() <= TOLERANCE * abs(expected).max(), path
    controls = explain_arguments(cohort_csv, run_path, tmp_path / "gpu", *more[:4], "--randomize")
    finish(start_on_gpu("heatmap.py", controls))


def test_predictions_are_the_cpus(cohort_csv, run_path, tmp_path):
    """Of the trained scans, which are at hand."""
    arguments = ["--path", cohort_csv, "--modelpath", run_path, "--model", "modelT8",
                 "--allow-trained", "--device", "cpu", "--outpath"]  # fmt: skip
    predict.main(predict.parse_args(list(map(str, [*arguments, tmp_path / "cpu"]))))
    finish(start_on_gpu("predict.py", [*arguments, tmp_path / "gpu"]))
    found = [pd.read_csv(tmp_path / name / "predictions.csv") for name in ("gpu", "cpu")]
    pd.testing.assert_frame_equal(*found, atol=TOLERANCE)


@pytest.mark.skipif(IS_REAL, reason="this host has as many GPUs as it has")
def test_more_processes_than_gpus_are_told_at_once(cohort_csv, tmp_path):
    """In one sentence, before anybody waits for anybody."""
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", 3, "--rdzv-backend", "c10d",
                "--rdzv-endpoint", "localhost:0")  # fmt: skip
    arguments = train_arguments(cohort_csv, tmp_path / "run", "--fold", "3")
    process = start_on_gpu("train_cv.py", arguments, n_gpus=2, launcher=launcher)
    _, messages = process.communicate(timeout=60)
    assert process.returncode != 0 and not (tmp_path / "run").exists()
    assert messages.count("error: this host has 2 GPUs, and 3 processes") == 1
    assert re.search(r"exitcode *: 2 ", messages)
