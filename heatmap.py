"""Explain every held-out scan by the network that has not seen it, and average the maps.

    python3 heatmap.py --path ./data.csv --modelpath ./output/ --model modelA24 --method LRP \\
        --outpath ./LRP/ --device 0
    python3 heatmap.py --path ./data.csv --modelpath ./output/ --model modelA24 \\
        --method LRP IG GGC SG --outpath ./maps/

LRP: layer-wise relevance propagation, β-rule. IG: integrated gradients from baseline 0. GGC: guided
Grad-CAM at the last convolution. SG: SmoothGrad, the mean gradient over noisy copies. All explain
the logit of --target.

The same command, typed again, resumes with the folds that are not finished. Under torchrun the
scans of each fold are shared among the processes.

Written to --outpath, {M} being the method: {M}_map_f*.nii.gz, their mean {M}_map_all.nii.gz with
.json, .png and .html beside it, {M}_predictions.csv, mean_scan.nii.gz, {M}_run.json, heatmap.log;
where --target is 0 or 1 also {M}_contrast_f*.nii.gz and _all, patients' mean map less controls'.
"""

import argparse
import contextlib
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

import dataset
import models
import utils
from loading import image
from reporting import map_pictures, maps, mean_maps, metrics
from reporting.maps import ExplainedScan, FoldMaps, RunningMean
from run_folder import checkpoints, files, folds, trained_run
from run_folder import device as devices
from run_folder.processes import from_first, run_script
from run_folder.run import RunFolder, locked, new_record
from run_folder.trained_run import TrainedFold
from utils import InputError, RunError, log, some_of

NO_CONTRAST = (
    "%s: no contrast of patients' and controls' maps, which explain different logits with --target "
    "%s; --target 1 gives it"
)
N_REHEARSED = 2  # maps of a dry run; the first sets things up and does not count
ONE_CLASS = ("0", "1")  # targets that explain one class for everybody
OPTIONS = ("model", "target", "subjects", "by_outcome", "save_subjects", "randomize", "fold")
PARAMETERS = {  # of each method, and the options that set them
    "LRP": {"beta": "beta"},
    "IG": {"n_steps": "steps"},
    "GGC": {"cam": "cam"},
    "SG": {"n_samples": "samples", "noise": "noise"},
}
CONTENTS = ("csv_sha256", "scan_sizes_sha256", "modelpath_sha256")


def stem_of(args: argparse.Namespace, method: str) -> str:
    """Return what the names of a method's files begin with."""
    return f"{method}_random" if args.randomize else method


def parameters_of(args: argparse.Namespace, method: str) -> dict:
    """Return a method's own parameters."""
    return {name: getattr(args, option) for name, option in PARAMETERS[method].items()}


def make_run(args: argparse.Namespace, method: str, record: dict) -> RunFolder:
    """Return the run of one method in --outpath."""
    stem = stem_of(args, method)
    results = (
        f"{stem}_predictions_f*.csv", f"{stem}_predictions.csv",
        *(f"{stem}_{kind}_f*.nii.gz" for kind in maps.KINDS),
        *(f"{stem}_map_{name}_f*.nii.gz" for name in maps.OUTCOMES),
        *(f"{stem}_map_{name}.{suffix}" for name in maps.OUTCOMES for suffix in maps.SUFFIXES),
        *(f"{stem}_{kind}_all.{suffix}" for kind in maps.KINDS for suffix in maps.SUFFIXES),
        f"{stem}_subjects/[0-9]*_f*.nii.gz",
    )  # fmt: skip
    drawn = ("seed",) if args.randomize or method == "SG" else ()
    compared = (*OPTIONS, *PARAMETERS[method].values(), *drawn, *CONTENTS)
    shared = tuple(
        f"{name}{fold}.nii.gz" for name in ("mean_scan", "coverage") for fold in ("", "_f*")
    )
    return RunFolder(args.outpath, stem, record, compared, results, shared)


