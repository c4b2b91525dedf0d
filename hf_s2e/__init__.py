"""Speech emotion recognition: one shared speaker network, and one light residual adapter per corpus.

The public names are loaded on first use, so that `import hf_s2e` costs nothing; transformers' Auto classes and
pipelines know the model as soon as both packages are imported, in whichever order.
"""

import importlib

from . import auto_classes

__version__ = "0.1.0"
_HOMES = {
    "S2EAdapterError": "model.adapter_files_s2e",
    "S2EConfig": "model.configuration_s2e",
    "S2EFeatureExtractor": "model.feature_extraction_s2e",
    "S2EForAudioClassification": "model.modeling_s2e",
    "S2EFrontEnd": "model.feature_extraction_s2e",
    "S2EModel": "model.modeling_s2e",
    "S2EPipeline": "pipeline",
}
__all__ = list(_HOMES)

auto_classes.register()


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
