"""Why no more of a prompt is reused: one sentence, without the prompt's text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from known import model_of
from mlx_promptcache import PromptCache, Runner
from mlx_promptcache.facts import Facts
from mlx_promptcache.fingerprint import Fingerprint, KVSettings
from mlx_promptcache.passes import Plan
from mlx_promptcache.reasons import neighbour
from mlx_promptcache.store import BLOCKS, Store
from tiny import random_tokens

if TYPE_CHECKING:
    from collections.abc import Sequence

TOKENS = random_tokens(600, 1, 16)


def kept(directory: Path, kind: str = "smallest", **named: Sequence[int]) -> PromptCache:
    """A store with these prompts under these names, and a new look at it."""
    for name, tokens in named.items():
        cache = PromptCache(directory, kind)
        cache.save(name, Runner(model_of(kind), None, cache).prefill(list(tokens)), sync=False)
    return PromptCache(directory, kind)


def other(token: int) -> int:
    return (token + 1) % 16


def reason(cache: PromptCache, tokens: Sequence[int]) -> str | None:
    return cache.explain(tokens).reason


def test_what_is_stored_whole_needs_no_reason(tmp_path: Path) -> None:
    assert reason(kept(tmp_path, few=TOKENS), TOKENS) is None


@pytest.mark.parametrize("at", [3, 255, 256, 257, 599])
def test_a_prompt_that_leaves_a_state_is_told_where_and_which(at: int, tmp_path: Path) -> None:
    cache = kept(tmp_path, short=TOKENS[:2], few=TOKENS)
    prompt = [*TOKENS[:at], other(TOKENS[at]), 1, 2]
    match = cache.explain(prompt)
    assert match.position == at
    assert match.reason == f"it differs from 'few' at token {at}"
    assert cache.match(prompt).reason == f"it differs from what is stored at token {at}"


def test_of_many_states_the_one_that_agrees_for_the_longest_is_named(tmp_path: Path) -> None:
    prompt = [*TOKENS[:400], other(TOKENS[400]), other(TOKENS[401]), 3]
    cache = kept(
        tmp_path,
        early=[*TOKENS[:300], other(TOKENS[300])],
        near=[*TOKENS[:400], other(TOKENS[400]), TOKENS[401]],
        late=TOKENS,
    )
    assert reason(cache, prompt) == "it differs from 'near' at token 401"


def test_a_state_without_a_name_is_told_by_its_id(tmp_path: Path) -> None:
    cache = PromptCache(tmp_path, "smallest")
    saved = cache.keep(Runner(model_of("smallest"), None, cache).prefill(TOKENS))
    assert reason(cache, [*TOKENS[:9], other(TOKENS[9])]) == (
        f"it differs from '{saved.snapshot}' at token 9"
    )


def test_a_state_with_a_name_is_told_before_others(tmp_path: Path) -> None:
    cache = kept(tmp_path, few=TOKENS[:400])
    cache.keep(Runner(model_of("smallest"), None, cache).prefill(TOKENS))
    cache.keep(Runner(model_of("smallest"), None, cache).prefill([*TOKENS[:300], 1, 2, 3]))
    assert reason(cache, [*TOKENS[:200], other(TOKENS[200])]) == (
        "it differs from 'few' at token 200"
    )


def test_a_prompt_that_goes_on_where_a_state_ends_is_told_so(tmp_path: Path) -> None:
    cache = kept(tmp_path, few=TOKENS[:300])
    assert reason(cache, TOKENS) == "'few' ends at token 300, and what follows is not stored"


def test_a_prompt_whose_end_is_no_state_is_told_that_its_last_token_is_computed(
    tmp_path: Path,
) -> None:
    match = kept(tmp_path, few=TOKENS).explain(TOKENS[:300])
    assert (match.position, match.stored) == (299, 300)
    assert match.reason is not None
    assert "last token has to be computed again" in match.reason


@pytest.mark.parametrize(("marks", "where"), [((), "none stands there"), ((100,), "at token 100")])
def test_a_model_that_goes_on_from_snapshots_is_told_of_the_nearest(
    marks: tuple[int, ...], where: str, tmp_path: Path
) -> None:
    cache = PromptCache(tmp_path, "hybrid")
    state = Runner(model_of("hybrid"), None, cache).prefill(TOKENS, boundaries=marks)
    cache.save("few", state, sync=False)
    match = PromptCache(tmp_path, "hybrid").explain([*TOKENS[:500], other(TOKENS[500])])
    assert (match.position, match.stored) == (marks[0] if marks else 0, 500)
    assert match.reason is not None
    assert match.reason.startswith("500 tokens of it are stored, but this model can only go on")
    assert match.reason.endswith(where)


def test_runs_that_are_to_be_exact_are_told_of_the_passes(tmp_path: Path) -> None:
    cache = kept(tmp_path, few=TOKENS)
    plan = Plan("another machine", len(TOKENS), 512, ())
    told = cache.explain(TOKENS, plan=plan)
    assert told.position == 0
    assert told.reason is not None
    assert told.reason.startswith("600 tokens of it are stored, but other passes, another machine")


def test_a_damaged_file_is_the_reason(tmp_path: Path) -> None:
    cache = kept(tmp_path, few=TOKENS[:200])
    store = Store(tmp_path)
    path = store.path(BLOCKS, store.stems(BLOCKS)[0])
    path.write_bytes(path.read_bytes()[:-1])
    told = reason(cache, TOKENS[:200])
    assert told is not None
    assert told.startswith("a stored block cannot be used: it has ")


@pytest.mark.parametrize(
    ("part", "said"),
    [("weights", "other weights"), ("adapter", "another adapter"), ("salt", "another salt")],
)
def test_states_of_others_are_the_reason_where_they_begin_alike(
    part: str, said: str, tmp_path: Path
) -> None:
    parts = {"weights": "a", "adapter": "b", "salt": "c"}
    cache = PromptCache(tmp_path, Fingerprint(parts))
    cache.save("few", Runner(model_of("smallest"), None, cache).prefill(TOKENS), sync=False)
    mine = PromptCache(tmp_path, Fingerprint({**parts, part: "d"}))
    assert reason(mine, TOKENS) == f"what is stored of it was made with {said}"


def test_no_reason_repeats_the_tokens_or_names_of_another_fingerprint(tmp_path: Path) -> None:
    kept(tmp_path, secret=TOKENS)
    mine = PromptCache(tmp_path, Fingerprint.of_text("another"))
    assert "secret" not in str(reason(mine, TOKENS))


def test_the_neighbour_is_found_with_few_headers_read(tmp_path: Path) -> None:
    named = {f"n{i}": [*TOKENS[:300], i, *TOKENS[:9]] for i in range(12)}
    cache = kept(tmp_path, "smallest", **named)
    store, root = Store(tmp_path), cache.fingerprint.digest
    prompt = [*TOKENS[:300], 7, *TOKENS[:4], other(TOKENS[4])]
    near = neighbour(Facts(store), root, prompt, set())
    assert near is not None
    assert store.names.all()["n7"] == near.stem
    assert (near.agreed, near.n_past) == (305, 310)
    assert neighbour(Facts(store), "0f" * 16, prompt, set()) is None


def test_kv_settings_are_told_as_the_reason(tmp_path: Path) -> None:
    cache = PromptCache(tmp_path, "smallest")
    cache.save("few", Runner(model_of("smallest"), None, cache).prefill(TOKENS), sync=False)
    mine = PromptCache(tmp_path, "smallest", kv=KVSettings(8, 32, 0))
    assert "other KV cache settings" in str(reason(mine, TOKENS))


def test_what_is_shown_of_values_is_one_line_without_tokens_or_arrays(tmp_path: Path) -> None:
    cache = kept(tmp_path, few=[3, 1, 4, 1, 5])
    state, entry = cache.load("few"), cache.list()[0]
    match = cache.match([3, 1, 4, 1, 6])
    assert repr(state).startswith("<State of 5 tokens: 1 x ")
    assert repr(entry).startswith(f"<Entry 'few' ({entry.snapshot}): 5 tokens, ")
    assert repr(match) == "<Match of 4 tokens: it differs from what is stored at token 4>"
    for value in (state, entry, match, cache.match([3, 1, 4, 1, 5])):
        assert "\n" not in repr(value)
        assert "array" not in repr(value)
        assert "3, 1, 4" not in repr(value)
        assert len(repr(value)) < 200
