"""A fold's state: what resuming needs, which epoch is best, what is no checkpoint."""

import os

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from reporting import metrics
from run_folder import checkpoints
from run_folder.checkpoints import Draw, FoldState
from utils import InputError

MEASURED = {
    "train_loss": 1.0, "valid_loss": 0.7, "valid_accuracy": 0.5, "valid_roc_auc": 0.75,
    "seconds": 0.1,
}  # fmt: skip
UNLEARNED = {"train_loss_kept": 0.69, "label_entropy": 0.6931, "learned": 0}


class Spy:
    """An object whose unpickling would run code."""

    def __reduce__(self):
        return os.system, ("touch ran",)


def make_network(lr: float = 1e-2, width: int = 3) -> tuple[nn.Module, torch.optim.Adam]:
    """Return a network with running statistics, and its optimiser."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width), nn.Linear(width, 2))
    return model, torch.optim.Adam(model.parameters(), lr=lr, weight_decay=lr)


def train(model: nn.Module, optimizer: torch.optim.Adam, n_steps: int) -> None:
    """Take some steps, the same ones each time."""
    for step in range(n_steps):
        optimizer.zero_grad()
        model(torch.arange(8.0).reshape(4, 2) ** (step + 1) / 50).square().mean().backward()
        optimizer.step()


# FoldState


def test_an_epoch_is_best_if_lower_by_more_than_delta():
    model, _ = make_network()
    state, found = Draw(), []
    for loss in (0.9, 0.85, 0.7, 0.65, 0.55, 0.1):
        is_best = state.add(model, delta=0.125, **MEASURED | {"valid_loss": loss})
        found.append((is_best, state.best_loss, state.epochs_without_gain))
    assert found == [
        (True, 0.9, 0), (False, 0.9, 1), (True, 0.7, 0), (False, 0.7, 1), (True, 0.55, 0),
        (True, 0.1, 0),
    ]  # fmt: skip
    assert state.epoch == 6 and [line["epoch"] for line in state.history] == [1, 2, 3, 4, 5, 6]
    assert state.history[1] == {"epoch": 2, **MEASURED, "valid_loss": 0.85, "best": 0}
    state = Draw()
    assert state.add(model, float("inf"), **MEASURED)  # the first is best whatever its loss
    assert not state.add(model, 0.0, **MEASURED)  # an equal loss is no gain


@pytest.mark.parametrize(
    ("losses", "learned", "expected"),
    [([0.5, 0.7, 0.4], [0, 1, 0], 1), ([0.5, 0.4, 0.6], [0, 0, 0], 1), ([0.5], [1], 0)],
    ids=["the-first-that-learned", "the-lowest-loss", "one"],
)
def test_which_draw_of_weights_is_kept(losses, learned, expected):
    model, _ = make_network()
    state = FoldState()
    for loss, is_learned in zip(losses, learned, strict=True):
        assert not state.is_done(len(losses) - 1)
        state.draw.add(model, 0.0, **MEASURED | {"valid_loss": loss})
        state.end_draw(**UNLEARNED | {"learned": is_learned})
        if is_learned:
            break
    assert state.is_done(len(losses) - 1) and state.kept.number == expected
    assert state.draws()["kept"].tolist() == [int(i == expected) for i in range(len(state.ended))]


# Checkpoints


def test_resuming_equals_not_having_stopped(tmp_path):
    """With Adam's moments and running statistics; the options are the command's."""
    model, optimizer = make_network()
    state = FoldState()
    state.draw.add(model, 0.0, **MEASURED)
    state.end_draw(**UNLEARNED)
    state.draw.add(model, 0.0, **MEASURED)
    train(model, optimizer, 3)
    best_weights = state.draw.best_weights
    assert not torch.equal(model[0].weight, best_weights["0.weight"])  # which is a copy
    state.draw.add(model, 0.0, **MEASURED)
    checkpoints.save(tmp_path, 4, model, optimizer, state)
    other, other_optimizer = make_network(lr=0.5)
    assert checkpoints.resume(tmp_path, 3, other, other_optimizer) == FoldState()  # never began
    found = checkpoints.resume(tmp_path, 4, other, other_optimizer)
    assert (found.draw.history, found.ended) == (state.draw.history, state.ended)
    assert (found.draw.number, found.draw.best_loss, found.draw.epochs_without_gain) == (1, 0.7, 1)
    assert all(torch.equal(v, found.draw.best_weights[k]) for k, v in best_weights.items())
    assert found.kept.history == state.kept.history and found.kept.best_weights.keys()
    (group,) = other_optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.5, 0.5)
    group |= {"lr": 1e-2, "weight_decay": 1e-2}
    train(model, optimizer, 3)
    train(other, other_optimizer, 3)
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())


def test_equal_content_gives_equal_bytes(tmp_path):
    for name in ("a.pth", "another_name.pth"):
        checkpoints.write(tmp_path / name, {"w": torch.arange(5.0)})
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "another_name.pth").read_bytes()


def saved(content: object):
    """Return what writes a content to a path."""
    return lambda path: torch.save(content, path)


def write_of_other_width(path) -> None:
    """Write a checkpoint, or weights, of a wider network."""
    model, optimizer = make_network(width=4)
    state = FoldState()
    state.draw.add(model, 0.0, **MEASURED)
    checkpoints.save(path.parent, 0, model, optimizer, state)
    if path.suffix == ".pth":
        checkpoints.write(path, model.state_dict())


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"text"),
        lambda path: path.write_bytes(b"PK\x03\x04 no archive"),
        lambda path: path.write_bytes(path.read_bytes()[:-200]),
        saved([1, 2]),
        saved({"draw": 3}),
        saved({"draw": {"unknown": 1}, "kept": {}, "ended": [], "model": {}, "optimizer": {}}),
        saved({"0.weight": "text"}),
        saved(Spy()),
        write_of_other_width,
    ],
    ids=["empty", "text", "no-archive", "cut", "list", "number", "unknown", "strings",
         "code", "other-network"],
)  # fmt: skip
def test_what_is_no_checkpoint_of_this_network_is_refused(tmp_path, monkeypatch, spoil):
    """In one sentence, whether it should be resumed or explained."""
    monkeypatch.chdir(tmp_path)
    model, optimizer = make_network()
    state = FoldState()
    state.draw.add(model, 0.0, **MEASURED)
    checkpoints.save(tmp_path, 0, model, optimizer, state)
    checkpoints.write(tmp_path / "state_dict_f0.pth", model.state_dict())
    spoil(tmp_path / "checkpoint_f0.pt")
    spoil(tmp_path / "state_dict_f0.pth")
    message = r"checkpoint_f0\.pt cannot resume this fold; .*--overwrite: ."
    with pytest.raises(InputError, match=message) as e:
        checkpoints.resume(tmp_path, 0, model, optimizer)
    assert "\n" not in str(e.value)
    with pytest.raises(InputError, match=r"state_dict_f0\.pth holds no weights of this model") as e:
        checkpoints.load_weights(tmp_path / "state_dict_f0.pth", model)
    assert "\n" not in str(e.value) and not (tmp_path / "ran").exists()


def with_prefix(prefix: str):
    """Return what puts a prefix before each key."""
    return lambda weights: {prefix + key: value for key, value in weights.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        with_prefix("module."),
        with_prefix("_orig_mod."),
        with_prefix("module._orig_mod."),
        with_prefix("_orig_mod.module."),
        with_prefix("model."),
        lambda weights: {"state_dict": weights, "epoch": 3},
        lambda weights: {"model": with_prefix("module.")(weights)},
        lambda weights: {"model_state_dict": weights, "optimizer_state_dict": {}},
        lambda weights: {"n_averaged": torch.tensor(3), **with_prefix("module.")(weights)},
    ],
)
def test_weights_of_wrapped_networks_are_taken(tmp_path, wrap):
    model, _ = make_network()
    torch.save(wrap(model.state_dict()), tmp_path / "w.pth")
    other, _ = make_network()
    train(other, torch.optim.SGD(other.parameters(), lr=1), 1)
    checkpoints.load_weights(tmp_path / "w.pth", other)
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda w: {"best": np.float64(0.9), **w}, "it holds more than tensors"),
        (lambda w: make_network()[0], "save model.state_dict() alone"),
        (lambda w: {**w, "bias_2": w["0.weight"]}, "has besides bias_2"),
        (lambda w: {k: v for k, v in w.items() if k != "0.weight"}, "misses 0.weight"),
        (lambda w: {k: torch.zeros(7) for k in w}, "0.weight has shape (7,), the model's"),
        (lambda w: {}, "it holds no state dict but a dict"),
        (lambda w: [w], "it holds no state dict but a list"),
    ],
)
def test_what_differs_is_said_in_one_sentence(tmp_path, change, reason):
    model, _ = make_network()
    torch.save(change(model.state_dict()), tmp_path / "w.pth")
    with pytest.raises(InputError) as caught:
        checkpoints.load_weights(tmp_path / "w.pth", model)
    message = str(caught.value)
    assert reason in message and message.count("w.pth") == 1
    assert "\n" not in message and "\x1b" not in message and "weights_only" not in message


# The end of a fold


def test_a_finished_fold_writes_its_predictions_last(tmp_path, monkeypatch):
    """The checkpoint goes after that; killed in between, the fold is finished all the same."""
    model, optimizer = make_network()
    state = FoldState()
    for loss in (0.5, 0.25):
        state.draw.add(model, 0.0, **MEASURED | {"valid_loss": loss})
    checkpoints.save(tmp_path, 1, model, optimizer, state)
    written, rename = [], type(tmp_path).replace

    def note(path, target):
        assert (tmp_path / "checkpoint_f1.pt").is_file()
        written.append(target.name)
        return rename(path, target)

    monkeypatch.setattr(type(tmp_path), "replace", note)
    table = pd.DataFrame({"path": ["a.nii"], "probability": [0.5]})
    state.end_draw(**UNLEARNED)
    checkpoints.write_fold(tmp_path, 1, state, table)
    assert set(written) == {path.name for path in tmp_path.iterdir()}
    assert written[-1] == "predictions_f1.csv" and len(written) == 6
    assert np.load(tmp_path / "valid_loss_f1.npy").tolist() == [0.5, 0.25]
    history = pd.read_csv(tmp_path / "history_f1.csv")
    assert history.to_dict("records") == state.kept.history
    assert metrics.read_kept(tmp_path, 1).to_dict() == {
        "draw": 0, "epoch": 2, "valid_loss": 0.25, "valid_roc_auc": 0.75, "train_loss_kept": 0.69,
        "learned": 0,
    }  # fmt: skip
    checkpoints.load_weights(checkpoints.weights_path(tmp_path, 1), model)
