"""A pickle reader that builds tensors and containers and nothing else.

Checkpoints of trainers also pickle objects (data loaders, losses, loggers) that loading weights never needs. They
come back as inert stand-ins, so that nothing outside the allow-list is imported or called. The reader is handed to
`torch.load` as `pickle_module`; the process-wide `pickle` stays as it is.
"""

import pickle
import types
from collections import OrderedDict
from typing import Any

import numpy as np

# What tensors, numbers and containers are made of: functions that only build values.
ALLOWED = {
    "collections": {"Counter", "OrderedDict"},
    "builtins": {"bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "set", "slice",
                 "str", "tuple"},
    "torch": {"Size", "device"},
    "torch._utils": {"_rebuild_parameter", "_rebuild_tensor", "_rebuild_tensor_v2"},
    "torch.nn.parameter": {"Parameter"},
    "torch.serialization": {"_get_layout"},
    "torch.storage": {"UntypedStorage"},
    "numpy": {"dtype", "ndarray"},
    "numpy.core.multiarray": {"_reconstruct", "scalar"},
    "numpy._core.multiarray": {"_reconstruct", "scalar"},
}
MODULE_NAMES = {"__builtin__": "builtins", "numpy.core.multiarray": "numpy._core.multiarray"}

# No training run pickles these: a file that asks for them is an attack, whatever the place.
HOSTILE_MODULES = {
    "code", "commands", "ctypes", "importlib", "marshal", "nt", "os", "platform", "posix", "pty", "runpy", "shutil",
    "signal", "socket", "subprocess", "sys", "timeit", "webbrowser",
}
HOSTILE_BUILTINS = {"__import__", "breakpoint", "compile", "eval", "exec", "open"}


class Inert:
    """Stands for an object that was not built. It accepts what unpickling does to objects, and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "Inert":
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> "Inert":
        return Inert()

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        pass

    def add(self, value: Any) -> None:
        pass

    def __repr__(self) -> str:
        return f"<not loaded: {type(self).__module__}.{type(self).__qualname__}>"


class HostilePickleError(pickle.UnpicklingError):
    """The file asks for a function that could take over the computer."""


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """What `_codecs.encode` does for bytes in old pickles, without its other codecs."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"The codec {encoding!r} is not expected in a checkpoint.")
    return text.encode("latin1")


def _build(unpickler: Any) -> None:
    """The opcode that sets an object's state: only on new instances, never on classes, functions or modules."""
    state = unpickler.stack.pop()
    target = unpickler.stack[-1]
    if isinstance(target, Inert):
        return
    if type(target) in (np.ndarray, np.dtype) or isinstance(target, np.dtype):
        target.__setstate__(state)
    elif type(target) is OrderedDict and isinstance(state, dict):
        vars(target).update(state)  # the versions of the modules in a state_dict
    else:
        raise pickle.UnpicklingError(f"The state of a {type(target).__name__} is not expected in a checkpoint.")


class SafePickle(types.ModuleType):
    """A stand-in for the module `pickle` for one file; `refused` collects the names that were not loaded."""

    def __init__(self):
        super().__init__("safe_pickle")
        refused = self.refused = set()
        stand_ins: dict[tuple[str, str], type] = {}

        # The reader in Python: the compiled one does not let opcodes be replaced. Weights are not in the stream.
        class Unpickler(pickle._Unpickler):
            dispatch = pickle._Unpickler.dispatch | {pickle.BUILD[0]: _build}

            def find_class(self, module: str, name: str) -> Any:
                root = MODULE_NAMES.get(module, module)
                if (module, name) == ("_codecs", "encode"):
                    return _encode
                if name in ALLOWED.get(module, ()) or name in ALLOWED.get(root, ()) or _is_dtype(module, name):
                    return super().find_class(root, name)
                refused.add(f"{module}.{name}")
                if root.split(".")[0] in HOSTILE_MODULES or (root == "builtins" and name in HOSTILE_BUILTINS):
                    raise HostilePickleError(f"The file asks for {module}.{name}.")
                key = module, name
                if key not in stand_ins:
                    stand_ins[key] = type(name.rpartition(".")[2], (Inert,), {"__module__": module})
                return stand_ins[key]

        self.Unpickler = Unpickler
        self.Pickler = pickle.Pickler
        self.UnpicklingError = pickle.UnpicklingError

    def load(self, file: Any, **kwargs: Any) -> Any:
        return self.Unpickler(file, **kwargs).load()


def _is_dtype(module: str, name: str) -> bool:
    """Whether it is a dtype or storage class of torch, or a dtype class of numpy. Looks names up, calls nothing."""
    if "." in name:
        return False
    if module == "torch":
        import torch
        value = getattr(torch, name, None)
        return isinstance(value, torch.dtype) or (name.endswith("Storage") and isinstance(value, type))
    if module == "numpy.dtypes":
        return name.endswith("DType")
    return False


def contains_inert(value: Any) -> bool:
    """Whether a stand-in is in a value or in the containers that it is made of."""
    stack, seen = [value], set()
    while stack:
        value = stack.pop()
        if isinstance(value, Inert) or (isinstance(value, type) and issubclass(value, Inert)):
            return True
        if isinstance(value, dict | list | tuple | set | frozenset) and id(value) not in seen:
            seen.add(id(value))  # containers may hold themselves
            stack.extend(value)
            if isinstance(value, dict):
                stack.extend(value.values())
    return False
