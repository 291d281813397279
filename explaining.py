"""Explaining batches of volumes with as much memory as there is: passes shrink where it lacks."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import attribution
from errors import RunError, is_out_of_memory
from utils import log

FORWARD = "forward pass"


@dataclass
class Explainer:
    """A network, the methods' parameters, and how many volumes or IG steps go through at once.

    Attributes
    ----------
    model : Module
        In eval mode.
    options : dict of str to dict
        Each method's own parameters.
    n_at_once : dict of str to int
        Volumes or IG steps per pass of each method, halved for good when memory does not suffice.
    """

    model: nn.Module
    options: dict[str, dict]
    n_at_once: dict[str, int]

    @torch.no_grad()
    def logits(self, volumes: Tensor) -> Tensor:
        """Return logits (N, 2) of volumes (N, 1, D, H, W), on the CPU."""
        return self._in_passes(
            FORWARD, lambda n: torch.cat([self.model(part).cpu() for part in volumes.split(n)])
        )

    def maps(self, method: str, volumes: Tensor, targets: Tensor, paths: list[str]) -> Tensor:
        """Return maps (N, D, H, W) of volumes (N, 1, D, H, W), on the CPU.

        Parameters
        ----------
        method : str
            A key of `attribution.METHODS`.
        volumes : Tensor, shape (N, 1, D, H, W)
        targets : int64 Tensor, shape (N,)
        paths : list of str
            The scans, for messages.

        Raises
        ------
        RunError
            If a map is not finite, or memory does not suffice for one volume or step.
        """
        explain, options = attribution.METHODS[method], self.options[method]

        def compute(n: int) -> Tensor:
            if method == "IG":  # takes one volume at a time anyway: its steps make the batch
                return explain(self.model, volumes, targets, batch_size=n, **options).cpu()
            parts = zip(volumes.split(n), targets.split(n), strict=True)
            return torch.cat([explain(self.model, *part, **options).cpu() for part in parts])

        try:
            return self._in_passes(method, compute)[:, 0]
        except (FloatingPointError, RunError) as error:
            raise RunError(f"{method} of {' or '.join(paths)}: {error}") from None

    def _in_passes(self, work: str, compute: Callable[[int], Tensor]) -> Tensor:
        """Compute with as many at once as memory takes."""
        while True:
            try:
                return compute(self.n_at_once[work])
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error).splitlines()[0]
            # past the except clause, which keeps the failed pass alive
            if self.n_at_once[work] == 1:
                raise RunError(f"memory does not suffice for a single pass: {reason}")
            self.n_at_once[work] //= 2
            torch.cuda.empty_cache()
            log.warning("%s: out of memory, %d at once from here on", work, self.n_at_once[work])
