"""Calls that go round torch.library's dispatcher, where nothing would see them there.

An operator of torch.library costs the host ten times its body. Compilers, exports, functorch and
modes need it; a plain eager call does not, and gets the body itself, to the same bits. What is
asked of torch here is not public: a version that has it no more gets the operators.
"""

from __future__ import annotations

import contextlib
from typing import Any, Callable, Optional

import torch
from torch import Tensor
from torch.nn import Parameter

_PLAIN = frozenset({Tensor, Parameter, type(None), bool, int, float, str, torch.dtype})


def _found(*names: str) -> Optional[list[Any]]:
    values = [getattr(torch._C, name, None) for name in names]
    return None if None in values else values


_questions = _found(
    "_len_torch_dispatch_stack",
    "_len_torch_function_stack",
    "_are_functorch_transforms_active",
    "_get_tracing_state",
)
# What torch.library runs a body in: views and changes are not recorded.
_below_autograd: Any = getattr(torch._C, "_AutoDispatchBelowAutograd", None)


def undisturbed(*arguments: Any) -> bool:
    """Whether nothing but autograd is to know of a call with these arguments."""
    if torch.compiler.is_compiling() or _questions is None or _below_autograd is None:
        return False
    modes, functions, transforms, tracing = _questions
    if modes() or functions() or transforms() or tracing() is not None:
        return False
    for value in arguments:
        kind = type(value)
        if kind not in _PLAIN:  # another tensor than torch's own, a symbol
            return False
        if (kind is Tensor or kind is Parameter) and (value.is_meta or value.is_neg()):
            return False
    return True


class Direct:
    """An operator of torch.library; called, it is its body where nothing is to know of the call.

    `changes`: places of the arguments that it writes.
    """

    def __init__(self, operator: Any, changes: tuple[int, ...] = ()) -> None:
        self.operator = operator
        self.changes = changes
        self._body: Optional[Callable[..., Any]] = getattr(operator, "_init_fn", None)

    def __call__(self, *arguments: Any) -> Any:
        if self._body is None or _recorded(arguments) or not undisturbed(*arguments):
            return self.operator(*arguments)
        return self.body(*arguments)

    def body(self, *arguments: Any) -> Any:
        """What it computes, below autograd; for calls that are `undisturbed`."""
        assert self._body is not None
        with _below_autograd():
            made = self._body(*arguments)
        changed = [arguments[place] for place in self.changes if arguments[place] is not None]
        if changed:
            torch.autograd.graph.increment_version(changed)
        return made


def _recorded(arguments: tuple[Any, ...]) -> bool:
    """Whether autograd would record: second derivatives are the operator's to refuse."""
    if not torch.is_grad_enabled():
        return False
    return any(isinstance(value, Tensor) and value.requires_grad for value in arguments)


def below_autograd() -> contextlib.AbstractContextManager[Any]:
    """As torch.library runs the bodies of operators."""
    return _below_autograd()  # type: ignore[no-any-return]
