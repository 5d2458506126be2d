"""Batch runner for Z-Image-Turbo. Importing this package imports nothing heavy."""

__version__ = "0.1.0"

GB = 1e9
"""Bytes of a gigabyte, wherever one is read or written."""
_OF_API = ("Drawn", "Item", "Loaded", "Run", "UserError", "load", "run")


def __getattr__(name: str) -> object:
    """What is used from Python (api.py; ``__init__.pyi`` has its types) is imported when it is first asked for."""
    if name not in _OF_API:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module("zimage_runner.api"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_OF_API])
