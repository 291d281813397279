"""What every script shares: errors, options, seeds, log, progress."""

import argparse
import contextlib
import io
import logging
import os
import platform
import shlex
import sys
import zlib
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

N_WORKERS = min(4, os.cpu_count())
COLUMN_ROLES = ("scan", "label", "subject")
PRECISIONS = ("fp32", "tf32", "bf16")
LINE_FORMAT = "{desc}: {n_fmt} of {total_fmt}, {elapsed} so far, {remaining} left"
PACKAGES = ("torch", "captum", "nibabel", "nilearn", "numpy", "pandas", "scikit-learn", "scipy")

log = logging.getLogger("heatmaps")
os.environ.pop("MPLBACKEND", None)  # a notebook's own backend stops matplotlib in a script


class InputError(ValueError):
    """The user's input is at fault: one message, exit status 2."""


class RunError(RuntimeError):
    """The run cannot go on, through no fault of the command line: one message, exit status 1."""


def rank() -> int:
    """Return this process's number in the job, from 0."""
    return int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else 0


def local_rank() -> int:
    """Return this process's number on its host, from 0."""
    return int(os.environ["LOCAL_RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else 0


def world_size() -> int:
    """Return how many processes the job has."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def is_first() -> bool:
    """Tell whether this is the process that speaks for the job."""
    return rank() == 0


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Print the script's docstring as it stands, and every option with its default."""

    def _get_help_string(self, action: argparse.Action) -> str:
        """Leave out defaults that say nothing: of required options, flags, and where none is."""
        says_nothing = action.required or not (action.default or action.default == 0)
        is_flag = action.nargs == 0
        return action.help if says_nothing or is_flag else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Lists options in groups, the required ones first; the usage names only these."""

    def __init__(self, doc: str, own_group: str):
        super().__init__(description=doc, formatter_class=HelpFormatter)
        self.own_group, self.needed = own_group, ""
        titles = ("required", own_group, *GROUPS)
        self.groups = {title: self.add_argument_group(title) for title in titles}

    def add_argument(self, *names: str, group: str | None = None, **options) -> argparse.Action:
        """Add an option to a group, left out: to the script's own; required ones have theirs."""
        if "-h" in names:
            return super().add_argument(*names, **options)
        title = "required" if options.get("required") else group or self.own_group
        action = self.groups[title].add_argument(*names, **options)
        if action.required:
            self.needed += f" {names[0]} {action.metavar or action.dest.upper()}"
            self.usage = f"%(prog)s{self.needed} [options]"
        return action


def number(
    kind: type, at_least: float = -np.inf, above: float = -np.inf, below: float = np.inf
) -> Callable[[str], float]:
    """Return an argparse type: a finite number of this kind within these limits."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            rule = f"must be a number ({kind.__name__})"
            raise argparse.ArgumentTypeError(f"{rule}, got {text!r}") from None
        if not (np.isfinite(value) and value >= at_least and above < value < below):
            limits = {"at least": at_least, "above": above, "below": below}
            said = [f"{name} {limit:g}" for name, limit in limits.items() if np.isfinite(limit)]
            said = " and ".join(said) or "a finite number"
            raise argparse.ArgumentTypeError(f"must be {said}, got {text}")
        return value

    return parse


def role_and_name(text: str) -> tuple[str, str]:
    """Parse ROLE=NAME of --columns."""
    role, is_given, name = text.partition("=")
    if role not in COLUMN_ROLES or not (is_given and name.strip()):
        forms = ", ".join(f"{each}=NAME" for each in COLUMN_ROLES)
        raise argparse.ArgumentTypeError(f"must be {forms}, got {text!r}")
    return role, name


OPTIONS = {  # that mean the same in every script that has them
    "--path": dict(type=Path, required=True, metavar="CSV",
                   help="one scan a row: NIfTI file, label 0 or 1, optional subject; columns by "
                        "name below a header row"),
    "--columns": dict(type=role_and_name, nargs="+", default=[], metavar="ROLE=NAME",
                      help="columns of scan, label or subject that the header calls otherwise"),
    "--positive": dict(nargs="+", default=[], metavar="WORD",
                       help="words in the label's column that mean 1; rows with other words than "
                            "these and --negative are left out"),
    "--negative": dict(nargs="+", default=[], metavar="WORD",
                       help="words in the label's column that mean 0"),
    "--outpath": dict(type=Path, required=True, metavar="DIR",
                      help="output folder, created if missing"),
    "--covariates": dict(nargs="+", default=[], metavar="NAME",
                         help="columns such as age, sex or site, numbers or words: what they tell "
                              "of the labels without any scan"),
    "--no-subjects": dict(action="store_true",
                          help="take no subject from a column, nor from sub-… in paths"),
    "--seed": dict(type=number(int, at_least=0), default=0, help="seed of all random draws"),
    "--device": dict(help="a GPU index (0), a torch device (cuda:1) or cpu; left out: the first "
                          "GPU, else the CPU"),
    "--workers": dict(type=number(int, at_least=0), default=N_WORKERS,
                      help="threads that decode scans; 0: the main thread decodes"),
    "--cache-dir": dict(type=Path, metavar="DIR",
                        help="keep the decoded scans (4 bytes a voxel) in this folder, best on a "
                             "local disk, for all runs on the same scans; left out: below "
                             "--outpath, removed at the end"),
    "--only-fold": dict(type=number(int, at_least=0), metavar="FOLD",
                        help="work on this fold only; the process that finishes the last fold "
                             "writes what all folds have in common"),
    "--overwrite": dict(action="store_true",
                        help="start anew where --outpath holds results, which are removed"),
    "--dry-run": dict(action="store_true",
                      help="check everything, say what it would take, and write nothing"),
}  # fmt: skip


OF_COHORT = ("--path", "--columns", "--positive", "--negative", "--no-subjects")
GROUPS = {
    "columns of the CSV": (*OF_COHORT[1:], "--covariates"),
    "compute": ("--device", "--workers", "--cache-dir"),
    "run": ("--only-fold", "--seed", "--dry-run", "--overwrite"),
}


def make_parser(doc: str, own_group: str, *names: str) -> Parser:
    """Return a parser with some of the shared options, and a group for the script's own."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # before -h, in whatever letters the system has
        sys.stdout.reconfigure(errors="backslashreplace")
    parser = Parser(doc, own_group)
    group_of = {name: group for group, members in GROUPS.items() for name in members}
    for name in names:
        parser.add_argument(name, group=group_of.get(name), **OPTIONS[name])
    return parser


def command(script: str, args: argparse.Namespace, *names: str, **others: object) -> str:
    """Return a command line with some options as they were given, and others."""
    given = {name: getattr(args, name[2:].replace("-", "_"), None) for name in names}
    given |= {f"--{name.replace('_', '-')}": value for name, value in others.items()}
    words = ["python3", script]
    for name, value in given.items():
        if value in (None, False, []):
            continue
        values = [] if value is True else value if isinstance(value, list) else [value]
        words += [name, *("=".join(v) if isinstance(v, tuple) else str(v) for v in values)]
    return shlex.join(words)


def derived_seed(*keys: int, purpose: str = "") -> int:
    """Return a 63-bit seed that depends on the given non-negative integers and their order only.

    Trailing zeros among them count for nothing. Folds, training and simulated cohorts have no
    purpose; whatever else is drawn has one, whose CRC-32 is the last key.
    """
    keys = (*keys, zlib.crc32(purpose.encode())) if purpose else keys
    return int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0] >> np.uint64(1))