def draw_weights(
    args: argparse.Namespace, cohort: dataset.Cohort, fold: TrainedFold, model: nn.Module,
    device: torch.device,
) -> None:  # fmt: skip
    """Make the model an untrained one, its statistics those of scans that the fold trained on."""
    devices.seed_everything(args.seed, fold.number, purpose="untrained")
    untrained = models.build_model(args.model, cohort.volume_shape)  # on the CPU, wherever it runs
    batch, _ = trained_run.arithmetic(args.modelpath)  # as in training
    batches = cohort.volumes(None, args.workers).batches(fold.train_rows, batch, device)
    models.take_untrained(model, untrained, (volumes for volumes, _ in batches))


@torch.no_grad()
def check_scans(
    args: argparse.Namespace, cohort: dataset.Cohort, plan: list[TrainedFold], model: nn.Module,
    device: torch.device,
) -> None:  # fmt: skip
    """Check the first test scan of each fold by the fold's trained weights."""
    for fold in plan:
        tested = np.flatnonzero(np.isfinite(fold.probabilities))
        if not len(tested):
            log.info("fold %d has no predictions: its scans are not checked", fold.number)
            continue
        row, expected = fold.rows[tested[0]], fold.probabilities[tested[0]]
        checkpoints.load_weights(fold.checkpoint_path, model)
        volumes, _ = next(cohort.volumes(None, 1).batches(np.array([row]), 1, device))
        found = float(torch.softmax(model(volumes)[0].double(), 0)[1])
        fold.check_probability(args.modelpath, cohort.table["path"].iloc[row], found, expected)


def refuse_seen(seen: list[str]) -> None:
    """Raise an InputError if the run was trained on some scans of a cohort."""
    if seen:
        rule = "--subjects new is for a cohort that the run has not seen; it was trained on"
        raise InputError(f"{rule} {len(seen)} of these scans: {some_of(seen)}")


def explain(
    args: argparse.Namespace, method: str, model: nn.Module, scans: torch.Tensor,
    targets: torch.Tensor, rows: np.ndarray, place: str,
) -> np.ndarray:  # fmt: skip
    """Return a method's maps of the scans in some rows, float32 of shape (N, D, H, W)."""
    import attribution

    options = parameters_of(args, method)
    if method == "IG":
        options["batch_size"] = args.batch
    if method == "SG":
        options["seed"] = [utils.derived_seed(args.seed, r, purpose="smoothgrad") for r in rows]
    try:
        with torch.enable_grad():
            maps_data = attribution.METHODS[method](model, scans, targets, **options)
    except FloatingPointError as error:
        raise RunError(f"{method} of {place}: {error}") from None
    return maps_data[:, 0].cpu().numpy()


@torch.no_grad()
def explain_fold(
    args: argparse.Namespace, cohort: dataset.Cohort, fold: TrainedFold, methods: list[str],
    model: nn.Module, device: torch.device, bar: tqdm,
) -> tuple[list[FoldMaps], dict[str, RunningMean]]:  # fmt: skip
    """Explain a fold's scans, shared among the job's processes.

    Returns the methods' maps, and by file name the mean scan and the share of scans that are not 0.
    """
    found, of_scans = [], {maps.MEAN_SCAN: RunningMean(), maps.COVERAGE: RunningMean()}
    names = maps.OUTCOMES * args.by_outcome + maps.GROUPS * (args.target in ONE_CLASS)
    subjects = cohort.table.get("subject", pd.Series("", cohort.table.index))
    for method in methods:
        groups = {name: RunningMean() for name in names}
        of_fold = (fold.number, args.outpath, cohort.like_img, args.save_subjects, groups)
        found.append(FoldMaps(method, stem_of(args, method), *of_fold))
    zero_logits = model(torch.zeros(1, 1, *cohort.volume_shape, device=device))[0].cpu().numpy()
    mine = np.arange(len(fold.rows))[utils.rank() :: utils.world_size()]
    chunks = [mine[start : start + args.batch] for start in range(0, len(mine), args.batch)]
    decoded, seen = cohort.volumes(None, args.workers), set(fold.seen["crc32"])
    batches = decoded.batches(fold.rows[mine], args.batch, device)
    for chunk, (volumes, labels) in zip(chunks, batches, strict=True):
        logits = model(volumes)
        targets = {"label": labels, "predicted": logits.argmax(1)}.get(args.target)
        if targets is None:
            targets = torch.full_like(labels, int(args.target))
        rows = fold.rows[chunk]
        is_seen = [decoded.facts[row]["crc32"] in seen for row in rows]  # in a file of another size
        refuse_seen(cohort.table["path"].iloc[rows[is_seen]].tolist())
        columns = (rows.tolist(), cohort.table["path"].iloc[rows], labels.tolist(),
                   fold.parts[chunk].tolist(), targets.tolist())  # fmt: skip
        columns += (logits.cpu().numpy(), subjects.iloc[rows].astype(str))
        scans = [ExplainedScan(*scan) for scan in zip(*columns, strict=True)]
        for scan, expected in zip(scans, fold.probabilities[chunk], strict=True):
            if np.isfinite(expected) and not args.randomize:
                fold.check_probability(args.modelpath, scan.path, scan.probability, expected)
        for volume in volumes.cpu().numpy():
            of_scans[maps.MEAN_SCAN].add(volume[0])
            of_scans[maps.COVERAGE].add(volume[0] != 0)
        for each in found:
            maps_data = each.saved(scans)
            if maps_data is None:
                place = f"{', '.join(scan.path for scan in scans)} in fold {fold.number}"
                maps_data = explain(args, each.method, model, volumes, targets, rows, place)
            for scan, map_data in zip(scans, maps_data, strict=True):
                each.add(scan, map_data, zero_logits)
        bar.update(len(chunk))
    for each in found:
        each.gather()
    for mean in of_scans.values():
        mean.gather(cohort.volume_shape)
    return found, of_scans


