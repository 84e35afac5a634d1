// The attention explorer: everything a reader touches is drawn here, so that it answers while the kernel is busy.
// An anywidget module: `render({model, el})`. A saved page brings a model object of its own with get, set, save_changes, on, off and send.

const VIRIDIS = "44015444025645045745055946075a46085c460a5d460b5e470d60470e6147106347116447136548146748166848176948186a481a6c481b6d481c6e481d6f481f70482071482173482374482475482576482677482878482979472a7a472c7a472d7b472e7c472f7d46307e46327e46337f463480453581453781453882443983443a83443b84433d84433e85423f854240864241864142874144874045884046883f47883f48893e49893e4a893e4c8a3d4d8a3d4e8a3c4f8a3c508b3b518b3b528b3a538b3a548c39558c39568c38588c38598c375a8c375b8d365c8d365d8d355e8d355f8d34608d34618d33628d33638d32648e32658e31668e31678e31688e30698e306a8e2f6b8e2f6c8e2e6d8e2e6e8e2e6f8e2d708e2d718e2c718e2c728e2c738e2b748e2b758e2a768e2a778e2a788e29798e297a8e297b8e287c8e287d8e277e8e277f8e27808e26818e26828e26828e25838e25848e25858e24868e24878e23888e23898e238a8d228b8d228c8d228d8d218e8d218f8d21908d21918c20928c20928c20938c1f948c1f958b1f968b1f978b1f988b1f998a1f9a8a1e9b8a1e9c891e9d891f9e891f9f881fa0881fa1881fa1871fa28720a38620a48621a58521a68522a78522a88423a98324aa8325ab8225ac8226ad8127ad8128ae8029af7f2ab07f2cb17e2db27d2eb37c2fb47c31b57b32b67a34b67935b77937b87838b9773aba763bbb753dbc743fbc7340bd7242be7144bf7046c06f48c16e4ac16d4cc26c4ec36b50c46a52c56954c56856c66758c7655ac8645cc8635ec96260ca6063cb5f65cb5e67cc5c69cd5b6ccd5a6ece5870cf5773d05675d05477d1537ad1517cd2507fd34e81d34d84d44b86d54989d5488bd6468ed64590d74393d74195d84098d83e9bd93c9dd93ba0da39a2da37a5db36a8db34aadc32addc30b0dd2fb2dd2db5de2bb8de29bade28bddf26c0df25c2df23c5e021c8e020cae11fcde11dd0e11cd2e21bd5e21ad8e219dae319dde318dfe318e2e418e5e419e7e419eae51aece51befe51cf1e51df4e61ef6e620f8e621fbe723fde725";
const COLOURS = Array.from({ length: 256 }, (_, i) => [0, 2, 4].map((k) => parseInt(VIRIDIS.slice(6 * i + k, 6 * i + k + 2), 16)));
const MARK = "#ff5a6e"; // of the query: a hue that the colour map does not have
const TRAITS = ["query", "slot", "layer", "head", "frame", "temperature", "playing", "opacity", "same_scale"];
const KEEP = 192e6; // bytes of fetched attention kept, the oldest go first
const STEP = 90; // milliseconds a frame when playing

// --- numbers -----------------------------------------------------------------------------------------------------

const HALF = (() => { // what each of the 65536 half-precision numbers is worth
  const table = new Float32Array(65536);
  for (let i = 0; i < 65536; i++) {
    const exponent = (i >> 10) & 31, fraction = i & 1023, sign = i & 32768 ? -1 : 1;
    table[i] = exponent === 31 ? (fraction ? NaN : sign * Infinity) : sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024));
  }
  return table;
})();

function halves(view) { // a DataView or an ArrayBuffer as 16-bit numbers, copied where it lies at an odd place
  const [buffer, start, length] = view instanceof ArrayBuffer ? [view, 0, view.byteLength] : [view.buffer, view.byteOffset, view.byteLength];
  return start % 2 ? new Uint16Array(buffer.slice(start, start + length)) : new Uint16Array(buffer, start, length / 2);
}

function addTempered(total, logs, start, count, temperature, share) { // p^(1/temperature), rescaled to sum to 1, is softmax(scores / temperature)
  let most = -Infinity, sum = 0;
  for (let j = 0; j < count; j++) most = Math.max(most, HALF[logs[start + j]]);
  const row = addTempered.row.length >= count ? addTempered.row : (addTempered.row = new Float64Array(count));
  for (let j = 0; j < count; j++) sum += row[j] = Math.exp((HALF[logs[start + j]] - most) / temperature);
  for (let j = 0; j < count; j++) total[j] += (share * row[j]) / sum;
}
addTempered.row = new Float64Array(4096);

function statistics(row) { // of probabilities: entropy in nats, its share of ln N, the effective number, sum
  let entropy = 0, squares = 0, sum = 0;
  for (const p of row) { if (p > 0) entropy -= p * Math.log(p); squares += p * p; sum += p; }
  return { entropy, share: row.length > 1 ? entropy / Math.log(row.length) : 0, count: 1 / squares, sum };
}

const colourOf = (v) => COLOURS[Math.min(255, Math.max(0, Math.floor(v * 256)))];
const css = ([r, g, b], alpha = 1) => `rgb(${r} ${g} ${b} / ${alpha})`;
const short = (p) => (p >= 0.0995 ? p.toFixed(2) : p >= 0.00095 ? p.toFixed(4) : p === 0 ? "0" : p.toExponential(1).replace("e", "·10^").replace("^-", "^−"));
const clamp = (v, low, high) => Math.min(high, Math.max(low, v));
const say = (element, text) => { if (element.textContent !== text) element.textContent = text; }; // the page is laid out anew only when a word changes
const total = (cells) => cells.rows * cells.columns + cells.prefix.length;

