"""The benchmarks run, and print what they promise; what they find is not judged here."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TINY = ("--model", "modelT8", "--shape", "30", "28", "31", "--pairs", "1", "--threads", "1")
CASES = {  # options, and columns of the last table
    "attribution.py": ((*TINY, "--steps", "3", "--only", "GGC", "IG"), 10),
    "loading.py": (("--n", "3", "--epochs", "1", "--workers", "0"), 4),
    "training_step.py": (TINY, 4),
}


def last_row(script: str, *options: str) -> list[str]:
    """Run a benchmark in a process of its own; return the cells of its last row."""
    command = [sys.executable, f"benchmarks/{script}", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    return [cell.strip() for cell in rows[-1].strip("|").split("|")]


@pytest.mark.slow
def test_scaling_has_help():
    """It would take minutes at any size."""
    command = [sys.executable, "benchmarks/scaling.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "--full" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("script", CASES)
def test_a_benchmark_prints_its_table(script):
    options, n_columns = CASES[script]
    name, *numbers = last_row(script, *options)
    assert len([name, *numbers]) == n_columns
    assert float(numbers[-1]) >= 0
    if script == "attribution.py":
        largest, one_minus_r = map(float, numbers[-2:])
        assert name == "IG" and largest < 1e-3 and one_minus_r < 1e-5