def work_on_fold(
    args: argparse.Namespace, cohort: dataset.Cohort, fold: TrainedFold, runs: dict[str, RunFolder],
    model: nn.Module, device: torch.device, bar: tqdm,
) -> None:  # fmt: skip
    """Explain a fold by the methods that have not yet done so, and write its files."""
    with contextlib.ExitStack() as held:

        def hold_all() -> list[str]:
            is_todo = {m: held.enter_context(run.hold(fold.number)) for m, run in runs.items()}
            return [method for method, is_unfinished in is_todo.items() if is_unfinished]

        methods = from_first(hold_all)
        if not methods:
            log.info("fold %d is explained already", fold.number)
            return
        record = runs[methods[0]].record
        if args.randomize:
            draw_weights(args, cohort, fold, model, device)
        else:
            fold.load_weights(model, record["modelpath_sha256"])
        found, of_scans = explain_fold(args, cohort, fold, methods, model, device, bar)
        if utils.is_first():
            with locked(args.outpath, "mean_scan", wait=True):
                for name, mean in of_scans.items():
                    path = args.outpath / name.replace(".", f"_f{fold.number}.", 1)
                    image.write_image(path, mean.mean(), cohort.like_img)
            for each in found:
                each.write()


def assemble(
    args: argparse.Namespace, cohort: dataset.Cohort, method: str, run: RunFolder,
    verdict: metrics.Verdict | None,
) -> list[Path]:  # fmt: skip
    """Write what a method found over all folds; return the files."""
    stem, n_folds = stem_of(args, method), run.record["n_folds"]
    with locked(args.outpath, "mean_scan", wait=True):
        described = f"{method} of {maps.LOGITS[args.target]}, {args.model}, mean over folds"
        table, shares, written = mean_maps.assemble(
            args.outpath, stem, n_folds, cohort.like_img, args.by_outcome, args.mean == "equal",
            described,
        )  # fmt: skip
    verdict = None if args.randomize else verdict  # it is about trained networks
    found = mean_maps.describe(method, table, shares)
    unit = maps.UNITS[method].format(maps.LOGITS[args.target])
    checkpoints_sha256 = dict(run.record["modelpath_sha256"])
    checkpoints_sha256.pop("splits.csv", None)
    sidecar = {
        "method": method,
        "random_weights": args.randomize,
        "parameters": parameters_of(args, method),
        "target": args.target,
        "unit": unit,
        "subjects": args.subjects,
        "model": args.model,
        "seed": args.seed,
        "mean": args.mean,
        "background": maps.MEAN_SCAN,
        "orientation": image.orientation_of(cohort.like_img),
        "verdict": verdict.sentence if verdict else None,
        "verdict_short": verdict.short if verdict else None,
        "checkpoints_sha256": checkpoints_sha256,
        "versions": utils.versions(),
        **found,
    }
    if args.target not in ONE_CLASS:
        log.info(NO_CONTRAST, method, args.target)
    for kind in maps.KINDS:
        map_stem = args.outpath / f"{stem}_{kind}_all"
        if map_stem.with_suffix(".nii.gz") not in written:
            continue
        files.write_json(map_stem.with_suffix(".json"), sidecar | {"map": kind})
        title = maps.title_of(sidecar | {"map": kind}) + (f" · {verdict.short}" if verdict else "")
        drawn = map_pictures.draw_map(map_stem, args.outpath / maps.MEAN_SCAN, title, unit)
        written += [map_stem.with_suffix(".json"), *drawn]
    if args.by_outcome:
        written += mean_maps.draw_outcomes(args.outpath, stem, method, table, unit)
    return written


