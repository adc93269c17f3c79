"""Training of segmentation networks: ``python -m encnet_triton.train``, alone or under torchrun."""
