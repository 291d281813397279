"""The rest of a network: what follows one of its layers, as a function of that layer's outputs."""

import torch
from torch import Tensor, nn


class Rest(nn.Module):
    """The layers of a network from one of its features on; they are shared, not copied.

    Parameters
    ----------
    model : Module
        It has parts.
    start : int
        The first of the features that still run.
    entry : Module
        Run before them.
    """

    def __init__(self, model: nn.Module, start: int, entry: nn.Module):
        super().__init__()
        self.entry = entry
        self.features, self.classifier = model.features[start:], model.classifier

    def forward(self, values: Tensor) -> Tensor:
        """Return logits (N, n_classes) for values (N, C, d, h, w)."""
        features = self.features(self.entry(values))
        return self.classifier(torch.flatten(features, 1))


def has_parts(model: nn.Module) -> bool:
    """Tell whether a model has `features` and a `classifier`, both of them layers in a row."""
    parts = (getattr(model, "features", None), getattr(model, "classifier", None))
    return all(isinstance(part, nn.Sequential) for part in parts)


def rest_after(model: nn.Module, layer: nn.Module, outputs: Tensor, logits: Tensor) -> Rest | None:
    """Return what follows a layer, or None if the model is not built in the way this needs.

    Parameters
    ----------
    model : Module
        In eval mode.
    layer : Module
    outputs : Tensor, shape (N, C, d, h, w)
        Of the layer, for some volumes.
    logits : Tensor, shape (N, n_classes)
        The model's for the same volumes; the rest must give them too.
    """
    if not has_parts(model) or layer not in list(model.features):
        return None
    rest = Rest(model, list(model.features).index(layer) + 1, nn.Identity())
    with torch.no_grad():
        same = torch.allclose(rest(outputs), logits)
    return rest if same else None
