"""LRP, IG and guided Grad-CAM: hand-set networks, slow twins, invariants, nothing left behind."""

from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from attribution import METHODS, guided_gradcam, integrated_gradients, lrp
from models import CNN3D, ModelSpec, build_model

SHAPE = (24, 27, 23)  # voxels; three different sides: equal ones hide swapped axes
SMALL_SHAPE = (8, 12, 16)  # the poolings of SMALL_SPEC divide it without a rest
SMALL_SPEC = ModelSpec(kernels=(3, 2), poolings=(2, 2), width=3)
TARGETS = torch.tensor([1, 0, 1])
STABILIZER = 1e-6
MODEL_SEED = 33  # no map is empty and f(x) differs clearly from f(0)

EXPLAINERS = METHODS | {"IG": partial(METHODS["IG"], n_steps=10)}  # fewer steps save seconds
all_methods = pytest.mark.parametrize("method", EXPLAINERS.values(), ids=EXPLAINERS)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads that wait for each other cost more than volumes this small."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


def run_layer(layer: nn.Module, values: torch.Tensor) -> torch.Tensor:
    """Run one layer; a linear one is given its inputs flattened."""
    return layer(values.flatten(1) if isinstance(layer, nn.Linear) else values)


class FlatteningSequential(nn.Sequential):
    """Layers in a row; each linear layer is given its inputs flattened."""

    def forward(self, values):
        for layer in self:
            values = run_layer(layer, values)
        return values


def make_linear(weight: list[list[float]], bias: list[float]) -> nn.Linear:
    """Return a float64 linear layer with these weights."""
    layer = nn.Linear(len(weight[0]), len(weight)).double()
    state = {"weight": np.array(weight), "bias": np.array(bias)}
    layer.load_state_dict({name: torch.from_numpy(values) for name, values in state.items()})
    return layer


def make_volumes(shape: tuple, lowest: float = 0.1, n_scans: int = len(TARGETS)) -> torch.Tensor:
    """Return random volumes with values from `lowest` to 1, shape (N, 1, D, H, W), float32."""
    uniform = torch.rand(n_scans, 1, *shape, generator=torch.Generator().manual_seed(2))
    return lowest + (1 - lowest) * uniform


def like_trained(model: CNN3D, volumes: torch.Tensor) -> CNN3D:
    """Give the batch norms the volumes' statistics and weights of either sign; set eval mode."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm3d):
            layer.momentum = 1.0
            nn.init.normal_(layer.weight)
            nn.init.normal_(layer.bias)
    with torch.no_grad():
        model.train()(volumes)
    return model.eval()


@pytest.fixture
def small_model() -> CNN3D:
    torch.manual_seed(MODEL_SEED)
    return like_trained(CNN3D(SMALL_SPEC, SMALL_SHAPE), make_volumes(SMALL_SHAPE))


@pytest.fixture
def demo_model() -> CNN3D:
    torch.manual_seed(MODEL_SEED)
    return like_trained(build_model("modelT8", SHAPE), make_volumes(SHAPE))


def target_logits(model: nn.Module, volumes: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return model(volumes).gather(1, targets[:, None])[:, 0]


def assert_same_maps(maps: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Each map differs from the expected one by at most tolerance times the latter's maximum."""
    assert maps.shape == expected.shape
    largest = expected.abs().amax((1, 2, 3, 4), keepdim=True)
    assert (largest > 0).all(), "an empty map shows nothing"
    assert ((maps - expected).abs() <= tolerance * largest).all()


# LRP


