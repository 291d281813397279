"""What every script shares: numbers, the device, seeds, the log, the escaping of text."""

import argparse
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import utils
from run_folder import device as devices
from run_folder import files
from utils import InputError


def test_number():
    parse = utils.number(float, above=0, below=1)
    assert parse("0.5") == 0.5
    for text in ("0", "1", "nan", "inf"):
        with pytest.raises(argparse.ArgumentTypeError, match="above 0 and below 1, got"):
            parse(text)
    with pytest.raises(argparse.ArgumentTypeError, match=r"a number \(int\), got '1.5'"):
        utils.number(int, at_least=1)("1.5")


def test_help_shows_defaults_but_not_of_flags():
    parser = utils.make_parser(
        "What it does.", "own", "--path", "--seed", "--overwrite", "--device"
    )
    shown = " ".join(parser.format_help().split())
    assert "seed of all random draws (default: 0)" in shown
    assert "None" not in shown and "False" not in shown


def test_device_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert devices.find_device(None) == devices.find_device("cpu") == torch.device("cpu")
    for name in ("0", "cuda", "cuda:1"):
        with pytest.raises(InputError, match=f"--device {name}: .* use --device cpu"):
            devices.find_device(name)


def test_device_of_each_rank(monkeypatch):
    """Each process of a host takes the GPU of its number, and no one more than there are."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, {"WORLD_SIZE": "3"}.get(name, "1"))
    taken = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(devices, "_try", taken.append)
    monkeypatch.setattr(devices, "gathered", lambda value: [value])
    assert devices.find_device(None) == torch.device("cuda:1") and taken == [torch.device("cuda:1")]
    with pytest.raises(InputError, match="leave --device out under torchrun"):
        devices.find_device("0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")  # whoever has a GPU hears of it, too
    with pytest.raises(InputError, match="use --nproc-per-node 2"):
        devices.find_device(None)


@pytest.mark.parametrize(
    ("name", "expected"), [("tf32", "tf32"), ("fp32", "ieee"), ("bf16", "ieee")]
)
def test_precision_of_float32_on_a_gpu(name, expected):
    devices.set_precision(name)
    assert torch.backends.cuda.matmul.fp32_precision == expected
    assert torch.backends.cudnn.conv.fp32_precision == expected


def test_seeds_depend_on_every_key_and_on_their_order():
    seeds = {utils.derived_seed(*keys) for keys in ((0, 1), (1, 0), (1, 1), (2,), (0, 1, 2))}
    assert len(seeds) == 5 and max(seeds) < 2**63
    draws = []
    for _ in range(2):
        devices.seed_everything(3, 4)
        draws.append((random.random(), np.random.rand(), float(torch.rand(()))))  # noqa: NPY002
    assert draws[0] == draws[1]
    rows = np.arange(10, 30)
    order = devices.shuffled(rows, 5)
    assert (order == devices.shuffled(rows, 5)).all() and (order != devices.shuffled(rows, 6)).any()
    assert sorted(order) == sorted(rows)


def test_logs_carry_no_control_characters(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(utils.log, "propagate", False)  # pytest's own log could not be sent on
    utils.start_log(tmp_path / "x.log")
    utils.log.warning("both labels: %s", "ä\x1b[2J\udcff\u202e")
    utils.start_log()
    for text in (capsys.readouterr().err, (tmp_path / "x.log").read_text()):
        assert r"both labels: ä\x1b[2J\udcff\u202e" in text
    assert utils.printable("two\nlines\t\r") == "two\nlines\\t\\r"


# Surroundings: a notebook's, a terminal without letters, a reader who leaves


ROOT = Path(utils.__file__).parent
ODD = {"MPLBACKEND": "module://a_notebook.backend", "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}


@pytest.mark.parametrize("script", ["train_cv", "heatmap", "svm", "compare", "simulate"])
def test_help_in_odd_surroundings(script):
    command = [sys.executable, str(ROOT / f"{script}.py"), "-h"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | ODD, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.isascii() and ("\\u03b2-rule" in done.stdout or script != "heatmap")


@pytest.mark.parametrize("reader", ["head -c 1", "true", "(exec <&-)"])
def test_a_run_whose_output_nobody_reads_ends_well(cohort_csv, tmp_path, reader):
    """In a folder whose name a terminal of ASCII cannot show, with a notebook's backend."""
    outpath = tmp_path / "Jürgen 脑"
    arguments = f"--path '{cohort_csv}' --outpath '{outpath}' --fold 2"
    script = f"'{sys.executable}' '{ROOT / 'svm.py'}' {arguments}"
    command = ["bash", "-c", f"{script} | {reader}; exit ${{PIPESTATUS[0]}}"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | ODD, timeout=99)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert files.read_json(outpath / "run.json")["end"] is not None
