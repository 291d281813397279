"""What holds for all methods: their refusals, their errors, and that nothing is left behind."""

import ast
import sys
from copy import deepcopy
from functools import partial
from pathlib import Path

import pytest
import torch
from networks import SPEC, TARGETS, assert_same_maps, make_network, make_volumes
from torch import nn

from attribution import METHODS, unmodified
from models import CNN3D, ModelSpec
from run_folder import device as devices

EXPLAINERS = METHODS | {"IG": partial(METHODS["IG"], n_steps=10)}  # fewer steps save seconds
PACKAGE = Path(unmodified.__file__).parent
all_methods = pytest.mark.parametrize("method", EXPLAINERS.values(), ids=EXPLAINERS)


@pytest.fixture
def model() -> CNN3D:
    return make_network(make_volumes())


# Each scan, each direction


@all_methods
def test_each_scan_is_explained_on_its_own(model, method):
    volumes = make_volumes()
    maps = method(model, volumes, TARGETS)
    assert maps.dtype == torch.float32
    alone = [
        method(model, volume[None], target)
        for volume, target in zip(volumes, TARGETS.tolist(), strict=True)
    ]
    assert_same_maps(maps, torch.cat(alone), 1e-4)


@pytest.mark.parametrize("axis", [2, 3, 4])
@pytest.mark.parametrize(("name", "pooling"), [("LRP", 2), ("IG", 1), ("GGC", 2)])
def test_flipped_kernels_and_volume_flip_the_map(name, pooling, axis):
    """IG without pooling: in its first step, at volume 0, the first voxel of each window wins."""
    spec, volumes = ModelSpec((3, 2), (pooling, pooling), 3), make_volumes()
    model = make_network(volumes, spec)
    maps = EXPLAINERS[name](model, volumes, TARGETS)
    with torch.no_grad():
        for convolution in (model.features[0], model.features[4]):
            convolution.weight.copy_(convolution.weight.flip(axis))
        to_hidden = model.classifier[0].weight
        grid = to_hidden.reshape(-1, spec.width, *map(spec.side_after, volumes.shape[2:]))
        to_hidden.copy_(grid.flip(axis).flatten(1))
    assert_same_maps(EXPLAINERS[name](model, volumes.flip(axis), TARGETS), maps.flip(axis), 1e-4)


# The model is left as it was


def snapshot(model: nn.Module) -> dict:
    """Return all that an attribution could leave on a model, ready to be compared by ==."""
    return {
        "weights": {name: t.numpy().tobytes() for name, t in model.state_dict().items()},
        "parameters": [(id(p), p.requires_grad, p.grad) for p in model.parameters()],
        "training": [module.training for module in model.modules()],
        "attributes": [set(vars(module)) for module in model.modules()],
        "hooks": [
            {name: list(hooks) for name, hooks in vars(module).items() if name.endswith("hooks")}
            for module in model.modules()
        ],
    }


def set_mixed_state(model: CNN3D) -> None:
    """Put one layer in eval mode, all others in train mode; freeze one parameter; add a hook."""
    model.train()
    model.features[1].eval()
    model.features[0].weight.requires_grad_(False)
    model.features[3].register_forward_hook(lambda module, inputs, outputs: None)


@all_methods
@pytest.mark.filterwarnings("error")
def test_nothing_is_left_behind(model, method):
    """Nor does the model's mode matter, nor is there a warning."""
    volumes = make_volumes()
    volumes_before = volumes.clone()
    in_eval_mode = method(deepcopy(model), volumes, TARGETS)
    set_mixed_state(model)
    before = snapshot(model)

    maps = method(model, volumes, TARGETS)

    assert snapshot(model) == before
    assert_same_maps(maps, in_eval_mode, 1e-6)
    assert torch.equal(volumes, volumes_before)
    assert not volumes.requires_grad and volumes.grad is None
    assert not maps.requires_grad


