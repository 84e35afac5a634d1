"""Reports: what is on the page, what is refused, and that the page needs nothing from outside."""
import json
import re
from html.parser import HTMLParser
from importlib.resources import files
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from fvlm.app.report import Column, Report, data_uri
from fvlm.core import ConfigError, InputError
from fvlm.line_chart import line_chart

RED, BLUE = Image.new("RGB", (24, 16), "red"), Image.new("RGB", (24, 16), "blue")
VOID = {"meta", "link", "img", "br", "input", "line", "hr"}


class Page(HTMLParser):
    "The elements of a page; fails on a tag that is closed in the wrong place."

    def __init__(self, html):
        super().__init__()
        self.open, self.elements, self.texts = [], [], []
        self.feed(html)
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag, **attributes):
        return [found for name, found in self.elements if name == tag and all(found.get(key.rstrip("_")) == value for key, value in attributes.items())]


def full():
    "One of everything."
    report = Report("A title", lead="A lead.", made="Made for a test.")
    report.heading("One").highlights(("31 %", "less"), (4, "runs", "of five")).text("First.", "Second.")
    report.heading("Two").table(
        [{"m": "a", "mse": SimpleNamespace(estimate=0.25, low=0.2, high=0.3), "skill": -0.5, "g": "x"}, {"m": "b", "mse": 0.5, "skill": 0.5, "g": "y"}],
        [Column(key="m"), Column(key="mse", best="min"), Column(key="skill", format=".1%", best="max", bar=True)], group="g", caption="A caption.")
    report.heading("Three").figure(RED, alt="All red.", caption="Red.").curves({"train": [3, 2, 1], "val": ([0, 2], [3, 2])}, x_label="step", y_label="loss")
    report.frames_scrubber({"truth": [RED, BLUE], "copy": [RED, RED]}, scores={"copy": [0.0, 0.7]}, title="Frames")
    report.embed("<!doctype html><body style='margin:0'><div style='height:901px'>within</div>", title="A tall page", caption="Tall.")
    return report.note("Text.", ["a bullet"]).facts({"seed": 0})


def test_everything_is_on_the_page_and_nothing_points_outside(tmp_path, capsys):
    path = full().save(tmp_path / "sub" / "report.html")
    html = path.read_text(encoding="utf-8")
    assert str(path) in capsys.readouterr().out and html.startswith("<!doctype html>")
    assert [p.name for p in path.parent.iterdir()] == ["report.html"], "a temporary file was left"
    page = Page(html)
    for said in ("A title", "A lead.", "31 %", "of five", "Second.", "A caption.", "0.250", "0.200 to 0.300", "\u221250.0%", "Red.", "a bullet", "seed", "Made for a test."):
        assert any(said in text for text in page.texts), said
    for tag, attributes in page.elements:
        for key in ("src", "href", "data-src", "srcset", "action"):
            assert attributes.get(key, "#").startswith(("#", "data:")), (tag, key, attributes[key][:60])
    assert not re.search(r"@import|url\((?!#)", html) and "http" not in re.sub(r"data:[^\"]*", "", html)


def test_the_page_is_accessible():
    page = Page(full().html())
    assert all(image.get("alt") for image in page.all("img"))
    assert page.all("html")[0]["lang"] == "en" and page.all("meta", name="viewport")
    slider = page.all("input", type="range")[0]
    assert slider["aria-label"] == "Frames" and slider["aria-valuetext"] == "frame 1 of 2" and slider["max"] == "1"
    assert page.all("button")[0]["aria-label"] == "Play" and page.all("svg")[0]["aria-label"].startswith("Line chart of loss against step: train from 3 to 1")
    assert all("scope" in head for head in page.all("th"))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids)) and {link["href"][1:] for link in page.all("a")} == set(ids)


