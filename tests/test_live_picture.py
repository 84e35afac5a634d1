"""What every widget shares: how frames travel, pages that stand alone, a picture where nothing is live."""
import base64
import io

import numpy as np
import pytest
import traitlets
from PIL import Image

from fvlm.core import numpy_generator
from fvlm.instruments.live_picture import LIVE, MAX_SIDE, SHEET_COLUMNS, TWIN_BYTES, LivePicture, jpegs, packed, shrunk, sprite_sheet, widget_page
from tests.widget_pages import bytes_of, state_of


def film(n, height=12, width=16):
    return numpy_generator(0, "film", n).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


class Small(LivePicture):
    "A number, some bytes, and a picture of noise."

    _esm = "export default { render() {} }"
    _css = ".small { color: red }"
    title = "a </script> & <b>"
    level = traitlets.Int(3).tag(sync=True)
    playing = traitlets.Bool(False).tag(sync=True)
    _bytes = traitlets.Dict().tag(sync=True)
    kept_here = traitlets.Int(7)

    def picture(self):
        return Image.fromarray(film(1, 12 * self.level, 16)[0])


@pytest.fixture
def small():
    return Small(level=5, playing=True, _bytes={"one": [b"\x00\xff\x00"], "two": b"ab" * 400})


@pytest.mark.parametrize("n", [1, 7, 8, 9, 20])
def test_a_sheet_holds_every_frame_unchanged(n):
    frames, sheet = film(n), np.asarray(Image.open(io.BytesIO(sprite_sheet(film(n)))))
    for i in range(n):
        row, column = divmod(i, SHEET_COLUMNS)
        assert np.array_equal(sheet[12 * row: 12 * row + 12, 16 * column: 16 * column + 16], frames[i])


def test_only_large_frames_are_made_smaller():
    assert shrunk(film(2)) is not None and np.array_equal(shrunk(film(2)), film(2))
    assert shrunk(film(2, 300, 600)).shape == (2, MAX_SIDE // 2, MAX_SIDE, 3)
    assert shrunk(film(1, 2000, 3), 100).shape == (1, 100, 1, 3)


def test_frames_go_as_jpegs_of_their_own_size_at_most():
    assert [Image.open(io.BytesIO(one)).size for one in jpegs(film(2, 720, 1280) // 8)] == [(480, 270)] * 2
    assert Image.open(io.BytesIO(jpegs(film(1, 36, 36))[0])).size == (288, 288)
    many = jpegs(film(60, 240, 320) // 4 + 90)
    assert sum(map(len, many)) < 1_000_000 and Image.open(io.BytesIO(many[0])).size == (160, 120)


@pytest.mark.parametrize("data", [b"", b"\x00", b"\x01\x02", b"ab" * 500, np.linspace(-3, 0, 999).astype(np.float16).tobytes(), numpy_generator(0, "bytes").bytes(1001)])
def test_bytes_come_back_and_are_never_longer_than_as_they_are(data):
    planes, coded = packed(data)
    assert bytes_of(planes, coded) == data and len(coded) <= len(base64.b64encode(data))


def test_a_page_holds_the_state_and_asks_for_nothing(small, tmp_path):
    page = small.save_html(tmp_path / "p.html").read_text(encoding="utf-8")
    assert state_of(page) == {"level": 5, "playing": False, "_bytes": {"one": [b"\x00\xff\x00"], "two": b"ab" * 400}}, "its own synchronised traits, standing still"
    assert small.playing and ".small { color: red }" in page and "export default" in page
    assert "a &lt;/script&gt; &amp; &lt;b&gt;" in page and page.count("<script") == page.count("</script>") == 4
    assert "http" not in page


def test_a_page_keeps_text_that_looks_like_markup():
    page = widget_page("// </script> <!-- not the end", {"a": "</script><!--", "b": b"\x00\xff\x01"}, "t")
    assert page.count("</script>") == 4 and "<!-- not" not in page and state_of(page) == {"a": "</script><!--", "b": b"\x00\xff\x01"}


def test_the_picture_first_and_the_widget_after(small, monkeypatch):
    import IPython.display

    shown = []
    monkeypatch.setattr(IPython.display, "display", lambda data, **options: shown.append((data, options)))
    small._ipython_display_()
    (still, options), (live, _) = shown
    assert set(still) == {"image/png", "text/plain"} and still["text/plain"] == small.title and options["metadata"] == {"needs_background": "light"}
    assert set(live) == {LIVE, "text/plain"} and live[LIVE]["model_id"] == small.model_id, "a picture in the live output too would show twice without a kernel"


def test_a_notebook_keeps_a_large_picture_in_256_colours(small):
    decoded = lambda: Image.open(io.BytesIO(base64.b64decode(small._repr_mimebundle_()[0]["image/png"])))  # noqa: E731
    assert decoded().mode == "RGB" and np.array_equal(np.asarray(decoded()), np.asarray(small.picture()))
    small.level = 200
    assert decoded().mode == "P" and len(base64.b64decode(small.twin()["image/png"])) < 3 * 12 * 200 * 16 > TWIN_BYTES


def test_the_saved_picture_is_the_picture(small, tmp_path):
    assert np.array_equal(np.asarray(Image.open(small.save_png(tmp_path / "p.png"))), np.asarray(small.picture()))


def test_a_widget_without_a_picture_is_refused():
    with pytest.raises(TypeError, match="abstract method '?picture"):
        type("Unseen", (LivePicture,), {"_esm": "export default { render() {} }"})()
