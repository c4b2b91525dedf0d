"""Speech emotion recognition: one speaker-trained ResNet20, and one light residual adapter per corpus."""

from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForAudioClassification

from .adapter_files_s2e import S2EAdapterError
from .configuration_s2e import S2EConfig
from .feature_extraction_s2e import S2EFeatureExtractor, S2EFrontEnd
from .modeling_s2e import S2EForAudioClassification, S2EModel
from .pipeline import S2EPipeline  # registers the task "speech-emotion-recognition"

__version__ = "0.1.0"
__all__ = [
    "S2EAdapterError",
    "S2EConfig",
    "S2EFeatureExtractor",
    "S2EForAudioClassification",
    "S2EFrontEnd",
    "S2EModel",
    "S2EPipeline",
]

AutoConfig.register(S2EConfig.model_type, S2EConfig, exist_ok=True)
AutoModel.register(S2EConfig, S2EModel, exist_ok=True)
AutoModelForAudioClassification.register(S2EConfig, S2EForAudioClassification, exist_ok=True)
AutoFeatureExtractor.register(S2EConfig, S2EFeatureExtractor, exist_ok=True)
