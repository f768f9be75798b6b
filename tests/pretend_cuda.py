"""CUDA without a GPU: tensors that say they lie on `cuda:0` and compute on the CPU. As on a real device, an operation
on tensors of both, a CPU generator for a CUDA tensor, and `.numpy()` are errors. What it cannot tell: speed, rounding,
kernels that are missing. Import and load what is needed first: modules that are imported inside see a patched torch"""
from contextlib import ExitStack, contextmanager
from unittest.mock import patch
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

cuda, aten = torch.device('cuda', 0), torch.ops.aten
indexing = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
may_mix = indexing | {aten._to_copy.default, aten.copy_.default}

class CudaTensor(torch.Tensor):
    "A tensor that says it is on the GPU, around one on the CPU"
    @staticmethod
    def __new__(cls, real):
        return torch.Tensor._make_wrapper_subclass(cls, real.shape, strides=real.stride(), device=cuda,
                                                   dtype=real.dtype, storage_offset=real.storage_offset())
    def __init__(self, real): self.inner = real
    def tolist(self): return self.inner.tolist()
    def numpy(self, **kwargs): raise TypeError("can't convert cuda:0 device type tensor to numpy")
    def __repr__(self): return f'CudaTensor({self.inner})'

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None): return compute(op, args, kwargs or {})

def check(op, args, kwargs, flat, there):
    "`RuntimeError` where a GPU would give one"
    ours = [x for x in flat if isinstance(x, CudaTensor)]
    others = [x for x in flat if isinstance(x, torch.Tensor) and not isinstance(x, CudaTensor)]
    if op in indexing and ours and not isinstance(args[0], CudaTensor):
        raise RuntimeError(f'{op}: cuda indices of a cpu tensor')
    if ours and op not in may_mix and any(x.dim() for x in others):
        raise RuntimeError(f'{op}: expected all tensors to be on the same device, found cuda:0 and cpu')
    if there and any(isinstance(x, torch.Generator) and x.device.type == 'cpu' for x in flat):
        raise RuntimeError(f"{op}: expected a 'cuda' device type for generator but found 'cpu'")

def compute(op, args, kwargs):
    "An operation on the CPU, its result where it should be"
    flat, spec = tree_flatten((args, kwargs))
    asked = kwargs.get('device')
    there = torch.device(asked).type == 'cuda' if asked is not None else any(isinstance(x, CudaTensor) for x in flat)
    if op is aten.copy_.default: there = isinstance(args[0], CudaTensor)
    check(op, args, kwargs, flat, there)
    def real(x):
        if isinstance(x, CudaTensor): return x.inner
        return torch.device('cpu') if isinstance(x, torch.device) and x.type == 'cuda' else x
    args_, kwargs_ = tree_unflatten([real(x) for x in flat], spec)
    out = op(*args_, **kwargs_)
    if op._schema.is_mutable and op._schema.name.endswith('_'): return args[0]
    return tree_map(lambda x: CudaTensor(x) if there and type(x) is torch.Tensor else x, out)

class Compute(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None): return compute(op, args, kwargs or {})

def moved(make):
    "`torch.tensor` and `torch.as_tensor` ask the driver themselves: they make a CPU tensor here, which is then moved"
    def made(data, *args, device=None, **kwargs):
        return make(data, *args, **kwargs) if device is None else make(data, *args, **kwargs).to(device)
    return made

@contextmanager
def pretend_cuda():
    "Inside, there is one CUDA device"
    torch._C._ensureCUDADeviceGuardSet()
    # parameters that are moved are new objects; `unsupported` asks for plain ones
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    with ExitStack() as stack:
        for name, put in {'cuda._lazy_init': lambda: None, 'cuda.is_available': lambda: True,
                          'cuda.device_count': lambda: 1, 'tensor': moved(torch.tensor),
                          'as_tensor': moved(torch.as_tensor)}.items():
            stack.enter_context(patch(f'torch.{name}', put))
        for part in ('generation', 'decoding'):
            stack.enter_context(patch(f'v2flow_nbdev.language.{part}.unsupported', lambda model, int8=False: None))
        for context in (torch.no_grad(), Compute(), sdpa_kernel(SDPBackend.MATH),
                        torch.backends.cudnn.flags(enabled=False)):
            stack.enter_context(context)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try: yield
        finally: torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
