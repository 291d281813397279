"""The benchmarks run, and print what they promise; what they find is not judged here."""

import importlib.util
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


BY_ZENNIT = "LRP, zennit as plain"


def output_of(*command: str) -> str:
    """Run Python in a process of its own; return what it prints."""
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def last_row(script: str, *options: str) -> list[str]:
    """Run a benchmark; return the cells of its last row."""
    output = output_of(f"benchmarks/{script}", *options)
    rows = [line for line in output.splitlines() if line.startswith("| ")]
    return [cell.strip() for cell in rows[-1].strip("|").split("|")]


@pytest.mark.slow
def test_scaling_has_help():
    """It would take minutes at any size."""
    assert "--full" in output_of("benchmarks/scaling.py", "--help")


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


@pytest.mark.parametrize(
    ("package", "row", "script", "options"),
    [
        ("zennit", "| LRP", "attribution.py", (*TINY, "--only", BY_ZENNIT)),
        ("monai", "| MONAI", "loading.py", CASES["loading.py"][0]),
    ],
)
def test_a_missing_peer_is_said(package, row, script, options):
    hidden = f"import runpy, sys; sys.modules[{package!r}] = None; sys.argv[0] = ''"
    run = f"runpy.run_path('benchmarks/{script}', run_name='__main__')"
    output = output_of("-c", f"{hidden}; {run}", *options)
    assert f"{package} is not installed: no row of it" in output
    assert row not in output


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("zennit"), reason="zennit is not installed")
def test_lrp_is_that_of_zennit():
    name, *_, largest, one_minus_r = last_row("attribution.py", *TINY, "--only", BY_ZENNIT)
    assert name == BY_ZENNIT and float(largest) < 1e-5 and float(one_minus_r) < 1e-9
