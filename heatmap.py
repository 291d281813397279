"""Explain every held-out scan by the network that has not seen it, and average the maps.

    python3 heatmap.py --path ./data.csv --modelpath ./output/ --model modelA24 --method LRP \\
        --outpath ./LRP/ --device 0
    python3 heatmap.py --path ./data.csv --modelpath ./output/ --model modelA24 \\
        --method LRP IG GGC --outpath ./maps/

LRP: layer-wise relevance propagation, β-rule. IG: integrated gradients from baseline 0. GGC: guided
Grad-CAM at the last convolution. All explain the logit of --target.

Typed again, an interrupted command goes on with the folds that are not finished. Under torchrun
the scans of each fold are shared among the processes.

Written to --outpath, {M} being the method: {M}_map_f*.nii.gz, their mean {M}_map_all.nii.gz with
.json, .png and .html beside it, {M}_predictions.csv, mean_scan.nii.gz, {M}_run.json, heatmap.log.
"""

import argparse
import contextlib
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

import attribution
import checkpoints
import dataset
import devices
import explaining
import files
import heatmap_run
import loading
import map_files
import maps
import models
import ranks
import rehearsal
import runs
import trained_run
import utils
from trained_run import Fold
from utils import log

# One fold


def set_weights(
    args: argparse.Namespace, model: nn.Module, fold: Fold, records: dict[str, dict]
) -> None:
    """Give the model the fold's trained weights or, with --randomize, freshly drawn ones.

    Raises
    ------
    RunError
        If the weights are not those that the run began with.

    References
    ----------
    Adebayo et al., NeurIPS 2018, arXiv:1810.03292
    """
    if not args.randomize:
        heatmap_run.check_weights(fold, records)
        checkpoints.load_weights(model, fold.checkpoint_path)
        return
    utils.seed_everything(args.seed, fold.number)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


def explain_fold(
    args: argparse.Namespace, cohort: dataset.Cohort, fold: Fold, methods: list[str],
    model: nn.Module, device: torch.device,
) -> tuple[dict[str, maps.FoldResult], maps.RunningMean]:  # fmt: skip
    """Explain a fold's scans; return each method's result and the mean scan.

    Under torchrun the scans are shared among the job's processes.
    """
    scans = dataset.ScanDataset(cohort.table, fold.rows[ranks.rank() :: ranks.world_size()])
    loader = DataLoader(
        scans, args.batch, num_workers=args.workers, pin_memory=device.type == "cuda",
        worker_init_fn=loading.ignore_interrupts,
    )  # fmt: skip
    n_at_once = dict.fromkeys((*methods, explaining.FORWARD), args.batch)
    explainer = explaining.Explainer(model, heatmap_run.method_options(args), n_at_once)
    zero_logits = explainer.logits(torch.zeros(1, 1, *cohort.volume_shape, device=device))[0]
    results, mean_scan = {method: maps.FoldResult() for method in methods}, maps.RunningMean()
    bar = utils.progress(None, f"fold {fold.number}", total=len(scans), unit="scan", leave=False)

    def take_in(method: str, rows: list[int], found: np.ndarray, *about_scans) -> None:
        """Add the maps of a batch, and a row of the table for each."""
        described = maps.describe_scans(method, fold.number, found, zero_logits, *about_scans)
        for row, line, map_data in zip(rows, described, found, strict=True):
            if scan_maps:
                line["map"] = scan_maps[method].name_of(row)
            results[method].add(row, line, map_data, args.by_outcome)

    with bar, files.Background() as writer, files.Background(n_threads=1) as adder:
        scan_maps = {
            m: map_files.ScanMaps(
                args.outpath, heatmap_run.stem_of(args, m), cohort, fold.number, writer
            )
            for m in (methods if args.save_subjects else [])
        }
        for volumes, labels, rows in loading.batches(loader):
            for volume in volumes:
                adder.submit(mean_scan.add, volume[0].numpy())
            volumes, rows = volumes.to(device, non_blocking=True), rows.tolist()
            logits = explainer.logits(volumes)
            targets = maps.choose_targets(args.target, labels, logits.argmax(1))
            paths = cohort.table["path"].iloc[rows].tolist()
            for method in methods:
                found = scan_maps[method].read(rows) if scan_maps else None
                if found is None:
                    found = explainer.maps(method, volumes, targets.to(device), paths).numpy()
                    if scan_maps:
                        scan_maps[method].write(rows, found)
                adder.submit(take_in, method, rows, found, paths, labels, logits, targets)
            bar.update(len(rows))
    if scans.n_nonfinite.any():
        log.warning("fold %d: %d non-finite voxels set to 0", fold.number, scans.n_nonfinite.sum())
    for gathering in (*results.values(), mean_scan):
        gathering.gather(cohort.volume_shape)
    return results, mean_scan


