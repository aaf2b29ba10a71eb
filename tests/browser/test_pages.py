"""What a person sees: pages of the real server in a real browser, over a real store."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import pytest
from browser import ui_seed
from playwright.sync_api import Page, Request, expect

from wbdist.core.states import RunEvent

pytestmark = pytest.mark.browser

BLUE, ORANGE, GREEN, PURPLE = (66, 105, 208), (242, 112, 61), (47, 163, 107), (164, 99, 242)
"""The first four colours of the charts."""


def chart(page: Page, metric: str) -> Any:
    return page.locator(f'figure.chart[data-metric="{metric}"]')


def has_colour(page: Page, metric: str, colour: tuple[int, int, int]) -> bool:
    """Whether a chart's canvas has pixels of a line's colour."""
    script = """(canvas, [r, g, b]) => {
        const copy = Object.assign(document.createElement("canvas"), { width: canvas.width, height: canvas.height });
        const pen = copy.getContext("2d", { willReadFrequently: true });
        pen.drawImage(canvas, 0, 0);
        const { data } = pen.getImageData(0, 0, copy.width, copy.height);
        let found = 0;
        for (let i = 0; i < data.length; i += 4)
            if (Math.abs(data[i] - r) + Math.abs(data[i + 1] - g) + Math.abs(data[i + 2] - b) < 24) found++;
        return found;
    }"""
    return chart(page, metric).locator("canvas").evaluate(script, list(colour)) > 20


def test_run_page_shows_what_the_store_holds(served: Any, tab: Any) -> None:
    """Proves that state, facts, alerts, attempts, config, summary, console and charts of an interrupted run are on its page."""
    ui_seed.preempted_then_killed(served.store, time.time() - 100, "shown")
    page = tab.page
    page.goto("/local/shown/runs/digits-main")
    expect(page.get_by_role("heading", level=1)).to_have_text("digits with two interruptions")
    expect(page.locator(".title .state")).to_have_text("finished")
    expect(page.locator(".facts")).to_contain_text("examples/digits_ddp.py")
    rows = page.locator(".attempts tbody tr")
    expect(rows).to_have_count(3)
    cells = [[cell.strip() for cell in row.locator("th, td").all_inner_texts()] for row in rows.all()]
    assert [cell[-6:] for cell in cells] == [
        ["first start", "preempted", "start", "150", "30", "3.0s"],
        ["after a preemption", "process lost", "150", "150", "30", "3.0s"],
        ["after a lost process", "finished", "300", "140", "–", "–"],
    ]
    timeline = page.locator(".timeline")
    expect(timeline).to_contain_text("Goodput 70.5 % of 1m 1s over 3 attempts")
    bars = timeline.get_by_role("img")
    expect(bars).to_have_count(3)
    assert [bar.get_attribute("aria-label") for bar in bars.all()] == [
        "Attempt 1: start-up 2.0s, train 14s, lost 3.0s, save 0.6s, stop 0.4s",
        "Attempt 2: down 2.5s, start-up 1.0s, restore 0.5s, train 15s, lost 3.0s, save 1.0s",
        "Attempt 3: down 1.4s, start-up 1.2s, restore 0.4s, train 14s, save 0.8s, stop 0.2s",
    ]
    lengths = [bar.bounding_box()["width"] for bar in bars.nth(1).locator(".phase").all()]
    assert lengths[3] == pytest.approx(5 * lengths[4], rel=0.1), "train 15 s, lost 3 s"
    expect(page.get_by_role("region", name="Alerts").get_by_role("listitem")).to_contain_text(
        "WARN Restarted a process was lost"
    )
    config = page.get_by_role("region", name="Config")
    expect(config.locator("dl > div").filter(has_text="model.layers")).to_contain_text("[16,32]")
    expect(page.get_by_role("region", name="Summary")).to_contain_text("accuracy")
    console = page.get_by_role("log")
    expect(console).to_contain_text("attempt 3 continues at step 300")
    expect(console.locator(".stderr")).to_contain_text("SIGTERM")
    expect(console).not_to_contain_text("[32m")
    for metric in ("loss", "accuracy", "lr"):
        expect(chart(page, metric)).to_have_attribute("data-points", "440")
        label = chart(page, metric).get_by_role("img").get_attribute("aria-label") or ""
        assert label.endswith("attempt 2 from step 150; attempt 3 from step 300")
    assert has_colour(page, "loss", BLUE)


def test_an_archived_attempt_can_be_looked_at(served: Any, tab: Any) -> None:
    """Proves that the number of archived rows leads to the run as that attempt saw it, charts and console, and back."""
    ui_seed.preempted_then_killed(served.store, time.time() - 100, "archived")
    page = tab.page
    page.goto("/local/archived/runs/digits-main")
    page.locator(".attempts tbody tr").nth(1).get_by_role("link", name="30").click()
    expect(page.get_by_role("note")).to_contain_text("as attempt 2 saw it")
    expect(chart(page, "loss")).to_have_attribute("data-points", "330")
    expect(page.get_by_role("log")).not_to_contain_text("attempt 3 continues")
    expect(page.get_by_role("log")).to_contain_text("attempt 2 continues at step 150")
    page.get_by_role("link", name="The run as it is now").click()
    expect(chart(page, "loss")).to_have_attribute("data-points", "440")
    expect(page.get_by_role("note")).to_have_count(0)


def test_new_rows_appear_within_three_seconds(served: Any, tab: Any) -> None:
    """Proves that rows, console lines, a new metric and the end of a run reach an open page within 3 s, without a reload."""
    run = ui_seed.SeededRun(served.store, "live", "r1", time.time(), name="live-run")
    run.begin()
    run.log([ui_seed.row(step) for step in range(5)])
    run.print("first line")
    page = tab.page
    page.goto("/local/live/runs/r1")
    expect(chart(page, "loss")).to_have_attribute("data-points", "5")
    expect(page.get_by_role("log")).to_have_text("first line")
    page.evaluate("window.sameDocument = true")
    run.log([ui_seed.row(5, extra=1.0)])
    run.print("one more line")
    began = time.monotonic()
    expect(chart(page, "loss")).to_have_attribute("data-points", "6", timeout=3000)
    expect(chart(page, "extra")).to_have_attribute("data-points", "1", timeout=3000)
    expect(page.get_by_role("log")).to_have_text("first lineone more line", timeout=3000)
    assert time.monotonic() - began < 3
    run.end(RunEvent.EXIT_ZERO, exit_code=0)
    expect(page.locator(".title .state")).to_have_text("finished", timeout=3000)
    assert page.evaluate("window.sameDocument") is True


def test_a_rewind_takes_rows_back(served: Any, tab: Any) -> None:
    """Proves that a new attempt on an open page removes the archived rows from the chart and from the console."""
    run = ui_seed.SeededRun(served.store, "rewind", "r1", time.time())
    run.begin()
    run.log([ui_seed.row(step) for step in range(50)])
    run.print("kept", "archived")
    page = tab.page
    page.goto("/local/rewind/runs/r1")
    expect(chart(page, "loss")).to_have_attribute("data-points", "50")
    expect(page.get_by_role("log")).to_contain_text("archived")
    run.begin(keep_rows=30, keep_lines=1, last_step=29, cause="lost")
    run.print("second life")
    expect(chart(page, "loss")).to_have_attribute("data-points", "30", timeout=3000)
    expect(page.get_by_role("log")).to_have_text("keptsecond life", timeout=3000)


def test_group_overlays_all_its_ranks(served: Any, tab: Any) -> None:
    """Proves that a group's page lists its runs by rank and draws a line a rank, and that a rank can be taken out."""
    for rank in (2, 0, 3, 1):
        ui_seed.member(served.store, time.time(), "grouped", "ddp/4", rank, rows=100)
    page = tab.page
    page.goto("/local/grouped")
    page.get_by_role("link", name="ddp/4").click()
    expect(page).to_have_url(re.compile("/local/grouped/groups/ddp%2F4$"))
    expect(page.locator(".legend li")).to_have_text(["rank 0", "rank 1", "rank 2", "rank 3"])
    assert [row.locator("td.num").first.inner_text() for row in page.locator("tr[data-run]").all()] == ["0", "1", "2", "3"]
    expect(chart(page, "samples_per_s")).to_have_attribute("data-points", "400")
    for colour in (BLUE, ORANGE, GREEN, PURPLE):
        assert has_colour(page, "samples_per_s", colour)
    page.get_by_label("Chart ddp/4-rank1").uncheck()
    expect(page.locator(".legend li")).to_have_text(["rank 0", "rank 2", "rank 3"])
    assert not has_colour(page, "samples_per_s", ORANGE)
    page.reload()
    expect(page.get_by_role("heading", level=1)).to_have_text("ddp/4")


