"""Several processes through torchrun and Slurm's scripts: the same results as one process."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import N_FOLDS, N_SCANS, SHAPE, train_arguments
from torch import distributed, multiprocessing, nn
from torch.utils.data import BatchSampler, SequentialSampler

import checkpoints
import loading
import models
import svm
import teams
import train_cv
from teams import Team

ROOT = Path(train_cv.__file__).parent
SLURM = ROOT / "examples" / "slurm"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
SIGNIFICANT = ("state_dict", "predictions", "metrics", "splits", "train_loss", "valid_loss")


def torchrun(n_processes: int, script: str, *arguments: object) -> subprocess.Popen:
    """Start a script under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", n_processes,
               "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", ROOT / script,
               *arguments]  # fmt: skip
    return subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=ENVIRONMENT,
    )  # fmt: skip


def finish(process: subprocess.Popen) -> tuple[str, str]:
    """Wait for a process that must end well; return its stdout and stderr."""
    output = process.communicate(timeout=240)
    assert process.returncode == 0, output
    return output


def significant(outpath: Path) -> dict[str, bytes]:
    """Return the bytes of the files that say nothing of times."""
    return {p.name: p.read_bytes() for p in outpath.iterdir() if p.name.startswith(SIGNIFICANT)}


def heatmap_arguments(cohort_csv: Path, run_path: Path, outpath: Path) -> list[object]:
    return ["--path", cohort_csv, "--modelpath", run_path, "--model", "modelT8", "--device", "cpu",
            "--outpath", outpath, "--method", "LRP", "--by-outcome", "--save-subjects",
            "--workers", "0"]  # fmt: skip


# Training


def test_two_processes_train_the_folds_of_one(cohort_csv, run_path, tmp_path):
    """Bit for bit; the metrics are printed once, and the log lines say whose they are."""
    output, messages = finish(torchrun(2, "train_cv.py", *train_arguments(cohort_csv, tmp_path)))
    assert significant(tmp_path) == significant(run_path)
    assert output.count("pooled_low") == 1
    assert "[rank 0] fold 0 epoch   1" in messages and "[rank 1] fold 1 epoch   1" in messages
    assert not list(tmp_path.glob(".cache*"))


@pytest.mark.slow
def test_three_processes_train_two_folds(cohort_csv, run_path, tmp_path):
    """Two of them train one fold together: the same losses but for rounding."""
    finish(torchrun(3, "train_cv.py", *train_arguments(cohort_csv, tmp_path)))
    assert significant(tmp_path)["splits.csv"] == significant(run_path)["splits.csv"]
    for fold in range(N_FOLDS):
        expected, found = (
            pd.read_csv(path / f"history_f{fold}.csv").drop(columns="seconds")
            for path in (run_path, tmp_path)
        )
        np.testing.assert_allclose(found, expected, rtol=2e-5)
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
        while not (tmp_path / "checkpoint_f1.pt").is_file():
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
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


def test_folds_go_round(monkeypatch):
    """Five folds to two ranks; with no more to do, nobody has any."""
    monkeypatch.setattr(teams.ranks, "world_size", lambda: 2)
    found = []
    for rank in range(2):
        monkeypatch.setattr(teams.ranks, "rank", lambda rank=rank: rank)
        found.append(teams.assign_folds([0, 1, 2, 3, 4]))
    assert [folds for folds, _ in found] == [[0, 2, 4], [1, 3]]
    assert all(team == Team() for _, team in found)
    assert teams.assign_folds([]) == ([], Team())


def test_shares_make_up_each_batch():
    batches = BatchSampler(SequentialSampler(range(7)), 3, drop_last=False)
    shares = [list(loading.ShareOfBatches(batches, Team(i, 2))) for i in range(2)]
    assert shares == [[[0, 2], [3, 5], [6]], [[1], [4], []]]
    volumes, labels, rows = loading.CollateShare(SHAPE)([])
    assert volumes.shape == (0, 1, *SHAPE) and len(labels) == len(rows) == 0