def rehearse(
    args: argparse.Namespace, cohort: dataset.Cohort, plan: list[Fold], model: nn.Module,
    device: torch.device,
) -> None:  # fmt: skip
    """Print what the run would take, from maps of the first scans."""
    n_at_once = dict.fromkeys(args.method, args.batch)
    explainer = explaining.Explainer(model, heatmap_run.method_options(args), n_at_once)
    paths = cohort.table["path"].iloc[: args.batch].tolist()
    explain = {
        method: lambda volumes, targets, method=method: explainer.maps(
            method, volumes, targets, paths
        )
        for method in args.method
    }
    n_scans = sum(len(fold.rows) for fold in plan)
    n_maps = (len(maps.OUTCOMES) + 1 if args.by_outcome else 1) * (len(plan) + 1)
    n_maps += n_scans if args.save_subjects else 0
    text, disk_needs = rehearsal.describe_explaining(
        cohort, explain, args.batch, n_scans, n_maps, device, args.outpath
    )
    print(text)
    rehearsal.check_disks(disk_needs)


def work_on_fold(
    args: argparse.Namespace, cohort: dataset.Cohort, fold: Fold, records: dict[str, dict],
    model: nn.Module, device: torch.device,
) -> None:  # fmt: skip
    """Explain a fold by the methods that have not yet done so, and write its files."""
    with contextlib.ExitStack() as locks:
        for method in sorted(args.method) if ranks.is_first() else []:
            kind = heatmap_run.kind_of(args, method)
            lock = runs.at_work(args.outpath, kind, [fold.number], records[method])
            locks.enter_context(lock)
        methods = ranks.from_first(lambda: heatmap_run.unfinished_methods(args, fold))
        if not methods:
            return
        set_weights(args, model, fold, records)
        results, mean_scan = explain_fold(args, cohort, fold, methods, model, device)
        if ranks.is_first():
            scan_path = args.outpath / f"mean_scan_f{fold.number}.nii.gz"
            files.write_map(scan_path, mean_scan.mean(), cohort.like_img)
            for method, result in results.items():
                stem = heatmap_run.stem_of(args, method)
                map_files.write_fold(args.outpath, stem, fold.number, result, cohort.like_img)


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
           help=f"folds of the run; left out: as its run.json says, or {trained_run.N_FOLDS}")
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
    option("--only-fold", type=number(int, at_least=0), default=None, metavar="FOLD",
           help="explain this fold only; whoever finishes the last one puts all together")
    option("--overwrite", action="store_true", help="start anew where --outpath holds other maps")
    option("--dry-run", action="store_true",
           help="check everything, say what it would take, and write nothing")
    option("--workers", type=number(int, at_least=0), default=utils.N_WORKERS,
           help="processes that read scans; 0: the main process reads")
    # fmt: on
    args = parser.parse_args(argv)
    args.method = list(dict.fromkeys(args.method))
    return args


def check_input(
    args: argparse.Namespace,
) -> tuple[torch.device, dataset.Cohort, nn.Module, list[Fold]]:
    """Return device, cohort, model and the folds to explain, or say what is wrong."""
    device = devices.select_device(args.device)
    cohort = dataset.read_cohort(args.path)
    model = models.build_model(args.model, cohort.volume_shape).to(device).eval()
    plan = trained_run.plan_folds(args, cohort)
    for fold in plan:
        checkpoints.load_weights(model, fold.checkpoint_path)
    return device, cohort, model, plan


def main(args: argparse.Namespace) -> None:
    """Explain every fold's scans, then put the folds together."""
    utils.start_log()
    devices.set_precision("fp32")
    device, cohort, model, plan = ranks.agreed(lambda: check_input(args))
    args.fold = len(plan)
    records = ranks.from_first(lambda: heatmap_run.start_methods(args, cohort, plan))
    if args.dry_run:
        return rehearse(args, cohort, plan, model, device) if ranks.is_first() else None
    utils.start_log(args.outpath / utils.log_name("heatmap", args.only_fold))
    log.info(
        "%s of %d folds on %s", " ".join(args.method), len(plan), devices.describe_device(device)
    )
    with utils.log_above_bars():
        for fold in utils.progress(plan, "folds"):
            if args.only_fold in (None, fold.number):
                work_on_fold(args, cohort, fold, records, model, device)
    if ranks.is_first():
        print(*heatmap_run.assemble(args, cohort, plan, records), sep="\n")


if __name__ == "__main__":
    arguments = parse_args()
    kept = "Finished folds are kept, with --save-subjects also scans"
    sys.exit(utils.run_script(main, arguments, f"{kept}: {runs.how_to_go_on(arguments)}."))
