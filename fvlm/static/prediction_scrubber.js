// The prediction scrubber: truth, predictions and the last frame seen side by side, an error per horizon, one cursor.
// One module, no dependency. `model` is an anywidget model, or anything with get, set, save_changes, on and off.

const STYLE = `
.fvlm-scrubber { --paper: #fff; --ink: #1d2126; --soft: #59616b; --line: #d5d9de; --accent: #0b6e6e; --well: #eef1f3;
  --s0: #0b6e6e; --s1: #b4480f; --s2: #5b3fa8; --s3: #8a6100; --s4: #1f62b5; --s5: #a3236a; --copy: #5d6670;
  container-type: inline-size; background: var(--paper); color: var(--ink); font: 13px/1.45 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", "DejaVu Sans", sans-serif;
  padding: 12px 14px; border: 1px solid var(--line); border-radius: 8px; box-sizing: border-box; max-width: 60rem; }
.fvlm-scrubber.fvlm-dark { --paper: #16191c; --ink: #e6e4de; --soft: #a9b1b9; --line: #3a4047; --accent: #5cc7bf; --well: #22272b;
  --s0: #5cc7bf; --s1: #f0955c; --s2: #b7a2f5; --s3: #e0bb52; --s4: #7fb4f5; --s5: #f08cc0; --copy: #a9b2bb; }
.fvlm-scrubber * { box-sizing: border-box; }
.fvlm-scrubber .top { display: flex; justify-content: space-between; align-items: baseline; gap: 1rem; flex-wrap: wrap; margin-bottom: 8px; }
.fvlm-scrubber .title { font-weight: 600; font-size: 15px; margin: 0; }
.fvlm-scrubber .when { color: var(--soft); font-variant-numeric: tabular-nums; }
.fvlm-scrubber .frames { display: flex; flex-wrap: wrap; gap: 10px; border-radius: 6px; }
.fvlm-scrubber figure { margin: 0; flex: 1 1 8.5rem; max-width: 16rem; min-width: 7rem; }
.fvlm-scrubber canvas { display: block; width: 100%; height: auto; border-radius: 4px; background: var(--well); }
.fvlm-scrubber canvas.small { image-rendering: pixelated; }
.fvlm-scrubber figcaption { margin-top: 4px; }
.fvlm-scrubber .name { font-weight: 600; display: flex; align-items: center; gap: 6px; }
.fvlm-scrubber .name svg { flex: none; }
.fvlm-scrubber .value { color: var(--soft); font-variant-numeric: tabular-nums; }
.fvlm-scrubber .chart { display: block; width: 100%; height: auto; margin: 12px 0 6px; cursor: crosshair; touch-action: none; }
.fvlm-scrubber .chart text { font-size: 11px; fill: var(--soft); font-variant-numeric: tabular-nums; }
.fvlm-scrubber .chart .grid { stroke: var(--line); stroke-width: 1; }
.fvlm-scrubber .chart .curve { fill: none; stroke-width: 2; stroke-linejoin: round; }
.fvlm-scrubber .chart .cursor { stroke: var(--ink); stroke-width: 1.5; }
.fvlm-scrubber .chart .seen { fill: var(--well); }
.fvlm-scrubber .controls { display: flex; flex-wrap: wrap; gap: 8px 14px; align-items: center; }
.fvlm-scrubber .controls input[type=range] { flex: 1 1 10rem; accent-color: var(--accent); min-width: 6rem; }
.fvlm-scrubber button, .fvlm-scrubber select { font: inherit; color: var(--ink); background: var(--well); border: 1px solid var(--soft); border-radius: 5px; padding: 3px 10px; min-height: 28px; }
.fvlm-scrubber button { min-width: 4.6rem; cursor: pointer; }
.fvlm-scrubber label { display: inline-flex; gap: 6px; align-items: center; }
.fvlm-scrubber :focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
.fvlm-scrubber .live { color: var(--ink); margin: 8px 0 0; min-height: 1.45em; font-variant-numeric: tabular-nums; }
.fvlm-scrubber .legend { display: flex; gap: 6px; align-items: center; color: var(--soft); }
.fvlm-scrubber .legend i { display: block; width: 7rem; height: 8px; border-radius: 2px; background: linear-gradient(90deg, #440154, #472d7b, #3b528b, #2c728e, #21918c, #28ae80, #5ec962, #addc30, #fde725); }
.fvlm-scrubber [hidden] { display: none; }
.fvlm-scrubber .error { border-left: 4px solid #c0392b; padding: 6px 10px; margin: 0; }
.jp-OutputArea-child:has(.jp-RenderedImage):has(+ .jp-OutputArea-child .fvlm-scrubber) { display: none; }
`;
const VIRIDIS = [[68, 1, 84], [72, 40, 120], [62, 74, 137], [49, 104, 142], [38, 130, 142], [31, 158, 137], [53, 183, 121], [110, 206, 88], [181, 222, 43], [253, 231, 37]];
const SCALE = Uint8ClampedArray.from({ length: 256 * 3 }, (_, i) => {
  const at = Math.floor(i / 3) / 255 * (VIRIDIS.length - 1), low = Math.min(Math.floor(at), VIRIDIS.length - 2);
  return VIRIDIS[low][i % 3] + (at - low) * (VIRIDIS[low + 1][i % 3] - VIRIDIS[low][i % 3]);
});
const DASHES = ["", "7 3", "2 3", "9 3 2 3", "5 2", "1 3"];
const SVG = "http://www.w3.org/2000/svg";

