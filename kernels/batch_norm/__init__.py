"""Batch normalisation, residual addition and ReLU: `operator.batch_norm_act`."""
