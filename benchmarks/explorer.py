"""The attention explorer in JupyterLab: a picture soon, an answer at once, a film without stutter, also while the kernel is busy."""
import shutil
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.timing import Table

CLICKS, FRAMES = 30, 40

# From an event to the end of the paint that shows it: what a reader waits for, not only what a handler spends.
WATCH = """event => { window.waited = []; window.watch = e => { const began = e.timeStamp; requestAnimationFrame(() => setTimeout(() => window.waited.push(performance.now() - began))); };
  addEventListener(event, window.watch, true); }"""
UNWATCH = "async event => { await new Promise(done => setTimeout(done, 300)); removeEventListener(event, window.watch, true); return window.waited; }"
PLAY = """async ([root, frames]) => { const seen = []; let last = root.explorer.state().frame; root.querySelector("[data-role=play]").click();
  await new Promise(done => { const look = () => { const now = root.explorer.state().frame; if (now !== last) { seen.push(performance.now()); last = now; } seen.length < frames ? requestAnimationFrame(look) : done(); }; look(); });
  root.querySelector("[data-role=play]").click(); return 1000 * (seen.length - 1) / (seen.at(-1) - seen[0]); }"""
APPEARS = """async place => { const { commands, shell } = window.jupyterapp, area = () => shell.currentWidget.content.widgets[place].node;
  area().querySelector(".fvlm-explorer").dataset.old = "yes"; shell.currentWidget.content.activeCellIndex = place;
  const began = performance.now(); await commands.execute("notebook:run-cell");
  while (!area().querySelector(".fvlm-explorer[data-ready=true]:not([data-old])")) await new Promise(done => setTimeout(done, 5)); return performance.now() - began; }"""


def answers(shown, act, event="pointerdown") -> float:
    "The 95th percentile of the milliseconds from an event to the paint that shows it."
    shown.page.evaluate(WATCH, event)
    act()
    return float(np.quantile(shown.page.evaluate(UNWATCH, event), 0.95))


def clicking(shown, count):
    "A function that clicks on `count` patches of an explorer."
    cells, name = np.random.default_rng(0).permutation(64)[:count], shown.root.locator("[data-role='panel']").first.get_attribute("data-name")

    def act():
        shown.root.scroll_into_view_if_needed()
        box = shown.heat(name).bounding_box()
        for cell in cells:
            place = shown.centre(name, int(cell))
            shown.page.mouse.click(box["x"] + place["x"], box["y"] + place["y"])
            shown.page.wait_for_timeout(30)

    return act


def main() -> Table:
    "Wall times of a real page, each beside its bar; there is nothing to run without a Chromium."
    from tests.browser.explorer import Explorer
    from tests.browser.lab import HOW_TO_GET_ONE, QUIET, Lab, Page, find_chromium
    from tests.browser.tour import CELLS, EXPLORERS, PLACES

    table, path, folder = Table("explorer"), find_chromium(), Path(tempfile.mkdtemp(prefix="fvlm-lab-"))
    if path is None:
        return table.fact("a Chromium to measure in", f"none; {HOW_TO_GET_ONE}", bar="-", holds=False)
    from playwright.sync_api import sync_playwright

    lab = Lab(folder)

    def bar(what, value, limit, unit, at_most=True):
        table.fact(what, f"{value:.3g} {unit}", bar=f"{'<=' if at_most else '>='} {limit:g} {unit}", holds=value <= limit if at_most else value >= limit)

    try:
        with sync_playwright() as playwright:
            page = Page(playwright.chromium.launch(executable_path=path, args=list(QUIET)).new_context(viewport={"width": 1400, "height": 1000}), lab)
            page.open(lab.write("tour.ipynb", *CELLS.values()))
            page.run_all(300)
            page.page.wait_for_function("n => document.querySelectorAll('.fvlm-explorer[data-ready=true]').length === n", arg=len(EXPLORERS), timeout=240_000)
            vit, big = Explorer(page.page, "vit"), Explorer(page.page, "big")
            bar("12 layers, 12 heads, 8 frames of 16x16: attention before the first touch", big.root.evaluate("root => root.explorer.bytes") / 1e6, 10, "MB")
            bar("a cell is run to its canvas is drawn", page.page.evaluate(APPEARS, PLACES["grids"]) / 1e3, 5, "s")
            bar(f"p95 of {CLICKS} clicks, 8x8 patches", answers(vit, clicking(vit, CLICKS)), 100, "ms")
            big.choose(head=0)
            bar(f"p95 of {CLICKS} clicks, 16x16 patches", answers(big, clicking(big, CLICKS)), 100, "ms")
            vit.root.scroll_into_view_if_needed()
            bar("frames while it plays", page.page.evaluate(PLAY, [vit.root.element_handle(), FRAMES]), 8, "frames/s", at_most=False)
            page.ask("tired = 60")
            page.start_cell(PLACES["busy"])
            bar("p95 of 8 clicks while the kernel is busy", answers(vit, clicking(vit, 8)), 200, "ms")
            bar("p95 of 6 scrubs while the kernel is busy", answers(vit, lambda: [vit.part("frame").fill(str(frame)) for frame in (1, 3, 5, 2, 7, 0)], "input"), 200, "ms")
            if not page.running(PLACES["busy"]):
                raise AssertionError("the kernel was not busy any more: the last two rows say nothing")
            page.close()
    finally:
        lab.close()
        shutil.rmtree(folder, ignore_errors=True)
    return table