def dry_run(
    args: argparse.Namespace, cohort: dataset.Cohort, plan: list[TrainedFold], model: nn.Module,
    device: torch.device,
) -> None:  # fmt: skip
    """Say what the run would take, from maps of the first scans; write nothing."""
    n_scans = sum(len(fold.rows) for fold in plan)
    utils.say(f"scans to explain, over all folds: {n_scans}")
    rows = np.arange(args.batch) % len(cohort.scans)
    scans, labels = next(cohort.volumes(None, args.workers).batches(rows, args.batch, device))
    for method in args.method:
        for _ in range(N_REHEARSED):
            start = time.perf_counter()
            explain(args, method, model, scans, labels, rows, "the first scans")
            seconds = (time.perf_counter() - start) / args.batch
        utils.say(
            f"{method}: {utils.duration(seconds)} a scan, {utils.duration(seconds * n_scans)} in "
            f"all, peak memory {devices.peak_gb(device):.3g} GB"
        )
    n_maps = (len(plan) + 1) * (5 if args.by_outcome else 1) + n_scans * args.save_subjects
    maps_gb = len(args.method) * n_maps * 4e-9 * np.prod(cohort.volume_shape)
    utils.say(*files.check_room({"maps": (maps_gb, args.outpath)}))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    import attribution  # captum imports matplotlib, before which utils is to come
    from attribution.guided_gradcam import CAMS

    number = utils.number
    parser = utils.make_parser(
        __doc__, "explanation", *utils.OF_COHORT, "--outpath", "--seed", "--device", "--workers",
        "--only-fold", "--dry-run", "--overwrite",
    )  # fmt: skip
    option = parser.add_argument
    # fmt: off
    option("--modelpath", type=Path, required=True, metavar="DIR",
           help="the --outpath of train_cv.py")
    option("--model", required=True, metavar="NAME", help=models.FAMILIES_TEXT)
    option("--method", required=True, nargs="+", choices=list(attribution.METHODS),
           help="one or more")
    option("--fold", type=number(int, at_least=1), default=None,
           help=f"folds of the run; left out: as its run.json says, or {folds.N_FOLDS}")
    option("--batch", type=number(int, at_least=1), default=1, group="compute",
           help="volumes, or IG steps, per pass")
    option("--steps", type=number(int, at_least=2), default=attribution.N_STEPS,
           help="IG: steps of the path")
    option("--beta", type=number(float, at_least=0), default=attribution.BETA,
           help="LRP: beta of the rule")
    option("--cam", choices=CAMS, default=CAMS[0],
           help="GGC: stretch the last convolution's grid over the volume, as published, or lay "
                "its cells where they see")
    option("--samples", type=number(int, at_least=1), default=attribution.N_SAMPLES,
           help="SG: noisy copies of a scan")
    option("--noise", type=number(float, at_least=0), default=attribution.NOISE,
           help="SG: standard deviation of the noise, as a share of a scan's range")
    option("--target", choices=["label", "predicted", *ONE_CLASS], default="label",
           help="the class whose logit is explained; 0 or 1, one class for everybody, also gives "
                "the contrast of patients' and controls' maps")
    option("--subjects", choices=["test", "all", "new"], default="test",
           help="test: each scan by the fold that held it out; all: every scan by every fold; new: "
                "a cohort that the run has not seen, by every fold")
    option("--mean", choices=["plain", "equal"], default="plain",
           help="mean over folds of their maps as they are, or scaled to equal power; typed anew "
                "with the other one, a finished run is only put together again")
    option("--by-outcome", action="store_true", help="also one mean map per TP, TN, FP and FN")
    option("--save-subjects", action="store_true", help="also one map per scan")
    option("--randomize", action="store_true",
           help="explain freshly drawn weights instead: what the architecture alone highlights, a "
                "control for the maps, in files named {M}_random_*")
    # fmt: on
    args = parser.parse_args(argv)
    args.method = list(dict.fromkeys(args.method))
    return args


