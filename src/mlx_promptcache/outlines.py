"""Outlines: what a chat template puts around texts that it only copies.

Most templates do nothing with what a user says but copy it, trimmed perhaps. That is shown by
running them once on values that end the run as soon as anything else is done with them: nothing
that the template does can then depend on what they say, so around all other texts it says the same,
and neither jinja2 nor the template is needed any more. A template that does look (searches, cuts,
compares, asks whether there is anything) has no outline, and renders each chat.
"""

from __future__ import annotations

import functools
from itertools import filterfalse
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from mlx_promptcache.templates import Template

MESSAGE = ["role", "content"]  # what a message has, in this order, and nothing else


class Copy(NamedTuple):
    """A text in its place: that of a message, by its number, `trimmed` or as it is."""

    message: int
    trimmed: bool = False


class Outline(NamedTuple):
    """What a template makes of messages with these roles, whatever they say, with these variables:
    with `answer` up to where an answer begins.
    """

    roles: list[str]
    answer: bool
    variables: dict[str, Any]
    parts: list[str | Copy]

    @classmethod
    def from_json(cls, value: Any) -> Outline:
        """An outline as it was written.

        Raises:
            TypeError: it is none.
        """
        if not isinstance(value, (list, Outline)) or len(value) != len(cls._fields):
            raise TypeError("this is no outline of a template")
        roles, answer, variables, parts = value
        sound = (
            _are_texts(roles)
            and isinstance(answer, bool)
            and isinstance(variables, dict)
            and isinstance(parts, list)
        )
        if not sound:
            raise TypeError("this is no outline of a template")
        return cls(roles, answer, variables, [_part(part, len(roles)) for part in parts])

    def serves(
        self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any], *, answer: bool
    ) -> bool:
        """Whether it tells what the template makes of these messages."""
        return (
            answer is self.answer
            and [message.get("role") for message in messages] == self.roles
            and all(list(message) == MESSAGE for message in messages)
            and all(type(message["content"]) is str for message in messages)
            and _exactly(variables) == _exactly(self.variables)
        )

    def text(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """What the template makes of messages that it serves."""
        return "".join(
            part if isinstance(part, str) else _copied(messages[part.message]["content"], part)
            for part in self.parts
        )


def _copied(text: str, part: Copy) -> str:
    return text.strip() if part.trimmed else text


def _part(value: Any, messages: int) -> str | Copy:
    if isinstance(value, str):
        return value
    if not isinstance(value, (list, Copy)) or len(value) != len(Copy._fields):
        raise TypeError("this is no outline of a template")
    message, trimmed = value
    if type(message) is not int or not 0 <= message < messages or not isinstance(trimmed, bool):
        raise TypeError("this is no outline of a template")
    return Copy(message, trimmed)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _exactly(variables: Mapping[str, Any]) -> list[str]:
    """Variables that can be compared: 1 is not True."""
    return [f"{name} {value!r}" for name, value in sorted(variables.items())]


def outlines(
    source: str, specials: Mapping[str, str], chats: Iterable[tuple[Sequence[str], bool]],
    variables: Mapping[str, Any],
) -> list[Outline]:  # fmt: skip
    """The outlines of a template for chats, each told by the roles of its messages and by whether
    an answer follows; of some it has none, and some it refuses. `specials` are the special tokens,
    by the names that the template has for them.
    """
    from mlx_promptcache.templates import Template

    try:
        template = Template(source, _watching())
    except (Exception, _Looked):  # noqa: BLE001 - it is no template, or looks while it is compiled
        return []
    found = [_outline(template, specials, roles, variables, answer) for roles, answer in chats]
    return [each for each in found if each is not None]


def _outline(
    template: Template, specials: Mapping[str, str], roles: Sequence[str],
    variables: Mapping[str, Any], answer: bool,
) -> Outline | None:  # fmt: skip
    try:
        chat = [{"role": role, "content": _Text(Copy(i))} for i, role in enumerate(roles)]
        said = template(chat, {**specials, **variables}, answer=answer, goes_on=False)
    except (Exception, _Looked):  # noqa: BLE001 - templates raise what they like
        return None
    return Outline(list(roles), answer, dict(variables), list(_parts(said)))


class _Looked(BaseException):
    """Something was done with a text. Not an Exception: some of jinja2's own tests catch these."""


def _look(*_: Any, **__: Any) -> NoReturn:
    raise _Looked


class _Text:
    """A text that nobody knows: it can be put between others, and trimmed, and nothing else."""

    __slots__ = ("_parts",)

    def __init__(self, *parts: str | Copy) -> None:
        self._parts = parts

    def __add__(self, other: Any) -> _Text:
        return _joined([self, other])

    def __radd__(self, other: Any) -> _Text:
        return _joined([other, self])

    def strip(self) -> _Text:
        """The text of a message, trimmed."""
        if len(self._parts) != 1 or isinstance(self._parts[0], str):
            raise _Looked
        return _Text(self._parts[0]._replace(trimmed=True))

    __bool__ = __len__ = __iter__ = __contains__ = __getitem__ = __getattr__ = _look
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __hash__ = _look
    __str__ = __repr__ = __format__ = __mod__ = __rmod__ = __mul__ = __rmul__ = _look
    __int__ = __float__ = __index__ = __bytes__ = __reduce_ex__ = _look


def _parts(value: str | _Text) -> tuple[str | Copy, ...]:
    return value._parts if type(value) is _Text else (str(value),)


def _joined(values: Iterable[Any]) -> _Text:
    """Texts one after the other; only texts can be."""
    parts: list[str | Copy] = []
    for value in values:
        if not isinstance(value, (str, _Text)):
            raise _Looked
        for part in _parts(value):
            if isinstance(part, str) and parts and isinstance(parts[-1], str):
                parts[-1] += part
            elif part != "":
                parts.append(part)
    return _Text(*parts)


def _said(values: Iterable[Any]) -> str | _Text:
    """What a template says, of all that it puts out."""
    said = _joined(value if type(value) is _Text else str(value) for value in values)
    texts = [part for part in _parts(said) if isinstance(part, str)]
    return said if len(texts) < len(_parts(said)) else "".join(texts)


def _watching() -> Any:
    """A sandbox that leaves what is put out as it is, and where whatever could look at a text, or
    says something else the next time, ends the run.
    """
    from jinja2.nativetypes import NativeCodeGenerator

    from mlx_promptcache.templates import Sandbox

    class Watching(Sandbox):
        code_generator_class = NativeCodeGenerator
        concat = staticmethod(_said)  # type: ignore[assignment]

    watching = Watching()
    filters: Any = watching.filters.items()
    tests: Any = watching.tests.items()
    watching.filters = {
        name: _guarded(f, FILTERS.get(name), of_holders=name in OF_HOLDERS) for name, f in filters
    }
    watching.tests = {
        name: _guarded(f, TESTS.get(name), of_holders=name in TESTS) for name, f in tests
    }
    watching.filters["random"] = _look
    watching.globals.update(strftime_now=_look, lipsum=_look)
    return watching


def _of_text(told: Any) -> Callable[..., Any]:
    return lambda _value: told


def _trimmed(value: Any, *others: Any) -> Any:
    return value.strip() if not others else _look()


FILTERS: dict[str, Callable[..., Any]] = {"trim": _trimmed}
"""What filters make of a text."""
TESTS = {
    name: _of_text(told)
    for name, told in {
        "defined": True, "string": True, "iterable": True, "sequence": True, "undefined": False,
        "none": False, "mapping": False, "number": False, "boolean": False,
    }.items()
}  # fmt: skip
"""What tests say of a text, whatever it is."""
OF_HOLDERS = {"length", "count", "first", "last", "list"}
"""Filters of lists and dicts that look at nothing that is in them."""


def _guarded(
    function: Callable[..., Any], of_text: Callable[..., Any] | None, *, of_holders: bool
) -> Callable[..., Any]:
    """A filter or a test that gets no text, but says of it what it says of all. One `of_holders`
    gets lists and dicts that hold texts.
    """

    @functools.wraps(function)  # with the marks that jinja2 puts on what wants its context
    def guarded(*args: Any, **others: Any) -> Any:
        values = [*filterfalse(_is_surrounding, args), *others.values()]
        if of_text is not None and type(values[0]) is _Text:
            return of_text(*values)
        holder = of_holders and len(values) == 1 and type(values[0]) in (list, tuple, dict)
        if not holder and not all(map(_holds_none, values)):
            raise _Looked
        return function(*args, **others)

    return guarded


def _is_surrounding(value: Any) -> bool:
    """Whether it is no value, but what jinja2 passes to those who want to know where they are."""
    from jinja2 import Environment
    from jinja2.nodes import EvalContext
    from jinja2.runtime import Context

    return isinstance(value, (Environment, EvalContext, Context))


def _holds_none(value: Any) -> bool:
    """Whether there is no text in it, as far as can be seen."""
    from jinja2 import Undefined

    if type(value) in (list, tuple):
        return all(map(_holds_none, value))
    if type(value) is dict:
        return all(map(_holds_none, value.values()))
    plain = value is None or type(value) in (str, int, float, bool)
    return plain or isinstance(value, Undefined)