def luminance(colour):
    channels = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_both_themes_can_be_read():
    "Contrast of every text colour on every ground it appears on: at least 4.5."
    css = files("fvlm").joinpath("static/report.html").read_text(encoding="utf-8")
    themes = re.findall(r":root \{(.*?)\}", css, re.DOTALL)[:2]
    assert len(themes) == 2
    for theme in themes:
        colour = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", theme))
        texts = ["ink", "soft", "accent", *(f"s{i}" for i in range(8))]
        pairs = [(text, ground) for text in texts for ground in ("paper", "card")] + [("accent", "tint"), ("paper", "accent"), ("ink", "warm"), ("ink", "tint"), ("soft", "tint")]
        for text, ground in pairs:
            light, dark = sorted((luminance(colour[text]), luminance(colour[ground])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, ground, colour[text], colour[ground])


@pytest.mark.parametrize("hostile", ["<script>alert(1)</script>", "</script><img src=x onerror=alert(1)>", '"><b>', "{{ 7 * 7 }}", "' onfocus='alert(1)"])
def test_names_stay_names(hostile):
    report = Report(hostile, lead=hostile, made=hostile).heading(hostile).text(hostile).highlights((hostile, hostile, hostile))
    report.table([{"a": hostile, "b": 1.0, "g": hostile}], [Column(key="a", label=hostile, hint=hostile), "b"], caption=hostile, group="g")
    report.figure(RED, alt=hostile, caption=hostile).curves({hostile: [1, 2]}, title=hostile, x_label=hostile, y_label=hostile, caption=hostile)
    report.frames_scrubber({hostile: [RED]}, title=hostile, caption=hostile, labels=[hostile], scores={hostile: [1.0]}).embed(hostile, title=hostile, caption=hostile).note(hostile, [hostile], title=hostile).facts({hostile: hostile}, title=hostile)
    tame = Report("t", lead="t", made="t").heading("t").text("t").highlights(("t", "t", "t"))
    tame.table([{"a": "t", "b": 1.0, "g": "t"}], [Column(key="a", label="t", hint="t"), "b"], caption="t", group="g")
    tame.figure(RED, alt="t", caption="t").curves({"t": [1, 2]}, title="t", x_label="t", y_label="t", caption="t")
    tame.frames_scrubber({"t": [RED]}, title="t", caption="t", labels=["t"], scores={"t": [1.0]}).embed("t", title="t", caption="t").note("t", ["t"], title="t").facts({"t": "t"}, title="t")
    came, expected = Page(report.html()), Page(tame.html())
    assert [tag for tag, _ in came.elements] == [tag for tag, _ in expected.elements]
    assert [sorted(attributes) for _, attributes in came.elements] == [sorted(attributes) for _, attributes in expected.elements]
    assert hostile in "".join(came.texts)
    data = json.loads(came.all("figure", class_="chart")[0]["data-chart"])
    assert data["lines"][0]["name"] == hostile


# --- tables ----------------------------------------------------------------------------------------------------------

def best_of(values, **options):
    report = Report("t").table([{"m": str(i), "v": value} for i, value in enumerate(values)], ["m", Column(key="v", **options)])
    return [row["cells"][1]["best"] for row in report.parts[0]["rows"]]


def test_the_best_of_a_column():
    assert best_of([0.3, 0.1, 0.2], best="min") == [False, True, False]
    assert best_of([0.3, 0.1, 0.2], best="max") == [True, False, False]
    assert best_of([0.3, 0.1, 0.2]) == [False, False, False]
    assert best_of([0.1004, 0.1001, 0.2], best="min") == [True, True, False], "they print alike"
    assert best_of([float("nan"), 0.4, 0.5], best="min") == [False, True, False], "NaN is never best"
    assert best_of([None, "n/a", 0.5, 0.6], best="max") == [False, False, False, True]
    assert best_of([0.5], best="min") == [False], "one row has no best"
    assert best_of([torch.tensor(0.2), np.float32(0.1)], best="min") == [False, True]
    assert best_of([SimpleNamespace(estimate=0.1, low=0.0, high=0.9), 0.2], best="min") == [True, False]


def test_bars_start_at_zero():
    report = Report("t").table([{"m": "a", "v": -1.0}, {"m": "b", "v": 3.0}, {"m": "c", "v": 0.0}], ["m", Column(key="v", bar=True)])
    bars = [row["cells"][1]["bar"] for row in report.parts[0]["rows"]]
    assert bars == [{"left": 0.0, "width": 25.0, "minus": True}, {"left": 25.0, "width": 75.0, "minus": False}, {"left": 25.0, "width": 0.0, "minus": False}]


@pytest.mark.parametrize("call, said", [
    (lambda r: r.table([], ["m"]), "0 rows"), (lambda r: r.table([{"m": 1}], []), "0 columns"),
    (lambda r: r.table([{"m": 1}, {"n": 1}], ["m"]), "rows[1]: no 'm'"), (lambda r: r.table([{"m": 1}], ["m"], group="g"), "rows[0]: no 'g'"),
    (lambda r: r.table([{"m": 1}], [Column(key="m", best="lowest")]), "best of column 'm'"),
    (lambda r: r.figure(RED, alt=" "), "alt"), (lambda r: r.figure(torch.zeros(3, 3, 3, 3, 3), alt="x"), "image"),
    (lambda r: r.frames_scrubber({}), "tracks"), (lambda r: r.frames_scrubber({"a": []}), "tracks"),
    (lambda r: r.frames_scrubber({"a": [RED], "b": [RED, RED]}), "'b': 2"), (lambda r: r.frames_scrubber({"a": [RED]}, labels=["1", "2"]), "'labels': 2"),
    (lambda r: r.frames_scrubber({"a": [RED]}, scores={"a": [1, 2]}), "'scores of a': 2"), (lambda r: r.frames_scrubber({"a": [RED]}, scores={"b": [1]}), "no track named 'b'"),
    (lambda r: r.frames_scrubber({"a": [RED]}, fps=0), "fps"),
    (lambda r: r.embed(" ", title="x"), "page: got nothing"), (lambda r: r.embed("<p>", title=""), "title: got nothing"),
    (lambda r: r.curves({}), "series"), (lambda r: r.curves({str(i): [1] for i in range(9)}), "9 lines"), (lambda r: r.curves({"a": ([1, 2], [1])}), "2 x values and 1 y"),
    (lambda r: r.curves({"a": [float("nan")]}), "no finite"), (lambda r: r.curves({"a": [-1.0]}, log_y=True), "no finite positive"),
    (lambda r: Report("  "), "title"),
])
def test_mistakes_are_raised_where_they_are_made(call, said):
    report = Report("t")
    with pytest.raises(InputError, match=re.escape(said)):
        call(report)
    assert report.parts == []


def test_save_refuses_an_empty_report_and_another_suffix(tmp_path):
    with pytest.raises(InputError, match="nothing in it"):
        Report("t").save(tmp_path / "a.html")
    with pytest.raises(ConfigError, match=".html"):
        Report("t").text("x").save(tmp_path / "a.pdf")
    assert list(tmp_path.iterdir()) == []


# --- charts and pictures ---------------------------------------------------------------------------------------------

def test_a_chart_is_to_scale():
    chart = line_chart({"a": ([0, 10], [0.0, 1.0]), "b": ([5], [0.5])})
    (x0, y0), (x1, y1) = [tuple(map(float, pair.split(","))) for pair in chart["lines"][0]["path"][1:].split("L")]
    xb, yb = map(float, chart["lines"][1]["path"][1:].split(","))
    assert x0 == chart["left"] and x1 == pytest.approx(chart["right"], abs=0.1) and y1 < y0
    assert (xb, yb) == (pytest.approx((x0 + x1) / 2, abs=0.2), pytest.approx((y0 + y1) / 2, abs=0.2))


def test_a_logarithmic_axis_is_logarithmic():
    chart = line_chart({"a": [1, 10, 100]}, log_y=True)
    heights = [float(pair.split(",")[1]) for pair in chart["lines"][0]["path"][1:].split("L")]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2)
    assert {tick["text"] for tick in chart["y_ticks"]} >= {"1", "10", "100"}


