"""One attention explorer on a page, taken hold of as a reader would: by its canvases and its controls."""
import math

import numpy as np

from tests.browser.tour import EXPLORERS


class Explorer:
    "One explorer on a page, by its place there."

    def __init__(self, page, name=None, index=None):
        self.page = page
        self.root = page.locator(".fvlm-explorer").nth(EXPLORERS[name] if index is None else index)

    def state(self):
        return self.root.evaluate("root => root.explorer.state()")

    def weights(self, panel):
        return np.array(self.root.evaluate("(root, name) => root.explorer.weights(name)", panel))

    def part(self, role):
        return self.root.locator(f"[data-role='{role}']")

    def panel(self, name):
        return self.root.locator(f"[data-role='panel'][data-name='{name}']")

    def heat(self, name):
        return self.panel(name).locator("canvas[data-layer='heat']")

    def centre(self, panel, cell):
        box = self.root.evaluate("(root, [name, cell]) => root.explorer.cellRect(name, cell)", [panel, cell])
        return {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}

    def click(self, panel, cell):
        self.heat(panel).click(position=self.centre(panel, cell))

    def settled(self):
        "Waits until nothing is fetched any more."
        self.page.wait_for_function("root => root.dataset.fetching !== 'true'", arg=self.root.element_handle())

    def choose(self, **values):
        "Sets controls as a reader would: layer, head, slot by list; frame, temperature, opacity by slider."
        for role, value in values.items():
            control = self.part(role)
            if role in ("layer", "head", "slot"):
                control.select_option(str(value))
            else:
                control.fill(str(math.log2(value) if role == "temperature" else value))
        self.settled()

    def entropy(self, panel):
        return float(self.panel(panel).locator("[data-role='entropy']").get_attribute("data-value"))

    def milliseconds(self, act, event="pointerdown"):
        "The page's own time in the handlers of an event, once for every time `act` causes one."
        self.page.evaluate("""event => { const spent = window.spent = []; let began;
            window.before = () => { began = performance.now(); }; window.after = () => spent.push(performance.now() - began);
            addEventListener(event, window.before, true); addEventListener(event, window.after); }""", event)
        act()
        return self.page.evaluate("event => { removeEventListener(event, window.before, true); removeEventListener(event, window.after); return window.spent; }", event)
