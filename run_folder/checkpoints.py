"""What a fold keeps in training and at its end; files are loaded without running code from them."""

import io
import pickle
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from run_folder import files
from utils import InputError, some_of

WRAPPERS = ("state_dict", "model_state_dict", "model")  # of a state dict, in a dict of more
PREFIXES = ("module.", "_orig_mod.", "model.")  # DataParallel, torch.compile, Lightning
COUNTERS = ("n_averaged",)  # AveragedModel's
MORE_THAN_TENSORS = (
    "it holds more than tensors, such as a whole module or numpy values, and loading those could "
    "run code from it; save model.state_dict() alone"
)


@dataclass
class Draw:
    """One draw of a fold's weights, in training: its epochs and the best of them."""

    number: int = 0
    history: list[dict] = field(default_factory=list)  # an epoch each, as in history_f*.csv
    best_loss: float = float("inf")  # validation loss of the best epoch so far
    best_weights: dict = field(default_factory=dict)  # its state dict, on the CPU
    epochs_without_gain: int = 0  # in a row

    @property
    def epoch(self) -> int:
        """How many epochs are done."""
        return len(self.history)

    def add(self, model: nn.Module, delta: float, **measured: float) -> bool:
        """Add an epoch's losses, accuracy and seconds; return whether it is the best so far."""
        is_best = not self.history or measured["valid_loss"] < self.best_loss - delta
        self.history.append({"epoch": self.epoch + 1, "best": int(is_best), **measured})
        self.epochs_without_gain = 0 if is_best else self.epochs_without_gain + 1
        if is_best:
            self.best_loss = measured["valid_loss"]
            self.best_weights = {
                k: v.cpu().clone(memory_format=torch.contiguous_format)
                for k, v in model.state_dict().items()
            }
        return is_best


@dataclass
class FoldState:
    """All that resuming a fold needs, besides the weights in the model and the optimiser."""

    draw: Draw = field(default_factory=Draw)  # under way
    kept: Draw = field(default_factory=Draw)  # the best of those that ended
    ended: list[dict] = field(default_factory=list)  # a draw each, as in training_f*.csv

    def is_done(self, n_restarts: int) -> bool:
        """Tell whether a draw has learned, or all have ended."""
        return len(self.ended) > n_restarts or any(draw["learned"] for draw in self.ended)

    def end_draw(self, **judged: float) -> None:
        """End the draw under way; kept is the first that learned, else that of lowest loss."""
        best = next(epoch for epoch in reversed(self.draw.history) if epoch["best"])
        of_best = {key: best[key] for key in ("epoch", "valid_loss", "valid_roc_auc")}
        self.ended.append({"draw": self.draw.number, **of_best, **judged})
        if judged["learned"] or not self.draw.best_loss >= self.kept.best_loss:
            self.kept = self.draw
        self.draw = Draw(len(self.ended))

    def draws(self) -> pd.DataFrame:
        """Return the draws that ended, one row each; one is kept."""
        table = pd.DataFrame(self.ended)
        return table.assign(kept=(table["draw"] == self.kept.number).astype(int))


def checkpoint_path(outpath: Path, fold: int) -> Path:
    """Return where a fold's checkpoint is while the fold is unfinished."""
    return outpath / f"checkpoint_f{fold}.pt"


def weights_path(outpath: Path, fold: int) -> Path:
    """Return where a finished fold's weights are."""
    return outpath / f"state_dict_f{fold}.pth"


def write(path: Path, content: dict) -> None:
    """Write tensors and plain values, whole or not at all; equal content gives equal bytes."""
    buffer = io.BytesIO()  # a file would carry its own name into the archive
    torch.save(content, buffer)
    files.write_bytes(path, buffer.getvalue())


def save(
    outpath: Path, fold: int, model: nn.Module, optimizer: torch.optim.Adam, state: FoldState
) -> None:
    """Write all that `resume` needs."""
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    content |= {"draw": vars(state.draw), "kept": vars(state.kept), "ended": state.ended}
    write(checkpoint_path(outpath, fold), content)


