"""Guided Grad-CAM in one pass: Grad-CAM starts from what guided backpropagation's pass left."""

from captum.attr import GuidedBackprop, LayerAttribution, LayerGradCam
from torch import Tensor, nn

from attribution.unmodified import attribute_on


def guided_gradcam(model: nn.Module, volume: Tensor, target: int | Tensor) -> Tensor:
    """Guided backpropagation times the upsampled Grad-CAM of the last convolution.

    Grad-CAM is taken at the convolution's output, before batch normalisation, and upsampled
    trilinearly to the volume's grid. The map is 0 wherever Grad-CAM is 0.

    Parameters
    ----------
    model : Module
        See `unmodified.check_network`; a TypeError if it is of another kind.
    volume : Tensor, shape (N, 1, D, H, W), float32
    target : int or int64 Tensor of shape (N,)

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
        cam = grad_cam.attribute(activations[0], target, relu_attributions=True)
        shape = tuple(volume.shape[2:])
        return guided * LayerAttribution.interpolate(cam, shape, interpolate_mode="trilinear")

    return attribute_on(model, attribute)
