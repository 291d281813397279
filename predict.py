"""Classify scans that a run has not seen, by all of its trained folds.

    python3 predict.py --path ./new.csv --modelpath ./output/ --model modelA24 \\
        --outpath ./predictions/ --device 0

Does it hold on scans from elsewhere? Each scan gets the probability of every fold's network, their
mean and standard deviation, and a predicted class. Labels may be left empty; where they are known,
metrics.csv has those of the mean probability, with intervals, and of each fold.

Scans must be on the grid of the run's scans; --resample brings them there. Scans that the run was
trained on are found by their content and refused. The same command, typed again, resumes with the
folds that are not finished; under torchrun the scans of each fold are shared among the processes.

Written to --outpath: predictions.csv, metrics.csv, roc.png, cohort.png, run.json and predict.log;
with --svm svm_predictions.csv and svm_metrics.csv; with --resample resampled/*.nii.gz and their
data.csv, which heatmap.py --subjects new reads.
"""

import argparse
import sys
from contextlib import ExitStack
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from nibabel.spatialimages import SpatialImage
from torch import nn

import dataset
import models
import utils
from comparing import linear_svm
from loading import image
from loading.cache import Volumes
from reporting import glance, maps, metrics, pictures
from run_folder import checkpoints, files, trained_run
from run_folder import device as devices
from run_folder.processes import from_first, gathered, run_script, wait_for_all
from run_folder.run import RunFolder, new_record
from run_folder.trained_run import TrainedFold
from utils import InputError, log, some_of

COMPARED = (
    "model", "resample", "csv_sha256", "scan_sizes_sha256", "modelpath_sha256",
)  # fmt: skip
RESULTS = (
    "predictions_f*.csv", "predictions.csv", "metrics.csv", "roc.png", "cohort.png",
    "svm_predictions.csv", "svm_metrics.csv", "resampled/*",
)  # fmt: skip
ROUNDING = 1e-6  # of a scan's range, that interpolation leaves of its background
FOLD_COLUMNS = {"path": str, "probability": float}


def check_unseen(args: argparse.Namespace, cohort: dataset.Cohort, seen: pd.DataFrame) -> None:
    """Raise an InputError if the run was trained on one of the scans, unless that is allowed."""
    refuse(args, cohort.seen(seen))
    trained_run.warn_of_subjects(args.modelpath, cohort.table.get("subject"))


def check_contents(
    args: argparse.Namespace, cohort: dataset.Cohort, volumes: Volumes, seen: pd.DataFrame
) -> None:
    """Raise an InputError also for a copy of a trained scan whose file has another size."""
    if not args.allow_trained:
        is_seen = volumes.table()["crc32"].isin(seen["crc32"])
        refuse(args, cohort.table["path"][is_seen].tolist())


def refuse(args: argparse.Namespace, seen: list[str]) -> None:
    """Refuse scans that the run was trained on, or say which they are if they are allowed."""
    rule = f"{args.modelpath} was trained on {len(seen)} of these scans: {some_of(seen)}"
    if seen and not args.allow_trained:
        raise InputError(f"{rule}; --allow-trained takes them all the same")
    if seen:
        log.warning(rule)


def check_grid(args: argparse.Namespace, cohort: dataset.Cohort) -> nib.Nifti1Image:
    """Return an empty image on the run's grid; an InputError if the scans are not on it."""
    shape, affine = trained_run.grid(args.modelpath)
    like_img = nib.Nifti1Image(np.zeros(shape, dtype=np.uint8), affine)
    if not args.resample and not image.same_space(cohort.like_img, like_img):
        raise InputError(
            f"the scans have shape {cohort.volume_shape} and affine\n{cohort.like_img.affine}\n"
            f"those of {args.modelpath} {shape} and\n{affine}\n--resample brings them there"
        )
    return like_img


def bring_to(img: SpatialImage, like_img: SpatialImage) -> np.ndarray:
    """Return a scan's voxels on another grid, within their range, its background as it was."""
    from nilearn.image import resample_img

    low, high = img.get_fdata().min(), img.get_fdata().max()
    moved_img = resample_img(
        img, like_img.affine, like_img.shape, force_resample=True, copy_header=True
    )
    moved_data = moved_img.get_fdata().clip(low, high)  # splines overshoot
    moved_data[moved_data - low < ROUNDING * (high - low)] = low
    return moved_data