function element(tag, attributes = {}, ...children) {
  const svg = ["svg", "path", "line", "rect", "text", "circle", "g"].includes(tag);
  const made = svg ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== null && value !== undefined) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// Three digits that fit anything from 1e-6 to 1e6.
const number = v => v === 0 ? "0" : Math.abs(v) >= 0.001 && Math.abs(v) < 1e5 ? String(+v.toPrecision(3)) : v.toExponential(2);

function ticks(high) {
  const rough = high / 3, power = 10 ** Math.floor(Math.log10(rough)), step = [1, 2, 2.5, 5, 10].map(m => m * power).find(s => s >= rough);
  const found = [];
  for (let i = 0; i * step <= high * 1.0001; i++) found.push(i * step);
  return found;
}

// Lab says which theme it wears; a page from disk asks the system.
function follow_theme(root) {
  const decide = () => {
    const lab = document.body.dataset.jpThemeLight;
    root.classList.toggle("fvlm-dark", lab ? lab === "false" : matchMedia("(prefers-color-scheme: dark)").matches);
  };
  const seen = new MutationObserver(decide), media = matchMedia("(prefers-color-scheme: dark)");
  seen.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light"] });
  media.addEventListener("change", decide);
  decide();
  return () => { seen.disconnect(); media.removeEventListener("change", decide); };
}

async function sheet(bytes) {
  const view = new Uint8Array(bytes.buffer ?? bytes, bytes.byteOffset ?? 0, bytes.byteLength);
  return createImageBitmap(new Blob([view], { type: "image/png" }));
}

// Playing belongs to the model, not to a picture of it: two views of one scrubber keep one time.
function initialize({ model }) {
  let request = 0, last = 0;
  const tick = now => {
    if (!model.get("playing")) { request = 0; return; }
    const wait = 1000 / model.get("fps");
    if (now - last >= wait) {
      last = now - last > 2 * wait ? now : last + wait;
      const { context, future } = model.get("_scene");
      const next = model.get("horizon") + 1;
      model.set("horizon", next > future ? 1 - context : next);
      model.save_changes();
    }
    request = requestAnimationFrame(tick);
  };
  const start = () => { if (model.get("playing") && !request) { last = performance.now(); request = requestAnimationFrame(tick); } };
  model.on("change:playing", start);
  start();
  return () => { cancelAnimationFrame(request); model.off("change:playing", start); };
}

