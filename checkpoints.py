"""Checkpoints of tensors and plain values: whole files, loaded without running code from them."""

import io
import pickle
import struct
from pathlib import Path

import torch
from torch import nn

import files
from errors import InputError

UNPICKLING_ERRORS = (  # what torch.load lets through on bytes that are no checkpoint
    pickle.UnpicklingError, struct.error, ArithmeticError, AttributeError, EOFError, LookupError,
    OSError, RuntimeError, TypeError, ValueError,
)  # fmt: skip


def save(path: Path, content: dict) -> None:
    """Save tensors and plain values, whole or not at all; equal content gives equal bytes."""
    buffer = io.BytesIO()  # a file would carry its own name into the archive
    torch.save(content, buffer)
    files.write_bytes(path, buffer.getvalue())


def load(path: Path) -> dict:
    """Load what `save` wrote, running no code from the file.

    Raises
    ------
    InputError
        If there is no such file, or it is not a checkpoint of tensors and plain values.
    """
    if not path.is_file():
        raise InputError(f"there is no checkpoint {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UNPICKLING_ERRORS as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{path} is not a checkpoint that can be loaded safely: {reason}"
        ) from None
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a state dict but a {type(content).__name__}")
    return content


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a fold's state dict into a model.

    Raises
    ------
    InputError
        If the file is not a checkpoint, or one of another model or volume shape.
    """
    try:
        put_weights(model, load(path))
    except ValueError as error:
        raise InputError(f"{path} {error}") from None


def put_weights(model: nn.Module, weights: dict) -> None:
    """Put a state dict into a model.

    Raises
    ------
    ValueError
        If it is one of another model or volume shape, or holds something else.
    """
    expected = model.state_dict()
    if set(weights) != set(expected):
        odd_keys = sorted(set(weights) ^ set(expected), key=str)[:3]
        raise ValueError(f"is a checkpoint of another model (differing keys: {odd_keys})")
    for key, value in expected.items():
        if getattr(weights[key], "shape", None) != value.shape:
            raise ValueError(
                f"is a checkpoint of another model or volume shape: {key} has shape "
                f"{tuple(getattr(weights[key], 'shape', ()))}, expected {tuple(value.shape)}"
            )
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:  # sparse, quantized or meta tensors
        raise ValueError(f"does not hold plain weights: {error}") from None


def put_moments(optimizer: torch.optim.Adam, content: dict) -> None:
    """Put Adam's moments back from its state dict; its options stay those it was made with.

    Raises
    ------
    ValueError
        If they are not those of the optimiser's parameters.
    """
    options = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": content["state"], "param_groups": options})
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        moments = optimizer.state[parameter]
        shapes = {"exp_avg": parameter.shape, "exp_avg_sq": parameter.shape, "step": ()}
        for name, shape in shapes.items():
            value = moments.get(name)
            is_plain = isinstance(value, torch.Tensor) and value.layout == torch.strided
            if not (is_plain and value.is_floating_point() and value.shape == shape):
                raise ValueError("does not hold what Adam has gathered for this model")
