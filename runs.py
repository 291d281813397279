"""The folder of a run: its record, whether the command typed now continues it, its checkpoints."""

import argparse
import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

import files
import folds
import run_record
import utils
from dataset import Cohort
from errors import InputError
from locks import LOCK_FOLDER, one_writer


@dataclass(frozen=True)
class RunKind:
    """How a script keeps its runs.

    Attributes
    ----------
    record_name : str
        File name of the record, such as run.json.
    options : tuple of str
        Arguments that change results; the others may differ when a run is continued.
    results : tuple of str
        Regular expressions of the files that a run writes and a run anew removes, as paths below
        --outpath; first those that say that a fold is finished.
    shared : str, optional
        The same of files that all runs in a folder write alike; a run anew leaves them.
    """

    record_name: str
    options: tuple[str, ...]
    results: tuple[str, ...]
    shared: str = ""

    @property
    def start_lock(self) -> str:
        """The name of the lock that is held while a run begins, or a record changes."""
        return f"{Path(self.record_name).stem}_start"

    def lock_name(self, fold: int | str) -> str:
        """Return the name of the lock that is held while a fold is worked on; "*": all such."""
        return f"{Path(self.record_name).stem}_fold_{fold}"

    def results_in(self, outpath: Path) -> list[Path]:
        """Return the results that stand in a folder, in the order in which they are removed."""
        return matching(outpath, *self.results)

    def without_record(self, outpath: Path) -> list[Path]:
        """Return what a run would replace in a folder that has no record of it."""
        is_anyones = any(outpath.glob("*run.json"))
        return self.results_in(outpath) + ([] if is_anyones else matching(outpath, self.shared))


def matching(outpath: Path, *expressions: str) -> list[Path]:
    """Return the files below a folder whose paths match, in the order of the expressions."""
    paths = sorted(path for depth in ("*", "*/*") for path in outpath.glob(depth))
    names = {path: path.relative_to(outpath).as_posix() for path in paths if path.is_file()}
    return [p for expression in expressions for p in names if re.fullmatch(expression, names[p])]


def how_to_go_on(args: argparse.Namespace) -> str:
    """Return what a message says of a run that was stopped; --overwrite would start it anew."""
    return f"the same command{' without --overwrite' * args.overwrite} goes on"


# Begin, or go on


def check_same_run(before: dict, record: dict, kind: RunKind, cohort: Cohort) -> None:
    """Refuse to continue a run with other options, another CSV, scans or checkpoints.

    Parameters
    ----------
    before, record : dict
        The run's record, and the one that the command typed now would write.
    kind : RunKind
    cohort : Cohort

    Raises
    ------
    InputError
        Naming each difference with both values.
    """
    outpath = record["arguments"]["outpath"]
    if not isinstance(before.get("arguments"), dict):
        raise InputError(
            f"{Path(outpath) / kind.record_name} does not say what the run's arguments were"
        )
    differing = run_record.differences(before, record, kind.options, cohort)
    if differing:
        raise InputError(
            f"{outpath} holds a run with other options: {'; '.join(differing)}. Choose another "
            "--outpath, or start anew with --overwrite"
        )


def refuse_to_replace(paths: list[Path], args: argparse.Namespace, kind: RunKind) -> None:
    """Raise an InputError if there are files that no run's record tells of."""
    if paths and not args.overwrite:
        names = run_record.some_of([str(path.relative_to(args.outpath)) for path in paths])
        raise InputError(
            f"{args.outpath} holds files that would be replaced, and no {kind.record_name} of the "
            f"run that made them: {names}. Choose another --outpath, or replace them with "
            "--overwrite"
        )


def open_run(
    args: argparse.Namespace, cohort: Cohort, record: dict, kind: RunKind
) -> tuple[dict, bool]:
    """Return the record to go on with, and whether it is new or that of a run in --outpath.

    Raises
    ------
    InputError
        If the run that is there has other options, or there are results without a record, and
        --overwrite is not given.
    """
    if args.overwrite and args.only_fold is not None:
        raise InputError("--overwrite starts a whole run anew: it does not go with --only-fold")
    utils.check_outpath(args.outpath)
    path = args.outpath / kind.record_name
    before = files.read_json(path) if path.is_file() else None
    if before and before.get("script") != record["script"]:
        raise InputError(
            f"{args.outpath} holds a run of {before.get('script')}: choose another --outpath"
        )
    if before is None:
        refuse_to_replace(kind.without_record(args.outpath), args, kind)
    if args.overwrite or before is None:
        return record, True
    check_same_run(before, record, kind, cohort)
    return before, False


