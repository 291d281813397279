"""Guided Grad-CAM in one pass: Grad-CAM starts from what guided backpropagation's pass left."""

import torch
from captum.attr import GuidedBackprop, LayerAttribution, LayerGradCam
from torch import Tensor, nn

from attribution.unmodified import attribute_on

CAMS = ("stretch", "seen")


def guided_gradcam(
    model: nn.Module, volume: Tensor, target: int | Tensor, cam: str = CAMS[0]
) -> Tensor:
    """Guided backpropagation times the upsampled Grad-CAM of the last convolution.

    Grad-CAM is taken at the convolution's output, before batch normalisation, and upsampled
    trilinearly to the volume's grid. The map is 0 wherever Grad-CAM is 0.

    Parameters
    ----------
    model : Module
        See `unmodified.check_network`; a TypeError if it is of another kind.
    volume : Tensor, shape (N, 1, D, H, W), float32
    target : int or int64 Tensor of shape (N,)
    cam : str
        "stretch", as published: the convolution's grid is stretched over the volume, though its
        cells, without padding, see the middle of it only. "seen": each cell lies at the centre of
        its receptive field; outside the outermost cells their values go on.

    Returns
    -------
    Tensor, shape (N, 1, D, H, W), float32
        A FloatingPointError if a map or a logit is NaN or infinite.

    References
    ----------
    Selvaraju et al., ICCV 2017, arXiv:1610.02391
    """

    def attribute() -> Tensor:
        last = max(i for i, layer in enumerate(model.features) if isinstance(layer, nn.Conv3d))
        activations: list[Tensor] = []
        handle = model.features[last].register_forward_hook(
            lambda _, inputs, outputs: activations.append(outputs.detach())
        )
        try:
            guided = GuidedBackprop(model).attribute(volume.detach().clone(), target)
        finally:
            handle.remove()
        rest = nn.Sequential(nn.Identity(), model.after(last + 1))
        grad_cam = LayerGradCam(rest, rest[0])
        coarse = grad_cam.attribute(activations[0], target, relu_attributions=True)
        shape = tuple(volume.shape[2:])
        if cam == "seen":
            return guided * place_cells(coarse, shape, *cell_centres(model.features[: last + 1]))
        return guided * LayerAttribution.interpolate(coarse, shape, interpolate_mode="trilinear")

    return attribute_on(model, attribute)


def cell_centres(layers: nn.Sequential) -> tuple[float, int]:
    """Return first and spacing: cell i of the last layer's output sees voxel first + i·spacing."""
    first, spacing = 0.0, 1
    for layer in layers:
        if isinstance(layer, nn.Conv3d):
            first += (layer.kernel_size[0] - 1) / 2 * spacing
        elif isinstance(layer, nn.MaxPool3d):
            first += (layer.kernel_size - 1) / 2 * spacing
            spacing *= layer.kernel_size
    return first, spacing


def place_cells(coarse: Tensor, shape: tuple[int, ...], first: float, spacing: int) -> Tensor:
    """Interpolate cells (N, 1, d, h, w) at first + i·spacing to all voxels (N, 1, D, H, W)."""
    for axis, side in enumerate(shape, 2):
        voxels = torch.arange(side, dtype=coarse.dtype, device=coarse.device)
        places = ((voxels - first) / spacing).clamp(0, coarse.shape[axis] - 1)
        below = places.floor().long()
        above = (below + 1).clamp(max=coarse.shape[axis] - 1)
        weight = (places - below).view(-1, *[1] * (4 - axis))
        coarse = torch.lerp(*(coarse.index_select(axis, i) for i in (below, above)), weight)
    return coarse
