"""The 3D convolutional networks: one table of variants, one function that builds from it."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

import torch
from torch import nn

from utils import InputError

N_CLASSES = 2
HIDDEN_UNITS = 64
DROPOUT = 0.5
PROCESS_GB = 0.6  # with torch, without tensors
COPIES = 5  # of the first convolution's outputs, in memory at once; measured on CPUs
MARGIN = 1.2  # on an H200 the 32 models took at most 1.17 times as much as `memory_gb` says
N_BLOCK_LAYERS = 4  # convolution, batch normalisation, ReLU, max-pooling
PUBLISHED_WIDTHS = (24, 28, 32, 36, 40, 44, 48, 52)
DEMO_WIDTHS = (8, 16)


@dataclass(frozen=True)
class ModelSpec:
    """One variant: side of each block's convolution kernel and pooling in voxels, and the width."""

    kernels: tuple[int, ...]
    poolings: tuple[int, ...]
    width: int

    def side_after(self, side: int) -> int:
        """Return what all blocks leave of a volume side (voxels), 0 when it is too small."""
        for kernel, pooling in zip(self.kernels, self.poolings, strict=True):
            side = max(0, side - kernel + 1) // pooling
        return side

    def smallest_side(self) -> int:
        """Return the smallest volume side (voxels) that leaves one voxel after the last pooling."""
        side = 1
        for kernel, pooling in zip(reversed(self.kernels), reversed(self.poolings), strict=True):
            side = side * pooling + kernel - 1
        return side

    def memory_gb(self, volume_shape: tuple[int, int, int], batch: int) -> float:
        """Return about how much memory it takes to train on, or explain, volumes of this shape."""
        outputs = self.width * prod(side - self.kernels[0] + 1 for side in volume_shape)
        return PROCESS_GB + 4e-9 * COPIES * batch * outputs

    def n_flat_features(self, volume_shape: tuple[int, int, int]) -> int:
        """Return how many features enter the classifier for a volume of this shape (voxels)."""
        return self.width * prod(self.side_after(side) for side in volume_shape)


FAMILIES = {
    #     kernels          poolings         widths
    "A": ((7, 5, 5, 3, 3), (2, 2, 2, 2, 2), PUBLISHED_WIDTHS),
    "B": ((3, 3, 3, 3, 3), (2, 2, 2, 2, 2), PUBLISHED_WIDTHS),
    "C": ((5, 5, 5, 5), (3, 2, 2, 2), PUBLISHED_WIDTHS),
    "D": ((7, 7, 7), (3, 3, 3), PUBLISHED_WIDTHS),
    "T": ((3, 3, 3), (2, 2, 2), DEMO_WIDTHS),
}
MODELS = {
    f"model{family}{width}": ModelSpec(kernels, poolings, width)
    for family, (kernels, poolings, widths) in FAMILIES.items()
    for width in widths
}

FAMILIES_TEXT = (
    f"model, a family ({', '.join(f for f in FAMILIES if f != 'T')}) and a width "
    f"({', '.join(map(str, PUBLISHED_WIDTHS))}): modelA24 … modelD52; for low resolution "
    f"{' and '.join(f'modelT{width}' for width in DEMO_WIDTHS)}"
)


def that_fit(volume_shape: tuple[int, int, int], batch: int, room_gb: float) -> str:
    """Return which models could be trained on such volumes within this memory, by family."""
    found = []
    for family, (_, _, widths) in FAMILIES.items():
        specs = [MODELS[f"model{family}{width}"] for width in widths]
        fits = [
            spec.width
            for spec in specs
            if spec.smallest_side() <= min(volume_shape)
            and MARGIN * spec.memory_gb(volume_shape, batch) <= room_gb
        ]
        if fits:
            found.append(f"model{family}{fits[0]}" + f" to {fits[-1]}" * (len(fits) > 1))
    return ", ".join(found) or "none"


class CNN3D(nn.Module):
    """Convolutional blocks (`features`) followed by two linear layers (`classifier`).

    The shape of the volumes, in voxels, fixes the size of the first linear layer. Source: Wang et
    al., NeuroImage 269:119929, 2023, doi:10.1016/j.neuroimage.2023.119929.
    """

    def __init__(self, spec: ModelSpec, volume_shape: tuple[int, int, int]):
        super().__init__()
        blocks = []
        n_inputs = 1
        for kernel, pooling in zip(spec.kernels, spec.poolings, strict=True):
            blocks += [
                nn.Conv3d(n_inputs, spec.width, kernel),
                nn.BatchNorm3d(spec.width),
                nn.ReLU(),
                nn.MaxPool3d(pooling),
            ]
            n_inputs = spec.width
        self.features = nn.Sequential(*blocks)
        self.classifier = nn.Sequential(
            nn.Linear(spec.n_flat_features(volume_shape), HIDDEN_UNITS),
            nn.ReLU(),
            nn.Dropout(DROPOUT),
            nn.Linear(HIDDEN_UNITS, N_CLASSES),
        )

    def forward(self, volumes: torch.Tensor) -> torch.Tensor:
        """Return logits of shape (N, 2) for volumes of shape (N, 1, D, H, W).

        In training each block pools before its ReLU. Maxima and ReLU commute, so that loss and
        gradients are the same to the bit, and the ReLU has an eighth of the values to keep.
        """
        if not self.training:
            return self.classifier(torch.flatten(self.features(volumes), 1))
        values, layers = volumes, iter(self.features)
        for convolution, norm, relu, pooling in zip(*[layers] * N_BLOCK_LAYERS, strict=True):
            values = relu(pooling(norm(convolution(values))))
        return self.classifier(torch.flatten(values, 1))

    def after(self, index: int) -> nn.Sequential:
        """Return the network from feature `index` on; its layers are shared, not copied."""
        return nn.Sequential(*self.features[index:], nn.Flatten(1), *self.classifier)


def build_model(name: str, volume_shape: tuple[int, int, int]) -> CNN3D:
    """Build a fresh network for volumes (D, H, W), in voxels; an InputError if too small."""
    if name not in MODELS:
        raise InputError(f"unknown model {name!r}; choose one of: {', '.join(MODELS)}")
    spec = MODELS[name]
    smallest = spec.smallest_side()
    if min(volume_shape) < smallest:
        shape_text = "×".join(map(str, volume_shape))
        demo_name = f"modelT{DEMO_WIDTHS[0]}"
        hint = f"; {demo_name} takes {MODELS[demo_name].smallest_side()} or more"
        raise InputError(
            f"volumes of {shape_text} voxels are too small for {name}: every side must be at least "
            f"{smallest} voxels{hint if name != demo_name else ''}"
        )
    return CNN3D(spec, volume_shape)


@torch.no_grad()
def take_untrained(model: nn.Module, untrained: nn.Module, batches: Iterable[torch.Tensor]) -> None:
    """Give a model in eval mode an untrained one's weights, and batch norms their statistics.

    They are cumulative averages over batches of volumes (N, 1, D, H, W). Source of the control:
    Adebayo et al., NeurIPS 2018, arXiv:1810.03292.
    """
    model.load_state_dict(untrained.state_dict())
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm3d)]
    momentum = norms[0].momentum
    for norm in norms:
        norm.momentum = None
    model.train()
    for volumes in batches:
        model(volumes)
    model.eval()
    for norm in norms:
        norm.momentum = momentum
