"""Dispatch modes for tests: they record the names of ops and their memory, and refuse ops that wait for the device."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Dispatched(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Allocated(TorchDispatchMode):
    """Measures memory: `most` is the number of bytes of the largest storage that an op made."""

    def __init__(self):
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {storage.data_ptr() for storage in _storages((args, kwargs))}
        made = [storage.nbytes() for storage in _storages(result) if storage.data_ptr() not in given]
        self.most = max([self.most, *made])
        return result


class NoReads(TorchDispatchMode):
    """Refuses an op that makes the host wait for a GPU or whose shape depends on values: no CUDA graph can hold it."""

    waits = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.partition(".")[0]
        assert name not in self.waits, func
        if name.startswith("index") and isinstance(args[1], (list, tuple)):
            assert all(index is None or index.dtype == torch.int64 for index in args[1]), "indexed by a mask"
        return func(*args, **(kwargs or {}))


def _storages(values):
    tensors = (value for value in tree_leaves(values) if isinstance(value, torch.Tensor))
    return [tensor.untyped_storage() for tensor in tensors]