def start_run(
    args: argparse.Namespace, cohort: Cohort, record: dict, kind: RunKind,
    splits: pd.DataFrame | None = None,
) -> tuple[dict, pd.DataFrame | None]:  # fmt: skip
    """Write what a run starts with, or take up the run that is there; return record and splits.

    Parameters
    ----------
    args : Namespace
        With outpath, overwrite and only_fold.
    cohort : Cohort
    record : dict
        Of `run_record.new_record`.
    kind : RunKind
    splits : DataFrame, optional
        The folds, for runs that write them; a run that goes on keeps its own.

    Raises
    ------
    InputError
        If the run that is there has other options or is damaged, another process is at work on it,
        or there are files of no run and --overwrite is not given.
    """
    splits_path = args.outpath / "splits.csv"
    _, is_new = open_run(args, cohort, record, kind)  # what is wrong is said before writing
    if is_new and splits is not None and splits_path.is_file():
        is_ours = splits_path.read_bytes() == files.csv_bytes(splits)  # of a run killed just then
        refuse_to_replace([] if is_ours else [splits_path], args, kind)
    utils.make_outpath(args.outpath)
    files.remove_leftovers(args.outpath)
    with one_writer(args.outpath, kind.start_lock, wait=True):
        n_folds = record["n_folds"]
        record, is_new = open_run(args, cohort, record, kind)
        if not is_new:
            return record, None if splits is None else read_own_splits(splits_path, cohort, n_folds)
        remove_run(args.outpath, kind)
        if splits is not None:
            files.write_csv(splits_path, splits)
        files.write_json(args.outpath / kind.record_name, record)
    return record, splits


def read_own_splits(splits_path: Path, cohort: Cohort, n_folds: int) -> pd.DataFrame:
    """Read the folds of a run that goes on, which must be as many as it has."""
    splits = folds.read_splits(splits_path, cohort)
    if folds.count(splits) != n_folds:
        raise InputError(f"{splits_path} has {folds.count(splits)} folds, the run has {n_folds}")
    return splits


def remove_run(outpath: Path, kind: RunKind) -> None:
    """Remove a run: its record, which vouches for the rest, then results, finished folds first."""
    for lock_path in (outpath / LOCK_FOLDER).glob(f"{kind.lock_name('*')}.lock"):
        with one_writer(outpath, lock_path.stem):
            pass  # nobody works on it
    (outpath / kind.record_name).unlink(missing_ok=True)
    for path in kind.results_in(outpath):
        path.unlink()


# Work on a run


def check_current(outpath: Path, kind: RunKind, record: dict) -> None:
    """Raise an InputError if the run in a folder is another than when this process began."""
    path = outpath / kind.record_name
    now = files.read_json(path) if path.is_file() else {}
    if any(now.get(key) != record.get(key) for key in ("run_id", "start")):
        raise InputError(
            f"another process has started the run in {outpath} anew since this one began; choose "
            "another --outpath"
        )


@contextlib.contextmanager
def at_work(outpath: Path, kind: RunKind, numbers: list[int], record: dict) -> Iterator[None]:
    """Hold the locks of folds of the run that this process has begun or taken up.

    Raises
    ------
    InputError
        If another process works on one of them, or has started the run anew meanwhile.
    """
    with contextlib.ExitStack() as locks:
        with one_writer(outpath, kind.start_lock, wait=True):  # nobody starts anew just now
            for fold in numbers:
                locks.enter_context(one_writer(outpath, kind.lock_name(fold)))
            check_current(outpath, kind, record)
        yield


def end_run(outpath: Path, kind: RunKind, record: dict) -> None:
    """Enter in a run's record when it ended."""
    with one_writer(outpath, kind.start_lock, wait=True):
        check_current(outpath, kind, record)
        files.write_json(outpath / kind.record_name, record | {"end": utils.now()})
