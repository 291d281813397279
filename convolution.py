"""Sums over a layer's inputs and outputs, and a fast gradient for convolutions of one channel."""

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle


class Propagate(torch.autograd.Function):
    """Hand a layer's outputs on; on the way back let a function of (inputs, gradient) decide."""

    @staticmethod
    def forward(ctx, inputs, outputs, propagate):
        ctx.save_for_backward(inputs)
        ctx.propagate = propagate
        return outputs.view_as(outputs)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.propagate(ctx.saved_tensors[0], gradient), None, None


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
    if is_plain_one_channel(layer):
        return one_channel_input_gradient(weight, outputs)
    return torch.nn.grad.conv3d_input(
        inputs.shape, weight, outputs, layer.stride, layer.padding, layer.dilation, layer.groups
    )


def is_plain_one_channel(layer: nn.Module) -> bool:
    """Tell whether a layer is a Conv3d of one input channel with stride 1 and no padding."""
    return (
        isinstance(layer, nn.Conv3d)
        and layer.in_channels == 1
        and layer.stride == layer.dilation == (1, 1, 1)
        and layer.padding == (0, 0, 0)
    )


def one_channel_input_gradient(weight: Tensor, outputs: Tensor) -> Tensor:
    """Return the gradient of a convolution with respect to its single input channel.

    Library kernels run at a fraction of their speed where one channel is all they write. Here the
    voxels of each 2×2×2 block of the result are eight channels of one convolution with stride 2,
    its kernels one voxel wider: the same sums.

    Parameters
    ----------
    weight : Tensor, shape (C, 1, K, L, M)
        Of a convolution with stride 1 and no padding.
    outputs : Tensor, shape (N, C, D−K+1, H−L+1, W−M+1)
        The gradient with respect to its outputs.

    Returns
    -------
    Tensor, shape (N, 1, D, H, W)
    """
    kernel = weight.shape[2:]
    sides = [n + k - 1 for n, k in zip(outputs.shape[2:], kernel, strict=True)]
    wide = weight.new_zeros(8, weight.shape[0], *(k + 1 for k in kernel))
    for channel, corner in enumerate(itertools.product((0, 1), repeat=3)):
        window = tuple(slice(c, c + k) for c, k in zip(corner, kernel, strict=True))
        wide[(channel, slice(None), *window)] = weight[:, 0].flip(1, 2, 3)
    odd = [side % 2 for side in sides]
    if any(odd):
        outputs = functional.pad(outputs, (0, odd[2], 0, odd[1], 0, odd[0]))
    blocks = functional.conv3d(outputs, wide, stride=2, padding=tuple(k - 1 for k in kernel))
    n_scans, _, *n_blocks = blocks.shape
    voxels = blocks.view(n_scans, 2, 2, 2, *n_blocks).permute(0, 4, 1, 5, 2, 6, 3)
    even_sides = [2 * n for n in n_blocks]
    depth, height, width = sides
    return voxels.reshape(n_scans, 1, *even_sides)[:, :, :depth, :height, :width]


def hook_fast_input_gradients(model: nn.Module) -> list[RemovableHandle]:
    """Give a model's one-channel convolutions the fast gradient; return the hooks' handles."""

    def replace(layer, inputs, outputs):
        if not inputs[0].requires_grad:
            return outputs

        def propagate(layer_inputs, gradient):
            return transposed_sums(layer, layer_inputs, layer.weight, gradient)

        return Propagate.apply(inputs[0], outputs.detach(), propagate)

    layers = [module for module in model.modules() if is_plain_one_channel(module)]
    return [layer.register_forward_hook(replace) for layer in layers]
