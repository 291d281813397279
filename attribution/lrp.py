"""Layer-wise relevance propagation in one pass of captum: β-rule, identity, winner takes all."""

from collections.abc import Iterator

import torch
from captum.attr import LRP
from captum.attr._utils.lrp_rules import PropagationRule
from torch import Tensor, nn

from attribution.convolution import (
    Bypass,
    Propagate,
    channels_last,
    exact_sums,
    sums,
    transposed_sums,
)  # fmt: skip
from attribution.unmodified import attribute_on

BETA = 0.5
STABILIZER = 1e-6  # added to a denominator with the denominator's own sign
SLAB_NEURONS = 2**23  # of a convolution taken at a time: bounds the memory
BYTES_PER_NEURON = 256  # of a slab, at most, with kernels' workspaces
MAX_SLAB_NEURONS = 2**26


def lrp(
    model: nn.Module, volume: Tensor, target: int | Tensor, beta: float = BETA,
    slab_neurons: int | None = None,
) -> Tensor:  # fmt: skip
    """Layer-wise relevance propagation with the β-rule.

    Parameters
    ----------
    model : Module
        See `unmodified.check_network`; a TypeError if it is of another kind.
    volume : Tensor, shape (N, 1, D, H, W), float32
    target : int or int64 Tensor of shape (N,)
    beta : float
    slab_neurons : int, optional
        How many neurons of a convolution are taken at a time; it changes the memory only. Left
        out: 2²³, on a GPU what fits into a quarter of its free memory.

    Returns
    -------
    Tensor, shape (N, 1, D, H, W), float32
        Each volume's map sums to the logit of its target, within 1 %, less the relevance of neurons
        that see nothing but zeros, as in the background: they drop it. A FloatingPointError if a
        map or a logit is NaN or infinite.

    References
    ----------
    Bach et al., PLOS ONE 10(7):e0130140, 2015, doi:10.1371/journal.pone.0130140
    """

    n_neurons = slab_neurons or _slab_neurons(volume.device)

    def attribute() -> Tensor:
        for layer in (*model.features, *model.classifier):
            layer.rule = RULES[type(layer)](beta, n_neurons)
        return OnePassLRP(model).attribute(volume.detach().clone(), target=target)

    return attribute_on(model, attribute)


def beta_relevance(
    layer: nn.Module, inputs: Tensor, relevance: Tensor, beta: float,
    slab_neurons: int = SLAB_NEURONS,
) -> Tensor:  # fmt: skip
    """Propagate relevance from a Conv3d's or Linear's outputs to its inputs a_i by the β-rule.

    R_i = Σ_j [(1+β)·max(z_ij, 0)/z⁺_j − β·min(z_ij, 0)/z⁻_j]·R_j with z_ij = a_i·w_ij. A neuron j
    with only one kind of input gives that kind weight 1, so the sum of relevance is kept, up to the
    stabilizer, but for neurons without any input.
    """
    if isinstance(layer, nn.Conv3d):
        inputs, relevance = channels_last(inputs), channels_last(relevance)
    positive, negative = layer.weight.clamp(min=0), layer.weight.clamp(max=0)
    both = torch.cat([positive, negative])  # z⁺ and z⁻ in one convolution
    kinds = [(inputs, both)]
    if (inputs < 0).any():
        # an input below 0 swaps the kinds: z_ij is positive where both signs agree
        swapped = torch.cat([negative, positive])
        kinds = [(inputs.clamp(min=0), both), (inputs.clamp(max=0), swapped)]
    result = torch.zeros_like(inputs)
    for of_outputs, of_inputs in _slabs(layer, relevance, slab_neurons):
        parts = [(part[of_inputs], weight) for part, weight in kinds]
        shares = _shares(layer, parts, relevance[of_outputs], beta)
        for part, weight in parts:
            result[of_inputs].addcmul_(part, transposed_sums(layer, part, weight, shares))
    return result


