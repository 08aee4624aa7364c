"""States that are handed over to mlx-lm, and taken over from it, in its own prompt-cache files."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_promptcache import mlx_lm_file
from mlx_promptcache.errors import PromptError, UnsupportedLayer
from mlx_promptcache.exporter import Exported
from mlx_promptcache.importer import reading, told_of
from mlx_promptcache.layers import capture, fill

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from mlx_promptcache.layers import Layer
    from mlx_promptcache.runner import Runner
    from mlx_promptcache.state import Origin, State

log = logging.getLogger("mlx_promptcache")

TOKENIZER_CONFIG = json.dumps({"trust_remote_code": False})  # as mlx_lm.cache_prompt's default
SAME_ROWS = 0.1  # how far the rows of one token may be from those computed here, of their length


# To mlx-lm


def hand_over(
    runner: Runner, name: str, path: Path, model: str, *, replace_file: bool = False
) -> Exported:
    """Write a stored state for `mlx_lm.generate --prompt-cache-file`; `model` is what its --model
    says. A text that `save` left open before its last tokens is computed to its end: mlx-lm goes on
    right after it.

    Raises:
        CacheMiss, UnsupportedLayer: there is no such state, or mlx-lm's files cannot hold it.
        StoreError: there is such a file, or the file system refuses.
    """
    state = runner.needed_cache.load(name)
    layers = runner.make_layers()
    fill(layers, state.contents, state.n_past, runner.kv)
    rest = _rest(runner, state)
    if rest:
        logits, _ = runner.forward(mx.array(rest)[None], layers)
        mx.eval(logits)
    metadata = {"model": model, "tokenizer_config": TOKENIZER_CONFIG}
    size = mlx_lm_file.write(path, layers, metadata, replace_file=replace_file)
    return Exported(name, "", state.n_past + len(rest), 0, size)


def _rest(runner: Runner, state: State) -> list[int]:
    """The tokens of an open text that a state stops before."""
    origin = state.origin
    if not origin.open or origin.text is None or runner.tokenizer is None:
        return []
    whole = runner.prompter.left_open(origin)
    return list(whole[state.n_past :]) if whole[: state.n_past] == state.tokens else []


# From mlx-lm


def take_over(runner: Runner, path: Path, origin: Origin) -> State:
    """The state of a file of mlx-lm's, which was made from this prompt.

    Its last token is fed again, for the logits, where all layers can forget it; then its rows must
    be about those in the file, which tells other weights and other prompts. The others cannot be
    checked.

    Raises:
        DamagedFile, ForeignFile: it is no such file, or another release of mlx-lm's.
        UnsupportedLayer: it holds something else than this model's layers after these tokens.
        PromptError: it holds another number of tokens than the prompt has.
    """
    with reading(path) as reader, told_of(path):
        contents = mlx_lm_file.read(reader.read, reader.size)
    try:
        layers = mlx_lm_file.filled(contents, runner.layer_maker, runner.kv)
        tokens = _tokens(runner, origin, mlx_lm_file.held(layers))
        state = mlx_lm_file.state_of(layers, tokens, runner.layer_maker, runner.kv)
    except UnsupportedLayer as exc:
        raise UnsupportedLayer(f"{path} cannot be imported: {exc}") from exc
    state = replace(state, origin=replace(origin, open=True), fingerprint=runner.fingerprint)
    if not runner.sliceable:
        log.warning(
            "no logits are known: layers of this model cannot forget a token, so that `load` "
            "cannot go on from this state, but longer prompts can"
        )
        return state
    return _with_logits(runner, state)


def _tokens(runner: Runner, origin: Origin, held: int | None) -> tuple[int, ...]:
    """The tokens of a prompt that mlx-lm may have been given: as its cache_prompt makes them, or
    ready to be answered, or up to where it may go on otherwise.
    """
    prompter = runner.prompter
    ways: list[tuple[int, ...]] = []
    for way in (prompter.left_open, lambda o: prompter.whole(o).tokens,
                lambda o: prompter.beginning(o).tokens):  # fmt: skip
        try:
            ways.append(way(origin))
        except PromptError:
            continue
    if not ways:
        raise PromptError("the prompt is empty: give the one that the file was made from")
    for tokens in ways:
        if held in {None, len(tokens)}:
            return tokens
    counts = " or ".join(dict.fromkeys(f"{len(tokens)}" for tokens in ways))
    raise PromptError(
        f"the file holds {held} tokens and the prompt has {counts}: give the very prompt that it "
        "was made from"
    )


def _with_logits(runner: Runner, state: State) -> State:
    n = state.n_past - 1
    layers = runner.make_layers()
    if n:
        fill(layers, [layer.cut(n) for layer in state.contents], n, runner.kv)
    logits, hidden = runner.forward(mx.array(state.tokens[n:])[None], layers)
    _check_last(state.contents, capture(layers, state.n_past))
    embedding = None if hidden is None else hidden[0, -1]
    return replace(state, logits=logits[0, -1], embedding=embedding)


def _check_last(told: Sequence[Layer], computed: Sequence[Layer]) -> None:
    """Raise UnsupportedLayer if the rows of the last token are not about those computed here."""
    for mine, theirs in zip(computed, told, strict=True):
        for name in {"keys", "values"} & mine.rows.keys() & theirs.rows.keys():
            if _distance(mine.rows[name], theirs.rows[name]) > SAME_ROWS:
                raise UnsupportedLayer(
                    "the rows of the last token in the file are not those that this model "
                    "computes: it was made with other weights, or from another prompt"
                )


def _distance(a: mx.array, b: mx.array) -> float:
    """How far the last rows are from each other, of the length of the first."""
    last, other = (rows[:, :, -1:].astype(mx.float32) for rows in (a, b))
    length = mx.sqrt(mx.sum(mx.square(last)))
    found: Any = (mx.sqrt(mx.sum(mx.square(last - other))) / mx.maximum(length, 1e-30)).item()
    return float(found) if found == found else float("inf")
