"""Every shortcut against the plain way, for all five families, odd and even sides, batches."""

import numpy as np
import pytest
import torch
from torch import nn

import attribution
import convolution
import devices
import first_block
import lrp_rules
import utils
from benchmarks import plain
from models import CNN3D, FAMILIES, ModelSpec

WIDTH = 2  # narrow networks of the published kernels and poolings: the same structure, seconds
SEEDS = {"A": 4, "B": 3, "C": 3, "D": 4, "T": 1}  # no map is empty


def make_model(family: str, volumes: torch.Tensor, width: int = WIDTH) -> CNN3D:
    """Return a network with the volumes' batch-norm statistics and weights of either sign."""
    torch.manual_seed(SEEDS[family])
    kernels, poolings, _ = FAMILIES[family]
    model = CNN3D(ModelSpec(kernels, poolings, width), tuple(volumes.shape[2:]))
    for module in [m for m in model.modules() if isinstance(m, nn.BatchNorm3d)]:
        module.momentum = 1.0
        module.bias.data.fill_(0.5)
        module.weight.data = torch.tensor([1.2, -0.7] * width)[:width]
    with torch.no_grad():
        model.train()(volumes)
    return model.eval()


def make_volumes(n_scans: int, shape: tuple) -> torch.Tensor:
    """Return positive noise in a head, on zero background."""
    volumes = torch.rand(n_scans, 1, *shape, generator=torch.Generator().manual_seed(1))
    volumes[:, :, : shape[0] // 6] = 0
    return volumes


def batch_of(family: str) -> torch.Tensor:
    """Return a target each for a batch, of one scan where the volumes have to be large."""
    return torch.tensor([1, 0] if family in "BT" else [1])


def assert_same_maps(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Each map differs from the expected one by at most tolerance times the latter's maximum."""
    largest = expected.abs().amax((1, 2, 3, 4), keepdim=True)
    assert (largest > 0).all(), "an empty map shows nothing"
    assert ((found - expected).abs() <= tolerance * largest).all()


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
    ("family", "more"),  # every remainder of a division by the first pooling
    [*((family, (0, 1, 2)) for family in FAMILIES), ("T", (2, 3, 0)), ("T", (0, 0, 0))],
)
def test_integrated_gradients(family, more):
    """Equal to captum's on the whole network; r ≥ 0.99999, within 10⁻³ of the maximum."""
    shape = shape_of(family, more)
    targets = batch_of(family)
    volumes = make_volumes(len(targets), shape)
    model = make_model(family, volumes)
    assert first_block.has_first_block(model)
    expected = plain.integrated_gradients(model, volumes, targets, 3, len(targets))
    found = attribution.integrated_gradients(model, volumes, targets, n_steps=3)
    assert_same_maps(found, expected, 1e-3)
    assert np.corrcoef(found.flatten(), expected.flatten())[0, 1] >= 0.99999


@pytest.mark.parametrize("n_at_once", [1, 2**14])
def test_winners_of_the_first_pooling_are_those_of_float64(n_at_once, monkeypatch):
    """Rounding would have decided one of these windows otherwise, in every step."""
    monkeypatch.setattr(first_block, "WINDOWS_AT_ONCE", n_at_once)
    volumes = make_volumes(1, shape_of("C", (0, 1, 2)))
    model = make_model("C", volumes)
    _, found = first_block.first_block_of(model, volumes).pooled(volumes)
    with monkeypatch.context() as without:
        without.setattr(first_block, "NEAR", -1)
        _, rounded = first_block.first_block_of(model, volumes).pooled(volumes)
        exact_block = first_block.first_block_of(model.double(), volumes.double())
        _, expected = exact_block.pooled(volumes.double())
    assert int((rounded != expected).sum()) == 1, "choose other volumes"
    assert torch.equal(found, expected)


def test_ties_of_volumes_with_few_values_are_left_as_they_are(monkeypatch):
    """There are too many, and they are real: any of the voxels may win."""
    monkeypatch.setattr(first_block.FirstBlock, "_exact_winners", None)
    volumes = make_volumes(1, (23, 25, 24)).round()
    volumes[..., 6:20, 4:20, 3:22] = 1
    model = make_model("T", volumes)
    maps = attribution.integrated_gradients(model, volumes, 1, n_steps=3)
    assert maps.any()


@pytest.mark.parametrize("n_at_once", [2, 4])
def test_integrated_gradients_take_channels_in_groups(n_at_once, monkeypatch):
    """As networks of the published widths have them; the last group is smaller."""
    monkeypatch.setattr(first_block, "CHANNELS_AT_ONCE", n_at_once)
    volumes = make_volumes(1, (24, 23, 25))
    model = make_model("T", volumes, width=5)
    expected = plain.integrated_gradients(model, volumes, 1, n_steps=3)
    found = attribution.integrated_gradients(model, volumes, 1, n_steps=3)
    assert_same_maps(found, expected, 1e-3)


def test_small_volumes_take_two_steps_a_pass(monkeypatch):
    """The same map; at a batch of one, library kernels for small volumes are slow."""
    volumes = make_volumes(1, (23, 25, 24))
    model = make_model("T", volumes)
    n_steps_a_pass = []
    model.classifier[0].register_forward_pre_hook(
        lambda _, inputs: n_steps_a_pass.append(len(inputs[0]))
    )
    two = attribution.integrated_gradients(model, volumes, 1, n_steps=6)
    assert n_steps_a_pass[-3:] == [2, 2, 1]  # the step at zero was taken apart
    monkeypatch.setattr(attribution, "SMALL_VOXELS", 0)
    one = attribution.integrated_gradients(model, volumes, 1, n_steps=6)
    assert n_steps_a_pass[-5:] == [1] * 5
    assert_same_maps(two, one, 1e-5)


def test_integrated_gradients_exactly_in_float64():
    """With n = 3 the zero volume's step, where every window ties, is a third of the map.

    captum rounds the weights of the steps to float32.
    """
    shape = (23, 25, 24)
    volumes = make_volumes(2, shape)
    model, volumes = make_model("T", volumes).double(), volumes.double()
    expected = plain.integrated_gradients(model, volumes, 1, n_steps=3, batch_size=4)
    found = attribution.integrated_gradients(model, volumes, 1, n_steps=3)
    assert_same_maps(found, expected, 1e-7)


@pytest.mark.parametrize("family", FAMILIES)
def test_guided_gradcam(family):
    """Equal to captum's through the library's own kernels, in a batch with a target each."""
    shape = shape_of(family, (1, 0, 2))
    targets = batch_of(family)
    volumes = make_volumes(len(targets), shape)
    model = make_model(family, volumes)
    expected = plain.guided_gradcam(model, volumes, targets)
    found = attribution.guided_gradcam(model, volumes, targets)
    assert_same_maps(found, expected, 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_lrp(family, monkeypatch):
    """Equal to the rule through the library's own kernels, also where it goes slab by slab."""
    monkeypatch.setattr(lrp_rules, "SLAB", 2**18)
    shape = shape_of(family, (1, 0, 2))
    targets = batch_of(family)
    volumes = make_volumes(len(targets), shape)
    model = make_model(family, volumes)
    found = attribution.lrp(model, volumes, targets)
    expected = plain.lrp(model, volumes, targets)
    assert_same_maps(found, expected, 1e-5)


class ScaledByItsInput(CNN3D):
    """No straight network, though its logits of a volume with maximum 1 are those of one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x / x.amax().clamp(min=0.1))


def changed(model: CNN3D, change: str) -> CNN3D:
    """Return a network that lacks what a shortcut needs."""
    if change == "padded pooling":
        model.features[3] = nn.MaxPool3d(2, stride=2, padding=1)
    elif change == "overlapping pooling":
        model.features[3] = nn.MaxPool3d(2, stride=1)
    elif change == "pooling over the edge":
        model.features[3] = nn.MaxPool3d(2, ceil_mode=True)
    elif change == "flat pooling":
        model.features[3] = nn.MaxPool3d((2, 1, 2))
    elif change in ("stride", "dilation", "padding"):
        model.features[0] = nn.Conv3d(1, WIDTH, 3, **{change: 2})
    elif change == "no bias":
        model.features[0] = nn.Conv3d(1, WIDTH, 3, bias=False)
    elif change == "no statistics":
        model.features[1] = nn.BatchNorm3d(WIDTH, track_running_stats=False)
    elif change == "no scale":
        model.features[1] = nn.BatchNorm3d(WIDTH, affine=False)
    elif change == "no batch norm":
        model.features[1] = nn.Identity()
    elif change == "other activation":
        model.features[2] = nn.ELU()
    elif change == "something in between":
        model.forward = lambda x: model.classifier(2 * torch.flatten(model.features(x), 1))
    elif change == "scaled by its input":  # the same logits for scans, whose maximum is 1
        model.__class__ = ScaledByItsInput
    elif change == "blocks in blocks":
        model.features = nn.Sequential(model.features[:4], model.features[4:])
    elif change == "other names":
        model = nn.Sequential(model.features, nn.Flatten(), model.classifier)
    return model.eval()


@pytest.mark.parametrize(
    "change",
    [
        "padded pooling",
        "overlapping pooling",
        "pooling over the edge",
        "flat pooling",
        "stride",
        "dilation",
        "padding",
        "no bias",
        "no statistics",
        "no scale",
        "no batch norm",
        "other activation",
        "something in between",
        "scaled by its input",
    ],
)
def test_integrated_gradients_take_the_plain_way_where_the_structure_is_missing(change, caplog):
    shape = (42, 44, 47)
    volumes = make_volumes(1, shape)
    model = changed(make_model("T", volumes), change)
    model.classifier[0] = nn.Linear(model.features(volumes).numel(), 64)
    utils.say_once.cache_clear()
    volumes /= volumes.amax()
    expected = plain.integrated_gradients(model, volumes, 0, n_steps=3)
    with caplog.at_level("INFO", logger="heatmaps"):
        for _ in range(2):
            found = attribution.integrated_gradients(model, volumes, 0, n_steps=3)
    assert_same_maps(found, expected, 1e-5)
    assert caplog.text.count("every step is a whole pass") == 1


@pytest.mark.parametrize(
    "change", ["something in between", "scaled by its input", "blocks in blocks", "other names"]
)
def test_guided_gradcam_takes_the_plain_way_where_the_structure_is_missing(change, caplog):
    shape = (22, 24, 23)
    volumes = make_volumes(1, shape)
    model = changed(make_model("T", volumes), change)
    utils.say_once.cache_clear()
    expected = plain.guided_gradcam(model, volumes, 0)
    with caplog.at_level("INFO", logger="heatmaps"):
        for _ in range(2):
            found = attribution.guided_gradcam(model, volumes, 0)
    assert_same_maps(found, expected, 1e-5)
    assert caplog.text.count("two passes") == 1


@pytest.mark.parametrize("method", [attribution.lrp, attribution.guided_gradcam])
def test_winners_and_masks_are_the_models_own(method):
    """Its logits come out bit for bit, at a width where channels-last kernels round otherwise."""
    torch.manual_seed(0)
    volumes = make_volumes(1, (28, 32, 30))
    model = CNN3D(ModelSpec((5, 5), (2, 2), 24), (28, 32, 30)).eval()
    expected = model(volumes)
    seen = []
    handle = model.register_forward_hook(lambda _, inputs, logits: seen.append(logits.detach()))
    method(model, volumes, 1)
    handle.remove()
    assert len(seen) == 1 and torch.equal(seen[0], expected)


def test_maps_are_made_in_exact_float32():
    """Also where training rounds to TF32, which stays as it was."""
    volumes = make_volumes(1, (22, 24, 23))
    model = make_model("T", volumes)
    kernels = torch.backends.cudnn.conv
    during = []
    model.features[0].register_forward_hook(lambda *_: during.append(kernels.fp32_precision))
    devices.set_precision("tf32")
    try:
        for method in attribution.METHODS.values():
            method(model, volumes, 1)
            assert kernels.fp32_precision == "tf32"
    finally:
        devices.set_precision("fp32")
    assert len(during) >= 3 and set(during) == {"ieee"}


@pytest.mark.parametrize("layer", [0, 4])
def test_lrp_refuses_other_padding_than_zeros(layer):
    volumes = make_volumes(1, (26, 24, 25))
    model = make_model("T", volumes)
    model.features[layer].padding_mode = "circular"
    with pytest.raises(TypeError, match=f"layer features.{layer} pads with other values"):
        attribution.lrp(model, volumes, 1)
