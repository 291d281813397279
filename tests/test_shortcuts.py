"""Every shortcut against the plain way, for all five families, odd and even sides, batches."""

import numpy as np
import pytest
import torch
from captum.attr import GuidedGradCam, IntegratedGradients
from torch import nn

import attribution
import convolution
import first_block
from models import CNN3D, FAMILIES, ModelSpec

WIDTH = 3  # narrow networks of the published kernels and poolings: the same structure, seconds


def make_model(family: str, shape: tuple, seed: int = 0) -> CNN3D:
    """Return a network with batch-norm statistics as after training, some weights negative."""
    torch.manual_seed(seed)
    kernels, poolings, _ = FAMILIES[family]
    model = CNN3D(ModelSpec(kernels, poolings, WIDTH), shape)
    for module in [m for m in model.modules() if isinstance(m, nn.BatchNorm3d)]:
        nn.init.normal_(module.running_mean, std=0.1)
        nn.init.uniform_(module.running_var, 0.01, 0.1)
        nn.init.uniform_(module.bias, 0.3, 0.8)
        module.weight.data = torch.tensor([1.2, -0.7, 0.9])
    module.bias.data += 50  # the last one: no family's features are all 0
    return model.eval()


def make_volumes(n_scans: int, shape: tuple) -> torch.Tensor:
    """Return positive noise in a head, on zero background."""
    volumes = torch.rand(n_scans, 1, *shape, generator=torch.Generator().manual_seed(1))
    volumes[:, :, : shape[0] // 6] = 0
    return volumes


def shape_of(family: str, more: tuple) -> tuple:
    kernels, poolings, _ = FAMILIES[family]
    smallest = ModelSpec(kernels, poolings, WIDTH).smallest_side()
    return tuple(smallest + m for m in more)


@pytest.mark.parametrize("kernel", [(3, 3, 3), (7, 7, 7), (5, 4, 2), (1, 1, 1)])
@pytest.mark.parametrize("sides", [(9, 10, 11), (12, 13, 8), (7, 7, 8)])
def test_input_gradient_of_one_channel(kernel, sides):
    """Exact in float64, whatever is odd or even."""
    torch.manual_seed(0)
    weight = torch.randn(4, 1, *kernel, dtype=torch.float64)
    n_outputs = [s - k + 1 for s, k in zip(sides, kernel, strict=True)]
    outputs = torch.randn(2, 4, *n_outputs, dtype=torch.float64)
    expected = nn.grad.conv3d_input((2, 1, *sides), weight, outputs)
    found = convolution.one_channel_input_gradient(weight, outputs)
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "layer",
    [nn.Conv3d(1, 2, 3, stride=2), nn.Conv3d(1, 2, 3, padding=1), nn.Conv3d(1, 2, 3, dilation=2),
     nn.Conv3d(2, 2, 3), nn.Linear(1, 2)],
)  # fmt: skip
def test_other_layers_are_left_to_the_library(layer):
    assert not convolution.is_plain_one_channel(layer)


@pytest.mark.parametrize(
    ("family", "more"), [*((family, (0, 1, 3)) for family in FAMILIES), ("T", (2, 3, 0))]
)
def test_integrated_gradients(family, more):
    """Equal to captum's on the whole network; r ≥ 0.99999, within 10⁻³ of the maximum."""
    shape = shape_of(family, more)
    model, volumes = make_model(family, shape), make_volumes(1, shape)
    assert first_block.first_block_of(model, volumes) is not None
    options = {"n_steps": 4, "method": "riemann_left", "internal_batch_size": 1}
    expected = IntegratedGradients(model).attribute(volumes, 0, target=1, **options).detach()
    found = attribution.integrated_gradients(model, volumes, 1, n_steps=4)
    assert expected.abs().max() > 0
    assert (found - expected).abs().max() <= 1e-3 * expected.abs().max()
    assert np.corrcoef(found.flatten(), expected.flatten())[0, 1] >= 0.99999


def test_integrated_gradients_exactly_in_float64():
    """With n = 2 the zero volume's step, where every window ties, is half of the map."""
    shape = (23, 25, 24)
    model, volumes = make_model("T", shape).double(), make_volumes(2, shape).double()
    options = {"n_steps": 2, "method": "riemann_left"}
    expected = IntegratedGradients(model).attribute(volumes, 0, target=1, **options)
    found = attribution.integrated_gradients(model, volumes, 1, n_steps=2)
    assert (found - expected).abs().max() <= 1e-9 * expected.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_guided_gradcam(family):
    """Equal to captum's through the library's own kernels, in a batch with a target each."""
    shape = shape_of(family, (1, 0, 2))
    model, volumes = make_model(family, shape), make_volumes(2, shape)
    targets = torch.tensor([1, 0])
    plain = GuidedGradCam(model, attribution.last_convolution(model))
    expected = plain.attribute(volumes.clone(), targets, interpolate_mode="trilinear").detach()
    found = attribution.guided_gradcam(model, volumes, targets)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_lrp(family, monkeypatch):
    """Equal to the rule through the library's own kernels."""
    shape = shape_of(family, (1, 0, 2))
    model, volumes = make_model(family, shape), make_volumes(2, shape)
    targets = torch.tensor([1, 0])
    found = attribution.lrp(model, volumes, targets)
    monkeypatch.setattr(convolution, "is_plain_one_channel", lambda layer: False)
    expected = attribution.lrp(model, volumes, targets)
    assert expected.abs().max() > 0
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def changed(model: CNN3D, change: str) -> CNN3D:
    """Return a network that lacks what the shortcut of integrated gradients needs."""
    if change == "padded pooling":
        model.features[3] = nn.MaxPool3d(2, stride=2, padding=1)
    elif change == "no batch norm":
        model.features[1] = nn.Identity()
    elif change == "other activation":
        model.features[2] = nn.ELU()
    elif change == "something in between":
        model.forward = lambda x: model.classifier(torch.flatten(model.features(x), 1).sin())
    return model


@pytest.mark.parametrize(
    "change", ["padded pooling", "no batch norm", "other activation", "something in between"]
)
def test_where_the_structure_is_missing_the_plain_way_is_taken(change, caplog):
    shape = (22, 24, 23)
    model, volumes = make_model("T", shape), make_volumes(1, shape)
    model = changed(model, change)
    model.classifier[0] = nn.Linear(model.features(volumes).numel(), 64)
    attribution._say_once.cache_clear()
    options = {"n_steps": 3, "method": "riemann_left", "internal_batch_size": 1}
    expected = IntegratedGradients(model).attribute(volumes, 0, target=0, **options).detach()
    with caplog.at_level("INFO", logger="heatmaps"):
        for _ in range(2):
            found = attribution.integrated_gradients(model, volumes, 0, n_steps=3)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert caplog.text.count("every step is a whole pass") == 1
