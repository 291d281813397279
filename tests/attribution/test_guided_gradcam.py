"""Guided Grad-CAM against its definition."""

import torch
from networks import TARGETS, assert_same_maps, make_network, make_volumes
from torch import Tensor, nn
from torch.nn import functional

from attribution import guided_gradcam
from models import CNN3D, MODELS

SHAPE = (24, 27, 23)


class GuidedReLU(torch.autograd.Function):
    """ReLU whose backward pass also drops negative gradients."""

    @staticmethod
    def forward(ctx, inputs):
        ctx.save_for_backward(inputs)
        return inputs.clamp(min=0)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clamp(min=0) * (ctx.saved_tensors[0] > 0)


def guided_backpropagation(model: CNN3D, volumes: Tensor, targets: Tensor) -> Tensor:
    values = inputs = volumes.clone().requires_grad_()
    for layer in [*model.features, nn.Flatten(), *model.classifier]:
        values = GuidedReLU.apply(values) if isinstance(layer, nn.ReLU) else layer(values)
    return torch.autograd.grad(values.gather(1, targets[:, None]).sum(), inputs)[0]


def gradcam_at(model: CNN3D, index: int, volumes: Tensor, targets: Tensor) -> Tensor:
    """Return Grad-CAM at the output of features[index], on that layer's grid."""
    activations = model.features[: index + 1](volumes).detach().requires_grad_()
    logits = model.classifier(model.features[index + 1 :](activations).flatten(1))
    (gradients,) = torch.autograd.grad(logits.gather(1, targets[:, None]).sum(), activations)
    weights = gradients.mean((2, 3, 4), keepdim=True)
    return (weights * activations).sum(1, keepdim=True).clamp(min=0).detach()


def test_ggc_against_definition():
    volumes = make_volumes(SHAPE)
    model, volumes = make_network(volumes, MODELS["modelT8"]).double(), volumes.double()
    cam = gradcam_at(model, 8, volumes, TARGETS)  # the last convolution is features[8]
    assert (cam == 0).any() and (cam > 0).any()
    upsampled = functional.interpolate(cam, SHAPE, mode="trilinear", align_corners=False)
    expected = upsampled * guided_backpropagation(model, volumes, TARGETS)
    assert_same_maps(guided_gradcam(model, volumes, TARGETS), expected, 1e-9)
