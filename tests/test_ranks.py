"""Ranks: processes that run one model together start where all of them stopped, or none does."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import launched
import tiny
from mlx_promptcache import PromptCache, Runner, checkpoint
from mlx_promptcache.batch import Batch
from mlx_promptcache.conversation import Conversation
from mlx_promptcache.errors import ModelError, RankError
from mlx_promptcache.fingerprint import Fingerprint
from mlx_promptcache.ranks import FAILED, WAIT, Ranks
from mlx_promptcache.store import BLOCKS

LENGTH = 600  # of a prompt: two passes, three blocks
KINDS = {"tensor": "plain", "pipeline": "deep"}
FIRST = [
    ["start", LENGTH], ["keep"], ["steps", 5], ["save", "so far"], ["state"], ["steps", 4],
    ["state"],
]  # fmt: skip
AGAIN = [["load", "so far"], ["state"], ["steps", 4], ["state"], ["start", LENGTH], ["start", 550]]


def played(
    size: int, strategy: str, kind: str, store: Path | str, deeds: list[Any], **more: Any
) -> list[list[Any]]:
    """What came of the deeds, by rank; `more` adds to the environment."""
    script = Path(launched.TESTS, "rank.py")
    with launched.started(size, script, strategy, kind, store, json.dumps(deeds), **more) as ranks:
        results = launched.ended(ranks)
    assert not any(result.code for result in results), [result.err for result in results]
    return [json.loads(result.out) for result in results]


def of(results: list[list[Any]], deed: int, what: str = "told") -> list[Any]:
    """What came of one deed on each rank."""
    return [result[deed][what] for result in results]


def where(base: Path, strategy: str) -> str:
    """The pipeline's ranks share a store, the others have one each."""
    return f"{base}/shared" if strategy == "pipeline" else f"{base}/{{rank}}"


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[list[Any]]]]:
    """For each strategy a store that a run of two ranks has left, and what came of that run."""
    made = {}
    for strategy, kind in KINDS.items():
        base = tmp_path_factory.mktemp(strategy)
        made[strategy] = base, played(2, strategy, kind, where(base, strategy), FIRST)
    return made


First = dict[str, tuple[Path, list[list[Any]]]]
every_strategy = pytest.mark.parametrize("strategy", KINDS)


def copied(first: First, strategy: str, to: Path) -> Path:
    shutil.copytree(first[strategy][0], to / "copy")
    return to / "copy"


# In processes


@every_strategy
def test_new_processes_go_on_bit_for_bit_where_others_stopped(
    first: First, strategy: str, tmp_path: Path
) -> None:
    base, straight = copied(first, strategy, tmp_path), first[strategy][1]
    again = played(2, strategy, KINDS[strategy], where(base, strategy), AGAIN)
    assert of(again, 1) == of(straight, 4)
    assert of(again, 2) == of(straight, 5)
    assert of(again, 3) == of(straight, 6)
    assert of(again, 0, "fed") == [0, 0]
    assert of(again, 4, "fed") == [0, 0]
    assert of(again, 5, "fed") == [1, 1]
    tokens = of(straight, 2) + of(straight, 5)
    assert tokens[0] == tokens[1]
    assert tokens[2] == tokens[3]


@pytest.mark.parametrize(("strategy", "kind"), [("tensor", "wide"), ("pipeline", "deep")])
def test_four_ranks_agree(strategy: str, kind: str, tmp_path: Path) -> None:
    deeds = [["start", 300], ["keep"], ["steps", 3], ["start", 300], ["steps", 3], ["start", 280]]
    results = played(4, strategy, kind, where(tmp_path, strategy), deeds)
    assert of(results, 3, "fed") == [0] * 4
    assert of(results, 2) == of(results, 4)
    assert of(results, 5, "fed") == [1] * 4