function tag(name, given = {}, ...children) { // an element; attributes by name, children after
  const found = document.createElement(name);
  for (const [key, value] of Object.entries(given)) if (value !== undefined && value !== null) key in found && key !== "role" && key !== "list" ? (found[key] = value) : found.setAttribute(key, value);
  found.append(...children);
  return found;
}

// --- what all views of one explorer share ------------------------------------------------------------------------

const stores = (globalThis.__fvlm_explorers ??= new Map());

function storeOf(model, about) {
  if (!stores.has(about.key)) stores.set(about.key, { chunks: new Map(), asked: new Map(), failed: new Map(), views: new Set(), bytes: 0, received: 0 });
  const store = stores.get(about.key);
  for (const [name, view] of Object.entries(model.get("_chunks") || {})) keep(store, name, view);
  return store;
}

function keep(store, name, view) {
  store.asked.delete(name);
  if (store.chunks.has(name)) return;
  const logs = halves(view);
  store.chunks.set(name, logs);
  store.bytes += logs.byteLength;
  store.received += logs.byteLength;
  for (const [old, gone] of store.chunks) {
    if (store.bytes <= KEEP || old === name) break;
    store.chunks.delete(old);
    store.bytes -= gone.byteLength;
  }
}

// --- one view ----------------------------------------------------------------------------------------------------

class View {
  constructor(model, el) {
    this.model = model;
    this.about = model.get("_about");
    this.cubes = this.about.cubes;
    this.lead = this.cubes[0];
    this.store = storeOf(model, this.about);
    this.hover = null;
    this.drawn = 0;
    this.paints = 0;
    this.pictures = [];
    this.build(el);
    this.store.views.add(this);
    for (const name of TRAITS) model.on(`change:${name}`, (this[`on_${name}`] = () => this.changed(name)));
    model.on("msg:custom", (this.on_message = (content, buffers) => this.heard(content, buffers)));
    for (const panel of this.panels) panel.width = panel.stage.clientWidth || 320;
    this.sizes = new ResizeObserver((entries) => { // widths are kept: to measure while drawing would lay out the whole notebook each time
      for (const { target, contentRect } of entries) target.panel.width = contentRect.width || target.panel.width;
      this.later();
    });
    for (const panel of this.panels) { panel.stage.panel = panel; this.sizes.observe(panel.stage); }
    this.scaled = new Map();
    this.theme = new MutationObserver(() => this.later());
    this.theme.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light", "data-jp-theme-name", "class"] });
    this.dark = matchMedia("(prefers-color-scheme: dark)");
    this.dark.addEventListener("change", (this.on_dark = () => this.later()));
    this.root.explorer = {
      weights: (name) => Array.from(this.panel(name).row || []), cellRect: (name, cell) => this.cellRect(this.panel(name), cell), colour: (name, cell) => this.colour(this.panel(name), cell),
      state: () => Object.fromEntries(TRAITS.map((trait) => [trait, this.get(trait)])), view: this,
    };
    Object.defineProperties(this.root.explorer, { drawn: { get: () => this.drawn }, bytes: { get: () => this.store.received }, bitmaps: { get: () => this.pictures.filter(Boolean).length } });
    this.load().then(() => { this.stale = true; this.draw(); this.root.dataset.ready = "true"; this.play(); });
  }

  get(name) { return this.model.get(name); }

  set(name, value) { // and tell the kernel, which may be busy
    if (this.get(name) === value) return;
    this.acting = true;
    this.model.set(name, value);
    this.acting = false;
    this.model.save_changes();
  }

  panel(name) { return this.panels.find((panel) => panel.cube.name === name) || this.panels[0]; }

  async load() { // the frames, as bitmaps
    const bytes = this.model.get("_pictures");
    await Promise.all(bytes.map(async (one, i) => { this.pictures[i] = await createImageBitmap(new Blob([one], { type: "image/jpeg" })); }));
  }

  remove() {
    this.store.views.delete(this);
    clearTimeout(this.timer);
    this.sizes.disconnect();
    this.theme.disconnect();
    this.dark.removeEventListener("change", this.on_dark);
    for (const name of TRAITS) this.model.off(`change:${name}`, this[`on_${name}`]);
    this.model.off("msg:custom", this.on_message);
    for (const other of this.store.views) other.play();
    if (!this.store.views.size) stores.delete(this.about.key);
  }

  // --- what is shown -----------------------------------------------------------------------------------------

  chunk(panel, layer, frame) { return this.store.chunks.get(`${panel.index}:${layer}:${frame}`); }

  layersOf(panel) { const layer = this.get("layer"), most = panel.cube.layers; return layer < 0 ? [...Array(most).keys()] : [Math.min(layer, most - 1)]; }

  place() { // the middle of the chosen cell, 0..1 of the picture, or null when a prefix token asks
    const cells = this.leadCells(), query = this.get("query");
    return query < 0 ? null : [((query % cells.columns) + 0.5) / cells.columns, (Math.floor(query / cells.columns) + 0.5) / cells.rows];
  }

  leadCells() { return this.lead.queries.kind === "tokens" ? this.lead.keys : this.lead.queries; }

  cellAt(cells, place) { return place && clamp(Math.floor(place[1] * cells.rows), 0, cells.rows - 1) * cells.columns + clamp(Math.floor(place[0] * cells.columns), 0, cells.columns - 1); }

  tokenOf(panel) { // which row of the cube asks; null if it has no such token
    const { queries } = panel.cube;
    if (queries.kind === "tokens") return clamp(this.get("slot"), 0, total(queries) - 1);
    const query = this.get("query");
    if (query < 0) return -1 - query < queries.prefix.length ? -1 - query : null;
    return queries.prefix.length + this.cellAt(queries, this.place());
  }

