"""Training: what it writes, what it keeps, when it stops, that it repeats and goes on."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import N_FOLDS, N_SCANS, SHAPE, stop_at_call, train_arguments
from sklearn.metrics import roc_auc_score

import checkpoints
import dataset
import devices
import metrics
import models
import scan_files
import teams
import train_cv
import utils

SCRIPT = Path(train_cv.__file__)
TIMED = {"run.json", "train_cv.log"}  # hold times, or paths


def train(csv_path: Path, outpath: Path, *more: str) -> None:
    train_cv.main(train_cv.parse_args(train_arguments(csv_path, outpath, *more)))


def contents(outpath: Path) -> dict[str, bytes]:
    """Return every file's bytes, times left out."""
    found = {p.name: p.read_bytes() for p in outpath.iterdir() if p.is_file()}
    found = {name: content for name, content in found.items() if name not in TIMED}
    for name in found:
        if name.startswith("history"):
            found[name] = pd.read_csv(outpath / name).drop(columns="seconds").to_csv().encode()
    return found


def test_output_tree(run_path):
    per_fold = [
        name.format(fold)
        for fold in range(N_FOLDS)
        for name in (
            "state_dict_f{}.pth", "train_loss_f{}.npy", "valid_loss_f{}.npy", "history_f{}.csv",
            "predictions_f{}.csv",
        )
    ]  # fmt: skip
    common = [
        "run.json", "splits.csv", "predictions.csv", "metrics.csv", "loss_curves.png", "roc.png",
        "train_cv.log", ".locks",
    ]  # fmt: skip
    assert sorted(p.name for p in run_path.iterdir()) == sorted(per_fold + common)


def test_run_record(run_path):
    run = json.loads((run_path / "run.json").read_text())
    assert run["volume_shape"] == list(SHAPE)
    assert run["arguments"]["lr"] == 1e-3
    assert run["versions"]["torch"] == version("torch")
    assert run["start"] <= run["end"]


def test_losses_and_history_agree(run_path):
    history = pd.read_csv(run_path / "history_f1.csv")
    losses = np.load(run_path / "valid_loss_f1.npy")
    assert losses.dtype == np.float64
    assert losses == pytest.approx(history["valid_loss"].to_numpy())
    assert list(history["epoch"]) == [1, 2]


def test_every_scan_is_predicted_once_by_the_fold_that_held_it_out(run_path):
    predictions = pd.read_csv(run_path / "predictions.csv")
    splits = pd.read_csv(run_path / "splits.csv")
    assert list(predictions["path"]) == list(splits["path"])
    assert len(predictions) == N_SCANS
    for row, split in zip(predictions.itertuples(), splits.to_dict("records"), strict=True):
        assert split[f"fold_{row.fold}"] == "test"
    assert ((predictions["probability"] > 0.5) == (predictions["predicted"] == 1)).all()


def test_metrics_are_those_of_the_predictions(run_path):
    predictions = pd.read_csv(run_path / "predictions.csv")
    pooled = pd.read_csv(run_path / "metrics.csv").set_index("fold").loc["pooled"]
    assert pooled["n"] == N_SCANS
    assert pooled["roc_auc"] == pytest.approx(
        roc_auc_score(predictions["label"], predictions["probability"])
    )


def test_saved_weights_are_the_best_epochs(run_path, cohort_csv):
    """They give the lowest validation loss of the history, and the predictions, when loaded."""
    cohort = dataset.read_cohort(cohort_csv)
    splits = pd.read_csv(run_path / "splits.csv")
    model = models.build_model("modelT8", SHAPE).eval()
    weights = torch.load(run_path / "state_dict_f0.pth", weights_only=True)
    assert all(weight.is_contiguous() for weight in weights.values())
    model.load_state_dict(weights)

    def logits_of(part):
        rows = np.flatnonzero(splits["fold_0"] == part)
        volumes = [scan_files.load_volume(cohort.table["file"][r])[0][None].copy() for r in rows]
        with torch.no_grad():
            return rows, model(torch.from_numpy(np.stack(volumes)))

    rows, logits = logits_of("val")
    loss = torch.nn.functional.cross_entropy(
        logits, torch.tensor(cohort.table["label"][rows].to_numpy())
    )
    assert float(loss) == pytest.approx(np.load(run_path / "valid_loss_f0.npy").min(), rel=1e-5)
    rows, logits = logits_of("test")
    expected = pd.read_csv(run_path / "predictions.csv")["probability"][rows]
    assert torch.softmax(logits, 1)[:, 1].numpy() == pytest.approx(expected.to_numpy(), rel=1e-5)


