"""Rehearsals: what a run would take in time, memory and disk, measured on a few scans."""

import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

import scan_files
from dataset import Cohort

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


def free_gb(path: Path) -> float:
    """Return the free space, in GB, where a path is or would be."""
    there = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    return shutil.disk_usage(there).free / 1e9


def describe_training(
    model: nn.Module, cohort: Cohort, splits: pd.DataFrame, batch: int, cache_gb: float,
    step: Callable[[Tensor, Tensor], object], predict: Callable[[Tensor], object],
    device: torch.device, outpath: Path,
) -> str:  # fmt: skip
    """Return what training would take.

    Parameters
    ----------
    model : Module
    cohort : Cohort
    splits : DataFrame
        With a column a fold.
    batch : int
        Scans per step.
    cache_gb : float
        What the decoded scans take, 0 without a cache.
    step : callable
        One training step on volumes (N, 1, D, H, W) and labels (N,).
    predict : callable
        Logits of volumes.
    device : device
    outpath : Path
    """
    volumes, labels = first_batch(cohort, batch)
    volumes, labels = volumes.to(device), labels.to(device)
    step_s, memory_gb = measure(lambda: step(volumes, labels), device)
    predict_s, _ = measure(lambda: predict(volumes), device)
    counts = splits.filter(like="fold_").apply(pd.Series.value_counts).T
    n_train, n_val = counts["train"].max(), counts["val"].max()
    epoch_s = np.ceil(n_train / batch) * step_s + np.ceil(n_val / batch) * predict_s
    weights_gb = 4 * sum(parameter.numel() for parameter in model.parameters()) / 1e9
    output_gb = weights_gb * (len(counts) + 4)  # the fold at work also keeps a checkpoint
    return "\n".join(
        [
            f"scans: {len(cohort.table)}; train, val, test per fold, at the most: "
            f"{n_train}, {n_val}, {counts['test'].max()}",
            f"model: {sum(p.numel() for p in model.parameters()):,} parameters",
            f"a training step of {batch} scans: {step_s:.3g} s, peak memory {memory_gb:.3g} GB",
            f"an epoch, once the scans are decoded: about {epoch_s:.3g} s",
            f"disk: {output_gb:.3g} GB of weights, {cache_gb:.3g} GB of decoded scans; free: "
            f"{free_gb(outpath):.3g} GB below {outpath}",
        ]
    )


def describe_explaining(
    cohort: Cohort, explain: dict[str, Callable[[Tensor, Tensor], object]], n_scans: int,
    n_maps: int, device: torch.device, outpath: Path,
) -> str:  # fmt: skip
    """Return what explaining would take.

    Parameters
    ----------
    cohort : Cohort
    explain : dict of str to callable
        Each method, as a function of a volume (1, 1, D, H, W) and a target (1,).
    n_scans : int
        To be explained, over all folds.
    n_maps : int
        Files of maps that each method writes.
    device : device
    outpath : Path
    """
    volume, target = (tensor.to(device) for tensor in first_batch(cohort, 1))
    lines = [f"scans to explain, over all folds: {n_scans}"]
    for method, function in explain.items():
        seconds, memory_gb = measure(lambda function=function: function(volume, target), device)
        lines.append(
            f"{method}: {seconds:.3g} s a scan, {seconds * n_scans / 3600:.3g} h in all, "
            f"peak memory {memory_gb:.3g} GB"
        )
    map_gb = len(explain) * n_maps * 4 * int(np.prod(cohort.volume_shape)) / 1e9
    lines.append(
        f"disk: at most {map_gb:.3g} GB of maps; free: {free_gb(outpath):.3g} GB below {outpath}"
    )
    return "\n".join(lines)