def test_ranks_on_new_machines_take_what_others_sent_to_a_remote(tmp_path: Path) -> None:
    attach = ["attach", (tmp_path / "remote").as_uri()]
    sent = [attach, ["start", 300], ["keep"], ["finish_sending"]]
    old, new = (where(tmp_path / machine, "tensor") for machine in ("old", "new"))
    # What is noted of other runs would tell that this model computes sooner than a remote answers.
    played(2, "tensor", "plain", old, sent, XDG_CACHE_HOME=f"{tmp_path}/old memo")
    again = [attach, sent[1]]
    results = played(2, "tensor", "plain", new, again, XDG_CACHE_HOME=f"{tmp_path}/new memo")
    assert of(results, 1, "fed") == [0, 0]


def test_what_one_rank_lacks_none_reuses(first: First, tmp_path: Path) -> None:
    base = copied(first, "tensor", tmp_path)
    shutil.rmtree(base / "1")
    deeds = [["load", "so far"], ["start", LENGTH], ["draw_afresh", 20, 5]]
    deeds += [["skew", 1], ["steps", 3]]
    results = played(2, "tensor", "plain", where(base, "tensor"), deeds)
    assert [result[0][0] for result in results] == ["CacheMiss", "CacheMiss"]
    assert "rank 1 of 2 does not have" in results[0][0][1]
    assert of(results, 1, "fed") == [LENGTH, LENGTH]
    assert "rank 1 of 2 can go on from 0 tokens" in results[0][1]["reason"]
    fresh, skewed = of(results, 2), of(results, 4)
    assert fresh[0] == fresh[1]  # with a key that no rank had before
    assert skewed[0] == skewed[1]  # as rank 0 draws


def test_what_one_rank_finds_damaged_none_reuses(first: First, tmp_path: Path) -> None:
    base = copied(first, "tensor", tmp_path)
    blocks = sorted((base / "1" / BLOCKS).rglob("*.safetensors"), key=_start_of_block)
    data = bytearray(blocks[1].read_bytes())
    data[-9] ^= 1  # in the rows, so that it is found when they are read
    blocks[1].write_bytes(data)
    results = played(2, "tensor", "plain", where(base, "tensor"), [["start", LENGTH]])
    assert of(results, 0, "fed") == [LENGTH - 256, LENGTH - 256]


def _start_of_block(path: Path) -> int:
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return int(json.loads(header["__metadata__"]["header"])["content"]["start"])


def test_rows_that_stand_on_rows_of_two_runs_are_none_of_a_cold_run(tmp_path: Path) -> None:
    """One rank lost its rows, and computed them again in other passes than the other rank has."""
    first, cold, mixed = (tmp_path / name for name in ("first", "cold", "mixed"))

    def digests(base: Path, *deeds: list[Any]) -> list[str]:
        results = played(2, "tensor", "plain", where(base, "tensor"), [*deeds, ["state"]])
        return of(results, len(deeds))

    digests(first, ["branch", 1])
    shutil.rmtree(first / "1")
    digests(first, ["branch", 1, "", 300], ["branch", 2])
    expected = digests(cold, ["branch", 2, "exact"])
    shutil.copytree(first / "0", mixed / "0")
    shutil.copytree(cold / "1", mixed / "1")
    assert digests(mixed, ["branch", 2, "exact"]) == expected


def test_another_split_is_a_miss_that_says_so(first: First, tmp_path: Path) -> None:
    base = copied(first, "pipeline", tmp_path)
    deeds = [["start", LENGTH], ["load", "so far"]]
    results = played(2, "tensor", "deep", base / "shared", deeds)
    assert of(results[:1], 0, "fed") == [LENGTH]
    assert "another shard of the model (pipeline, rank" in results[0][0]["reason"]
    assert "here it is tensor, rank 0 of 2" in results[0][0]["reason"]
    assert [result[1][0] for result in results] == ["CacheMiss", "CacheMiss"]