def _slab_neurons(device: torch.device) -> int:
    """Return how many neurons to take at a time."""
    if device.type != "cuda":
        return SLAB_NEURONS
    free_bytes = torch.cuda.mem_get_info(device)[0]
    return min(MAX_SLAB_NEURONS, max(SLAB_NEURONS, free_bytes // 4 // BYTES_PER_NEURON))


def _shares(layer: nn.Module, parts: list, relevance: Tensor, beta: float) -> Tensor:
    """Return what each neuron sends back per unit of z⁺ and, in as many channels more, of z⁻."""
    with exact_sums(layer, relevance.device):
        z = sum(sums(layer, part, weight) for part, weight in parts)
    n_neurons, is_zero = z.shape[1] // 2, z == 0
    has_one_kind = is_zero.roll(n_neurons, 1)  # where the other kind's sum is 0

    def per_kind(positive: float, negative: float) -> Tensor:
        shape = (n_neurons, *[1] * (z.dim() - 2))
        return torch.cat([z.new_full(shape, value) for value in (positive, negative)])

    shares = torch.where(has_one_kind, 1.0, per_kind(1 + beta, -beta))
    shares.div_(z.add_(per_kind(STABILIZER, -STABILIZER))).masked_fill_(is_zero, 0)
    shares.unflatten(1, (2, n_neurons)).mul_(relevance.unsqueeze(1))
    return shares


def _slabs(layer: nn.Module, outputs: Tensor, slab_neurons: int) -> Iterator[tuple]:
    """Cut a layer's outputs into slabs; yield the indices of each and of the inputs it sees."""
    if isinstance(layer, nn.Linear):
        yield ..., ...
        return
    n_planes, all_of = outputs.shape[2], slice(None)
    thickness = max(1, slab_neurons // outputs[:, :, 0].numel())
    for first in range(0, n_planes, thickness):
        last = min(first + thickness, n_planes)
        seen = slice(first, last + layer.kernel_size[0] - 1)
        yield (all_of, all_of, slice(first, last)), (all_of, all_of, seen)


class Rule(PropagationRule):
    """Leave the layer, and its weights, alone: the gradient of max-pooling is winner takes all."""

    def __init__(self, beta: float, slab_neurons: int):
        self.beta, self.slab_neurons = beta, slab_neurons

    def _manipulate_weights(self, module, inputs, outputs):
        """Leave the weights as they are."""

    def forward_hook(self, module, inputs, outputs):
        """Leave the layer in the gradient's way."""


class IdentityRule(Rule):
    """Pass relevance through unchanged, for layers with one output per input."""

    def forward_hook(self, module, inputs, outputs):
        """Cut the layer out of the gradient's way."""
        return Bypass.apply(inputs[0], outputs.detach())


class BetaRule(Rule):
    """The β-rule as a captum propagation rule for Conv3d and Linear; see `beta_relevance`."""

    def forward_hook(self, module, inputs, outputs):
        """Cut the layer out of the gradient's way and put the rule in its place."""

        def propagate(layer_inputs, relevance):
            return beta_relevance(module, layer_inputs, relevance, self.beta, self.slab_neurons)

        return Propagate.apply(inputs[0], outputs.detach(), propagate)


RULES = {
    nn.Conv3d: BetaRule,
    nn.Linear: BetaRule,
    nn.BatchNorm3d: IdentityRule,
    nn.ReLU: IdentityRule,
    nn.Dropout: IdentityRule,
    nn.MaxPool3d: Rule,
}


class OnePassLRP(LRP):
    """captum's LRP without its first pass, which lets rules change weights: these change none."""

    def _compute_output_and_change_weights(self, inputs, target, additional_forward_args):
        """Return the factor of the finished relevance, without a pass."""
        return inputs[0].new_ones(len(inputs[0]))

    def _register_forward_hooks(self):
        """Hook every rule; captum's own way with activations copies their inputs."""
        for layer in self.layers:
            self.forward_handles.append(layer.register_forward_hook(layer.rule.forward_hook))

    def _forward_fn_wrapper(self, *inputs):
        """Run the model; relevance starts as the logit instead of 1."""
        logits = super()._forward_fn_wrapper(*inputs)
        return Propagate.apply(logits, logits.detach(), lambda values, start: values * start)
