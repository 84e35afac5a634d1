"""One JupyterLab and one notebook with every widget for all browser tests of a session."""
import pytest

from tests.browser.lab import Lab, Page
from tests.browser.tour import CELLS, EXPLORERS


@pytest.fixture(scope="session")
def lab(browser, tmp_path_factory):
    "A JupyterLab server of this session's own; skipped with `browser` where there is no Chromium."
    server = Lab(tmp_path_factory.mktemp("lab"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def context(browser):
    "One browser profile for all pages: Lab's own scripts are read once."
    with browser.new_context(viewport={"width": 1400, "height": 1000}) as shared:
        yield shared


@pytest.fixture(scope="session")
def shelf(context, lab):
    "A page of Lab that notebooks are opened in, one after the other."
    page = Page(context, lab)
    yield page
    page.page.close()


@pytest.fixture(scope="session")
def tour(context, lab):
    "The page of a notebook that shows every widget, run from top to bottom in a Lab that reaches nothing but the loopback."
    lab.write("tour.ipynb", *CELLS.values())
    page = Page(context, lab)
    page.open("tour.ipynb")
    page.run_all()
    page.page.wait_for_function("n => document.querySelectorAll('.fvlm-explorer[data-ready=true]').length === n", arg=len(EXPLORERS), timeout=180_000)
    page.page.wait_for_selector(".fvlm-scrubber[data-ready=true]")
    page.page.wait_for_selector(".fvlm-linked[data-ready=true]")
    page.problems = page.errors()
    return page
