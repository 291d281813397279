"""The folder of a run: its record, and whether the command typed now continues it."""

import argparse
from pathlib import Path

import pandas as pd
import torch

import files
import utils
from dataset import Cohort
from utils import InputError

RESULT_OPTIONS = (  # other options may differ when a run is continued
    "model", "batch", "fold", "lr", "wd", "epochs", "patience", "delta", "val_fraction", "seed",
)  # fmt: skip
FOLD_FILES = ("state_dict_f*.pth", "checkpoint_f*.pt", "predictions*.csv")


def new_record(args: argparse.Namespace, cohort: Cohort, script: str, model: str) -> dict:
    """Return what run.json says of a run that starts now."""
    return {
        "script": script,
        "model": model,
        "n_folds": args.fold,
        "arguments": {name: files.plain(value) for name, value in vars(args).items()},
        "csv_sha256": files.sha256(args.path),
        "n_scans": len(cohort.table),
        "volume_shape": cohort.volume_shape,
        "affine": cohort.like_img.affine.tolist(),
        "seed": args.seed,
        "versions": utils.versions(),
        "start": utils.now(),
        "end": None,
    }


def open_run(args: argparse.Namespace, cohort: Cohort, device: torch.device) -> tuple[dict, bool]:
    """Return the run's record, and whether it is new or that of the run in --outpath.

    Raises
    ------
    InputError
        If --outpath holds a run with other options or another CSV, and --overwrite is not given.
    """
    run = new_record(args, cohort, "train_cv.py", args.model)
    run["device"] = utils.describe_device(device)
    run_path = args.outpath / "run.json"
    if args.overwrite or not run_path.is_file():
        return run, True
    before = files.read_json(run_path)
    check_same_run(before, args, run["csv_sha256"])
    return before, False


def check_same_run(run: dict, args: argparse.Namespace, csv_sha256: str) -> None:
    """Refuse to continue a run with other options or another CSV."""
    before = run.get("arguments")
    if not isinstance(before, dict):
        raise InputError(f"{args.outpath / 'run.json'} does not say what the run's arguments were")
    differing = [
        f"--{name.replace('_', '-')} {getattr(args, name)} (the run has {before.get(name)})"
        for name in RESULT_OPTIONS
        if before.get(name) != getattr(args, name)
    ]
    if run.get("csv_sha256") != csv_sha256:
        differing.append(f"--path {args.path} (its content has changed)")
    if differing:
        raise InputError(
            f"{args.outpath} holds a run with other options: {'; '.join(differing)}. Choose "
            "another --outpath, or start anew with --overwrite"
        )


def start_run(outpath: Path, run: dict, is_new: bool, splits: pd.DataFrame) -> None:
    """Write what a run starts with; a new one first removes what another has left of its folds."""
    utils.make_outpath(outpath)
    if is_new:
        for path in (path for pattern in FOLD_FILES for path in outpath.glob(pattern)):
            path.unlink()
    files.write_json(outpath / "run.json", run)
    files.write_csv(outpath / "splits.csv", splits)