def test_lrp_by_hand():
    """β = 1/2; the neurons have both kinds of input, only one kind, or none (their bias apart)."""
    hidden = make_linear(
        [[2.0, -1.0, 1.0], [1.0, 1.0, 3.0], [-1.0, -1.0, 0.0], [0.0, 0.0, 0.0]],
        [1.0, -2.0, 5.0, 3.0],
    )
    output = make_linear([[2.0, 1.0, -1.0, 1.0], [-1.0, 0.0, -2.0, 0.0]], [2.0, 0.0])
    model = FlatteningSequential(hidden, nn.ReLU(), nn.Dropout(), output).eval()
    volumes = torch.tensor([1.0, 2.0, 3.0]).double().expand(2, 1, 1, 1, 3)

    maps = lrp(model, volumes, torch.tensor([0, 1]), beta=0.5)

    # z of the hidden neurons: (2, −2, 3), (1, 2, 9), (−1, −2, 0), none; their outputs: 4, 10, 2, 3
    # class 0: z = (8, 10, −2, 3), logit 21, so R = 3/2·(8, 10, 0, 3) − 1/2·(0, 0, 21, 0)
    # class 1: z = (−4, 0, −4, 0), logit −8, so R = (−4, 0, −4, 0): only one kind, weight 1
    both_kinds = np.array([3 / 2 * 2 / 5, -1 / 2, 3 / 2 * 3 / 5])
    only_positive = np.array([1 / 12, 2 / 12, 9 / 12])
    only_negative = np.array([1 / 3, 2 / 3, 0])
    class_0 = 12 * both_kinds + 15 * only_positive - 21 / 2 * only_negative  # 9/2 is dropped
    class_1 = -4 * both_kinds - 4 * only_negative
    np.testing.assert_allclose(class_0, [4.95, -10.5, 22.05])
    np.testing.assert_allclose(maps[:, 0, 0, 0], [class_0, class_1], rtol=2 * STABILIZER)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_lrp_stabilizer_has_the_sign_of_the_denominator(sign):
    """With z = ±1e-6 half of the relevance, the logit 4, is left."""
    model = FlatteningSequential(make_linear([[sign * STABILIZER]], [4 - sign * STABILIZER]))
    volume = torch.ones(1, 1, 1, 1, 1).double()
    assert lrp(model, volume, 0).item() == pytest.approx(2, rel=1e-9)


def test_lrp_winner_takes_all_and_batch_norm_is_identity():
    norm = nn.BatchNorm3d(1).double()
    norm.running_mean.fill_(1.0)
    nn.init.constant_(norm.weight, -2.0)  # the smallest voxel of a window wins
    norm.eps, norm.running_var[0] = 0.0, 4.0  # outputs 1 − x
    model = FlatteningSequential(norm, nn.MaxPool3d(2), make_linear([[2.0, 1.0]], [0.0]))
    volume = torch.tensor(
        [[[7.0, 5.0, 9.0, 4.0], [6.0, 8.0, 3.0, 5.0]], [[4.0, 6.0, 7.0, 8.0], [5.0, 9.0, 6.0, 4.0]]]
    ).double()

    relevance = lrp(model.eval(), volume[None, None], 0)[0, 0]

    expected = torch.zeros(2, 2, 4).double()
    expected[1, 0, 0], expected[0, 1, 2] = -6, -2  # (1 − 4)·2 and (1 − 3)·1
    torch.testing.assert_close(relevance, expected, rtol=2 * STABILIZER, atol=0)


def slow_beta_rule(
    matrix: np.ndarray, inputs: np.ndarray, relevance: np.ndarray, beta: float
) -> np.ndarray:
    """Send back the relevance of each neuron j in turn; the matrix holds w_ij in row j."""
    result = np.zeros_like(inputs)
    for weights, relevance_j in zip(matrix, relevance, strict=True):
        z = inputs * weights
        positive, negative = np.maximum(z, 0), np.minimum(z, 0)
        z_positive, z_negative = positive.sum(), negative.sum()
        if z_positive > 0:
            factor = 1 + beta if z_negative < 0 else 1
            result += factor * positive / (z_positive + STABILIZER) * relevance_j
        if z_negative < 0:
            factor = -beta if z_positive > 0 else 1
            result += factor * negative / (z_negative - STABILIZER) * relevance_j
    return result


