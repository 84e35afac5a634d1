// The linked view: entropy of every head, a map of the heads, and what one head looks at; a click in one selects in all.
// One module, no dependency. `model` is an anywidget model, or anything with get, set, save_changes, on and off.

const STYLE = `
.fvlm-linked { --paper: #fff; --ink: #1d2126; --soft: #59616b; --line: #d5d9de; --accent: #0b6e6e; --well: #eef1f3; --ring: #c2185b;
  background: var(--paper); color: var(--ink); font: 13px/1.45 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", "DejaVu Sans", sans-serif;
  padding: 12px 14px; border: 1px solid var(--line); border-radius: 8px; box-sizing: border-box; max-width: 66rem; }
.fvlm-linked.fvlm-dark { --paper: #16191c; --ink: #e6e4de; --soft: #a9b1b9; --line: #3a4047; --accent: #5cc7bf; --well: #22272b; --ring: #ff8ab8; }
.fvlm-linked * { box-sizing: border-box; }
.fvlm-linked .title { font-weight: 600; font-size: 15px; margin: 0 0 8px; }
.fvlm-linked .panels { display: flex; flex-wrap: wrap; gap: 18px; align-items: flex-start; }
.fvlm-linked .panels > section { flex: 1 1 15rem; min-width: 13rem; max-width: 24rem; }
.fvlm-linked h4 { font: inherit; font-weight: 600; margin: 0 0 4px; }
.fvlm-linked .scroll { overflow: auto; max-height: 24rem; padding: 4px; margin: -4px; }
.fvlm-linked table { border-collapse: separate; border-spacing: 2px; width: 100%; table-layout: fixed; margin: 0; font-variant-numeric: tabular-nums; }
.fvlm-linked th { font-weight: 400; font-size: 11px; color: var(--soft); padding: 1px; text-align: center; background: none; border: 0; }
.fvlm-linked th.corner { width: 3.4rem; text-align: left; }
.fvlm-linked td { padding: 0; height: var(--tall); text-align: center; font-size: 11px; border-radius: 3px; cursor: pointer; border: 0; }
.fvlm-linked td[aria-selected=true] { outline: 3px solid var(--ring); outline-offset: 0; position: relative; z-index: 1; }
.fvlm-linked svg.map { display: block; width: 100%; height: auto; background: var(--well); border-radius: 4px; touch-action: none; }
.fvlm-linked svg.map circle { cursor: pointer; stroke: var(--paper); stroke-width: 1; }
.fvlm-linked svg.map circle.on { stroke: var(--ring); stroke-width: 3; }
.fvlm-linked svg.map text { font-size: 12px; fill: var(--ink); paint-order: stroke; stroke: var(--well); stroke-width: 3px; pointer-events: none; }
.fvlm-linked canvas { display: block; width: 100%; height: auto; border-radius: 4px; background: var(--well); cursor: crosshair; }
.fvlm-linked .strip { display: flex; gap: 4px; margin-top: 6px; }
.fvlm-linked .strip button { flex: 1 1 0; min-width: 0; max-width: 5.5rem; padding: 2px; border: 2px solid transparent; border-radius: 5px; background: none; color: var(--ink); font: 11px/1.3 inherit; cursor: pointer; }
.fvlm-linked .strip button[aria-pressed=true] { border-color: var(--ring); }
.fvlm-linked .note { color: var(--soft); margin: 4px 0 0; font-size: 12px; }
.fvlm-linked .legend { display: flex; gap: 6px; align-items: center; color: var(--soft); margin-top: 8px; font-size: 12px; font-variant-numeric: tabular-nums; }
.fvlm-linked .legend i { display: block; flex: 0 1 9rem; height: 8px; border-radius: 2px; background: linear-gradient(90deg, #440154, #472d7b, #3b528b, #2c728e, #21918c, #28ae80, #5ec962, #addc30, #fde725); }
.fvlm-linked .live { margin: 10px 0 0; min-height: 1.45em; font-variant-numeric: tabular-nums; }
.fvlm-linked :focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
.fvlm-linked .error { border-left: 4px solid #c0392b; padding: 6px 10px; margin: 8px 0 0; }
.jp-OutputArea-child:has(.jp-RenderedImage):has(+ .jp-OutputArea-child .fvlm-linked) { display: none; }
`;
const VIRIDIS = [[68, 1, 84], [72, 40, 120], [62, 74, 137], [49, 104, 142], [38, 130, 142], [31, 158, 137], [53, 183, 121], [110, 206, 88], [181, 222, 43], [253, 231, 37]];
const SVG = "http://www.w3.org/2000/svg", SIDE = 320, STRONGEST = 0.85;

