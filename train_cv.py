"""Train a 3D CNN on T1-weighted MRI, Alzheimer's disease against controls, with cross-validation.

    python3 train_cv.py --path ./data.csv --outpath ./output/ --device 0 --model modelA24

Per fold: train with early stopping on validation scans, keep the best epoch's weights, test them
once on the fold's test scans. The same command, typed again, resumes after its last epoch.

Every scan is decoded once, into a folder of scaled volumes, removed when the run is complete.
Under torchrun the folds are shared among the processes; --only-fold is for job arrays.

Written to --outpath: state_dict_f*.pth, predictions.csv, metrics.csv, splits.csv, run.json, losses,
histories, loss_curves.png, roc.png, cohort.png and train_cv.log; with --covariates cohort.csv,
covariates.csv and strata.csv.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import dataset
import models
import utils
from loading.cache import Volumes
from reporting import covariates, glance, metrics, pictures
from run_folder import checkpoints, files, folds, trained_run
from run_folder import device as devices
from run_folder.processes import from_first, run_script, wait_for_all
from run_folder.run import RunFolder, locked, new_record
from utils import InputError, log

# Wang et al., NeuroImage 269:119929, 2023
BATCH = trained_run.BATCH
LEARNING_RATE = 1e-4
WEIGHT_DECAY = 1e-4
MAX_EPOCHS = 200
PATIENCE = 10
DELTA = 0.0

EPOCH_LINE = (
    "%s: loss %.4f, validation loss %.4f, validation accuracy %.3f, validation ROC AUC %.3f; "
    "%.1f s, %.2f GB; left in the fold %s if no epoch is better, %s at most%s"
)
NOT_LEARNED = (
    "fold %d has not learned: the loss of its kept weights on its training scans is %.4f; knowing "
    "only how many are patients would give %.4f. What may help: a lower --lr, more --patience, "
    "--restarts. Maps of this fold explain nothing"
)
REDRAW_SECONDS = 30.0
N_REHEARSED = 2  # steps of a dry run; the first sets things up and does not count
COMPARED = (
    "model", "batch", "fold", "lr", "wd", "epochs", "patience", "delta", "restarts",
    "val_fraction", "seed", "precision", "csv_sha256", "scan_sizes_sha256",
)  # fmt: skip
RESULTS = (
    "predictions_f*.csv", "predictions.csv", "checkpoint_f*.pt", "state_dict_f*.pth",
    "history_f*.csv", "training_f*.csv", "train_loss_f*.npy", "valid_loss_f*.npy", "metrics.csv",
    "loss_curves.png", "roc.png", "splits.csv", "scans.csv", "cohort.png", "cohort.csv",
    "covariates.csv", "strata.csv",
)  # fmt: skip


def make_network(
    args: argparse.Namespace, shape: tuple, device: torch.device
) -> tuple[nn.Module, torch.optim.Adam]:
    """Return a freshly drawn network and its optimiser."""
    model = models.build_model(args.model, shape)
    model = model.to(device, memory_format=torch.channels_last_3d)  # the faster one everywhere
    return model, torch.optim.Adam(model.parameters(), lr=args.lr, weight_decay=args.wd)


@torch.no_grad()
def predict(
    model: nn.Module, volumes: Volumes, rows: np.ndarray, batch: int, device: torch.device
) -> np.ndarray:
    """Return logits (n, 2) of scans."""
    model.eval()
    logits = [model(scans) for scans, _ in volumes.batches(rows, batch, device)]
    return torch.cat(logits).double().cpu().numpy()


def train_draw(
    args: argparse.Namespace, cohort: dataset.Cohort, volumes: Volumes, fold: int,
    train: np.ndarray, val: np.ndarray, model: nn.Module, optimizer: torch.optim.Adam,
    state: checkpoints.FoldState, device: torch.device, bar: tqdm,
) -> None:  # fmt: skip
    """Train a fold's weights with early stopping; each epoch is added to the fold's state."""
    draw = state.draw
    in_precision = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")
    while draw.epoch < args.epochs and draw.epochs_without_gain < args.patience:
        start, epoch, losses, sizes = time.perf_counter(), draw.epoch + 1, [], []
        devices.seed_everything(args.seed, fold, epoch)  # dropout
        order = devices.shuffled(train, args.seed, fold, epoch)
        batches = volumes.batches(order, args.batch, device)
        n_steps, place = -(-len(train) // args.batch), f"fold {fold} epoch {epoch}/{args.epochs}"
        model.train()
        for scans, labels in utils.progress(batches, place, total=n_steps, unit="step"):
            optimizer.zero_grad()
            with in_precision:
                loss = cross_entropy(model(scans), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            sizes.append(len(labels))
        train_loss = metrics.mean_loss(torch.stack(losses).double().cpu().numpy(), sizes, place)
        logits = predict(model, volumes, val, args.batch, device)
        of_val = metrics.of_validation(logits, cohort.labels[val], place)
        seconds = time.perf_counter() - start
        is_best = draw.add(model, args.delta, train_loss=train_loss, **of_val, seconds=seconds)
        checkpoints.save(args.outpath, fold, model, optimizer, state)
        bar.update()
        left = args.epochs - epoch
        left_s = [n * seconds for n in (min(left, args.patience - draw.epochs_without_gain), left)]
        log.info(
            EPOCH_LINE, place, train_loss, *of_val.values(), seconds, devices.peak_gb(device),
            *map(utils.duration, left_s), "; best so far" * is_best,
        )  # fmt: skip
        files.write_csv(args.outpath / f"history_f{fold}.csv", pd.DataFrame(draw.history))
        pictures.draw_losses(args.outpath, args.fold, cohort.labels, fold, REDRAW_SECONDS)


def train_fold(
    args: argparse.Namespace, cohort: dataset.Cohort, volumes: Volumes, parts: pd.Series,
    fold: int, device: torch.device, bar: tqdm,
) -> None:  # fmt: skip
    """Train one fold, anew if it does not learn; test its best weights once, write its files."""
    train, val, test = (np.flatnonzero(parts == part) for part in folds.PARTS)
    devices.seed_everything(args.seed, fold, 0)
    model, optimizer = make_network(args, cohort.volume_shape, device)
    state = checkpoints.resume(args.outpath, fold, model, optimizer)
    bar.update(state.draw.epoch)
    while not state.is_done(args.restarts):
        number = state.draw.number
        if number > 0 and not state.draw.history:
            log.info("fold %d begins anew: restart %d of %d", fold, number, args.restarts)
            devices.seed_everything(args.seed, fold, number, purpose="restart")
            model, optimizer = make_network(args, cohort.volume_shape, device)
            bar.total += args.epochs
        train_draw(args, cohort, volumes, fold, train, val, model, optimizer, state, device, bar)
        bar.total -= args.epochs - state.draw.epoch
        model.load_state_dict(state.draw.best_weights)
        logits = predict(model, volumes, train, args.batch, device)
        judged = metrics.of_training(logits, cohort.labels[train])
        if not judged["learned"]:
            log.warning(NOT_LEARNED, fold, judged["train_loss_kept"], judged["label_entropy"])
        state.end_draw(**judged)
    model.load_state_dict(state.kept.best_weights)
    logits = predict(model, volumes, test, args.batch, device)
    paths, labels = cohort.table["path"].iloc[test], cohort.labels[test]
    predictions = metrics.predictions_of(fold, paths, labels, logits)
    checkpoints.write_fold(args.outpath, fold, state, predictions)
    pictures.draw_losses(args.outpath, args.fold, cohort.labels, fold)
    write_scans(args.outpath, cohort, volumes)


def write_scans(outpath: Path, cohort: dataset.Cohort, volumes: Volumes) -> None:
    """Write what is trained on, once all scans have been decoded: after the first fold at last."""
    path = outpath / "scans.csv"
    if len(volumes.facts) == len(volumes) and not path.is_file():
        with locked(outpath, "scans", wait=True):
            files.write_csv(path, cohort.table[["path"]].join(volumes.table()))


def dry_run(
    args: argparse.Namespace, cohort: dataset.Cohort, splits: pd.DataFrame, volumes: Volumes,
    device: torch.device, kept_gb: float,
) -> None:  # fmt: skip
    """Say what the run would take, from training steps on the first scans; write nothing."""
    if not utils.is_first():
        return
    room_gb = devices.available_gb(device)
    model, optimizer = make_network(args, cohort.volume_shape, device)
    rows = np.arange(args.batch) % len(cohort.scans)
    from_files = cohort.volumes(None, args.workers)  # whatever is decoded already
    for _ in range(N_REHEARSED):
        scans, labels = next(from_files.batches(rows, args.batch, device))
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            loss = cross_entropy(model.train()(scans), labels)
        loss.backward()
        optimizer.step()
        metrics.mean_loss(np.array([loss.item()]), [len(labels)], "a training step")
        step_s = time.perf_counter() - start
    weights_gb = 4e-9 * sum(parameter.numel() for parameter in model.parameters())
    needs = {"weights": (weights_gb * (args.fold + 4), args.outpath)}  # 4: a fold's checkpoint
    if volumes.folder is not None:
        needs["decoded scans"] = (volumes.gb, volumes.folder)
    n_train = max(int((splits[f"fold_{f}"] == "train").sum()) for f in range(args.fold))
    epoch_s = step_s * n_train / args.batch
    kept = f"; besides, {kept_gb:.3g} GB of scans stay on the GPU" * bool(kept_gb)
    n_epochs = (min(args.epochs, args.patience + 1), args.epochs)
    shortest, longest = (utils.duration(args.fold * epoch_s * n) for n in n_epochs)
    utils.say(
        f"{len(cohort.scans)} scans, {n_train} of them to train on in the largest fold",
        f"a training step of {args.batch} scans: {utils.duration(step_s)}, peak memory "
        f"{devices.peak_gb(device):.3g} GB{kept}",
        f"models that should fit into the {room_gb:.3g} GB that are free, at --batch {args.batch}: "
        f"{models.that_fit(cohort.volume_shape, args.batch, room_gb)}",
        f"an epoch of training: about {utils.duration(epoch_s)}; {args.fold} folds: {shortest} if "
        f"no epoch is better than the first, {longest} for all {args.epochs} epochs",
        *files.check_room(needs),
        glance.at_a_glance(from_files, cohort.table["path"]),
    )


def assemble(args: argparse.Namespace, cohort: dataset.Cohort) -> list[str]:
    """Write what all folds have in common, from each fold's files; return what to say of it."""
    outpath, n_folds = args.outpath, args.fold
    predictions = metrics.gather_predictions(outpath, range(n_folds), cohort.table["path"])
    of_training = pd.DataFrame([metrics.read_kept(outpath, fold) for fold in range(n_folds)])
    subjects = cohort.table.get("subject")
    table = metrics.metrics_table(predictions, subjects, args.seed, of_training)
    files.write_csv(outpath / "predictions.csv", predictions)
    files.write_csv(outpath / "metrics.csv", table)
    pictures.draw_losses(outpath, n_folds, cohort.labels, n_folds)
    pictures.plot_roc(outpath / "roc.png", predictions, table)
    for fold in range(n_folds):  # of a process killed between its last two steps
        checkpoints.checkpoint_path(outpath, fold).unlink(missing_ok=True)
    following = utils.command(
        "heatmap.py", args, *utils.OF_COHORT, "--model", "--device", modelpath=outpath,
        method=["LRP", "IG", "GGC"], target=1, outpath=outpath / "maps",
    )  # fmt: skip
    said = [metrics.verdict(table).sentence]
    if cohort.covariates is not None:
        splits = folds.read(outpath / "splits.csv", cohort.table, cohort.scans)
        said.append(
            covariates.write(outpath, cohort.table, cohort.covariates, splits, args.seed, table)
        )
        of_strata = covariates.strata(predictions, cohort.covariates, subjects, args.seed)
        files.write_csv(outpath / "strata.csv", of_strata)
    return [metrics.as_text(table), *said, str(outpath), f"next: {following}"]


