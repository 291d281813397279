"""The frame of every attribution: the model is left as it was, maps and logits are finite."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

import devices
from convolution import hook_convolutions


@contextmanager
def explaining(model: nn.Module, same_rounding: bool) -> Iterator[None]:
    """Put a model into eval mode without parameter gradients; leave it exactly as it was.

    While it lasts the model's convolutions are fast, see `hook_convolutions`, and float32 is exact.
    """
    was_training = {module: module.training for module in model.modules()}
    required_grad = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.eval().requires_grad_(False)
    handles = hook_convolutions(model, same_rounding)
    try:
        with warnings.catch_warnings(), devices.exact_float32():
            warnings.filterwarnings("ignore", message="Setting backward hooks on ReLU")
            warnings.filterwarnings(
                "ignore", message="Input Tensor .* did not already require grad"
            )
            yield
    finally:
        for handle in handles:
            handle.remove()
        for module, training in was_training.items():
            module.training = training
            for leftover in ("rule", "activations"):  # captum's, after LRP
                module.__dict__.pop(leftover, None)
        for parameter, requires_grad in required_grad.items():
            parameter.requires_grad_(requires_grad)


def attribute_on(
    model: nn.Module,
    attribute: Callable[[], Tensor],
    diagnose: Callable[[], Tensor],
    same_rounding: bool = True,
) -> Tensor:
    """Run an attribution on a model and return its maps, detached; maps and logits are finite.

    Parameters
    ----------
    model : Module
        It is left exactly as it was, also after an error.
    attribute : callable
        Returns the maps.
    diagnose : callable
        The same attribution through all layers, to find where a NaN began.
    same_rounding : bool
        See `hook_convolutions`.

    Raises
    ------
    FloatingPointError
        If a map or a logit is NaN or infinite; the message names the layer where it began.
    """
    finite_logits = []
    handle = model.register_forward_hook(
        lambda _, inputs, logits: finite_logits.append(torch.isfinite(logits).all())
    )
    with explaining(model, same_rounding):
        try:
            maps = attribute().detach()
        finally:
            handle.remove()
        if not torch.stack([torch.isfinite(maps).all(), *finite_logits]).all():
            layer, kind = _first_nonfinite(model, diagnose)
            raise FloatingPointError(
                f"the map or the logits are NaN or infinite; that began in {layer} ({kind})"
            )
    return maps


def _first_nonfinite(model: nn.Module, attribute: Callable[[], Tensor]) -> tuple[str, str]:
    """Run an attribution again and return the layer where the first non-finite number arose."""
    found: list[tuple[str, str]] = []

    def note(tensor: Tensor, name: str, kind: str) -> None:
        if not torch.isfinite(tensor).all():
            found.append((name, kind))

    def watch(module: nn.Module, name: str) -> list:
        def before(_, inputs):
            if inputs[0].requires_grad:
                inputs[0].register_hook(lambda gradient: note(gradient, name, "backward"))

        def after(_, inputs, outputs):
            note(outputs, name, "forward")

        return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

    leaves = [(n, m) for n, m in model.named_modules() if not list(m.children())]
    handles = [handle for name, module in leaves for handle in watch(module, name)]
    try:
        attribute()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else ("the input volume", "product with the volume")