def resample(
    args: argparse.Namespace, cohort: dataset.Cohort, like_img: nib.Nifti1Image
) -> dataset.Cohort:
    """Write the scans on the run's grid; return the cohort of these."""
    folder = args.outpath / "resampled"
    folder.mkdir(exist_ok=True)
    names = [f"{row + 1:05d}_{maps.short_name(path)}.nii.gz"
             for row, path in enumerate(cohort.table["path"])]  # fmt: skip
    mine = range(utils.rank(), len(names), utils.world_size())
    for row in utils.progress(mine, "resampling", unit="scan"):
        if not (folder / names[row]).is_file():
            img = image.read_image(Path(cohort.scans[row]), "scan")
            image.write_image(folder / names[row], bring_to(img, like_img), like_img)
    wait_for_all()
    labels = cohort.table["label"].astype("Int64")
    table = cohort.table.assign(path=names, label=labels.mask(labels == dataset.NO_LABEL))
    if utils.is_first():
        files.write_csv(folder / "data.csv", table)
    scans = [str(folder / name) for name in names]
    return dataset.Cohort(
        cohort.table, scans, tuple(like_img.shape), nib.load(scans[0]), cohort.covariates
    )


@torch.no_grad()
def predict_fold(
    args: argparse.Namespace, cohort: dataset.Cohort, volumes: Volumes, fold: TrainedFold,
    model: nn.Module, device: torch.device, expected_sha256: dict[str, str],
) -> None:  # fmt: skip
    """Classify all scans by a fold's network, shared among the job's processes; write its table."""
    fold.load_weights(model, expected_sha256)
    mine = np.arange(utils.rank(), len(cohort.scans), utils.world_size())
    batches = volumes.batches(mine, args.batch, device) if len(mine) else ()
    bar = utils.progress(total=len(mine), description=f"fold {fold.number}", unit="scan")
    logits = {}
    for start, (scans, _) in enumerate(batches):
        rows = mine[start * args.batch : (start + 1) * args.batch]
        found = model(scans).double().cpu().numpy()
        logits |= dict(zip(rows.tolist(), found, strict=True))
        bar.update(len(rows))
    bar.close()
    together = {row: each for part in gathered(logits) for row, each in part.items()}
    if utils.is_first():
        rows = np.arange(len(cohort.scans))
        values = np.array([together[row] for row in rows])
        table = metrics.predictions_of(fold.number, cohort.table["path"], cohort.labels, values)
        files.write_csv(args.outpath / f"predictions_f{fold.number}.csv", table)


def gather(outpath: Path, cohort: dataset.Cohort, n_folds: int) -> pd.DataFrame:
    """Return predictions.csv from the folds' tables: a row a scan."""
    table = cohort.table.copy()
    for fold in range(n_folds):
        of_fold = files.read_csv(outpath / f"predictions_f{fold}.csv", FOLD_COLUMNS)
        table[f"probability_f{fold}"] = of_fold["probability"].to_numpy()
    of_folds = table.filter(regex=r"^probability_f\d+$")
    probability = of_folds.mean(axis=1)
    return table.assign(
        probability=probability, probability_sd=of_folds.std(axis=1),
        predicted=(probability > 0.5).astype(int),
    )  # fmt: skip


