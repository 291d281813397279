"""Train a 3D CNN on T1-weighted MRI, Alzheimer's disease against controls, with cross-validation.

    python3 train_cv.py --path ./data.csv --outpath ./output/ --device 0 --model modelA24

Per fold: train with early stopping on validation scans, keep the best epoch's weights, test them
once on the fold's test scans. Typed again, an interrupted command goes on after its last epoch.

Every scan is decoded once, into one file of scaled volumes, removed when the run is complete.
Under torchrun the folds are shared among the processes; --only-fold is for job arrays.

Written to --outpath: state_dict_f*.pth, predictions.csv, metrics.csv, splits.csv, run.json, losses,
histories, loss_curves.png, roc.png and train_cv.log.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.utils.data import DataLoader

import dataset
import devices
import fold_state
import loading
import metrics
import models
import ranks
import rehearsal
import runs
import teams
import training_run
import utils
import volume_cache
from errors import RunError
from teams import Team
from utils import log
from volume_file import Volumes

# Wang et al., NeuroImage 269:119929, 2023
BATCH = 5
N_FOLDS = 5
LEARNING_RATE = 1e-4
WEIGHT_DECAY = 1e-4
MAX_EPOCHS = 200
PATIENCE = 10
DELTA = 0.0

VAL_FRACTION = 0.2
MEMORY_FORMATS = {"cpu": torch.channels_last_3d, "cuda": torch.contiguous_format}  # CPU: faster


# One fold


def train_epoch(
    model: nn.Module, loader: DataLoader, criterion: nn.Module, optimizer: torch.optim.Optimizer,
    device: torch.device, precision: str,
) -> torch.Tensor:  # fmt: skip
    """Train for one epoch; return the loss of each batch, shape (n_batches,)."""
    in_bf16 = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    model.train()
    losses = []
    batches = loading.on_device(loader, device)
    for volumes, labels, _ in utils.progress(batches, "training", total=len(loader), leave=False):
        optimizer.zero_grad()
        with in_bf16:
            logits = model(volumes)
            loss = criterion(logits, labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


@torch.no_grad()
def predict(
    model: nn.Module, loader: DataLoader, device: torch.device, team: Team
) -> tuple[torch.Tensor, ...]:
    """Return logits (n, 2), labels (n,) and cohort rows (n,) of a loader's scans, on the CPU."""
    model.eval()
    outputs = []
    batches = loading.on_device(loader, device)
    for volumes, labels, rows in utils.progress(
        batches, "predicting", total=len(loader), leave=False
    ):
        outputs.append((model(volumes), labels, rows))
    share = [torch.cat(column).cpu() for column in zip(*outputs, strict=True)]
    logits, labels, rows = map(torch.cat, zip(*team.gathered(share), strict=True))
    order = rows.argsort()
    return logits[order], labels[order], rows[order]


def validate(
    model: nn.Module, loader: DataLoader, device: torch.device, team: Team, fold: int, epoch: int
) -> tuple[float, float]:
    """Return the mean validation loss per scan and accuracy; a non-finite loss stops the run."""
    logits, labels, _ = predict(model, loader, device, team)
    loss = float(nn.functional.cross_entropy(logits.double(), labels))
    if not np.isfinite(loss):
        worst = int((~torch.isfinite(logits)).any(1).int().argmax())  # rows are in order
        raise RunError(
            f"the validation loss is not finite in fold {fold}, epoch {epoch}: the network's "
            f"output for {loader.dataset.files[worst]} is not"
        )
    return loss, float((logits.argmax(1) == labels).double().mean())


