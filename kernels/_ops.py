"""Names of the operators in torch's registry: one namespace per copy of this package.

The build of the kernel hub makes a file of this name (see hub/stage.py), and other modules use this
function as they would use that one's: imported without an alternative, and not wrapped.
"""

from __future__ import annotations

# Not a constant: with one, a second copy of this folder would silently replace the first one's
# operators.
_NAMESPACE = __package__.replace(".", "_")


def add_op_namespace_prefix(op_name: str) -> str:
    """Full operator name, "namespace::name", for `torch.library`."""
    return f"{_NAMESPACE}::{op_name}"
