"""What makes the methods fast, against captum as it comes: all families, odd and even sides."""

import numpy as np
import pytest
import torch
from networks import assert_same_maps, make_network, make_volumes, relative_differences
from torch import Tensor, nn

from attribution import METHODS
from attribution.convolution import one_channel_input_gradient
from benchmarks import plain
from models import CNN3D, FAMILIES, ModelSpec

WIDTH = 3  # narrow: the same structure, seconds
SEEDS = {"A": 4, "B": 12, "C": 7, "D": 3, "T": 3}  # no map is empty
MORE = [(7, 8, 9), (9, 7, 8)]  # voxels than a side must have: every remainder of 2 and 3
STEPS = {
    "IG": {"n_steps": 3},
    "SG": {"n_samples": 3},
}  # a third of the map is the step at 0, where every window ties
PLAIN = plain.METHODS
NEAR, MOST_APART, LEAST_R = 5e-5, 1e-3, 0.99999


def begin_of(family: str) -> ModelSpec:
    """Return a family's first block, then a convolution.

    A second pooling would do no more than the first, but for ties at 0 that rounding decides.
    """
    kernels, poolings, _ = FAMILIES[family]
    return ModelSpec(kernels[:2], (poolings[0], 1), WIDTH)


def make_case(family: str, spec: ModelSpec, more: tuple, n_scans: int = 2) -> tuple:
    """Return a network, positive volumes on zero background, and a target for each."""
    shape = tuple(spec.smallest_side() + m for m in more)
    volumes = make_volumes(shape, n_scans=n_scans)
    volumes[:, :, : shape[0] // 6] = 0
    return make_network(volumes, spec, SEEDS[family]), volumes, torch.tensor([1, 0])[:n_scans]


def both_ways(name: str, model: CNN3D, volumes: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the maps by the suite and by captum."""
    options = STEPS.get(name, {})
    batch = {"batch_size": len(volumes)} if name == "IG" else {}
    maps = METHODS[name](model, volumes, targets, **options)
    return maps, PLAIN[name](model, volumes, targets, **options, **batch)


def assert_alike(maps: Tensor, expected: Tensor) -> None:
    """All but a few voxels agree: where two of a window nearly tie, rounding may decide."""
    is_apart = relative_differences(maps, expected) > NEAR
    assert is_apart.flatten(1).double().mean(1).max() <= MOST_APART
    for one, other in zip(maps.flatten(1), expected.flatten(1), strict=True):
        assert np.corrcoef(one, other)[0, 1] >= LEAST_R


@pytest.mark.parametrize("more", MORE)
@pytest.mark.parametrize("family", "ABCD")  # T begins as B does
@pytest.mark.parametrize("name", METHODS)
def test_shortcuts_are_exact_in_float64(name, family, more):
    model, volumes, targets = make_case(family, begin_of(family), more)
    in_float32 = METHODS[name](model, volumes, targets, **STEPS.get(name, {}))
    maps, expected = both_ways(name, model.double(), volumes.double(), targets)
    assert_same_maps(maps, expected, 1e-7)  # captum holds the weights of steps in float32
    assert_alike(in_float32, expected)


@pytest.mark.parametrize(
    "family",
    ["T", *(pytest.param(family, marks=pytest.mark.slow) for family in "ABCD")],
)
@pytest.mark.parametrize("name", METHODS)
def test_whole_networks(name, family):
    kernels, poolings, _ = FAMILIES[family]
    n_scans = 2 if family in "BT" else 1
    case = make_case(family, ModelSpec(kernels, poolings, WIDTH), (1, 0, 2), n_scans)
    assert_alike(*both_ways(name, *case))


@pytest.mark.parametrize("kernel", [(3, 3, 3), (7, 7, 7), (5, 4, 2), (1, 1, 1)])
@pytest.mark.parametrize("sides", [(9, 10, 11), (12, 13, 8), (7, 7, 8)])
def test_input_gradient_of_one_channel(kernel, sides):
    """Exact in float64, whatever is odd or even."""
    torch.manual_seed(0)
    weight = torch.randn(4, 1, *kernel, dtype=torch.float64)
    n_outputs = [s - k + 1 for s, k in zip(sides, kernel, strict=True)]
    outputs = torch.randn(2, 4, *n_outputs, dtype=torch.float64)
    expected = nn.grad.conv3d_input((2, 1, *sides), weight, outputs)
    found = one_channel_input_gradient(weight, outputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
