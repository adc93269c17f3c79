"""Bilinear upsampling with its loss or arg-max: `operator.upsample_cross_entropy` and others."""
