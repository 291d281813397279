"""Training: what it writes, what it keeps, when it stops, that it repeats and resumes."""

import json
import zlib
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import (
    N_FOLDS,
    N_SCANS,
    SHAPE,
    exit_status,
    stop_at_call,
    train_arguments,
    write_cohort,
)
from scipy.special import softmax
from sklearn.metrics import roc_auc_score
from torch.nn.functional import cross_entropy

import dataset
import models
import train_cv
from reporting import metrics
from run_folder import checkpoints
from utils import RunError

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


def weights_of(outpath: Path, fold: int = 0) -> dict[str, torch.Tensor]:
    return torch.load(outpath / f"state_dict_f{fold}.pth", weights_only=True)


# What is written


def test_output_tree(run_path):
    names = {"run.json", "scans.csv", "cohort.png", "splits.csv", "predictions.csv", "metrics.csv",
             "loss_curves.png", "roc.png", "train_cv.log", ".locks"}  # fmt: skip
    for fold in range(N_FOLDS):
        names |= {f"state_dict_f{fold}.pth", f"history_f{fold}.csv", f"predictions_f{fold}.csv"}
        names |= {f"training_f{fold}.csv"}
        names |= {f"train_loss_f{fold}.npy", f"valid_loss_f{fold}.npy"}
    assert {path.name for path in run_path.iterdir()} == names


def test_run_record(run_path):
    run = json.loads((run_path / "run.json").read_text())
    assert run["volume_shape"] == list(SHAPE) and run["n_folds"] == N_FOLDS
    assert run["arguments"]["lr"] == 1e-3 and run["versions"]["torch"] == version("torch")
    assert run["start"] <= run["end"]


def test_losses_and_history_agree(run_path):
    history = pd.read_csv(run_path / "history_f1.csv")
    assert list(history["epoch"]) == [1, 2]
    for name in ("train_loss", "valid_loss"):
        losses = np.load(run_path / f"{name}_f1.npy")
        assert losses.dtype == np.float64
        assert losses == pytest.approx(history[name].to_numpy())


def test_each_scan_is_predicted_by_the_fold_that_held_it_out(run_path):
    predictions = pd.read_csv(run_path / "predictions.csv")
    splits = pd.read_csv(run_path / "splits.csv")
    assert list(predictions["path"]) == list(splits["path"]) and len(predictions) == N_SCANS
    for row, split in zip(predictions.itertuples(), splits.to_dict("records"), strict=True):
        assert split[f"fold_{row.fold}"] == "test"
    assert ((predictions["probability"] > 0.5) == (predictions["predicted"] == 1)).all()
    pooled = pd.read_csv(run_path / "metrics.csv").set_index("fold").loc["pooled"]
    expected = roc_auc_score(predictions["label"], predictions["probability"])
    assert pooled["n"] == N_SCANS and pooled["roc_auc"] == pytest.approx(expected)


def test_saved_weights_are_the_best_epochs(run_path, cohort_csv):
    """They give the lowest validation loss of the history, and the predictions, when loaded."""
    cohort = dataset.read_cohort(cohort_csv)
    volumes, parts = cohort.volumes(None, 0), pd.read_csv(run_path / "splits.csv")["fold_0"]
    assert all(weight.is_contiguous() for weight in weights_of(run_path).values())
    model = models.build_model("modelT8", SHAPE)
    model.load_state_dict(weights_of(run_path))
    val, test = (np.flatnonzero(parts == part) for part in ("val", "test"))
    logits = train_cv.predict(model, volumes, val, 4, torch.device("cpu"))
    loss = float(cross_entropy(torch.tensor(logits), torch.tensor(cohort.labels[val])))
    assert loss == pytest.approx(np.load(run_path / "valid_loss_f0.npy").min(), rel=1e-5)
    logits = train_cv.predict(model, volumes, test, 4, torch.device("cpu"))
    expected = pd.read_csv(run_path / "predictions.csv")["probability"][test]
    assert softmax(logits, axis=1)[:, 1] == pytest.approx(expected.to_numpy(), rel=1e-5)


def test_subject_column_reaches_splits(tmp_path):
    csv_path = write_cohort(tmp_path / "cohort", columns=("path", "label", "subject"))
    train(csv_path, tmp_path / "run", "--epochs", "1")
    splits = pd.read_csv(tmp_path / "run" / "splits.csv")
    assert splits["subject"].nunique() == 10
    parts = splits["fold_0"] + splits["fold_1"]
    assert (parts.groupby(splits["subject"]).nunique() == 1).all()