def train_fold(
    args: argparse.Namespace, cohort: dataset.Cohort, parts: pd.Series, fold: int,
    device: torch.device, cached: Volumes | None, team: Team,
) -> None:  # fmt: skip
    """Train one fold with early stopping, test its best weights once, and write all its files."""
    loaders = {
        part: loading.training_loader(
            dataset.ScanDataset(cohort.table, np.flatnonzero(parts == part), cached),
            args.batch, part == "train", args.workers, cohort.volume_shape, device, team,
        )
        for part in ("train", "val", "test")
    }  # fmt: skip
    utils.seed_everything(args.seed, fold, 0)
    model = models.build_model(args.model, cohort.volume_shape)
    model = model.to(device, memory_format=MEMORY_FORMATS[device.type])
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, weight_decay=args.wd)
    checkpoint_path = fold_state.checkpoint_path_of(args.outpath, fold)
    state = fold_state.restore_fold(checkpoint_path, model, optimizer)
    network, criterion = teams.share_training(model, team)
    n_train = len(loaders["train"].dataset)

    epochs = range(len(state.history) + 1, args.epochs + 1)
    for epoch in utils.progress(epochs, f"fold {fold}", leave=False):
        if state.n_stale_epochs >= args.patience:
            break
        start = time.perf_counter()
        utils.seed_everything(args.seed, fold, epoch)
        loaders["train"].batch_sampler.seed(utils.derived_seed(args.seed, fold, epoch))
        losses = train_epoch(
            network, loaders["train"], criterion, optimizer, device, args.precision
        )
        train_loss = metrics.mean_loss(team.mean(losses), n_train, args.batch, fold, epoch)
        valid_loss, valid_accuracy = validate(model, loaders["val"], device, team, fold, epoch)
        epoch_record = {
            "epoch": epoch,
            "train_loss": train_loss,
            "valid_loss": valid_loss,
            "valid_accuracy": valid_accuracy,
            "seconds": time.perf_counter() - start,
        }
        is_best = state.update(epoch_record, model, args.delta)
        if team.leads:
            log_epoch(fold, epoch_record, is_best)
            fold_state.save_fold(checkpoint_path, model, optimizer, state)

    model.load_state_dict(state.best_weights)
    predictions = metrics.predictions_of(
        cohort.table["path"], fold, *predict(model, loaders["test"], device, team)
    )
    warn_about_nonfinite(fold, team, *loaders.values())
    if team.leads:
        fold_state.write_fold(args.outpath, fold, state, predictions)
        checkpoint_path.unlink(missing_ok=True)
    team.wait()


def log_epoch(fold: int, epoch_record: dict, is_best: bool) -> None:
    """Write the log line of an epoch."""
    log.info(
        "fold %d epoch %3d  train %.4f  valid %.4f  accuracy %.3f  %.1f s%s",
        fold, *epoch_record.values(), "  best so far" if is_best else "",
    )  # fmt: skip


def warn_about_nonfinite(fold: int, team: Team, *loaders: DataLoader) -> None:
    """Say once a fold how many voxels were NaN or infinite."""
    counts = torch.cat([loader.dataset.n_nonfinite for loader in loaders])
    counts = torch.stack(team.gathered(counts)).amax(0)
    if counts.any() and team.leads:
        log.warning(
            "fold %d: %d non-finite voxels in %d scans were set to 0",
            fold, int(counts.sum()), int((counts > 0).sum()),
        )  # fmt: skip


# All folds


