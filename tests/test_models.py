"""The networks: names, sizes, state-dict keys, and what they refuse."""

import re

import pytest
import torch

import models
from utils import InputError

PAPER_SHAPE = (193, 229, 193)
FLAT_FEATURES_AT_WIDTH_24 = {"A": 864, "B": 1920, "C": 1920, "D": 1920}
SMALLEST_SIDE = {"A": 110, "B": 94, "C": 112, "D": 105, "T": 22}
PUBLISHED = [f"model{f}{w}" for f in "ABCD" for w in (24, 28, 32, 36, 40, 44, 48, 52)]


def test_names():
    assert list(models.MODELS) == [*PUBLISHED, "modelT8", "modelT16"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_build_at_the_papers_size(name):
    model = models.build_model(name, PAPER_SHAPE)
    width = int(name[-2:])
    n_features = FLAT_FEATURES_AT_WIDTH_24[name[5]] * width // 24
    assert model.classifier[0].in_features == n_features
    assert model.features[0].out_channels == width


@pytest.mark.parametrize("family", "ABCDT")
def test_smallest_side_is_exact(family):
    """One voxel is left at the smallest side, and nothing one voxel below it."""
    name = f"model{family}{8 if family == 'T' else 24}"
    side = SMALLEST_SIDE[family]
    model = models.build_model(name, (side, side + 1, side + 2)).eval()
    with torch.no_grad():
        assert model.features(torch.rand(1, 1, side, side + 1, side + 2)).shape[2:] == (1, 1, 1)
    with pytest.raises(InputError, match=rf"at least {side} voxels"):
        models.build_model(name, (side + 5, side - 1, side + 5))


def test_state_dict_keys_and_shapes():
    shapes = {
        k: tuple(v.shape)
        for k, v in models.build_model("modelA24", PAPER_SHAPE).state_dict().items()
    }
    assert shapes["features.0.weight"] == (24, 1, 7, 7, 7)
    assert shapes["features.16.weight"] == (24, 24, 3, 3, 3)
    assert shapes["features.17.running_var"] == (24,)
    assert shapes["classifier.0.weight"] == (64, 864)
    assert shapes["classifier.3.bias"] == (2,)
    assert len(shapes) == 5 * (2 + 5) + 4


def test_layers():
    """Dropout 0.5, no ReLU in place, biases, and no padding."""
    model = models.build_model("modelC24", PAPER_SHAPE)
    kinds = [type(layer).__name__ for layer in model.features]
    assert kinds == ["Conv3d", "BatchNorm3d", "ReLU", "MaxPool3d"] * 4
    assert [layer.kernel_size for layer in model.features[3::4]] == [3, 2, 2, 2]
    assert not any(m.inplace for m in model.modules() if isinstance(m, torch.nn.ReLU))
    assert model.classifier[2].p == 0.5
    assert all(conv.bias is not None and conv.padding == (0, 0, 0) for conv in model.features[::4])


def test_unknown_name_lists_the_names():
    with pytest.raises(InputError, match=r"unknown model 'resnet'.*modelA24.*modelT16"):
        models.build_model("resnet", PAPER_SHAPE)


def test_too_small_volume_points_to_the_small_model():
    with pytest.raises(InputError, match=r"49×58×49 .*at least 110.*modelT8 takes 22"):
        models.build_model("modelA24", (49, 58, 49))


@pytest.mark.parametrize("index", [0, 4, 9])
def test_after_is_the_rest_of_the_network(index):
    model = models.build_model("modelT8", (22, 23, 24)).eval()
    volumes = torch.rand(2, 1, 22, 23, 24)
    with torch.no_grad():
        rest = model.after(index)(model.features[:index](volumes))
        assert torch.equal(rest, model(volumes))


@pytest.mark.parametrize(
    "name", ["modelA24", pytest.param("modelC24", marks=pytest.mark.slow), "modelT8"]
)
def test_pooling_before_the_relu_changes_no_bit_of_training(name):
    """Loss, gradients, statistics and weights of some steps are those of the layers in order."""
    side = SMALLEST_SIDE[name[5]]
    shape = (side, side + 1, side + 4)
    volumes, labels = torch.rand(2, 1, *shape), torch.tensor([0, 1])
    found = []
    for in_order in (False, True):
        torch.manual_seed(0)
        model = models.build_model(name, shape).train()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            if in_order:
                logits = model.classifier(torch.flatten(model.features(volumes), 1))
            else:
                logits = model(volumes)
            losses.append(torch.nn.functional.cross_entropy(logits, labels))
            losses[-1].backward()
            optimizer.step()
        gradients = [parameter.grad for parameter in model.parameters()]
        found.append([*losses, *gradients, *model.state_dict().values()])
    assert all(torch.equal(ours, plain) for ours, plain in zip(*found, strict=True))
    assert losses[0] != losses[-1] and any(gradient.any() for gradient in gradients)


def test_in_eval_mode_the_layers_run_in_order():
    """captum's hooks see what they always saw."""
    model, seen = models.build_model("modelT8", (22, 23, 24)), []
    for layer in model.features:
        layer.register_forward_hook(lambda layer, *_: seen.append(layer))
    model.eval()(torch.rand(1, 1, 22, 23, 24))
    assert seen == list(model.features)


MEASURED_GB = {  # reserved by torch on an H200, 5 scans a step, docs/performance.md; by width
    "A": (20.2, 23.4, 27.2, 30.4, 33.7, 36.9, 40.1, 45.0),
    "B": (21.0, 24.8, 28.9, 32.3, 35.8, 39.2, 42.7, 37.3),
    "C": (13.1, 20.2, 22.9, 26.0, 28.8, 31.5, 34.3, 43.4),
    "D": (17.1, 19.6, 29.9, 25.0, 28.0, 30.5, 33.2, 36.1),
}


@pytest.mark.parametrize("room_gb", [12, 16, 24, 32, 40, 48, 80])
def test_what_is_said_to_fit_did_fit(room_gb):
    """By the memory measured, with the 0.65 GB of a process; and little that fits is left out."""
    said = models.that_fit((193, 229, 193), 5, room_gb)
    widest = dict(re.findall(r"model([A-D])24(?: to (\d+))?", said))
    for family, measured in MEASURED_GB.items():
        of_width = dict(zip(models.PUBLISHED_WIDTHS, measured, strict=True))
        widths = [w for w in of_width if family in widest and w <= int(widest[family] or 24)]
        assert all(of_width[width] + 0.65 <= room_gb for width in widths)
    assert "modelA24 to 52, modelB24 to 52" in models.that_fit((193, 229, 193), 5, 56)


def test_what_is_too_small_or_too_large_does_not_fit():
    said = models.that_fit((106, 107, 109), 1, 1000)
    assert said == "modelB24 to 52, modelD24 to 52, modelT8 to 16"
    assert models.that_fit((193, 229, 193), 50, 10) == "none"
