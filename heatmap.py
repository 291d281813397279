"""Explain every held-out scan by the network that has not seen it, and average the maps.

    python3 heatmap.py --path ./data.csv --modelpath ./output/ --model modelA24 --method LRP \\
        --outpath ./LRP/ --device 0
    python3 heatmap.py --path ./data.csv --modelpath ./output/ --model modelA24 \\
        --method LRP IG GGC --outpath ./maps/

LRP: layer-wise relevance propagation, β-rule. IG: integrated gradients from baseline 0. GGC: guided
Grad-CAM at the last convolution. All explain the logit of --target.

Written to --outpath, {M} being the method: {M}_map_f*.nii.gz, their mean {M}_map_all.nii.gz with
.json, .png and .html beside it, {M}_predictions.csv, mean_scan.nii.gz and heatmap.log.
"""

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import attribution
import dataset
import files
import folds
import maps
import models
import pictures
import report
import utils
from utils import InputError, RunError, log

N_FOLDS = 5  # of a folder without run.json
IG_TOLERANCE = 0.05  # median completeness error above which more --steps are advised
MAX_NAME_BYTES = 80  # of a scan's name in the name of its map


@dataclass(frozen=True)
class Fold:
    """One fold to explain: its number, its checkpoint, and the cohort's rows it explains."""

    number: int
    checkpoint_path: Path
    rows: np.ndarray


# What is to be explained


def plan_folds(args: argparse.Namespace, cohort: dataset.Cohort) -> list[Fold]:
    """Return the folds of the run in --modelpath, each with the scans it explains."""
    if not args.modelpath.is_dir():
        raise InputError(f"there is no folder --modelpath {args.modelpath}")
    n_folds = number_of_folds(args, cohort)
    rows_of_fold = [np.arange(len(cohort.table))] * n_folds
    if args.subjects == "test":
        splits = folds.read_splits(args.modelpath / "splits.csv", cohort)
        missing = [f for f in range(n_folds) if f"fold_{f}" not in splits]
        if missing:
            raise InputError(f"{args.modelpath / 'splits.csv'} has no column fold_{missing[0]}")
        rows_of_fold = [np.flatnonzero(splits[f"fold_{f}"] == "test") for f in range(n_folds)]
    return [
        Fold(number, args.modelpath / f"state_dict_f{number}.pth", rows)
        for number, rows in enumerate(rows_of_fold)
    ]


def number_of_folds(args: argparse.Namespace, cohort: dataset.Cohort) -> int:
    """Return how many folds the run has, and hold its record against options and scans."""
    run_path = args.modelpath / "run.json"
    if not run_path.is_file():
        if (args.fold or 0) > len(cohort.table):
            raise InputError(f"--fold {args.fold} is more than there are scans")
        return args.fold or N_FOLDS
    run = files.read_json(run_path)
    if run.get("model") != args.model:
        raise InputError(f"{run_path} says the run trained {run.get('model')}, not {args.model}")
    if run.get("volume_shape") != list(cohort.volume_shape):
        raise InputError(
            f"{run_path} says the run's scans have shape {run.get('volume_shape')}, these have "
            f"{list(cohort.volume_shape)}"
        )
    if not same_affine(run.get("affine"), cohort.like_img.affine):
        raise InputError(f"{run_path} says the run's scans have another affine than these")
    n_folds = run.get("n_folds")
    if type(n_folds) is not int or not 1 <= n_folds <= len(cohort.table):
        raise InputError(
            f"{run_path} does not say how many folds there are (n_folds), 1 to the number of scans"
        )
    if args.fold not in (None, n_folds):
        raise InputError(f"{run_path} says the run has {n_folds} folds, not {args.fold}")
    return n_folds


def same_affine(recorded: object, affine: np.ndarray) -> bool:
    """Tell whether a record's affine is this one, whatever else the record may hold there."""
    try:
        recorded = np.array(recorded, dtype=float)
    except (TypeError, ValueError, OverflowError):
        return False
    return recorded.shape == affine.shape and np.allclose(
        recorded, affine, rtol=0, atol=dataset.AFFINE_TOLERANCE_MM
    )


# Explaining


def method_options(args: argparse.Namespace) -> dict[str, dict]:
    """Return each method's own parameters."""
    return {
        "LRP": {"beta": args.beta},
        "IG": {"n_steps": args.steps, "batch_size": args.batch},
        "GGC": {},
    }


def explain_batch(
    method: str, model: nn.Module, volumes: Tensor, targets: Tensor, options: dict, paths: list[str]
) -> np.ndarray:
    """Return the maps of a batch, float32 of shape (N, D, H, W)."""
    try:
        found = attribution.METHODS[method](model, volumes, targets, **options)
    except FloatingPointError as error:
        raise RunError(f"{method} of {' or '.join(paths)}: {error}") from None
    return found[:, 0].cpu().numpy()


