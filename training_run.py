"""The runs of train_cv.py: begun or taken up, one worker a fold, put together at the end."""

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch

import devices
import files
import fold_state
import folds
import metrics
import pictures
import run_record
import runs
import volume_cache
from dataset import Cohort
from errors import InputError, RunError, is_out_of_memory
from locks import one_writer
from teams import Team
from utils import log
from volume_file import Volumes

RUN = runs.RunKind(
    record_name="run.json",
    options=(
        "model", "batch", "fold", "lr", "wd", "epochs", "patience", "delta", "val_fraction", "seed",
        "precision",
    ),
    results=(
        r"predictions(_f\d+)?\.csv", r"checkpoint_f\d+\.pt", r"state_dict_f\d+\.pth",
        r"history_f\d+\.csv", r"(train|valid)_loss_f\d+\.npy", r"metrics\.csv",
        r"(loss_curves|roc)\.png",
    ),
)  # fmt: skip


# Begin, or go on


def wanted_folds(args: argparse.Namespace) -> list[int]:
    """Return the folds that were asked for."""
    return list(range(args.fold)) if args.only_fold is None else [args.only_fold]


def unfinished_folds(args: argparse.Namespace) -> list[int]:
    """Return the folds that were asked for and have not been tested yet."""
    return [f for f in wanted_folds(args) if not fold_state.is_finished(args.outpath, f)]


def open_cache(
    args: argparse.Namespace, cohort: Cohort, folder: Path
) -> contextlib.AbstractContextManager[Volumes | None]:
    """Return a block in which the cohort's scaled volumes are at hand, or None with --no-cache."""
    if args.no_cache:
        return contextlib.nullcontext()
    return volume_cache.opened(cohort, folder, args.workers)


def start_run(
    args: argparse.Namespace, cohort: Cohort, device: torch.device, cache_folder: Path
) -> tuple[dict, pd.DataFrame, list[int]]:
    """Draw the folds, or take up the run that is there; return record, splits and folds to train.

    Raises
    ------
    InputError
        If the folds cannot be drawn, the run that is there has other options, or the disk is too
        small for the decoded scans.
    """
    if args.only_fold is not None and args.only_fold >= args.fold:
        raise InputError(f"--only-fold {args.only_fold}: the folds are 0 to {args.fold - 1}")
    splits = folds.draw_folds(cohort, args.fold, args.val_fraction, args.seed)
    record = run_record.new_record(args, cohort, "train_cv.py", args.model)
    record["device"] = devices.describe_device(device)
    _, is_new = runs.open_run(args, cohort, record, RUN)
    if not args.no_cache and (is_new or unfinished_folds(args)):
        volume_cache.check_room(cohort, cache_folder)
    if not args.dry_run:
        record, splits = runs.start_run(args, cohort, record, RUN, splits)
    return record, splits, unfinished_folds(args)


# One fold


@contextlib.contextmanager
def only_worker(args: argparse.Namespace, record: dict, fold: int, team: Team) -> Iterator[bool]:
    """Hold a fold's lock; yield whether the fold is still to be trained.

    Raises
    ------
    InputError
        If another process works on it, or has started the run anew.
    RunError
        If memory does not suffice.
    """
    lock = runs.at_work(args.outpath, RUN, [fold], record)
    with lock if team.leads else contextlib.nullcontext():
        try:
            yield team.gathered(not fold_state.is_finished(args.outpath, fold))[0]
        except RuntimeError as error:
            raise_without_memory(error, args, f"fold {fold}")


def raise_without_memory(error: RuntimeError, args: argparse.Namespace, place: str) -> None:
    """Raise an error again, one of missing memory as a RunError that says what to do."""
    if not is_out_of_memory(error):
        raise error
    reason = str(error).splitlines()[0]
    raise RunError(
        f"out of memory in {place}: use less than --batch {args.batch} ({reason})"
    ) from None


# All folds


def assemble(args: argparse.Namespace, cohort: Cohort) -> pd.DataFrame:
    """Write what all folds have in common, from each fold's files; return the metrics."""
    predictions = metrics.gather_predictions(args.outpath, range(args.fold), cohort.table["path"])
    table = metrics.metrics_table(predictions, cohort.subjects, args.seed)
    files.write_csv(args.outpath / "predictions.csv", predictions)
    files.write_csv(args.outpath / "metrics.csv", table)
    histories = [
        files.read_csv(args.outpath / f"history_f{fold}.csv", pictures.LOSS_COLUMNS)
        for fold in range(args.fold)
    ]
    pictures.plot_loss_curves(args.outpath / "loss_curves.png", histories)
    pictures.plot_roc(args.outpath / "roc.png", predictions, table)
    return table


def finish(args: argparse.Namespace, cohort: Cohort, record: dict) -> None:
    """Put the folds together, if all are finished, and print the metrics."""
    missing = [fold for fold in range(args.fold) if not fold_state.is_finished(args.outpath, fold)]
    for fold in set(range(args.fold)) - set(missing):  # left by a process killed just then
        fold_state.checkpoint_path_of(args.outpath, fold).unlink(missing_ok=True)
    if missing:
        log.info("folds still to be trained: %s", missing)
        return
    with one_writer(args.outpath, "assemble_run", wait=True):
        table = assemble(args, cohort)
        runs.end_run(args.outpath, RUN, record)
    volume_cache.remove_all(args.outpath)
    print(table.to_string(index=False, float_format="%.3f"))
