"""Several processes through torchrun: the same results as one process."""

import os
import shutil
import signal
import socket
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import N_FOLDS, N_SCANS, SHAPE, train_arguments
from processes import (
    finish,
    heatmap_arguments,
    ranks_of,
    significant,
    torchrun,
    wait_for,
)  # fmt: skip
from torch import distributed, multiprocessing, nn
from torch.utils.data import BatchSampler, SequentialSampler

import checkpoints
import loading
import models
import svm
import teams
from teams import Team

# Training


def test_two_processes_train_the_folds_of_one(cohort_csv, run_path, tmp_path):
    """Bit for bit; the metrics are printed once, the second process logs to a file of its own."""
    output, messages = finish(torchrun(2, "train_cv.py", *train_arguments(cohort_csv, tmp_path)))
    assert significant(tmp_path) == significant(run_path)
    assert output.count("pooled_low") == 1
    assert "[rank 0] fold 0 epoch   1" in messages and "[rank 1]" not in messages
    assert "[rank 1] INFO fold 1 epoch   1" in (tmp_path / "train_cv.rank1.log").read_text()
    assert not list(tmp_path.glob(".cache*"))


def losses_of(outpath: Path, fold: int) -> pd.DataFrame:
    """Return a fold's history but for times."""
    return pd.read_csv(outpath / f"history_f{fold}.csv").drop(columns="seconds")


def test_a_run_that_is_gone_on_with_by_more_processes_than_folds_are_left(
    cohort_csv, run_path, tmp_path
):
    """One of two folds is left to two processes: one of them trains it, bit for bit."""
    shutil.copytree(run_path, tmp_path, dirs_exist_ok=True)
    for path in [*tmp_path.glob("*_f1.*"), tmp_path / "metrics.csv", tmp_path / "predictions.csv"]:
        path.unlink()
    finish(torchrun(2, "train_cv.py", *train_arguments(cohort_csv, tmp_path)))
    assert significant(tmp_path) == significant(run_path)


@pytest.mark.slow
def test_only_fold_is_trained_by_all_processes(cohort_csv, run_path, tmp_path):
    """A team for the one fold, then for the other; whoever is last puts them together."""
    for fold, rtol in ((1, 1e-2), (0, 2e-5)):  # changing weights by 1e-5 moves fold 1 as far
        assert not (tmp_path / "metrics.csv").exists()
        arguments = train_arguments(cohort_csv, tmp_path, "--only-fold", str(fold))
        finish(torchrun(2, "train_cv.py", *arguments))
        np.testing.assert_allclose(losses_of(tmp_path, fold), losses_of(run_path, fold), rtol=rtol)
    assert significant(tmp_path).keys() == significant(run_path).keys()


@pytest.mark.slow
def test_a_team_that_is_killed_goes_on(cohort_csv, tmp_path):
    """The member that does not lead is killed; at the end, the losses of an uninterrupted team."""
    arguments = train_arguments(
        cohort_csv, tmp_path / "killed", "--only-fold", "0", "--epochs", "60", "--patience", "60"
    )
    with torchrun(2, "train_cv.py", *arguments) as process:
        wait_for((tmp_path / "killed" / "checkpoint_f0.pt").is_file, process)
        os.kill(ranks_of(process)[1], signal.SIGKILL)
        process.communicate(timeout=90)
    assert process.returncode == 1
    state = checkpoints.load(tmp_path / "killed" / "checkpoint_f0.pt")["state"]
    assert len(state["history"]) < 60
    finish(torchrun(2, "train_cv.py", *arguments))
    arguments[arguments.index(str(tmp_path / "killed"))] = str(tmp_path / "whole")
    finish(torchrun(2, "train_cv.py", *arguments))
    found, expected = (losses_of(tmp_path / folder, 0) for folder in ("killed", "whole"))
    assert list(found["epoch"]) == list(range(1, 61))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.slow
def test_three_processes_train_two_folds(cohort_csv, run_path, tmp_path):
    """Two of them train one fold together: the same losses but for rounding."""
    finish(torchrun(3, "train_cv.py", *train_arguments(cohort_csv, tmp_path)))
    assert significant(tmp_path)["splits.csv"] == significant(run_path)["splits.csv"]
    for fold in range(N_FOLDS):
        np.testing.assert_allclose(losses_of(tmp_path, fold), losses_of(run_path, fold), rtol=2e-5)
    assert (tmp_path / "train_loss_f1.npy").read_bytes() == (
        run_path / "train_loss_f1.npy"
    ).read_bytes()


