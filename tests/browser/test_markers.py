"""Where attempts begin in a chart: their labels, measured where the browser draws them."""

from __future__ import annotations

import itertools
import re
import time
from typing import Any

import pytest
from browser import ui_seed
from playwright.sync_api import Page, expect

pytestmark = pytest.mark.browser

RECORD = """
    const drawn = new WeakMap();
    const { clearRect, fillText } = CanvasRenderingContext2D.prototype;
    CanvasRenderingContext2D.prototype.clearRect = function (...place) {
        drawn.set(this.canvas, []);
        return clearRect.apply(this, place);
    };
    CanvasRenderingContext2D.prototype.fillText = function (text, x, y, ...rest) {
        const ink = this.measureText(text);
        const [left, top] = [x - ink.actualBoundingBoxLeft, y - ink.actualBoundingBoxAscent];
        const [right, bottom] = [x + ink.actualBoundingBoxRight, y + ink.actualBoundingBoxDescent];
        drawn.get(this.canvas).push([text, [left, top, right, bottom]]);
        return fillText.call(this, text, x, y, ...rest);
    };
    window.drawnOn = (canvas) => ({ width: canvas.width, height: canvas.height, texts: drawn.get(canvas) });
"""
"""What was written on each canvas since it was last cleared, and the boxes that hold it, in the canvas's pixels."""

Box = tuple[float, float, float, float]


def labels_of(page: Page) -> list[tuple[str, Box]]:
    """The labels of attempts in the chart of the loss, from left to right; all within the canvas."""
    canvas = page.locator('figure.chart[data-metric="loss"] canvas')
    found = canvas.evaluate("canvas => drawnOn(canvas)")
    labels = sorted(((text, tuple(box)) for text, box in found["texts"] if "attempt" in text), key=lambda one: one[1])
    for text, (left, top, right, bottom) in labels:
        assert 0 <= left < right <= found["width"], text
        assert 0 <= top < bottom <= found["height"], text
    return labels


def touching(labels: list[tuple[str, Box]]) -> list[tuple[Box, Box]]:
    pairs = itertools.combinations([box for _, box in labels], 2)
    return [(a, b) for a, b in pairs if a[0] <= b[2] and b[0] <= a[2] and a[1] <= b[3] and b[1] <= a[3]]


def numbers_in(labels: list[tuple[str, Box]]) -> list[int]:
    """The attempts that labels name, in their order, ranges counted out."""
    named = []
    for text, _ in labels:
        first, last = (re.findall(r"\d+", text) * 2)[:2]
        named += range(int(first), int(last) + 1)
    return named


def resized(page: Page, width: int) -> Any:
    """The chart of the loss in a window of this width, drawn anew."""
    page.set_viewport_size({"width": width, "height": 800})
    chart = page.locator('figure.chart[data-metric="loss"]')
    chart.scroll_into_view_if_needed()
    expect(chart).to_have_attribute("data-points", re.compile("[1-9]"))
    fits = "chart => chart.querySelector('canvas').width === chart.querySelector('.plot-host').clientWidth * devicePixelRatio"
    page.wait_for_function(fits, arg=chart.element_handle())
    return chart


@pytest.mark.slow
def test_labels_of_attempts_never_touch(served: Any, tabs: Any) -> None:
    """Proves that of attempts that begin close together, at one step, at a chart's edges, or in great number, the labels become
    one that names them all; that no two touch or leave the canvas at any width, and that none is missing. The tooltip names
    those that begin where the cursor is, and zooming in parts the labels."""
    begins = [1, 2, 60, 100, 103, 150, 150, 150, 220, 224, 228, *range(300, 360, 6), 436, 438]
    ui_seed.often_begun(served.store, time.time() - 100, "many", begins, 440)
    with tabs(device_scale_factor=2) as tab:
        page = tab.page
        page.add_init_script(RECORD)
        page.goto("/local/many/runs/often")
        for width in (360, 1000):
            chart = resized(page, width)
            labels = labels_of(page)
            assert touching(labels) == []
            assert numbers_in(labels) == [*range(2, len(begins) + 2)]
            assert len(labels) >= 3
        over = chart.locator(".u-over").bounding_box()
        middle, height = over["x"] + over["width"] * 224 / 440, over["y"] + 100
        page.mouse.move(middle, height)
        near = ((10, 220), (11, 224), (12, 228))
        expect(chart.locator(".tip-marker")).to_have_text([f"attempt {number} from {step}" for number, step in near])
        page.mouse.move(over["x"] + over["width"] * 0.9, height)
        expect(chart.locator(".tip-marker")).to_have_count(0)
        expect(chart.locator(".tip")).to_contain_text("step")
        page.mouse.move(middle - 10, height)
        page.mouse.down()
        page.mouse.move(middle + 10, height, steps=3)
        page.mouse.up()
        expect(chart.locator(".u-select")).to_have_css("width", "0px")
        assert [text for text, _ in labels_of(page)] == ["attempt 10", "attempt 11", "attempt 12"]
        assert tab.errors == []