def slow_winner_takes_all(side: int, inputs: np.ndarray, relevance: np.ndarray) -> np.ndarray:
    """Send back the relevance of each pooling window in turn; arrays are (C, D, H, W)."""
    result = np.zeros_like(inputs)
    for channel, *corner in np.ndindex(relevance.shape):
        window = (channel, *(slice(side * place, side * (place + 1)) for place in corner))
        is_winner = inputs[window] == inputs[window].max()
        result[window] = is_winner * relevance[channel, *corner] / is_winner.sum()
    return result


def slow_lrp(model: CNN3D, volume: torch.Tensor, target: int, beta: float) -> np.ndarray:
    """LRP of one volume, shape (1, D, H, W), with every layer as a dense matrix or a loop."""
    values, passed = volume, []
    for layer in [*model.features, *model.classifier]:
        passed.append((layer, values))
        values = run_layer(layer, values[None])[0]
    relevance = np.zeros(2)
    relevance[target] = values[target]
    for layer, inputs in reversed(passed):
        if isinstance(layer, nn.Conv3d | nn.Linear):
            unit_inputs = torch.eye(inputs.numel()).to(inputs).reshape(-1, *inputs.shape)
            biases = run_layer(layer, torch.zeros_like(unit_inputs[:1]))
            matrix = (run_layer(layer, unit_inputs) - biases).flatten(1).T.numpy()
            relevance = slow_beta_rule(matrix, inputs.flatten().numpy(), relevance.ravel(), beta)
        elif isinstance(layer, nn.MaxPool3d):
            relevance = slow_winner_takes_all(layer.kernel_size, inputs.numpy(), relevance)
        relevance = relevance.reshape(inputs.shape)
    return relevance


@pytest.mark.parametrize("lowest", [0.1, -1.0], ids=["positive", "mixed"])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_lrp_against_slow_twin(small_model, beta, lowest):
    volumes, targets = make_volumes(SMALL_SHAPE, lowest, n_scans=2), TARGETS[:2]
    volumes[..., :4] = 0  # a background: neurons with one kind of input or none
    in_float32 = lrp(small_model, volumes, targets, beta)
    small_model, volumes = small_model.double(), volumes.double()
    with torch.no_grad():
        slow = [
            slow_lrp(small_model, volume, target, beta)
            for volume, target in zip(volumes, targets.tolist(), strict=True)
        ]
    expected = torch.from_numpy(np.stack(slow))
    assert_same_maps(lrp(small_model, volumes, targets, beta), expected, 1e-9)
    assert_same_maps(in_float32, expected, 1e-4)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_lrp_sums_to_the_logit(demo_model, beta):
    volumes = make_volumes(SHAPE)
    logits = target_logits(demo_model, volumes, TARGETS)
    sums = lrp(demo_model, volumes, TARGETS, beta).sum((1, 2, 3, 4))
    torch.testing.assert_close(sums, logits, rtol=0.01, atol=0)


# Integrated gradients


def slow_integrated_gradients(
    model: CNN3D, volume: torch.Tensor, target: int, n_steps: int
) -> torch.Tensor:
    """IG of one volume, shape (1, D, H, W), one step at a time."""
    total = torch.zeros_like(volume)
    for step in range(n_steps):
        point = (step / n_steps * volume).requires_grad_()
        total += torch.autograd.grad(model(point[None])[0, target], point)[0]
    return volume * total / n_steps


@pytest.mark.parametrize("n_steps", [2, 7])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_ig_against_plain_loop(small_model, n_steps, batch_size):
    small_model, volumes = small_model.double(), make_volumes(SMALL_SHAPE, -0.2).double()
    expected = torch.stack(
        [
            slow_integrated_gradients(small_model, volume, target, n_steps)
            for volume, target in zip(volumes, TARGETS.tolist(), strict=True)
        ]
    )
    maps = integrated_gradients(small_model, volumes, TARGETS, n_steps, batch_size)
    assert_same_maps(maps, expected, 1e-7)  # captum holds 1/n in float32


