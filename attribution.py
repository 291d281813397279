"""LRP, integrated gradients and guided Grad-CAM of a 3D CNN, each through captum.

Pure functions of a model and a volume: no files, no devices of their own. All explain the logit
(before softmax) of a target class, and leave the model exactly as it was.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from captum.attr import LRP, GuidedGradCam, IntegratedGradients
from captum.attr._utils.lrp_rules import PropagationRule
from torch import Tensor, nn
from torch.nn import functional

BETA = 0.5
N_STEPS = 100
STABILIZER = 1e-6  # added to a denominator with the denominator's own sign

Targets = int | Tensor


# Layer-wise relevance propagation


def stabilized_ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Return numerator / denominator, 0 where the denominator is exactly 0."""
    safe = denominator + STABILIZER * torch.sign(denominator)
    return torch.where(denominator == 0, 0, numerator / safe)


def linear_sums(layer: nn.Module, inputs: Tensor, weight: Tensor) -> Tensor:
    """Return Σ_i inputs_i · weight_ij over the inputs i of each neuron j, bias left out."""
    if isinstance(layer, nn.Linear):
        return functional.linear(inputs, weight)
    return functional.conv3d(
        inputs, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups
    )


def transposed_sums(layer: nn.Module, inputs: Tensor, weight: Tensor, outputs: Tensor) -> Tensor:
    """Return Σ_j outputs_j · weight_ij over the neurons j that each input i feeds."""
    if isinstance(layer, nn.Linear):
        return outputs @ weight
    return torch.nn.grad.conv3d_input(
        inputs.shape, weight, outputs, layer.stride, layer.padding, layer.dilation, layer.groups
    )


def beta_relevance(layer: nn.Module, inputs: Tensor, relevance: Tensor, beta: float) -> Tensor:
    """Propagate relevance from a layer's outputs to its inputs by the β-rule.

    Parameters
    ----------
    layer : Conv3d or Linear
    inputs : Tensor, shape (N, …)
        The layer's inputs a_i.
    relevance : Tensor, shape of the layer's outputs
    beta : float
        R_i = Σ_j [(1+β)·max(z_ij, 0)/z⁺_j − β·min(z_ij, 0)/z⁻_j]·R_j with z_ij = a_i·w_ij.

    Returns
    -------
    Tensor, shape of inputs
        It sums to the relevance of the neurons with any input, up to the stabilizer: a neuron j
        with only one kind of input gives that kind weight 1.

    References
    ----------
    Bach et al., PLOS ONE 10(7):e0130140, 2015, doi:10.1371/journal.pone.0130140
    """
    positive_weight, negative_weight = layer.weight.clamp(min=0), layer.weight.clamp(max=0)
    # an input below 0 swaps the kinds: z_ij is positive where both signs agree
    parts = [(inputs.clamp(min=0), positive_weight, negative_weight)]
    if (inputs < 0).any():
        parts.append((inputs.clamp(max=0), negative_weight, positive_weight))
    z_positive = sum(linear_sums(layer, part, agreeing) for part, agreeing, _ in parts)
    z_negative = sum(linear_sums(layer, part, opposing) for part, _, opposing in parts)
    weight_of_positive = 1 + beta * (z_negative != 0).to(relevance.dtype)
    weight_of_negative = 1 - (1 + beta) * (z_positive != 0).to(relevance.dtype)
    share_positive = stabilized_ratio(weight_of_positive * relevance, z_positive)
    share_negative = stabilized_ratio(weight_of_negative * relevance, z_negative)
    return sum(
        part
        * (
            transposed_sums(layer, part, agreeing, share_positive)
            + transposed_sums(layer, part, opposing, share_negative)
        )
        for part, agreeing, opposing in parts
    )


class _Propagate(torch.autograd.Function):
    """Hand a layer's outputs on; in the backward pass let a rule turn relevance into relevance."""

    @staticmethod
    def forward(ctx, inputs, outputs, propagate):
        ctx.save_for_backward(inputs)
        ctx.propagate = propagate
        return outputs.clone()

    @staticmethod
    def backward(ctx, relevance):
        return ctx.propagate(ctx.saved_tensors[0], relevance), None, None


class _OwnBackward(PropagationRule):
    """A captum rule that computes a layer's relevance itself and never touches its weights."""

    def forward_hook_weights(self, module, inputs, outputs):
        """Leave the weights as they are."""

    def forward_pre_hook_activations(self, module, inputs):
        """Leave the inputs as they are: no weight was changed, so they are the right ones."""

    def _manipulate_weights(self, module, inputs, outputs):
        """Leave the weights as they are."""


class BetaRule(_OwnBackward):
    """The β-rule as a captum propagation rule for Conv3d and Linear; see `beta_relevance`."""

    def __init__(self, beta: float):
        self.beta = beta

    def forward_hook(self, module, inputs, outputs):
        """Cut the layer out of the gradient's way and put the rule in its place."""

        def propagate(layer_inputs, relevance):
            return beta_relevance(module, layer_inputs, relevance, self.beta)

        return _Propagate.apply(inputs[0], outputs.detach(), propagate)


class IdentityRule(_OwnBackward):
    """Pass relevance through unchanged, for layers with one output per input."""

    def forward_hook(self, module, inputs, outputs):
        """Cut the layer out of the gradient's way."""
        return _Propagate.apply(inputs[0], outputs.detach(), lambda _, relevance: relevance)


class WinnerTakesAllRule(_OwnBackward):
    """Give a pooling window's relevance to its largest voxel: the gradient of max-pooling."""

    def forward_hook(self, module, inputs, outputs):
        """Leave the layer in the gradient's way."""


RULES: dict[type, Callable[[float], PropagationRule]] = {
    nn.Conv3d: BetaRule,
    nn.Linear: BetaRule,
    nn.BatchNorm3d: lambda beta: IdentityRule(),
    nn.MaxPool3d: lambda beta: WinnerTakesAllRule(),
}  # captum itself passes relevance through ReLU and Dropout


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
    method = IntegratedGradients(model)

    def attribute() -> Tensor:
        maps = [
            method.attribute(
                one_volume.detach()[None],
                baselines=0,
                target=int(one_target),
                n_steps=n_steps,
                method="riemann_left",
                internal_batch_size=batch_size,
            )
            for one_volume, one_target in zip(volume, targets, strict=True)
        ]
        return torch.cat(maps).to(volume.dtype)

    return _attribute_on(model, attribute)


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
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Setting backward hooks on ReLU")
            warnings.filterwarnings(
                "ignore", message="Input Tensor .* did not already require grad"
            )
            yield
    finally:
        for module, training in was_training.items():
            module.training = training
            for leftover in ("rule", "activations"):  # captum's, after LRP
                module.__dict__.pop(leftover, None)
        for parameter, requires_grad in required_grad.items():
            parameter.requires_grad_(requires_grad)


def _attribute_on(model: nn.Module, attribute: Callable[[], Tensor]) -> Tensor:
    """Run an attribution on a model and return its maps, detached; maps and logits are finite."""
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
            layer, kind = _first_nonfinite(model, attribute)
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
