"""How tests start scripts under torchrun, and what a run's files must have in common."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
SIGNIFICANT = ("state_dict", "predictions", "metrics", "splits", "train_loss", "valid_loss")


def torchrun(n_processes: int, script: str | Path, *arguments: object) -> subprocess.Popen:
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


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    """Wait until something has come true while a process runs."""
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def ranks_of(process: subprocess.Popen) -> list[int]:
    """Return the process numbers of torchrun's children, in the order in which they started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return sorted(map(int, children.split()))


def significant(outpath: Path) -> dict[str, bytes]:
    """Return the bytes of the files that say nothing of times."""
    return {p.name: p.read_bytes() for p in outpath.iterdir() if p.name.startswith(SIGNIFICANT)}


def heatmap_arguments(
    cohort_csv: Path, run_path: Path, outpath: Path, *more: object
) -> list[object]:
    """Return the arguments of a run of heatmap.py that writes all that there is."""
    return ["--path", cohort_csv, "--modelpath", run_path, "--model", "modelT8", "--device", "cpu",
            "--outpath", outpath, "--method", "LRP", "--by-outcome", "--save-subjects",
            "--workers", "0", *more]  # fmt: skip
