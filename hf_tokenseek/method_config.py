"""What the configs of all methods share: reading them from YAML, JSON, a command line or code, and checking them."""

import json
from collections.abc import Iterable
from typing import Any, ClassVar

_WORDS = {"true": True, "on": True, "false": None, "none": None, "null": None, "off": None}


class MethodConfig:
    """
    Base of the methods' dataclasses.

    Attributes:
        field_name (`str`): the field of [`TokenSeekArguments`] that holds it.
        example (`str`): what it may look like on a command line.
    """

    field_name: ClassVar[str]
    example: ClassVar[str]

    @classmethod
    def parse(cls, value: "MethodConfig | dict | str | bool | None") -> "MethodConfig | None":
        """
        Reads the config from what YAML, a command line or code may hold.

        Args:
            value (`MethodConfig`, `dict`, `str`, `bool`, *optional*):
                A config, its fields, JSON of its fields, `True` for the defaults; `False`, `None` or the words
                `"false"`, `"none"`, `"null"`, `"off"` turn the method off.

        Raises:
            ValueError: the value is of another kind, or names an unknown field.
        """
        if isinstance(value, str):
            value = cls._from_text(value)
        if value is None or value is False or isinstance(value, cls):
            return value or None
        if value is True:
            return cls()
        if isinstance(value, dict):
            known = list(cls.__dataclass_fields__)
            unknown = sorted(set(value) - set(known))
            if unknown:
                raise ValueError(f"`{cls.field_name}` has unknown fields {unknown}. Allowed: {known}.")
            return cls(**value)
        raise ValueError(
            f"`{cls.field_name}` should be a {cls.__name__}, dict, JSON, bool or None, got {type(value).__name__}."
        )

    @classmethod
    def _from_text(cls, text: str) -> Any:
        lowered = text.strip().lower()
        try:
            return _WORDS[lowered] if lowered in _WORDS else json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"`{cls.field_name}` should be JSON such as '{cls.example}', true or false, got {text!r} ({error})."
            ) from error

    def _check_kind(self, kind: type, word: str, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            optional = self.__dataclass_fields__[name].default is None
            if (not isinstance(value, kind) or isinstance(value, bool)) and not (optional and value is None):
                raise ValueError(f"`{name}` should be a {word}, got {value!r}.")

    def _check_allowed(self, name: str, allowed: Iterable[str]) -> None:
        if getattr(self, name) not in allowed:
            raise ValueError(f"`{name}` should be one of {list(allowed)}, got {getattr(self, name)!r}.")