def set_weights(args: argparse.Namespace, model: nn.Module, fold: Fold) -> None:
    """Give the model the fold's trained weights or, with --randomize, freshly drawn ones.

    References
    ----------
    Adebayo et al., NeurIPS 2018, arXiv:1810.03292
    """
    if not args.randomize:
        files.load_weights(model, fold.checkpoint_path)
        return
    utils.seed_everything(args.seed, fold.number)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


def explain_fold(
    args: argparse.Namespace, cohort: dataset.Cohort, fold: Fold, model: nn.Module,
    device: torch.device, results: dict[str, maps.MethodResults], mean_scan: maps.RunningMean,
) -> None:  # fmt: skip
    """Explain a fold's scans by every method and add their maps to the results."""
    scans = dataset.ScanDataset(cohort.table, fold.rows)
    loader = DataLoader(
        scans, args.batch, num_workers=args.workers, pin_memory=device.type == "cuda"
    )
    options = method_options(args)
    with torch.no_grad():
        zero_logits = model(torch.zeros(1, 1, *cohort.volume_shape, device=device))[0].tolist()
    bar = tqdm(total=len(scans), desc=f"fold {fold.number}", unit="scan", leave=False, disable=None)
    for volumes, labels, rows in loader:
        for volume in volumes:
            mean_scan.add(volume[0].numpy())
        volumes = volumes.to(device, non_blocking=True)
        with torch.no_grad():
            logits = model(volumes).cpu()
        paths = cohort.table["path"].iloc[rows.numpy()].tolist()
        targets = maps.choose_targets(args.target, labels, logits.argmax(1))
        for method in args.method:
            batch_maps = explain_batch(
                method, model, volumes, targets.to(device), options[method], paths
            )
            for i, map_data in enumerate(batch_maps):
                row = maps.describe_scan(
                    method, fold.number, paths[i], int(labels[i]), logits[i], int(targets[i]),
                    float(map_data.sum(dtype=np.float64)), zero_logits[targets[i]],
                )  # fmt: skip
                results[method].rows.append(row)
                results[method].of_fold.add(map_data)
                if args.by_outcome:
                    results[method].by_outcome[row["outcome"]].add(map_data)
                if args.save_subjects:
                    row["map"] = save_scan_map(args, cohort, fold, method, int(rows[i]), map_data)
        bar.update(len(rows))
    bar.close()
    if scans.n_nonfinite.any():
        log.warning("fold %d: %d non-finite voxels set to 0", fold.number, scans.n_nonfinite.sum())


# Writing


def stem_of(args: argparse.Namespace, method: str) -> str:
    """Return what the names of a method's files begin with."""
    return f"{method}_random" if args.randomize else method


def save_scan_map(
    args: argparse.Namespace, cohort: dataset.Cohort, fold: Fold, method: str, row: int,
    map_data: np.ndarray,
) -> str:  # fmt: skip
    """Write one scan's map; return its path below --outpath."""
    stem = re.sub(r"[^\w-]+", "_", Path(cohort.table["path"].iloc[row]).name.split(".")[0])
    stem = stem.encode()[:MAX_NAME_BYTES].decode(errors="ignore")
    name = f"{row + 1:05d}_{stem}_f{fold.number}.nii.gz"
    folder = args.outpath / f"{stem_of(args, method)}_subjects"
    folder.mkdir(exist_ok=True)
    files.write_map(folder / name, map_data, cohort.like_img)
    return f"{folder.name}/{name}"


def write_fold_maps(
    args: argparse.Namespace,
    cohort: dataset.Cohort,
    fold: Fold,
    results: dict[str, maps.MethodResults],
) -> list[Path]:
    """Write each method's mean map of a finished fold; return their paths."""
    written = []
    for method, result in results.items():
        path = args.outpath / f"{stem_of(args, method)}_map_f{fold.number}.nii.gz"
        files.write_map(path, result.of_fold.mean(), cohort.like_img)
        result.over_folds.add(result.of_fold.mean())
        result.of_fold = maps.RunningMean()
        written.append(path)
    return written


def write_summary(
    args: argparse.Namespace, cohort: dataset.Cohort, plan: list[Fold], method: str,
    result: maps.MethodResults,
) -> list[Path]:  # fmt: skip
    """Write what a method found over all folds; return the paths."""
    stem = stem_of(args, method)
    all_path = args.outpath / f"{stem}_map_all.nii.gz"
    table_path = args.outpath / f"{stem}_predictions.csv"
    files.write_map(all_path, result.over_folds.mean(), cohort.like_img)
    table = pd.DataFrame(result.rows)
    files.write_csv(table_path, table)
    written = [all_path, table_path]
    for outcome, mean in result.by_outcome.items():
        if mean.n:
            written.append(args.outpath / f"{stem}_map_{outcome}.nii.gz")
            files.write_map(written[-1], mean.mean(), cohort.like_img)
    sidecar = {
        "method": method,
        "random_weights": args.randomize,
        "parameters": method_options(args)[method],
        "target": args.target,
        "subjects": args.subjects,
        "model": args.model,
        "seed": args.seed,
        "scans_per_fold": {fold.number: len(fold.rows) for fold in plan},
        "background": "mean_scan.nii.gz",
        "median_completeness_error": None
        if method == "GGC"
        else table["completeness_error"].median(),
        "checkpoints_sha256": {
            f.checkpoint_path.name: files.sha256(f.checkpoint_path) for f in plan
        },
        "versions": utils.versions(),
    }
    files.write_json(args.outpath / f"{stem}_map_all.json", sidecar)
    log_completeness(method, sidecar["median_completeness_error"])
    return [*written, args.outpath / f"{stem}_map_all.json"]