def test_ig_is_complete(small_model):
    volumes = make_volumes(SMALL_SHAPE)
    with torch.no_grad():
        logits = target_logits(small_model, volumes, TARGETS)
        difference = logits - target_logits(small_model, torch.zeros_like(volumes), TARGETS)
    errors = []
    for n_steps in (3, 30, 300):
        maps = integrated_gradients(small_model, volumes, TARGETS, n_steps, batch_size=50)
        errors.append((maps.sum((1, 2, 3, 4)) / difference - 1).abs().max().item())
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.02


# Guided Grad-CAM


class GuidedReLU(torch.autograd.Function):
    """ReLU whose backward pass also drops negative gradients."""

    @staticmethod
    def forward(ctx, inputs):
        ctx.save_for_backward(inputs)
        return inputs.clamp(min=0)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clamp(min=0) * (ctx.saved_tensors[0] > 0)


def guided_backpropagation(model: CNN3D, volumes, targets) -> torch.Tensor:
    values = inputs = volumes.clone().requires_grad_()
    for layer in [*model.features, nn.Flatten(), *model.classifier]:
        values = GuidedReLU.apply(values) if isinstance(layer, nn.ReLU) else layer(values)
    return torch.autograd.grad(values.gather(1, targets[:, None]).sum(), inputs)[0]


def gradcam_at(model: CNN3D, index: int, volumes, targets) -> torch.Tensor:
    """Return Grad-CAM at the output of features[index], on that layer's grid."""
    activations = model.features[: index + 1](volumes).detach().requires_grad_()
    logits = model.classifier(model.features[index + 1 :](activations).flatten(1))
    (gradients,) = torch.autograd.grad(logits.gather(1, targets[:, None]).sum(), activations)
    weights = gradients.mean((2, 3, 4), keepdim=True)
    return (weights * activations).sum(1, keepdim=True).clamp(min=0).detach()


def test_ggc_against_definition(demo_model):
    demo_model, volumes = demo_model.double(), make_volumes(SHAPE).double()
    cam = gradcam_at(demo_model, 8, volumes, TARGETS)  # the last convolution is features[8]
    assert (cam == 0).any() and (cam > 0).any()
    upsampled = functional.interpolate(cam, SHAPE, mode="trilinear", align_corners=False)
    expected = upsampled * guided_backpropagation(demo_model, volumes, TARGETS)
    assert_same_maps(guided_gradcam(demo_model, volumes, TARGETS), expected, 1e-9)


# What holds for all methods


@all_methods
def test_each_scan_is_explained_on_its_own(small_model, method):
    volumes = make_volumes(SMALL_SHAPE)
    maps = method(small_model, volumes, TARGETS)
    assert maps.dtype == torch.float32
    alone = [
        method(small_model, volume[None], target)
        for volume, target in zip(volumes, TARGETS.tolist(), strict=True)
    ]
    assert_same_maps(maps, torch.cat(alone), 1e-4)