async function render({ model, el }) {
  const scene = model.get("_scene"), { names, context, future, width, height, columns, errors, unit } = scene;
  const root = element("div", { class: "fvlm-scrubber", role: "group", "aria-label": `${scene.title}: frames and errors by horizon` });
  root.append(element("style", {}, STYLE));
  el.append(root);
  const clean = [follow_theme(root)];
  const first = 1 - context, colour = i => i === names.length - 1 ? "var(--copy)" : `var(--s${(i - 1) % 6})`;
  const dash = i => i === names.length - 1 ? "5 4" : DASHES[(i - 1) % DASHES.length];

  const when = element("span", { class: "when", "data-role": "when" });
  root.append(element("div", { class: "top" }, element("p", { class: "title" }, scene.title), when));

  // --- the frames
  const frames = element("div", { class: "frames", tabindex: "0", role: "group", "data-role": "frames", "data-lm-suppress-shortcuts": "true", "aria-label": "frames; left and right step, space plays, d shows differences" });
  const panels = names.map((name, i) => {
    const canvas = element("canvas", { width, height, role: "img", "data-role": "panel", "data-name": name, class: width < 200 ? "small" : null });
    const value = element("div", { class: "value", "data-role": "value" }), note = element("div", { class: "value", "data-role": "note" });
    const mark = i ? element("svg", { width: 22, height: 8, "aria-hidden": "true" }, element("line", { x1: 0, x2: 22, y1: 4, y2: 4, "stroke-width": 3, style: `stroke:${colour(i)}`, "stroke-dasharray": dash(i) || null })) : "";
    frames.append(element("figure", {}, canvas, element("figcaption", {}, element("div", { class: "name" }, mark, name), value, note)));
    return { canvas, value, note, pen: canvas.getContext("2d", { willReadFrequently: true }) };
  });
  root.append(frames);

  // --- the curves
  const W = 760, H = 190, left = 52, right = W - 10, top = 22, bottom = H - 32;
  const high = Math.max(...names.slice(1).flatMap(name => errors[name]), 1e-12) * 1.06;
  const x = h => left + (h - first) / Math.max(1, future - first) * (right - left), y = v => bottom - v / high * (bottom - top);
  const best = names.slice(1).map(name => `${name} from ${number(errors[name][0])} to ${number(errors[name][future - 1])}`).join(", ");
  const chart = element("svg", { class: "chart", viewBox: `0 0 ${W} ${H}`, role: "img", "data-role": "chart", "aria-label": `${unit} by horizon: ${best}` });
  chart.append(element("rect", { class: "seen", x: left, y: top, width: Math.max(0, x(0) - left), height: bottom - top }));
  if (x(0) - left > 40) chart.append(element("text", { x: (left + x(0)) / 2, y: top + 14, "text-anchor": "middle" }, "seen"));
  for (const v of ticks(high)) chart.append(element("line", { class: "grid", x1: left, x2: right, y1: y(v), y2: y(v) }), element("text", { x: left - 6, y: y(v) + 4, "text-anchor": "end" }, number(v)));
  const every = Math.max(1, Math.ceil((future - first) / 16));
  for (let h = first; h <= future; h++) if (h % every === 0) chart.append(element("text", { x: x(h), y: bottom + 15, "text-anchor": "middle" }, String(h)));
  chart.append(element("text", { x: 0, y: 12 }, unit), element("text", { x: (left + right) / 2, y: H - 3, "text-anchor": "middle" }, "horizon, frames after the last one seen"));
  names.slice(1).forEach((name, i) => {
    const d = errors[name].map((v, t) => `${t ? "L" : "M"}${x(t + 1).toFixed(1)} ${y(v).toFixed(1)}`).join("");
    chart.append(element("path", { class: "curve", d, style: `stroke:${colour(i + 1)}`, "stroke-dasharray": dash(i + 1) || null, "data-name": name }));
    if (future === 1) chart.append(element("circle", { cx: x(1), cy: y(errors[name][0]), r: 4, style: `fill:${colour(i + 1)}` }));
  });
  const cursor = element("line", { class: "cursor", y1: top, y2: bottom, "data-role": "cursor" });
  const dots = names.slice(1).map((_, i) => element("circle", { r: 4.5, style: `fill:${colour(i + 1)};stroke:var(--paper)`, "stroke-width": 1.5 }));
  chart.append(cursor, ...dots);
  root.append(chart);

  // --- the controls
  const play = element("button", { type: "button", "data-role": "play", "data-lm-suppress-shortcuts": "true" });
  const slider = element("input", { type: "range", min: first, max: future, step: 1, "data-role": "horizon", "aria-label": "horizon", "data-lm-suppress-shortcuts": "true" });
  const speed = element("select", { "data-role": "speed", "data-lm-suppress-shortcuts": "true" });
  const speeds = [...new Set([2, 4, 8, 15, 25, model.get("fps")])].sort((a, b) => a - b);
  for (const v of speeds) speed.append(element("option", { value: v }, `${v} frames/s`));
  const difference = element("input", { type: "checkbox", "data-role": "difference", "data-lm-suppress-shortcuts": "true" });
  const legend = element("span", { class: "legend", "data-role": "legend" }, "0", element("i", { "aria-hidden": "true" }), "255");
  root.append(element("div", { class: "controls" }, play, slider, element("label", {}, "speed", speed), element("label", {}, difference, "difference from the truth"), legend));
  const live = element("p", { class: "live", "data-role": "live", "aria-live": "polite" });
  root.append(live);

  let sheets;
  try { sheets = await Promise.all(model.get("_sheets").map(sheet)); } catch (problem) {
    root.append(element("p", { class: "error", role: "alert", "data-role": "error" }, `The frames could not be read (${problem.message}). Run the cell again.`));
    return () => clean.forEach(undo => undo());
  }

  const place = (i, h) => h <= 0 ? [sheets[0], h - first] : i === names.length - 1 ? [sheets[0], context - 1] : [sheets[i + 1], h - 1];
  const draw_frame = (pen, i, h) => {
    const [source, at] = place(i, h);
    pen.drawImage(source, at % columns * width, Math.floor(at / columns) * height, width, height, 0, 0, width, height);
  };
  // |panel - truth|, the mean over the three colours, in viridis from 0 to 255.
  const subtract = (pen, truth) => {
    const picture = pen.getImageData(0, 0, width, height), a = picture.data, b = truth.data;
    for (let p = 0; p < a.length; p += 4) {
      const d = Math.round((Math.abs(a[p] - b[p]) + Math.abs(a[p + 1] - b[p + 1]) + Math.abs(a[p + 2] - b[p + 2])) / 3) * 3;
      a[p] = SCALE[d]; a[p + 1] = SCALE[d + 1]; a[p + 2] = SCALE[d + 2];
    }
    pen.putImageData(picture, 0, 0);
  };
  const words = h => h <= 0 ? (h === 0 ? "last frame seen" : `seen, ${-h} before the last`) : `horizon ${h} of ${future}`;
  const verdict = h => {
    if (h <= 0) return `${words(h)[0].toUpperCase()}${words(h).slice(1)}: every panel shows it.`;
    const copy = errors[names.at(-1)][h - 1];
    const judged = names.slice(1, -1).map(name => {
      const e = errors[name][h - 1], ratio = copy > 0 ? e / copy : NaN;
      const than = Number.isNaN(ratio) ? "" : ratio < 1 ? `, ${number(ratio)} times copy-last` : `, ${number(ratio)} times copy-last: no better than standing still`;
      return `${name} ${number(e)}${than}`;
    });
    return `Horizon ${h} of ${future}. ${judged.join("; ")}. Copy-last ${number(copy)}.`;
  };
  let painted = 0;
  const paint = () => {
    const began = performance.now();
    const h = Math.min(future, Math.max(first, model.get("horizon"))), differ = model.get("difference") && h > 0;
    panels.forEach((panel, i) => draw_frame(panel.pen, i, h));
    if (differ) { const truth = panels[0].pen.getImageData(0, 0, width, height); panels.slice(1).forEach(panel => subtract(panel.pen, truth)); }
    panels.forEach((panel, i) => {
      const error = i && h > 0 ? `error ${number(errors[names[i]][h - 1])}` : h > 0 ? "what happened" : "seen";
      panel.value.textContent = error;
      panel.note.textContent = h > 0 ? scene.notes[names[i]]?.[h - 1] ?? "" : "";
      panel.canvas.setAttribute("aria-label", `${names[i]}, ${words(h)}${i && h > 0 ? `, ${error}` : ""}${differ && i ? ", difference from the truth" : ""}`);
    });
    cursor.setAttribute("x1", x(h)); cursor.setAttribute("x2", x(h));
    dots.forEach((dot, i) => { dot.style.display = h > 0 ? "" : "none"; if (h > 0) { dot.setAttribute("cx", x(h)); dot.setAttribute("cy", y(errors[names[i + 1]][h - 1])); } });
    when.textContent = words(h);
    slider.value = h; slider.setAttribute("aria-valuetext", words(h));
    difference.checked = model.get("difference"); legend.hidden = !model.get("difference");
    const playing = model.get("playing");
    play.textContent = playing ? "Pause" : "Play"; play.setAttribute("aria-pressed", playing);
    speed.value = model.get("fps");
    live.setAttribute("aria-live", playing ? "off" : "polite");  // a film is not read aloud frame by frame
    live.textContent = verdict(h);
    root.dataset.horizon = h; root.dataset.painted = ++painted; root.dataset.ready = "true";
    root.dataset.milliseconds = (performance.now() - began).toFixed(2);
  };
  const put = (name, value) => { model.set(name, value); model.save_changes(); };
  const go = h => put("horizon", Math.min(future, Math.max(first, h)));
  const pause_and_go = h => { if (model.get("playing")) model.set("playing", false); go(h); };

  play.addEventListener("click", () => put("playing", !model.get("playing")));
  slider.addEventListener("input", () => pause_and_go(+slider.value));
  speed.addEventListener("change", () => put("fps", +speed.value));
  difference.addEventListener("change", () => put("difference", difference.checked));
  const point = event => { const box = chart.getBoundingClientRect(), at = (event.clientX - box.left) / box.width * W; pause_and_go(Math.round(first + (at - left) / (right - left) * (future - first))); };
  chart.addEventListener("pointerdown", event => { chart.setPointerCapture(event.pointerId); point(event); });
  chart.addEventListener("pointermove", event => { if (event.buttons) point(event); });
  root.addEventListener("keydown", event => {
    event.stopPropagation();
    if (event.ctrlKey || event.metaKey || event.altKey || event.target === speed) return;
    const h = model.get("horizon");
    const moves = { ArrowLeft: h - 1, ArrowRight: h + 1, ArrowDown: h - 1, ArrowUp: h + 1, Home: first, End: future };
    if (event.key in moves) { event.preventDefault(); pause_and_go(moves[event.key]); }
    else if (event.key === " " && event.target !== play && event.target !== difference) { event.preventDefault(); put("playing", !model.get("playing")); }
    else if (event.key === "d") { event.preventDefault(); put("difference", !model.get("difference")); }
  });
  for (const name of ["horizon", "playing", "difference", "fps"]) { model.on(`change:${name}`, paint); clean.push(() => model.off(`change:${name}`, paint)); }
  paint();
  return () => clean.forEach(undo => undo());
}

export default { initialize, render };
