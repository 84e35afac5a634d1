"""A real JupyterLab on the loopback, opened in a real Chromium: what a test needs to run a notebook and to look at it."""
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import quote

ROOT = Path(__file__).resolve().parents[2]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
QUIET = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-extensions", "--mute-audio", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # whatever is not this machine is not found
)
HOW_TO_GET_ONE = "install Chromium (Debian, Ubuntu: apt-get install chromium) or name one: FVLM_CHROMIUM=/path/to/chrome"
START_SECONDS = 180

# Nothing but this machine is asked, and nothing pops up over the page.
SETTINGS = {
    "@jupyterlab/apputils-extension/notification.jupyterlab-settings": {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True},
    "@jupyterlab/notebook-extension/tracker.jupyterlab-settings": {"windowingMode": "none", "autoStartDefaultKernel": True},
    "@jupyterlab/docmanager-extension/plugin.jupyterlab-settings": {"autosave": False},
}


def find_chromium():
    "The path of a Chromium, or None; FVLM_CHROMIUM has the first word."
    named = os.environ.get("FVLM_CHROMIUM")
    if named:
        return shutil.which(named)
    return next((found for name in BROWSERS if (found := shutil.which(name))), None)


def free_port():
    "A port that nobody listens on."
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Lab:
    "A JupyterLab server of its own: its own port, settings, kernels' home and folder of notebooks; gone with `close`."

    def __init__(self, folder):
        self.folder, self.root = Path(folder), Path(folder) / "notebooks"
        self.root.mkdir(parents=True)
        for name, values in SETTINGS.items():
            path = self.folder / "settings" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(values), encoding="utf-8")
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = self.folder / "lab.log"
        own = {name: str(self.folder / place) for name, place in {
            "JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "runtime", "IPYTHONDIR": "ipython",
            "JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces"}.items()}
        environment = {**os.environ, **own, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "FVLM_OFFLINE": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1",
                       "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
        command = [
            sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={self.port}", "--ServerApp.port_retries=0",
            f"--ServerApp.root_dir={self.root}", "--IdentityProvider.token=", "--ServerApp.password=", "--LabApp.expose_app_in_browser=True",
            "--LabApp.news_url=", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", "--LabApp.collaborative=False"]
        with self.log.open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(command, cwd=self.folder, env=environment, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        self._wait()

    def _wait(self):
        limit = time.monotonic() + START_SECONDS
        while time.monotonic() < limit and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.url}/api/status", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        self.close()
        raise RuntimeError(f"JupyterLab did not answer on {self.url} within {START_SECONDS} s:\n{self.log.read_text(encoding='utf-8')[-2000:]}")

    def write(self, name, *cells):
        "A notebook of code cells in the root folder; its name."
        made = [{"cell_type": "code", "id": f"cell-{i}", "metadata": {}, "execution_count": None, "outputs": [], "source": source.strip("\n")} for i, source in enumerate(cells)]
        kernel = {"kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}, "language_info": {"name": "python"}}
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).write_text(json.dumps({"cells": made, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}), encoding="utf-8")
        return name

    def copy(self, notebook):
        "A copy of a notebook of the repository, without its stored outputs, at the same place under the root folder; its name."
        name = Path(notebook).relative_to(ROOT / "nbs").as_posix()
        content = json.loads(Path(notebook).read_text(encoding="utf-8"))
        for cell in content["cells"]:
            if cell["cell_type"] == "code":
                cell["outputs"], cell["execution_count"] = [], None
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        if not (self.root / "results").exists():
            (self.root / "results").symlink_to(ROOT / "results")  # studies read their records from a folder above them
            shutil.copytree(ROOT / "nbs" / "images", self.root / "images")  # the server, unlike a kernel, follows no link out of its folder
        (self.root / name).write_text(json.dumps(content), encoding="utf-8")
        return name

    def close(self):
        "Ends the server, and the kernels that it started."
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


OUTPUTS = """
() => { const cells = window.jupyterapp.shell.currentWidget.content.model.cells, out = [];
  for (let i = 0; i < cells.length; i++) { const c = cells.get(i); if (c.type === 'code') out.push({index: i, count: c.executionCount, source: c.sharedModel.getSource(), outputs: c.outputs.toJSON()}); }
  return out; }
"""
RUNNING = "i => window.jupyterapp.shell.currentWidget.content.widgets[i].node.querySelector('.jp-InputPrompt').textContent.includes('*')"
# A command's promise ends with the last cell it runs.
EXECUTE = """([command, given, seconds]) => Promise.race([window.jupyterapp.commands.execute(command, given).then(() => true), new Promise(done => setTimeout(() => done(false), 1000 * seconds))])"""


class Page:
    "A browser page on a Lab, with what it said on its console and whom it asked."

    def __init__(self, context, lab):
        self.context, self.lab, self.page = context, lab, context.new_page()
        self.page.set_default_timeout(60_000)
        self.console, self.requests, self.sent = [], [], []
        self.page.on("console", lambda message: self.console.append((message.type, message.text)))
        self.page.on("pageerror", lambda error: self.console.append(("error", str(error))))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("websocket", lambda socket: (self.requests.append(socket.url), socket.on("framesent", lambda message: self.sent.append(message if isinstance(message, bytes) else message.encode()))))

    def open(self, name):
        "Opens a notebook in a document of its own and waits for its kernel."
        self.page.goto(f"{self.lab.url}/doc/tree/{quote(name)}?reset", wait_until="domcontentloaded")
        self.ready()

    def tab(self, name):
        "Opens a notebook in a tab of a Lab that stays open, and waits for its kernel: what the page said before is forgotten."
        if "/lab" not in self.page.url:
            self.page.goto(f"{self.lab.url}/lab?reset", wait_until="domcontentloaded")
            self.page.wait_for_function("() => window.jupyterapp?.restored.then(() => true)", timeout=240_000)
        self.console.clear(), self.requests.clear()
        self.execute("docmanager:open", path=name, factory="Notebook")
        self.page.wait_for_function("name => window.jupyterapp.shell.currentWidget?.context?.path === name", arg=name)
        self.ready()

    def close_tab(self):
        "Closes the notebook in front and ends its kernel, so that the next one has the memory and the cores."
        self.page.evaluate("async () => { const panel = window.jupyterapp.shell.currentWidget; await panel?.sessionContext?.shutdown(); panel?.dispose(); }")

    def ready(self):
        "Waits until Lab shows a notebook with a kernel at rest."
        self.page.wait_for_function("() => window.jupyterapp?.shell?.currentWidget?.content?.model?.cells && window.jupyterapp.shell.currentWidget.context.isReady", timeout=240_000)
        self.page.wait_for_function("() => window.jupyterapp.shell.currentWidget.sessionContext.session?.kernel?.status === 'idle'", timeout=240_000)

    def execute(self, command, seconds=60, **arguments):
        "Runs a command of JupyterLab, as a menu would, to its end."
        if not self.page.evaluate(EXECUTE, [command, arguments, seconds]):
            raise TimeoutError(f"{command} took more than {seconds} s")

    def run_all(self, seconds=300):
        "Runs every cell from top to bottom and waits for the last one."
        self.execute("notebook:run-all-cells", seconds)

    def run_cell(self, index, seconds=120):
        "Runs one cell and waits; what it printed."
        self.page.evaluate("i => { window.jupyterapp.shell.currentWidget.content.activeCellIndex = i; }", index)
        self.execute("notebook:run-cell", seconds)
        return self.printed(index)

    def start_cell(self, index):
        "Runs one cell and waits no longer than until it runs."
        self.page.evaluate("i => { window.jupyterapp.shell.currentWidget.content.activeCellIndex = i; window.jupyterapp.commands.execute('notebook:run-cell'); }", index)
        self.page.wait_for_function(RUNNING, arg=index)

    def running(self, index):
        "Whether a cell runs. The kernel's own status would not do: it says idle after every message of a widget, which it hears between two steps."
        return self.page.evaluate(RUNNING, index)

    def ask(self, source, seconds=120):
        "What a new last cell with this code prints: a question to the kernel, as a reader would put it."
        index = self.page.evaluate("""s => { const n = window.jupyterapp.shell.currentWidget.content.model;
            n.sharedModel.insertCell(n.cells.length, {cell_type: 'code', source: s}); return n.cells.length - 1; }""", source)
        said = self.run_cell(index, seconds)
        self.page.evaluate("i => window.jupyterapp.shell.currentWidget.content.model.sharedModel.deleteCell(i)", index)
        return said

    def outputs(self):
        "The code cells with their outputs, as the notebook's model holds them."
        return self.page.evaluate(OUTPUTS)

    def printed(self, index):
        "The text that a cell printed."
        cell = next(cell for cell in self.outputs() if cell["index"] == index)
        return "".join("".join(out["text"]) for out in cell["outputs"] if out["output_type"] == "stream" and out["name"] == "stdout").strip()

    def errors(self):
        "Everything that went wrong so far: error outputs, errors on the console, widgets that could not be shown."
        found = [f"cell {cell['index']}: {out['ename']}: {out['evalue']}" for cell in self.outputs() for out in cell["outputs"] if out["output_type"] == "error"]
        found += [f"console: {text}" for kind, text in self.console if kind == "error"]
        shown = self.page.evaluate("() => document.body.innerText")
        return found + [f"on the page: {words}" for words in ("Error displaying widget", "Failed to load model class", "Loading widget...", "Model not found") if words in shown]

    def outside(self):
        "Requests that left the loopback."
        return [url for url in self.requests if not url.startswith((self.lab.url, "data:", "blob:", self.lab.url.replace("http", "ws"), "about:", "file:"))]

    def theme(self, name):
        "Switches Lab to 'JupyterLab Light' or 'JupyterLab Dark'."
        self.execute("apputils:change-theme", theme=name)
        self.page.wait_for_function("light => document.body.dataset.jpThemeLight === light", arg="true" if "Light" in name else "false")

    def close(self):
        "Closes the page and ends its kernel."
        self.page.evaluate("() => window.jupyterapp?.shell?.currentWidget?.sessionContext?.shutdown()")
        self.page.close()