def train_as_member(index: int, size: int, port: int, outpath: str) -> None:
    """Train three steps on a share of each batch, the last of them smaller than the team."""
    torch.set_num_threads(1)
    address = f"tcp://localhost:{port}"
    distributed.init_process_group("gloo", init_method=address, rank=index, world_size=size)
    team = Team(index, size, distributed.group.WORLD)
    losses, model = train_three_steps(team)
    if team.leads:
        torch.save({"losses": losses, "weights": model.state_dict()}, outpath)
    distributed.destroy_process_group()


def train_three_steps(team: Team) -> tuple[torch.Tensor, nn.Module]:
    """Return the losses and the model, trained by plain gradient descent."""
    torch.manual_seed(0)
    model = models.build_model("modelT8", SHAPE).train()
    volumes, labels = torch.rand(5, 1, *SHAPE), torch.tensor([0, 1, 1, 0, 1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    network, criterion = teams.share_training(model, team)
    losses = []
    for n_scans in (5, 4, 2):
        share = slice(team.index, n_scans, team.size)
        optimizer.zero_grad()
        loss = criterion(network(volumes[share]), labels[share])
        loss.backward()
        optimizer.step()
        losses.append(team.mean(loss.detach()))
    return torch.stack(losses), model


def test_a_team_computes_what_one_process_does(tmp_path):
    """Losses, weights and running statistics; in the last step one member has no scan at all."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(train_as_member, (3, port, str(tmp_path / "team.pt")), nprocs=3)
    found = torch.load(tmp_path / "team.pt", weights_only=True)
    losses, model = train_three_steps(Team())
    torch.testing.assert_close(found["losses"], losses, rtol=1e-5, atol=0)
    for key, expected in model.state_dict().items():
        torch.testing.assert_close(found["weights"][key], expected, rtol=1e-4, atol=1e-5)
        if "running" in key:
            assert (expected != float("var" in key)).all()  # they have moved


# Slurm


@pytest.fixture
def cluster(tmp_path) -> dict[str, str]:
    """Return an environment with stand-ins for srun and scontrol, and a scratch disk."""
    commands = tmp_path / "bin"
    commands.mkdir()
    stand_ins = {
        "srun": 'exec "$@"',
        "scontrol": "echo localhost",
        "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
        "python3": f'exec {sys.executable} "$@"',
    }
    for name, line in stand_ins.items():
        (commands / name).write_text(f"#!/usr/bin/env bash\n{line}\n")
        (commands / name).chmod(0o755)
    (tmp_path / "scratch").mkdir()
    return ENVIRONMENT | {
        "PATH": f"{commands}:{os.environ['PATH']}", "TMPDIR": str(tmp_path / "scratch"),
        "SLURM_JOB_NODELIST": "localhost", "SLURM_NNODES": "1", "SLURM_JOB_ID": "7",
        "SLURM_GPUS_ON_NODE": "2",
    }  # fmt: skip


@pytest.mark.parametrize("script", sorted(SLURM.glob("*.sh")), ids=lambda path: path.name)
def test_slurm_scripts_are_shell(script):
    assert subprocess.run(["bash", "-n", script], check=True).returncode == 0
    assert "#SBATCH --time" in script.read_text()


@pytest.mark.slow
def test_job_array(cohort_csv, run_path, tmp_path, cluster):
    """Each task one fold; the last one puts them together, and the node's disk is clean."""
    arguments = ["train_cv.py", *train_arguments(cohort_csv, tmp_path / "run")]
    for task in range(N_FOLDS):
        done = subprocess.run(
            ["bash", SLURM / "job_array.sh", *arguments], cwd=ROOT, capture_output=True, text=True,
            env=cluster | {"SLURM_ARRAY_TASK_ID": str(task)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert significant(tmp_path / "run") == significant(run_path)
    assert not list((tmp_path / "scratch").rglob("volumes.f32"))


@pytest.mark.slow
def test_torchrun_job(cohort_csv, run_path, tmp_path, cluster):
    arguments = ["train_cv.py", *train_arguments(cohort_csv, tmp_path / "run")]
    done = subprocess.run(
        ["bash", SLURM / "torchrun.sh", *arguments], cwd=ROOT, capture_output=True, text=True,
        env=cluster,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert significant(tmp_path / "run") == significant(run_path)
