"""How tests start scripts as processes, and what their files must have in common."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
SEARCHED = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": SEARCHED}
TIMED = ("run.json", ".log", ".lock", ".owner")  # these files say when, or who


def start(script: str | Path, *arguments: object, launcher: tuple = ()) -> subprocess.Popen:
    """Start a script as a process of one thread."""
    command = [sys.executable, *launcher, ROOT / script, *arguments]
    return subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=ENVIRONMENT,
    )  # fmt: skip


def torchrun(n_processes: int, script: str | Path, *arguments: object) -> subprocess.Popen:
    """Start a script under torchrun."""
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", n_processes,
                "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0")  # fmt: skip
    return start(script, *arguments, launcher=launcher)


def finish(*processes: subprocess.Popen) -> tuple[str, str]:
    """Wait for processes that must end well; return the last one's stdout and stderr."""
    for process in processes:
        output = process.communicate(timeout=240)
        assert process.returncode == 0, output
    return output


def wait_for(
    condition: Callable[[], bool], process: subprocess.Popen, seconds: float = 120
) -> None:
    """Wait until something has come true while a process runs."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


def ranks_of(process: subprocess.Popen) -> list[int]:
    """Return the process numbers of torchrun's children, in the order in which they started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return sorted(map(int, children.split()))


def significant(outpath: Path) -> dict[str, bytes]:
    """Return the bytes of all files below a folder, but for those and the column of times."""
    paths = [p for p in outpath.rglob("*") if p.is_file() and not p.name.endswith(TIMED)]
    return {
        str(path.relative_to(outpath)): re.sub(rb",[^,]*\n", b"\n", path.read_bytes())
        if path.name.startswith("history") else path.read_bytes()  # seconds stand last
        for path in paths
    }  # fmt: skip


def heatmap_arguments(
    cohort_csv: Path, run_path: Path, outpath: Path, *more: object
) -> list[object]:
    """Return the arguments of a run of heatmap.py that writes all that there is."""
    return ["--path", cohort_csv, "--modelpath", run_path, "--model", "modelT8", "--device", "cpu",
            "--outpath", outpath, "--method", "LRP", "--by-outcome", "--save-subjects",
            "--workers", "0", *more]  # fmt: skip