# Repeated, interrupted, resumed


@pytest.mark.parametrize(
    "more",
    [("--workers", "2"), ("--workers", "2", "--no-cache"), ("--precision", "tf32")],
    ids=["cached", "no cache", "tf32 on a CPU"],
)
def test_a_run_repeated_gives_identical_files(run_path, cohort_csv, tmp_path, more):
    train(cohort_csv, tmp_path, *more)
    assert contents(tmp_path) == contents(run_path)


def test_overwrite_starts_anew_and_another_seed_is_another_run(run_path, cohort_csv, tmp_path):
    train(cohort_csv, tmp_path, "--seed", "1")
    assert contents(tmp_path)["splits.csv"] != contents(run_path)["splits.csv"]
    assert contents(tmp_path)["state_dict_f0.pth"] != contents(run_path)["state_dict_f0.pth"]
    train(cohort_csv, tmp_path, "--overwrite")
    assert contents(tmp_path) == contents(run_path)


@pytest.mark.parametrize("n_saved", [1, 2, 4], ids=["before", "between epochs", "between folds"])
def test_an_interrupted_run_resumes_with_the_same_files(
    run_path, cohort_csv, tmp_path, monkeypatch, n_saved
):
    """Stopped at the first checkpoint, at the second, and at the second fold's first."""
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(torch, "save", stop_at_call(n_saved, torch.save))
        train(cohort_csv, tmp_path)
    assert not (tmp_path / "metrics.csv").exists()
    train(cohort_csv, tmp_path)
    assert contents(tmp_path) == contents(run_path)
    with monkeypatch.context() as patched:  # a finished run is not trained again
        patched.setattr(torch, "save", stop_at_call(1, torch.save))
        train(cohort_csv, tmp_path)


