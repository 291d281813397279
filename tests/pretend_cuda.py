"""A pretended GPU for a torch without CUDA: real numbers, and an error where devices mix.

    python3 tests/pretend_cuda.py 2 train_cv.py --path … --device 1

runs a script of the suite on a host with two of them. Nothing may fork after CUDA has started.
"""

import contextlib
import os
import runpy
import sys
from pathlib import Path

import torch
import torch._dynamo  # before torch.cuda has other functions
import torch.optim.optimizer as optimizer
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
FREE_BYTES = 2 * 10**9
TAKES_INDICES = ("aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_")


class MixedDevices(RuntimeError):
    """What a GPU would refuse: tensors of the CPU and of a GPU in one operation."""


class OnGPU(torch.Tensor):
    """A tensor that says it is on a GPU, around one that is not."""

    @staticmethod
    def __new__(cls, held: torch.Tensor):
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, layout=held.layout, device="cpu", requires_grad=False,
        )  # fmt: skip
        made.held = held
        return made

    device = property(lambda self: torch.device("cuda:0"))
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return dispatch(function, args, kwargs or {})

    def cpu(self):
        return torch.ops.aten._to_copy.default(self, device=CPU)

    def cuda(self, *args, **kwargs):
        return self

    def tolist(self):
        return self.held.tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def to(self, *args, **kwargs):
        device, dtype = kwargs.get("device"), kwargs.get("dtype")
        for value in args:
            if isinstance(value, str | torch.device):
                device = value
            elif isinstance(value, torch.dtype):
                dtype = value
            elif isinstance(value, torch.Tensor):
                device, dtype = value.device, value.dtype
        if device is not None and torch.device(device).type == "cpu":
            return torch.ops.aten._to_copy.default(self, device=CPU, dtype=dtype)
        memory_format = kwargs.get("memory_format")
        if dtype is None and memory_format is None:
            return self
        memory_format = memory_format or torch.preserve_format
        return torch.Tensor.to(self, dtype=dtype or self.dtype, memory_format=memory_format)


def bare(value: object) -> object:
    """Return the tensor that a pretended one holds; anything else as it is."""
    return value.held if isinstance(value, OnGPU) else value


def on_gpu(value: object) -> object:
    """Pretend that a tensor is on a GPU."""
    is_bare = isinstance(value, torch.Tensor) and not isinstance(value, OnGPU)
    return OnGPU(value) if is_bare else value


def dispatch(function, args, kwargs):
    """Run an operation where its tensors are, or say that they are not together."""
    name, device = function._schema.name, kwargs.get("device")
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
    ours = [t for t in tensors if isinstance(t, OnGPU)]
    others = [t for t in tensors if not isinstance(t, OnGPU) and t.dim() > 0]
    bare_args, bare_kwargs = tree_map(bare, args), tree_map(bare, kwargs)
    if device is not None:
        bare_kwargs["device"] = CPU
    to_gpu = torch.device(device).type == "cuda" if device is not None else bool(ours)
    if name == "aten::_to_copy":
        result = function(*bare_args, **bare_kwargs)
        if to_gpu:
            return on_gpu(result)
        return result.clone() if ours and result is ours[0].held else result
    if name == "aten::copy_":
        function(*bare_args, **bare_kwargs)
        return args[0]
    if ours and others and name.startswith("aten::"):
        indexed = name.split(".")[0] in TAKES_INDICES and isinstance(args[0], OnGPU)
        if not indexed:
            shapes = [[tuple(t.shape) for t in side] for side in (ours, others)]
            raise MixedDevices(f"{function}: cuda:0 has {shapes[0]}, the CPU {shapes[1]}")
    result = function(*bare_args, **bare_kwargs)
    if not to_gpu:
        return result
    result = tree_map(on_gpu, result)
    return return_and_correct_aliasing(function, args, kwargs, result) if ours else result


class Pretending(TorchDispatchMode):
    """Sees what is made without any tensor of ours, such as torch.empty(…, device="cuda")."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return dispatch(function, args, kwargs or {})


def refuse_to_fork() -> None:
    """Stand in for os.fork."""
    raise RuntimeError("a process was forked after CUDA had started")


def install(n_gpus: int) -> Pretending:
    """Give torch some GPUs; return what keeps pretending while it is referred to."""
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    nothing = lambda *args, **kwargs: None  # noqa: E731
    answers = {
        "device_count": n_gpus, "get_device_name": "Pretended GPU", "current_device": 0,
        "mem_get_info": (FREE_BYTES, 2 * FREE_BYTES), "max_memory_allocated": 1,
        "max_memory_reserved": 10**9, "is_bf16_supported": True,
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *args, answer=answer, **kwargs: answer)
    for name in ("_lazy_init", "set_device", "synchronize", "reset_peak_memory_stats",
                 "empty_cache", "manual_seed_all"):  # fmt: skip
        setattr(torch.cuda, name, nothing)
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    optimizer._foreach_supported_types.append(OnGPU)
    torch.Tensor.pin_memory = lambda self: self.clone()  # other threads do not pretend
    save = torch.save
    torch.save = lambda content, *args, **kwargs: save(tree_map(bare, content), *args, **kwargs)
    os.fork = refuse_to_fork
    mode = Pretending()
    mode.__enter__()
    return mode


if __name__ == "__main__":
    _, n_gpus, script, *arguments = sys.argv
    sys.path[0] = str(ROOT)
    sys.argv = [script, *arguments]
    with contextlib.suppress(ValueError):  # matplotlib and torch fork while they are imported
        import matplotlib.figure  # noqa: F401
    pretending = install(int(n_gpus))
    runpy.run_path(str(ROOT / script), run_name="__main__")
