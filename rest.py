"""The rest of a network: what follows one of its layers, as a function of that layer's outputs."""

import torch
from torch import Tensor, fx, nn

TRACE_ERRORS = (  # of a forward that does more than calling layers
    fx.proxy.TraceError, AttributeError, LookupError, RuntimeError, TypeError, ValueError,
)  # fmt: skip


class Rest(nn.Module):
    """The layers of a network from one of its features on; they are shared, not copied.

    Parameters
    ----------
    model : Module
        It is straight.
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


def is_straight(model: nn.Module) -> bool:
    """Tell whether a model runs its `features` in a row, flattens, runs its `classifier`, no more.

    That is read off the calls that its forward makes, without running any.
    """
    parts = (getattr(model, "features", None), getattr(model, "classifier", None))
    if not all(isinstance(part, nn.Sequential) for part in parts):
        return False
    if any("forward" in vars(module) for module in model.modules()):
        return False
    try:
        _, *calls, output = fx.Tracer().trace(model).nodes
    except TRACE_ERRORS:
        return False
    names = [f"features.{i}" for i in range(len(parts[0]))]
    names += [torch.flatten, *(f"classifier.{i}" for i in range(len(parts[1])))]
    chain = zip(calls, [call.prev for call in calls], strict=True)
    return (
        [call.target for call in calls] == names
        and all(call.all_input_nodes == [before] for call, before in chain)
        and calls[len(parts[0])].args[1:] == (1,)
        and output.args == (calls[-1],)
    )


def rest_after(model: nn.Module, layer: nn.Module) -> Rest | None:
    """Return what follows one of a model's features, or None if the model is not straight."""
    if not is_straight(model) or layer not in list(model.features):
        return None
    return Rest(model, list(model.features).index(layer) + 1, nn.Identity())
