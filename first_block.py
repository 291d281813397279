"""The first block of a CNN along a straight path from zero: linear up to the first pooling.

With baseline 0, batch normalisation in eval mode, u the convolution without bias scaled by the
batch normalisation, and v what does not depend on the volume:
max-pool(relu(α·u + v)) = relu(α·max-pool(u) + v) for α ≥ 0. So the first convolution and its
pooling are computed once per scan instead of once per step, and each step starts from there.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from convolution import channels_last, is_plain_one_channel, transposed_sums
from rest import Rest, is_straight

CHANNELS_AT_ONCE = 8  # before the pooling, where all of them are most of the memory
SPAN = 8  # voxels a side that suffice for layers to compute as they do on whole volumes


class _ShiftedReLU(nn.Module):
    """What the first block does to α·max-pool(u)."""

    def __init__(self, shift: Tensor):
        super().__init__()
        self.shift = shift

    def forward(self, pooled: Tensor) -> Tensor:
        """Return the values (N, C, d, h, w) that enter the second block."""
        return functional.relu(pooled + self.shift)


@dataclass(frozen=True)
class FirstBlock:
    """Convolution, batch normalisation, ReLU and max-pooling at the start of a network.

    Attributes
    ----------
    convolution : Conv3d
    weight : Tensor, shape (C, 1, K, L, M)
        Its weight times the batch normalisation's scale.
    pooling : int
        Side and stride of the pooling, in voxels.
    rest : Module
        What follows, from pooled volumes to logits.
    """

    convolution: nn.Conv3d
    weight: Tensor
    pooling: int
    rest: nn.Module

    @torch.no_grad()
    def pooled(self, volume: Tensor) -> tuple[Tensor, Tensor]:
        """Return max-pool(u) of volumes (N, 1, D, H, W), and which voxel won each window."""
        volume = channels_last(volume)
        parts = []
        for weight in self.weight.split(CHANNELS_AT_ONCE):
            scaled = functional.conv3d(volume, weight)
            parts.append(functional.max_pool3d(scaled, self.pooling, return_indices=True))
        pooled, winners = (torch.cat(part, 1) for part in zip(*parts, strict=True))
        return channels_last(pooled), winners

    def gradient_at_zero(self, pooled: Tensor, target: int) -> Tensor:
        """Return the gradient of a target's logit after the pooling, for a volume of zeros.

        There all voxels of a pooling window tie. In this block the first one wins; in later ones
        rounding decides, so they run in the model's own memory format, not in a faster one.
        """
        nothing = pooled.new_zeros(pooled.shape).requires_grad_()  # contiguous
        (gradient,) = torch.autograd.grad(self.rest(nothing)[:, target].sum(), nothing)
        return gradient

    @torch.no_grad()
    def input_gradient(
        self, volume: Tensor, gradient: Tensor, winners: Tensor, first_gradient: Tensor
    ) -> Tensor:
        """Carry gradients after the pooling back to the volume.

        Parameters
        ----------
        volume : Tensor, shape (N, 1, D, H, W)
        gradient, winners : Tensors, shape (N, C, d, h, w)
            The gradient that belongs to each window's winner.
        first_gradient : Tensor, shape (N, C, d, h, w)
            The gradient that belongs to each window's first voxel.
        """
        total = torch.zeros_like(volume)
        of_outputs = (gradient, winners, first_gradient)
        groups = zip(*(part.split(CHANNELS_AT_ONCE, 1) for part in of_outputs), strict=True)
        for weight, group in zip(self.weight.split(CHANNELS_AT_ONCE), groups, strict=True):
            total += transposed_sums(self.convolution, volume, weight, self._unpool(volume, *group))
        return total

    def _unpool(
        self, volume: Tensor, gradient: Tensor, winners: Tensor, first_gradient: Tensor
    ) -> Tensor:
        """Return gradients before the pooling, channels-last as transposed sums want them."""
        kernel = self.weight.shape[2:]
        sides = [n - k + 1 for n, k in zip(volume.shape[2:], kernel, strict=True)]
        unpooled = gradient.new_zeros(len(volume), *sides, gradient.shape[1])
        unpooled.flatten(1, 3).scatter_(1, _innermost(winners), _innermost(gradient))
        firsts = tuple(slice(0, n * self.pooling, self.pooling) for n in gradient.shape[2:])
        unpooled = unpooled.permute(0, 4, 1, 2, 3)
        unpooled[(..., *firsts)] += first_gradient
        return unpooled


def _innermost(values: Tensor) -> Tensor:
    """Return values (N, C, d, h, w) as (N, d·h·w, C)."""
    return values.permute(0, 2, 3, 4, 1).flatten(1, 3)


def first_block_of(model: nn.Module, volume: Tensor) -> FirstBlock | None:
    """Return a model's first block, or None if the model is not built in the way this needs.

    Parameters
    ----------
    model : Module
        In eval mode.
    volume : Tensor, shape (N, 1, D, H, W)
        Of the kind that it is to explain.
    """
    if not is_straight(model):
        return None
    first_layers = model.features[:4]
    if [type(m) for m in first_layers] != [nn.Conv3d, nn.BatchNorm3d, nn.ReLU, nn.MaxPool3d]:
        return None
    convolution, norm, _, pooling = first_layers
    if not (is_plain_one_channel(convolution) and is_plain_pooling(pooling)):
        return None
    if convolution.bias is None or norm.running_var is None or norm.weight is None:
        return None
    scale = (norm.weight * torch.rsqrt(norm.running_var + norm.eps)).detach()
    # as the layers themselves round it: where a volume is 0, rounding decides ties in later blocks
    nothing = volume.new_zeros(1, 1, *(k + SPAN - 1 for k in convolution.kernel_size))
    with torch.no_grad():
        shift = norm(convolution(nothing))[0, :, 0, 0, 0]
    weight = convolution.weight.detach() * scale.view(-1, 1, 1, 1, 1)
    rest = Rest(model, len(first_layers), _ShiftedReLU(shift.view(1, -1, 1, 1, 1)))
    return FirstBlock(convolution, weight, pooling.kernel_size, rest)


def is_plain_pooling(pooling: nn.MaxPool3d) -> bool:
    """Tell whether max-pooling has cubic windows side by side and no padding."""
    cubic = isinstance(pooling.kernel_size, int) and pooling.stride == pooling.kernel_size
    return cubic and pooling.padding == 0 and pooling.dilation == 1 and not pooling.ceil_mode
