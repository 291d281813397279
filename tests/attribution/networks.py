"""Small networks as after training, volumes for them, and how their maps are compared."""

import torch
from torch import Tensor, nn

from models import CNN3D, ModelSpec

SHAPE = (8, 12, 16)  # voxels; three different sides: equal ones hide swapped axes
SPEC = ModelSpec(kernels=(3, 2), poolings=(2, 2), width=3)
TARGETS = torch.tensor([1, 0, 1])
MODEL_SEED = 33  # no map is empty, and f(x) differs clearly from f(0)


def make_volumes(shape: tuple = SHAPE, lowest: float = 0.1, n_scans: int = 3) -> Tensor:
    """Return random volumes with values from `lowest` to 1, shape (N, 1, D, H, W), float32."""
    uniform = torch.rand(n_scans, 1, *shape, generator=torch.Generator().manual_seed(2))
    return lowest + (1 - lowest) * uniform


def make_network(
    volumes: Tensor, spec: ModelSpec = SPEC, seed: int = MODEL_SEED, kind: type[CNN3D] = CNN3D
) -> CNN3D:
    """Return a network with the volumes' statistics and batch-norm weights of either sign."""
    torch.manual_seed(seed)
    model = kind(spec, tuple(volumes.shape[2:]))
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm3d):
            layer.momentum = 1.0
            nn.init.normal_(layer.weight)
            nn.init.normal_(layer.bias)
    with torch.no_grad():
        model.train()(volumes)
    return model.eval()


def target_logits(model: nn.Module, volumes: Tensor, targets: Tensor) -> Tensor:
    """Return the logit of each volume's target, shape (N,)."""
    return model(volumes).gather(1, targets[:, None])[:, 0]


def relative_differences(maps: Tensor, expected: Tensor) -> Tensor:
    """Return the absolute differences, each map's over the expected map's maximum."""
    assert maps.shape == expected.shape
    largest = expected.abs().amax((1, 2, 3, 4), keepdim=True)
    assert (largest > 0).all(), "an empty map shows nothing"
    return (maps.double() - expected.double()).abs() / largest


def assert_same_maps(maps: Tensor, expected: Tensor, tolerance: float) -> None:
    """Each map differs from the expected one by at most tolerance times the latter's maximum."""
    assert relative_differences(maps, expected).max() <= tolerance
