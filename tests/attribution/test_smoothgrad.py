"""SmoothGrad: the plain loop, captum's NoiseTunnel at equal noise, bits that no batch changes."""

import sys

import numpy as np
import pytest
import torch
from captum.attr import NoiseTunnel, Saliency
from networks import TARGETS, assert_same_maps, make_network, make_volumes, target_logits

from attribution import smoothgrad

N_SAMPLES, NOISE = 7, 0.3
SEEDS = [5, 6, 7]


def make_case() -> tuple:
    """Return a network and volumes with a margin of zeros, their range not 1."""
    volumes = 3 * make_volumes()
    volumes[:, :, :, :3] = 0
    return make_network(volumes), volumes


def draw_noise(volumes: torch.Tensor, sample: int) -> torch.Tensor:
    """Return the noise of one sample of all volumes, by its definition."""
    drawn = [np.random.default_rng((seed, sample)).standard_normal(volumes.shape[1:], np.float32)
             for seed in SEEDS]  # fmt: skip
    spans = volumes.amax((1, 2, 3, 4)) - volumes.amin((1, 2, 3, 4))
    return torch.from_numpy(np.array(drawn)) * NOISE * spans.view(-1, 1, 1, 1, 1) * (volumes != 0)


def test_sg_against_plain_loop():
    model, volumes = make_case()
    expected = torch.zeros_like(volumes)
    for sample in range(N_SAMPLES):
        copies = (volumes + draw_noise(volumes, sample)).requires_grad_()
        logits = target_logits(model, copies, TARGETS).sum()
        expected += torch.autograd.grad(logits, copies)[0] / N_SAMPLES
    assert expected[volumes == 0].any(), "the gradient is not 0 outside the head"
    maps = smoothgrad(model, volumes, TARGETS, N_SAMPLES, NOISE, SEEDS)
    assert not maps[volumes == 0].any()
    assert_same_maps(maps, expected * (volumes != 0), 1e-5)


def test_sg_against_noise_tunnel(monkeypatch):
    """captum draws its noise for all samples of a scan at once, by torch.normal."""
    model, volumes = make_case()

    def give_noise(mean, std):
        drawn = torch.stack([draw_noise(volumes, sample) for sample in range(N_SAMPLES)], 1)
        return drawn.flatten(0, 1).view_as(std)

    monkeypatch.setattr(torch, "normal", give_noise)
    tunnel = NoiseTunnel(Saliency(model))
    options = {"nt_type": "smoothgrad", "nt_samples": N_SAMPLES, "stdevs": NOISE, "abs": False}
    expected = tunnel.attribute(volumes.clone(), target=TARGETS, **options) * (volumes != 0)
    maps = smoothgrad(model, volumes, TARGETS, N_SAMPLES, NOISE, SEEDS)
    assert_same_maps(maps, expected, 1e-5)


def test_sg_has_the_same_bits_in_any_batch():
    model, volumes = make_case()
    together = smoothgrad(model, volumes, TARGETS, N_SAMPLES, NOISE, SEEDS)
    alone = [
        smoothgrad(
            model, volumes[i : i + 1], TARGETS[i : i + 1], N_SAMPLES, NOISE, SEEDS[i : i + 1]
        )
        for i in (2, 0, 1)
    ]
    assert torch.equal(together[[2, 0, 1]], torch.cat(alone))


def test_sg_without_noise_is_the_gradient():
    model, volumes = make_case()
    inputs = volumes.clone().requires_grad_()
    expected = torch.autograd.grad(target_logits(model, inputs, TARGETS).sum(), inputs)[0]
    maps = smoothgrad(model, volumes, TARGETS, 2, noise=0.0)
    assert_same_maps(maps, expected * (volumes != 0), 1e-5)


def test_sg_draws_by_its_seed():
    model, volumes = make_case()
    maps = [smoothgrad(model, volumes, TARGETS, 2, NOISE, seed) for seed in (1, 1, 2)]
    assert torch.equal(maps[0], maps[1])
    assert not torch.equal(maps[0], maps[2])


@pytest.mark.parametrize("n_at_once", [1, 3])
def test_sg_takes_copies_together(monkeypatch, n_at_once):
    """Also where their number does not divide that of the samples."""
    model, volumes = make_case()
    expected = smoothgrad(model, volumes, TARGETS, N_SAMPLES, NOISE, SEEDS)
    n_voxels = n_at_once * volumes[0].numel()
    monkeypatch.setattr(sys.modules[smoothgrad.__module__], "VOXELS_AT_ONCE", n_voxels)
    maps = smoothgrad(model, volumes, TARGETS, N_SAMPLES, NOISE, SEEDS)
    assert_same_maps(maps, expected, 1e-5)
