"""LRP, integrated gradients and guided Grad-CAM of a 3D CNN, each through captum.

Pure functions of a model and a volume: no files, no devices of their own. All explain the logit
(before softmax) of a target class, and leave the model exactly as it was.
"""

import functools
from collections.abc import Callable

import torch
from captum.attr import (
    GuidedBackprop,
    GuidedGradCam,
    IntegratedGradients,
    LayerAttribution,
    LayerGradCam,
)
from torch import Tensor, nn

from first_block import FirstBlock, first_block_of, has_first_block
from lrp_rules import RULES, OnePassLRP
from rest import rest_after
from untouched import attribute_on
from utils import say_once

BETA = 0.5
N_STEPS = 100
SMALL_VOXELS = 128**3  # library kernels for a CPU are slow on one such volume, not on two
FEWEST_STEPS = 2  # that captum takes; the shortcut leaves one of them to itself

Targets = int | Tensor


# Layer-wise relevance propagation


def lrp(model: nn.Module, volume: Tensor, target: Targets, beta: float = BETA) -> Tensor:
    """Layer-wise relevance propagation with the β-rule.

    Parameters
    ----------
    model : Module
        Of Conv3d, BatchNorm3d, ReLU, MaxPool3d, Dropout and Linear.
    volume : Tensor, shape (N, 1, D, H, W), float32
    target : int or int64 Tensor of shape (N,)
    beta : float

    Returns
    -------
    Tensor, shape (N, 1, D, H, W), float32
        Relevance per voxel. Each volume's map sums to the logit of its target, within 1 %, less
        the relevance of neurons that see nothing but zeros, such as those in the background of a
        skull-stripped scan: they drop it.

    Raises
    ------
    FloatingPointError
        If a map or a logit is NaN or infinite; the message names the layer where it began.
    TypeError
        If the model has a layer that no rule is known for, or that pads with more than zeros.

    References
    ----------
    Bach et al., PLOS ONE 10(7):e0130140, 2015, doi:10.1371/journal.pone.0130140
    """

    def attribute() -> Tensor:
        for name, layer in model.named_modules():
            if getattr(layer, "padding_mode", "zeros") != "zeros":
                raise TypeError(f"LRP: layer {name} pads with other values than zeros")
            if type(layer) in RULES:
                layer.rule = RULES[type(layer)](beta)
            elif not list(layer.children()):
                raise TypeError(f"no rule of LRP is known for layer {name}, a {type(layer)}")
        return OnePassLRP(model).attribute(volume.detach().clone(), target=target)

    return attribute_on(model, attribute, attribute)


# Integrated gradients


def integrated_gradients(
    model: nn.Module, volume: Tensor, target: Targets, n_steps: int = N_STEPS, batch_size: int = 1
) -> Tensor:
    """Integrated gradients from baseline 0, left Riemann sum.

    a = x ⊙ (1/n) Σ_{k=0}^{n−1} g(k/n·x), g the gradient of the target's logit.

    Parameters
    ----------
    model : Module
    volume : Tensor, shape (N, 1, D, H, W), float32
    target : int or int64 Tensor of shape (N,)
    n_steps : int
        At least 2.
    batch_size : int
        Steps per pass; on a CPU two for small volumes, where one at a time would be slower.

    Returns
    -------
    Tensor, shape (N, 1, D, H, W), float32
        As n_steps grows, each map's sum approaches f(x) − f(0).

    Raises
    ------
    FloatingPointError
        If a map or a logit is NaN or infinite; the message names the layer where it began.

    References
    ----------
    Sundararajan et al., ICML 2017, arXiv:1703.01365
    """
    targets = torch.as_tensor(target).expand(len(volume))
    options = {"n_steps": n_steps, "method": "riemann_left", "internal_batch_size": batch_size}

    def attribute(with_shortcut: bool) -> Tensor:
        maps = []
        for one_volume, one_target in zip(volume.detach()[:, None], targets.tolist(), strict=True):
            if with_shortcut:
                block = first_block_of(model, one_volume)
                maps.append(_integrate_after(block, one_volume, one_target, options))
            else:
                method = IntegratedGradients(model)
                maps.append(method.attribute(one_volume, 0, target=one_target, **options))
        return torch.cat(maps).to(volume.dtype)

    is_linear = has_first_block(model)
    if not is_linear:
        say_once("integrated gradients: no linear first block, every step is a whole pass")
    has_shortcut = is_linear and n_steps > FEWEST_STEPS
    ways = (functools.partial(attribute, with_shortcut) for with_shortcut in (has_shortcut, False))
    return attribute_on(model, *ways, same_rounding=not has_shortcut)


