"""The frame of every attribution: the model is checked, explained and left as it was."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from attribution.convolution import fast_first_convolution

BLOCK = (nn.Conv3d, nn.BatchNorm3d, nn.ReLU, nn.MaxPool3d)
CLASSIFIER = (nn.Linear, nn.ReLU, nn.Dropout)
FLOAT32_KERNELS = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # may round to TF32


def check_network(model: nn.Module) -> None:
    """Raise a TypeError unless a model is of the kind that is explained here.

    That is: `features`, blocks of Conv3d (stride 1, no padding, one input channel in the first),
    BatchNorm3d, ReLU and MaxPool3d (windows side by side); `classifier` of Linear, ReLU and
    Dropout; flattening between them, and `after(i)`, which runs all from feature i on.
    """
    features, classifier = (getattr(model, name, ()) for name in ("features", "classifier"))
    are_rows = type(features) is type(classifier) is nn.Sequential
    kinds = BLOCK * (len(features) // len(BLOCK)) if are_rows else ()
    runner = next(kind for kind in type(model).__mro__ if "forward" in vars(kind))
    has_after = "after" in vars(runner) and "forward" not in vars(model)
    if not (kinds and classifier and has_after and len(kinds) == len(features)):
        raise TypeError(f"{type(model).__name__} has no features, classifier and after(i)")
    for number, (layer, kind) in enumerate(zip(features, kinds, strict=True)):
        if type(layer) is not kind or not _is_plain(layer, is_first=number == 0):
            raise TypeError(f"features.{number} is no plain {kind.__name__}: {layer}")
    for number, layer in enumerate(classifier):
        if type(layer) not in CLASSIFIER:
            raise TypeError(f"classifier.{number} is no Linear, ReLU or Dropout: {layer}")


def _is_plain(layer: nn.Module, is_first: bool) -> bool:
    """Tell whether a layer has the options that the rules and shortcuts rely on."""
    if isinstance(layer, nn.Conv3d):
        numbers = (layer.stride, layer.dilation, layer.padding)
        is_wide = not is_first or layer.in_channels == 1
        return numbers == ((1, 1, 1), (1, 1, 1), (0, 0, 0)) and layer.groups == 1 and is_wide
    if isinstance(layer, nn.BatchNorm3d):
        return layer.weight is not None and layer.running_var is not None
    if isinstance(layer, nn.MaxPool3d):
        is_cubic = isinstance(layer.kernel_size, int) and layer.stride == layer.kernel_size
        return is_cubic and (layer.padding, layer.dilation, layer.ceil_mode) == (0, 1, False)
    return True


@contextmanager
def exact_float32() -> Iterator[None]:
    """Keep float32 exact on a GPU for the time of a block."""
    before = [kernels.fp32_precision for kernels in FLOAT32_KERNELS]
    try:
        for kernels in FLOAT32_KERNELS:
            kernels.fp32_precision = "ieee"
        yield
    finally:
        for kernels, rounding in zip(FLOAT32_KERNELS, before, strict=True):
            kernels.fp32_precision = rounding


@contextmanager
def unmodified(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode without parameter gradients; leave it exactly as it was."""
    was_training = {module: module.training for module in model.modules()}
    required_grad = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.eval().requires_grad_(False)
    try:
        with warnings.catch_warnings(), exact_float32():
            warnings.filterwarnings("ignore", message="Setting backward hooks on ReLU")
            warnings.filterwarnings("ignore", message="Input Tensor .* did not already require")
            yield
    finally:
        for module, training in was_training.items():
            module.training = training
            for leftover in ("rule", "activations"):  # captum's, after LRP
                module.__dict__.pop(leftover, None)
        for parameter, requires_grad in required_grad.items():
            parameter.requires_grad_(requires_grad)


def attribute_on(model: nn.Module, attribute: Callable[[], Tensor]) -> Tensor:
    """Run an attribution on a model and return its maps, detached; the model is left as it was.

    Raises TypeError for another kind of model, and FloatingPointError if a map, or a logit of any
    pass, is NaN or infinite.
    """
    check_network(model)
    are_finite: list[Tensor] = []
    with unmodified(model), ExitStack() as hooks:
        last = model.classifier[-1]
        handle = last.register_forward_hook(
            lambda _, inputs, logits: are_finite.append(torch.isfinite(logits).all())
        )
        for each in (handle, *fast_first_convolution(model.features[0])):
            hooks.callback(each.remove)
        maps = attribute().detach()
    if not torch.stack([torch.isfinite(maps).all(), *are_finite]).all():
        raise FloatingPointError("the map or the logits are NaN or infinite")
    return maps