def test_a_run_repeated_gives_identical_files(run_path, cohort_csv, tmp_path):
    train(cohort_csv, tmp_path)
    assert contents(tmp_path) == contents(run_path)


def test_another_seed_gives_another_run(run_path, cohort_csv, tmp_path):
    train(cohort_csv, tmp_path, "--seed", "1")
    assert contents(tmp_path)["splits.csv"] != contents(run_path)["splits.csv"]


@pytest.mark.parametrize("n_epochs_done", [1, 2, 3])
def test_an_interrupted_run_goes_on_and_ends_the_same(
    run_path, cohort_csv, tmp_path, monkeypatch, n_epochs_done
):
    """Stopped before the first checkpoint, between epochs, and between folds."""
    n_logged = 0

    def stop_after(*_):
        nonlocal n_logged
        n_logged += 1
        if n_logged == n_epochs_done:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(train_cv, "log_epoch", stop_after)
        train(cohort_csv, tmp_path)
    assert not (tmp_path / "metrics.csv").exists()
    train(cohort_csv, tmp_path)
    assert contents(tmp_path) == contents(run_path)


def test_an_interrupted_bf16_run_goes_on(cohort_csv, tmp_path, monkeypatch):
    """Moments and weights are float32 in between, too."""
    args = ("--precision", "bf16")
    train(cohort_csv, tmp_path / "whole", *args)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(train_cv, "log_epoch", stop_at_call(2, train_cv.log_epoch))
        train(cohort_csv, tmp_path / "parts", *args)
    train(cohort_csv, tmp_path / "parts", *args)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_a_finished_run_is_not_trained_again(run_path, cohort_csv, tmp_path, monkeypatch):
    train(cohort_csv, tmp_path)
    monkeypatch.setattr(train_cv, "train_fold", None)
    train(cohort_csv, tmp_path)
    assert contents(tmp_path) == contents(run_path)


def test_overwrite_starts_anew(run_path, cohort_csv, tmp_path):
    train(cohort_csv, tmp_path, "--seed", "1")
    train(cohort_csv, tmp_path, "--overwrite")
    assert contents(tmp_path) == contents(run_path)