def test_project_page_folds_filters_sorts_and_draws(served: Any, tab: Any) -> None:
    """Proves the table of runs: groups fold, words filter, columns sort, and ticking a run puts it into the charts."""
    ui_seed.seed_digits(served.store, time.time(), "table")
    page = tab.page
    page.goto("/")
    page.get_by_role("link", name="table").click()
    names = page.locator("tr[data-run] td.name")
    expect(names).to_have_text(["just-started", "digits with two interruptions", "lost-node", "too-high-lr", "long-run"])
    fold = page.get_by_role("button", name="Runs of group sweep-7")
    fold.focus()
    page.keyboard.press("Enter")
    expect(fold).to_have_attribute("aria-expanded", "true")
    expect(page.locator("tr.member")).to_have_count(4)
    expect(page.locator("tr.member").first).to_contain_text("worker")
    page.keyboard.press("Enter")
    expect(page.locator("tr.member")).to_have_count(0)

    page.get_by_label("Filter runs").fill("crashed lost")
    expect(names).to_have_text(["lost-node"])
    page.get_by_label("Filter runs").fill("no such run")
    expect(page.get_by_text("No run matches")).to_be_visible()
    page.get_by_label("Filter runs").fill("")

    page.get_by_role("button", name="Steps").click()
    expect(names.first).to_have_text("long-run")
    expect(page.get_by_role("columnheader", name="Steps")).to_have_attribute("aria-sort", "descending")

    expect(chart(page, "grad_norm")).to_have_count(0)
    page.get_by_label("Chart long-run").check()
    expect(chart(page, "grad_norm")).to_have_attribute("data-points", "20000")