def test_charts_of_awkward_data():
    for series in ({"a": [1.0]}, {"a": [2.0, 2.0, 2.0]}, {"a": [float("nan"), 1.0, float("inf"), 2.0]}, {"a": np.arange(3)}, {"a": torch.arange(3.0)}, {"a": [1e-12, 2e-12]}, {"a": [-1e9, 1e9]}):
        chart = line_chart(series)
        assert chart["y_ticks"] and "nan" not in chart["lines"][0]["path"] and "inf" not in chart["lines"][0]["path"]
    long = line_chart({"a": range(10_001)})["lines"][0]["points"]
    assert len(long) <= 402 and long[0][1] == "0" and long[-1][1] == "10000", "thinned, both ends kept"


@pytest.mark.parametrize("end", [0.0, 1.0])
def test_end_labels_do_not_touch_and_stay_on_the_chart(end):
    chart = line_chart({str(i): [1.0 - end, end] for i in range(8)})
    heights = sorted(line["label_at"] for line in chart["lines"])
    assert min(b - a for a, b in zip(heights, heights[1:])) >= 12 and heights[0] >= chart["top"] and heights[-1] <= chart["bottom"]


def test_pictures_in_every_dialect():
    uri, width, height = data_uri(RED)
    assert uri.startswith("data:image/png;base64,") and (width, height) == (24, 16)
    byte = torch.zeros(16, 24, 3, dtype=torch.uint8)
    byte[..., 0] = 255
    assert data_uri(byte)[0] == data_uri(byte.numpy())[0] == data_uri(byte.permute(2, 0, 1).float() / 255)[0] == uri
    assert data_uri(RED, lossy=True)[0].startswith("data:image/jpeg;base64,")
    assert data_uri(Image.new("RGBA", (4000, 1000)))[1:] == (1600, 400)


