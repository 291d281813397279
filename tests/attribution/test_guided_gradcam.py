"""Guided Grad-CAM against its definition."""

import pytest
import torch
from networks import TARGETS, assert_same_maps, make_network, make_volumes
from torch import Tensor, nn
from torch.nn import functional

from attribution import guided_gradcam
from attribution.guided_gradcam import cell_centres, place_cells
from models import CNN3D, FAMILIES, MODELS, ModelSpec

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


@pytest.mark.parametrize(
    ("family", "expected"),
    [("A", (46.5, 16)), ("B", (38.5, 16)), ("C", (49.5, 12)), ("D", (43.0, 9)), ("T", (8.5, 4))],
)
def test_centres_of_cells(family, expected):
    kernels, poolings, _ = FAMILIES[family]
    model = CNN3D(ModelSpec(kernels, poolings, 1), (115, 115, 115))
    assert cell_centres(model.features[: len(model.features) - 3]) == expected


def test_cells_are_laid_where_they_see():
    """With positive weights a cell answers to the voxels around its centre, and to no others."""
    model = make_network(make_volumes(SHAPE), MODELS["modelT8"]).double()
    for layer in model.features:
        if isinstance(layer, nn.Conv3d):
            layer.weight.data.abs_()
            layer.bias.data.zero_()
        if isinstance(layer, nn.BatchNorm3d):
            layer.reset_running_stats()
            layer.weight.data.fill_(1)
            layer.bias.data.zero_()
    first, spacing = cell_centres(model.features[:9])
    cell = model.features[:9](torch.zeros(1, 1, *SHAPE).double())[0, 0].new_tensor([1, 0, 1])
    seen = []
    for axis in range(3):
        answers = []
        for place in range(SHAPE[axis]):
            volume = torch.zeros(1, 1, *SHAPE).double()
            centre = [round(first + spacing * float(i)) for i in cell]
            centre[axis] = place
            volume[(0, 0, *centre)] = 1
            answers.append(model.features[:9](volume)[(0, 0, *cell.int().tolist())] > 0)
        voxels = [place for place, answer in enumerate(answers) if answer]
        seen.append((voxels[0] + voxels[-1]) / 2)
    assert seen == [first + spacing * float(i) for i in cell]


def test_seen_cam_between_and_outside_the_cells():
    coarse = torch.rand(1, 1, 3, 2, 1)
    placed = place_cells(coarse, (30, 20, 9), 8.5, 4)[0, 0]
    assert placed.shape == (30, 20, 9)
    assert torch.allclose(placed[8:10, 4, 4].mean(), coarse[0, 0, 0, 0, 0], atol=0.2)
    at_10_5 = coarse[0, 0, 0, 0, 0].lerp(coarse[0, 0, 1, 0, 0], 0.5)
    assert torch.allclose(placed[10:12, 0, 0].mean(), at_10_5)
    assert torch.equal(placed[0, 0], placed[8, 0]) and torch.equal(placed[29, 0], placed[17, 0])


def test_seen_ggc_is_guided_backpropagation_times_the_placed_cam():
    volumes = make_volumes(SHAPE)
    model, volumes = make_network(volumes, MODELS["modelT8"]).double(), volumes.double()
    cam = place_cells(gradcam_at(model, 8, volumes, TARGETS), SHAPE, 8.5, 4)
    expected = cam * guided_backpropagation(model, volumes, TARGETS)
    assert_same_maps(guided_gradcam(model, volumes, TARGETS, cam="seen"), expected, 1e-9)
