"""What a task is to the rest of the trainer: the fields it reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from encnet_triton.train.config import Config, ConfigError, require


class Task:
    """One kind of training.

    Attributes:
        datasets: names of the data sets it can be trained on.
        fixed: fields that it does not read, with the values that say what it does in any case.
    """

    datasets: ClassVar[tuple[str, ...]]
    fixed: ClassVar[Mapping[str, Any]] = {}

    @classmethod
    def reads(cls, config: Config) -> frozenset[str]:
        """Names of the fields that change something for this configuration's network."""
        raise NotImplementedError

    @classmethod
    def refuse_unread(cls, config: Config, given: Iterable[str]) -> None:
        """Refuse a field that somebody gave and nobody would read.

        Raises:
            ConfigError: names the fields.
        """
        unread = sorted(set(given) - cls.reads(config))
        free = [name for name in unread if name not in cls.fixed]
        if free:
            raise ConfigError(
                f"the training of {config.model.model} does not read {', '.join(free)}; "
                f"leave {'it' if len(free) == 1 else 'them'} out"
            )
        for name in unread:
            value, kept = config.value(name), cls.fixed[name]
            require(value == kept, name, value, f"{kept} for {config.model.model}")
