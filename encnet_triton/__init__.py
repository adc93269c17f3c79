"""Context Encoding for Semantic Segmentation (EncNet, CVPR 2018)."""

__version__ = "0.1.0"
