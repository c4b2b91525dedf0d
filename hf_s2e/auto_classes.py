"""Makes transformers' Auto classes and `pipeline` know this package, without importing transformers before its user.

Each of their modules gets its entries when it is imported, or at once where it has been.
"""

import importlib
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


def _configuration(auto: ModuleType) -> None:
    config = _ours("model.configuration_s2e").S2EConfig
    auto.AutoConfig.register(config.model_type, config, exist_ok=True)


def _feature_extractor(auto: ModuleType) -> None:
    config = _ours("model.configuration_s2e").S2EConfig
    auto.AutoFeatureExtractor.register(config, _ours("model.feature_extraction_s2e").S2EFeatureExtractor, exist_ok=True)


def _models(auto: ModuleType) -> None:
    config, models = _ours("model.configuration_s2e").S2EConfig, _ours("model.modeling_s2e")
    auto.AutoModel.register(config, models.S2EModel, exist_ok=True)
    auto.AutoModelForAudioClassification.register(config, models.S2EForAudioClassification, exist_ok=True)


def _task(_: ModuleType) -> None:
    _ours("pipeline")  # which adds its task itself


ENTRIES: dict[str, Callable[[ModuleType], None]] = {
    "transformers.models.auto.configuration_auto": _configuration,
    "transformers.models.auto.feature_extraction_auto": _feature_extractor,
    "transformers.models.auto.modeling_auto": _models,
    "transformers.pipelines": _task,
}


def _ours(module: str) -> ModuleType:
    return importlib.import_module(f".{module}", __package__)


class _AfterImport(MetaPathFinder):
    """Finds the modules of `ENTRIES` as Python would, and adds to each when it has been executed."""

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name in ENTRIES else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_add(module: ModuleType) -> None:
            execute(module)
            ENTRIES[name](module)

        spec.loader.exec_module = execute_and_add
        return spec


def register() -> None:
    """Add to what is imported already, and watch for the rest."""
    for name, add in ENTRIES.items():
        if name in sys.modules:
            add(sys.modules[name])
    if not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())