def rehearse(
    args: argparse.Namespace, cohort: dataset.Cohort, splits: pd.DataFrame, device: torch.device,
    cache_folder: Path,
) -> None:  # fmt: skip
    """Print what the run would take, from a training step on the first scans."""
    model = models.build_model(args.model, cohort.volume_shape)
    model = model.to(device, memory_format=MEMORY_FORMATS[device.type])
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, weight_decay=args.wd)

    def step(volumes: torch.Tensor, labels: torch.Tensor) -> None:
        batch = [(volumes, labels, None)]
        train_epoch(model, batch, nn.CrossEntropyLoss(), optimizer, device, args.precision)

    def predict_batch(volumes: torch.Tensor) -> None:
        predict(model, [(volumes, torch.zeros(1), torch.zeros(1))], device, Team())

    try:
        text, disk_needs = rehearsal.describe_training(
            model, cohort, splits, args, cache_folder, step, predict_batch, device
        )
    except RuntimeError as error:
        training_run.raise_without_memory(error, args, "a training step")
    print(text)
    rehearsal.check_disks(disk_needs)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    number = utils.number
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=utils.HelpFormatter)
    utils.add_cohort_options(parser)
    utils.add_device_option(parser)
    utils.add_cache_option(parser)
    option = parser.add_argument
    # fmt: off
    option("--model", required=True, metavar="NAME", help=f"one of: {', '.join(models.MODELS)}")
    option("--batch", type=number(int, at_least=1), default=BATCH, help="scans per training step")
    option("--fold", type=number(int, at_least=2), default=N_FOLDS, help="number of folds")
    option("--lr", type=number(float, above=0), default=LEARNING_RATE, help="Adam's learning rate")
    option("--wd", type=number(float, at_least=0), default=WEIGHT_DECAY, help="Adam's weight decay")
    option("--epochs", type=number(int, at_least=1), default=MAX_EPOCHS, help="epochs at the most")
    option("--patience", type=number(int, at_least=1), default=PATIENCE,
           help="stop after this many epochs in a row without a new best")
    option("--delta", type=number(float, at_least=0), default=DELTA,
           help="a new best is lower than the best validation loss by more than this")
    option("--val-fraction", type=number(float, above=0, below=1), default=VAL_FRACTION,
           help="share of a fold's other scans that validate")
    option("--workers", type=number(int, at_least=0), default=utils.N_WORKERS,
           help="processes that decode scans, and that read ahead for a GPU; 0: the main process")
    option("--only-fold", type=number(int, at_least=0), default=None, metavar="FOLD",
           help="train this fold only; whoever finishes the last one puts all together")
    option("--precision", choices=devices.PRECISIONS, default="fp32",
           help="arithmetic of training; tf32: of convolutions and matrix products on a GPU (on a "
           "CPU it is fp32); bf16: of the training steps, while predictions stay in fp32")
    option("--dry-run", action="store_true",
           help="check everything, say what it would take, and write nothing")
    option("--no-cache", action="store_true", help="decode every scan anew in every epoch")
    option("--overwrite", action="store_true", help="start anew where --outpath holds another run")
    # fmt: on
    return parser.parse_args(argv)


def check_input(args: argparse.Namespace) -> tuple[torch.device, dataset.Cohort, Path]:
    """Return device, cohort and the folder of its cache, or say what is wrong before writing."""
    device = devices.select_device(args.device)
    cohort = dataset.read_cohort(args.path)
    models.build_model(args.model, cohort.volume_shape)
    return device, cohort, volume_cache.locate(cohort, args.outpath, args.cache_dir)


def main(args: argparse.Namespace) -> None:
    """Train and test every fold, then put the folds together."""
    utils.start_log()
    devices.set_precision(args.precision)
    device, cohort, cache_folder = ranks.agreed(lambda: check_input(args))
    record, splits, todo = ranks.from_first(
        lambda: training_run.start_run(args, cohort, device, cache_folder)
    )
    if args.dry_run:
        if ranks.is_first():
            rehearse(args, cohort, splits, device, cache_folder)
        return
    utils.start_log(args.outpath / utils.log_name("train_cv", args.only_fold))
    log.info(
        "%d scans of %s voxels on %s; folds to train: %s",
        len(cohort.table), cohort.volume_shape, devices.describe_device(device), todo or "none",
    )  # fmt: skip
    mine, team = teams.assign_folds(training_run.wanted_folds(args), todo)
    if mine:
        with utils.log_above_bars(), training_run.open_cache(args, cohort, cache_folder) as cached:
            for fold in utils.progress(mine, "folds"):
                with training_run.only_worker(args, record, fold, team) as is_unfinished:
                    if is_unfinished:
                        parts = splits[f"fold_{fold}"]
                        train_fold(args, cohort, parts, fold, device, cached, team)

    ranks.wait_for_all()
    if args.cache_dir and not args.no_cache:  # below --outpath it stays until all folds are done
        volume_cache.remove(cache_folder)
    if ranks.is_first():
        training_run.finish(args, cohort, record)


if __name__ == "__main__":
    arguments = parse_args()
    advice = f"Every whole epoch is kept: {runs.how_to_go_on(arguments)} after the last one."
    sys.exit(utils.run_script(main, arguments, advice))
