"""What a reader does in JupyterLab, done: every widget in a real Lab, in a real Chromium, without a network.

The numbers of the tests are those of the explorer's specification: 1 notebooks, 2 offline, 3 click, 4 layer and head, 5 hover,
6 temperature, 7 scrub and play, 8 coarse beside fine, 9 busy kernel, 10 reload, 11 static twin, 12 saved, 13 size, 14 keyboard and screen reader,
15 themes, 16 errors, 17 linked instruments. Milliseconds are the page's own time in a handler, which a busy machine does not stretch much; strict wall
times are in `python -m benchmarks explorer`.
"""
import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from tests.browser.explorer import Explorer
from tests.browser.lab import ROOT, Page
from tests.browser.tour import EXPLORERS, PLACES

pytest.importorskip("playwright", reason="the browser tests need playwright: pip install -e '.[dev]'")

QUICK_NOTEBOOKS = ("00_ground/03_show", "80_instruments/93_attention_explorer", "80_instruments/80_nearest_frames")
ALL_NOTEBOOKS = sorted(path.relative_to(ROOT / "nbs").with_suffix("").as_posix() for path in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
THEMES = ("JupyterLab Light", "JupyterLab Dark")


@pytest.fixture
def explorer(tour):
    "`explorer(name)`, with the state that it opened with."
    def get(name):
        found = Explorer(tour.page, name)
        found.root.scroll_into_view_if_needed()
        return found

    return get


def kernel(tour, source):
    "What the kernel says, as JSON."
    return json.loads(tour.ask(f"import json\nprint(json.dumps({source}))"))


def p95(values):
    return float(np.quantile(values, 0.95))


def soon(measure, limit, what, rounds=4):
    "`measure()` gives milliseconds; the best round's 95th percentile counts, because other programs only ever add."
    found = []
    while len(found) < rounds and (not found or min(found) > limit):
        found.append(p95(measure()))
    print(f"{what}: p95 {min(found):.1f} ms in the page" + (f", best of {len(found)} rounds" if len(found) > 1 else ""))
    assert min(found) <= limit, f"{what}: {found} ms, expected at most {limit}"


def sentence(cell):
    "The error that a cell shows."
    found = [out for out in cell["outputs"] if out["output_type"] == "error"]
    return f"{found[0]['ename']}: {found[0]['evalue']}" if found else None


# --- 1: notebooks ----------------------------------------------------------------------------------------------------

def run_notebook(shelf, name, seconds):
    try:
        shelf.tab(shelf.lab.copy(ROOT / "nbs" / f"{name}.ipynb"))
        shelf.run_all(seconds)
        shelf.page.wait_for_timeout(500)
        found, code = shelf.errors(), shelf.outputs()
        assert not found, "\n".join(found)
        assert not shelf.outside(), shelf.outside()
        assert all(cell["count"] for cell in code if cell["source"].strip()), "a cell did not run"
    finally:
        shelf.close_tab()


@pytest.mark.parametrize("name", QUICK_NOTEBOOKS)
def test_01_a_notebook_runs_from_top_to_bottom(shelf, name):
    run_notebook(shelf, name, 300)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ALL_NOTEBOOKS if name not in QUICK_NOTEBOOKS])
def test_01_every_notebook_runs_from_top_to_bottom(shelf, name):
    run_notebook(shelf, name, 900)


# --- 2: offline ------------------------------------------------------------------------------------------------------

def test_02_every_widget_appears_without_a_network(tour, explorer):
    assert not tour.problems, "\n".join(tour.problems)
    assert not tour.outside(), tour.outside()
    for name in EXPLORERS:
        shown = explorer(name)
        assert shown.root.locator("canvas").first.is_visible() and shown.root.locator("canvas").first.bounding_box()["width"] > 50, name


def test_02_a_widget_appears_soon_after_its_cell(tour):
    spent = tour.page.evaluate("""async place => { const { commands, shell } = window.jupyterapp, area = () => shell.currentWidget.content.widgets[place].node;
        area().querySelector('.fvlm-explorer').dataset.old = 'yes'; shell.currentWidget.content.activeCellIndex = place;
        await commands.execute('notebook:run-cell'); const began = performance.now();
        while (!area().querySelector('.fvlm-explorer[data-ready=true]:not([data-old])')) { if (performance.now() - began > 30000) return null; await new Promise(r => setTimeout(r, 10)); }
        return performance.now() - began; }""", PLACES["grids"])
    print(f"visible {spent:.0f} ms after its cell")
    assert spent is not None and spent < 20_000  # the bar is 5 s, on a machine of one's own


