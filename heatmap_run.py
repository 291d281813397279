"""The runs of heatmap.py: what each method keeps in --outpath, and its mean map over the folds."""

import argparse
from pathlib import Path

import nibabel as nib
import pandas as pd

import files
import map_files
import maps
import pictures
import report
import run_record
import runs
import utils
from dataset import Cohort
from errors import RunError
from locks import one_writer
from trained_run import Fold
from utils import log

IG_TOLERANCE = 0.05  # median completeness error above which more --steps are advised
RESULT_OPTIONS = (
    "model", "target", "subjects", "by_outcome", "save_subjects", "randomize", "fold",
)  # fmt: skip
METHOD_OPTIONS = {"LRP": ("beta",), "IG": ("steps",), "GGC": ()}


def method_options(args: argparse.Namespace) -> dict[str, dict]:
    """Return each method's own parameters."""
    return {"LRP": {"beta": args.beta}, "IG": {"n_steps": args.steps}, "GGC": {}}


def stem_of(args: argparse.Namespace, method: str) -> str:
    """Return what the names of a method's files begin with."""
    return f"{method}_random" if args.randomize else method


def kind_of(args: argparse.Namespace, method: str) -> runs.RunKind:
    """Return how a method keeps its runs."""
    stem = stem_of(args, method)
    options = RESULT_OPTIONS + METHOD_OPTIONS[method] + (("seed",) if args.randomize else ())
    results = (
        rf"{stem}_predictions(_f\d+)?\.csv",
        rf"{stem}_map_all\.(nii\.gz|json|png|html)",
        rf"{stem}_map_(({'|'.join(maps.OUTCOMES)})(_f\d+)?|f\d+)\.nii\.gz",
        rf"{stem}_subjects/\d+_[\w-]*_f\d+\.nii\.gz",
    )
    mean_scans = r"mean_scan(_f\d+)?\.nii\.gz"
    return runs.RunKind(f"{stem}_run.json", options, results, mean_scans)


def start_methods(args: argparse.Namespace, cohort: Cohort, plan: list[Fold]) -> dict[str, dict]:
    """Take up each method's run in --outpath, or begin one; return their records."""
    record = run_record.new_record(args, cohort, "heatmap.py", args.model)
    record["modelpath_sha256"] = {
        fold.checkpoint_path.name: files.sha256(fold.checkpoint_path) for fold in plan
    }
    if args.subjects == "test":
        record["modelpath_sha256"]["splits.csv"] = files.sha256(args.modelpath / "splits.csv")
    kinds = {method: kind_of(args, method) for method in args.method}
    for kind in kinds.values():  # says what is wrong before anything is written
        runs.open_run(args, cohort, record, kind)
    if args.dry_run:
        return {}
    return {method: runs.start_run(args, cohort, record, kind)[0] for method, kind in kinds.items()}


def unfinished_methods(args: argparse.Namespace, fold: Fold) -> list[str]:
    """Return the methods that have not yet explained a fold."""
    todo = []
    for method in args.method:
        if map_files.is_finished(args.outpath, stem_of(args, method), fold.number):
            log.info("fold %d is explained by %s already", fold.number, method)
        else:
            todo.append(method)
    return todo


def check_weights(fold: Fold, records: dict[str, dict]) -> None:
    """Raise a RunError if a fold's weights have changed since the runs began."""
    path = fold.checkpoint_path
    found = files.sha256(path) if path.is_file() else None
    if any(found != record["modelpath_sha256"][path.name] for record in records.values()):
        raise RunError(
            f"{path} has changed since these maps were begun: when training is done, start anew "
            "with --overwrite"
        )


# All folds


def assemble(
    args: argparse.Namespace, cohort: Cohort, plan: list[Fold], records: dict[str, dict]
) -> list[Path]:
    """Put together the methods that have explained every fold; return what was written."""
    written = []
    numbers = [fold.number for fold in plan]
    with one_writer(args.outpath, "assemble_maps", wait=True):
        for method, record in records.items():
            stem = stem_of(args, method)
            todo = [i for i in numbers if not map_files.is_finished(args.outpath, stem, i)]
            if todo:
                log.info("%s: folds %s are still to be explained", method, todo)
                continue
            mean_scan_path = map_files.write_mean_scan(args.outpath, stem, numbers, cohort)
            table, paths = map_files.assemble(args.outpath, stem, numbers, cohort, args.by_outcome)
            written += [mean_scan_path, *paths, write_sidecar(args, method, table, record)]
            written += draw_map(args, method)
    return list(dict.fromkeys(written))


def write_sidecar(args: argparse.Namespace, method: str, table: pd.DataFrame, record: dict) -> Path:
    """Write how a method's mean map was made; return the path."""
    error = None if method == "GGC" else float(table["completeness_error"].median())
    log_completeness(method, error)
    sidecar = {
        "method": method,
        "random_weights": args.randomize,
        "parameters": method_options(args)[method],
        "target": args.target,
        "subjects": args.subjects,
        "model": args.model,
        "seed": args.seed,
        "scans_per_fold": {str(fold): int(n) for fold, n in table.groupby("fold").size().items()},
        "background": "mean_scan.nii.gz",
        "median_completeness_error": error,
        "checkpoints_sha256": {
            name: sha256
            for name, sha256 in record["modelpath_sha256"].items()
            if name != "splits.csv"
        },
        "versions": utils.versions(),
    }
    path = args.outpath / f"{stem_of(args, method)}_map_all.json"
    files.write_json(path, sidecar)
    return path


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