def test_scrubber_marks_the_lowest_score_of_a_moment():
    part = Report("t").frames_scrubber({"a": [RED, RED], "b": [RED, BLUE]}, scores={"a": [1, 2], "b": [2, float("nan")]}).parts[0]
    assert [track["lowest"] for track in part["tracks"]] == [[True, True], [False, False]]
    assert part["tracks"][1]["scores"] == ["2.000", "–"]


# --- in a browser ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_works_from_disk(browser, tmp_path, scheme):
    path = full().save(tmp_path / "report.html", quiet=True)
    with browser.new_context(color_scheme=scheme, viewport={"width": 1000, "height": 800}, offline=True) as context:
        page, complaints, requests = context.new_page(), [], []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: None if request.url.startswith("data:") else requests.append(request.url))
        page.goto(path.as_uri())
        picture, slider = page.locator(".track img").first, page.locator(".controls input")
        before = picture.get_attribute("src")
        slider.focus()
        page.keyboard.press("ArrowRight")
        assert slider.get_attribute("aria-valuetext") == "frame 2 of 2" and picture.get_attribute("src") != before
        assert picture.get_attribute("alt") == "truth, frame 2 of 2" and page.locator(".track output").inner_text() == "0.700"
        page.get_by_role("button", name="Play").click()
        page.get_by_role("button", name="Pause").click()
        page.locator(".chart svg").hover(position={"x": 300, "y": 80})
        assert "train 2" in page.locator(".tip").inner_text()
        frame = page.locator(".page iframe")
        frame.scroll_into_view_if_needed()
        page.wait_for_function("document.querySelector('.page iframe').clientHeight > 901")
        assert page.frame_locator(".page iframe").get_by_text("within").is_visible() and frame.get_attribute("title") == "A tall page"
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", paper)[:3])) > 384) == (scheme == "light")
        page.mouse.move(0, 0)
        page.set_viewport_size({"width": 360, "height": 700})
        page.wait_for_function("document.documentElement.clientWidth === 360")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, "the page scrolls sideways on a phone"
        assert complaints == [] and len(requests) == 1