def test_02_one_explorer_shown_twice_is_one_explorer(explorer):
    first, second = explorer("vit"), explorer("again")
    first.click("patch to patch", 12)
    assert first.state()["query"] == second.state()["query"] == 12
    second.click("patch to patch", 50)
    assert first.state()["query"] == 50
    assert np.array_equal(first.weights("patch to patch"), second.weights("patch to patch"))


# --- 3: click --------------------------------------------------------------------------------------------------------

def test_03_a_click_asks_a_patch(tour, explorer):
    w = explorer("vit")
    w.choose(layer=1, head=0, opacity=0.65)
    w.click("patch to patch", 0)
    before, live = w.heat("patch to patch").screenshot(), w.part("live").inner_text()
    w.click("patch to patch", 8 * 5 + 2)
    w.page.mouse.move(5, 5)
    assert "row 6, column 3" in w.part("live").inner_text() and w.part("live").inner_text() != live
    assert w.heat("patch to patch").screenshot() != before
    said = kernel(tour, "dict(query=w.query, shown=w.shown().tolist())")
    assert said["query"] == 8 * 5 + 2
    assert np.allclose(said["shown"], w.weights("patch to patch"), atol=1e-3)


@pytest.mark.parametrize("name", ["vit", "big"])
def test_03_thirty_clicks_are_quick(explorer, name):
    w, rng = explorer(name), np.random.default_rng(0)
    w.choose(head=0)
    cells = rng.permutation(64)[:30]
    box = w.heat("patch to patch").bounding_box()

    def clicks():
        for cell in cells:
            place = w.centre("patch to patch", int(cell))
            w.page.mouse.click(box["x"] + place["x"], box["y"] + place["y"])

    soon(lambda: w.milliseconds(clicks), 100, f"{name}: a click of 30")
    assert w.state()["query"] == cells[-1]


# --- 4: layer and head -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("layer,head", [(0, 0), (2, 1), (1, -1), (-1, 2), (-1, -1)])
def test_04_the_picture_is_the_array(tour, explorer, layer, head):
    from matplotlib import colormaps

    w, query, frame = explorer("vit"), 27, 3
    w.click("patch to patch", query)
    w.choose(layer=layer, head=head, frame=frame, temperature=1, opacity=1)
    w.page.mouse.move(5, 5)
    of = lambda i: ":" if i < 0 else f"{i}:{i + 1}"  # noqa: E731
    truth = np.array(kernel(tour, f"raw[{of(layer)}, {frame}, {of(head)}, 1 + {query}].mean((0, 1)).tolist()"))
    assert np.abs(w.weights("patch to patch") - truth).max() <= 1 / 255
    table = np.array([colormaps["viridis"](i)[:3] for i in range(256)]) * 255
    high = float(w.panel("patch to patch").locator("[data-role='legend']").get_attribute("data-high"))
    assert high == pytest.approx(truth[1:].max(), rel=1e-3)
    for cell in (0, 9, query, 40, int(truth[1:].argmax())):
        seen = np.array(w.root.evaluate("(root, cell) => root.explorer.colour('patch to patch', cell)", cell))
        value = np.abs(table - seen).sum(1).argmin() / 255
        assert abs(value - truth[1 + cell] / high) <= 1.5 / 255, f"cell {cell}: colour {seen} is {value:.3f} of the scale, the array says {truth[1 + cell] / high:.3f}"
    w.choose(opacity=0.65)


# --- 5: hover --------------------------------------------------------------------------------------------------------

def test_05_the_pointer_reads_a_weight(explorer):
    w, cell = explorer("vit"), 8 * 2 + 5
    w.heat("patch to patch").hover(position=w.centre("patch to patch", cell))
    said, row = w.part("readout").evaluate("node => ({...node.dataset})"), w.weights("patch to patch")
    assert (said["panel"], int(said["row"]), int(said["column"])) == ("patch to patch", 2, 5)
    assert float(said["weight"]) == pytest.approx(row[1 + cell], rel=1e-6) and int(said["rank"]) == 1 + int((row > row[1 + cell]).sum())
    assert float(said["sum"]) == pytest.approx(1, abs=5e-3) and "1.00" in w.part("readout").inner_text() and row.sum() == pytest.approx(1, abs=5e-3)


# --- 6: temperature --------------------------------------------------------------------------------------------------

def test_06_temperature_raises_entropy(tour, explorer):
    w = explorer("vit")
    w.click("patch to patch", 20)
    w.choose(layer=1, head=1, frame=0)
    found = []
    for temperature in (0.25, 0.5, 1, 2, 4):
        w.choose(temperature=temperature)
        found.append(w.entropy("patch to patch"))
        assert float(w.part("temperature").get_attribute("data-value")) == pytest.approx(temperature)
    assert all(a < b for a, b in zip(found, found[1:])), found
    w.choose(temperature=1)
    row = np.array(kernel(tour, "raw[1, 0, 1, 21].tolist()"))
    assert w.entropy("patch to patch") == pytest.approx(-(row * np.log(row)).sum(), abs=2e-3)
    assert found[2] == pytest.approx(w.entropy("patch to patch"), abs=1e-9)