def test_values_that_are_no_numbers_are_gaps(served: Any, tab: Any) -> None:
    """Proves that NaN and Infinity neither break a chart nor are drawn: the finite part is, and the page counts the gaps."""
    run = ui_seed.SeededRun(served.store, "nan", "r1", time.time())
    run.begin()
    bad = [json.loads(text) for text in ('{"loss": NaN}', '{"loss": Infinity}', '{"loss": -Infinity}')]
    run.log([ui_seed.row(step) for step in range(40)] + [{**ui_seed.row(40 + i), **row} for i, row in enumerate(bad)])
    page = tab.page
    page.goto("/local/nan/runs/r1")
    expect(chart(page, "loss")).to_contain_text("3 gaps")
    expect(chart(page, "loss")).to_contain_text("not finite")
    assert has_colour(page, "loss", BLUE)
    expect(page.get_by_role("region", name="Summary")).to_contain_text("-Infinity")


def test_names_are_text_and_addresses_survive_them(served: Any, tab: Any) -> None:
    """Proves that markup in names, values and console lines is shown as text, and that odd names can be linked to."""
    evil = '<img src=x onerror="document.title=1">'
    run = ui_seed.SeededRun(
        served.store,
        "odd näme & co",
        "r.1",
        time.time(),
        name=evil,
        group=f"a/b {evil} ?#%41",
        tags=[evil],
        config={evil: evil},
    )
    run.begin()
    run.log([{evil: 1.0, "_step": 0}, {evil: 2.0, "_step": 1}])
    run.print(evil)
    page = tab.page
    page.goto("/")
    page.get_by_role("link", name="odd näme & co").click()
    page.get_by_role("link", name="a/b").click()
    expect(page.get_by_role("heading", level=1)).to_have_text(f"a/b {evil} ?#%41")
    page.reload()
    page.locator("tr[data-run] td.name a").click()
    expect(page.get_by_role("heading", level=1)).to_have_text(evil)
    expect(page.locator("figure.chart")).to_have_attribute("data-points", "2")
    expect(page.get_by_role("log")).to_have_text(evil)
    assert page.locator("img").count() == 1, "only the logo"


def test_many_metrics_are_loaded_when_they_come_into_view(served: Any, tab: Any) -> None:
    """Proves that of 300 metrics only those near the screen are asked for, in few requests, and the others when scrolled to."""
    run = ui_seed.SeededRun(served.store, "many", "r1", time.time())
    run.begin()
    run.log([{**{f"layer/{i:03}": float(i * step) for i in range(300)}, "_step": step} for step in range(3)])
    asked: list[str] = []
    requests = 0

    def watch(request: Request) -> None:
        nonlocal requests
        if request.url.endswith("/series"):
            requests += 1
            asked.extend(json.loads(request.post_data or "")["keys"])

    page = tab.page
    page.on("request", watch)
    page.goto("/local/many/runs/r1")
    expect(page.locator("figure.chart")).to_have_count(300)
    expect(chart(page, "layer/000")).to_have_attribute("data-points", "3")
    assert len(asked) < 40
    assert requests <= 2
    chart(page, "layer/250").scroll_into_view_if_needed()
    expect(chart(page, "layer/250")).to_have_attribute("data-points", "3")
    assert len(set(asked)) < 120
    page.get_by_label("Filter metrics").fill("299")
    expect(page.locator("figure.chart")).to_have_count(1)
    expect(chart(page, "layer/299")).to_have_attribute("data-points", "3")