def test_bf16_is_near_fp32_resumes_and_saves_float32(run_path, cohort_csv, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(cohort_csv, whole, "--precision", "bf16")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(torch, "save", stop_at_call(2, torch.save))
        train(cohort_csv, parts, "--precision", "bf16")
    train(cohort_csv, parts, "--precision", "bf16")
    assert contents(parts) == contents(whole)
    losses, exact = (np.load(path / "train_loss_f0.npy") for path in (whole, run_path))
    assert losses == pytest.approx(exact, rel=0.02) and (losses != exact).all()
    weights = weights_of(whole).values()
    assert all(w.dtype == torch.float32 for w in weights if w.is_floating_point())


# When a fold stops


def test_early_stopping_keeps_the_best_epochs_weights(cohort_csv, tmp_path):
    """With a delta that no epoch reaches the first one is the best."""
    train(cohort_csv, tmp_path / "one", "--epochs", "1", "--only-fold", "0")
    more = ("--epochs", "9", "--delta", "10", "--patience", "2", "--only-fold", "0")
    train(cohort_csv, tmp_path / "three", *more)
    assert len(np.load(tmp_path / "three" / "valid_loss_f0.npy")) == 3
    kept, expected = weights_of(tmp_path / "three"), weights_of(tmp_path / "one")
    assert all(torch.equal(kept[key], expected[key]) for key in expected)


def test_a_training_loss_that_is_not_finite_stops_the_run(cohort_csv, tmp_path, capsys):
    assert exit_status(train_cv, train_arguments(cohort_csv, tmp_path, "--lr", "1e30")) == 1
    assert "not finite in fold 0 epoch 1/2" in capsys.readouterr().err
    assert not (tmp_path / "state_dict_f0.pth").exists()


def test_a_validation_loss_that_is_not_finite_names_the_epoch():
    logits = np.array([[0.0, 1], [np.nan, 0]])
    with pytest.raises(RunError, match="fold 2, epoch 3"):
        metrics.of_validation(logits, np.array([0, 1]), "fold 2, epoch 3")


# Folds that have not learned


def test_a_fold_that_has_not_learned_begins_anew(cohort_csv, tmp_path, caplog):
    """The first draw's weights are those without restarts; the kept one is in all tables."""
    slow = ("--lr", "1e-9", "--only-fold", "0")
    train(cohort_csv, tmp_path / "one", *slow)
    caplog.clear()
    train(cohort_csv, tmp_path / "run", *slow, "--restarts", "2")
    assert len([m for m in caplog.messages if "fold 0 has not learned: the loss" in m]) == 3
    draws = pd.read_csv(tmp_path / "run" / "training_f0.csv")
    assert draws["draw"].tolist() == [0, 1, 2] and draws["learned"].tolist() == [0, 0, 0]
    assert draws["valid_loss"].nunique() == 3 and draws["train_loss_kept"].nunique() == 3
    kept = draws["valid_loss"].idxmin()
    assert draws["kept"].tolist() == [int(i == kept) for i in range(3)]
    history = pd.read_csv(tmp_path / "run" / "history_f0.csv")
    assert history["valid_loss"].min() == pytest.approx(draws["valid_loss"].min())
    (first,) = pd.read_csv(tmp_path / "one" / "training_f0.csv").to_dict("records")
    assert first | {"kept": 0} == draws.iloc[0].to_dict() | {"kept": 0}


def test_a_fold_that_learns_does_not_begin_anew(cohort_csv, tmp_path):
    """Its loss is the mean over its training scans, by its kept weights."""
    train(cohort_csv, tmp_path, "--only-fold", "0", "--restarts", "2", "--lr", "1e-2",
          "--epochs", "12", "--patience", "12")  # fmt: skip
    (draw,) = pd.read_csv(tmp_path / "training_f0.csv").to_dict("records")
    cohort = dataset.read_cohort(cohort_csv)
    model = models.build_model("modelT8", SHAPE)
    model.load_state_dict(weights_of(tmp_path))
    rows = np.flatnonzero(pd.read_csv(tmp_path / "splits.csv")["fold_0"] == "train")
    logits = train_cv.predict(model, cohort.volumes(None, 0), rows, 4, torch.device("cpu"))
    labels = torch.tensor(cohort.labels[rows])
    expected = float(cross_entropy(torch.tensor(logits), labels))
    assert draw["train_loss_kept"] == pytest.approx(expected, rel=1e-5)
    shares = np.bincount(labels) / len(labels)
    assert draw["label_entropy"] == pytest.approx(-(shares * np.log(shares)).sum())
    assert draw["learned"] == 1 and draw["train_loss_kept"] < 0.95 * draw["label_entropy"]


def test_killed_within_a_restart_it_ends_the_same(cohort_csv, tmp_path, monkeypatch):
    options = ("--lr", "1e-9", "--only-fold", "0", "--restarts", "2")
    train(cohort_csv, tmp_path / "whole", *options)
    n_saved, save = [], checkpoints.save

    def save_and_stop(*arguments) -> None:
        save(*arguments)
        n_saved.append(1)
        if len(n_saved) == 3:  # the first epoch of the first restart
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        train(cohort_csv, tmp_path / "killed", *options)
    assert not (tmp_path / "killed" / "training_f0.csv").exists()
    train(cohort_csv, tmp_path / "killed", *options)
    found, expected = contents(tmp_path / "killed"), contents(tmp_path / "whole")
    assert found.keys() == expected.keys()
    compared = [name for name in found if not name.endswith((".png", ".log"))]
    assert not [name for name in compared if found[name] != expected[name]]


def test_another_number_of_restarts_is_refused(run_path, cohort_csv, tmp_path, refusal):
    arguments = train_arguments(cohort_csv, run_path, "--restarts", "2")
    assert "--restarts 2 (the run has 0)" in refusal(train_cv, arguments)
    arguments = train_arguments(cohort_csv, tmp_path, "--restarts", "-1")
    assert "--restarts: must be at least 0" in refusal(train_cv, arguments)


def test_the_run_ends_with_its_finding_and_the_next_command(cohort_csv, tmp_path, capsys):
    train(cohort_csv, tmp_path, "--lr", "1e-9")
    *_, finding, folder, following = capsys.readouterr().out.splitlines()
    assert finding.startswith("ROC AUC 0.") and finding.endswith("Maps explain nothing.")
    assert "folds 0, 1 did not learn" in finding and folder == str(tmp_path)
    assert following.startswith(f"next: python3 heatmap.py --path {cohort_csv} --model modelT8")
    assert finding in (tmp_path / "train_cv.log").read_text()
    table = pd.read_csv(tmp_path / "metrics.csv", dtype=str).set_index("fold")
    assert table["learned"][["0", "1"]].tolist() == ["0", "0"]
    assert table["n"]["pooled"] == str(N_SCANS) and table["epoch"]["0"] in ("1", "2")


def test_defaults_are_the_papers_and_help_names_them(capsys):
    expected = {"batch": 5, "fold": 5, "lr": 1e-4, "wd": 1e-4, "epochs": 200, "patience": 10,
                "delta": 0, "val_fraction": 0.2, "seed": 0}  # fmt: skip
    args = train_cv.parse_args(["--path", "a", "--outpath", "b", "--model", "modelA24"])
    assert expected.items() <= vars(args).items()
    with pytest.raises(SystemExit):
        train_cv.parse_args(["-h"])
    shown = " ".join(capsys.readouterr().out.split())
    for name, value in expected.items():
        text = shown.split(f" --{name.replace('_', '-')} ")[-1]
        assert f"(default: {value}" in text.split(" --")[0], name


@pytest.mark.parametrize("more", [(), ("--no-cache",)])
def test_scans_that_were_trained_on_are_listed(cohort_csv, tmp_path, more):
    arguments = train_arguments(cohort_csv, tmp_path, "--only-fold", "0", "--epochs", "1", *more)
    train_cv.main(train_cv.parse_args(arguments))
    table = pd.read_csv(tmp_path / "scans.csv")
    cohort = dataset.read_cohort(cohort_csv)
    assert table["path"].tolist() == cohort.table["path"].tolist()
    assert table["bytes"].tolist() == [Path(scan).stat().st_size for scan in cohort.scans]
    volumes = cohort.volumes(None, 1)
    assert table["crc32"].tolist() == [zlib.crc32(volumes[i].tobytes()) for i in range(N_SCANS)]


# Covariates, and the cohort at a glance


def covariates_csv(cohort_csv, folder, **columns) -> str:
    """Return a CSV of the cohort's scans with a header and further columns."""
    table = pd.read_csv(cohort_csv, names=["path", "label"])
    table["path"] = [str(cohort_csv.parent / name) for name in table["path"]]
    table.assign(**columns).to_csv(folder / "data.csv", index=False)
    return str(folder / "data.csv")


def test_covariates_are_described_and_judged(cohort_csv, tmp_path, capsys):
    age = [60 + 20 * (i % 2) + i / 10 for i in range(N_SCANS)]
    csv_path = covariates_csv(cohort_csv, tmp_path, age=age, site=[*"ab"] * (N_SCANS // 2))
    argv = train_arguments(csv_path, tmp_path / "run", "--covariates", "age")
    train_cv.main(train_cv.parse_args([*argv, "--epochs", "1"]))
    assert "age alone, without any scan: ROC AUC 1.00" in capsys.readouterr().out
    found = pd.read_csv(tmp_path / "run" / "covariates.csv").set_index("fold")
    assert found.loc["mean", "roc_auc"] == 1
    table = pd.read_csv(tmp_path / "run" / "cohort.csv")
    assert set(table["covariate"]) == {"age"} and len(table) == 1 + N_FOLDS
    strata = pd.read_csv(tmp_path / "run" / "strata.csv")
    assert len(strata) == 3 and strata["roc_auc"].isna().all()  # fewer than ten of a class
    assert (tmp_path / "run" / "cohort.png").is_file()


@pytest.mark.parametrize(
    ("ages", "names", "message"),
    [
        (list(range(N_SCANS)), ["weight"], "no column is called that; the columns of"),
        ([70] * N_SCANS, ["age"], "--covariates age: it is 70 in all rows"),
        ([*range(N_SCANS - 2), "", "n/a"], ["age"], "row 16: age is missing"),
        ([*range(N_SCANS - 1), "inf"], ["age"], "row 17: age is a number in other rows, got 'inf'"),
        ([*range(N_SCANS - 1), "old"], ["age"], "row 17: age is a number in other rows, got 'old'"),
    ],
)
def test_covariates_at_fault(cohort_csv, tmp_path, refusal, ages, names, message):
    csv_path = covariates_csv(cohort_csv, tmp_path, age=ages)
    argv = train_arguments(csv_path, tmp_path / "run", "--covariates", *names)
    assert message in refusal(train_cv, argv)


def test_covariates_need_a_header(cohort_csv, tmp_path, refusal):
    argv = train_arguments(cohort_csv, tmp_path / "run", "--covariates", "age")
    assert "not named by a first row" in refusal(train_cv, argv)