@pytest.mark.parametrize(
    ("losses", "patience", "delta", "n_epochs", "best_epoch"),
    [
        ([3, 2, 1, 4, 5, 6, 7], 2, 0, 5, 3),
        ([3, 2, 2, 1, 1, 1, 1], 2, 0, 6, 4),  # equal is not better
        ([5, 6, 7, 1], 2, 0, 3, 1),  # the first epoch can be the best
        ([3, 2.9, 2.8, 2.7, 2.6], 3, 0.25, 5, 4),  # 2.7 < 3 − 0.25
        ([3, 2, 1], 9, 0, 3, 3),  # --epochs ends it
    ],
)
def test_early_stopping(
    cohort_csv, tmp_path, monkeypatch, losses, patience, delta, n_epochs, best_epoch
):
    """Fed with given validation losses, a fold stops and keeps its weights when it should."""
    weights_after = []

    def given_loss(model, loader, device, team, fold, epoch):
        weights_after.append({k: v.clone() for k, v in model.state_dict().items()})
        return losses[epoch - 1], 0.5

    monkeypatch.setattr(train_cv, "validate", given_loss)
    args = train_cv.parse_args(
        train_arguments(cohort_csv, tmp_path, "--patience", str(patience), "--delta", str(delta),
                        "--epochs", str(len(losses)))
    )  # fmt: skip
    cohort = dataset.read_cohort(cohort_csv)
    parts = pd.Series(["train", "train", "val", "test"] * (N_SCANS // 4))
    train_cv.train_fold(args, cohort, parts, 0, torch.device("cpu"), None, teams.Team())
    assert len(np.load(tmp_path / "valid_loss_f0.npy")) == n_epochs
    saved = checkpoints.load(tmp_path / "state_dict_f0.pth")
    expected = weights_after[best_epoch - 1]
    assert all(torch.equal(saved[key], expected[key]) for key in expected)


def test_train_loss_is_the_mean_per_scan():
    """A smaller last batch counts by its scans."""
    losses = torch.tensor([1.0, 2.0, 7.0])
    assert metrics.mean_loss(losses, 7, 3, 0, 1) == pytest.approx((3 * 1 + 3 * 2 + 7) / 7)


def test_a_loss_that_is_not_finite_stops_the_run(cohort_csv, tmp_path, capsys):
    args = train_cv.parse_args(train_arguments(cohort_csv, tmp_path, "--lr", "1e30"))
    assert utils.run_script(train_cv.main, args) == 1
    assert "not finite in fold 0, epoch 1" in capsys.readouterr().err
    assert not (tmp_path / "state_dict_f0.pth").exists()


def test_a_validation_loss_that_is_not_finite_names_the_scan(
    cohort_csv, tmp_path, capsys, monkeypatch
):
    predict = train_cv.predict

    def spoil_one(*args):
        logits, labels, rows = predict(*args)
        logits[1:, 0] = np.nan
        return logits, labels, rows

    monkeypatch.setattr(train_cv, "predict", spoil_one)
    args = train_cv.parse_args(train_arguments(cohort_csv, tmp_path))
    assert utils.run_script(train_cv.main, args) == 1
    splits = pd.read_csv(tmp_path / "splits.csv")
    path = splits["path"][splits["fold_0"] == "val"].iloc[1]
    expected = f"in fold 0, epoch 1: the network's output for {cohort_csv.parent / path} is not"
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("more", [(), ("--no-cache",)])
def test_two_workers_change_nothing(run_path, cohort_csv, tmp_path, more):
    train(cohort_csv, tmp_path, "--workers", "2", *more)
    assert contents(tmp_path) == contents(run_path)


def test_tf32_is_fp32_on_a_cpu(run_path, cohort_csv, tmp_path):
    train(cohort_csv, tmp_path, "--precision", "tf32")
    assert contents(tmp_path) == contents(run_path)


def test_bf16_is_near_fp32_and_saves_float32(run_path, cohort_csv, tmp_path):
    train(cohort_csv, tmp_path, "--precision", "bf16")
    losses, exact = (np.load(path / "train_loss_f0.npy") for path in (tmp_path, run_path))
    assert losses == pytest.approx(exact, rel=0.02)
    assert (losses != exact).all()
    weights = checkpoints.load(tmp_path / "state_dict_f0.pth")
    assert all(w.dtype == torch.float32 for w in weights.values() if w.is_floating_point())


@pytest.mark.parametrize(
    ("name", "expected"), [("tf32", "tf32"), ("fp32", "ieee"), ("bf16", "ieee")]
)
def test_precision_of_float32_on_a_gpu(name, expected):
    devices.set_precision(name)
    assert torch.backends.cuda.matmul.fp32_precision == expected
    assert torch.backends.cudnn.conv.fp32_precision == expected


def test_subject_column(tmp_path):
    """A third column reaches splits.csv, and no subject is split."""
    from conftest import write_cohort

    csv_path = write_cohort(tmp_path / "cohort", columns=("path", "label", "subject"))
    train(csv_path, tmp_path / "run")
    splits = pd.read_csv(tmp_path / "run" / "splits.csv")
    assert (splits.groupby("subject")["fold_0"].nunique() == 1).all()


def test_help_names_every_option_with_its_default():
    shown = subprocess.run(
        [sys.executable, SCRIPT, "-h"], capture_output=True, text=True, check=True
    )
    for option, default in {
        "--batch": "5", "--fold": "5", "--lr": "0.0001", "--wd": "0.0001", "--epochs": "200",
        "--patience": "10", "--delta": "0", "--val-fraction": "0.2", "--seed": "0",
    }.items():  # fmt: skip
        text = " ".join(shown.stdout.split(f"  {option} ")[-1].split())
        assert f"(default: {default}" in text.split(" --")[0], option