def test_empty_places_say_what_to_do(served: Any, tab: Any) -> None:
    """Proves that a project, a run and an address with nothing in them tell how to go on."""
    page = tab.page
    page.goto("/local/void")
    expect(page.locator("main")).to_contain_text('wbdist.init(project="void")')
    ui_seed.SeededRun(served.store, "bare", "r1", time.time())
    page.goto("/local/bare/runs/r1")
    expect(page.locator("main")).to_contain_text("Charts appear with the first run.log")
    page.goto("/local/bare/groups/none")
    expect(page.locator("main")).to_contain_text("No run of local/bare is in this group")


def test_an_unknown_run_is_said_to_be_unknown(tabs: Any) -> None:
    """Proves that the address of a run that does not exist shows so, with a way to its project, instead of an empty page."""
    with tabs() as tab:
        tab.page.goto("/local/bare/runs/nowhere")
        expect(tab.page.get_by_role("heading", level=1)).to_have_text("There is no run nowhere")
        assert all("404" in error for error in tab.errors)


def test_login_is_required_and_works(served: Any, tabs: Any) -> None:
    """Proves that a stranger sees no data, a wrong key is refused in words, and the key opens the page until the logout."""
    ui_seed.SeededRun(served.store, "secret", "r1", time.time(), name="hidden-name")
    with tabs(login=False) as tab:
        page = tab.page
        page.goto("/local/secret/runs/r1")
        field = page.get_by_label("API key")
        expect(field).to_be_focused()
        assert tab.errors == []
        assert "hidden-name" not in page.content()
        field.fill("not-the-key")
        field.press("Enter")
        expect(page.get_by_role("alert")).to_have_text("That is not a key of this server.")
        field.fill(served.key)
        field.press("Enter")
        expect(page.get_by_role("heading", level=1)).to_have_text("hidden-name")
        page.reload()
        expect(page.get_by_role("heading", level=1)).to_have_text("hidden-name")
        page.get_by_role("button", name="Log out").click()
        expect(page.get_by_label("API key")).to_be_visible()
        page.goto("/local/secret/runs/r1")
        expect(page.get_by_label("API key")).to_be_visible()


def test_a_lost_connection_is_shown_and_caught_up_with(served: Any, tabs: Any) -> None:
    """Proves that the page says when the server is away, and that what came meanwhile is shown when it is back."""
    run = ui_seed.SeededRun(served.store, "away", "r1", time.time())
    run.begin()
    run.log([ui_seed.row(step) for step in range(5)])
    with tabs() as tab:
        page = tab.page
        page.goto("/local/away/runs/r1")
        expect(chart(page, "loss")).to_have_attribute("data-points", "5")
        expect(page.locator(".banner")).to_have_count(0)
        served.stop()
        try:
            expect(page.get_by_role("status")).to_contain_text("live connection is lost", timeout=8000)
            run.log([ui_seed.row(5)])
        finally:
            served.start()
        expect(chart(page, "loss")).to_have_attribute("data-points", "6")
        expect(page.locator(".banner")).to_have_count(0)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_fit_a_phone(served: Any, tabs: Any, scheme: str) -> None:
    """Proves that no page is wider than a phone's screen, and that charts are drawn in both colour schemes."""
    project = f"phone-{scheme}"
    ui_seed.preempted_then_killed(served.store, time.time() - 100, project)
    ui_seed.member(served.store, time.time(), project, "g", 0, rows=20)
    with tabs(viewport={"width": 360, "height": 740}, color_scheme=scheme, has_touch=True) as tab:
        for path in ("/", f"/local/{project}", f"/local/{project}/runs/digits-main", f"/local/{project}/groups/g"):
            tab.page.goto(path)
            expect(tab.page.get_by_role("heading", level=1)).to_be_visible()
            if path != "/":
                chart(tab.page, "loss").scroll_into_view_if_needed()
                expect(chart(tab.page, "loss")).to_have_attribute("data-points", re.compile("[1-9]"))
            assert tab.page.evaluate("document.scrollingElement.scrollWidth - innerWidth") <= 0, path
        background = tab.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (background == "rgb(16, 19, 23)") == (scheme == "dark")
        assert tab.errors == []
