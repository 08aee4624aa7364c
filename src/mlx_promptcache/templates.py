"""Template: a chat template that renders messages as transformers does, with jinja2 alone.

Chat templates are programs from the Hub: they run in jinja2's sandbox, see nothing but plain
values, and find the names there that `transformers.utils.chat_template_utils` gives them (5.23).
"""

from __future__ import annotations

import datetime
import json
from typing import TYPE_CHECKING, Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from jinja2.parser import Parser

REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names under which messages hold what was thought; templates read the first or the second."""
END = "CONTINUE_FINAL_MESSAGE_TAG "
"""Marks where the last message ends; the same as in transformers, so that what a template does with
its end, it does here."""


class Template:
    """A chat template, compiled once.

    Raises:
        TemplateError: it is no template.
    """

    def __init__(self, source: str, sandbox: Sandbox | None = None) -> None:
        self._source = source
        self._compiled = (sandbox or Sandbox()).from_string(source)

    def __call__(
        self,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any],
        *,
        answer: bool,
        goes_on: bool,
    ) -> str:
        """The text of the messages: with `answer` up to where an answer begins, with `goes_on` only
        to where the last message ends.

        Raises:
            ValueError: the last message cannot be gone on with.
            TemplateError: the template refuses the messages.
        """
        if not messages:
            raise ValueError("there are no messages to render")
        if answer and goes_on:
            raise ValueError("a message that goes on is followed by no answer")
        chat = [_aliased({k: v for k, v in m.items() if v is not None}) for m in messages]
        last = ""
        if goes_on:
            if "content" not in self._source:
                raise ValueError("the template knows no content to go on with")
            chat[-1], last = _marked(chat[-1])
        text: str = self._compiled.render(
            messages=chat, tools=None, documents=None, add_generation_prompt=answer, **variables
        )
        return _up_to_mark(text, last) if goes_on else text


def _aliased(message: dict[str, Any]) -> dict[str, Any]:
    thought = next((message[key] for key in REASONING if message.get(key) is not None), None)
    if thought is None:
        return message
    return {"thinking": thought, **message, "reasoning_content": thought}


def _marked(message: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """A message whose text ends with the mark, and its text without."""
    content = message.get("content")
    if content is None:
        raise ValueError("the last message has no text to go on with")
    if not isinstance(content, (list, tuple)):
        return {**message, "content": content + END}, content
    at = next((i for i in reversed(range(len(content))) if "text" in content[i]), None)
    if at is None:
        raise ValueError("the last message has no text to go on with")
    text: str = content[at]["text"]
    parts = [*content[:at], {**content[at], "text": text + END}, *content[at + 1 :]]
    return {**message, "content": type(content)(parts)}, text


def _up_to_mark(text: str, last: str) -> str:
    mark = END.strip()
    if last.strip() not in text or mark not in text:
        raise ValueError("the last message does not appear in what the template renders")
    at = text.rindex(mark)
    whole = text[at : at + len(END)] == END
    return text[:at] if whole else text[:at].rstrip()  # what trims the message, trims the mark


class Sandbox(ImmutableSandboxedEnvironment):
    """What templates run in."""

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        self.filters["tojson"] = _to_json
        self.globals.update(
            raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_Dict(),
            namespace=_Namespace,
        )  # fmt: skip


class _Generation(Extension):
    """`{% generation %}` marks what a model says, for training: here it is only what it holds, with
    names of its own inside.
    """

    tags = {"generation"}  # noqa: RUF012 - as jinja2 has it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_said"), [], [], body).set_lineno(line)

    def _said(self, caller: Callable[[], str]) -> str:
        return caller()


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _to_json(  # jinja2's own escapes HTML
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class _Dict:
    """`dict`, of which a template can only make some: the class itself would let it out."""

    def __call__(self, *args: Any, **items: Any) -> dict[Any, Any]:
        return dict(*args, **items)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """A dict with these keys."""
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """jinja2's namespace, without names that begin with an underscore."""

    def __init__(*args: Any, **items: Any) -> None:
        given = dict(*args[1:], **items)
        for name in given:
            _check_name(name)
        Namespace.__init__(args[0], given)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a chat template may not set {name!r}")
