"""LRP, integrated gradients and guided Grad-CAM of a 3D CNN, each through captum.

Pure functions of a model and a volume: no files, no devices of their own. All explain the logit
(before softmax) of a target class, and leave the model exactly as it was.
"""

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from captum.attr import LRP, GuidedGradCam, IntegratedGradients
from torch import Tensor, nn

import convolution
from first_block import FirstBlock, first_block_of
from lrp_rules import RULES
from utils import log

BETA = 0.5
N_STEPS = 100

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
        If the model has a layer that no rule is known for.

    References
    ----------
    Bach et al., PLOS ONE 10(7):e0130140, 2015, doi:10.1371/journal.pone.0130140
    """

    def attribute() -> Tensor:
        for module in model.modules():
            if type(module) in RULES:
                module.rule = RULES[type(module)](beta)
        return LRP(model).attribute(volume.detach().clone(), target=target)

    return _attribute_on(model, attribute)


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
        Steps per pass.

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

    def attribute(with_shortcut: bool = True) -> Tensor:
        maps = []
        for one_volume, one_target in zip(volume.detach()[:, None], targets.tolist(), strict=True):
            block = first_block_of(model, one_volume) if with_shortcut else None
            if with_shortcut and block is None:
                _say_once("integrated gradients: no linear first block, every step is a whole pass")
            if block is None:
                method = IntegratedGradients(model)
                maps.append(method.attribute(one_volume, 0, target=one_target, **options))
            else:
                maps.append(_integrate_after(block, one_volume, one_target, options))
        return torch.cat(maps).to(volume.dtype)

    return _attribute_on(model, attribute, functools.partial(attribute, with_shortcut=False))


def _integrate_after(block: FirstBlock, volume: Tensor, target: int, options: dict) -> Tensor:
    """Integrate gradients on what follows the first pooling, and carry them back once."""
    pooled, winners = block.pooled(volume)
    method = IntegratedGradients(block.rest, multiply_by_inputs=False)
    gradient = method.attribute(pooled, 0, target=target, **options)
    # at the zero volume all voxels of a pooling window tie, and the first one wins
    at_zero = torch.zeros_like(pooled, requires_grad=True)
    (first_gradient,) = torch.autograd.grad(block.rest(at_zero)[:, target].sum(), at_zero)
    first_gradient /= options["n_steps"]
    return volume * block.input_gradient(volume, gradient - first_gradient, winners, first_gradient)


@functools.cache
def _say_once(message: str) -> None:
    """Log a message the first time only."""
    log.info(message)


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

    def attribute() -> Tensor:
        method = GuidedGradCam(model, last_convolution(model))
        return method.attribute(
            volume.detach().clone(), target=target, interpolate_mode="trilinear"
        )

    return _attribute_on(model, attribute)


METHODS: dict[str, Callable[..., Tensor]] = {
    "LRP": lrp,
    "IG": integrated_gradients,
    "GGC": guided_gradcam,
}


# What all methods share


@contextmanager
def _explaining(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode without parameter gradients; leave it exactly as it was."""
    was_training = {module: module.training for module in model.modules()}
    required_grad = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.eval().requires_grad_(False)
    handles = convolution.hook_fast_input_gradients(model)
    try:
        with warnings.catch_warnings():
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


def _attribute_on(
    model: nn.Module, attribute: Callable[[], Tensor], diagnose: Callable[[], Tensor] | None = None
) -> Tensor:
    """Run an attribution on a model and return its maps, detached; maps and logits are finite.

    `diagnose` is the same attribution through all layers, to find where a NaN began.
    """
    finite_logits = []
    handle = model.register_forward_hook(
        lambda _, inputs, logits: finite_logits.append(torch.isfinite(logits).all())
    )
    with _explaining(model):
        try:
            maps = attribute().detach()
        finally:
            handle.remove()
        if not (torch.isfinite(maps).all() and torch.stack(finite_logits).all()):
            layer, kind = _first_nonfinite(model, diagnose or attribute)
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