def log_completeness(method: str, error: float | None) -> None:
    """Say how far a method's maps are from adding up, and why."""
    if method == "LRP":
        log.info(
            "LRP: median completeness error %.2g (relevance of neurons that see nothing but zeros, "
            "the background, is dropped)", error,
        )  # fmt: skip
    elif method == "IG" and error > IG_TOLERANCE:
        log.warning("IG: median completeness error %.2g; more --steps lower it", error)
    elif method == "IG":
        log.info("IG: median completeness error %.2g", error)


def draw_map(args: argparse.Namespace, method: str) -> list[Path]:
    """Draw a method's mean map over the mean scan, as a picture and as a page; return the paths."""
    stem = args.outpath / f"{stem_of(args, method)}_map_all"
    map_img = nib.load(stem.with_suffix(".nii.gz"))
    background_img = nib.load(args.outpath / "mean_scan.nii.gz")
    title = f"{method} of random weights" if args.randomize else f"{method}, mean over folds"
    pictures.plot_mosaic(stem.with_suffix(".png"), map_img, background_img, title)
    report.write_viewer(stem.with_suffix(".html"), map_img, background_img, title)
    return [stem.with_suffix(".png"), stem.with_suffix(".html")]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    number = utils.number
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=utils.HelpFormatter)
    utils.add_cohort_options(parser)
    utils.add_device_option(parser)
    option = parser.add_argument
    # fmt: off
    option("--modelpath", type=Path, required=True, metavar="DIR",
           help="the --outpath of train_cv.py")
    option("--model", required=True, metavar="NAME", help=f"one of: {', '.join(models.MODELS)}")
    option("--method", required=True, nargs="+", choices=list(attribution.METHODS),
           help="one or more")
    option("--fold", type=number(int, at_least=1), default=None,
           help=f"number of folds; left out: the run's, or {N_FOLDS} without a run.json")
    option("--batch", type=number(int, at_least=1), default=1,
           help="volumes, or IG steps, per pass")
    option("--steps", type=number(int, at_least=2), default=attribution.N_STEPS,
           help="IG: steps of the path")
    option("--beta", type=number(float, at_least=0), default=attribution.BETA,
           help="LRP: beta of the rule")
    option("--target", choices=["label", "predicted", "0", "1"], default="label",
           help="the class whose logit is explained")
    option("--subjects", choices=["test", "all"], default="test",
           help="test: each scan by the fold that held it out; all: every scan by every fold")
    option("--by-outcome", action="store_true", help="also one mean map per TP, TN, FP and FN")
    option("--save-subjects", action="store_true", help="also one map per scan")
    option("--randomize", action="store_true",
           help="explain freshly drawn weights instead: what the architecture alone highlights, a "
                "control for the maps, in files named {M}_random_*")
    option("--workers", type=number(int, at_least=0), default=1,
           help="processes that read scans; 0: the main process reads")
    # fmt: on
    args = parser.parse_args(argv)
    args.method = list(dict.fromkeys(args.method))
    return args


def main(args: argparse.Namespace) -> None:
    """Explain every fold's scans, then put the folds together."""
    utils.start_log()
    device = utils.select_device(args.device)
    cohort = dataset.read_cohort(args.path)
    model = models.build_model(args.model, cohort.volume_shape).to(device).eval()
    plan = plan_folds(args, cohort)
    for fold in plan:
        files.load_weights(
            model, fold.checkpoint_path
        )  # says what is wrong before anything is written

    utils.make_outpath(args.outpath)
    utils.start_log(args.outpath / "heatmap.log")
    log.info(
        "%s of %d folds on %s", " ".join(args.method), len(plan), utils.describe_device(device)
    )
    results = {method: maps.MethodResults() for method in args.method}
    mean_scan = maps.RunningMean()
    written = []
    with logging_redirect_tqdm([log]):
        for fold in tqdm(plan, "folds", disable=None):
            set_weights(args, model, fold)
            explain_fold(args, cohort, fold, model, device, results, mean_scan)
            written += write_fold_maps(args, cohort, fold, results)

    written.append(args.outpath / "mean_scan.nii.gz")
    files.write_map(written[-1], mean_scan.mean(), cohort.like_img)
    for method, result in results.items():
        written += write_summary(args, cohort, plan, method, result)
        written += draw_map(args, method)
    print(*written, sep="\n")


if __name__ == "__main__":
    sys.exit(utils.run_script(main, parse_args()))