# --- 7: scrub and play -----------------------------------------------------------------------------------------------

def test_07_scrubbing_changes_the_picture(tour, explorer):
    w, pictures = explorer("vit"), set()
    w.choose(opacity=0)
    for frame in range(8):
        w.choose(frame=frame)
        pictures.add(w.heat("patch to patch").evaluate("canvas => new Promise(done => requestAnimationFrame(() => setTimeout(() => done(canvas.toDataURL()))))"))
        assert w.state()["frame"] == frame
    w.choose(opacity=0.65)
    assert len(pictures) == 8
    assert kernel(tour, "w.frame") == 7


def test_07_it_plays_and_pauses(tour, explorer):
    g = explorer("grids")
    g.root.evaluate("""root => { const { view } = root.explorer, draw = Object.getPrototypeOf(view).draw; window.drawn = [];
        view.draw = () => { const began = performance.now(); draw.call(view); window.drawn.push([root.explorer.state().frame, performance.now() - began, began]); }; }""")
    sent = len(tour.sent)
    g.part("play").click()
    assert g.part("play").get_attribute("aria-pressed") == "true"
    g.page.wait_for_function("() => window.drawn.length > 20", timeout=60_000)
    g.part("play").click()
    drawn = g.root.evaluate("root => { delete root.explorer.view.draw; return window.drawn; }")
    turns = [(a, b) for a, b in zip(drawn, drawn[1:]) if a[0] != b[0]]
    messages, spent = sum(b"comm_msg" in message for message in tour.sent[sent:]), [ms for _, ms, _ in drawn]
    print(f"{1000 * len(turns) / (drawn[-1][2] - drawn[0][2]):.1f} frames/s, {np.median(spent):.1f} ms a frame, {messages} messages for {len(turns)} frames")
    assert len(turns) >= 15 and all((b[0] - a[0]) % 8 == 1 for a, b in turns), "frames were left out"
    assert messages <= len(turns) + 4, "more than a message a frame"  # and one for play, one for pause
    assert np.median(spent) <= 1000 / 8, "too slow for 8 frames a second"
    still = g.state()["frame"]
    g.page.wait_for_timeout(400)
    assert g.state()["frame"] == still and not g.state()["playing"] and g.part("play").get_attribute("aria-pressed") == "false"


# --- 8: coarse beside fine -------------------------------------------------------------------------------------------

