"""Which processes train which fold, and how several train one fold as one.

With no more processes than folds, each fold is trained by one process, and nothing here changes
what it computes. With more, each fold has a team: every process takes its share of each batch, and
batch statistics, dropout, loss and gradients are those of the whole batch, up to rounding.
"""

from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import ranks

MAX_LATE = timedelta(minutes=30)  # a member that comes later to a step is dead; nccl cannot tell


class _Total(torch.autograd.Function):
    """The sum over a team; the gradient of a sum is the sum of the members' gradients."""

    @staticmethod
    def forward(ctx, values: Tensor, group: distributed.ProcessGroup) -> Tensor:
        ctx.group = group
        total = values.clone()
        distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone()
        distributed.all_reduce(total, group=ctx.group)
        return total, None


@dataclass(frozen=True)
class Team:
    """The processes that train one fold together.

    Attributes
    ----------
    index : int
        This process's place in the team.
    size : int
    group : ProcessGroup or None
        For sums within a training step. None for a team of one.
    patient_group : ProcessGroup or None
        For waiting, which may take as long as another host decodes scans.
    """

    index: int = 0
    size: int = 1
    group: distributed.ProcessGroup | None = None
    patient_group: distributed.ProcessGroup | None = None

    @property
    def leads(self) -> bool:
        """Whether this process writes the fold's files."""
        return self.index == 0

    def total(self, values: Tensor) -> Tensor:
        """Return the sum of the members' values; gradients flow back to all of them."""
        return values if self.size == 1 else _Total.apply(values, self.group)

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of the members' values."""
        return self.total(values) / self.size

    def gathered(self, value: object) -> list:
        """Return the members' values, in their order."""
        if self.size == 1:
            return [value]
        ranks.wait_for_all(self.patient_group)
        values = [None] * self.size
        distributed.all_gather_object(values, value, group=self.patient_group)
        return values

    def wait(self) -> None:
        """Return when every member has come to this point."""
        if self.size > 1:
            ranks.wait_for_all(self.patient_group)


def assign_folds(wanted: list[int], todo: list[int]) -> tuple[list[int], Team]:
    """Return the folds that this process is to train, and its team.

    Unfinished folds go round the processes. With more processes than folds, rank r joins the team
    of the fold in place r mod the number of folds.

    Parameters
    ----------
    wanted : list of int
        The folds that were asked for. They decide on teams, so that a run that is gone on with
        computes as it began.
    todo : list of int
        Those that are not finished.
    """
    n_ranks, rank = ranks.world_size(), ranks.rank()
    if n_ranks <= len(wanted):
        return todo[rank::n_ranks], Team()
    for place, fold in enumerate(wanted):
        members = list(range(place, n_ranks, len(wanted)))
        team = join_team(members)  # every process must call it for every team
        if rank in members:
            mine = [fold] if fold in todo else [], team
    return mine


def join_team(members: list[int]) -> Team:
    """Return the team of these ranks as this process, if it is one of them, sees it."""
    if len(members) == 1:
        return Team()
    group = distributed.new_group(members, timeout=MAX_LATE)
    patient_group = distributed.new_group(members, timeout=ranks.MAX_WAIT, backend="gloo")
    index = members.index(ranks.rank()) if ranks.rank() in members else -1
    return Team(index, len(members), group, patient_group)


# One fold by several processes


class SharedBatchNorm3d(nn.BatchNorm3d):
    """Batch normalisation by the statistics of the whole team's batch.

    torch's own SyncBatchNorm needs a GPU; this one is the same on a CPU.
    """

    def __init__(self, layer: nn.BatchNorm3d, team: Team):
        super().__init__(layer.num_features, layer.eps, layer.momentum)
        self.weight, self.bias = layer.weight, layer.bias  # those that the optimiser knows
        self.running_mean, self.running_var = layer.running_mean, layer.running_var
        self.num_batches_tracked = layer.num_batches_tracked
        self.team = team

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalise (N, C, D, H, W); N, the member's share, may be 0."""
        if not self.training:
            return super().forward(inputs)
        with torch.autocast(inputs.device.type, enabled=False):
            return self.normalise(inputs.float()).to(inputs.dtype)

    def normalise(self, inputs: Tensor) -> Tensor:
        """Normalise float32 inputs: bfloat16 would round counts and running statistics."""
        axes = (0, 2, 3, 4)
        count = inputs.new_full((1,), inputs.numel() / self.num_features)
        totals = self.team.total(torch.cat([inputs.sum(axes), count]))
        n, mean = totals[-1].detach(), totals[:-1] / totals[-1].detach()
        centred = inputs - mean.view(1, -1, 1, 1, 1)
        variance = self.team.total(centred.square().sum(axes)) / n
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * n / (n - 1), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return centred * scale.view(1, -1, 1, 1, 1) + self.bias.view(1, -1, 1, 1, 1)


class SharedDropout(nn.Dropout):
    """Dropout whose mask is the member's share of the one that the whole batch would get."""

    def __init__(self, layer: nn.Dropout, team: Team):
        super().__init__(layer.p)
        self.team = team

    def forward(self, inputs: Tensor) -> Tensor:
        """Drop units of (N, n_units)."""
        if not self.training:
            return inputs
        n_scans = int(self.team.total(torch.full((1,), len(inputs), device=inputs.device)))
        mask = functional.dropout(inputs.new_ones(n_scans, *inputs.shape[1:]), self.p)
        return inputs * mask[self.team.index :: self.team.size]


SHARED = {nn.BatchNorm3d: SharedBatchNorm3d, nn.Dropout: SharedDropout}


class SharedCrossEntropy(nn.Module):
    """Cross-entropy whose mean over the team, as gradients are averaged, is the whole batch's."""

    def __init__(self, team: Team):
        super().__init__()
        self.team = team

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the member's part of the loss of logits (N, 2) and labels (N,)."""
        n_scans = self.team.total(torch.full((1,), len(labels), device=labels.device))
        total = functional.cross_entropy(logits, labels, reduction="sum")
        return total * self.team.size / n_scans[0]


def share_training(model: nn.Module, team: Team) -> tuple[nn.Module, nn.Module]:
    """Return what a team trains with: the network, which keeps the model's parameters, and a loss.

    For a team of one these are the model itself and cross-entropy.
    """
    if team.size == 1:
        return model, nn.CrossEntropyLoss()
    device = next(model.parameters()).device
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) in SHARED:
                setattr(parent, name, SHARED[type(child)](child, team).to(device))
    return DistributedDataParallel(model, process_group=team.group), SharedCrossEntropy(team)
