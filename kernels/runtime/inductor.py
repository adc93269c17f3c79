"""How Inductor treats our operators: it calls them as they are."""

from __future__ import annotations

import contextlib
import functools
import sys
from typing import Any, Callable


def fake_of(operator: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`operator.register_fake`, of an operator that Inductor calls as it is.

    Not of the same name: the build of the kernel hub takes a decorator called register_fake for
    torch's, and asks it for the operator's full name.

    Inductor finds this out when it first meets the operator, but in torch 2.11 it then writes
    down everything that the arguments are computed from: eight times more text with every batch
    normalisation on the way, so a deep network never compiles. A fake function runs before that
    whenever Inductor compiles the operator.
    """

    def register(fake: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(fake)
        def informing(*values: Any, **named: Any) -> Any:
            _call_as_it_is(operator._opoverload)
            return fake(*values, **named)

        operator.register_fake(informing)
        return fake

    return register


def _call_as_it_is(operator: Any) -> None:
    """What Inductor does when it meets the operator, if it is loaded: we do not load it."""
    if "torch._inductor.lowering" not in sys.modules:
        return
    # These are not public: in a torch that has renamed one, Inductor finds out by itself.
    with contextlib.suppress(AttributeError, ImportError, TypeError):
        from torch._inductor import lowering  # waits for a thread that is loading it
        from torch._library.utils import get_layout_constraint_tag

        if operator not in lowering.lowerings:
            layout = lowering.tag_to_layout_constraint(get_layout_constraint_tag(operator))
            lowering.make_fallback(operator, layout, warn=False)
