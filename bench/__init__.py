"""Measurements against what people use today; run from a checkout: ``python -m bench``."""