def test_a_save_that_fails_on_one_rank_names_nothing(first: First, tmp_path: Path) -> None:
    base = copied(first, "tensor", tmp_path)
    deeds = [["start", 300], ["fill_drive", 1], ["save", "new"], ["steps", 2], ["load", "new"]]
    results = played(2, "tensor", "plain", where(base, "tensor"), deeds)
    assert results[1][2] == ["StoreError", "the drive is full"]
    assert results[0][2][0] == "RankError"
    assert "rank 1 of 2 has failed" in results[0][2][1]
    assert of(results, 3)[0] == of(results, 3)[1]
    assert [result[4][0] for result in results] == ["CacheMiss", "CacheMiss"]


def test_a_rank_that_dies_in_a_save_hangs_nobody(first: First, tmp_path: Path) -> None:
    base = copied(first, "pipeline", tmp_path)
    store = where(base, "pipeline")
    deeds = [["start", LENGTH, 3], ["die_when_writing", 1], ["save", "new"]]
    script = Path(launched.TESTS, "rank.py")
    with launched.started(2, script, "pipeline", "deep", store, json.dumps(deeds)) as ranks:
        survivor, dead = launched.ended(ranks)
    assert dead.code == 9
    assert survivor.code == 0
    assert json.loads(survivor.out)[2][0] == "RankError"
    deeds = [["load", "new"], ["start", LENGTH, 3], ["load", "so far"], ["steps", 4]]
    after = played(2, "pipeline", "deep", store, deeds)
    assert [result[0][0] for result in after] == ["CacheMiss", "CacheMiss"]
    assert of(after, 1, "fed") == [LENGTH, LENGTH]
    assert of(after, 3) == of(first["pipeline"][1], 5)


def test_a_rank_that_answers_no_more_is_not_waited_for_forever(tmp_path: Path) -> None:
    script = Path(launched.TESTS, "rank.py")
    deeds = json.dumps([["sleep", 1, 100], ["start", 20]])
    began = time.monotonic()
    store = tmp_path / "store"
    waits = {0: {WAIT: "3"}, 1: {}}
    with launched.started(2, script, "tensor", "plain", store, deeds, only=waits) as ranks:
        ended = launched.ended(ranks[:1])[0]
    assert ended.code == 1
    assert "rank 0 of 2 has waited 3 seconds for the others" in ended.err
    assert time.monotonic() - began < 90


def test_a_rank_that_never_comes_is_not_waited_for_forever(tmp_path: Path) -> None:
    script = Path(launched.TESTS, "rank.py")
    waits = {0: {WAIT: "3"}, 1: {WAIT: "as long as it takes"}}  # which is an error
    arguments = (script, "tensor", "plain", tmp_path / "store", "[]")
    with launched.started(2, *arguments, only=waits) as ranks:
        began = time.monotonic()
        assert [result.code for result in launched.ended(ranks)] == [1, 1]
        assert time.monotonic() - began < 60


# From the command line


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.on_disk(tmp_path_factory.mktemp("model") / "tiny")


def test_only_the_first_rank_answers_and_a_named_state_is_resumed(model: Path) -> None:
    generate = ("generate", "-m", model, "--shard", "tensor", "-p", "one two three", "--json")
    rest = ("--temp", "1", "--seed", "3", "--quiet")
    whole = launched.run(2, *generate, "-n", "8", *rest)
    assert whole[1].out == ""
    assert whole[0].json["hit"] == "none"
    part = launched.run(2, *generate, "-n", "5", "--save-as", "talk", *rest)
    assert part[0].json["hit"] == "exact"
    load = ("load", "talk", "-m", model, "--shard", "tensor", "-n", "3", "--json")
    loaded = launched.run(2, *load)
    assert loaded[1].out == ""
    assert part[0].json["tokens"] + loaded[0].json["tokens"] == whole[0].json["tokens"]


def test_each_rank_knows_which_state_its_part_of_a_name_stood_for(model: Path) -> None:
    """Ranks share a store here, where the plain name is that of the first one's part."""
    generate = ("generate", "-m", model, "--shard", "tensor", "-n", "2", "--temp", "0")
    told = "stood for another state before"
    for text, other in (("one two", False), ("one two", False), ("else", True)):
        ranks = launched.run(2, *generate, "-p", text, "--save-as", "mine")
        assert [rank.code for rank in ranks] == [0, 0]
        assert [told in rank.err for rank in ranks] == [other, other]