class Midway(Exception):
    """Raised inside the model in the middle of an attribution."""


@all_methods
@pytest.mark.parametrize("stage", ["first pass", "last pass", "backward"])
@pytest.mark.filterwarnings("error")
def test_nothing_is_left_behind_after_an_error(model, method, stage):
    passes, failing = [], set()

    def fail(*_):
        raise Midway

    def fail_at_stage(module, inputs):
        passes.append(inputs)
        if "backward" in failing and inputs[0].requires_grad:
            inputs[0].register_hook(fail)
        if len(passes) in failing:
            fail()

    set_mixed_state(model)
    model.classifier[0].register_forward_pre_hook(fail_at_stage)
    before = snapshot(model)
    method(model, make_volumes(), TARGETS)
    failing.add({"first pass": 1, "last pass": len(passes)}.get(stage, stage))
    passes.clear()
    with pytest.raises(Midway):
        method(model, make_volumes(), TARGETS)
    assert snapshot(model) == before


@all_methods
def test_maps_are_made_in_exact_float32(model, method):
    """Also where training rounds to TF32, which stays as it was."""
    kernels = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    during = []
    model.features[0].register_forward_hook(
        lambda *_: during.extend(each.fp32_precision for each in kernels)
    )
    devices.set_precision("tf32")
    try:
        method(model, make_volumes(), TARGETS)
        assert [each.fp32_precision for each in kernels] == ["tf32", "tf32"]
    finally:
        devices.set_precision("fp32")
    assert set(during) <= {"ieee"}


# Numbers that are not finite


@all_methods
@pytest.mark.parametrize("layer", ["features.0", "features.4", "features.5", "classifier.3"])
def test_nan_weights_are_an_error(model, method, layer):
    with torch.no_grad():
        model.get_submodule(layer).weight[1] = torch.nan
    before = snapshot(model)
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        method(model, make_volumes(), 0)
    assert snapshot(model) == before


@all_methods
def test_nan_logit_of_the_other_class_is_an_error(model, method):
    """The map of class 0 itself is finite."""
    with torch.no_grad():
        model.classifier[3].bias[1] = torch.nan
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        method(model, make_volumes(), 0)


@pytest.mark.parametrize("name", ["IG", "GGC"])
def test_overflow_of_the_map_alone_is_an_error(model, name):
    """The logits are finite: only the gradient multiplies both large weights."""
    volumes = make_volumes() * 1e-25
    with torch.no_grad():
        model.features[0].weight.mul_(1e25)
        model.classifier[3].weight.mul_(1e20)
        assert model(volumes).isfinite().all()
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        EXPLAINERS[name](model, volumes, TARGETS)


# Networks of another kind


class OtherForward(CNN3D):
    """Its logits are not those of its layers in a row, which `after` still takes them for."""

    def forward(self, volumes: torch.Tensor) -> torch.Tensor:
        return super().forward(volumes / volumes.amax())


class BothOverridden(OtherForward):
    """Says itself what follows a feature."""

    def forward(self, volumes: torch.Tensor) -> torch.Tensor:
        return self.after(0)(volumes)

    def after(self, index: int) -> nn.Sequential:
        return super().after(index)


class OwnConvolution(nn.Conv3d):
    """A layer that may do anything."""


