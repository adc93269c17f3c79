"""Names of the operators in torch's registry: one namespace per copy of this package."""

from __future__ import annotations

try:
    from ._ops import add_op_namespace_prefix  # type: ignore[import-not-found]
except ImportError:
    # `_ops` exists only in a packaged build, which generates it. Otherwise the package's own name
    # is used, not a constant: with a constant, a second copy of this folder would silently replace
    # the first one's operators.
    _NAMESPACE = (__package__ or "kernels").replace(".", "_")

    def add_op_namespace_prefix(name: str) -> str:
        """Full operator name, "namespace::name", for `torch.library`."""
        return f"{_NAMESPACE}::{name}"


__all__ = ["add_op_namespace_prefix"]
