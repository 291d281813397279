"""The folder of a run: its record, whether the command typed now continues it, its checkpoints."""

import argparse
import hashlib
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import pandas as pd

import files
import folds
import scan_files
import utils
from dataset import Cohort
from errors import InputError
from locks import one_writer

MAX_NAMED = 3


@dataclass(frozen=True)
class RunKind:
    """How a script keeps its runs.

    Attributes
    ----------
    record_name : str
        File name of the record, such as run.json.
    options : tuple of str
        Arguments that change results; the others may differ when a run is continued.
    fold_files : tuple of str
        Patterns of the files that a run anew removes: those that say how far a fold has come.
    """

    record_name: str
    options: tuple[str, ...]
    fold_files: tuple[str, ...]

    def lock_name(self, fold: int) -> str:
        """Return the name of the lock that is held while a fold is worked on."""
        return f"{Path(self.record_name).stem}_fold_{fold}"


# Records


def new_record(args: argparse.Namespace, cohort: Cohort, script: str, model: str) -> dict:
    """Return what run.json says of a run that starts now."""
    return {
        "script": script,
        "model": model,
        "n_folds": args.fold,
        "arguments": {name: files.plain(value) for name, value in vars(args).items()},
        "csv_sha256": files.sha256(args.path),
        "scans_sha256": stamp_of(cohort),
        "n_scans": len(cohort.table),
        "volume_shape": cohort.volume_shape,
        "affine": cohort.like_img.affine.tolist(),
        "seed": args.seed,
        "versions": utils.versions(),
        "start": utils.now(),
        "end": None,
    }


def stamp_of(cohort: Cohort) -> str:
    """Return a hash of all scans' sizes and modification times."""
    stamps = (scan_files.stamp(file) for file in cohort.table["file"])
    text = "".join(f"{n_bytes} {time_ns}\n" for n_bytes, time_ns in stamps)
    return hashlib.sha256(text.encode()).hexdigest()


def changed_since(cohort: Cohort, start: str) -> str:
    """Name scans that were modified after a time in ISO 8601."""
    try:
        start_s = datetime.fromisoformat(start).timestamp() + 1  # it is rounded down
    except (TypeError, ValueError):
        return "sizes or times differ"
    paths = zip(cohort.table["path"], cohort.table["file"], strict=True)
    changed = [path for path, file in paths if Path(file).stat().st_mtime > start_s]
    more = f" and {len(changed) - MAX_NAMED} more" if len(changed) > MAX_NAMED else ""
    return f"{', '.join(changed[:MAX_NAMED])}{more}" if changed else "sizes or times differ"


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
    then, now = before.get("arguments"), record["arguments"]
    if not isinstance(then, dict):
        raise InputError(
            f"{Path(now['outpath']) / kind.record_name} does not say what the run's arguments were"
        )
    differing = [
        f"--{name.replace('_', '-')} {now[name]} (the run has {then.get(name)})"
        for name in kind.options
        if then.get(name) != now[name]
    ]
    if before.get("csv_sha256") != record["csv_sha256"]:
        differing.append(f"--path {now['path']} (its content has changed)")
    elif before.get("scans_sha256") != record["scans_sha256"]:
        differing.append(f"the scans have changed ({changed_since(cohort, before.get('start'))})")
    if before.get("modelpath_sha256") != record.get("modelpath_sha256"):
        differing.append(f"--modelpath {now['modelpath']} (its files have changed)")
    if differing:
        raise InputError(
            f"{now['outpath']} holds a run with other options: {'; '.join(differing)}. Choose "
            "another --outpath, or start anew with --overwrite"
        )


def open_run(
    args: argparse.Namespace, cohort: Cohort, record: dict, kind: RunKind
) -> tuple[dict, bool]:
    """Return the record to go on with, and whether it is new or that of a run in --outpath.

    Raises
    ------
    InputError
        If the run that is there has other options and --overwrite is not given.
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
        Of `new_record`.
    kind : RunKind
    splits : DataFrame, optional
        The folds, for runs that write them; a run that goes on keeps its own.

    Raises
    ------
    InputError
        If the run that is there has other options, or another process is at work on it.
    """
    open_run(args, cohort, record, kind)  # says what is wrong before anything is written
    utils.make_outpath(args.outpath)
    files.remove_leftovers(args.outpath)
    with one_writer(args.outpath, f"{Path(kind.record_name).stem}_start", wait=True):
        record, is_new = open_run(args, cohort, record, kind)
        splits_path = args.outpath / "splits.csv"
        if not is_new:
            return record, None if splits is None else folds.read_splits(splits_path, cohort)
        stale = [path for pattern in kind.fold_files for path in args.outpath.glob(pattern)]
        for fold in range(record["n_folds"] if stale else 0):
            with one_writer(args.outpath, kind.lock_name(fold)):
                pass  # nobody works on it
        for path in stale:
            path.unlink()
        if splits is not None:
            files.write_csv(splits_path, splits)
        files.write_json(args.outpath / kind.record_name, record)
    return record, splits