LAYERS = {  # name of the layer, and what a plain one is replaced with
    "stride": ("features.0", nn.Conv3d(1, 3, 3, stride=2)),
    "dilation": ("features.0", nn.Conv3d(1, 3, 3, dilation=2)),
    "padding": ("features.4", nn.Conv3d(3, 3, 2, padding=1)),
    "padding by name": ("features.4", nn.Conv3d(3, 3, 3, padding="same")),
    "groups": ("features.4", nn.Conv3d(3, 3, 2, groups=3)),
    "two input channels": ("features.0", nn.Conv3d(2, 3, 3)),
    "own convolution": ("features.0", OwnConvolution(1, 3, 3)),
    "no statistics": ("features.1", nn.BatchNorm3d(3, track_running_stats=False)),
    "no scale": ("features.5", nn.BatchNorm3d(3, affine=False)),
    "no batch norm": ("features.1", nn.Identity()),
    "other norm": ("features.1", nn.InstanceNorm3d(3)),
    "other activation": ("features.6", nn.ELU()),
    "padded pooling": ("features.3", nn.MaxPool3d(2, padding=1)),
    "overlapping pooling": ("features.3", nn.MaxPool3d(2, stride=1)),
    "pooling over the edge": ("features.7", nn.MaxPool3d(2, ceil_mode=True)),
    "dilated pooling": ("features.3", nn.MaxPool3d(2, dilation=2)),
    "flat pooling": ("features.3", nn.MaxPool3d((2, 1, 2))),
    "average pooling": ("features.3", nn.AvgPool3d(2)),
    "activation of the classifier": ("classifier.1", nn.GELU()),
    "softmax": ("classifier.3", nn.Softmax(1)),
    "layers in a layer": ("classifier.0", nn.Sequential(nn.Linear(18, 64))),
}


@pytest.mark.parametrize("change", LAYERS)
def test_layers_of_another_kind_are_refused(model, change):
    name, layer = LAYERS[change]
    model.set_submodule(name, layer)
    with pytest.raises(TypeError, match=rf"{name} is no .*{type(layer).__name__}\("):
        unmodified.check_network(model)


def other_network(model: CNN3D, change: str) -> nn.Module:
    """Return the network with its layers put together in another way."""
    if change == "other names":
        return nn.Sequential(model.features, nn.Flatten(), model.classifier)
    if change == "another forward of the instance":
        model.forward = lambda x: model.classifier(2 * torch.flatten(model.features(x), 1))
    elif change == "another forward of the class":
        model = make_network(make_volumes(), kind=OtherForward)
    elif change == "blocks in blocks":
        model.features = nn.Sequential(model.features[:4], model.features[4:])
    elif change == "half a block":
        model.features = nn.Sequential(*model.features, nn.Conv3d(3, 3, 1), nn.BatchNorm3d(3))
    elif change == "no blocks":
        model.features = nn.Sequential()
    elif change == "one layer as the classifier":
        model.classifier = nn.Linear(3, 2)
    elif change == "another kind of row":
        model.classifier = type("Row", (nn.Sequential,), {})(*model.classifier)
    return model


@pytest.mark.parametrize(
    "change",
    ["other names", "another forward of the instance", "another forward of the class",
     "blocks in blocks", "half a block", "no blocks",
     "one layer as the classifier", "another kind of row"],
)  # fmt: skip
def test_networks_of_another_kind_are_refused(model, change):
    with pytest.raises(TypeError, match="has no features, classifier and after"):
        unmodified.check_network(other_network(model, change))


@pytest.mark.parametrize("kind", [CNN3D, BothOverridden, type("Subclass", (CNN3D,), {})])
def test_networks_of_this_kind_are_taken(kind):
    unmodified.check_network(kind(SPEC, (8, 12, 16)))


@all_methods
def test_a_refused_network_is_left_as_it_was(model, method):
    model.classifier[1] = nn.GELU()
    set_mixed_state(model)
    before = snapshot(model)
    with pytest.raises(TypeError, match="GELU"):
        method(model, make_volumes(), TARGETS)
    assert snapshot(model) == before


# The package


def test_the_package_imports_nothing_of_the_suite():
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in getattr(node, "names", [])]
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0
                names = [node.module]
            if isinstance(node, ast.Import | ast.ImportFrom):
                rooms = {name.split(".")[0] for name in names}
                assert rooms <= {
                    "torch",
                    "numpy",
                    "captum",
                    "attribution",
                    *sys.stdlib_module_names,
                }
