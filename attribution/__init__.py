"""LRP, integrated gradients, guided Grad-CAM and SmoothGrad of a 3D CNN, each through captum.

Pure functions of a model and a volume: no files, no devices of their own. All explain the logit
(before softmax) of a target class, and leave the model exactly as it was. The package imports
nothing of the suite; a model is what `unmodified.check_network` asks for.
"""

from collections.abc import Callable

from torch import Tensor

from attribution.guided_gradcam import guided_gradcam
from attribution.integrated_gradients import N_STEPS, integrated_gradients
from attribution.lrp import BETA, lrp
from attribution.smoothgrad import N_SAMPLES, NOISE, smoothgrad

__all__ = [
    "BETA", "METHODS", "NOISE", "N_SAMPLES", "N_STEPS", "guided_gradcam", "integrated_gradients",
    "lrp", "smoothgrad",
]  # fmt: skip

METHODS: dict[str, Callable[..., Tensor]] = {
    "LRP": lrp,
    "IG": integrated_gradients,
    "GGC": guided_gradcam,
    "SG": smoothgrad,
}