def show_cohort(
    args: argparse.Namespace, cohort: dataset.Cohort, splits: pd.DataFrame, volumes: Volumes
) -> None:
    """Draw the cohort at a glance, and say what its covariates tell, before a long training."""
    path = args.outpath / "cohort.png"
    if not utils.is_first():
        return
    with locked(args.outpath, "cohort", wait=True):  # tasks of a job array come here together
        if path.is_file():
            return
        if cohort.covariates is not None:
            of_cohort = (cohort.table, cohort.covariates, splits, args.seed)
            log.info(covariates.write(args.outpath, *of_cohort))
        glance.draw(path, volumes, cohort.table["path"])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    number = utils.number
    parser = utils.make_parser(
        __doc__, "training", *utils.OF_COHORT, "--outpath", "--seed", "--device", "--workers",
        "--cache-dir", "--covariates", "--only-fold", "--dry-run", "--overwrite",
    )  # fmt: skip
    option = parser.add_argument
    # fmt: off
    option("--model", required=True, metavar="NAME", help=models.FAMILIES_TEXT)
    option("--batch", type=number(int, at_least=1), default=BATCH, help="scans per training step")
    option("--restarts", type=number(int, at_least=0), default=0,
           help="times that a fold that has not learned begins anew, with other weights")
    option("--fold", type=number(int, at_least=2), default=folds.N_FOLDS, help="number of folds")
    option("--lr", type=number(float, above=0), default=LEARNING_RATE, help="Adam's learning rate")
    option("--wd", type=number(float, at_least=0), default=WEIGHT_DECAY, help="Adam's weight decay")
    option("--epochs", type=number(int, at_least=1), default=MAX_EPOCHS, help="epochs at the most")
    option("--patience", type=number(int, at_least=1), default=PATIENCE,
           help="stop after this many epochs in a row without a new best")
    option("--delta", type=number(float, at_least=0), default=DELTA,
           help="a new best is lower than the best validation loss by more than this")
    option("--val-fraction", type=number(float, above=0, below=1), default=folds.VAL_FRACTION,
           help="share of a fold's other scans that validate")
    option("--precision", choices=utils.PRECISIONS, default=None, group="compute",
           help="arithmetic of training; tf32: of convolutions and matrix products on a GPU (on a "
           "CPU fp32); bf16: of training steps, not predictions; left out: what torch does, on a "
           "GPU tf32 in convolutions")
    option("--no-cache", action="store_true", group="compute",
           help="decode every scan anew in every epoch")
    # fmt: on
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Train and test every fold, then put the folds together."""
    utils.start_log()
    wanted = folds.asked_for(args.fold, args.only_fold, args.overwrite)
    if utils.world_size() > (n_wanted := len(wanted)):
        rule = f"{utils.world_size()} processes are more than the {n_wanted} folds to train"
        raise InputError(f"{rule}: start {n_wanted}, or one job a fold with --only-fold")
    device = devices.find_device(args.device)
    devices.set_precision(args.precision)
    cohort = dataset.read_cohort(args.path, dataset.Wanted.of(vars(args)))
    models.build_model(args.model, cohort.volume_shape)
    needed_gb = models.MODELS[args.model].memory_gb(cohort.volume_shape, args.batch)
    devices.keep_freed_memory(device, needed_gb)
    splits = from_first(lambda: folds.draw(cohort.table, args.fold, args.val_fraction, args.seed))
    facts = {"model": args.model, "n_folds": args.fold, "seed": args.seed,
             "device": devices.describe_device(device), "gpu": devices.gpu_versions(device),
             **cohort.facts(args.path)}  # fmt: skip
    record = new_record("train_cv.py", vars(args), **facts)
    run = RunFolder(args.outpath, "run", record, COMPARED, RESULTS)
    folder = None if args.no_cache else args.cache_dir or args.outpath / ".cache"
    volumes = cohort.volumes(folder, args.workers)
    from_first(lambda: run.check(args.overwrite))  # nothing is written yet
    if args.dry_run:
        kept_gb = volumes.gb_on(device, needed_gb)
        return dry_run(args, cohort, splits, volumes, device, kept_gb)
    from_first(lambda: volumes.check_room() if run.unfinished(wanted) else None)
    run = from_first(lambda: run.start(args.overwrite, {"splits.csv": splits}))
    utils.start_log(args.outpath / "train_cv.log", args.only_fold)
    then, now = str(run.record.get("device")), record["device"]
    if then[:3] != now[:3]:  # cpu, or cuda
        log.warning("the run was begun on %s, and goes on on %s: it will not repeat", then, now)
    splits = from_first(lambda: folds.read(args.outpath / "splits.csv", cohort.table, cohort.scans))
    todo = from_first(lambda: run.unfinished(wanted))
    scans = f"{len(cohort.scans)} scans of {'×'.join(map(str, cohort.volume_shape))} voxels"
    log.info("%s on %s; folds to train: %s", scans, record["device"], todo or "none")

    with utils.log_above_bars():
        mine = todo[utils.rank() :: utils.world_size()]
        if mine:
            volumes.fill()
            write_scans(args.outpath, cohort, volumes)
            show_cohort(args, cohort, splits, volumes)
            volumes.keep_on(device, needed_gb)
        bar = utils.progress(total=len(mine) * args.epochs, description="at most", unit="epoch")
        for fold in mine:
            with run.hold(fold) as is_unfinished:
                if is_unfinished:
                    train_fold(args, cohort, volumes, splits[f"fold_{fold}"], fold, device, bar)
        bar.close()
    wait_for_all()
    if utils.is_first():
        with run.finish() as is_complete:
            if is_complete:
                utils.conclude(*assemble(args, cohort))
                volumes.remove(is_own=args.cache_dir is None)


if __name__ == "__main__":
    arguments = parse_args()
    sys.exit(run_script(main, arguments, "Every whole epoch is kept"))
