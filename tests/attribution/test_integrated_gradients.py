"""Integrated gradients: the plain loop over the steps, and completeness."""

import pytest
import torch
from networks import TARGETS, assert_same_maps, make_network, make_volumes, target_logits

from attribution import integrated_gradients
from models import CNN3D, ModelSpec


def slow_integrated_gradients(model: CNN3D, volumes: torch.Tensor, n_steps: int) -> torch.Tensor:
    """IG of volumes by the midpoint rule, one step at a time."""
    total = torch.zeros_like(volumes)
    for step in range(n_steps):
        points = ((step + 0.5) / n_steps * volumes).requires_grad_()
        total += torch.autograd.grad(target_logits(model, points, TARGETS).sum(), points)[0]
    return volumes * total / n_steps


@pytest.mark.parametrize("n_steps", [2, 3, 7])
@pytest.mark.parametrize(("batch_size", "width"), [(1, 3), (3, 11), (16, 8)])
def test_ig_against_plain_loop(n_steps, batch_size, width):
    """Of 11 channels, the last three are a group of their own before the pooling."""
    model = make_network(make_volumes(), ModelSpec((3, 2), (2, 1), width)).double()
    volumes = make_volumes(lowest=-0.2).double()
    expected = slow_integrated_gradients(model, volumes, n_steps)
    maps = integrated_gradients(model, volumes, TARGETS, n_steps, batch_size)
    assert_same_maps(maps, expected, 1e-7)  # captum holds 1/n in float32


@pytest.mark.parametrize("batch_size", [2, 5])
def test_ig_batch_size_changes_nothing(batch_size):
    """Nor does it change how many steps there are."""
    volumes, model = make_volumes(), make_network(make_volumes())
    expected = integrated_gradients(model, volumes, TARGETS, 10)
    n_steps_a_pass = []
    model.classifier[0].register_forward_pre_hook(
        lambda _, inputs: n_steps_a_pass.append(len(inputs[0]))
    )
    maps = integrated_gradients(model, volumes, TARGETS, 10, batch_size)
    assert_same_maps(maps, expected, 1e-5)
    assert max(n_steps_a_pass) == batch_size
    assert sum(n_steps_a_pass) == 10 * len(volumes)


def test_ig_is_complete():
    volumes, model = make_volumes(), make_network(make_volumes())
    with torch.no_grad():
        logits = target_logits(model, volumes, TARGETS)
        difference = logits - target_logits(model, torch.zeros_like(volumes), TARGETS)
    errors = []
    for n_steps in (3, 30, 300):
        maps = integrated_gradients(model, volumes, TARGETS, n_steps, batch_size=50)
        errors.append((maps.sum((1, 2, 3, 4)) / difference - 1).abs().max().item())
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.02
