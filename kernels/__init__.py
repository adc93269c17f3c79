"""Operators of EncNet: encoding, batch normalisation with activation, upsampling with its loss.

Import them as `encnet_triton.kernels`. Each is an ordinary function to autograd, AMP, DDP and
`torch.compile`.
"""

if __name__ == "kernels":
    # The root of a checkout is on sys.path. If another package has this name, that one is meant.
    import sys
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec
    from os.path import dirname, realpath

    _root = realpath(dirname(dirname(__file__)))
    _found = PathFinder.find_spec(__name__, [p for p in sys.path if realpath(p) != _root])
    if _found is None or _found.loader is None:
        # As where nothing has the name: who can do without that package goes on.
        raise ModuleNotFoundError(
            "This folder is the package encnet_triton.kernels: import it under that name, from the "
            "folder above or an installed encnet_triton, or copy it into a package of your own.",
            name=__name__,
        )
    sys.modules[__name__] = _other = module_from_spec(_found)
    _found.loader.exec_module(_other)
else:
    from . import layers
    from .batch_norm.checks import ResidualNorm
    from .batch_norm.operator import batch_norm_act, batch_norm_act_forked
    from .encoding.operator import encode
    from .upsampling.operator import upsample_argmax, upsample_cross_entropy

__all__ = [
    "ResidualNorm",
    "batch_norm_act",
    "batch_norm_act_forked",
    "encode",
    "layers",
    "upsample_argmax",
    "upsample_cross_entropy",
]
