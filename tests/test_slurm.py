"""Slurm's scripts, run with stand-ins for its commands: the same results as one process."""

import os
import subprocess
import sys

import nibabel as nib
import pytest
from conftest import N_FOLDS, N_SCANS, train_arguments
from processes import ENVIRONMENT, ROOT, finish, heatmap_arguments, significant, start

import models

SLURM = ROOT / "examples" / "slurm"
SCRIPTS = ("job_array.sh", "torchrun.sh")
MODELS = [name for name in models.MODELS if "T" not in name]
SRUN = 'while [[ $1 == --* ]]; do shift; done; exec "$@"'


@pytest.fixture
def cluster(tmp_path) -> dict[str, str]:
    """Return an environment with stand-ins for srun and scontrol, and a scratch disk."""
    commands = tmp_path / "bin"
    commands.mkdir()
    stand_ins = {
        "srun": SRUN,
        "scontrol": "echo localhost",
        "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
        "python3": f'exec {sys.executable} "$@"',
    }
    for name, lines in stand_ins.items():
        (commands / name).write_text(f"#!/usr/bin/env bash\n{lines}\n")
        (commands / name).chmod(0o755)
    (tmp_path / "scratch").mkdir()
    return ENVIRONMENT | {
        "PATH": f"{commands}:{os.environ['PATH']}", "TMPDIR": str(tmp_path / "scratch"),
        "SLURM_JOB_NODELIST": "localhost", "SLURM_NNODES": "1", "SLURM_JOB_ID": "40007",
        "SLURM_GPUS_ON_NODE": "2", "SLURM_CPUS_PER_TASK": "3",
    }  # fmt: skip


def submit(
    script: str, cluster: dict[str, str], *arguments: object, n_tasks: int | None = None
) -> None:
    """Run a script as Slurm would: each task of an array, or the one job."""
    for task in range(n_tasks or (N_FOLDS if script == "job_array.sh" else 1)):
        done = subprocess.run(
            ["bash", SLURM / script, *map(str, arguments)], cwd=ROOT, capture_output=True,
            text=True, env=cluster | {"SLURM_ARRAY_TASK_ID": str(task)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_slurm_scripts_are_shell(script):
    assert sorted(path.name for path in SLURM.iterdir()) == sorted((*SCRIPTS, "sweep.sh"))
    assert subprocess.run(["bash", "-n", SLURM / script], check=True).returncode == 0
    assert "#SBATCH --time" in (SLURM / script).read_text()


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_srun_is_given(tmp_path, cluster, script):
    """Cores, a port of the job's own, the node's disk, and the end of all nodes with one."""
    (tmp_path / "bin" / "srun").write_text(
        '#!/usr/bin/env bash\necho "$SRUN_CPUS_PER_TASK $@" > "$TMPDIR/given.txt"\n'
    )
    given_path = tmp_path / "scratch" / "given.txt"
    submit(script, cluster, "train_cv.py", "--fold", "2")
    given = given_path.read_text()
    assert given.startswith("3 ")
    assert f"train_cv.py --fold 2 --{'only-fold 1 --' if 'array' in script else ''}cache" in given
    assert given.endswith(f"--cache-dir {tmp_path / 'scratch'}\n")
    submit(script, cluster, "heatmap.py", "--fold", "2")
    given = given_path.read_text()
    assert "cache-dir" not in given
    if script == "torchrun.sh":
        assert " --kill-on-bad-exit=1 torchrun " in given and "localhost:10007 " in given


def test_a_sweep_trains_each_published_model_and_ends_in_a_table(tmp_path, cluster):
    given_path = tmp_path / "scratch" / "given.txt"
    (tmp_path / "bin" / "srun").write_text(
        '#!/usr/bin/env bash\necho "$@" >> "$TMPDIR/given.txt"\n'
    )
    submit("sweep.sh", cluster, tmp_path / "sweep", "--path", "a b.csv", n_tasks=32)
    lines = given_path.read_text().splitlines()
    for name, line in zip(MODELS, lines, strict=True):
        assert line.startswith("python3 train_cv.py --path a b.csv --model")
        assert f" --model {name} --outpath {tmp_path / 'sweep' / name} " in line
    for name in ("modelA24", "modelB28"):
        (tmp_path / "sweep" / name).mkdir(parents=True)
        (tmp_path / "sweep" / name / "metrics.csv").touch()
    (tmp_path / "sweep" / "modelC32").mkdir()  # not finished
    submit("sweep.sh", cluster, "--table", tmp_path / "sweep", n_tasks=1)
    folder = tmp_path / "sweep"
    assert given_path.read_text().splitlines()[-1] == (
        f"python3 compare.py --run {folder}/modelA24 {folder}/modelB28 --outpath {folder}"
    )


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_training(cohort_csv, run_path, tmp_path, cluster, script):
    """Bit for bit; each scan is decoded once on the node's disk."""
    submit(script, cluster, "train_cv.py", *train_arguments(cohort_csv, tmp_path / "run"))
    assert significant(tmp_path / "run") == significant(run_path)
    assert len(list((tmp_path / "scratch").glob("*.npy"))) == N_SCANS
    assert not (tmp_path / "run" / ".cache").exists()


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_maps(cohort_csv, run_path, tmp_path, cluster, script):
    submit(script, cluster, "heatmap.py", *heatmap_arguments(cohort_csv, run_path, tmp_path / "s"))
    finish(start("heatmap.py", *heatmap_arguments(cohort_csv, run_path, tmp_path / "one")))
    assert significant(tmp_path / "s").keys() == significant(tmp_path / "one").keys()
    for path in (tmp_path / "one").rglob("*.nii.gz"):
        found = nib.load(tmp_path / "s" / path.relative_to(tmp_path / "one")).get_fdata()
        expected = nib.load(path).get_fdata()
        assert abs(found - expected).max() <= 1e-6 * abs(expected).max()
