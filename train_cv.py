"""Train a 3D CNN on T1-weighted MRI, Alzheimer's disease against controls, with cross-validation.

    python3 train_cv.py --path ./data.csv --outpath ./output/ --device 0 --model modelA24

Per fold: train with early stopping on validation scans, keep the best epoch's weights, test them
once on the fold's test scans. Typed again, an interrupted command goes on after its last epoch.

Every scan is decoded once, into one file of scaled volumes, removed when the run is complete.

Written to --outpath: state_dict_f*.pth, predictions.csv, metrics.csv, splits.csv, run.json, losses,
histories, loss_curves.png, roc.png and train_cv.log.
"""

import argparse
import contextlib
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import dataset
import files
import folds
import metrics
import models
import pictures
import runs
import utils
import volume_cache
from utils import RunError, log
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


@dataclass
class FoldState:
    """All that continuing a fold needs, besides the weights in the model and the optimiser.

    Attributes
    ----------
    history : list of dict
        One an epoch: epoch, train_loss, valid_loss, valid_accuracy, seconds.
    best_loss : float
        Validation loss of the best epoch so far.
    best_weights : dict
        Its state dict, on the CPU.
    n_stale_epochs : int
        Epochs in a row without a new best.
    """

    history: list[dict] = field(default_factory=list)
    best_loss: float = float("inf")
    best_weights: dict = field(default_factory=dict)
    n_stale_epochs: int = 0

    def update(self, epoch_record: dict, model: nn.Module, delta: float) -> bool:
        """Take in an epoch; return whether it is the best so far."""
        is_best = not self.history or epoch_record["valid_loss"] < self.best_loss - delta
        self.history.append(epoch_record)
        self.n_stale_epochs = 0 if is_best else self.n_stale_epochs + 1
        if is_best:
            self.best_loss = epoch_record["valid_loss"]
            self.best_weights = {
                k: v.cpu().clone(memory_format=torch.contiguous_format)
                for k, v in model.state_dict().items()
            }
        return is_best


# One fold


def make_loader(
    cohort: dataset.Cohort,
    parts: pd.Series,
    part: str,
    args: argparse.Namespace,
    device: torch.device,
    cached: Volumes | None,
) -> DataLoader:
    """Return a loader of one part of a fold; training scans come shuffled.

    The order has a generator of its own, and so has what the loader draws for its workers:
    their number changes no result. Decoded scans reach a CPU faster without workers.
    """
    n_workers = 0 if cached is not None and device.type == "cpu" else args.workers
    scans = dataset.ScanDataset(cohort.table, np.flatnonzero(parts == part), cached)
    shuffled = RandomSampler(scans, generator=torch.Generator())
    return DataLoader(
        scans,
        batch_size=args.batch,
        sampler=shuffled if part == "train" else None,
        generator=torch.Generator(),
        collate_fn=None if n_workers else dataset.BatchStacker(),
        num_workers=n_workers,
        persistent_workers=n_workers > 0,
        pin_memory=device.type == "cuda",
    )


