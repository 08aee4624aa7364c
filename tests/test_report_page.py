"""The page of a report in a real browser: it shows, sorts, filters, and stays small."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest

import browser
from mlx_promptcache import report
from mlx_promptcache.catalog import DAMAGED, OK, STALE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Json = dict[str, Any]
    Open = Callable[..., browser.Page]

WHEN = 1_700_000_000
HOSTILE = "</script><img src=x onerror=\"document.title='taken'\"><b>bold</b>\u202e"
COLUMNS = [  # of states, in their order, and whether a first click shows the largest first
    ("name", False), ("status", False), ("tokens", True), ("bytes", True), ("shared_bytes", True),
    ("raw_bytes", True), ("hits", True), ("saved_seconds", True), ("seconds", True),
    ("created", True), ("last_used", True), ("goes", True),
]  # fmt: skip


def state(number: int, draw: random.Random) -> Json:
    """A state of a report; no two have the same figures."""
    return {
        "name": f"state {number}",
        "snapshot": f"{number:016x}",
        "status": OK,
        "reason": None,
        "model": 0,
        **{name: draw.randrange(1, 10**6) * 2 for name, largest in COLUMNS if largest},
        "created": WHEN + draw.randrange(10**7) * 60,
    }


def made(count: int) -> Json:
    """A report on so many states: one prefix, and all the others after it."""
    draw = random.Random(count)
    states = [state(number, draw) for number in range(count)]
    for at in range(count):
        states[at]["goes"] = at if at % 3 else None
    tree = [{"parent": -1, "start": 0, "end": 600, "blocks": 3, "bytes": 5000, "states": [0]}]
    tree += [
        {"parent": 0, "start": 600, "end": 612, "blocks": 1, "bytes": 700, "states": [number]}
        for number in range(1, count)
    ]
    return {
        "store": "/a/store",
        "version": "0",
        "made": WHEN,
        "total_bytes": 10**6,
        "blocks": count,
        "models": [{"weights": "some weights"}],
        "states": states,
        "tree": tree,
        "hits": [
            {"hour": WHEN // 3600 * 3600 + 3600 * i, "hits": i, "tokens": i, "seconds": 1.5 * i}
            for i in range(1, 50)
        ],
        "written": {"2023-11-14": 1000, "2023-11-16": 3000},
        "budget": {
            "taken_bytes": 10**6, "max_bytes": 10**9, "free_bytes": 10**10, "least_free_bytes": 0,
            "prune": {"snapshots": 1, "blocks": 2, "leftovers": 0, "freed_bytes": 4096},
            "reason": None,
        },
        "next": [
            {
                "kind": "snapshot", "id": f"{number:016x}", "of": f"{number:016x}", "end": 612,
                "bytes": 4096, "freed_bytes": 4096 * (number + 1), "last_used": WHEN,
            }
            for number in range(count)
        ],
        "next_unknown": None,
        "aside": [],
    }  # fmt: skip


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser.opened() as opened:
        yield opened


@pytest.fixture
def show(chromium: Any, tmp_path: Path) -> Iterator[Open]:
    """Opens the page of a report; it must say nothing, and ask for nothing but itself."""
    pages: list[browser.Page] = []

    def opened(found: Json, scheme: str = "light") -> browser.Page:
        file = tmp_path / f"{len(pages)}.html"
        file.write_text(report.page(found), "utf-8")
        pages.append(browser.Page(chromium, file, scheme))
        return pages[-1]

    yield opened
    for page in pages:
        assert page.said == []
        assert [url.partition(":")[0] for url in page.asked] == ["file"]
        page.tab.close()


def names(page: browser.Page, host: str = "states") -> list[str]:
    return [row[0] for row in page.rows(host)]


def test_the_page_shows_every_part_of_a_report(show: Open) -> None:
    page = show(made(20))
    assert page.tab.inner_text("#sums").split()[:4] == ["states", "20", "blocks", "20"]
    assert [page.count(host) for host in ("states", "tree", "next")] == [20, 20, 20]
    assert page.tab.locator("svg").count() == 3
    total = sum(range(1, 50))
    assert f"Hits: {total:,} from" in page.tab.get_attribute("svg >> nth=0", "aria-label")
    assert page.tab.locator("svg >> nth=0").locator("rect").count() == 49
    assert "1 snapshots, 2 blocks" in page.tab.inner_text("#budget")
    assert not page.tab.is_visible("#problems-part")


def test_every_column_sorts_up_and_down(show: Open) -> None:
    found = made(25)
    for at, status in ((3, STALE), (4, DAMAGED)):
        found["states"][at]["status"] = status
    page = show(found)
    for index, (column, largest) in enumerate(COLUMNS):
        values = {s["name"]: s[column] for s in found["states"] if s[column] is not None}
        without = [s["name"] for s in found["states"] if s[column] is None]
        head = page.tab.locator("#states thead th").nth(index)
        for down in (largest, not largest):
            head.locator("button").click()
            assert head.get_attribute("aria-sort") == ("descending" if down else "ascending")
            shown = names(page)
            assert sorted(shown) == sorted(s["name"] for s in found["states"])
            assert set(shown[len(values) :]) == set(without)  # what has no value comes last
            told = [values[name] for name in shown[: len(values)]]
            order = [int(v.split()[-1]) for v in told] if column == "name" else told
            assert order == sorted(order, reverse=down)
    assert page.tab.locator("#states [aria-sort]").count() == 1


def test_the_filter_finds_names_ids_and_reasons_in_every_table(show: Open) -> None:
    found = made(25)
    found["states"][7] |= {"status": STALE, "reason": "made by Other weights"}
    page = show(found)
    box = page.tab.locator("#filter")
    box.fill("STALE other state")  # all of the words
    assert names(page) == names(page, "problems") == ["state 7"]
    assert [row[0] for row in page.rows("tree")] == ["▾state 0", "state 7"]  # and what leads to it
    assert page.tab.inner_text("#found") == "1 states"
    box.fill(f"{9:016x}")
    assert names(page) == ["state 9"]
    assert [row[2] for row in page.rows("next")] == [f"{9:016x}"]
    assert page.rows("problems") == []
    box.fill("no such thing")
    assert (names(page), page.count("states")) == ([], 0)
    box.fill("")
    assert page.count("states") == 25


def test_branches_close_and_open(show: Open) -> None:
    page = show(made(6))
    assert len(page.rows("tree")) == 6
    total = page.rows("tree")[0]
    assert total[3:6] == ["6", "5.0 kB", "8.5 kB"]
    page.tab.locator("#tree .toggle >> nth=0").click()
    assert len(page.rows("tree")) == 1
    assert page.tab.locator("#tree tbody [aria-expanded=false]").count() == 1
    page.tab.locator("#tree button.toggle").click()
    assert len(page.rows("tree")) == 6
    page.tab.click("#close-all")
    assert len(page.rows("tree")) == 1
    page.tab.click("#open-all")
    assert len(page.rows("tree")) == 6


def test_of_ten_thousand_states_only_those_in_sight_are_in_the_document(show: Open) -> None:
    found = made(10_000)
    page = show(found)
    assert page.count("states") == page.count("next") == 10_000
    assert page.count("tree") == 1  # so large a tree is closed at first
    page.tab.click("#open-all")
    assert page.count("tree") == 10_000
    assert page.tab.locator("tr").count() < 300
    page.tab.locator("#states thead button >> nth=2").click()
    by_tokens = sorted(found["states"], key=lambda s: -s["tokens"])
    assert names(page)[0] == by_tokens[0]["name"]
    page.tab.evaluate("document.querySelector('#states .window').scrollTop = 1e9")
    page.tab.wait_for_function(
        "name => [...document.querySelectorAll('#states tbody th')].at(-1).textContent === name",
        arg=by_tokens[-1]["name"],
    )
    assert page.tab.locator("tr").count() < 300
    page.tab.fill("#filter", "state 999")
    wanted = {s["name"] for s in found["states"] if "999" in s["name"] + s["snapshot"]}
    assert page.count("states") == len(wanted)
    assert set(names(page)) == wanted


def test_whatever_comes_from_a_store_is_shown_as_text(show: Open) -> None:
    found = made(3)
    found["store"] = HOSTILE
    found["next"][0]["of"] = HOSTILE
    found["models"] = [{HOSTILE: HOSTILE, "__proto__": HOSTILE}]
    found["aside"] = [{"file": HOSTILE, "bytes": 1}]
    found["states"][0] |= {"name": HOSTILE, "status": DAMAGED, "reason": HOSTILE, "text": HOSTILE}
    found["states"][0] |= {"created": 1e300, "last_used": -1e300}
    page = show(found)
    page.tab.locator("#states tbody button", has_text="onerror").click()
    for host in ("#store", "#details-title", "#facts", "#text", "#aside", "#problems", "#tree"):
        assert HOSTILE in page.tab.text_content(host), host
    assert page.tab.locator("img, b").count() == 0
    assert page.tab.title() == "Prompt cache report"


def test_a_state_tells_all_that_is_known_of_it_and_closes_with_a_key(show: Open) -> None:
    found = made(3)
    found["states"][1]["text"] = "Once upon a time\n  there was"
    page = show(found)
    page.tab.locator("#states tbody button", has_text="state 1").focus()
    page.tab.keyboard.press("Enter")
    assert page.tab.inner_text("#details-title") == "state 1"
    assert "some weights" in page.tab.inner_text("#facts")
    assert page.tab.text_content("#text") == found["states"][1]["text"]
    page.tab.keyboard.press("Escape")
    assert not page.tab.is_visible("#details")
    page.tab.locator("#states tbody button", has_text="state 2").click()
    assert not page.tab.is_visible("#text")


def test_tables_have_names_heads_and_places_for_those_who_cannot_see_them(show: Open) -> None:
    found = made(3)
    found["states"][0] |= {"status": STALE, "reason": "made by other weights"}
    page = show(found)
    for host in ("states", "problems", "tree", "next"):
        table = page.tab.locator(f"#{host} table")
        assert table.get_attribute("aria-label")
        assert table.locator("thead th[scope=col]").count() == len(page.rows(host)[0])
        assert table.locator("tbody th[scope=row]").count() == len(page.rows(host))
        places = [row.get_attribute("aria-rowindex") for row in table.locator("tr").all()]
        assert [p for p in places if p] == [str(i + 1) for i in range(len(page.rows(host)) + 1)]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_the_paper_in_light_and_in_dark(scheme: str, show: Open) -> None:
    page = show(made(3), scheme)
    paper, ink, soft, strong = page.tab.evaluate(
        "() => ['--paper', '--ink', '--soft', '--strong'].map("
        "name => getComputedStyle(document.documentElement).getPropertyValue(name))"
    )
    assert (light(paper) > 0.5) == (scheme == "light")
    for colour in (ink, soft, strong):
        bright, dark = sorted((light(paper), light(colour)), reverse=True)
        assert (bright + 0.05) / (dark + 0.05) >= 4.5  # what WCAG asks of text


def light(colour: str) -> float:
    """The relative luminance of `#rrggbb`, as WCAG 2 defines it."""
    parts = [int(colour.strip()[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_a_page_of_a_store_with_nothing_in_it_says_so(show: Open) -> None:
    found = made(1) | {"states": [], "tree": [], "next": [], "hits": [], "written": {}}
    page = show(found)
    assert page.tab.locator("figure", has_text="Nothing is known yet").count() == 3
    assert page.count("states") == 0


def test_times_that_no_calendar_has_do_not_fill_the_page(show: Open) -> None:
    found = made(1)
    found["hits"] = [
        {"hour": hour, "hits": 1, "tokens": 1, "seconds": 1} for hour in (0, WHEN, 253402297200)
    ]
    page = show(found)
    assert 1 < page.tab.locator("svg >> nth=0").locator("rect").count() <= 101
