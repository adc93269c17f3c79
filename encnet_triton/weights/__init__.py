"""Weight files: this project's checkpoints, those of other projects, and backbones."""

from encnet_triton.weights.backbone import convert_backbone, export_backbone, load_backbone
from encnet_triton.weights.checkpoint import CheckpointError, ModelInfo, load_model, save_model
from encnet_triton.weights.peers import convert_model, load_peer

__all__ = [
    "CheckpointError",
    "ModelInfo",
    "convert_backbone",
    "convert_model",
    "export_backbone",
    "load_backbone",
    "load_model",
    "load_peer",
    "save_model",
]
