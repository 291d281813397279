"""Sums over inputs and outputs of convolutions of stride 1 without padding, and fast gradients."""

import functools
import itertools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

# a 2×2×4 block of voxels fills the 16 lanes of a vector register
BLOCK = (2, 2, 4)
PROBED = 32  # voxels a side

log = logging.getLogger("heatmaps.attribution")


class Propagate(torch.autograd.Function):
    """Hand a layer's outputs on; on the way back let a function of (inputs, gradient) decide."""

    @staticmethod
    def forward(ctx, inputs, outputs, propagate):
        ctx.save_for_backward(inputs)
        ctx.propagate = propagate
        # view_as gives a single scan a stride that kernels do not take for channels-last
        return outputs.as_strided(outputs.shape, outputs.stride())

    @staticmethod
    def backward(ctx, gradient):
        return ctx.propagate(ctx.saved_tensors[0], gradient), None, None


class Bypass(torch.autograd.Function):
    """Hand a layer's outputs on; on the way back pass the gradient by the layer, unchanged."""

    @staticmethod
    def forward(ctx, inputs, outputs):
        return outputs.as_strided(outputs.shape, outputs.stride())

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def channels_last(values: Tensor) -> Tensor:
    """Return values (N, C, D, H, W) with the channels innermost if that is faster: on a CPU."""
    if values.device.type != "cpu":
        return values
    if values.shape[1] == 1:  # one channel lies in memory as before; the strides must say so
        return values.contiguous().squeeze(1).unsqueeze(-1).permute(0, 4, 1, 2, 3)
    return values.contiguous(memory_format=torch.channels_last_3d)


def convolve(inputs: Tensor, weight: Tensor, stride: tuple = (1,) * 3, padding: tuple = (0,) * 3):
    """Return a convolution without bias, on a CPU by oneDNN; it has no gradient.

    torch itself takes kernels of its own, slower ones, for one volume and small kernels.
    """
    is_float = inputs.dtype == weight.dtype == torch.float32
    if inputs.device.type == "cpu" and is_float and torch.backends.mkldnn.is_available():
        convolution = torch.ops.aten.mkldnn_convolution
        return convolution(inputs, weight, None, padding, stride, (1, 1, 1), 1)
    return functional.conv3d(inputs, weight, stride=stride, padding=padding)


def sums(layer: nn.Module, inputs: Tensor, weight: Tensor) -> Tensor:
    """Return Σ_i inputs_i · weight_ij over the inputs i of each neuron j, bias left out."""
    if isinstance(layer, nn.Linear):
        return functional.linear(inputs, weight)
    return convolve(inputs, weight)


@contextmanager
def exact_sums(layer: nn.Module, device: torch.device) -> Iterator[None]:
    """Make `sums` exactly 0 where nothing enters, for the time of a block.

    FFT and Winograd convolutions leave rounding there, which the β-rule would divide by: cuDNN is
    left out where it chooses one of them.
    """
    before = torch.backends.cudnn.enabled
    try:
        if isinstance(layer, nn.Conv3d) and not _leaves_zeros(device, tuple(layer.weight.shape)):
            torch.backends.cudnn.enabled = False
        yield
    finally:
        torch.backends.cudnn.enabled = before


@functools.cache
def _leaves_zeros(device: torch.device, weight_shape: tuple[int, ...]) -> bool:
    """Tell whether a convolution with such a weight is exactly 0 where it sees only zeros."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(weight_shape, generator=generator)
    sides = [PROBED + k for k in weight_shape[2:]]
    volume = torch.rand(1, weight_shape[1], *sides, generator=generator)
    volume[:, :, : sides[0] // 2] = 0
    outputs = convolve(volume.to(device), weight.to(device))
    is_zero = not outputs[:, :, : sides[0] // 2 - weight_shape[2] + 1].any()
    if not is_zero:
        log.info("cuDNN rounds sums of zeros with weights of %s: LRP sums without it", weight_shape)
    return is_zero


def transposed_sums(layer: nn.Module, inputs: Tensor, weight: Tensor, outputs: Tensor) -> Tensor:
    """Return Σ_j outputs_j · weight_ij over the neurons j that each input i feeds."""
    if isinstance(layer, nn.Linear):
        return outputs @ weight
    if layer.in_channels == 1:
        return one_channel_input_gradient(weight, outputs)
    if inputs.device.type == "cpu":  # the same sums as a convolution, which is faster there
        margins = tuple(k - 1 for k in weight.shape[2:])
        turned = channels_last(weight.transpose(0, 1).flip(2, 3, 4))
        return convolve(channels_last(outputs), turned, padding=margins)
    return torch.nn.grad.conv3d_input(inputs.shape, weight, outputs)


def one_channel_input_gradient(weight: Tensor, outputs: Tensor) -> Tensor:
    """Return the gradient (N, 1, D, H, W) of a convolution with respect to its one input channel.

    Library kernels run at a fraction of their speed where one channel is all they write. Here the
    voxels of each block of the result are the channels of one convolution with the block's sides as
    stride, its kernels wider by them: the same sums. `weight` is (C, 1, K, L, M), `outputs`, (N, C,
    D−K+1, H−L+1, W−M+1), the gradient with respect to the convolution's outputs.
    """
    kernel = weight.shape[2:]
    wide_kernel = [k + b - 1 for k, b in zip(kernel, BLOCK, strict=True)]
    wide = weight.new_zeros(prod(BLOCK), weight.shape[0], *wide_kernel)
    for channel, corner in enumerate(itertools.product(*map(range, BLOCK))):
        window = tuple(slice(c, c + k) for c, k in zip(corner, kernel, strict=True))
        wide[(channel, slice(None), *window)] = weight[:, 0].flip(1, 2, 3)
    sides = [n + k - 1 for n, k in zip(outputs.shape[2:], kernel, strict=True)]
    # whole blocks cover the result and a margin on both sides: padding a copy would cost more
    margins = [(-side % b + 1) // 2 for side, b in zip(sides, BLOCK, strict=True)]
    padding = tuple(k - 1 + margin for k, margin in zip(kernel, margins, strict=True))
    outputs = channels_last(outputs)
    blocks = convolve(outputs, channels_last(wide), BLOCK, padding)
    n_scans, _, *n_blocks = blocks.shape
    voxels = blocks.contiguous().view(n_scans, *BLOCK, *n_blocks).permute(0, 4, 1, 5, 2, 6, 3)
    covered = [n * b for n, b in zip(n_blocks, BLOCK, strict=True)]
    inner = tuple(slice(m, m + side) for m, side in zip(margins, sides, strict=True))
    return voxels.reshape(n_scans, 1, *covered)[(..., *inner)]


def fast_first_convolution(layer: nn.Conv3d) -> list[RemovableHandle]:
    """Make a one-channel convolution write channels-last and have the fast gradient.

    What follows it runs channels-last, too: the same sums, rounded in another order than by the
    model itself.
    """

    def read_channels_last(layer, inputs):
        return channels_last(inputs[0])

    def replace_gradient(layer, inputs, outputs):
        if not inputs[0].requires_grad:
            return outputs

        def propagate(layer_inputs, gradient):
            return transposed_sums(layer, layer_inputs, layer.weight, gradient)

        return Propagate.apply(inputs[0], outputs.detach(), propagate)

    return [
        layer.register_forward_pre_hook(read_channels_last),
        layer.register_forward_hook(replace_gradient),
    ]
