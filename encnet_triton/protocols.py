"""Now `encnet_triton.scoring.protocols`; imports from here stay valid."""

from encnet_triton.scoring.protocols import ProtocolScores, protocol_scores

__all__ = ["ProtocolScores", "protocol_scores"]
