"""Encoding Layer: `operator.encode`."""