def score(
    predictions: pd.DataFrame, n_folds: int, subjects: pd.Series | None, seed: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return metrics of the labelled scans, and each fold's predictions of them.

    The rows of the metrics are those of `metrics.metrics_table`: a fold's are of its network, the
    mean and the pooled ones of the folds' mean probability.
    """
    together = metrics.metrics_table(predictions.assign(fold=0), subjects, seed)
    parts = [
        predictions[["path", "label"]].assign(
            fold=fold, probability=(p := predictions[f"probability_f{fold}"]),
            predicted=(p > 0.5).astype(int),
        )
        for fold in range(n_folds)
    ]  # fmt: skip
    per_fold = pd.concat([metrics.binary_metrics(part).assign(fold=str(fold))
                          for fold, part in enumerate(parts)])  # fmt: skip
    table = pd.concat([per_fold, together[together["fold"] != "0"]], ignore_index=True)
    table[[*metrics.COUNTS]] = table[[*metrics.COUNTS]].map(lambda n: n if n % 1 else int(n))
    return table[together.columns], pd.concat(parts, ignore_index=True)


def write_scores(args: argparse.Namespace, predictions: pd.DataFrame, name: str) -> list[str]:
    """Write a classifier's predictions and, where there are labels, its metrics; say what holds.

    `name` begins the names of its files: "" of the networks, "svm_".
    """
    n_folds = predictions.columns.str.fullmatch(r"probability_f\d+").sum()
    files.write_csv(args.outpath / f"{name}predictions.csv", predictions)
    who = "the SVMs" if name else "the networks"
    labelled = predictions[predictions["label"] != dataset.NO_LABEL].reset_index(drop=True)
    if labelled["label"].nunique() < 2:
        return [f"{who}: no metrics, since the CSV does not label scans of both classes"]
    subjects = labelled.get("subject")
    table, of_folds = score(labelled, n_folds, subjects, args.seed)
    files.write_csv(args.outpath / f"{name}metrics.csv", table)
    if not name:
        pictures.plot_roc(args.outpath / "roc.png", of_folds, table, labelled)
    auc = table.set_index("fold").loc[[*metrics.SUMMARY_ROWS[:3]], "roc_auc"]
    value = f"ROC AUC {auc.iloc[0]:.2f} [{auc.iloc[1]:.2f}, {auc.iloc[2]:.2f}]"
    said = f"{who}: {value}, of the mean over {n_folds} folds, in {len(labelled)} new scans"
    return [metrics.as_text(table), said]


def predict_svm(
    cohort: dataset.Cohort, volumes: Volumes, svm: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> pd.DataFrame:
    """Return the SVMs' predictions in the networks' format; the logistic function ranks scans."""
    decisions = linear_svm.decide(volumes, *svm)
    table = cohort.table.copy()
    for fold, of_fold in enumerate(decisions.T):
        table[f"probability_f{fold}"] = 1 / (1 + np.exp(-of_fold))
    decision = decisions.mean(1)
    return table.assign(
        decision=decision, probability=1 / (1 + np.exp(-decision)),
        predicted=(decision > 0).astype(int),
    )  # fmt: skip


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    number = utils.number
    parser = utils.make_parser(
        __doc__, "prediction", *utils.OF_COHORT, "--outpath", "--seed", "--device", "--workers",
        "--cache-dir", "--overwrite",
    )  # fmt: skip
    option = parser.add_argument
    # fmt: off
    option("--modelpath", type=Path, required=True, metavar="DIR",
           help="the --outpath of train_cv.py")
    option("--model", required=True, metavar="NAME", help=models.FAMILIES_TEXT)
    option("--fold", type=number(int, at_least=1), default=None,
           help="folds of the run; left out: as its run.json says")
    option("--batch", type=number(int, at_least=1), default=trained_run.BATCH, group="compute",
           help="scans per pass")
    option("--svm", type=Path, default=None, metavar="DIR",
           help="the --outpath of svm.py, whose SVMs classify the scans, too")
    option("--resample", action="store_true",
           help="bring scans on another grid to that of the run's scans")
    option("--allow-trained", action="store_true",
           help="take scans that the run was trained on")
    # fmt: on
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Classify the scans by every fold, then put the folds together."""
    utils.start_log()
    devices.set_precision("fp32")
    device = devices.find_device(args.device)
    wanted = dataset.Wanted.of(vars(args) | {"needs_labels": False})
    cohort = dataset.read_cohort(args.path, wanted)
    like_img = check_grid(args, cohort)
    model = models.build_model(args.model, like_img.shape).to(device).eval()
    of_run = {"model": args.model}
    plan = trained_run.plan(args.modelpath, of_run, args.fold, cohort.table, cohort.scans, "new")
    for fold in plan:
        checkpoints.load_weights(fold.checkpoint_path, model)
    facts = {"model": args.model, "n_folds": len(plan), **cohort.facts(args.path),
             "modelpath_sha256": trained_run.checksums(args.modelpath, plan, False)}  # fmt: skip
    run = RunFolder(
        args.outpath, "run", new_record("predict.py", vars(args), **facts), COMPARED, RESULTS
    )
    svm = linear_svm.load(args.svm, like_img) if args.svm else None
    from_first(lambda: run.check(args.overwrite))  # nothing is written yet
    from_first(lambda: check_unseen(args, cohort, plan[0].seen))
    run = from_first(lambda: run.start(args.overwrite))
    utils.start_log(args.outpath / "predict.log")

    with utils.log_above_bars():
        if args.resample:
            cohort = resample(args, cohort, like_img)
        volumes = cohort.volumes(args.cache_dir or args.outpath / ".cache", args.workers)
        volumes.check_room()
        volumes.fill()
        from_first(lambda: check_contents(args, cohort, volumes, plan[0].seen))
        for fold in plan:
            with ExitStack() as held:
                hold = run.hold(fold.number)
                if from_first(lambda hold=hold, held=held: held.enter_context(hold)):
                    expected = run.record["modelpath_sha256"]
                    predict_fold(args, cohort, volumes, fold, model, device, expected)
        wait_for_all()
    if utils.is_first():
        with run.finish() as is_complete:
            if is_complete:
                glance.draw(args.outpath / "cohort.png", volumes, cohort.table["path"])
                said = write_scores(args, gather(args.outpath, cohort, len(plan)), "")
                if svm:
                    said += write_scores(args, predict_svm(cohort, volumes, svm), "svm_")
                utils.conclude(*said, args.outpath / "predictions.csv")
                volumes.remove(is_own=args.cache_dir is None)


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args(), "Finished folds are kept"))
