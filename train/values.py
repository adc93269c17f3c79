"""Values of fields, from a recipe's TOML or from the command line."""

from __future__ import annotations

import contextlib
import difflib
import types
import typing
from typing import Any, Union

from encnet_triton.train.config import ConfigError, require


def closest(given: str, allowed: typing.Iterable[str]) -> str:
    """The end of an error about an unknown name: the nearest known one, and all of them."""
    names = list(allowed)
    near = difflib.get_close_matches(given, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{hint} Known: {', '.join(names)}" if hint else f"; known: {', '.join(names)}"


_KINDS = {int: "a whole number", float: "a number", str: "text"}


def convert(key: str, value: Any, hint: Any) -> Any:
    """Turn a TOML value or command-line text into the field's type.

    Raises:
        ConfigError: the value is of another kind.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() == "none"):
            return None
        *others, last = (a for a in arguments if a is not type(None))
        for other in others:  # bool | str: the words for true and false, or any text
            with contextlib.suppress(ConfigError):
                return convert(key, value, other)
        return convert(key, value, last)
    if origin is tuple:
        any_count = arguments[-1] is Ellipsis
        parts = value if any_count or not isinstance(value, str) else value.replace("x", ",")
        parts = parts.split(",") if isinstance(parts, str) else parts
        parts = list(parts) if isinstance(parts, list | tuple) else [parts]
        if any_count:
            arguments = arguments[:1] * len(parts)
        if len(parts) == 1:
            parts *= len(arguments)
        try:
            return tuple(convert(key, p, a) for p, a in zip(parts, arguments, strict=True))
        except ValueError:  # of one of them, or of their number
            number = _KINDS[arguments[0]].removeprefix("a ")
            many = f"{number}s joined by commas" if any_count else f"{len(arguments)} {number}s"
            raise ConfigError(f"{key} = {value!r} is not allowed; it must be {many}") from None
    if hint is bool:
        names = {"true": True, "yes": True, "on": True, "1": True}
        names |= {"false": False, "no": False, "off": False, "0": False}
        found = value if isinstance(value, bool) else names.get(str(value).lower())
        require(found is not None, key, value, "true or false")
        return found
    wrong = isinstance(value, bool) or (hint is int and isinstance(value, float))
    try:
        if wrong or (hint is str and not isinstance(value, str)):
            raise ValueError
        found = hint(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{key} = {value!r} is not allowed; it must be {_KINDS[hint]}") from None
    if hint is int:  # more than torch can hold
        require(abs(found) < 10**18, key, value, "a whole number of at most 18 digits")
    return found
