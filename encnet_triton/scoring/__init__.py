"""Scores of a trained network, and the protocols of published ones."""

from encnet_triton.scoring.metrics import ConfusionMatrix, Scores
from encnet_triton.scoring.protocols import ProtocolScores, protocol_scores
from encnet_triton.scoring.segmentation import confusion, evaluate, score_table

__all__ = [
    "ConfusionMatrix",
    "ProtocolScores",
    "Scores",
    "confusion",
    "evaluate",
    "protocol_scores",
    "score_table",
]