function colour(v) {
  const at = Math.min(1, Math.max(0, v)) * (VIRIDIS.length - 1), low = Math.min(Math.floor(at), VIRIDIS.length - 2);
  return VIRIDIS[low].map((c, i) => Math.round(c + (at - low) * (VIRIDIS[low + 1][i] - c)));
}
const css = rgb => `rgb(${rgb.join(" ")})`;

// Black or white, whichever stands out more: at least 4.58 to 1 on any colour.
function ink(rgb) {
  const [r, g, b] = rgb.map(c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000" : "#fff";
}

function element(tag, attributes = {}, ...children) {
  const made = ["svg", "circle", "text", "g"].includes(tag) ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== null && value !== undefined) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

const number = v => v === 0 ? "0" : Math.abs(v) >= 0.001 && Math.abs(v) < 1e5 ? String(+v.toPrecision(3)) : v.toExponential(2);

// Lab says which theme it wears; a page from disk asks the system.
function follow_theme(root) {
  const media = matchMedia("(prefers-color-scheme: dark)");
  const decide = () => { const lab = document.body.dataset.jpThemeLight; root.classList.toggle("fvlm-dark", lab ? lab === "false" : media.matches); };
  const seen = new MutationObserver(decide);
  seen.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light"] });
  media.addEventListener("change", decide);
  decide();
  return () => { seen.disconnect(); media.removeEventListener("change", decide); };
}

const as_bytes = value => new Uint8Array(value.buffer ?? value, value.byteOffset ?? 0, value.byteLength);

async function render({ model, el }) {
  const scene = model.get("_scene"), { layers, heads, entropy, points, frames, rows, columns, width, height, across } = scene;
  const root = element("div", { class: "fvlm-linked", role: "group", "aria-label": scene.title });
  root.append(element("style", {}, STYLE));
  el.append(root);
  const clean = [follow_theme(root)], keys = { "data-lm-suppress-shortcuts": "true" };
  let sheet;
  try { sheet = await createImageBitmap(new Blob([as_bytes(model.get("_sheet"))], { type: "image/png" })); } catch (problem) {
    root.append(element("p", { class: "error", role: "alert", "data-role": "error" }, `The frames could not be read (${problem.message}). Run the cell again.`));
    return () => clean.forEach(undo => undo());
  }
  const maps = as_bytes(model.get("_heat")), cells = rows * columns;
  // What one head gives to every cell of one frame, on the scale 0..1 of that head's largest weight over all frames.
  const heat = (l, h, t) => maps.subarray(((l * heads + h) * frames + t) * cells, ((l * heads + h) * frames + t + 1) * cells);
  const low = scene.low, high = scene.high, shade = v => colour(high > low ? (v - low) / (high - low) : 0.5);
  const name = (l, h) => `layer ${l}, head ${h}`;

  const panels = element("div", { class: "panels" });
  root.append(element("p", { class: "title" }, scene.title), panels);

  // --- entropy: a grid of cells, one in the order of Tab
  const table = element("table", { role: "grid", "aria-label": `${scene.measure} of every head, layers down, heads across`, "data-role": "matrix", style: `--tall:${Math.min(3.4, Math.max(1.7, 12 / layers)).toFixed(2)}rem` });
  const top = element("tr", { role: "row" }, element("th", { class: "corner", scope: "col" }, "layer"));
  for (let h = 0; h < heads; h++) top.append(element("th", { scope: "col", role: "columnheader" }, `${h}`));
  table.append(element("thead", { role: "rowgroup" }, top));
  const body = element("tbody", { role: "rowgroup" }), boxes = [];
  for (let l = 0; l < layers; l++) {
    const line = element("tr", { role: "row" }, element("th", { scope: "row", role: "rowheader" }, `${l}`));
    for (let h = 0; h < heads; h++) {
      const rgb = shade(entropy[l][h]);
      const box = element("td", { role: "gridcell", "data-layer": l, "data-head": h, "aria-label": `${name(l, h)}: ${number(entropy[l][h])}`, style: `background:${css(rgb)};color:${ink(rgb)}`, ...keys });
      if (heads <= 8) box.textContent = entropy[l][h].toFixed(2);
      boxes.push(box); line.append(box);
    }
    body.append(line);
  }
  table.append(body);
  const legend = element("div", { class: "legend", "data-role": "legend" }, number(low), element("i", { "aria-hidden": "true" }), `${number(high)}  ${scene.measure}`);
  panels.append(element("section", {}, element("h4", {}, "Entropy, layer by head"), element("div", { class: "scroll" }, table), legend));

  // --- the map of heads
  const map = element("svg", { class: "map", viewBox: `0 0 ${SIDE} ${SIDE}`, tabindex: "0", role: "slider", "aria-label": `${scene.points_title}; arrow keys step through the heads`, "aria-valuemin": 0, "aria-valuemax": layers * heads - 1, "data-role": "map", ...keys });
  const xs = points.map(p => p[2]), ys = points.map(p => p[3]), bounds = v => [Math.min(...v), Math.max(...v)];
  const [x0, x1] = bounds(xs), [y0, y1] = bounds(ys), span = Math.max(x1 - x0, y1 - y0, 1e-9), room = SIDE - 44;
  const radius = points.length > 400 ? 3.5 : points.length > 100 ? 5 : 7;
  const dots = points.map(([l, h, px, py]) => {
    const dot = element("circle", { cx: (22 + room * (0.5 + (px - (x0 + x1) / 2) / span)).toFixed(2), cy: (22 + room * (0.5 - (py - (y0 + y1) / 2) / span)).toFixed(2), r: radius, "data-layer": l, "data-head": h, fill: css(shade(entropy[l][h])) });
    map.append(dot);
    return dot;
  });
  const tag = element("text", { "text-anchor": "middle" });
  map.append(tag);
  panels.append(element("section", {}, element("h4", {}, scene.points_title), map, element("p", { class: "note" }, scene.points_note)));

  // --- the frame
  const canvas = element("canvas", { width, height, tabindex: "0", role: "img", "data-role": "frame", ...keys });
  const pen = canvas.getContext("2d", { willReadFrequently: true });
  const strip = element("div", { class: "strip", role: "group", "aria-label": "frames" }), small = [];
  if (frames > 1) for (let t = 0; t < frames; t++) {
    const face = element("canvas", { width: Math.min(width, 96), height: Math.round(height * Math.min(1, 96 / width)), "aria-hidden": "true" });
    const button = element("button", { type: "button", "data-role": "thumbnail", "data-frame": t, ...keys }, face, element("span", {}, ""));
    button.addEventListener("click", () => choose({ frame: t }));
    small.push({ button, face, pen: face.getContext("2d"), words: button.lastChild });
    strip.append(button);
  }
  panels.append(element("section", {}, element("h4", { "data-role": "frame-title" }), canvas, ...(frames > 1 ? [strip] : []),
    element("p", { class: "note" }, element("span", { "data-role": "scale" }), cells > 1 ? " A click on the picture selects the head that looks there most." : " The tint lies on the whole frame: the model sees one vector a frame.")));
  const live = element("p", { class: "live", "data-role": "live", "aria-live": "polite" });
  root.append(live);

  const scratch = element("canvas", { width: columns, height: rows }), brush = scratch.getContext("2d");
  const lay = (target, w, h, t, map_of_head) => {
    target.drawImage(sheet, t % across * width, Math.floor(t / across) * height, width, height, 0, 0, w, h);
    const picture = brush.createImageData(columns, rows);
    for (let c = 0; c < cells; c++) {
      const v = map_of_head[c] / 255;
      picture.data.set([...colour(v), Math.round(255 * STRONGEST * (0.25 + 0.75 * v))], 4 * c);
    }
    brush.putImageData(picture, 0, 0);
    target.imageSmoothingEnabled = false;
    target.drawImage(scratch, 0, 0, w, h);
    target.imageSmoothingEnabled = true;
  };
  const percent = (l, h, t) => `${number(100 * scene.shares[l][h][t])} %`;
  let painted = 0;
  const state = () => ({ l: model.get("layer"), h: model.get("head"), t: model.get("frame") });
  const paint = () => {
    const began = performance.now(), { l, h, t } = state(), at = l * heads + h;
    boxes.forEach((box, i) => { box.setAttribute("aria-selected", i === at); box.setAttribute("tabindex", i === at ? 0 : -1); });
    let sum_x = 0, highest = SIDE, count = 0;
    dots.forEach((dot, i) => {
      const on = points[i][0] === l && points[i][1] === h;
      dot.classList.toggle("on", on);
      if (on) { sum_x += +dot.getAttribute("cx"); highest = Math.min(highest, +dot.getAttribute("cy")); count++; }
    });
    if (count) { tag.setAttribute("x", Math.min(SIDE - 44, Math.max(44, sum_x / count))); tag.setAttribute("y", Math.max(14, highest - radius - 6)); tag.textContent = name(l, h); }
    map.setAttribute("aria-valuenow", at); map.setAttribute("aria-valuetext", name(l, h));
    lay(pen, width, height, t, heat(l, h, t));
    small.forEach((face, i) => {
      lay(face.pen, face.face.width, face.face.height, i, heat(l, h, i));
      face.button.setAttribute("aria-pressed", i === t);
      face.button.setAttribute("aria-label", `frame ${i}${scene.shares ? `, ${percent(l, h, i)} of the attention` : ""}`);
      face.words.textContent = scene.shares ? percent(l, h, i) : String(i);
    });
    const of_head = heat(l, h, t), peak = of_head.indexOf(Math.max(...of_head));
    const where = cells > 1 ? `strongest at row ${Math.floor(peak / columns)}, column ${peak % columns}` : `${percent(l, h, t)} of the attention`;
    root.querySelector("[data-role=scale]").textContent = `Colours from 0 to ${number(scene.peaks[l][h])}, the largest weight of this head.`;
    root.querySelector("[data-role=frame-title]").textContent = frames > 1 ? `Frame ${t}, ${name(l, h)}` : `${name(l, h)[0].toUpperCase()}${name(l, h).slice(1)}`;
    canvas.setAttribute("aria-label", `frame ${t} with the attention of ${name(l, h)}, ${where}`);
    const ranked = entropy.flat().filter(v => v < entropy[l][h]).length;
    live.textContent = `Layer ${l}, head ${h}: ${scene.measure} ${number(entropy[l][h])}, number ${ranked + 1} of ${layers * heads} from the most concentrated; in frame ${t} ${where}.`;
    Object.assign(root.dataset, { layer: l, head: h, frame: t, painted: ++painted, ready: "true", milliseconds: (performance.now() - began).toFixed(2) });
  };
  const choose = ({ layer, head, frame }) => {
    if (layer !== undefined) { model.set("layer", layer); model.set("head", head); }
    if (frame !== undefined) model.set("frame", frame);
    model.save_changes();
  };
  const step = at => { const i = Math.min(layers * heads - 1, Math.max(0, at)); choose({ layer: Math.floor(i / heads), head: i % heads }); };

  table.addEventListener("click", event => { const box = event.target.closest("td"); if (box) { choose({ layer: +box.dataset.layer, head: +box.dataset.head }); box.focus(); } });
  map.addEventListener("click", event => {
    const box = map.getBoundingClientRect(), x = (event.clientX - box.left) / box.width * SIDE, y = (event.clientY - box.top) / box.height * SIDE;
    let best = 0, nearest = Infinity;  // the nearest dot: small ones are hard to hit
    dots.forEach((dot, i) => { const d = (dot.getAttribute("cx") - x) ** 2 + (dot.getAttribute("cy") - y) ** 2; if (d < nearest) [nearest, best] = [d, i]; });
    choose({ layer: points[best][0], head: points[best][1] });
  });
  canvas.addEventListener("click", event => {
    const box = canvas.getBoundingClientRect(), { t } = state();
    const c = Math.min(columns - 1, Math.floor((event.clientX - box.left) / box.width * columns)), r = Math.min(rows - 1, Math.floor((event.clientY - box.top) / box.height * rows));
    let best = 0, most = -1;
    for (let i = 0; i < layers * heads; i++) { const w = heat(Math.floor(i / heads), i % heads, t)[r * columns + c] * scene.peaks[Math.floor(i / heads)][i % heads]; if (w > most) [most, best] = [w, i]; }
    step(best);
  });
  root.addEventListener("keydown", event => {
    event.stopPropagation();
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const { l, h, t } = state(), at = l * heads + h;
    if (event.target === canvas || strip.contains(event.target)) {
      const to = { ArrowLeft: t - 1, ArrowRight: t + 1, Home: 0, End: frames - 1 }[event.key];
      if (to !== undefined) { event.preventDefault(); choose({ frame: Math.min(frames - 1, Math.max(0, to)) }); return; }
    }
    const to = { ArrowLeft: at - 1, ArrowRight: at + 1, ArrowUp: at - heads, ArrowDown: at + heads, Home: l * heads, End: l * heads + heads - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    if (to >= 0 && to < layers * heads) step(to);
    if (event.target.tagName === "TD") boxes[model.get("layer") * heads + model.get("head")].focus();
  });
  let waiting = false;  // layer and head change together: one picture, not two
  const soon = () => { if (!waiting) { waiting = true; queueMicrotask(() => { waiting = false; paint(); }); } };
  for (const trait of ["layer", "head", "frame"]) { model.on(`change:${trait}`, soon); clean.push(() => model.off(`change:${trait}`, soon)); }
  paint();
  return () => clean.forEach(undo => undo());
}

export default { render };
