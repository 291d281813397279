"""Rehearsals: what a run would take in time, memory and disk, measured on a few scans."""

import argparse
import resource
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

import scan_files
import utils
import volume_file
from dataset import Cohort
from errors import InputError

N_REPEATS = 2  # the first call of each kind, which sets things up, does not count


def first_batch(cohort: Cohort, n_scans: int) -> tuple[Tensor, Tensor]:
    """Return the first scans, (N, 1, D, H, W), and their labels, (N,)."""
    rows = np.arange(n_scans) % len(cohort.table)
    volumes = [scan_files.load_volume(cohort.table["file"].iloc[row])[0] for row in rows]
    labels = torch.tensor(cohort.table["label"].to_numpy()[rows])
    return torch.from_numpy(np.stack(volumes)[:, None]), labels


def measure(work: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Return seconds of one call and the peak memory in GB: of the GPU, or of this process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(N_REPEATS):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
    if device.type == "cuda":
        return seconds, torch.cuda.max_memory_allocated(device) / 1e9
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


@dataclass(frozen=True)
class DiskNeed:
    """What a run would write: a name for it, its size, and where."""

    what: str
    gb: float
    path: Path

    def __str__(self) -> str:
        return (
            f"disk: at most {self.gb:.3g} GB of {self.what}; free: {self.free_gb():.3g} GB below "
            f"{self.path}"
        )

    def free_gb(self) -> float:
        """Return the free space, in GB, where the path is or would be."""
        return shutil.disk_usage(utils.nearest_folder(self.path)).free / 1e9


def check_disks(needs: list[DiskNeed]) -> None:
    """Raise an InputError if what goes to one disk does not fit on it."""
    for need in needs:
        disk = utils.nearest_folder(need.path).stat().st_dev
        shared = [n for n in needs if utils.nearest_folder(n.path).stat().st_dev == disk]
        if sum(n.gb for n in shared) > need.free_gb():
            raise InputError(
                f"{sum(n.gb for n in shared):.3g} GB of {' and '.join(n.what for n in shared)} do "
                f"not fit: {need.free_gb():.3g} GB are free below {need.path}"
            )


def describe_training(
    model: nn.Module, cohort: Cohort, splits: pd.DataFrame, args: argparse.Namespace,
    cache_folder: Path, step: Callable[[Tensor, Tensor], object],
    predict: Callable[[Tensor], object], device: torch.device,
) -> tuple[str, list[DiskNeed]]:  # fmt: skip
    """Return what training would take, and what of it on disks.

    Parameters
    ----------
    model : Module
    cohort : Cohort
    splits : DataFrame
        With a column a fold.
    args : Namespace
        Of train_cv.py.
    cache_folder : Path
        Where the decoded scans would lie.
    step : callable
        One training step on volumes (N, 1, D, H, W) and labels (N,).
    predict : callable
        Logits of volumes.
    device : device
    """
    start = time.perf_counter()
    volumes, labels = first_batch(cohort, args.batch)
    decoding_s = (time.perf_counter() - start) / args.batch / max(1, args.workers)  # of one scan
    volumes, labels = volumes.to(device), labels.to(device)
    step_s, memory_gb = measure(lambda: step(volumes, labels), device)
    predict_s, _ = measure(lambda: predict(volumes), device)
    counts = splits.filter(like="fold_").apply(pd.Series.value_counts).T
    n_train, n_val = counts["train"].max(), counts["val"].max()
    epoch_s = np.ceil(n_train / args.batch) * step_s + np.ceil(n_val / args.batch) * predict_s
    weights_gb = 4 * sum(parameter.numel() for parameter in model.parameters()) / 1e9
    # the fold at work also keeps a checkpoint
    needs = [DiskNeed("weights", weights_gb * (len(counts) + 4), args.outpath)]
    decoding = f"{decoding_s * len(cohort.table):.3g} s, once"
    if args.no_cache:
        epoch_s = max(epoch_s, decoding_s * (n_train + n_val))
        decoding = "in every epoch"
    else:
        cache_gb = len(cohort.table) * volume_file.bytes_of_scan(cohort) / 1e9
        needs.append(DiskNeed("decoded scans", cache_gb, cache_folder))
    text = "\n".join(
        [
            f"scans: {len(cohort.table)}; train, val, test per fold, at the most: "
            f"{n_train}, {n_val}, {counts['test'].max()}",
            f"model: {sum(p.numel() for p in model.parameters()):,} parameters",
            f"a training step of {args.batch} scans: {step_s:.3g} s, peak memory "
            f"{memory_gb:.3g} GB",
            f"decoding the scans: about {decoding}",
            f"an epoch: about {epoch_s:.3g} s",
            *map(str, needs),
        ]
    )
    return text, needs


def describe_explaining(
    cohort: Cohort, explain: dict[str, Callable[[Tensor, Tensor], object]], batch: int,
    n_scans: int, n_maps: int, device: torch.device, outpath: Path,
) -> tuple[str, list[DiskNeed]]:  # fmt: skip
    """Return what explaining would take, and what of it on disks.

    Parameters
    ----------
    cohort : Cohort
    explain : dict of str to callable
        Each method, as a function of volumes (N, 1, D, H, W) and targets (N,).
    batch : int
        Volumes that are explained at once.
    n_scans : int
        To be explained, over all folds.
    n_maps : int
        Files of maps that each method writes.
    device : device
    outpath : Path
    """
    volumes, targets = (tensor.to(device) for tensor in first_batch(cohort, batch))
    lines = [f"scans to explain, over all folds: {n_scans}"]
    for method, function in explain.items():
        seconds, memory_gb = measure(lambda function=function: function(volumes, targets), device)
        seconds /= batch
        lines.append(
            f"{method}: {seconds:.3g} s a scan, {seconds * n_scans / 3600:.3g} h in all, "
            f"peak memory {memory_gb:.3g} GB"
        )
    map_gb = len(explain) * n_maps * volume_file.bytes_of_scan(cohort) / 1e9
    needs = [DiskNeed("maps", map_gb, outpath)]
    return "\n".join([*lines, *map(str, needs)]), needs
