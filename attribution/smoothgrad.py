"""SmoothGrad: the gradient of a logit, averaged over noisy copies of a volume."""

from collections.abc import Sequence

import numpy as np
import torch
from captum.attr import Saliency
from torch import Tensor, nn

from attribution.unmodified import attribute_on

N_SAMPLES = 25
NOISE = 0.15  # of a volume's range
VOXELS_AT_ONCE = 2**18  # of small volumes several copies are one pass


def smoothgrad(
    model: nn.Module, volume: Tensor, target: int | Tensor, n_samples: int = N_SAMPLES,
    noise: float = NOISE, seed: int | Sequence[int] = 0,
) -> Tensor:  # fmt: skip
    """Mean gradient of the target's logit, with its sign, over noisy copies of each volume.

    Parameters
    ----------
    model : Module
        See `unmodified.check_network`; a TypeError if it is of another kind.
    volume : Tensor, shape (N, 1, D, H, W), float32
    target : int or int64 Tensor of shape (N,)
    n_samples : int
        Copies of each volume.
    noise : float
        Standard deviation of the Gaussian noise, as a share of the volume's range (max − min).
        Voxels that are 0 get none.
    seed : int, or one a volume
        The noise of copy k is drawn on the CPU from (seed, k).

    Returns
    -------
    Tensor, shape (N, 1, D, H, W), float32
        In units of the logit per unit of intensity; 0 where the volume is 0. A FloatingPointError
        if a map or a logit is NaN or infinite.

    Notes
    -----
    How many copies go through the network at once depends on the volume's size alone, and each
    volume goes on its own: a map has the same bits in whatever batch and process it is made.

    References
    ----------
    Smilkov et al., arXiv:1706.03825
    """
    targets = torch.as_tensor(target).expand(len(volume)).tolist()
    seeds = [seed] * len(volume) if isinstance(seed, int) else seed

    def attribute() -> Tensor:
        saliency = Saliency(model)
        n_at_once = max(1, VOXELS_AT_ONCE // volume[0].numel())
        maps = []
        for one, of_volume, target in zip(volume.detach(), seeds, targets, strict=True):
            total = torch.zeros_like(one)
            for start in range(0, n_samples, n_at_once):
                samples = range(start, min(start + n_at_once, n_samples))
                copies = torch.stack([noisy(one, noise, of_volume, k) for k in samples])
                total += saliency.attribute(copies, target, abs=False).detach().sum(0)
            maps.append(total / n_samples * (one != 0))
        return torch.stack(maps)

    return attribute_on(model, attribute)


def noisy(volume: Tensor, noise: float, seed: int, sample: int) -> Tensor:
    """Return a copy of a volume (1, D, H, W) with noise wherever it is not 0."""
    rng = np.random.default_rng((seed, sample))
    drawn = torch.from_numpy(rng.standard_normal(volume.shape, dtype=np.float32))
    scale = noise * (volume.max() - volume.min())
    return volume + scale * drawn.to(volume.device, volume.dtype) * (volume != 0)
