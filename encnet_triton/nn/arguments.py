"""Checks of constructor arguments, with their messages in one place."""

from collections.abc import Sequence


def check_choice(argument: str, value: object, allowed: Sequence[object]) -> None:
    """Raise ValueError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        names = ", ".join(repr(item) for item in allowed)
        raise ValueError(f"{argument} is {value!r}, but must be one of {names}")


def check_integer(argument: str, value: int) -> None:
    """Raise TypeError unless ``value`` is an integer."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{argument} is {value!r}, but must be an integer")


def check_number(argument: str, value: float) -> None:
    """Raise TypeError unless ``value`` is a number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{argument} is {value!r}, but must be a number")


def check_count(argument: str, value: int, least: int = 1) -> None:
    """Raise TypeError or ValueError unless ``value`` is an integer of at least ``least``."""
    check_integer(argument, value)
    if value < least:
        raise ValueError(f"{argument} is {value}, but must be at least {least}")


def check_flags(**flags: object) -> None:
    """Raise TypeError naming the first argument that is neither true nor false."""
    for argument, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{argument} is {value!r}, but must be true or false")


def check_probability(argument: str, value: float) -> None:
    """Raise TypeError or ValueError unless ``value`` is a number in [0, 1)."""
    check_number(argument, value)
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{argument} is {value}, but must be at least 0 and less than 1")
