"""The benchmarks run, and print what they promise; what they find is not judged here."""

import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TINY = ("--model", "modelT8", "--shape", "30", "28", "31", "--pairs", "1", "--threads", "1")
CASES = {
    "attribution_ggc.py": TINY,
    "attribution_ig.py": (*TINY, "--steps", "3"),
    "attribution_lrp.py": TINY,
    "input_gradient.py": TINY,
    "large_cohort.py": ("--sizes", "20"),
    "loading.py": ("--n", "3", "--epochs", "1", "--workers", "0"),
    "training_step.py": TINY,
}
N_COLUMNS = {"large_cohort.py": 5, "loading.py": 4, "training_step.py": 4}  # of the last table


def last_row(script: str, *options: str) -> list[str]:
    """Run a benchmark in a process of its own; return the cells of its last row."""
    command = [sys.executable, f"benchmarks/{script}", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    return [cell.strip() for cell in rows[-1].strip("|").split("|")]


@pytest.mark.slow
@pytest.mark.parametrize("script", CASES)
def test_a_benchmark_prints_its_table(script):
    name, *numbers = last_row(script, *CASES[script])
    assert len([name, *numbers]) == N_COLUMNS.get(script, 9)
    assert not math.isnan(float(numbers[-1]))


@pytest.mark.slow
def test_both_ways_are_held_to_float64():
    seed, *differences = last_row("attribution_ig.py", *TINY, "--steps", "3", "--float64", "2")
    assert seed == "1"
    assert [float(difference) < 1e-3 for difference in differences] == [True] * 4
