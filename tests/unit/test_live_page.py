"""The live page in a headless Chromium, in front of a real server."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from chromium import CHROMIUM, Chromium, Page
from http_run import HttpRun, http_config, http_run

from clif.storage.api_keys import hash_of

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: install it to test the live page")
ASK = [{"role": "user", "content": "Hello"}]
LIVE = "document.querySelector('#connection').dataset.state == 'live'"
SHOTS = os.environ.get("CLIF_SHOTS")
"""A folder for screenshots to look at."""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Chromium]:
    browser = Chromium()
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpRun]:
    with http_run(tmp_path_factory.mktemp("page"), replicas=2) as run:
        yield run


@pytest.fixture
def opened(chromium: Chromium) -> Iterator[Callable[..., Page]]:
    """Opens pages, which are closed at the end of the test."""
    pages: list[Page] = []

    def open_page(url: str, **options: Any) -> Page:
        pages.append(Page(chromium, url, **options))
        return pages[-1]

    yield open_page
    for page in pages:
        page.close()


@pytest.fixture
def page(opened: Callable[..., Page], run: HttpRun) -> Page:
    page = opened(run.url)
    page.wait_for(LIVE)
    return page


def keep(page: Page, name: str) -> None:
    if SHOTS:
        page.screenshot(Path(SHOTS) / f"{name}.png", whole=True)


def tile(name: str) -> str:
    found = f"[...document.querySelectorAll('.tile')].find(t => t.firstChild.textContent.startsWith('{name}'))"
    return f"{found}.lastChild.textContent"


def test_updates_arrive_by_themselves_and_nothing_complains(page: Page, run: HttpRun) -> None:
    before = page.evaluate("data.rows.length")
    run.client().chat.completions.create(model="clif", messages=ASK, max_tokens=9)
    page.wait_for(f"data.rows.length >= {before + 2} && {tile('Tokens/s')}.includes('in all')")
    page.wait_for("document.querySelectorAll('#load path.line').length == 2")
    page.wait_for("document.querySelector('#versions').innerText.includes('base')")
    assert page.evaluate("data.status.totals.generated_tokens") >= 9
    assert page.complaints() == []


def test_it_asks_its_own_server_alone(page: Page, run: HttpRun) -> None:
    assert {url for url in page.requested() if not url.startswith(("data:", run.url))} == set()


def test_what_is_not_there_yet_is_said(page: Page) -> None:
    page.wait_for("document.querySelector('#jobs').innerText.includes('POST /v1/fine_tuning/jobs')")
    text = page.text()
    assert "no optimizer step yet" in text and "no round has ended yet" in text


def test_every_control_and_chart_is_reached_by_the_tab_key_in_order(page: Page) -> None:
    page.wait_for("!!document.querySelector('.log')")
    reached = []
    for _ in range(24):
        page.press("Tab")
        reached.append(
            page.evaluate(
                "(e => e.id || e.className.baseVal || e.className || e.closest('section')?.id || e.tagName)"
                "(document.activeElement)"
            )
        )
        outline = page.evaluate(
            "getComputedStyle(document.activeElement.matches('.range input') ? "
            "document.activeElement.nextElementSibling : document.activeElement).outlineStyle"
        )
        assert outline != "none" or reached[-1] in ("BODY", "skip"), f"focus is not seen on {reached[-1]}"
        if reached[-1] == "log":
            break
    assert reached[:3] == ["skip", "theme", "r1"]
    assert page.evaluate("document.querySelectorAll('svg[role=img][tabindex=\"0\"][aria-label]').length") == 7
    assert reached.count("states") + reached.count("load") >= 2 and reached[-1] == "log"


def test_arrow_keys_read_a_chart_and_its_table_says_the_same(page: Page) -> None:
    page.wait_for("data.rows.length >= 3")
    page.evaluate("document.querySelector('#load svg').focus()")
    page.press("End")
    page.press("ArrowLeft")
    page.wait_for("!document.querySelector('#load .readout').textContent.startsWith('now')")
    assert page.evaluate("document.querySelector('#load .readout').textContent").endswith(": running 0, waiting 0")
    page.evaluate("document.querySelector('#load details').open = true")
    page.wait_for("document.querySelectorAll('#load tbody tr').length >= 1")
    assert page.evaluate("document.querySelector('#load thead').innerText.includes('waiting')")


def test_where_streams_do_not_come_through_it_polls(opened: Callable[..., Page], run: HttpRun) -> None:
    page = opened("about:blank")
    page.send("Network.setBlockedURLs", urls=["*/admin/live*"])
    page.send("Page.navigate", url=run.url)
    page.wait_for("document.querySelector('#connection').textContent == 'live, by polling'")
    page.wait_for("document.querySelectorAll('.tile').length == 8 && data.rows.length > 0")


def test_colours_follow_the_system_and_the_button(opened: Callable[..., Page], run: HttpRun) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    dark, light = opened(run.url, dark=True), opened(run.url)
    for page in (dark, light):
        page.wait_for(LIVE)
    assert dark.evaluate(ground) != light.evaluate(ground)
    keep(dark, "dark")
    light.evaluate("document.querySelector('#theme').click()")
    light.evaluate("document.querySelector('#theme').click()")
    assert light.evaluate(ground) == dark.evaluate(ground)
    light.evaluate("localStorage.clear()")


def test_a_narrow_screen_scrolls_down_only(opened: Callable[..., Page], run: HttpRun) -> None:
    page = opened(run.url, width=360, height=740)
    page.wait_for(LIVE)
    page.wait_for("document.querySelectorAll('.tile').length == 8")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    keep(page, "narrow")


def test_with_keys_it_asks_for_one_and_a_wrong_one_is_named(tmp_path: Path, opened: Callable[..., Page]) -> None:
    keys = [{"name": "ops", "sha256": hash_of("right"), "role": "admin"}]
    path = tmp_path / "keys.jsonl"
    path.write_text("\n".join(map(json.dumps, keys)) + "\n")
    path.chmod(0o600)
    run = HttpRun(http_config(tmp_path, serve={"http": {"port": 0, "keys_file": str(path)}}))
    with run:
        assert httpx.get(f"{run.url}/admin/status").status_code == 401
        page = opened(run.url)
        for key in ("wrong", "right"):
            page.wait_for("document.querySelector('#ask').open && document.activeElement.id == 'ask-key'")
            page.type(key)
            page.press("Enter")
            if key == "wrong":
                page.wait_for("!document.querySelector('#ask-wrong').hidden")
                assert "wrong API key" in page.text()
                keep(page, "key")
        page.wait_for(LIVE)
        assert page.evaluate("sessionStorage.getItem('clif.key')") == "right"
        assert "right" not in page.text()
    page.wait_for("document.querySelector('#connection').dataset.state == 'lost'")
    assert "connection lost, as of" in page.text()
    keep(page, "lost")