@pytest.mark.parametrize("axis", [2, 3, 4])
@pytest.mark.parametrize(("name", "pooling"), [("LRP", 2), ("IG", 1), ("GGC", 2)])
def test_flipped_kernels_and_volume_flip_the_map(name, pooling, axis):
    """IG without pooling: in its first step, at volume 0, the first voxel of each window wins."""
    torch.manual_seed(MODEL_SEED)
    spec, volumes = ModelSpec((3, 2), (pooling, pooling), 3), make_volumes(SMALL_SHAPE)
    model = like_trained(CNN3D(spec, SMALL_SHAPE), volumes)
    maps = EXPLAINERS[name](model, volumes, TARGETS)
    with torch.no_grad():
        for convolution in (model.features[0], model.features[4]):
            convolution.weight.copy_(convolution.weight.flip(axis))
        to_hidden = model.classifier[0].weight
        grid = to_hidden.reshape(-1, spec.width, *map(spec.side_after, SMALL_SHAPE))
        to_hidden.copy_(grid.flip(axis).flatten(1))
    assert_same_maps(EXPLAINERS[name](model, volumes.flip(axis), TARGETS), maps.flip(axis), 1e-4)


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
def test_nothing_is_left_behind(small_model, method):
    """Nor does the model's mode matter, nor is there a warning."""
    volumes = make_volumes(SMALL_SHAPE)
    volumes_before = volumes.clone()
    in_eval_mode = method(deepcopy(small_model), volumes, TARGETS)
    set_mixed_state(small_model)
    before = snapshot(small_model)

    maps = method(small_model, volumes, TARGETS)

    assert snapshot(small_model) == before
    assert_same_maps(maps, in_eval_mode, 1e-6)
    assert torch.equal(volumes, volumes_before)
    assert not volumes.requires_grad and volumes.grad is None
    assert not maps.requires_grad


class Midway(Exception):
    """Raised inside the model in the middle of an attribution."""


@all_methods
@pytest.mark.parametrize("stage", ["first pass", "last pass", "backward"])
def test_nothing_is_left_behind_after_an_error(small_model, method, stage):
    passes, failing = [], set()

    def fail(*_):
        raise Midway

    def fail_at_stage(module, inputs):
        passes.append(inputs)
        if "backward" in failing and inputs[0].requires_grad:
            inputs[0].register_hook(fail)
        if len(passes) in failing:
            fail()

    set_mixed_state(small_model)
    small_model.classifier[0].register_forward_pre_hook(fail_at_stage)
    before = snapshot(small_model)
    method(small_model, make_volumes(SMALL_SHAPE), TARGETS)
    failing.add({"first pass": 1, "last pass": len(passes)}.get(stage, stage))
    passes.clear()
    with pytest.raises(Midway):
        method(small_model, make_volumes(SMALL_SHAPE), TARGETS)
    assert snapshot(small_model) == before


@all_methods
@pytest.mark.parametrize("layer", ["features.0", "features.4", "features.5", "classifier.3"])
def test_nan_is_traced_to_its_layer(small_model, method, layer):
    with torch.no_grad():
        small_model.get_submodule(layer).weight[1] = torch.nan
    before = snapshot(small_model)
    with pytest.raises(FloatingPointError, match=rf"\b{layer}\b"):
        method(small_model, make_volumes(SMALL_SHAPE), 0)
    assert snapshot(small_model) == before


@all_methods
def test_nan_logit_of_the_other_class_is_an_error(small_model, method):
    """The map of class 0 itself is finite."""
    with torch.no_grad():
        small_model.classifier[3].bias[1] = torch.nan
    with pytest.raises(FloatingPointError, match=r"\bclassifier\.3\b"):
        method(small_model, make_volumes(SMALL_SHAPE), 0)


@pytest.mark.parametrize("name", ["IG", "GGC"])
def test_overflow_of_the_map_alone_is_an_error(small_model, name):
    """The logits are finite: only the gradient multiplies both large weights."""
    volumes = make_volumes(SMALL_SHAPE) * 1e-25
    with torch.no_grad():
        small_model.features[0].weight.mul_(1e25)
        small_model.classifier[3].weight.mul_(1e20)
        assert small_model(volumes).isfinite().all()
    with pytest.raises(FloatingPointError, match=r"\bfeatures\.0\b.*backward"):
        EXPLAINERS[name](small_model, volumes, TARGETS)


def test_lrp_refuses_a_layer_without_a_rule(small_model):
    small_model.classifier[1] = nn.GELU()
    before = snapshot(small_model)
    with pytest.raises(TypeError, match="GELU"):
        lrp(small_model, make_volumes(SMALL_SHAPE), TARGETS)
    assert snapshot(small_model) == before
