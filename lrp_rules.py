"""Rules of layer-wise relevance propagation for captum: β-rule, identity, winner takes all."""

from collections.abc import Callable

import torch
from captum.attr._utils.lrp_rules import PropagationRule
from torch import Tensor, nn

from convolution import Propagate, linear_sums, transposed_sums

STABILIZER = 1e-6  # added to a denominator with the denominator's own sign


def stabilized_ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Return numerator / denominator, 0 where the denominator is exactly 0."""
    ratio = torch.add(denominator, torch.sign(denominator), alpha=STABILIZER)
    torch.div(numerator, ratio, out=ratio)
    return ratio.masked_fill_(denominator == 0, 0)


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

        return Propagate.apply(inputs[0], outputs.detach(), propagate)


class IdentityRule(_OwnBackward):
    """Pass relevance through unchanged, for layers with one output per input."""

    def forward_hook(self, module, inputs, outputs):
        """Cut the layer out of the gradient's way."""
        return Propagate.apply(inputs[0], outputs.detach(), lambda _, relevance: relevance)


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
