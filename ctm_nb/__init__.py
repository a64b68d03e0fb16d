__version__ = "0.2.0"

from importlib import import_module

from ._moved import GONE, MOVED, install

install()
_OFFERED = {"load": "checkpoints.models", "sample": "method.sampling"}


def __getattr__(name: str):
    "`load` and `sample` from their rooms, when they are asked for (PEP 562); modules of 0.1, or where they are."
    if name in _OFFERED: return getattr(import_module(f"{__name__}.{_OFFERED[name]}"), name)
    if name in MOVED or name in GONE: return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__(): return sorted([*globals(), *_OFFERED])