def main(args: argparse.Namespace) -> None:
    """Explain every fold's scans, then put the folds together."""
    utils.start_log()
    devices.set_precision("fp32")
    device = devices.find_device(args.device)
    needs_labels = args.subjects != "new" or args.target == "label"
    of_csv = dataset.Wanted.of(vars(args) | {"needs_labels": needs_labels})
    cohort = dataset.read_cohort(args.path, of_csv)
    model = models.build_model(args.model, cohort.volume_shape).to(device).eval()
    needed_gb = models.MODELS[args.model].memory_gb(cohort.volume_shape, args.batch)
    devices.keep_freed_memory(device, needed_gb)
    facts = {"model": args.model, "seed": args.seed, **cohort.facts(args.path)}
    of_run = {key: facts[key] for key in ("model", "volume_shape", "affine")}
    plan = trained_run.plan(
        args.modelpath, of_run, args.fold, cohort.table, cohort.scans, args.subjects
    )
    args.fold = facts["n_folds"] = len(plan)
    wanted = folds.asked_for(args.fold, args.only_fold, args.overwrite)
    for fold in plan:
        checkpoints.load_weights(fold.checkpoint_path, model)
    facts["modelpath_sha256"] = trained_run.checksums(args.modelpath, plan, args.subjects == "test")
    record = new_record("heatmap.py", vars(args), **facts)
    runs = {method: make_run(args, method, record) for method in args.method}
    for run in runs.values():
        run.check(args.overwrite)  # nothing is written yet
    if args.subjects == "new":
        from_first(lambda: refuse_seen(cohort.seen(plan[0].seen)))
        subjects = cohort.table.get("subject")
        from_first(lambda: trained_run.warn_of_subjects(args.modelpath, subjects))
    from_first(lambda: check_scans(args, cohort, [plan[fold] for fold in wanted], model, device))
    if args.dry_run:
        return dry_run(args, cohort, plan, model, device) if utils.is_first() else None
    runs = from_first(lambda: {m: run.start(args.overwrite) for m, run in runs.items()})
    utils.start_log(args.outpath / "heatmap.log", args.only_fold)
    device_text = devices.describe_device(device)
    log.info("%s of folds %s on %s", " ".join(args.method), wanted, device_text)
    verdict = metrics.read_verdict(args.modelpath)
    finding = verdict.sentence if verdict else f"{args.modelpath} has no metrics.csv to judge it by"
    say = log.warning if verdict and verdict.is_doubtful else log.info
    say("the networks: %s", finding)

    with utils.log_above_bars():
        n_scans = sum(len(plan[fold].rows) for fold in wanted) // utils.world_size()
        bar = utils.progress(total=n_scans, description="explained", unit="scan")
        for fold in wanted:
            work_on_fold(args, cohort, plan[fold], runs, model, device, bar)
        bar.close()
    if utils.is_first():
        written = {}
        for method, run in runs.items():
            with run.finish() as is_complete:
                if is_complete:
                    written |= dict.fromkeys(assemble(args, cohort, method, run, verdict))
        if written:
            mean_maps = [path for path in written if path.name.endswith("_all.nii.gz")]
            following = utils.command(
                "compare.py", args, maps=mean_maps, run=args.modelpath,
                outpath=args.outpath / "comparison",
            )  # fmt: skip
            utils.conclude(*written, f"the networks: {finding}", f"next: {following}")


if __name__ == "__main__":
    arguments = parse_args()
    kept = "Finished folds are kept, with --save-subjects also scans"
    sys.exit(run_script(main, arguments, kept))