  rowOf(panel, head = this.get("head")) { // probabilities over all keys, prefix tokens first; null while something is missing
    const token = this.tokenOf(panel), { cube } = panel, count = total(cube.keys), asking = total(cube.queries), frame = this.get("frame");
    if (token === null) return null;
    const layers = this.layersOf(panel), heads = head < 0 ? [...Array(cube.heads).keys()] : [Math.min(head, cube.heads - 1)];
    const row = new Float64Array(count), temperature = this.get("temperature");
    for (const layer of layers) {
      const logs = this.chunk(panel, layer, frame);
      if (!logs) return null;
      for (const h of heads) addTempered(row, logs, (h * asking + token) * count, count, temperature, 1 / (layers.length * heads.length));
    }
    return row;
  }

  fetchMissing(everyFrame = false) { // ask the kernel for what is shown, or for all frames of the layer
    const wanted = [], frames = everyFrame ? [...Array(this.lead.frames).keys()] : [this.get("frame")];
    for (const panel of this.panels) for (const layer of this.layersOf(panel)) for (const frame of frames) {
      const name = `${panel.index}:${layer}:${frame}`;
      if (!this.store.chunks.has(name) && !this.store.asked.has(name) && !this.store.failed.has(name)) { wanted.push([panel.index, layer, frame]); this.store.asked.set(name, performance.now()); }
    }
    if (!wanted.length || this.about.eager || !this.model.send) return;
    this.model.send({ want: wanted });
    setTimeout(() => this.later(), 3000);
  }

  heard(content, buffers) {
    if (content?.kind === "chunk") keep(this.store, content.name, buffers[0]);
    if (content?.kind === "error") { this.store.asked.delete(content.name); this.store.failed.set(content.name, content.text); }
    this.later();
  }

  fail(sentence) { say(this.error, sentence); this.error.hidden = !sentence; }

  // --- change and play -----------------------------------------------------------------------------------------

  changed(name) {
    if (name === "playing") this.play();
    if (name === "layer" || (name === "frame" && !this.get("playing"))) this.store.failed.clear(); // whoever comes back may ask again
    if (name !== "frame" || !this.get("playing")) this.stale = true; // worth saying aloud
    if (this.acting) this.draw(); // where people touch, at once; another view of the same explorer in the next frame
    else this.later();
  }

  play() { // the first view of an explorer moves the frame for all of them
    clearTimeout(this.timer);
    this.timer = null;
    const on = this.get("playing");
    this.controls.play.setAttribute("aria-pressed", String(on));
    this.controls.play.firstChild.className = on ? "fx-pause" : "fx-triangle";
    this.controls.play.lastChild.textContent = on ? "Pause" : "Play";
    if (!on || this.store.views.values().next().value !== this || this.lead.frames < 2) return;
    this.fetchMissing(true);
    let next = performance.now() + STEP;
    const tick = () => {
      if (this.panels.every((panel) => panel.row || this.tokenOf(panel) === null)) this.set("frame", (this.get("frame") + 1) % this.lead.frames);
      next = Math.max(next + STEP, performance.now());
      this.timer = setTimeout(tick, next - performance.now());
    };
    this.timer = setTimeout(tick, STEP);
  }

  later() { // one repaint for many reasons
    this.paints ||= requestAnimationFrame(() => { this.paints = 0; this.draw(); });
  }

  // --- the page ------------------------------------------------------------------------------------------------

  build(el) {
    const { about } = this;
    this.root = tag("div", { className: "fvlm-explorer", role: "group", "aria-label": `Attention explorer: ${about.title}` });
    this.where = tag("p", { className: "fx-where" });
    this.notice = tag("p", { className: "fx-notice", role: "status", "data-role": "notice" });
    this.error = tag("p", { className: "fx-error", role: "alert", "data-role": "error", hidden: true });
    this.panels = this.cubes.map((cube, index) => this.buildPanel(cube, index));
    this.readout = tag("p", { className: "fx-readout", "data-role": "readout" });
    this.live = tag("p", { className: "fx-live", "data-role": "live", "aria-live": "polite" });
    const bar = this.buildControls();
    this.root.append(
      tag("div", { className: "fx-top" }, tag("strong", { className: "fx-title", role: "heading", "aria-level": about.heading }, about.title), this.where), this.error,
      tag("div", { className: this.panels.length === 1 && !this.panels[0].time ? "fx-body fx-one" : "fx-body" },
        tag("div", { className: "fx-panels" }, ...this.panels.map((panel) => panel.figure)), tag("div", { className: "fx-side" }, this.readout, bar, this.notice, this.live)),
      tag("p", { className: "fx-keys" }, tag("i", { className: "fx-key fx-key-query" }), this.lead.queries.kind === "tokens" ? "chosen patch   " : "query   ", ...(this.panels[0].time ? [] : [tag("i", { className: "fx-key fx-key-centre" }), "centre of mass   ", tag("i", { className: "fx-key fx-key-peak" }, "×"), "strongest   "]), tag("span", {}, about.help)));
    this.root.addEventListener("keydown", (event) => this.pressed(event));
    for (const name of ["keyup", "keypress"]) this.root.addEventListener(name, (event) => { if (!event.ctrlKey && !event.metaKey) event.stopPropagation(); });
    el.replaceChildren(this.root);
  }

