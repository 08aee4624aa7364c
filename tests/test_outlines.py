"""Outlines: what a template says around texts that it only copies, and that it does no more."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from families import FAMILIES
from mlx_promptcache.outlines import Copy, Outline, outlines
from mlx_promptcache.templates import Template
from mlx_promptcache.tokenizer_trial import OUTLINED

if TYPE_CHECKING:
    from collections.abc import Sequence

SPECIALS = {"bos_token": "<s>", "eos_token": "</s>"}
VARIABLES = {"enable_thinking": False}

COPIES = {
    "as it is": "{{ messages[0].content }}",
    "between texts": "{{ '<' + messages[0]['content'] + '>' }}",
    "by a name": "{% set text = messages[0].content %}{{ text }}{{ text }}",
    "by a block": "{% set text %}a{{ messages[0].content }}b{% endset %}{{ text }}",
    "by a namespace": "{% set ns = namespace(a='') %}{% for m in messages %}"
    "{% set ns.a = ns.a + m.content %}{% endfor %}{{ ns.a }}",
    "by a macro": "{% macro said(text) %}[{{ text }}]{% endmacro %}{{ said(messages[0].content) }}",
    "by a call": "{% macro said() %}[{{ caller() }}]{% endmacro %}"
    "{% call said() %}{{ messages[0].content }}{% endcall %}",
    "by get": "{{ messages[0].get('content') }}",
    "in a loop": "{% for m in messages %}{{ loop.index }}{{ m.role }}{{ m.content }}{% endfor %}",
    "in a generation": "{% generation %}{{ messages[0].content }}{% endgeneration %}",
    "trimmed": "{{ ' ' + messages[0].content | trim + ' ' }}",
    "trimmed by its method": "{{ messages[0].content.strip() }}{{ messages[0].content }}",
    "trimmed twice": "{{ messages[0].content.strip() | trim }}",
    "if it is a text": "{% if messages[0].content is string %}{{ messages[0].content }}"
    "{% else %}{{ messages[0].content[0] }}{% endif %}",
    "if it is none of the others": "{% set c = messages[0].content %}{% if c is defined and c is "
    "iterable and c is sequence and c is not none and c is not mapping and c is not number and c "
    "is not boolean and c is not undefined %}{{ c }}{% endif %}",
    "with what is not there": "{{ messages[0].content }}{{ tools }}{{ nothing }}{{ 1 + 1 }}",
    "by variables": "{{ bos_token }}{{ messages[-1].content }}{{ enable_thinking }}"
    "{% if add_generation_prompt %}a{% endif %}{{ messages | length }}",
    "the first": "{{ (messages | first).content }}{{ (messages | list | last).content }}",
    "none": "{% if messages is iterable %}{{ messages[0].role | upper }}{% endif %}",
}
LOOKS = {
    "letters": "{{ messages[0].content | upper }}",
    "whether there is any": "{% if messages[0].content %}a{% endif %}",
    "whether there is none": "{{ messages[0].content or 'a' }}",
    "its length": "{{ messages[0].content | length }}",
    "its beginning": "{{ messages[0].content.startswith('a') }}",
    "its first letter": "{{ messages[0].content[0] }}",
    "a part": "{{ messages[0].content[:3] }}",
    "each letter": "{% for c in messages[0].content %}{{ c }}{% endfor %}",
    "what is in it": "{{ 'a' in messages[0].content }}",
    "what it is in": "{{ messages[0].content in ['a'] }}",
    "what it is in, by a test": "{{ messages[0].content is in ['a'] }}",
    "what it is": "{{ messages[0].content == 'a' }}",
    "what it is not": "{{ messages[0].content != 'a' }}",
    "what comes first": "{{ messages[0].content < 'a' }}",
    "what it is the same as": "{{ messages[0].content is sameas 'a' }}",
    "whether it is upper": "{{ messages[0].content is upper }}",
    "what it has": "{{ messages[0].content.nothing is defined }}",
    "its hash": "{{ {messages[0].content: 1} | length }}",
    "by a form": "{{ '%s' % messages[0].content }}",
    "by another form": "{{ '{}'.format(messages[0].content) }}",
    "as a form": "{{ messages[0].content % 1 }}",
    "beside others": "{{ messages[0].content ~ 'a' }}",
    "twice": "{{ messages[0].content * 2 }}",
    "with a number": "{{ messages[0].content + 1 }}",
    "whether it ends with a letter": "{{ messages[0].content.strip('a') }}",
    "which letters are trimmed": "{{ messages[0].content | trim('a') }}",
    "trimmed with others": "{{ (messages[0].content + ' ') | trim }}",
    "trimmed with others, by its method": "{{ (' ' + messages[0].content).strip() }}",
    "as JSON": "{{ messages | tojson }}",
    "all messages": "{{ messages }}",
    "one message": "{{ messages[0] }}",
    "one after the other": "{{ messages | map(attribute='content') | join }}",
    "those with a text": "{{ messages | selectattr('content') | list | length }}",
    "in order": "{{ messages | sort(attribute='content') | length }}",
    "in groups": "{{ messages | groupby('content') | length }}",
    "the largest": "{{ (messages | max(attribute='content')).role }}",
    "as a number": "{{ messages[0].content | int }}",
    "by a default": "{{ messages[0].content | default('a', true) }}",
    "what is replaced": "{{ messages[0].content.replace('a', 'b') }}",
    "the time": "{{ strftime_now('%Y') }}{{ messages[0].content }}",
    "chance": "{{ ['a', 'b'] | random }}{{ messages[0].content }}",
    "much ado": "{{ lipsum() }}{{ messages[0].content }}",
    "nothing at all": "{{ raise_exception('no') }}",
    "what is no template": "{% if %}",
}


def chat(roles: Sequence[str], texts: Sequence[str]) -> list[dict[str, Any]]:
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]


def outlined(source: str, roles: Sequence[str] = ("user",), *, answer: bool = True) -> Any:
    found = outlines(source, SPECIALS, [(roles, answer)], VARIABLES)
    return found[0] if found else None


def rendered(source: str, messages: list[dict[str, Any]], *, answer: bool = True) -> str:
    return Template(source)(messages, {**SPECIALS, **VARIABLES}, answer=answer, goes_on=False)


texts = st.text(max_size=8) | st.sampled_from(
    ["", " ", "\n a\t", "\u00a0a\u2028", "{{ 1 }}", "{% if %}", "%s", "{}", "<|im_end|>", "\x00"]
)


@pytest.mark.parametrize("how", COPIES)
@settings(derandomize=True, deadline=None, max_examples=25)
@given(said=st.lists(texts, min_size=2, max_size=2))
def test_around_what_is_only_copied_a_template_says_the_same(how: str, said: list[str]) -> None:
    for roles in OUTLINED:
        found = outlined(COPIES[how], roles)
        assert found is not None
        messages = chat(roles, said[: len(roles)])
        assert found.text(messages) == rendered(COPIES[how], messages)


@pytest.mark.parametrize("what", LOOKS)
def test_what_looks_at_a_text_or_says_something_else_each_time_has_no_outline(what: str) -> None:
    for roles in OUTLINED:
        assert outlined(LOOKS[what], roles) is None


@pytest.mark.parametrize("name", FAMILIES)
@settings(derandomize=True, deadline=None, max_examples=25)
@given(said=st.lists(texts, min_size=2, max_size=2))
def test_the_outlines_of_families_say_what_their_templates_say(name: str, said: list[str]) -> None:
    source = FAMILIES[name].template
    for roles in OUTLINED if source is not None else ():
        for answer in (True, False):
            assert source is not None
            found = outlined(source, roles, answer=answer)
            messages = chat(roles, said[: len(roles)])
            if found is not None:
                assert found.text(messages) == rendered(source, messages, answer=answer)


def test_most_families_have_outlines() -> None:
    templates = {name: family.template for name, family in FAMILIES.items() if family.template}
    having = {name for name, source in templates.items() if outlined(source) is not None}
    assert {"chatml", "llama3"} <= having
    assert 2 * len(having) > len(templates)


# When an outline serves


CHATML = FAMILIES["chatml"].template or ""


def test_an_outline_serves_messages_of_its_roles_and_nothing_else() -> None:
    found = outlined(CHATML)
    hello = chat(["user"], ["Hello"])
    assert found.serves(hello, VARIABLES, answer=True)
    others: list[Any] = [
        chat(["system"], ["Hello"]),
        chat(["user", "user"], ["Hello", "Hello"]),
        [],
        [{"content": "Hello", "role": "user"}],  # a template may ask for the order
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": ["Hello"]}],
        [{"role": "user", "content": "Hello", "thinking": "Hm"}],
        [{"role": ["user"], "content": "Hello"}],
    ]
    assert not any(found.serves(messages, VARIABLES, answer=True) for messages in others)
    assert not found.serves(hello, VARIABLES, answer=False)
    for variables in ({}, {"enable_thinking": 0}, {"enable_thinking": True}, {**VARIABLES, "a": 1}):
        assert not found.serves(hello, variables, answer=True)


# As it is kept


def test_an_outline_comes_back_from_json() -> None:
    found = outlined("{{ 'a' + messages[0].content | trim }}{{ messages[0].content }}")
    assert found.parts == ["a", Copy(0, trimmed=True), Copy(0)]
    assert Outline.from_json(json.loads(json.dumps(found))) == found


@pytest.mark.parametrize(
    "value",
    [
        None, [], "abcd", {}, [["user"], True, {}], [["user"], True, {}, [], 1],
        ["user", True, {}, []], [[1], True, {}, []], [["user"], 1, {}, []],
        [["user"], True, [], []], [["user"], True, {}, "a"], [["user"], True, {}, [1]],
        [["user"], True, {}, [[1, False]]], [["user"], True, {}, [[-1, False]]],
        [["user"], True, {}, [[True, False]]], [["user"], True, {}, [[0, 1]]],
        [["user"], True, {}, [[0]]], [["user"], True, {}, [[0, False, 1]]],
        [["user"], True, {}, [None]],
    ],
    ids=repr,
)  # fmt: skip
def test_what_is_no_outline_is_told(value: Any) -> None:
    with pytest.raises(TypeError):
        Outline.from_json(value)
