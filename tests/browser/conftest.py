"""One JupyterLab and one notebook with every widget for all browser tests of a session."""
import pytest

from tests.browser.lab import Lab, Page
from tests.browser.tour import CELLS


@pytest.fixture(scope="session")
def lab(browser, tmp_path_factory):
    "A JupyterLab server of this session's own; skipped with `browser` where there is no Chromium."
    server = Lab(tmp_path_factory.mktemp("lab"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def tour(browser, lab):
    "The page of a notebook that shows every widget, run from top to bottom in a Lab that reaches nothing but the loopback."
    lab.write("tour.ipynb", *CELLS.values())
    with browser.new_context(viewport={"width": 1400, "height": 1000}) as context:
        page = Page(context, lab)
        page.open("tour.ipynb")
        page.run_all()
        page.page.wait_for_function("n => document.querySelectorAll('.fvlm-explorer[data-ready=true]').length === n", arg=6, timeout=60_000)
        page.page.wait_for_selector(".fvlm-scrubber[data-ready=true]")
        page.page.wait_for_selector(".fvlm-linked[data-ready=true]")
        page.problems = page.errors()
        yield page
