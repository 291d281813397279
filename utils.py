"""What every script shares: exit statuses, options, device, seeds, logs, progress."""

import argparse
import contextlib
import functools
import logging
import os
import platform
import random
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import ranks
from errors import InputError, Stopped, in_one_sentence, stoppable

N_WORKERS = min(4, os.cpu_count())
PACKAGES = ("torch", "captum", "nibabel", "nilearn", "numpy", "pandas", "scikit-learn")

log = logging.getLogger("heatmaps")


# Exit statuses


def printable(text: str) -> str:
    """Return text with what no terminal or page should be sent as escapes, lines kept."""
    return "".join(
        letter if letter.isprintable() or letter == "\n"
        else letter.encode("unicode_escape").decode()
        for letter in text
    )  # fmt: skip


def run_script(main: Callable, args: argparse.Namespace, advice: str = "") -> int:
    """Run a script's `main(args)` and return its exit status.

    0 done; 2 the input is at fault; 128 plus its number for a signal; 1 anything else. `advice`
    says, after a signal, how to go on. Under torchrun a process that fails speaks and ends without
    waiting for the others.
    """
    speaker = f"rank {ranks.rank()}: " if ranks.world_size() > 1 else ""
    try:
        with stoppable(), ranks.joined():
            main(args)
        return 0
    except Stopped as stop:
        print(f"{speaker}stopped by {stop.signal.name}. {advice}".rstrip(), file=sys.stderr)
        status = 128 + stop.signal
    except Exception as error:
        message = in_one_sentence(error)
        if message is not None:
            print(f"{speaker}error: {printable(message)}", file=sys.stderr)
        elif ranks.world_size() == 1:
            raise
        else:
            traceback.print_exc()
        status = 2 if isinstance(error, InputError) else 1
    ranks.leave_at_once(status)
    return status


# Command-line options


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Print the script's docstring as it stands, and every option with its default."""

    def _get_help_string(self, action: argparse.Action) -> str:
        """Leave out defaults that say nothing: of required options, of flags, and None."""
        if action.required:
            return f"{action.help} (required)"
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def number(
    kind: type, at_least: float = -np.inf, above: float = -np.inf, below: float = np.inf
) -> Callable[[str], float]:
    """Return an argparse type: a finite number of this kind within these limits."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"must be a number ({kind.__name__}), got {text!r}"
            ) from None
        if not (np.isfinite(value) and value >= at_least and value > above and value < below):
            limits = [f"at least {at_least:g}"] if at_least > -np.inf else []
            limits += [f"above {above:g}"] if above > -np.inf else []
            limits += [f"below {below:g}"] if below < np.inf else []
            raise argparse.ArgumentTypeError(f"must be {' and '.join(limits)}, got {text}")
        return value

    return parse


def add_cohort_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that mean the same in every script that reads a cohort."""
    parser.add_argument(
        "--path", type=Path, required=True, metavar="CSV",
        help="one scan a row: NIfTI file, label 0 or 1, optional subject",
    )  # fmt: skip
    parser.add_argument(
        "--outpath",
        type=Path,
        required=True,
        metavar="DIR",
        help="output folder, created if missing",
    )
    parser.add_argument(
        "--seed", type=number(int, at_least=0), default=0, help="seed of all random draws"
    )


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """Add --device."""
    parser.add_argument(
        "--device", default=None,
        help="a GPU index (0), a torch device (cuda:1) or cpu; left out: the first GPU, else CPU",
    )  # fmt: skip


def add_cache_option(parser: argparse.ArgumentParser) -> None:
    """Add --cache-dir."""
    parser.add_argument(
        "--cache-dir", type=Path, default=None, metavar="DIR",
        help="where the scaled scans lie while this runs (4 bytes a voxel), best on a local disk; "
        "runs on the same scans share them; left out: below --outpath",
    )  # fmt: skip


# Seeds and logs


def derived_seed(*keys: int) -> int:
    """Return a 63-bit seed that depends on the given non-negative integers and their order only."""
    return int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0] >> np.uint64(1))


def seed_everything(*keys: int) -> None:
    """Seed torch (CPU and GPU), numpy and Python from the given integers."""
    seed = derived_seed(*keys)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (libraries may draw from the global generator)
    torch.manual_seed(seed)


class LogFile(logging.FileHandler):
    """A log file that holds its peace when the disk is full: what must be written will speak."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Drop the line."""


class PrintableFormatter(logging.Formatter):
    """Keep control characters of subjects and file names out of terminals and logs."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line to print."""
        return printable(super().format(record))


def start_log(log_path: Path | None = None) -> None:
    """Log to stderr and, once there is an output folder, also to a file.

    Under torchrun the first process speaks on stderr; the others warn only, once there is an
    output folder: until then all check the same. Each has a file.
    """
    log.setLevel(logging.INFO)
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    speaker = f"[rank {ranks.rank()}] " if ranks.world_size() > 1 else ""
    to_stderr = logging.StreamHandler()
    to_stderr.setFormatter(PrintableFormatter(f"{speaker}%(message)s"))
    others_level = logging.ERROR if log_path is None else logging.WARNING
    to_stderr.setLevel(logging.INFO if ranks.is_first() else others_level)
    log.addHandler(to_stderr)
    if log_path is not None:
        if not ranks.is_first():
            log_path = log_path.with_suffix(f".rank{ranks.rank()}.log")
        to_file = LogFile(log_path, encoding="utf-8", errors="backslashreplace")
        to_file.setFormatter(PrintableFormatter(f"%(asctime)s {speaker}%(levelname)s %(message)s"))
        log.addHandler(to_file)


@functools.cache
def say_once(message: str) -> None:
    """Log a message the first time only."""
    log.info(message)


def log_name(script: str, only_fold: int | None) -> str:
    """Return the name of a script's log; each task of a job array has one of its own."""
    return f"{script}.log" if only_fold is None else f"{script}_f{only_fold}.log"


def progress(items: Iterable | None = None, description: str = "", **options) -> tqdm:
    """Return a progress bar on stderr; none where that is no terminal, or another rank's."""
    disable = None if ranks.is_first() else True
    return tqdm(items, description, disable=disable, **options)


def log_above_bars() -> contextlib.AbstractContextManager:
    """Return a block in which log lines go above progress bars; ranks without bars log as ever."""
    if not ranks.is_first():  # tqdm would print all that their level holds back
        return contextlib.nullcontext()
    return logging_redirect_tqdm([log])


def now() -> str:
    """Return the time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def nearest_folder(path: Path) -> Path:
    """Return what there is of a path: itself, or the nearest of its parents."""
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.exists())


def check_outpath(outpath: Path) -> None:
    """Refuse an output folder that is a file or cannot be written, before anything is written."""
    there = nearest_folder(outpath)
    if not there.is_dir():
        raise InputError(f"--outpath {outpath} cannot be used as a folder: {there} is a file")
    if not os.access(there, os.W_OK):
        raise InputError(f"--outpath {outpath} cannot be used as a folder: Permission denied")


def make_outpath(outpath: Path) -> Path:
    """Create the output folder.

    Raises
    ------
    InputError
        If it cannot be created, is a file, or may not be written in.
    """
    try:
        outpath.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=outpath):
            pass
    except OSError as error:
        raise InputError(
            f"--outpath {outpath} cannot be used as a folder: {error.strerror}"
        ) from None
    return outpath