  buildPanel(cube, index) {
    const panel = { cube, index, time: cube.keys.kind === "time" };
    panel.heat = tag("canvas", { "data-layer": "heat", tabIndex: 0, role: "application", "aria-roledescription": "attention map" });
    panel.marks = tag("canvas", { "data-layer": "marks", "aria-hidden": "true" });
    panel.stage = tag("div", { className: "fx-stage" }, panel.heat, panel.marks);
    panel.what = tag("span", { className: "fx-what" });
    const asks = cube.queries.prefix.length > 0;
    panel.prefixes = cube.keys.prefix.map((name, i) => {
      const swatch = tag("i", { className: "fx-swatch" }), weight = tag("b");
      const inside = [swatch, `${name} `, weight];
      const chip = asks ? tag("button", { type: "button", className: "fx-chip", "data-role": "prefix", "data-token": i, title: `let ${name} ask` }, ...inside) : tag("span", { className: "fx-chip", "data-role": "prefix", "data-token": i }, ...inside);
      if (asks) chip.addEventListener("click", () => this.set("query", -1 - i));
      return { chip, swatch, weight, name };
    });
    panel.low = tag("span", {}, "0");
    panel.high = tag("span");
    panel.legend = tag("div", { className: "fx-legend", "data-role": "legend", role: "img" }, panel.low, tag("i", { className: "fx-ramp" }), panel.high);
    panel.ramp = panel.legend.children[1];
    panel.ramp.style.background = `linear-gradient(90deg, ${[0, 32, 64, 96, 128, 160, 192, 224, 255].map((i) => css(COLOURS[i])).join(",")})`;
    const [nats, share, count, of] = (panel.numbers = [tag("b"), tag("b"), tag("b"), tag("span")]);
    panel.entropy = tag("p", { className: "fx-entropy", "data-role": "entropy" }, tag("span", {}, "entropy ", nats, " nats"), tag("span", {}, share, " of uniform"), tag("span", {}, "worth ", count, of));
    panel.heads = cube.heads > 1 ? tag("canvas", { className: "fx-heads", "data-role": "heads", role: "img" }) : null;
    panel.figure = tag("figure", { className: `fx-panel${panel.time ? " fx-time" : ""}`, "data-role": "panel", "data-name": cube.name, "data-kind": cube.keys.kind, "data-rows": cube.keys.rows, "data-columns": cube.keys.columns },
      tag("figcaption", {}, tag("strong", {}, cube.name), panel.what), panel.stage,
      tag("div", { className: "fx-under" }, tag("div", { className: "fx-chips" }, ...panel.prefixes.map((p) => p.chip)), panel.legend), panel.entropy, ...(panel.heads ? [panel.heads] : []));
    const cellOf = (event) => {
      const box = panel.heat.getBoundingClientRect();
      return this.cellAt(cube.keys, [(event.clientX - box.left) / box.width, panel.time ? 0 : (event.clientY - box.top) / box.height]);
    };
    panel.heat.addEventListener("pointerdown", (event) => { // a drag asks again in every cell it crosses
      if (event.button) return;
      panel.heat.focus({ preventScroll: true });
      panel.heat.setPointerCapture?.(event.pointerId);
      panel.dragged = true;
      this.ask(panel, cellOf(event));
    });
    for (const name of ["pointerup", "pointercancel"]) panel.heat.addEventListener(name, () => { panel.dragged = false; });
    panel.heat.addEventListener("pointermove", (event) => {
      const cell = cellOf(event);
      if (panel.dragged) this.ask(panel, cell);
      if (this.hover?.panel === panel && this.hover.cell === cell) return;
      this.hover = { panel, cell };
      this.drawMarks();
      this.read();
    });
    panel.heat.addEventListener("pointerleave", () => { this.hover = null; this.drawMarks(); this.read(); });
    panel.heat.addEventListener("focus", () => { this.focused = panel; });
    panel.heads?.addEventListener("pointerdown", (event) => {
      const box = panel.heads.getBoundingClientRect(), { across, side } = panel.mini;
      const head = Math.floor((event.clientY - box.top) / side.down) * across + Math.floor((event.clientX - box.left) / side.wide);
      if (head >= 0 && head < cube.heads) this.set("head", this.get("head") === head ? -1 : head);
    });
    return panel;
  }

  buildControls() {
    const control = (label, role, input, output) => {
      input.dataset.role = role;
      return tag("label", { className: `fx-control fx-${role}` }, tag("span", { className: "fx-label" }, label, ...(output ? [output] : [])), input);
    };
    const select = (names, first, change) => {
      const found = tag("select", {}, ...names.map((name, i) => tag("option", { value: String(i + first) }, name)));
      found.addEventListener("change", () => change(Number(found.value)));
      return found;
    };
    const range = (min, max, step, change) => {
      const found = tag("input", { type: "range", min, max, step });
      found.addEventListener("input", () => change(Number(found.value)));
      return found;
    };
    const most = (key) => Math.max(...this.cubes.map((cube) => cube[key])), numbers = (what, count) => Array.from({ length: count }, (_, i) => `${what} ${i + 1} of ${count}`);
    const c = (this.controls = {});
    const deepest = this.cubes.find((cube) => cube.layers === most("layers")), depths = deepest.numbers.map((number) => `layer ${number}`);
    c.layer = this.about.eager ? select(["mean of all", ...depths], -1, (v) => this.set("layer", v)) : select(depths, 0, (v) => this.set("layer", v));
    c.head = select([`mean of all`, ...numbers("head", most("heads"))], -1, (v) => this.set("head", v));
    const asking = Math.max(...this.cubes.map((cube) => (cube.queries.kind === "tokens" ? total(cube.queries) : 0)));
    c.slot = asking > 1 ? select(numbers("query", asking), 0, (v) => this.set("slot", v)) : null;
    c.frame = range(0, this.lead.frames - 1, 1, (v) => this.set("frame", v));
    c.frameValue = tag("output");
    c.play = tag("button", { type: "button", className: "fx-play", "data-role": "play", disabled: this.lead.frames < 2 }, tag("i", { className: "fx-triangle" }), tag("span", {}, "Play"));
    c.play.addEventListener("click", () => this.set("playing", !this.get("playing")));
    c.temperature = range(-2, 2, 0.05, (v) => this.set("temperature", 2 ** v));
    c.temperatureValue = tag("output");
    c.opacity = range(0, 1, 0.05, (v) => this.set("opacity", v));
    c.opacityValue = tag("output");
    c.same = tag("input", { type: "checkbox", "data-role": "same-scale" });
    c.same.addEventListener("change", () => this.set("same_scale", c.same.checked));
    return tag("div", { className: "fx-controls" },
      control("Layer", "layer", c.layer), control("Head", "head", c.head), ...(c.slot ? [control("Query", "slot", c.slot)] : []),
      tag("div", { className: "fx-control fx-scrub" }, c.play, control(this.lead.keys.kind === "time" ? "Window" : "Frame", "frame", c.frame, c.frameValue)),
      control("Temperature", "temperature", c.temperature, c.temperatureValue), control("Map over picture", "opacity", c.opacity, c.opacityValue),
      ...(this.cubes.length > 1 ? [tag("label", { className: "fx-control fx-check" }, c.same, tag("span", {}, "one colour scale"))] : []));
  }

