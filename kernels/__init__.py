"""Operators of EncNet: encoding, batch normalisation with activation, upsampling with its loss.

Import them as `encnet_triton.kernels`. Each is an ordinary function to autograd, AMP, DDP and
`torch.compile`.
"""

if __name__ == "kernels":
    raise ImportError(
        "This folder is the package encnet_triton.kernels: "
        "import it under that name, from the folder above or an installed encnet_triton."
    )

from .batch_norm import batch_norm_act
from .encode import encode
from .upsample_loss import upsample_argmax, upsample_cross_entropy

__all__ = ["batch_norm_act", "encode", "upsample_argmax", "upsample_cross_entropy"]