def resume(outpath: Path, fold: int, model: nn.Module, optimizer: torch.optim.Adam) -> FoldState:
    """Return a fold's state and put its weights back; a fresh state if it never began."""
    path = checkpoint_path(outpath, fold)
    if not path.is_file():
        return FoldState()
    try:
        content = _load(path)
        state = FoldState(Draw(**content["draw"]), Draw(**content["kept"]), content["ended"])
        for weights in (state.draw.best_weights, content["model"]):  # these are trained further
            model.load_state_dict(weights)
        options = optimizer.state_dict()["param_groups"]  # the command's, not the file's
        optimizer.load_state_dict({"state": content["optimizer"]["state"], "param_groups": options})
    except Exception as error:  # whatever a crafted content provokes
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        advice = "start anew with --overwrite"
        raise InputError(f"{path} cannot resume this fold; {advice}: {reason}") from None
    return state


def load_weights(path: Path, model: nn.Module) -> None:
    """Load a fold's state dict into a model; an InputError if it is none, or another model's.

    It may stand in a dict of more, or have the prefixed keys of DataParallel, torch.compile, ….
    """
    if not path.is_file():
        raise InputError(f"there is no checkpoint {path}")
    expected = model.state_dict()
    try:
        weights = _bare(_load(path))
        for what, keys in (
            ("misses", [key for key in expected if key not in weights]),
            ("has besides", [key for key in weights if key not in expected]),
        ):
            if keys:
                raise ValueError(f"its state dict {what} {some_of(keys)}")
        for key, tensor in expected.items():
            shape = tuple(getattr(weights[key], "shape", ("no tensor",)))
            if shape != tuple(tensor.shape):
                raise ValueError(f"{key} has shape {shape}, the model's {tuple(tensor.shape)}")
        model.load_state_dict(weights)
    except (ValueError, RuntimeError) as error:
        rule = f"{path} holds no weights of this model for volumes of this shape"
        raise InputError(f"{rule}: {error}") from None


def _load(path: Path) -> object:
    """Load what torch.save wrote, running no code from it; a ValueError says what hinders that."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load lets through whatever bytes provoke
        reason = "it is no file of torch.save, or damaged"
        if isinstance(error, pickle.UnpicklingError) and zipfile.is_zipfile(path):
            reason = MORE_THAN_TENSORS
        raise ValueError(reason) from None


def _bare(content: object) -> dict:
    """Return the state dict in what was loaded, without the prefixes of wrapped networks."""
    for key in WRAPPERS:
        content = content.get(key, content) if isinstance(content, dict) else content
    if not (isinstance(content, dict) and content and all(isinstance(key, str) for key in content)):
        raise ValueError(f"it holds no state dict but a {type(content).__name__}")
    weights = {key: value for key, value in content.items() if key not in COUNTERS}
    for prefix in PREFIXES * 2:  # in whatever order they were wrapped
        if all(key.startswith(prefix) for key in weights):
            weights = {key.removeprefix(prefix): value for key, value in weights.items()}
    return weights


def write_fold(outpath: Path, fold: int, state: FoldState, predictions: pd.DataFrame) -> None:
    """Write a fold's files; the predictions come last and say that it is finished."""
    history = pd.DataFrame(state.kept.history)
    write(weights_path(outpath, fold), state.kept.best_weights)
    files.write_npy(outpath / f"train_loss_f{fold}.npy", history["train_loss"])
    files.write_npy(outpath / f"valid_loss_f{fold}.npy", history["valid_loss"])
    files.write_csv(outpath / f"history_f{fold}.csv", history)
    files.write_csv(outpath / f"training_f{fold}.csv", state.draws())
    files.write_csv(outpath / f"predictions_f{fold}.csv", predictions)
    checkpoint_path(outpath, fold).unlink(missing_ok=True)