  ask(panel, cell) { // a cell of one panel, as a cell of the first
    const { keys } = panel.cube, place = [((cell % keys.columns) + 0.5) / keys.columns, (Math.floor(cell / keys.columns) + 0.5) / keys.rows];
    this.set("query", this.cellAt(this.leadCells(), place));
  }

  pressed(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || event.key === "Tab") return;
    event.stopPropagation();
    const { target } = event, cells = this.leadCells(), query = Math.max(0, this.get("query")), column = query % cells.columns, row = Math.floor(query / cells.columns);
    const typing = target.matches("select, input"), onMap = target.matches('[data-layer="heat"]');
    const turn = (name, by, low, high) => this.set(name, clamp(this.get(name) + by, low, high));
    const most = (key) => Math.max(...this.cubes.map((cube) => cube[key])) - 1;
    const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0], Home: [0, -column], End: [0, cells.columns - 1 - column] };
    const acts = {
      "[": () => turn("layer", -1, this.about.eager ? -1 : 0, most("layers")), "]": () => turn("layer", 1, 0, most("layers")), "-": () => turn("head", -1, -1, most("heads")), "=": () => turn("head", 1, -1, most("heads")),
      ",": () => turn("frame", -1, 0, this.lead.frames - 1), ".": () => turn("frame", 1, 0, this.lead.frames - 1),
    };
    if (onMap && moves[event.key]) {
      const [down, right] = moves[event.key];
      this.set("query", this.get("query") < 0 ? 0 : clamp(row + down, 0, cells.rows - 1) * cells.columns + clamp(column + right, 0, cells.columns - 1));
    } else if (event.key === " " && !typing && (onMap || target === this.root)) this.set("playing", !this.get("playing"));
    else if (acts[event.key] && !target.matches("select")) acts[event.key]();
    else return;
    event.preventDefault();
  }

  // --- drawing -------------------------------------------------------------------------------------------------

  draw() {
    const shown = this.panels.map((panel) => (panel.row = this.rowOf(panel)));
    const wanting = this.panels.some((panel, i) => !shown[i] && this.tokenOf(panel) !== null);
    let sentence = wanting && (this.about.eager || !this.model.send) ? "Some of the attention did not arrive with the page; run the cell again, or save the page anew." : "";
    if (wanting && !sentence) this.fetchMissing();
    for (const panel of this.panels) for (const layer of this.layersOf(panel)) sentence = this.store.failed.get(`${panel.index}:${layer}:${this.get("frame")}`) || sentence;
    this.fail(sentence);
    for (const panel of this.panels) {
      panel.stats = panel.row && statistics(panel.row);
      panel.most = panel.row ? Math.max(...panel.row.subarray(panel.cube.keys.prefix.length)) : 0; // a class token that takes all shall not leave the picture dark
    }
    const common = this.get("same_scale") ? Math.max(...this.panels.map((panel) => panel.most)) : 0;
    for (const panel of this.panels) { panel.top = common || panel.most || 1; this.drawPanel(panel); }
    this.drawMarks();
    this.read();
    this.showControls();
    this.showNotice(wanting);
    this.root.dataset.fetching = String(wanting && !this.error.textContent);
    if (wanting && !sentence) this.stale = true; // to be told when it has come
    else if (this.stale && !this.get("playing")) { this.stale = false; this.announce(); }
    this.drawn++;
  }

  fit(canvas, width, height) { // pixels for that many CSS pixels
    const scale = Math.min(3, globalThis.devicePixelRatio || 1), w = Math.max(1, Math.round(width * scale)), h = Math.max(1, Math.round(height * scale));
    if (canvas.width !== w || canvas.height !== h) { canvas.width = w; canvas.height = h; canvas.style.height = `${height}px`; }
    const pen = canvas.getContext("2d");
    pen.setTransform(1, 0, 0, 1, 0, 0);
    return [pen, w, h, scale];
  }

  alpha(v) { const strength = this.get("opacity"); return strength && strength ** (1 + 1.6 * (1 - v)); } // little attention leaves the picture in sight

  picture(panel, cell, w, h) { // a frame at the size it is drawn, kept for the next time
    const at = clamp(panel.cube.seen ? panel.cube.seen[this.get("frame")][cell ?? 0] : panel.time ? cell : this.get("frame"), 0, this.pictures.length - 1), grey = this.get("opacity") > 0, name = `${at} ${w} ${h} ${grey}`;
    if (!this.pictures[at] || w < 1 || h < 1) return null;
    if (!this.scaled.has(name)) {
      if (this.scaled.size > 96) this.scaled.clear();
      const small = tag("canvas", { width: w, height: h }), pen = small.getContext("2d");
      pen.imageSmoothingQuality = "high";
      if (grey) pen.filter = `saturate(${1 - this.about.grey})`; // colour is then attention
      pen.drawImage(this.pictures[at], 0, 0, w, h);
      this.scaled.set(name, small);
    }
    return this.scaled.get(name);
  }

  map(cells, row, first, top, alpha) { // one pixel a cell, to be enlarged without blur
    const small = (this.small ??= tag("canvas")), { rows, columns } = cells;
    if (small.width !== columns || small.height !== rows) { small.width = columns; small.height = rows; }
    const pen = small.getContext("2d", { willReadFrequently: true }), image = pen.createImageData(columns, rows);
    for (let cell = 0; cell < rows * columns; cell++) {
      const v = row[first + cell] / top, colour = colourOf(v);
      image.data.set(colour, 4 * cell);
      image.data[4 * cell + 3] = alpha ? Math.round(255 * this.alpha(v)) : 255;
    }
    pen.putImageData(image, 0, 0);
    return small;
  }

  drawPanel(panel) {
    const { cube, row, top } = panel, { keys } = cube, first = keys.prefix.length, [imageWidth, imageHeight] = this.about.size;
    const { width } = panel, thumb = (width / keys.columns) * (imageHeight / imageWidth), bars = 72;
    panel.height = panel.time ? Math.min(thumb, 240) + bars : (width * imageHeight) / imageWidth;
    const [pen, w, h, scale] = this.fit(panel.heat, width, panel.height);
    pen.clearRect(0, 0, w, h);
    panel.band = panel.time ? h - bars * scale : h;
    if (!panel.time) {
      const image = this.picture(panel, 0, w, h);
      if (image) pen.drawImage(image, 0, 0);
      pen.imageSmoothingEnabled = false;
      if (row) pen.drawImage(this.map(keys, row, first, top, true), 0, 0, w, h);
    } else {
      const style = getComputedStyle(this.root), ink = style.color, family = style.fontFamily;
      for (let cell = 0; cell < keys.columns; cell++) {
        const [x, , right, bottom] = this.edges(panel, cell, w), image = this.picture(panel, cell, right - x - 2, bottom), v = row ? row[first + cell] / top : 0;
        if (image) pen.drawImage(image, x + 1, 0);
        if (!row) continue;
        pen.fillStyle = css(colourOf(v), this.alpha(v));
        pen.fillRect(x + 1, 0, right - x - 2, bottom);
        const tall = Math.max(scale, v * (bars - 26) * scale);
        pen.fillStyle = css(colourOf(v));
        pen.fillRect(x + 3 * scale, h - tall, right - x - 6 * scale, tall);
        if (right - x <= 34 * scale) continue;
        pen.fillStyle = ink;
        pen.font = `${12 * scale}px ${family}`;
        pen.textAlign = "center";
        pen.fillText(short(row[first + cell]), (x + right) / 2, h - tall - 6 * scale);
      }
    }
    this.label(panel);
    if (panel.heads) this.drawHeads(panel);
  }

  edges(panel, cell, w) { // left, top, right, bottom of a cell, canvas pixels
    const { rows, columns } = panel.cube.keys, r = Math.floor(cell / columns), c = cell % columns;
    return [Math.round((c * w) / columns), Math.round((r * panel.band) / rows), Math.round(((c + 1) * w) / columns), Math.round(((r + 1) * panel.band) / rows)];
  }

  cellRect(panel, cell) {
    const scale = panel.heat.width / panel.width, [x, y, right, bottom] = this.edges(panel, cell, panel.heat.width).map((v) => v / scale);
    return { x, y, width: right - x, height: bottom - y };
  }

  colour(panel, cell) {
    const [x, y, right, bottom] = this.edges(panel, cell, panel.heat.width);
    return Array.from(panel.heat.getContext("2d").getImageData(Math.floor((x + right) / 2), Math.floor((y + bottom) / 2), 1, 1).data.slice(0, 3));
  }

  label(panel) {
    const { cube, stats, row, top } = panel, layer = this.get("layer"), head = this.get("head"), last = (at, most) => (at >= most ? " (its last)" : "");
    say(panel.what, [layer < 0 ? `mean of ${cube.layers} layers` : `layer ${cube.numbers[Math.min(layer, cube.layers - 1)]}${last(layer, cube.layers)}`,
      head < 0 ? (cube.heads > 1 ? `mean of ${cube.heads} heads` : "one head") : `head ${Math.min(head, cube.heads - 1) + 1} of ${cube.heads}${last(head, cube.heads)}`].join(" · "));
    say(panel.high, row ? short(top) : "");
    panel.legend.dataset.low = 0;
    panel.legend.dataset.high = row ? top : "";
    panel.legend.setAttribute("aria-label", row ? `colour scale from 0, dark, to ${short(top)}, yellow` : "colour scale");
    for (const [i, part] of panel.prefixes.entries()) {
      say(part.weight, row ? short(row[i]) : "");
      part.swatch.style.background = row ? css(colourOf(row[i] / top)) : "none";
      if (part.chip.tagName === "BUTTON") { part.chip.setAttribute("aria-pressed", String(this.get("query") === -1 - i)); part.chip.setAttribute("aria-label", `${part.name} as query, weight ${row ? short(row[i]) : "unknown"}`); }
    }
    const words = stats ? [stats.entropy.toFixed(2), `${Math.round(100 * stats.share)} %`, stats.count.toFixed(stats.count < 10 ? 1 : 0), ` of ${row.length}`] : ["–", "–", "–", ""];
    panel.numbers.forEach((part, i) => say(part, words[i]));
    Object.assign(panel.entropy.dataset, { value: stats?.entropy ?? "", share: stats?.share ?? "", count: stats?.count ?? "" });
    const asks = this.asks(panel);
    panel.heat.setAttribute("aria-label", `${cube.name}: ${asks}. Arrow keys move the query, space plays.`);
    const cell = cube.queries.kind === "tokens" ? this.cellAt(cube.keys, this.place()) : this.cellAt(cube.queries, this.place());
    panel.figure.dataset.query = cell ?? "";
    const found = row && this.fixation(panel);
    panel.fixation = found;
    panel.figure.dataset.fixation = found ? found.centre.map((v) => v.toFixed(4)).join(",") : "";
    panel.figure.dataset.peak = found ? found.peak : "";
  }

  fixation(panel) { // centre of mass and strongest cell of what is shown
    const { rows, columns, prefix } = panel.cube.keys;
    let x = 0, y = 0, sum = 0, peak = 0;
    for (let cell = 0; cell < rows * columns; cell++) {
      const p = panel.row[prefix.length + cell];
      x += p * ((cell % columns) + 0.5); y += p * (Math.floor(cell / columns) + 0.5); sum += p;
      if (p > panel.row[prefix.length + peak]) peak = cell;
    }
    return sum > 0 ? { centre: [x / sum / columns, y / sum / rows], peak } : null;
  }

  drawHeads(panel) { // every head's map in small, for the same query
    const { cube } = panel, { rows, columns, prefix } = cube.keys, { width } = panel, [imageWidth, imageHeight] = this.about.size;
    const across = Math.min(cube.heads, width < 300 ? 6 : 12), wide = Math.min(64, width / across), tall = panel.time ? 22 : (wide * imageHeight) / imageWidth;
    panel.mini = { across, side: { wide, down: tall + 2 } };
    const [pen, w, h, scale] = this.fit(panel.heads, width, Math.ceil(cube.heads / across) * (tall + 2));
    pen.clearRect(0, 0, w, h);
    const chosen = this.get("head");
    for (let head = 0; head < cube.heads; head++) {
      const row = this.rowOf(panel, head), left = (head % across) * wide * scale, top = Math.floor(head / across) * (tall + 2) * scale, cw = ((wide - 3) * scale) / columns, ch = ((tall - 1) * scale) / rows;
      if (!row) continue;
      let most = 0;
      for (const p of row.subarray(prefix.length)) most = Math.max(most, p);
      pen.imageSmoothingEnabled = false;
      pen.drawImage(this.map(panel.cube.keys, row, prefix.length, most || 1, false), left + scale, top + scale, cw * columns, ch * rows);
      if (head === chosen) { pen.strokeStyle = MARK; pen.lineWidth = 2.5 * scale; pen.strokeRect(left + 1.5 * scale, top + 1.5 * scale, (wide - 3) * scale - 2 * scale, (tall - 1) * scale - 2 * scale); }
    }
    panel.heads.setAttribute("aria-label", `the same for each of ${cube.heads} heads; choose one with the list named Head`);
  }

  drawMarks() {
    for (const panel of this.panels) {
      const { cube, fixation } = panel, [pen, w, , scale] = this.fit(panel.marks, panel.width, panel.height);
      pen.clearRect(0, 0, panel.marks.width, panel.marks.height);
      const outline = (box, colour, thick) => { for (const [style, line] of [["rgb(0 0 0 / .75)", thick + 2], [colour, thick]]) { pen.strokeStyle = style; pen.lineWidth = line * scale; pen.strokeRect(...box); } };
      const box = (cells, cell) => { const r = Math.floor(cell / cells.columns), c = cell % cells.columns, wide = w / cells.columns, tall = panel.band / cells.rows; return [c * wide + scale, r * tall + scale, wide - 2 * scale, tall - 2 * scale]; };
      if (this.hover) {
        const { keys } = this.hover.panel.cube, at = this.hover.cell, place = [((at % keys.columns) + 0.5) / keys.columns, (Math.floor(at / keys.columns) + 0.5) / keys.rows];
        outline(box(cube.keys, this.cellAt(cube.keys, place)), "#fff", 1.2);
      }
      const place = this.place();
      if (place) outline(box(cube.queries.kind === "tokens" ? cube.keys : cube.queries, this.cellAt(cube.queries.kind === "tokens" ? cube.keys : cube.queries, place)), MARK, 2.4);
      if (!fixation || panel.time) continue;
      const line = (draw) => { for (const [style, thick] of [["rgb(0 0 0 / .7)", 4.5], ["#fff", 2]]) { pen.strokeStyle = style; pen.lineWidth = thick * scale; pen.beginPath(); draw(); pen.stroke(); } };
      if (cube.path) {
        const frame = this.get("frame"), points = cube.path.slice(Math.max(0, frame - 12), frame + 1);
        pen.globalAlpha = 0.75;
        if (points.length > 1) line(() => points.forEach(([x, y], i) => pen[i ? "lineTo" : "moveTo"](x * w, y * panel.band)));
        pen.globalAlpha = 1;
      }
      const [px, py, wide, tall] = box(cube.keys, fixation.peak), cx = px + wide / 2, cy = py + tall / 2, arm = clamp(Math.min(wide, tall) * 0.3, 5 * scale, 9 * scale);
      line(() => { pen.moveTo(cx - arm, cy - arm); pen.lineTo(cx - arm / 3, cy - arm / 3); pen.moveTo(cx + arm, cy + arm); pen.lineTo(cx + arm / 3, cy + arm / 3); pen.moveTo(cx - arm, cy + arm); pen.lineTo(cx - arm / 3, cy + arm / 3); pen.moveTo(cx + arm, cy - arm); pen.lineTo(cx + arm / 3, cy - arm / 3); });
      line(() => pen.arc(fixation.centre[0] * w, fixation.centre[1] * panel.band, 9 * scale, 0, 7));
    }
  }

  // --- words ---------------------------------------------------------------------------------------------------

  cellName(cells, cell) { return cells.kind === "grid" ? `row ${Math.floor(cell / cells.columns) + 1}, column ${(cell % cells.columns) + 1}` : `frame ${cell + 1}`; }

  asks(panel) {
    const { cube } = panel, query = this.get("query"), place = this.place();
    if (cube.queries.kind === "tokens") return `query ${this.tokenOf(panel) + 1} of ${total(cube.queries)} looks`;
    if (this.tokenOf(panel) === null) return "has no such query";
    return query < 0 ? `${cube.queries.prefix[-1 - query]} asks` : `${cube.queries.kind === "grid" ? "patch " : ""}${this.cellName(cube.queries, this.cellAt(cube.queries, place))} asks`;
  }

  rank(row, at) { let better = 0; for (const p of row) if (p > row[at]) better++; return better + 1; }

  read() { // what lies under the pointer, else under the query
    const panel = this.hover?.panel || this.panels[0], { keys } = panel.cube, place = this.hover ? [((this.hover.cell % keys.columns) + 0.5) / keys.columns, (Math.floor(this.hover.cell / keys.columns) + 0.5) / keys.rows] : this.place();
    const cell = place ? this.cellAt(keys, place) : panel.fixation?.peak ?? 0, { row } = panel, at = keys.prefix.length + cell;
    if (!row) { this.readout.textContent = this.tokenOf(panel) === null ? `${panel.cube.name} ${this.asks(panel)}; choose a patch.` : "…"; return; }
    const others = this.panels.filter((other) => other !== panel && other.row).map((other) => {
      const there = other.cube.keys.prefix.length + (place ? this.cellAt(other.cube.keys, place) : other.fixation?.peak ?? 0);
      return `  ·  ${other.cube.name} there ${short(other.row[there])} (rank ${this.rank(other.row, there)})`;
    });
    const rank = this.rank(row, at);
    this.readout.replaceChildren(tag("strong", {}, panel.cube.name), `  ${this.cellName(keys, cell)}  ·  weight `, tag("b", {}, short(row[at])), `  ·  rank ${rank} of ${row.length}  ·  the row sums to ${panel.stats.sum.toFixed(2)}${others.join("")}`);
    Object.assign(this.readout.dataset, { panel: panel.cube.name, row: Math.floor(cell / keys.columns), column: cell % keys.columns, weight: row[at], rank, sum: panel.stats.sum });
  }

  announce() {
    const place = this.place();
    this.live.textContent = this.panels.map((panel) => {
      const { cube, row, fixation } = panel, first = cube.keys.prefix.length;
      if (!row || !fixation) return `${cube.name}: ${this.asks(panel)}.`;
      const here = place && cube.queries.kind === "tokens" ? ` At ${this.cellName(cube.keys, this.cellAt(cube.keys, place))}: ${short(row[first + this.cellAt(cube.keys, place)])}, rank ${this.rank(row, first + this.cellAt(cube.keys, place))}.` : "";
      return `${cube.name}: ${this.asks(panel)}, most at ${this.cellName(cube.keys, fixation.peak)}, ${short(row[first + fixation.peak])}.${here}`;
    }).join(" ");
  }

  showControls() {
    const c = this.controls, frame = this.get("frame"), temperature = this.get("temperature"), opacity = this.get("opacity");
    const put = (input, value) => { if (input && input.value !== String(value)) input.value = String(value); };
    put(c.layer, this.get("layer")); put(c.head, this.get("head")); put(c.slot, this.get("slot")); put(c.frame, frame); put(c.opacity, opacity);
    if (Math.abs(2 ** Number(c.temperature.value) - temperature) > 1e-9) put(c.temperature, Math.log2(temperature));
    c.same.checked = this.get("same_scale");
    say(c.frameValue, this.about.labels[frame]);
    say(c.temperatureValue, temperature.toFixed(2));
    c.temperature.dataset.value = temperature;
    c.temperature.setAttribute("aria-valuetext", temperature.toFixed(2));
    c.frame.setAttribute("aria-valuetext", this.about.labels[frame]);
    say(c.opacityValue, `${Math.round(100 * opacity)} %`);
    say(this.where, this.about.subtitle);
  }

  showNotice(wanting) {
    const waited = Math.max(0, ...[...this.store.asked.values()].map((since) => performance.now() - since));
    const fetching = wanting && !this.error.textContent ? [waited > 2500 ? `Still waiting for the kernel (layer ${this.lead.numbers[Math.min(this.get("layer"), this.lead.layers - 1)]}, frame ${this.get("frame") + 1}): it is busy or gone; what has arrived can be looked at.` : `Fetching layer ${this.lead.numbers[Math.min(this.get("layer"), this.lead.layers - 1)]}, frame ${this.get("frame") + 1} …`] : [];
    const text = [...fetching, ...(this.about.notes || [])].join(" ");
    say(this.notice, text);
  }
}

function render({ model, el }) {
  try {
    const view = new View(model, el);
    return () => view.remove();
  } catch (error) {
    el.replaceChildren(tag("p", { className: "fx-error", role: "alert" }, `The attention explorer could not be drawn (${error.message}); run the cell again, or show w.picture().`));
    throw error;
  }
}

export default { render };
