"""What a fold in training keeps: its state, a checkpoint an epoch, its files at the end."""

from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch
from torch import nn

import checkpoints
import files
from errors import InputError

EPOCH_RECORD = ("epoch", "train_loss", "valid_loss", "valid_accuracy", "seconds")


@dataclass
class FoldState:
    """All that continuing a fold needs, besides the weights in the model and the optimiser.

    Attributes
    ----------
    history : list of dict
        One an epoch, with the keys of EPOCH_RECORD.
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


def checkpoint_path_of(outpath: Path, fold: int) -> Path:
    """Return where a fold's checkpoint is while the fold is unfinished."""
    return outpath / f"checkpoint_f{fold}.pt"


def save_fold(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: FoldState
) -> None:
    """Write all that `restore_fold` needs."""
    content = {
        "model": model.state_dict(), "optimizer": optimizer.state_dict(), "state": vars(state)
    }  # fmt: skip
    checkpoints.save(path, content)


def restore_fold(checkpoint_path: Path, model: nn.Module, optimizer: torch.optim.Adam) -> FoldState:
    """Return a fold's state, with its weights put back, or a fresh state if it never began.

    Raises
    ------
    InputError
        If the checkpoint is damaged, or that of another model.
    """
    if not checkpoint_path.is_file():
        return FoldState()
    content = checkpoints.load(checkpoint_path)
    try:
        state = FoldState(**content["state"])
        check_state(state)
        for weights in (state.best_weights, content["model"]):  # of which the latter go on
            checkpoints.put_weights(model, weights)
        checkpoints.put_moments(optimizer, content["optimizer"])
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise InputError(
            f"{checkpoint_path} cannot continue this fold; start anew with --overwrite: {error}"
        ) from None
    return state


def check_state(state: FoldState) -> None:
    """Raise ValueError unless a state's numbers are what `FoldState` says."""
    is_whole = isinstance(state.history, list) and all(
        isinstance(record, dict)
        and tuple(record) == EPOCH_RECORD
        and all(type(value) in (int, float) for value in record.values())
        and record["epoch"] == number
        for number, record in enumerate(state.history, 1)
    )
    if not (is_whole and type(state.best_loss) is float and type(state.n_stale_epochs) is int):
        raise ValueError("its history is damaged")


def is_finished(outpath: Path, fold: int) -> bool:
    """Tell whether a fold has been tested: its predictions are what is written last."""
    return (outpath / f"predictions_f{fold}.csv").is_file()


def write_fold(outpath: Path, fold: int, state: FoldState, predictions: pd.DataFrame) -> None:
    """Write a fold's files; the predictions come last and say that it is finished."""
    history = pd.DataFrame(state.history)
    checkpoints.save(outpath / f"state_dict_f{fold}.pth", state.best_weights)
    files.write_npy(outpath / f"train_loss_f{fold}.npy", history["train_loss"])
    files.write_npy(outpath / f"valid_loss_f{fold}.npy", history["valid_loss"])
    files.write_csv(outpath / f"history_f{fold}.csv", history)
    files.write_csv(outpath / f"predictions_f{fold}.csv", predictions)