def test_a_name_that_one_rank_cannot_write_is_told_by_it(model: Path, tmp_path: Path) -> None:
    (tmp_path / "names" / "dir@tensor-1-of-2").mkdir(parents=True)
    generate = ("generate", "-m", model, "--shard", "tensor", "-n", "2", "--cache-dir", tmp_path)
    ranks = launched.run(2, *generate, "-p", "one two", "--save-as", "dir")
    assert [rank.code for rank in ranks] == [1, 1]
    assert ranks[0].out.strip()  # the answer comes first
    assert "Is a directory" in ranks[1].err
    assert "rank 1 of 2 has failed, and said why" in ranks[0].err


def test_ctrl_c_on_one_rank_ends_all_after_the_same_token(model: Path) -> None:
    arguments = ("-m", "mlx_promptcache", "generate", "-m", model, "--shard", "tensor")
    more = ("-p", "to the end", "-n", "-1", "--temp", "1", "--seed", "5", "--logit-bias", "0=-100")
    with launched.started(2, *arguments, *more, "--prompt-cache-all") as ranks:
        out = ranks[0].stdout
        assert out is not None
        assert out.read(1)
        ranks[1].send_signal(signal.SIGINT)
        results = launched.ended(ranks)
    assert [result.code for result in results] == [130, 130]
    kept = PromptCache(model / "prompt_cache", "any").list()
    held = Counter(entry.tokens for entry in kept)
    assert {count % 2 for count in held.values()} == {0}  # a part of each rank's
    assert max(held) > 20


def test_nobody_reads_the_last_token_and_all_end_alike(model: Path) -> None:
    """The others do not hear of it, and make no forward call that they would not make."""
    arguments = ("-m", "mlx_promptcache", "generate", "-m", model, "--shard", "tensor")
    with launched.started(
        2, *arguments, "-p", "one two", "-n", "1", MLX_PROMPTCACHE_RANKS_WAIT="20"
    ) as ranks:
        read_no_more(ranks[0])
        results = launched.ended(ranks)
    assert [(result.code, result.err) for result in results] == [(1, ""), (0, "")]


def read_no_more(process: subprocess.Popen[str]) -> None:
    out = process.stdout
    assert out is not None
    out.close()
    process.stdout = None


def test_standard_input_without_end_is_refused(model: Path) -> None:
    results = launched.run(2, "generate", "-m", model, "--shard", "tensor", "-p", "-")
    assert [result.code for result in results] == [2, 2]
    assert "--prompt-file" in results[0].err


# One rank, and what others would say


