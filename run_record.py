"""The record of a run: what it says, and how it differs from what a command would write now."""

import argparse
import hashlib
import uuid
from datetime import datetime
from pathlib import Path

import files
import scan_files
import utils
from dataset import Cohort
from errors import InputError

MAX_NAMED = 3


def new_record(args: argparse.Namespace, cohort: Cohort, script: str, model: str) -> dict:
    """Return what run.json says of a run that starts now."""
    return {
        "run_id": uuid.uuid4().hex,
        "script": script,
        "model": model,
        "n_folds": args.fold,
        "arguments": {name: files.plain(value) for name, value in vars(args).items()},
        "csv_sha256": hash_of(args.path),
        "scans_sha256": stamp_of(cohort),
        "n_scans": len(cohort.table),
        "volume_shape": cohort.volume_shape,
        "affine": cohort.like_img.affine.tolist(),
        "seed": args.seed,
        "versions": utils.versions(),
        "start": utils.now(),
        "end": None,
    }


def hash_of(csv_path: Path) -> str:
    """Return the SHA-256 of the CSV, in hex.

    Raises
    ------
    InputError
        If it is there no more.
    """
    try:
        return files.sha256(csv_path)
    except OSError as error:
        raise InputError(f"{csv_path} cannot be read any more: {error.strerror}") from None


def stamp_of(cohort: Cohort) -> str:
    """Return a hash of all scans' sizes and modification times.

    Raises
    ------
    InputError
        If a scan is there no more.
    """
    try:
        stamps = [scan_files.stamp(file) for file in cohort.table["file"]]
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read any more: {error.strerror}") from None
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
    return some_of(changed) or "sizes or times differ"


def some_of(names: list[str]) -> str:
    """Return the first few names, and how many more there are."""
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return f"{', '.join(names[:MAX_NAMED])}{more}"


def differences(before: dict, record: dict, options: tuple[str, ...], cohort: Cohort) -> list[str]:
    """Say in what a run differs from the command typed now: options, CSV, scans, checkpoints.

    Parameters
    ----------
    before, record : dict
        The run's record, and the one that the command would write.
    options : tuple of str
        Arguments that change results.
    cohort : Cohort

    Returns
    -------
    list of str
        Each with both values, where there are two.
    """
    then, now = before["arguments"], record["arguments"]
    differing = [
        f"--{name.replace('_', '-')} {now[name]} (the run has {then.get(name)})"
        for name in options
        if then.get(name) != now[name]
    ]
    if before.get("csv_sha256") != record["csv_sha256"]:
        differing.append(f"--path {now['path']} (its content has changed)")
    elif before.get("scans_sha256") != record["scans_sha256"]:
        differing.append(f"the scans have changed ({changed_since(cohort, before.get('start'))})")
    if before.get("modelpath_sha256") != record.get("modelpath_sha256"):
        is_same_path = then.get("modelpath") == now["modelpath"]
        why = "its files have changed" if is_same_path else f"the run has {then.get('modelpath')}"
        differing.append(f"--modelpath {now['modelpath']} ({why})")
    return differing