@pytest.mark.slow
def test_a_killed_rank_brings_the_job_down_and_the_same_command_goes_on(
    cohort_csv, run_path, tmp_path
):
    arguments = train_arguments(cohort_csv, tmp_path)
    arguments[arguments.index("--epochs") + 1] = "200"
    long_arguments = [*arguments, "--patience", "200"]
    with torchrun(2, "train_cv.py", *long_arguments) as process:
        wait_for((tmp_path / "checkpoint_f1.pt").is_file, process)
        owner = (tmp_path / ".locks" / "run_fold_1.owner").read_text()
        os.kill(int(owner.split('"process": ')[1].rstrip("}")), signal.SIGKILL)
        process.communicate(timeout=90)
    assert process.returncode == 1
    n_epochs = len(checkpoints.load(tmp_path / "checkpoint_f1.pt")["state"]["history"])
    with torchrun(2, "train_cv.py", *long_arguments) as process:
        history_path = tmp_path / "history_f1.csv"
        finish(process)
    assert list(pd.read_csv(history_path)["epoch"]) == list(range(1, 201)) and n_epochs < 200


@pytest.mark.slow
def test_an_input_error_is_said_once(cohort_csv, tmp_path):
    arguments = train_arguments(cohort_csv, tmp_path, "--fold", "9")
    with torchrun(2, "train_cv.py", *arguments) as process:
        _, messages = process.communicate(timeout=90)
    assert process.returncode == 1  # torchrun's own
    assert messages.count("error: label 0 has 8 scans, fewer than the 9 folds") == 1
    assert not list(tmp_path.iterdir())


# Maps


@pytest.mark.parametrize(
    "n_processes", [2, pytest.param(3, marks=pytest.mark.slow)]
)  # fmt: skip
def test_processes_share_the_scans(cohort_csv, run_path, tmp_path, n_processes):
    """Eight scans a fold among two or three; each scan's map is written once."""
    for n in (1, n_processes):
        finish(
            torchrun(n, "heatmap.py", *heatmap_arguments(cohort_csv, run_path, tmp_path / str(n)))
        )
    alone, shared = tmp_path / "1", tmp_path / str(n_processes)
    table = pd.read_csv(shared / "LRP_predictions.csv")
    pd.testing.assert_frame_equal(table, pd.read_csv(alone / "LRP_predictions.csv"), rtol=1e-5)
    assert len(table) == N_SCANS and all((shared / name).is_file() for name in table["map"])
    for path in alone.glob("*.nii.gz"):
        expected, found = (nib.load(p).get_fdata() for p in (path, shared / path.name))
        assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()


@pytest.mark.slow
def test_killed_processes_that_share_scans_go_on(cohort_csv, run_path, tmp_path):
    """At the end, the very maps of scans that one process makes, each once."""
    more = ("--method", "IG", "--steps", "100")
    alone, shared = (
        heatmap_arguments(cohort_csv, run_path, tmp_path / name, *more) for name in ("1", "2")
    )
    with torchrun(2, "heatmap.py", *shared) as process:
        wait_for(lambda: len(list((tmp_path / "2" / "IG_subjects").glob("0*"))) >= 3, process)
        os.kill(ranks_of(process)[1], signal.SIGKILL)
        process.communicate(timeout=90)
    assert process.returncode == 1
    assert not (tmp_path / "2" / "IG_map_all.nii.gz").exists()
    finish(torchrun(2, "heatmap.py", *shared))
    finish(torchrun(1, "heatmap.py", *alone))
    names, expected_names = (
        {p.relative_to(folder) for p in folder.rglob("*.nii.gz")}
        for folder in (tmp_path / "2", tmp_path / "1")
    )
    assert names == expected_names
    assert len([name for name in names if name.parent.name == "IG_subjects"]) == N_SCANS
    for name in names:
        expected, found = (nib.load(tmp_path / n / name).get_fdata() for n in "12")
        assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()


@pytest.mark.slow
def test_more_processes_than_scans(cohort_csv, run_path, tmp_path):
    """Nine processes, eight scans a fold: one of them has nothing to do."""
    finish(torchrun(9, "heatmap.py", *heatmap_arguments(cohort_csv, run_path, tmp_path)))
    assert len(pd.read_csv(tmp_path / "LRP_predictions.csv")) == N_SCANS


@pytest.mark.slow
def test_processes_share_the_gram_matrix(cohort_csv, run_path, tmp_path):
    arguments = ["--path", cohort_csv, "--modelpath", run_path, "--workers", "0", "--outpath"]
    svm.main(svm.parse_args([*map(str, arguments), str(tmp_path / "1")]))
    finish(torchrun(3, "svm.py", *arguments, tmp_path / "3"))
    for name in ("SVM_weights_all.nii.gz", "SVM_pattern_f1.nii.gz", "mean_scan.nii.gz"):
        expected, found = (nib.load(tmp_path / n / name).get_fdata() for n in "13")
        assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()


# One fold by a team


