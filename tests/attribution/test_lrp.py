"""LRP: exact answers on hand-set networks, a slow twin, the sum of the relevance."""

import logging

import numpy as np
import pytest
import torch
from networks import (
    SHAPE,
    TARGETS,
    assert_same_maps,
    make_network,
    make_volumes,
    target_logits,
)
from torch import nn

from attribution import convolution, lrp
from models import CNN3D, MODELS, ModelSpec

STABILIZER = 1e-6
CONVOLVE = convolution.convolve


def make_linear(weight: list[list[float]], bias: list[float]) -> nn.Linear:
    """Return a float64 linear layer with these weights."""
    layer = nn.Linear(len(weight[0]), len(weight)).double()
    state = {"weight": np.array(weight), "bias": np.array(bias)}
    layer.load_state_dict({name: torch.from_numpy(values) for name, values in state.items()})
    return layer


def hand_set(*classifier: nn.Module, shape: tuple, pooling: int = 1) -> CNN3D:
    """Return a float64 network whose one block hands positive volumes on, pooled."""
    model = CNN3D(ModelSpec((1,), (pooling,), 1), shape).double()
    model.classifier = nn.Sequential(*classifier)
    nn.init.ones_(model.features[0].weight)
    nn.init.zeros_(model.features[0].bias)
    model.features[1].eps = 0.0
    return model.eval()


def test_lrp_by_hand():
    """β = 1/2; the neurons have both kinds of input, only one kind, or none (their bias apart)."""
    hidden = make_linear(
        [[2.0, -1.0, 1.0], [1.0, 1.0, 3.0], [-1.0, -1.0, 0.0], [0.0, 0.0, 0.0]],
        [1.0, -2.0, 5.0, 3.0],
    )
    output = make_linear([[2.0, 1.0, -1.0, 1.0], [-1.0, 0.0, -2.0, 0.0]], [2.0, 0.0])
    model = hand_set(hidden, nn.ReLU(), nn.Dropout(), output, shape=(1, 1, 3))
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
    np.testing.assert_allclose(maps[:, 0, 0, 0], [class_0, class_1], rtol=3 * STABILIZER)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_stabilizer_has_the_sign_of_the_denominator(sign):
    """With z = ±1e-6 half of the relevance, the logit 4, is left."""
    layer = make_linear([[sign * STABILIZER]], [4 - sign * STABILIZER])
    model = hand_set(layer, shape=(1, 1, 1))
    relevance = lrp(model, torch.ones(1, 1, 1, 1, 1).double(), 0)
    assert relevance.item() == pytest.approx(2, rel=2 * STABILIZER)


def test_winner_takes_all_and_batch_norm_is_identity():
    model = hand_set(make_linear([[2.0, 1.0]], [0.0]), shape=(2, 2, 4), pooling=2)
    norm = model.features[1]
    norm.running_mean.fill_(1.0)
    norm.running_var.fill_(4.0)
    nn.init.constant_(norm.weight, -2.0)  # outputs 10 − x: the smallest voxel of a window wins
    nn.init.constant_(norm.bias, 9.0)
    volume = torch.tensor(
        [[[7.0, 5.0, 9.0, 4.0], [6.0, 8.0, 3.0, 5.0]], [[4.0, 6.0, 7.0, 8.0], [5.0, 9.0, 6.0, 4.0]]]
    ).double()

    relevance = lrp(model, volume[None, None], 0)[0, 0]

    expected = torch.zeros(2, 2, 4).double()
    expected[1, 0, 0], expected[0, 1, 2] = 12, 7  # (10 − 4)·2 and (10 − 3)·1
    torch.testing.assert_close(relevance, expected, rtol=2 * STABILIZER, atol=0)


def run_layer(layer: nn.Module, values: torch.Tensor) -> torch.Tensor:
    """Run one layer; a linear one is given its inputs flattened."""
    return layer(values.flatten(1) if isinstance(layer, nn.Linear) else values)


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
def test_lrp_against_slow_twin(beta, lowest):
    volumes, targets = make_volumes(lowest=lowest, n_scans=2), TARGETS[:2]
    volumes[..., :4] = 0  # a background: neurons with one kind of input or none
    model = make_network(make_volumes())
    in_float32 = lrp(model, volumes, targets, beta)
    model, volumes = model.double(), volumes.double()
    with torch.no_grad():
        slow = [
            slow_lrp(model, volume, target, beta)
            for volume, target in zip(volumes, targets.tolist(), strict=True)
        ]
    expected = torch.from_numpy(np.stack(slow))
    assert_same_maps(lrp(model, volumes, targets, beta), expected, 1e-9)
    assert_same_maps(in_float32, expected, 1e-4)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_lrp_sums_to_the_logit(beta):
    volumes = make_volumes((24, 27, 23))
    model = make_network(volumes, MODELS["modelT8"])
    sums = lrp(model, volumes, TARGETS, beta).sum((1, 2, 3, 4))
    torch.testing.assert_close(sums, target_logits(model, volumes, TARGETS), rtol=0.01, atol=0)


@pytest.mark.parametrize("lowest", [0.1, -1.0], ids=["positive", "mixed"])
@pytest.mark.parametrize("slab_neurons", [1, 2**12])
def test_slabs_change_nothing(slab_neurons, lowest):
    """One plane at a time, or several, of which the last slab has fewer."""
    volumes = make_volumes((23, *SHAPE[1:]), lowest).double()
    model = make_network(volumes.float()).double()
    expected = lrp(model, volumes, TARGETS)
    assert_same_maps(lrp(model, volumes, TARGETS, slab_neurons=slab_neurons), expected, 1e-12)


def fft_convolve(inputs: torch.Tensor, weight: torch.Tensor, *args, **options) -> torch.Tensor:
    """Return a convolution by FFT, as cuDNN may choose it: zeros in, rounding out."""
    if args or options or not torch.backends.cudnn.enabled:
        return CONVOLVE(inputs, weight, *args, **options)
    sides = inputs.shape[2:]
    spectrum = torch.fft.rfftn(inputs, sides)[:, None] * torch.fft.rfftn(weight, sides).conj()
    sums = torch.fft.irfftn(spectrum.sum(2), sides)
    inner = [slice(n - k + 1) for n, k in zip(sides, weight.shape[2:], strict=True)]
    return sums[(..., *inner)]


def test_sums_that_round_zeros_are_found_and_avoided(monkeypatch, caplog):
    """Otherwise the rule would divide by their rounding."""
    caplog.set_level("INFO", "heatmaps")
    monkeypatch.setattr(logging.getLogger("heatmaps"), "propagate", True)
    volumes = make_volumes()
    kept = torch.rand(volumes.shape, generator=torch.Generator().manual_seed(0)) < 0.05
    model, volumes = make_network(volumes), volumes * kept  # most neurons see one kind, or none
    expected = lrp(model, volumes, TARGETS)
    monkeypatch.setattr(convolution, "convolve", fft_convolve)
    convolution._leaves_zeros.cache_clear()
    try:
        assert_same_maps(lrp(model, volumes, TARGETS), expected, 1e-5)
        assert "LRP sums without it" in caplog.text and torch.backends.cudnn.enabled
        monkeypatch.setattr(convolution, "_leaves_zeros", lambda device, shape: True)
        spoilt = lrp(model, volumes, TARGETS)
        assert abs(spoilt - expected).max() > 0.05 * abs(expected).max()
    finally:
        monkeypatch.undo()
        convolution._leaves_zeros.cache_clear()
