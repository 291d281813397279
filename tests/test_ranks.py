"""How the processes of a job speak, wait and end."""

import logging
import os
import re
import signal
import time

import pytest
from conftest import train_arguments
from processes import finish, heatmap_arguments, ranks_of, torchrun

import utils

WAITING = """
import os, sys, time
import torch
from torch import distributed
import ranks, utils
from errors import RunError

def main(what):
    if ranks.rank() == 0:
        time.sleep(300)
    distributed.all_reduce(torch.zeros(1), async_op=True)  # the other's part will not come
    if what == "RunError":
        raise RunError("the disk is gone")
    if what == "fault":
        raise KeyError("a fault")
    print("waiting", flush=True)
    ranks.wait_for_all()

sys.exit(utils.run_script(main, sys.argv[1], "Go on."))
"""


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("signal", "rank 1: stopped by SIGTERM. Go on."),
        pytest.param("RunError", "rank 1: error: the disk is gone", marks=pytest.mark.slow),
        pytest.param("fault", "KeyError: 'a fault'", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_fails_speaks_and_ends_at_once(tmp_path, what, message):
    """Also with a collective under way, whose other part never comes."""
    script_path = tmp_path / "waiting.py"
    script_path.write_text(WAITING)
    with torchrun(2, script_path, what) as process:
        if what == "signal":
            assert process.stdout.readline() == "waiting\n"
            start = time.perf_counter()
            os.kill(ranks_of(process)[1], signal.SIGTERM)
        try:
            _, messages = process.communicate(timeout=45)
        finally:
            process.kill()
    assert message in messages and process.returncode == 1
    if what == "signal":
        assert time.perf_counter() - start < 10


def test_what_every_rank_checks_is_said_once(cohort_csv, run_path, tmp_path):
    """A checkpoint that is not there; the other rank stops with it."""
    arguments = heatmap_arguments(cohort_csv, run_path, tmp_path / "maps", "--subjects", "all")
    arguments[arguments.index(run_path)] = tmp_path
    with torchrun(2, "heatmap.py", *arguments) as process:
        _, messages = process.communicate(timeout=60)
    assert process.returncode == 1  # torchrun's own
    assert messages.count("there is no checkpoint") == 1
    assert messages.count("rank 0: error: ") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_cv.py", "heatmap.py"])
def test_a_rehearsal_is_told_once(cohort_csv, run_path, tmp_path, script):
    arguments = {
        "train_cv.py": train_arguments(cohort_csv, tmp_path),
        "heatmap.py": heatmap_arguments(cohort_csv, run_path, tmp_path),
    }[script]
    output, _ = finish(torchrun(2, script, *arguments, "--dry-run"))
    assert len(re.findall("^scans", output, re.MULTILINE)) == 1
    assert not list(tmp_path.iterdir())


@pytest.fixture
def as_rank_1(monkeypatch):
    """Make this process think that it is the second of two."""
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    yield
    logging.getLogger("heatmaps").handlers.clear()


def test_other_ranks_keep_quiet_beside_the_bars(as_rank_1, tmp_path, capsys):
    """Their lines go to their own file; warnings are for everybody, once there is a folder."""
    utils.start_log()
    utils.log.warning("checked by all")
    utils.start_log(tmp_path / "train_cv.log")
    with utils.log_above_bars():
        utils.log.info("an epoch")
        utils.log.warning("NaN")
    assert capsys.readouterr().err == "[rank 1] NaN\n"
    assert "[rank 1] INFO an epoch" in (tmp_path / "train_cv.rank1.log").read_text()