def test_08_coarse_stands_beside_fine(tour, explorer):
    f = explorer("fvlm")
    names = f.root.locator("[data-role='panel']").evaluate_all("nodes => nodes.map(n => n.dataset.name)")
    assert names == ["coarse", "fine"]
    assert [f.panel(name).locator("figcaption").inner_text().split("\n")[0] for name in names] == names
    boxes = [f.heat(name).bounding_box() for name in names]
    assert abs(boxes[0]["y"] - boxes[1]["y"]) < 5 and boxes[1]["x"] > boxes[0]["x"] + boxes[0]["width"] - 1, "not side by side"
    f.click("fine", 6)
    assert [f.panel(name).get_attribute("data-query") for name in names] == ["6", "6"]
    for name in names:
        row = f.weights(name)[1:]
        x, y = map(float, f.panel(name).get_attribute("data-fixation").split(","))
        grid = np.array([[(i % 4 + 0.5) / 4, (i // 4 + 0.5) / 4] for i in range(16)])
        assert np.allclose([x, y], row @ grid / row.sum(), atol=2e-3)
        ringed = f.panel(name).locator("canvas[data-layer='marks']").evaluate("""(c, [x, y]) => { const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data, r = 14 * c.width / c.clientWidth;
            let n = 0; for (let j = 0; j < c.height; j++) for (let i = 0; i < c.width; i++) if (Math.hypot(i - x * c.width, j - y * c.height) < r && d[4 * (j * c.width + i) + 3]) n++; return n; }""", [x, y])
        assert ringed > 20, f"no ring around the fixation of {name}"
    before = f.weights("fine")
    f.choose(slot=1)
    assert not np.array_equal(before, f.weights("fine")) and kernel(tour, "f.slot") == 1


def test_08_different_grids_show_one_place(explorer):
    g = explorer("grids")
    for cell in (0, 4 * 1 + 2, 15):
        g.click("wide", cell)
        x, y = (cell % 4 + 0.5) / 4, (cell // 4 + 0.5) / 4
        assert g.panel("wide").get_attribute("data-query") == str(cell)
        assert g.panel("narrow").get_attribute("data-query") == str(int(y * 8) * 8 + int(x * 8))
    g.click("narrow", 8 * 7 + 1)
    assert g.panel("wide").get_attribute("data-query") == str(4 * 3 + 0)


# --- 9: busy kernel --------------------------------------------------------------------------------------------------

def test_09_it_answers_while_the_kernel_is_busy(tour, explorer):
    w = explorer("vit")
    tour.ask("tired = 120")
    tour.start_cell(PLACES["busy"])
    soon(lambda: w.milliseconds(lambda: [w.click("patch to patch", cell) for cell in range(5, 60, 9)]), 200, "kernel busy: a click")
    assert w.state()["query"] == 59 and "row 8, column 4" in w.part("live").inner_text()
    drawn = w.root.evaluate("root => root.explorer.drawn")
    soon(lambda: w.milliseconds(lambda: [w.part("frame").fill(str(frame)) for frame in (1, 3, 5)], "input"), 200, "kernel busy: a scrub")
    assert w.state()["frame"] == 5 and w.root.evaluate("root => root.explorer.drawn") >= drawn + 3
    assert tour.running(PLACES["busy"]), "the kernel was not busy any more: nothing was tested"
    (tour.lab.root / "rested").touch()
    assert kernel(tour, "[w.query, w.frame]") == [59, 5]


# --- 11: nothing live ------------------------------------------------------------------------------------------------

@pytest.fixture
def saved(tour):
    "The tour as Lab saved it, without widget state, as nbformat reads it."
    import nbformat

    tour.execute("docmanager:save")
    notebook = nbformat.read(tour.lab.root / "tour.ipynb", as_version=4)
    notebook.metadata.pop("widgets", None)
    return notebook


def test_11_a_notebook_page_has_pictures(saved):
    from nbconvert import HTMLExporter

    html = HTMLExporter(template_name="basic").from_notebook_node(saved)[0]
    pictures = [Image.open(io.BytesIO(base64.b64decode(coded))) for coded in re.findall(r'src="data:image/png;base64,([^"]+)"', html)]
    assert len(pictures) >= len(EXPLORERS) + 2 and min(picture.width for picture in pictures) > 100


def test_11_lab_shows_pictures_where_nothing_is_live(context, lab, saved):
    import nbformat

    saved.cells = [cell for cell in saved.cells if any("image/png" in out.get("data", {}) for out in cell.outputs)]
    saved.metadata.kernelspec = {"name": "no_kernel_of_this_name", "display_name": "none", "language": "python"}
    nbformat.write(saved, lab.root / "cold.ipynb")
    page = Page(context, lab)
    try:
        page.page.goto(f"{lab.url}/doc/tree/cold.ipynb?reset", wait_until="domcontentloaded")
        page.page.wait_for_function("n => document.querySelectorAll('.jp-Notebook .jp-RenderedImage img').length >= n", arg=len(saved.cells), timeout=180_000)
        shown = page.page.evaluate("() => [...document.querySelectorAll('.jp-Notebook .jp-Cell')].filter(c => [...c.querySelectorAll('img')].some(i => i.naturalWidth > 100 && i.getBoundingClientRect().height > 50)).length")
        assert shown == len(saved.cells) and not page.page.locator(".fvlm-explorer").count()
    finally:
        page.close()


# --- 12: saved -------------------------------------------------------------------------------------------------------

def from_disk(browser, path, act):
    "Opens a page from disk without a network, lets `act` play with it; nothing may be asked for and nothing may go wrong."
    with browser.new_context(offline=True, viewport={"width": 1200, "height": 1000}) as context:
        page, asked, wrong = context.new_page(), [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: message.type == "error" and wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(path.as_uri())
        page.wait_for_selector("[data-ready=true]")
        act(page)
        assert not wrong, wrong
        assert not [url for url in asked if not url.startswith(("file:", "data:", "blob:"))]


@pytest.mark.parametrize("name,variable", [("vit", "w"), ("fvlm", "f"), ("sc_vfp", "s")])
def test_12_a_saved_page_stands_alone(browser, tour, name, variable):
    said = kernel(tour, f"dict(data=sum(map(len, {variable}._chunks.values())) + sum(map(len, {variable}._pictures)), page=str({variable}.save_html('{name}.html').resolve()), picture=str({variable}.save_png('{name}.png').resolve()))")
    page, picture = tour.lab.root / f"{name}.html", Image.open(tour.lab.root / f"{name}.png")
    picture.load()
    assert picture.width > 200 and page.stat().st_size <= 4 / 3 * said["data"] + 200_000, f"{page.stat().st_size} bytes for {said['data']} of data"

    def play(opened):
        shown = Explorer(opened, index=0)
        panel = shown.root.locator("[data-role='panel']").first.get_attribute("data-name")
        before = shown.weights(panel)
        cell = 3 if name == "sc_vfp" else 5
        shown.click(panel, 1), shown.click(panel, cell)
        assert shown.state()["query"] == cell and shown.part("live").inner_text()
        if name != "fvlm":
            assert not np.array_equal(before, shown.weights(panel))
        shown.part("frame").fill("2")
        opened.reload()
        opened.wait_for_selector("[data-ready=true]")

    from_disk(browser, page, play)


# --- 13: size --------------------------------------------------------------------------------------------------------

def test_13_nothing_is_large(tour):
    scripts = {path.name: path.stat().st_size for path in (ROOT / "fvlm" / "static").glob("*.js")}
    assert len(scripts) >= 3 and max(scripts.values()) <= 60_000, scripts
    sizes = kernel(tour, "{n: sum(len(x) if isinstance(x, (bytes, memoryview)) else sum(len(y) for y in (x.values() if isinstance(x, dict) else x) if isinstance(y, (bytes, memoryview))) "
                         "if isinstance(x, (dict, list)) else 0 for x in e.get_state().values()) for n, e in dict(w=w, f=f, s=s, g=g, c=c, v=v).items()}")
    assert max(sizes.values()) <= 6_000_000, sizes


def test_13_a_large_cube_opens_small(tour, explorer):
    first = kernel(tour, "dict(sent=sum(map(len, b._chunks.values())) + sum(map(len, b._pictures)), whole=b.cubes[0].nbytes)")
    assert first["whole"] > 100e6 and first["sent"] <= 10e6, first
    b = explorer("big")
    b.choose(layer=4, head=7, frame=2)
    said = kernel(tour, "b.shown().tolist()")
    assert np.allclose(said, b.weights("patch to patch"), atol=1e-3)


# --- 14: keyboard and screen reader ----------------------------------------------------------------------------------

AXE = """async (root) => { const found = await window.axe.run(root, { resultTypes: ['violations'], rules: { region: { enabled: false } } });
    return found.violations.filter(v => ['serious', 'critical'].includes(v.impact)).map(v => `${v.id}: ${v.help}: ${v.nodes.map(n => n.html.slice(0, 120) + ' ' + n.failureSummary.split('\\n').slice(1).join(' ')).join(' | ')}`); }"""


def complaints(page, root):
    "What axe-core finds serious or critical under an element."
    if not page.evaluate("() => Boolean(window.axe)"):
        from importlib.resources import files

        page.evaluate(files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8"))
    return root.evaluate(AXE)


def selection(page):
    return page.evaluate("() => { const n = window.jupyterapp.shell.currentWidget.content; return [n.activeCellIndex, n.mode]; }")


def test_14_arrow_keys_move_the_query_and_not_the_notebook(tour, explorer):
    w = explorer("vit")
    w.click("patch to patch", 27)
    w.heat("patch to patch").focus()
    before = selection(w.page)
    for key, query in (("ArrowRight", 28), ("ArrowDown", 36), ("ArrowLeft", 35), ("ArrowUp", 27), ("Home", 24), ("End", 31)):
        w.page.keyboard.press(key)
        assert w.state()["query"] == query, key
    w.choose(layer=0, head=-1, frame=0)
    w.heat("patch to patch").focus()
    for key, trait, value in (("]", "layer", 1), ("[", "layer", 0), ("=", "head", 0), ("-", "head", -1), (".", "frame", 1), (",", "frame", 0), (" ", "playing", True), (" ", "playing", False)):
        w.page.keyboard.press(key)
        assert w.state()[trait] == value, key
    for key in ("j", "k", "a", "x"):  # of the notebook: next cell, previous cell, new cell, cut
        w.page.keyboard.press(key)
    assert selection(w.page) == before and len(tour.outputs()) == len(PLACES)


def test_14_tab_reaches_everything(explorer):
    w = explorer("fvlm")
    w.root.locator("canvas").first.focus()
    reached = []
    for _ in range(20):
        name = w.root.evaluate("root => root.contains(document.activeElement) ? (document.activeElement.dataset.role || document.activeElement.dataset.layer || document.activeElement.tagName) : null")
        if name is None:
            break
        reached.append(name)
        w.page.keyboard.press("Tab")
    assert name is None, "Tab never leaves the explorer"
    assert reached.count("heat") == 2 and {"layer", "head", "slot", "frame", "play", "temperature", "opacity", "same-scale"} <= set(reached), reached


@pytest.mark.parametrize("name", ["vit", "fvlm", "sc_vfp"])
def test_14_axe_finds_nothing_serious(explorer, name):
    w = explorer(name)
    assert not complaints(w.page, w.root)
    assert w.part("live").get_attribute("aria-live") == "polite" and w.root.get_attribute("role") == "group" and w.root.get_attribute("aria-label")


# --- 15: themes ------------------------------------------------------------------------------------------------------

def test_15_it_follows_the_theme(tour, explorer):
    grounds = {}
    try:
        for theme in THEMES:
            tour.theme(theme)
            for name, root in (("explorer", explorer("fvlm").root), ("scrubber", tour.page.locator(".fvlm-scrubber")), ("linked", tour.page.locator(".fvlm-linked"))):
                root.scroll_into_view_if_needed()
                assert not complaints(tour.page, root), f"{name} in {theme}"
                ground = root.evaluate("node => { while (node && ['rgba(0, 0, 0, 0)', 'transparent'].includes(getComputedStyle(node).backgroundColor)) node = node.parentElement; return getComputedStyle(node).backgroundColor; }")
                grounds[name, theme] = np.mean([float(v) for v in re.findall(r"[\d.]+", ground)[:3]])
    finally:
        tour.theme(THEMES[0])
    for name in ("explorer", "scrubber", "linked"):
        assert grounds[name, THEMES[0]] > 200 and grounds[name, THEMES[1]] < 80, grounds
    legend = explorer("fvlm").panel("coarse").locator("[data-role='legend']")
    assert float(legend.get_attribute("data-low")) == 0 and float(legend.get_attribute("data-high")) > 0 and legend.is_visible()


# --- 16: errors ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("source,words", [
    ("AttentionExplorer(AttentionCube.from_array('a', np.ones((3, 3))), frames)", "expected \\(layers, frames, heads, Q, N\\)"),
    ("AttentionExplorer(AttentionCube.from_array('a', np.full((1, 8, 1, 16, 16), np.nan), grid=(4, 4)), frames)", "NaN"),
    ("AttentionExplorer(AttentionCube.from_array('a', np.ones((1, 8, 1, 16, 16)), grid=(4, 4)), frames)", "sums to 16, expected 1"),
    ("AttentionExplorer(AttentionCube.from_array('a', np.full((1, 5, 1, 16, 16), 1 / 16), grid=(4, 4)), frames)", "frames: got 8"),
    ("AttentionExplorer.from_model(torch.nn.Linear(2, 2), frames)", "expected a vision transformer"),
    ("from fvlm.encoders.embeddings import FrameEmbedder\nAttentionExplorer.from_model(FrameEmbedder.from_pretrained('dinov2_base', download=False), frames)", "dinov2_base"),
    ("LinkedView(frames, np.ones((2, 3, 8, 4)), np.zeros((2, 3, 2)))", "heat: expected 5 axes"),
    ("PredictionScrubber(frames[:3], frames[3:], frames)", "one for each frame of the truth"),
])
def test_16_an_error_is_one_visible_sentence(tour, source, words):
    place = tour.page.evaluate("""source => { const n = window.jupyterapp.shell.currentWidget.content.model; n.sharedModel.insertCell(n.cells.length, {cell_type: 'code', source}); return n.cells.length - 1; }""", source)
    try:
        tour.run_cell(place)
        said = sentence(next(cell for cell in tour.outputs() if cell["index"] == place))
        assert said and re.search(words, said), said
        assert len(said) < 600 and "\n" not in said
        shown = tour.page.evaluate("i => window.jupyterapp.shell.currentWidget.content.widgets[i].node.innerText", place)
        assert re.search(words, shown.replace("\n", " ")), "the sentence is not on the page"
    finally:
        tour.page.evaluate("i => window.jupyterapp.shell.currentWidget.content.model.sharedModel.deleteCell(i)", place)


# --- 17: linked instruments ------------------------------------------------------------------------------------------

def linked(tour):
    root = tour.page.locator(".fvlm-linked")
    root.scroll_into_view_if_needed()
    return root


def selected(root):
    "What each of the three pictures says is selected."
    root.page.wait_for_timeout(30)
    cell, dots = root.locator("td[aria-selected='true']"), root.locator("circle.on")
    assert cell.count() == 1
    pairs = set(dots.evaluate_all("nodes => nodes.map(n => n.dataset.layer + ' ' + n.dataset.head)"))
    return f"{cell.get_attribute('data-layer')} {cell.get_attribute('data-head')}", pairs, root.locator("[data-role='frame-title']").inner_text()


def test_17_a_click_in_one_selects_in_all(tour):
    root = linked(tour)
    frame = root.locator("canvas[data-role='frame']")
    pictures = [frame.screenshot()]
    root.locator("td[data-layer='2'][data-head='1']").click()
    assert selected(root) == ("2 1", {"2 1"}, "Frame 0, layer 2, head 1")
    pictures.append(frame.screenshot())
    dot = root.locator("circle[data-layer='1'][data-head='2']").first
    place = dot.evaluate("(dot) => { const box = dot.getBoundingClientRect(), map = dot.ownerSVGElement.getBoundingClientRect(); return {x: box.x + box.width / 2 - map.x, y: box.y + box.height / 2 - map.y}; }")
    root.locator("[data-role='map']").click(position=place)
    assert selected(root) == ("1 2", {"1 2"}, "Frame 0, layer 1, head 2")
    pictures.append(frame.screenshot())
    assert len(set(pictures)) == 3
    box = frame.bounding_box()
    frame.click(position={"x": box["width"] * 5.5 / 8, "y": box["height"] * 2.5 / 8})
    strongest = kernel(tour, "divmod(int(v.heat[:, :, 0, 2, 5].argmax()), 3)")
    assert selected(root)[0] == f"{strongest[0]} {strongest[1]}"
    root.locator("[data-role='thumbnail'][data-frame='4']").click()
    assert kernel(tour, "[v.layer, v.head, v.frame]") == [*strongest, 4]


def test_17_the_linked_view_by_keyboard(tour):
    root = linked(tour)
    root.locator("td[data-layer='0'][data-head='0']").click()
    before = selection(tour.page)
    for key, expected in (("ArrowRight", "0 1"), ("ArrowDown", "1 1"), ("End", "1 2"), ("ArrowUp", "0 2"), ("Home", "0 0"), ("ArrowLeft", "0 0")):
        tour.page.keyboard.press(key)
        assert selected(root)[0] == expected, key
    root.locator("[data-role='map']").focus()
    tour.page.keyboard.press("ArrowRight")
    assert selected(root)[0] == "0 1" and root.locator("[data-role='map']").get_attribute("aria-valuetext") == "layer 0, head 1"
    root.locator("canvas[data-role='frame']").focus()
    tour.page.keyboard.press("Home"), tour.page.keyboard.press("ArrowRight")
    assert root.get_attribute("data-frame") == "1" and selection(tour.page) == before
    assert "Layer 0, head 1" in root.locator("[data-role='live']").inner_text()


def test_17_the_saved_linked_view_stands_alone(browser, tour):
    kernel(tour, "str(v.save_html('linked.html'))")

    def play(opened):
        root = opened.locator(".fvlm-linked")
        root.locator("td[data-layer='2'][data-head='0']").click()
        assert selected(root)[0] == "2 0"
        assert not complaints(opened, opened.locator("html"))

    from_disk(browser, tour.lab.root / "linked.html", play)


# --- the prediction scrubber -----------------------------------------------------------------------------------------

@pytest.fixture
def scrubber(tour):
    root = tour.page.locator(".fvlm-scrubber")
    root.scroll_into_view_if_needed()
    return root


def test_the_scrubber_scrubs(tour, scrubber):
    panels = scrubber.locator("[data-role='panel']")
    assert panels.evaluate_all("nodes => nodes.map(n => n.dataset.name)") == ["truth", "half right", "copy-last"]
    shown = {}
    for horizon in range(-2, 6):
        scrubber.locator("[data-role='horizon']").fill(str(horizon))
        assert scrubber.get_attribute("data-horizon") == str(horizon)
        shown[horizon] = [panels.nth(i).evaluate("c => c.toDataURL()") for i in range(3)]
    assert all(len(set(shown[h])) == 1 for h in (-2, -1, 0)), "frames that were seen differ between panels"
    assert all(len(set(shown[h])) == 3 for h in range(1, 6)) and {shown[h][2] for h in range(6)} == {shown[0][0]}, "copy-last is not the last frame seen"
    frame = np.asarray(Image.open(io.BytesIO(base64.b64decode(shown[3][0].split(",")[1]))).convert("RGB"))
    assert np.array_equal(frame, np.array(kernel(tour, "frames[5].tolist()")))
    live, said = scrubber.locator("[data-role='live']").inner_text(), kernel(tour, "dict(horizon=c.horizon, errors=c.errors, ratio=c.ratio())")
    assert said["horizon"] == 5 and f"{said['errors']['copy-last'][4]:.3g}".rstrip("0") in live and f"{said['ratio']['half right'][4]:.3g}" in live


def test_the_scrubber_by_keyboard_and_chart(tour, scrubber):
    scrubber.locator("[data-role='panel']").first.click()
    before = selection(tour.page)
    scrubber.locator("[data-role='frames']").focus()
    for key, horizon in (("Home", -2), ("ArrowRight", -1), ("End", 5), ("ArrowLeft", 4)):
        tour.page.keyboard.press(key)
        assert scrubber.get_attribute("data-horizon") == str(horizon), key
    tour.page.keyboard.press("d")
    assert scrubber.locator("[data-role='difference']").is_checked() and scrubber.locator("[data-role='legend']").is_visible()
    tour.page.keyboard.press("d")
    chart = scrubber.locator("[data-role='chart']")
    box = chart.bounding_box()
    chart.click(position={"x": box["width"] * (52 + (2 + 2) / 7 * 698) / 760, "y": box["height"] / 2})
    assert scrubber.get_attribute("data-horizon") == "2" and selection(tour.page) == before
    reached = set()
    scrubber.locator("[data-role='frames']").focus()
    for _ in range(5):
        reached.add(scrubber.evaluate("() => document.activeElement.dataset.role"))
        tour.page.keyboard.press("Tab")
    assert reached == {"frames", "play", "horizon", "speed", "difference"}


def test_the_scrubber_plays_and_pauses(tour, scrubber):
    scrubber.locator("[data-role='horizon']").fill("-2")
    painted, sent = int(scrubber.get_attribute("data-painted")), len(tour.sent)
    scrubber.locator("[data-role='play']").click()
    tour.page.wait_for_function("([node, n]) => +node.dataset.painted > n + 9", arg=[scrubber.element_handle(), painted], timeout=60_000)
    assert scrubber.locator("[data-role='play']").inner_text() == "Pause"
    scrubber.locator("[data-role='play']").click()
    still, frames = scrubber.get_attribute("data-horizon"), int(scrubber.get_attribute("data-painted")) - painted
    assert sum(b"comm_msg" in message for message in tour.sent[sent:]) <= frames + 2
    tour.page.wait_for_timeout(300)
    assert scrubber.get_attribute("data-horizon") == still and kernel(tour, "[c.horizon, c.playing]") == [int(still), False]
    assert float(scrubber.get_attribute("data-milliseconds")) < 100


def test_the_saved_scrubber_stands_alone(browser, tour):
    said = kernel(tour, "dict(page=str(p.save_html('scrubber.html')), picture=str(p.save_png('scrubber.png')), data=sum(map(len, p._sheets)))")
    page = tour.lab.root / said["page"]
    Image.open(tour.lab.root / said["picture"]).load()
    assert page.stat().st_size <= 4 / 3 * said["data"] + 200_000

    def play(opened):
        root = opened.locator(".fvlm-scrubber")
        root.locator("[data-role='horizon']").fill("2")
        assert root.get_attribute("data-horizon") == "2" and "nearest: frame" in root.inner_text()
        root.locator("[data-role='play']").click()
        opened.wait_for_function("node => node.dataset.horizon !== '2'", arg=root.element_handle())
        assert not complaints(opened, opened.locator("html"))

    from_disk(browser, page, play)


# --- 10: reload, last because it takes the page away from the others --------------------------------------------------

def test_10_a_reload_keeps_the_choice(tour, explorer):
    w, p = explorer("vit"), tour.page.locator(".fvlm-scrubber")
    w.click("patch to patch", 33)
    w.choose(layer=2, head=1, frame=6, temperature=0.5)
    p.locator("[data-role='horizon']").fill("2")
    before = w.state()
    tour.ask("None")  # whatever the page had to say has been heard
    tour.execute("docmanager:save")
    back = "n => document.querySelectorAll('.fvlm-explorer[data-ready=true]').length === n && 'back'"
    for _ in range(4):  # on a very busy machine Lab itself gives up asking the kernel for its widgets, and says so; a reader would reload once more
        tour.page.reload(wait_until="domcontentloaded")
        tour.ready()
        found = tour.page.wait_for_function(f"n => ({back})(n) || document.body.innerText.includes('Error displaying widget: model not found') && 'given up'", arg=len(EXPLORERS), timeout=180_000)
        if found.json_value() == "back":
            break
    else:
        pytest.fail("Lab did not find its widgets again in four reloads")
    after = Explorer(tour.page, "vit").state()
    assert after == before and (after["query"], after["layer"], after["head"], after["frame"]) == (33, 2, 1, 6) and after["temperature"] == pytest.approx(0.5)
    tour.page.wait_for_selector(".fvlm-scrubber[data-ready=true]")
    assert p.get_attribute("data-horizon") == "2"
