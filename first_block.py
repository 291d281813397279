"""The first block of a CNN along a straight path from zero: linear up to the first pooling.

With baseline 0, batch normalisation in eval mode, u the convolution without bias scaled by the
batch normalisation, and v what does not depend on the volume:
max-pool(relu(α·u + v)) = relu(α·max-pool(u) + v) for α ≥ 0. So the first convolution and its
pooling are computed once per scan instead of once per step, and each step starts from there.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional

from convolution import channels_last, is_plain_one_channel, transposed_sums
from rest import Rest, is_straight

CHANNELS_AT_ONCE = 8  # before the pooling, where all of them are most of the memory
SPAN = 8  # voxels a side that suffice for layers to compute as they do on whole volumes
NEAR = 5e-7  # of the largest sum that a window can have: float32 rounding is a fraction of it
WINDOWS_AT_ONCE = 2**14  # of which float64 decides who wins; each takes a kernel's voxels
MOST_NEAR = 0.01  # of all windows: more come from volumes of few values, whose ties are real


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
    exact_weight : Tensor, shape (C, 1, K, L, M), float64
        The same before rounding.
    pooling : int
        Side and stride of the pooling, in voxels.
    rest : Module
        What follows, from pooled volumes to logits.
    """

    convolution: nn.Conv3d
    weight: Tensor
    exact_weight: Tensor
    pooling: int
    rest: nn.Module

    @torch.no_grad()
    def pooled(self, volume: Tensor) -> tuple[Tensor, Tensor]:
        """Return max-pool(u) of volumes (N, 1, D, H, W), and which voxel won each window.

        Who wins counts in every step, so where rounding may have decided float64 decides again.
        """
        volume = channels_last(volume)
        parts = []
        largest = self._largest_in_windows(volume)
        weights = (self.weight.split(CHANNELS_AT_ONCE), self.exact_weight.split(CHANNELS_AT_ONCE))
        for weight, exact_weight in zip(*weights, strict=True):
            scaled = functional.conv3d(volume, weight)
            values, winners = functional.max_pool3d(scaled, self.pooling, return_indices=True)
            most = largest * weight.abs().sum((1, 2, 3, 4)).view(1, -1, 1, 1, 1)
            for windows in _near_ties(scaled, values, winners, NEAR * most, self.pooling):
                exact = self._exact_winners(volume, exact_weight, windows)
                winners[tuple(windows.T)] = exact
            parts.append((values, winners))
        pooled, winners = (torch.cat(part, 1) for part in zip(*parts, strict=True))
        return channels_last(pooled), winners

    def _largest_in_windows(self, volume: Tensor) -> Tensor:
        """Return the largest size of the voxels that feed each window, (N, 1, d, h, w)."""
        largest = volume.abs().contiguous()
        for axis, kernel in enumerate(self.weight.shape[2:]):
            sides, stride = [1, 1, 1], [1, 1, 1]
            sides[axis], stride[axis] = self.pooling + kernel - 1, self.pooling
            largest = functional.max_pool3d(largest, sides, stride)
        return largest

    def _exact_winners(self, volume: Tensor, weight: Tensor, windows: Tensor) -> Tensor:
        """Return which voxel wins each of some windows, (n,), given as (scan, channel, d, h, w)."""
        _, _, *sides = volume.shape
        kernel = weight.shape[2:]
        scans, channels, *corners = windows.T
        weights = weight.flatten(1)[channels]
        n_outputs = [side - k + 1 for side, k in zip(sides, kernel, strict=True)]
        around = _places(torch.cartesian_prod(*(torch.arange(k) for k in kernel)).T, sides)
        around = around.to(volume.device)
        voxels = volume.contiguous().flatten()
        sums, places = [], []
        for offset in itertools.product(range(self.pooling), repeat=3):
            corner = [self.pooling * c + o for c, o in zip(corners, offset, strict=True)]
            seen = scans * prod(sides) + _places(corner, sides)
            patches = voxels[seen[:, None] + around]
            sums.append((patches.double() * weights).sum(1))
            places.append(_places(corner, n_outputs))
        best = torch.stack(sums).argmax(0, keepdim=True)  # the first of equal ones
        return torch.stack(places).gather(0, best)[0]

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


def _near_ties(
    scaled: Tensor, values: Tensor, winners: Tensor, tolerance: Tensor, pooling: int
) -> tuple[Tensor, ...]:
    """Return the windows whose second voxel is near the first, in parts of shape (n, 5).

    What is pooled, `scaled`, is used up.
    """
    others = scaled.contiguous()
    others.flatten(2).scatter_(2, winners.flatten(2), -torch.inf)
    lead = values - functional.max_pool3d(others, pooling)
    near = ((lead <= tolerance) & (values != 0)).nonzero()  # where they are 0 is background
    if len(near) > MOST_NEAR * values.numel():
        return ()
    return near.split(WINDOWS_AT_ONCE) if len(near) else ()


def _places(axes: Iterable[Tensor], sides: Sequence[int]) -> Tensor:
    """Return the places in memory of voxels, given along each axis, in a volume of some sides."""
    along_d, along_h, along_w = axes
    return (along_d * sides[1] + along_h) * sides[2] + along_w


def _innermost(values: Tensor) -> Tensor:
    """Return values (N, C, d, h, w) as (N, d·h·w, C)."""
    return values.permute(0, 2, 3, 4, 1).flatten(1, 3)


def has_first_block(model: nn.Module) -> bool:
    """Tell whether a model is built in the way that this needs."""
    if not is_straight(model):
        return False
    first_layers = model.features[:4]
    if [type(m) for m in first_layers] != [nn.Conv3d, nn.BatchNorm3d, nn.ReLU, nn.MaxPool3d]:
        return False
    convolution, norm, _, pooling = first_layers
    if not (is_plain_one_channel(convolution) and is_plain_pooling(pooling)):
        return False
    return not (convolution.bias is None or norm.running_var is None or norm.weight is None)


def first_block_of(model: nn.Module, volume: Tensor) -> FirstBlock:
    """Return the first block of a model that has one.

    Parameters
    ----------
    model : Module
        In eval mode.
    volume : Tensor, shape (N, 1, D, H, W)
        Of the kind that it is to explain.
    """
    first_layers = model.features[:4]
    convolution, norm, _, pooling = first_layers
    scale = (norm.weight * torch.rsqrt(norm.running_var + norm.eps)).detach()
    # as the layers themselves round it: where a volume is 0, rounding decides ties in later blocks
    nothing = volume.new_zeros(1, 1, *(k + SPAN - 1 for k in convolution.kernel_size))
    with torch.no_grad():
        shift = norm(convolution(nothing))[0, :, 0, 0, 0]
    scale = scale.view(-1, 1, 1, 1, 1)
    weight = convolution.weight.detach()
    exact_weight = weight.double() * scale.double()
    rest = Rest(model, len(first_layers), _ShiftedReLU(shift.view(1, -1, 1, 1, 1)))
    return FirstBlock(convolution, weight * scale, exact_weight, pooling.kernel_size, rest)


def is_plain_pooling(pooling: nn.MaxPool3d) -> bool:
    """Tell whether max-pooling has cubic windows side by side and no padding."""
    cubic = isinstance(pooling.kernel_size, int) and pooling.stride == pooling.kernel_size
    return cubic and pooling.padding == 0 and pooling.dilation == 1 and not pooling.ceil_mode
