"""How batches reach a device."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

import loading


def make_batches(n_batches: int) -> list[tuple[torch.Tensor, ...]]:
    """Return volumes, labels and rows of batches."""
    torch.manual_seed(0)
    return [
        (torch.rand(2, 1, 3, 4, 5), torch.tensor([0, 1]), torch.tensor([2 * i, 2 * i + 1]))
        for i in range(n_batches)
    ]


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
        not torch.cuda.is_available(), reason="there is no GPU"))],
)  # fmt: skip
def test_batches_arrive_as_they_are(device):
    batches = make_batches(5)
    if device == "cuda":
        batches = [tuple(tensor.pin_memory() for tensor in batch) for batch in batches]
    found = []
    for volumes, labels, rows in loading.on_device(batches, torch.device(device)):
        assert volumes.device.type == labels.device.type == device
        assert rows.device.type == "cpu"
        found.append((volumes.clone().cpu(), labels.cpu(), rows))  # clone: work of the caller's
    for batch, expected in zip(found, batches, strict=True):
        assert all(torch.equal(*pair) for pair in zip(batch, expected, strict=True))


class Recorder:
    """Stands in for a GPU: notes in which order its streams are told to do what."""

    def __init__(self):
        self.notes, self.n_steps = [], 0

    def tensor(self, name: str) -> SimpleNamespace:
        """Return a tensor on the host that can be copied."""
        copied = SimpleNamespace(record_stream=lambda stream: self.notes.append(f"kept {name}"))

        def to(device, non_blocking):
            assert non_blocking
            self.notes.append(f"copy {name}")
            return copied

        return SimpleNamespace(to=to)

    def stream(self) -> SimpleNamespace:
        """Return the stream that computes."""

        def record_event():
            number, self.n_steps = self.n_steps, self.n_steps + 1
            return SimpleNamespace(synchronize=lambda: self.notes.append(f"step {number} is over"))

        return SimpleNamespace(
            wait_stream=lambda other: self.notes.append(f"wait for {other}"),
            record_event=record_event,
        )


def test_a_gpu_gets_the_next_batch_while_it_computes(monkeypatch):
    """A step waits for its own batch; a third batch waits until the first one's step is over."""
    recorder = Recorder()

    @contextlib.contextmanager
    def on_stream(stream):
        recorder.notes.append(f"on {stream}")
        yield
        recorder.notes.append(f"off {stream}")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: recorder.stream())
    monkeypatch.setattr(loading, "copying_stream", lambda device: "copies")
    monkeypatch.setattr(torch.cuda, "stream", on_stream)
    batches = [(recorder.tensor(f"v{i}"), recorder.tensor(f"l{i}"), i) for i in range(3)]
    for *_, row in loading.on_device(batches, torch.device("cuda")):
        recorder.notes.append(f"compute {row}")

    def arrival(i):
        copies = ["on copies", f"copy v{i}", f"copy l{i}", "off copies"]
        return [*copies, "wait for copies", f"kept v{i}", f"kept l{i}", f"compute {i}"]

    in_between = ["step 0 is over"], ["step 1 is over"]
    assert recorder.notes == [
        *arrival(0), *arrival(1), *in_between[0], *arrival(2), *in_between[1],
    ]  # fmt: skip
