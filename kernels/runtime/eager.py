"""Calls that bypass torch.library's dispatcher, if nothing there needs to see them.

An operator of torch.library costs the host ten times as much as its body. Compilers, exports,
functorch and modes need the operator; a plain eager call runs the body itself, with the same bits.
The parts of torch used here are not public: in a version without them, calls use the operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Callable, Optional

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._device import DeviceContext

from .arguments import may_be_dual
from .replay import Repeated, watching

_PLAIN = frozenset({Tensor, Parameter, type(None), bool, int, float, str, torch.dtype})


def _found(*names: str) -> Optional[list[Any]]:
    values = [getattr(torch._C, name, None) for name in names]
    return None if None in values else values


_questions = _found(
    "_len_torch_dispatch_stack",
    "_len_torch_function_stack",
    "_are_functorch_transforms_active",
    "_get_tracing_state",
    "_get_function_stack_at",
)
_is_wrapped: Callable[[Tensor], bool] = getattr(
    getattr(torch._C, "_functorch", None), "is_functorch_wrapped_tensor", lambda _: False
)
# Without it, bodies cannot run as torch.library runs them.
_below_autograd: Any = getattr(torch._C, "_AutoDispatchBelowAutograd", None)

# What Dynamo does with new frames, None where it looks at none, as in code that it has compiled.
_looks: Any = getattr(
    getattr(getattr(torch._C, "_dynamo", None), "eval_frame", None), "get_eval_frame_callback", None
)


def quiet() -> bool:
    """Whether only autograd needs to see the calls made now."""
    if torch.compiler.is_compiling() or _questions is None or _below_autograd is None:
        return False
    modes, functions, transforms, tracing, function = _questions
    if modes() or transforms() or tracing() is not None or may_be_dual():
        return False
    count = functions()
    # `torch.set_default_device` is such a mode; it only looks at calls that make tensors.
    return count == 0 or (count == 1 and type(function(0)) is DeviceContext)


def undisturbed(*arguments: Any) -> bool:
    """Whether only autograd needs to see a call with these arguments."""
    return quiet() and plain(*arguments)


def plain(*arguments: Any) -> bool:
    """Whether these are values and tensors that bodies take: no tensor subclasses, no symbols."""
    for value in arguments:
        kind = type(value)
        if kind not in _PLAIN:
            return False
        if (kind is Tensor or kind is Parameter) and _is_odd(value):
            return False
    return True


def _is_odd(tensor: Tensor) -> bool:
    """Whether its memory cannot be read, or not directly; autograd and functorch leave some."""
    return tensor.is_meta or tensor.is_neg() or tensor._is_zerotensor() or _is_wrapped(tensor)


class Direct:
    """An operator of torch.library; a call runs its body if nothing else needs to see the call.

    `changes`: positions of the arguments that it writes.
    """

    def __init__(self, operator: Any, changes: tuple[int, ...] = ()) -> None:
        self.operator = operator
        self.changes = changes
        body: Optional[Callable[..., Any]] = getattr(operator, "_init_fn", None)
        self._body = None if body is None else Repeated(body)
        if self._body is not None:
            _implement(operator, self._body)
            _shorten(operator, self)

    def __call__(self, *arguments: Any) -> Any:
        if self._body is None:
            return self.operator(*arguments)
        if watching():
            return self._body.body(*arguments)
        # Where autograd records, the operator refuses second derivatives.
        if recorded(*arguments) or not quiet():
            return self.operator(*arguments)
        again = self.again(*arguments)
        if again is None and not plain(*arguments):
            return self.operator(*arguments)
        return self.body(*arguments) if again is None else again()

    def again(self, *arguments: Any) -> Optional[Callable[[], Any]]:
        """`Repeated.again` of its body, for calls that are `quiet`."""
        if self._body is None:
            return None
        call = self._body.again(*arguments)
        if call is not None:
            changed([arguments[place] for place in self.changes])
        return call

    def body(self, *arguments: Any) -> Any:
        """Its result, below autograd; for calls that are `undisturbed`."""
        assert self._body is not None
        made = self._body(*arguments)
        changed([arguments[place] for place in self.changes])
        return made


def _implement(operator: Any, body: Callable[..., Any]) -> None:
    """Let compiled code, too, run the body without torch.library's wrapper around each call.

    The wrapper looks for results that share memory, which tests cover, and keeps Dynamo out, which
    remains so.
    """
    name = getattr(operator, "_qualname", None)
    disable = getattr(torch, "_disable_dynamo", None)
    if name is not None and disable is not None:
        torch.library.impl(name, ("cpu", "cuda"), disable(lambda *arguments: body(*arguments)))


class _Shortcut:
    """Stands for the dispatcher where compiled code calls an operator, and repeats known launches.

    Compiled code has dealt with gradients and changes already. The dispatcher would ask Python
    functions of torch.library about them, which takes longer than the launches.
    """

    __slots__ = ("_direct", "_dispatch", "_hash")

    def __init__(self, direct: Direct, dispatch: Callable[..., Any]) -> None:
        self._direct, self._dispatch = direct, dispatch
        self._hash = hash(dispatch)  # the operator's, which torch has used already

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if not named and _looks() is None and not recorded(*arguments) and quiet():
            again = self._direct.again(*arguments)
            if again is not None:
                return again()
        return self._dispatch(*arguments, **named)

    def __hash__(self) -> int:
        return self._hash


def _shorten(operator: Any, direct: Direct) -> None:
    overload = getattr(operator, "_opoverload", None)
    dispatch = getattr(overload, "_op", None)
    if overload is not None and dispatch is not None and _looks is not None:
        overload._op = _Shortcut(direct, dispatch)


def changed(tensors: Sequence[Optional[Tensor]]) -> None:
    """Count that these were written, for code that saved them."""
    torch.autograd.graph.increment_version([t for t in tensors if t is not None])


def applied(function: Any) -> Callable[..., Any]:
    """`apply` of an autograd.Function without its functorch check, for calls that are `quiet`."""
    return super(torch.autograd.Function, function).apply  # type: ignore[no-any-return, misc]


def recorded(*arguments: Any) -> bool:
    """Whether autograd would record a call, also one whose arguments were not checked yet."""
    if torch.is_grad_enabled():
        for value in arguments:
            if isinstance(value, Tensor) and value.requires_grad:
                return True
    return False