def train_epoch(
    model: nn.Module, loader: DataLoader, criterion: nn.Module, optimizer: torch.optim.Optimizer,
    device: torch.device, precision: str,
) -> torch.Tensor:  # fmt: skip
    """Train for one epoch; return the loss of each batch, shape (n_batches,)."""
    in_bf16 = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    model.train()
    losses = []
    for volumes, labels, _ in tqdm(loader, "training", unit="batch", leave=False, disable=None):
        volumes = volumes.to(device, non_blocking=True)
        labels = labels.to(device, non_blocking=True)
        optimizer.zero_grad()
        with in_bf16:
            logits = model(volumes)
            loss = criterion(logits, labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


@torch.no_grad()
def predict(model: nn.Module, loader: DataLoader, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Return logits (n, 2), labels (n,) and cohort rows (n,) of a loader's scans, on the CPU."""
    model.eval()
    outputs = []
    for volumes, labels, rows in tqdm(
        loader, "predicting", unit="batch", leave=False, disable=None
    ):
        outputs.append((model(volumes.to(device, non_blocking=True)).cpu(), labels, rows))
    return tuple(torch.cat(column) for column in zip(*outputs, strict=True))


def mean_loss(losses: torch.Tensor, loader: DataLoader, fold: int, epoch: int) -> float:
    """Return the mean loss per scan of an epoch's batches; a non-finite loss stops the run."""
    losses = losses.double().cpu()
    bad_batches = (~torch.isfinite(losses)).nonzero().flatten()
    if len(bad_batches):
        raise RunError(
            f"the training loss is not finite in fold {fold}, epoch {epoch}, batch "
            f"{int(bad_batches[0])}; a smaller --lr may help"
        )
    n_scans = len(loader.dataset)
    sizes = torch.full_like(losses, loader.batch_size)
    sizes[-1] = n_scans - loader.batch_size * (len(losses) - 1)
    return float((losses * sizes).sum() / n_scans)


def validate(
    model: nn.Module, loader: DataLoader, device: torch.device, fold: int, epoch: int
) -> tuple[float, float]:
    """Return the mean validation loss per scan and the accuracy."""
    logits, labels, _ = predict(model, loader, device)
    loss = float(nn.functional.cross_entropy(logits.double(), labels))
    if not np.isfinite(loss):
        raise RunError(f"the validation loss is not finite in fold {fold}, epoch {epoch}")
    return loss, float((logits.argmax(1) == labels).double().mean())


def restore_fold(
    checkpoint_path: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> FoldState:
    """Return a fold's state, with its weights put back, or a fresh state if it never began."""
    if not checkpoint_path.is_file():
        return FoldState()
    checkpoint = files.load_torch(checkpoint_path)
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    return FoldState(**checkpoint["state"])


def train_fold(
    args: argparse.Namespace,
    cohort: dataset.Cohort,
    parts: pd.Series,
    fold: int,
    device: torch.device,
    cached: Volumes | None = None,
) -> None:
    """Train one fold with early stopping, test its best weights once, and write all its files."""
    train_loader, val_loader, test_loader = (
        make_loader(cohort, parts, part, args, device, cached) for part in ("train", "val", "test")
    )
    utils.seed_everything(args.seed, fold, 0)
    model = models.build_model(args.model, cohort.volume_shape)
    model = model.to(device, memory_format=MEMORY_FORMATS[device.type])
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, weight_decay=args.wd)
    criterion = nn.CrossEntropyLoss()
    checkpoint_path = args.outpath / f"checkpoint_f{fold}.pt"
    state = restore_fold(checkpoint_path, model, optimizer)

    first_epoch = len(state.history) + 1
    for epoch in tqdm(
        range(first_epoch, args.epochs + 1), f"fold {fold}", leave=False, disable=None
    ):
        if state.n_stale_epochs >= args.patience:
            break
        start = time.perf_counter()
        utils.seed_everything(args.seed, fold, epoch)
        train_loader.sampler.generator.manual_seed(utils.derived_seed(args.seed, fold, epoch))
        losses = train_epoch(model, train_loader, criterion, optimizer, device, args.precision)
        train_loss = mean_loss(losses, train_loader, fold, epoch)
        valid_loss, valid_accuracy = validate(model, val_loader, device, fold, epoch)
        epoch_record = {
            "epoch": epoch,
            "train_loss": train_loss,
            "valid_loss": valid_loss,
            "valid_accuracy": valid_accuracy,
            "seconds": time.perf_counter() - start,
        }
        is_best = state.update(epoch_record, model, args.delta)
        log_epoch(fold, epoch_record, is_best)
        content = {
            "model": model.state_dict(), "optimizer": optimizer.state_dict(), "state": vars(state)
        }  # fmt: skip
        files.save_torch(checkpoint_path, content)

    model.load_state_dict(state.best_weights)
    predictions = predictions_of(cohort, fold, *predict(model, test_loader, device))
    warn_about_nonfinite(fold, train_loader, val_loader, test_loader)
    write_fold(args.outpath, fold, state, predictions)
    checkpoint_path.unlink(missing_ok=True)


def log_epoch(fold: int, epoch_record: dict, is_best: bool) -> None:
    """Write the log line of an epoch."""
    log.info(
        "fold %d epoch %3d  train %.4f  valid %.4f  accuracy %.3f  %.1f s%s",
        fold, *epoch_record.values(), "  best so far" if is_best else "",
    )  # fmt: skip


def warn_about_nonfinite(fold: int, *loaders: DataLoader) -> None:
    """Say once a fold how many voxels were NaN or infinite."""
    counts = torch.cat([loader.dataset.n_nonfinite for loader in loaders])
    if counts.any():
        log.warning(
            "fold %d: %d non-finite voxels in %d scans were set to 0",
            fold, int(counts.sum()), int((counts > 0).sum()),
        )  # fmt: skip


def predictions_of(
    cohort: dataset.Cohort,
    fold: int,
    logits: torch.Tensor,
    labels: torch.Tensor,
    rows: torch.Tensor,
) -> pd.DataFrame:
    """Return a fold's predictions, one row a test scan."""
    return pd.DataFrame(
        {
            "path": cohort.table["path"].iloc[rows.numpy()].to_numpy(),
            "label": labels.numpy(),
            "fold": fold,
            "probability": torch.softmax(logits.double(), 1)[:, 1].numpy(),
            "predicted": logits.argmax(1).numpy(),
        }
    )


def write_fold(outpath: Path, fold: int, state: FoldState, predictions: pd.DataFrame) -> None:
    """Write a fold's files; the predictions come last and say that it is finished."""
    history = pd.DataFrame(state.history)
    files.save_torch(outpath / f"state_dict_f{fold}.pth", state.best_weights)
    files.write_npy(outpath / f"train_loss_f{fold}.npy", history["train_loss"])
    files.write_npy(outpath / f"valid_loss_f{fold}.npy", history["valid_loss"])
    files.write_csv(outpath / f"history_f{fold}.csv", history)
    files.write_csv(outpath / f"predictions_f{fold}.csv", predictions)


# All folds


def unfinished_folds(args: argparse.Namespace) -> list[int]:
    """Return the folds that have not been tested yet."""
    return [f for f in range(args.fold) if not (args.outpath / f"predictions_f{f}.csv").is_file()]


def open_cache(
    args: argparse.Namespace, cohort: dataset.Cohort, folder: Path
) -> contextlib.AbstractContextManager[Volumes | None]:
    """Return a block in which the cohort's scaled volumes are at hand, or None with --no-cache."""
    if args.no_cache:
        return contextlib.nullcontext()
    return volume_cache.opened(cohort, folder, args.workers)


def assemble(args: argparse.Namespace, cohort: dataset.Cohort) -> pd.DataFrame:
    """Write what all folds have in common, from each fold's files; return the metrics."""
    predictions = metrics.gather_predictions(args.outpath, range(args.fold), cohort.table["path"])
    table = metrics.metrics_table(predictions, cohort.subjects, args.seed)
    files.write_csv(args.outpath / "predictions.csv", predictions)
    files.write_csv(args.outpath / "metrics.csv", table)
    histories = [pd.read_csv(args.outpath / f"history_f{fold}.csv") for fold in range(args.fold)]
    pictures.plot_loss_curves(args.outpath / "loss_curves.png", histories)
    pictures.plot_roc(args.outpath / "roc.png", predictions, table)
    return table


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
    option("--precision", choices=utils.PRECISIONS, default="fp32",
           help="arithmetic of training; tf32: of convolutions and matrix products on a GPU (on a "
           "CPU it is fp32); bf16: of the training steps, while predictions stay in fp32")
    option("--no-cache", action="store_true", help="decode every scan anew in every epoch")
    option("--overwrite", action="store_true", help="start anew where --outpath holds another run")
    # fmt: on
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Train and test every fold, then put the folds together."""
    utils.start_log()
    device = utils.select_device(args.device)
    utils.set_precision(args.precision)
    cohort = dataset.read_cohort(args.path)
    models.build_model(
        args.model, cohort.volume_shape
    )  # says what is wrong before anything is written
    splits = folds.draw_folds(cohort, args.fold, args.val_fraction, args.seed)
    run, is_new = runs.open_run(args, cohort, device)
    cache_folder = volume_cache.locate(cohort, args.outpath, args.cache_dir)
    if not args.no_cache and (is_new or unfinished_folds(args)):
        volume_cache.check_room(cohort, cache_folder)

    runs.start_run(args.outpath, run, is_new, splits)
    utils.start_log(args.outpath / "train_cv.log")
    log.info(
        "%d scans of %s voxels on %s",
        len(cohort.table),
        cohort.volume_shape,
        utils.describe_device(device),
    )
    if unfinished := unfinished_folds(args):
        log.info("%d of %d folds are to be trained", len(unfinished), args.fold)
        with logging_redirect_tqdm([log]), open_cache(args, cohort, cache_folder) as cached:
            for fold in tqdm(unfinished, "folds", disable=None):
                train_fold(args, cohort, splits[f"fold_{fold}"], fold, device, cached)

    table = assemble(args, cohort)
    files.write_json(args.outpath / "run.json", run | {"end": utils.now()})
    volume_cache.remove(cache_folder)
    print(table.to_string(index=False, float_format="%.3f"))


if __name__ == "__main__":
    sys.exit(utils.run_script(main, parse_args()))
