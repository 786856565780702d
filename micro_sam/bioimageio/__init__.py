"""Exchange of models: packages for bioimage.io, written and read, and ONNX.

The names are loaded when they are first used, so that importing this package is quick.
"""

from importlib import import_module

_HOMES = {
    "export_bioengine_model": "bioengine_export",
    "export_image_encoder": "bioengine_export",
    "export_onnx": "onnx_export",
    "export_onnx_model": "bioengine_export",
    "export_sam_model": "model_export",
    "import_model": "model_import",
    "PredictorAdaptor": "predictor_adaptor",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__():
    return sorted({*globals(), *_HOMES})