class Group:
    """A group of two, as its first rank sees it."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 2


def ranks_that_hear(
    monkeypatch: pytest.MonkeyPatch, other: tuple[int, ...] | None = None
) -> tuple[Ranks, list[tuple[int, ...]]]:
    """Ranks whose second one says this, or the same as the first; and what the first one said."""
    ranks, said = Ranks(Group(), "tensor"), []

    def exchanged(*values: int) -> list[tuple[int, ...]]:
        row = (*values, 0, 0)
        said.append(row)
        return [row, other or row]

    monkeypatch.setattr(ranks, "_exchanged", exchanged)
    return ranks, said


def test_a_rank_that_failed_is_heard_at_any_point(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks, _ = ranks_that_hear(monkeypatch, (FAILED, 0, 0, 0))
    with pytest.raises(RankError, match="rank 1 of 2 has failed, and said why: this one was here"):
        ranks.told("here", 1)


def test_ranks_at_other_points_do_not_take_one_message_for_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ranks, _ = ranks_that_hear(monkeypatch, (12345, 1, 0, 0))
    with pytest.raises(RankError, match="not at the same point"):
        ranks.told("here", 1)


def test_a_rank_that_fails_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks, said = ranks_that_hear(monkeypatch)
    with pytest.raises(KeyError), ranks.together("outside"), ranks.together("inside"):
        raise KeyError
    assert [row[0] for row in said] == [FAILED]
    said.clear()
    with pytest.raises(RankError), ranks.together("outside"):
        raise RankError("the others know")
    assert said == []


def test_a_wish_that_does_not_come_any_more_is_a_lost_connection() -> None:
    class Lost:
        def item(self) -> int:
            raise RuntimeError("connection to a peer was lost")

    ranks: Any = Ranks(Group(), "tensor")
    ranks._wishes.append(Lost())
    with pytest.raises(RankError, match="rank 0 of 2 cannot go on"):
        ranks.hear()


def test_ranks_with_other_values_are_not_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    same, _ = ranks_that_hear(monkeypatch)
    same.same("prompt", [1, 2])
    ranks, said = ranks_that_hear(monkeypatch)
    ranks.alike("prompt", [1, 2])
    other, _ = ranks_that_hear(monkeypatch, said[0])
    with pytest.raises(RankError, match="not given the same prompt"):
        other.same("prompt", [1, 3])


def test_without_other_processes_it_is_said_how_to_start_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("MLX_RANK", "MLX_HOSTFILE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(RankError, match=r"mlx\.launch -n 2 -- mlx-promptcache"):
        Ranks.join("tensor")
    with pytest.raises(ValueError, match="tensor or pipeline"):
        Ranks.join("expert")


def test_a_model_that_cannot_be_split_is_refused() -> None:
    with pytest.raises(ModelError, match="cannot split this model by tensor"):
        Ranks(Group(), "tensor").split(tiny.recurrent())
    with pytest.raises(ModelError, match="cannot split this model by pipeline"):
        Ranks(Group(), "pipeline").split(tiny.plain())


def test_what_cannot_take_part_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ranks, "join", lambda strategy: Ranks(Group(), strategy))
    with pytest.raises(ModelError, match="adapters and draft models"):
        Runner.load(str(model), adapter_path=str(tmp_path), shard="tensor")
    whole = checkpoint.load(model, None)
    whole.weights.wait()
    with pytest.raises(ValueError, match="the whole model"):
        Runner.load(str(model), loaded=whole, shard="tensor")


def test_a_batch_is_answered_one_by_one_and_a_conversation_is_refused(model: Path) -> None:
    runner = Runner.load(str(model), use_cache=False)
    assert Batch(runner).together
    runner.ranks = Ranks(Group(), "tensor")
    assert not Batch(runner).together
    with pytest.raises(RankError, match="cannot take part in a distributed run"):
        Conversation(runner)


def test_each_rank_has_a_name_of_its_own_for_a_state() -> None:
    ranks = Ranks(Group(), "tensor")
    assert ranks.own_name("talk") == "talk"
    ranks.rank = 1
    assert ranks.own_name("talk") == "talk@tensor-1-of-2"


def test_clearing_a_name_takes_the_parts_of_all_ranks_along(tmp_path: Path) -> None:
    cache = PromptCache(tmp_path / "store", "plain")
    runner = Runner(tiny.plain(), None, cache)
    for n, name in enumerate(["talk", "talk@tensor-1-of-2", "talk@home", "other@tensor-1-of-2"]):
        cache.save(name, runner.prefill(tiny.random_tokens(20, n)), sync=False)
    assert sorted(cache.clear(["talk"]).names) == ["talk", "talk@tensor-1-of-2"]
    assert cache.clear(["other"]).names == ("other@tensor-1-of-2",)
    assert [entry.name for entry in cache.list()] == ["talk@home"]


def test_a_shard_is_another_fingerprint() -> None:
    whole = Fingerprint.of_text("model")
    shard = whole.with_shard("tensor, rank 1 of 2")
    assert shard.digest != whole.digest
    told = whole.explain(shard.parts)
    assert told == "another shard of the model (tensor, rank 1 of 2, and here it is whole)"
