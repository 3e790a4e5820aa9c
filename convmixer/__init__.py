"""A model zoo for ConvMixer ("Patches Are All You Need?")."""

from convmixer.batch.dataset import predict_dataset
from convmixer.errors import ConvMixerError
from convmixer.factory import create_model
from convmixer.hub.checkpoints import load_checkpoint
from convmixer.hub.convert import convert_checkpoint
from convmixer.hub.publish import push_to_hub, save_pretrained
from convmixer.inference import predict
from convmixer.model import ConvMixer, accelerate
from convmixer.pyramid import FeaturePyramid
from convmixer.registry import list_models, list_pretrained, model_info
from convmixer.runtime.export import export_model
from convmixer.runtime.optimize import optimize
from convmixer.transforms import create_transform

__all__ = [
    "ConvMixer",
    "ConvMixerError",
    "FeaturePyramid",
    "accelerate",
    "convert_checkpoint",
    "create_model",
    "create_transform",
    "export_model",
    "list_models",
    "list_pretrained",
    "load_checkpoint",
    "model_info",
    "optimize",
    "predict",
    "predict_dataset",
    "push_to_hub",
    "save_pretrained",
]
