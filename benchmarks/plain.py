"""The plain ways: what the fast ones are measured against and must equal, on captum as it comes."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from captum.attr import LRP, GuidedGradCam, IntegratedGradients, Saliency
from captum.attr._utils.lrp_rules import PropagationRule
from torch import Tensor, nn
from torch.nn import functional

from attribution.smoothgrad import NOISE, noisy

STABILIZER = 1e-6


class _Substitute(torch.autograd.Function):
    """Hand outputs on; on the way back call a function of (inputs, gradient)."""

    @staticmethod
    def forward(ctx, inputs, outputs, propagate):
        ctx.save_for_backward(inputs)
        ctx.propagate = propagate
        return outputs.clone()

    @staticmethod
    def backward(ctx, gradient):
        return ctx.propagate(ctx.saved_tensors[0], gradient), None, None


class _PlainRule(PropagationRule):
    """A rule given as a function of a layer, its inputs and its outputs' relevance."""

    def __init__(self, propagate: Callable):
        self.propagate = propagate

    def _manipulate_weights(self, module, inputs, outputs):
        """Leave the weights as they are."""

    def forward_hook(self, module, inputs, outputs):
        """Put the rule in the layer's place."""
        return _Substitute.apply(
            inputs[0],
            outputs.detach(),
            lambda values, gradient: self.propagate(module, values, gradient),
        )


class _WinnerRule(_PlainRule):
    """Winner takes all: max-pooling's own gradient."""

    def forward_hook(self, module, inputs, outputs):
        """Leave the layer as it is."""


def _beta_rule(layer: nn.Module, inputs: Tensor, relevance: Tensor, beta: float) -> Tensor:
    """Return the inputs' relevance by the β-rule, written as in its definition."""

    def sums(values: Tensor, weight: Tensor) -> Tensor:
        if isinstance(layer, nn.Linear):
            return functional.linear(values, weight)
        return functional.conv3d(values, weight)

    def ratio(values: Tensor, denominator: Tensor) -> Tensor:
        stabilized = denominator + STABILIZER * torch.sign(denominator)
        return torch.where(denominator == 0, torch.zeros_like(values), values / stabilized)

    positive_weight, negative_weight = layer.weight.clamp(min=0), layer.weight.clamp(max=0)
    with torch.enable_grad():
        values = inputs.detach().requires_grad_()
        positive, negative = values.clamp(min=0), values.clamp(max=0)
        z_positive = sums(positive, positive_weight) + sums(negative, negative_weight)
        z_negative = sums(positive, negative_weight) + sums(negative, positive_weight)
    factor_positive = torch.where(z_negative == 0, 1.0, 1 + beta)
    factor_negative = torch.where(z_positive == 0, 1.0, -beta)
    shares = (
        ratio(factor_positive * relevance, z_positive.detach()),
        ratio(factor_negative * relevance, z_negative.detach()),
    )
    (gradient,) = torch.autograd.grad((z_positive, z_negative), values, shares)
    return inputs * gradient


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out captum's notes on what it sets for the time of a call."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Setting backward hooks on ReLU")
        warnings.filterwarnings("ignore", message="Input Tensor .* did not already require grad")
        yield


def lrp(model: nn.Module, volume: Tensor, target, beta: float = 0.5) -> Tensor:
    """captum's LRP in two passes, every layer's rule by the library's own kernels."""
    for module in model.modules():
        if isinstance(module, nn.Conv3d | nn.Linear):
            module.rule = _PlainRule(lambda *tensors: _beta_rule(*tensors, beta))
        elif isinstance(module, nn.BatchNorm3d):
            module.rule = _PlainRule(lambda layer, values, relevance: relevance)
        elif isinstance(module, nn.MaxPool3d):
            module.rule = _WinnerRule(None)
    with _quiet():
        return LRP(model).attribute(volume.clone(), target=target).detach()


def integrated_gradients(
    model: nn.Module, volume: Tensor, target, n_steps: int, batch_size: int = 1
) -> Tensor:
    """captum's integrated gradients, every step through the whole network."""
    options = {"n_steps": n_steps, "method": "riemann_middle", "internal_batch_size": batch_size}
    return IntegratedGradients(model).attribute(volume, 0, target=target, **options).detach()


def guided_gradcam(model: nn.Module, volume: Tensor, target) -> Tensor:
    """captum's guided Grad-CAM at the last convolution."""
    layer = [module for module in model.modules() if isinstance(module, nn.Conv3d)][-1]
    with _quiet():
        method = GuidedGradCam(model, layer)
        options = {"target": target, "interpolate_mode": "trilinear"}
        return method.attribute(volume.clone(), **options).detach()


def smoothgrad(model: nn.Module, volume: Tensor, target, n_samples: int) -> Tensor:
    """captum's saliency of copies with the same noise as in ours, one copy at a time."""
    saliency, total = Saliency(model), torch.zeros_like(volume)
    for sample in range(n_samples):
        copies = torch.stack([noisy(one, NOISE, 0, sample) for one in volume])
        with _quiet():
            total += saliency.attribute(copies, target, abs=False).detach()
    return total / n_samples * (volume != 0)


METHODS = {"LRP": lrp, "IG": integrated_gradients, "GGC": guided_gradcam, "SG": smoothgrad}