def _integrate_after(block: FirstBlock, volume: Tensor, target: int, options: dict) -> Tensor:
    """Integrate gradients on what follows the first pooling, and carry them back once."""
    pooled, winners = block.pooled(volume)
    with torch.no_grad():
        if not torch.isfinite(block.rest(pooled)).all():
            return torch.full_like(volume, torch.nan)
    n_steps = options["n_steps"]
    first_gradient = block.gradient_at_zero(pooled, target) / n_steps
    # the other steps, 1/n to (n-1)/n, are a left Riemann sum on the path from 1/n on
    options = options | {"n_steps": n_steps - 1}
    if volume.numel() <= SMALL_VOXELS and volume.device.type == "cpu":
        options["internal_batch_size"] = max(2, options["internal_batch_size"])
    method = IntegratedGradients(block.rest, multiply_by_inputs=False)
    gradient = method.attribute(pooled, pooled / n_steps, target=target, **options)
    gradient *= (n_steps - 1) / n_steps
    return volume * block.input_gradient(volume, gradient, winners, first_gradient)


# Guided Grad-CAM


def last_convolution(model: nn.Module) -> nn.Conv3d:
    """Return the model's last Conv3d."""
    return [module for module in model.modules() if isinstance(module, nn.Conv3d)][-1]


def guided_gradcam(model: nn.Module, volume: Tensor, target: Targets) -> Tensor:
    """Guided backpropagation times the upsampled Grad-CAM of the last convolution.

    Grad-CAM is taken at the convolution's output, before batch normalisation, and upsampled
    trilinearly to the volume's grid.

    Parameters
    ----------
    model : Module
    volume : Tensor, shape (N, 1, D, H, W), float32
    target : int or int64 Tensor of shape (N,)

    Returns
    -------
    Tensor, shape (N, 1, D, H, W), float32
        0 wherever Grad-CAM is 0.

    Raises
    ------
    FloatingPointError
        If a map or a logit is NaN or infinite; the message names the layer where it began.

    References
    ----------
    Selvaraju et al., ICCV 2017, arXiv:1610.02391
    """

    def attribute(with_shortcut: bool = True) -> Tensor:
        if with_shortcut:
            maps = _guided_gradcam_in_one_pass(model, volume, target)
            if maps is not None:
                return maps
            say_once("guided Grad-CAM: no plain rest after the last convolution, two passes")
        method = GuidedGradCam(model, last_convolution(model))
        options = {"target": target, "interpolate_mode": "trilinear"}
        return method.attribute(volume.detach().clone(), **options)

    return attribute_on(model, attribute, functools.partial(attribute, with_shortcut=False))


def _guided_gradcam_in_one_pass(model: nn.Module, volume: Tensor, target: Targets) -> Tensor | None:
    """Take Grad-CAM of the rest of the model, on what guided backpropagation's pass left there."""
    layer = last_convolution(model)
    rest = rest_after(model, layer)
    if rest is None:
        return None
    seen: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _, inputs, outputs: seen.append(outputs.detach()))
    try:
        guided = GuidedBackprop(model).attribute(volume.detach().clone(), target)
    finally:
        handle.remove()
    (activations,) = seen
    cam = LayerGradCam(rest, rest.entry).attribute(activations, target, relu_attributions=True)
    shape = tuple(volume.shape[2:])
    return guided * LayerAttribution.interpolate(cam, shape, interpolate_mode="trilinear")


METHODS: dict[str, Callable[..., Tensor]] = {
    "LRP": lrp,
    "IG": integrated_gradients,
    "GGC": guided_gradcam,
}
