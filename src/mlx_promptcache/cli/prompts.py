"""From a command's options to a prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from mlx_promptcache.errors import PromptError
from mlx_promptcache.prompt import EMPTY, Prompt, Prompter, continued
from mlx_promptcache.state import Origin

if TYPE_CHECKING:
    from mlx_promptcache.cli.choices import PromptChoice


def origin_of(choice: PromptChoice, prompter: Prompter) -> tuple[Origin, Origin | None]:
    """How the prompt is made, and how its declared prefix is, if it has one."""
    chat = choice.chat()
    if chat is not None:
        return Origin(messages=tuple(chat)), None
    template = prompter.has_template and not choice.ignore_chat_template
    if choice.system_prompt is not None and not template:
        raise PromptError(
            "--system-prompt needs a chat template, and this model has none, or it is ignored: put "
            "it into the prompt"
        )
    prefix = choice.prefix_text()
    text = choice.text()
    if not prefix and not text:
        raise PromptError(EMPTY)
    system = choice.system_prompt if template else None
    whole = Origin(prefix + text, None, system, template)
    return whole, Origin(prefix, None, system, template) if prefix and text else None


def prompt_of(choice: PromptChoice, prompter: Prompter) -> Prompt:
    """The prompt to be answered."""
    return prompter.whole(*origin_of(choice, prompter))


def continuation_of(
    choice: PromptChoice, prompter: Prompter, stored: Origin, tokens: list[int]
) -> Prompt:
    """The prompt that goes on after a stored one, rendered whole; what is stored is its prefix."""
    if choice.messages is not None or choice.system_prompt is not None:
        raise click.UsageError(
            "after a stored prompt only text can follow: --messages and --system-prompt are its own"
        )
    text = choice.prefix_text() + choice.text()
    if stored.text is None and stored.messages is None:
        following = prompter.encode_text(text, special=False) if text else []
        return Prompt((*tokens, *following), (len(tokens),))
    return prompter.whole(continued(stored, text) if text else stored, stored)