def printable(text: str) -> str:
    """Return text with what no terminal or page should be sent as escapes, lines kept."""
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )


class PrintableFormatter(logging.Formatter):
    """Keep control characters of subjects and file names out of terminals and logs."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line to print."""
        return printable(super().format(record))


def start_log(log_path: Path | None = None, only_fold: int | None = None) -> None:
    """Log to stderr and to a file, of this rank and task; ranks but the first log only warnings."""
    log.setLevel(logging.INFO)
    logging.raiseExceptions = False  # a full disk loses lines instead of stopping the run
    while log.handlers:
        log.handlers.pop().close()
    speaker = f"[rank {rank()}] " if world_size() > 1 else ""
    to_stderr = logging.StreamHandler()
    to_stderr.setFormatter(PrintableFormatter(f"{speaker}%(message)s"))
    to_stderr.addFilter(lambda record: not hasattr(record, "is_said"))
    to_stderr.setLevel(logging.INFO if is_first() else logging.WARNING)
    log.addHandler(to_stderr)
    if log_path is not None:
        of_task = "" if only_fold is None else f"_f{only_fold}"
        of_rank = "" if is_first() else f".rank{rank()}"
        log_path = log_path.with_name(f"{log_path.stem}{of_task}{of_rank}.log")
        to_file = logging.FileHandler(log_path, encoding="utf-8", errors="backslashreplace")
        to_file.setFormatter(PrintableFormatter(f"%(asctime)s {speaker}%(levelname)s %(message)s"))
        log.addHandler(to_file)


class LogLines(io.StringIO):
    """Where a progress bar writes that has no terminal: each state of it is a line of the log."""

    def write(self, text: str) -> int:
        """Log what a bar shows."""
        if text.strip():
            log.info(text.strip())
        return len(text)


def progress(items: Iterable | None = None, description: str = "", **options) -> tqdm:
    """Return a progress bar on stderr, the first process's; without a terminal a line a minute."""
    options = {"leave": False, "dynamic_ncols": True} | options
    if not is_first():
        return tqdm(items, disable=True, **options)
    if not sys.stderr.isatty():
        options |= {"file": LogLines(), "delay": 60, "mininterval": 60, "maxinterval": 60,
                    "bar_format": LINE_FORMAT}  # fmt: skip
    return tqdm(items, description, **options)


def log_above_bars() -> contextlib.AbstractContextManager:
    """Return a block in which log lines go above progress bars."""
    # where there are no bars, tqdm would print all that a rank's level holds back
    return logging_redirect_tqdm([log]) if is_first() else contextlib.nullcontext()


def say(*lines: object) -> None:
    """Print lines; where they cannot be written (… | head, a full disk), go on without."""
    try:
        print(*lines, sep="\n", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def conclude(*lines: object) -> None:
    """Print a script's last lines, and write them into its log."""
    say(*lines)
    for line in lines:
        log.info("%s", line, extra={"is_said": True})


def some_of(names: Iterable, n_shown: int = 3) -> str:
    """Return the first few names, and how many more there are."""
    names = list(map(str, names))
    more = f" and {len(names) - n_shown} more" if len(names) > n_shown else ""
    return f"{', '.join(names[:n_shown])}{more}"


def named(noun: str, numbers: Iterable) -> str:
    """Return "fold 2" or "folds 1, 3"; "" of none."""
    numbers = list(map(str, numbers))
    return f"{noun}{'s' * (len(numbers) > 1)} {', '.join(numbers)}" if numbers else ""


def duration(seconds: float) -> str:
    """Return a time in the units that a person uses."""
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    for unit, smaller, length in (("min", "s", 60), ("h", "min", 3600)):
        if seconds < 120 * length:
            n_large, rest = divmod(seconds, length)
            return f"{n_large:.0f} {unit} {rest // (length // 60):.0f} {smaller}"
    return f"{seconds / 86400:.1f} days"


def now() -> str:
    """Return the time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