def assign(monkeypatch, n_ranks: int, n_folds: int, todo: list[int]) -> list:
    """Return what each rank is assigned."""
    monkeypatch.setattr(teams.ranks, "world_size", lambda: n_ranks)
    found = []
    for rank in range(n_ranks):
        monkeypatch.setattr(teams.ranks, "rank", lambda rank=rank: rank)
        found.append(teams.assign_folds(list(range(n_folds)), todo))
    return found


@pytest.mark.parametrize(
    ("todo", "expected"),
    [([0, 1, 2, 3, 4], [[0, 2, 4], [1, 3]]), ([1, 4], [[1], [4]]), ([4], [[4], []]),
     ([], [[], []])],
)  # fmt: skip
def test_folds_go_round(monkeypatch, todo, expected):
    """Five folds, all or what is left of them, to two ranks, each on its own."""
    found = assign(monkeypatch, 2, 5, todo)
    assert found == [(folds, Team()) for folds in expected]


def test_teams_are_those_of_the_folds_asked_for(monkeypatch):
    """Also where folds are finished; their members wait as long as it takes, but not in a step."""
    timeouts = []

    def new_group(members, timeout=None, backend=None):
        timeouts.append((backend, timeout))

    monkeypatch.setattr(teams.distributed, "new_group", new_group)
    found = assign(monkeypatch, 5, 2, [1])
    assert [folds for folds, _ in found] == [[], [1], [], [1], []]
    assert [(team.index, team.size) for _, team in found] == [
        (0, 3),
        (0, 2),
        (1, 3),
        (1, 2),
        (2, 3),
    ]
    assert ("gloo", teams.ranks.MAX_WAIT) in timeouts and (None, teams.MAX_LATE) in timeouts


def test_shares_make_up_each_batch():
    batches = BatchSampler(SequentialSampler(range(7)), 3, drop_last=False)
    shares = [list(loading.ShareOfBatches(batches, Team(i, 2))) for i in range(2)]
    assert shares == [[[0, 2], [3, 5], [6]], [[1], [4], []]]
    volumes, labels, rows = loading.CollateShare(SHAPE)([])
    assert volumes.shape == (0, 1, *SHAPE) and len(labels) == len(rows) == 0


def train_as_member(index: int, size: int, port: int, outpath: str, precision: str) -> None:
    """Train three steps on a share of each batch, the last of them smaller than the team."""
    torch.set_num_threads(1)
    address = f"tcp://localhost:{port}"
    distributed.init_process_group("gloo", init_method=address, rank=index, world_size=size)
    team = Team(index, size, distributed.group.WORLD)
    losses, model = train_three_steps(team, precision)
    if team.leads:
        torch.save({"losses": losses, "weights": model.state_dict()}, outpath)
    distributed.destroy_process_group()


def train_three_steps(team: Team, precision: str) -> tuple[torch.Tensor, nn.Module]:
    """Return the losses and the model, trained by plain gradient descent."""
    torch.manual_seed(0)
    model = models.build_model("modelT8", SHAPE).train()
    volumes, labels = torch.rand(5, 1, *SHAPE), torch.tensor([0, 1, 1, 0, 1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    network, criterion = teams.share_training(model, team)
    in_bf16 = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    losses = []
    for n_scans in (5, 4, 2):
        share = slice(team.index, n_scans, team.size)
        optimizer.zero_grad()
        with in_bf16:
            loss = criterion(network(volumes[share]), labels[share])
        loss.backward()
        optimizer.step()
        losses.append(team.mean(loss.detach()))
    return torch.stack(losses), model


@pytest.mark.parametrize(
    ("precision", "rtol", "atol"), [("fp32", 1e-5, 1e-5), ("bf16", 0.03, 0.06)]
)
def test_a_team_computes_what_one_process_does(tmp_path, precision, rtol, atol):
    """Losses, weights and running statistics; in the last step one member has no scan at all."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(
        train_as_member, (3, port, str(tmp_path / "team.pt"), precision), nprocs=3
    )
    found = torch.load(tmp_path / "team.pt", weights_only=True)
    losses, model = train_three_steps(Team(), precision)
    torch.testing.assert_close(found["losses"], losses, rtol=rtol, atol=0)
    for key, expected in model.state_dict().items():
        torch.testing.assert_close(found["weights"][key], expected, rtol=10 * rtol, atol=atol)
        if "running" in key:
            assert (expected != float("var" in key)).all()  # they have moved


def test_statistics_of_bf16_are_not_rounded():
    """Those of a layer whose inputs alone are bfloat16, as torch's own layer has them."""
    torch.manual_seed(0)
    inputs = (torch.rand(3, 2, 11, 13, 7) + 5).bfloat16()  # 3003 values: bfloat16 would say 3008
    own, shared = nn.BatchNorm3d(2), teams.SharedBatchNorm3d(nn.BatchNorm3d(2), Team())
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = own(inputs), shared(inputs)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(shared, name), getattr(own, name), rtol=1e-5, atol=0)
