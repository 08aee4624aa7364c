"""The report: what it tells of a store, and the page that it is written as."""

from __future__ import annotations

import functools
import json
import os
import re
import webbrowser
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import processes
from mlx_promptcache import PromptCache, Runner, cli, report
from mlx_promptcache.budget import Budget
from mlx_promptcache.catalog import Catalog
from mlx_promptcache.cli.list import entry_json
from mlx_promptcache.eviction import Eviction
from mlx_promptcache.facts import Facts
from mlx_promptcache.store import BLOCKS, SNAPSHOTS, Store
from test_cli import Program, damage, one_line, program, tiny_model
from tiny import random_tokens, smallest

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["program", "tiny_model"]  # fixtures

WHEN = 1_700_000_000.0
SECRET = "the canary sang in the mine"


@functools.cache
def runner() -> Runner:
    return Runner(smallest())


def keep(cache: PromptCache, tokens: Sequence[int], name: str | None = None) -> str:
    """Store a prompt, and return the id of its snapshot."""
    return cache.save(name, Runner(runner().model, None, cache).prefill(tokens)).snapshot


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A prefix, two prompts after it, and one of their own; one has a name."""
    cache = PromptCache(tmp_path / "store", "tiny")
    prefix = random_tokens(300, seed=1, vocab=16)
    keep(cache, prefix)
    keep(cache, [*prefix, *random_tokens(20, seed=2, vocab=16)], "named")
    keep(cache, [*prefix, *random_tokens(30, seed=3, vocab=16)])
    keep(cache, random_tokens(40, seed=4, vocab=16))
    return Store(cache.directory)


def told(store: Store, **options: Any) -> dict[str, Any]:
    with store.shared():
        return report.gather(store, Budget(10**9), **options)


def test_a_report_has_the_entries_of_a_list(store: Store) -> None:
    states = told(store)["states"]
    listed = [entry_json(entry) for entry in Catalog(store).entries()]
    assert len(listed) == 4
    assert [{name: state[name] for name in listed[0]} for state in states] == listed
    assert all(state["seconds"] > 0 for state in states)


def test_the_tree_has_every_state_once_and_the_bytes_of_every_block(store: Store) -> None:
    found = told(store)
    assert sorted(i for branch in found["tree"] for i in branch["states"]) == [0, 1, 2, 3]
    sizes = sum(store.size(BLOCKS, stem) for stem in store.stems(BLOCKS))
    assert sum(branch["bytes"] for branch in found["tree"]) == sizes
    roots = [branch for branch in found["tree"] if branch["parent"] < 0]
    assert sorted(root["end"] for root in roots) == [40, 300]


def test_the_tree_is_that_of_a_list(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["list", "--cache-dir", str(store.directory), "--tree", "--json"]) == 0
    (tree,) = json.loads(capsys.readouterr().out)["trees"]
    listed: list[tuple[Any, ...]] = []
    waiting = [(-1, branch) for branch in reversed(tree["branches"])]
    while waiting:
        parent, branch = waiting.pop()
        waiting += [(len(listed), below) for below in reversed(branch["branches"])]
        states = [state["snapshot"] for state in branch["states"]]
        listed.append((parent, branch["from"], branch["to"], states))
    found = told(store)
    ids = [state["snapshot"] for state in found["states"]]
    assert len(listed) == 4
    assert listed == [
        (branch["parent"], branch["start"], branch["end"], [ids[i] for i in branch["states"]])
        for branch in found["tree"]
    ]


def test_hits_are_told_by_hour_and_by_state_and_nonsense_is_passed_over(store: Store) -> None:
    identity = told(store)["states"][0]["snapshot"]
    use = {"when": WHEN, "what": identity, "rows": 100, "seconds": 2.5}
    wrong = [
        use | {"when": -1}, use | {"when": 1e300}, use | {"rows": "many"}, use | {"seconds": True},
        use | {"seconds": float("nan")}, {"when": WHEN},
    ]  # fmt: skip
    for line in (use, use | {"when": WHEN + 1}, use | {"when": WHEN + 7200, "what": None}, *wrong):
        store.uses.note(line)
    found = told(store)
    hour = WHEN // 3600 * 3600
    assert found["hits"][:2] == [
        {"hour": hour, "hits": 2, "tokens": 200, "seconds": 5.0},
        {"hour": hour + 7200, "hits": 1, "tokens": 100, "seconds": 2.5},
    ]
    assert found["states"][0]["saved_seconds"] == 5.0
    json.dumps(found, allow_nan=False)


def test_what_goes_next_is_in_the_order_in_which_it_is_evicted(store: Store) -> None:
    found = told(store)
    plan = Eviction(Facts(store)).plan(10**12)
    rows = found["next"]
    ids = {
        kind: [row["id"] for row in rows if row["kind"] == kind] for kind in ("snapshot", "block")
    }
    assert ids["snapshot"] == [stem.rpartition("-")[2] for stem in plan.snapshots]
    assert ids["block"] == [stem.rpartition("/")[2] for stem in plan.blocks]
    assert rows[-1]["freed_bytes"] == plan.freed_on_disk == sum(row["bytes"] for row in rows)
    goes = {state["snapshot"]: state["goes"] for state in found["states"]}
    for identity, place in goes.items():
        assert place is None or rows[place]["id"] == identity
    assert [state["name"] for state in found["states"] if state["goes"] is None] == ["named"]


def test_what_is_over_the_budget_is_told(store: Store) -> None:
    with store.shared():
        found = report.gather(store, Budget(0))["budget"]
    assert found["max_bytes"] == 0
    assert found["taken_bytes"] == store.taken()
    assert found["prune"]["snapshots"] == 3
    assert found["prune"]["freed_bytes"] > 0
    assert told(store)["budget"]["prune"]["freed_bytes"] == 0


def test_damaged_states_are_told_with_the_reason(store: Store) -> None:
    stem = Catalog(store).names["named"]
    damage(store.path(SNAPSHOTS, stem))
    store.quarantine(SNAPSHOTS, next(s for s in store.stems(SNAPSHOTS) if s != stem))
    found = told(store)
    named = next(state for state in found["states"] if state["name"] == "named")
    assert named["status"] == "damaged"
    assert named["reason"]
    assert (
        found["aside"]
        == [{"file": path, "bytes": file.size} for path, file in store.set_aside().items()]
        != []
    )


def test_a_store_that_is_empty_or_not_there_is_told_as_such(tmp_path: Path) -> None:
    empty = Store(tmp_path / "none")
    found = told(empty)
    assert (found["states"], found["tree"], found["next"], found["hits"]) == ([], [], [], [])
    assert not empty.directory.exists()
    report.page(found)


# The page


def data_of(page: str) -> dict[str, Any]:
    """The JSON that stands in a page."""
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    value: dict[str, Any] = json.loads(text)
    return value


def test_nothing_in_the_data_ends_the_script_and_all_of_it_comes_back(store: Store) -> None:
    found = told(store)
    hostile = "</script><!--<script>]]>&amp;{{script}}\u2028\udcff'\""
    found["states"][0]["reason"] = found["store"] = hostile
    page = report.page(found)
    assert data_of(page) == json.loads(json.dumps(found))
    assert page.count("<script") == page.count("</script>") == 2
    assert page.count("<!--") == 0
    assert page.isascii() or "\u2028" not in page


def test_the_page_asks_for_nothing_and_takes_nothing_as_markup(store: Store) -> None:
    page = report.page(told(store))
    rest = page.replace("http://www.w3.org/2000/svg", "")  # a namespace, which nothing fetches
    for word in ("http:", "https:", "//cdn", " src=", "@import", "url(", "innerHTML", "eval("):
        assert word not in rest
    assert "{{" not in page
    assert "default-src 'none'" in page


def test_no_prompt_is_in_a_report_unless_it_is_asked_for(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "LONGEST_TEXT", 400)
    assert program("save", "few", "-p", f"{SECRET} " * 20 + "END").code == 0
    file = tmp_path / "page.html"
    for more, times in (((), 0), (("--text",), 1)):
        assert program("report", "--output", file, *more).code == 0
        assert (SECRET in file.read_text("utf-8")) == bool(times)
        assert (SECRET in program("report", "--json", *more).out) == bool(times)
    (state,) = program("report", "--json", "--text").json["states"]
    assert len(state["text"]) == 400 + len(" ... ")  # of a long one begin and end
    assert state["text"].startswith(SECRET)
    assert state["text"].endswith("END")


# The command


def test_the_page_is_written_for_its_owner_alone_in_the_place_of_an_older_one(
    program: Program, tmp_path: Path
) -> None:
    file = tmp_path / "page.html"
    assert program("report", "--output", file).code == 0  # of the empty store
    file.chmod(0o644)
    program("save", "few", "-p", SECRET)
    ended = program("report", "--output", file)
    assert (ended.code, ended.out, ended.err) == (0, f"{file}\n", "")
    assert file.stat().st_mode & 0o777 == 0o600
    assert [state["name"] for state in data_of(file.read_text("utf-8"))["states"]] == ["few"]
    assert sorted(path.name for path in tmp_path.glob("*.html")) == ["page.html"]
    assert program("report", "--output", "-").out.startswith("<!doctype html>")


def test_a_file_that_is_no_report_stays(program: Program, tmp_path: Path) -> None:
    mine = tmp_path / "notes.html"
    mine.write_text("<!doctype html>\n<title>mine</title>", "utf-8")
    assert "no report" in one_line(program("report", "--output", mine))
    assert mine.read_text("utf-8") == "<!doctype html>\n<title>mine</title>"
    mine.write_text("", "utf-8")  # as mktemp makes it
    assert program("report", "--output", mine).code == 0


def test_a_page_that_cannot_be_written_is_one_sentence(program: Program, tmp_path: Path) -> None:
    program("save", "few", "-p", SECRET)
    for file in (tmp_path / "none" / "page.html", tmp_path):
        assert "cannot be written" in one_line(program("report", "--output", file))
    assert list(tmp_path.rglob(".tmp-*")) == []


def test_open_shows_the_page_in_the_browser(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def opens(uri: str) -> bool:
        asked.append(uri)
        return len(asked) == 1

    monkeypatch.setattr(webbrowser, "open", opens)
    file = tmp_path / "a page.html"
    assert program("report", "--open", "--output", file).code == 0
    assert asked == [file.as_uri()]
    assert "no browser" in program("report", "--open", "--output", file).err
    assert program("report", "--open", "--json").code == 2


def test_a_report_reads_the_store_and_leaves_it_as_it_is(store: Store, tmp_path: Path) -> None:
    """It is written into a pipe, and not in its place: whoever may could else replace a device."""
    before, pipe = looked_at(store), tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as threads:
        page = threads.submit(pipe.read_text, "utf-8")
        assert cli.run(["report", "--cache-dir", str(store.directory), "--output", str(pipe)]) == 0
        assert page.result(60).startswith("<!")
    assert pipe.is_fifo()
    assert looked_at(store) == before


def looked_at(store: Store) -> dict[Path, os.stat_result | None]:
    """All that is there. Looking into a directory may set its atime: of those only the names."""
    return {p: p.stat() if p.is_file() else None for p in store.directory.rglob("*")}


def test_a_report_needs_no_model(store: Store, tmp_path: Path) -> None:
    ended = processes.run("report", "--cache-dir", store.directory, "--json")
    assert len(ended.json["states"]) == 4
