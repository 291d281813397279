"""Integrated gradients whose steps start after the first pooling.

Along a straight path from 0 the first block is linear up to there. With batch normalisation in
eval mode, u the convolution without bias scaled by the batch normalisation, and v what does not
depend on the volume: max-pool(relu(α·u + v)) = relu(α·max-pool(u) + v) for α ≥ 0. So the first
convolution and its pooling are computed once a scan instead of once a step.
"""

import torch
from captum.attr import IntegratedGradients
from torch import Tensor, nn
from torch.nn import functional

from attribution.convolution import channels_last, transposed_sums
from attribution.unmodified import BLOCK, attribute_on

N_STEPS = 100
SMALL_VOXELS = 128**3  # library kernels for a CPU are slow on one such volume, not on two
CHANNELS_AT_ONCE = 8  # before the pooling, where all of them are most of the memory
COPIES_PER_STEP = 12  # of the first block's outputs, that a step takes in memory
MAX_STEPS_AT_ONCE = 16
SPAN = 8  # voxels a side that suffice for layers to compute as they do on whole volumes


def integrated_gradients(
    model: nn.Module, volume: Tensor, target: int | Tensor, n_steps: int = N_STEPS,
    batch_size: int = 1,
) -> Tensor:  # fmt: skip
    """Integrated gradients from baseline 0, midpoint rule.

    a = x ⊙ (1/n) Σ_{k=0}^{n−1} g((k+½)/n·x), g the gradient of the target's logit.

    Parameters
    ----------
    model : Module
        See `unmodified.check_network`; a TypeError if it is of another kind.
    volume : Tensor, shape (N, 1, D, H, W), float32
    target : int or int64 Tensor of shape (N,)
    n_steps : int
        At least 2.
    batch_size : int
        Steps per pass; on a CPU two for small volumes, where one at a time would be slower; on a
        GPU more where they take at most a quarter of its free memory.

    Returns
    -------
    Tensor, shape (N, 1, D, H, W), float32
        As n_steps grows, each map's sum approaches f(x) − f(0). A FloatingPointError if a map or a
        logit is NaN or infinite.

    Notes
    -----
    Which voxel wins a window of the first pooling counts in every step. Where two are nearly equal
    rounding decides it, here as in any implementation: two of them may differ there, by the whole
    of a window's share, and agree in the map's sum and elsewhere.

    References
    ----------
    Sundararajan et al., ICML 2017, arXiv:1703.01365
    """
    targets = torch.as_tensor(target).expand(len(volume)).tolist()
    if volume[0].numel() <= SMALL_VOXELS and volume.device.type == "cpu":
        batch_size = max(2, batch_size)

    def attribute() -> Tensor:
        block = _FirstBlock(model, volume.dtype)
        one_by_one = zip(volume.detach()[:, None], targets, strict=True)
        maps = [_integrate(block, one, target, n_steps, batch_size) for one, target in one_by_one]
        return torch.cat(maps).to(volume.dtype)

    return attribute_on(model, attribute)


def _integrate(
    block: "_FirstBlock", volume: Tensor, target: int, n_steps: int, batch_size: int
) -> Tensor:
    """Integrate gradients on what follows the first pooling, and carry them back once."""
    pooled, winners = block.pooled(volume)
    if volume.device.type == "cuda":
        step_bytes = COPIES_PER_STEP * pooled.numel() * pooled.element_size()
        fitting = torch.cuda.mem_get_info(volume.device)[0] // 4 // step_bytes
        batch_size = max(batch_size, min(MAX_STEPS_AT_ONCE, n_steps, int(fitting)))
    gradient = IntegratedGradients(block.rest, multiply_by_inputs=False).attribute(
        pooled, target=target, n_steps=n_steps, method="riemann_middle",
        internal_batch_size=batch_size,
    )  # fmt: skip
    return volume * block.input_gradient(volume, gradient, winners)


class _ShiftedReLU(nn.Module):
    """What the first block does to α·max-pool(u)."""

    def __init__(self, shift: Tensor):
        super().__init__()
        self.shift = shift.view(1, -1, 1, 1, 1)

    def forward(self, pooled: Tensor) -> Tensor:
        """Return the values (N, C, d, h, w) that enter the second block."""
        return functional.relu(pooled + self.shift)


class _FirstBlock:
    """The first block of a network in eval mode, and `rest`, all that follows its pooling.

    `weight` is the convolution's weight times the batch normalisation's scale, (C, 1, K, L, M).
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        self.convolution, norm, _, pooling = model.features[: len(BLOCK)]
        self.pooling = pooling.kernel_size
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        self.weight = (self.convolution.weight * scale.view(-1, 1, 1, 1, 1)).detach()
        # as the layers themselves round it: where a volume is 0, rounding decides ties in later
        # blocks
        sides = (k + SPAN - 1 for k in self.convolution.kernel_size)
        nothing = self.weight.new_zeros(1, 1, *sides, dtype=dtype)
        with torch.no_grad():
            shift = norm(self.convolution(nothing))[0, :, 0, 0, 0]
        self.rest = nn.Sequential(_ShiftedReLU(shift), model.after(len(BLOCK)))

    @torch.no_grad()
    def pooled(self, volume: Tensor) -> tuple[Tensor, Tensor]:
        """Return max-pool(u) of volumes (N, 1, D, H, W), and which voxel won each window."""
        volume = channels_last(volume)
        groups = (functional.conv3d(volume, w) for w in self.weight.split(CHANNELS_AT_ONCE))
        parts = [functional.max_pool3d(u, self.pooling, return_indices=True) for u in groups]
        pooled, winners = (torch.cat(part, 1) for part in zip(*parts, strict=True))
        return channels_last(pooled), winners

    @torch.no_grad()
    def input_gradient(self, volume: Tensor, gradient: Tensor, winners: Tensor) -> Tensor:
        """Carry gradients after the pooling, (N, C, d, h, w), back to the volume."""
        kernel = self.weight.shape[2:]
        sides = [n - k + 1 for n, k in zip(volume.shape[2:], kernel, strict=True)]
        parts = (part.split(CHANNELS_AT_ONCE, 1) for part in (gradient, winners))
        total = torch.zeros_like(volume)
        for weight, *group in zip(self.weight.split(CHANNELS_AT_ONCE), *parts, strict=True):
            values, places = (part.permute(0, 2, 3, 4, 1).flatten(1, 3) for part in group)
            unpooled = values.new_zeros(len(volume), *sides, len(weight))  # channels-last
            unpooled.flatten(1, 3).scatter_(1, places, values)
            unpooled = unpooled.permute(0, 4, 1, 2, 3)
            total += transposed_sums(self.convolution, volume, weight, unpooled)
        return total
