// One text under a policy: the map of a head, the heads of the model, and the words themselves.
const N = DATA.tokens.length, ENTRIES = N * (N + 1) / 2;
const at = (i, j) => i * (i + 1) / 2 + j;
const layers = DATA.layers.map((l) => ({
  number: l.number, heads: l.heads, chosen: unpack(l.chosen, Uint8Array), visible: unpack(l.visible, Uint8Array),
    p: unpack(l.probabilities, Uint8Array),
  exact: l.exact ? unpack(l.exact, Uint16Array) : null, error: l.error ? unpack(l.error, Uint16Array) : null,
}));
const bit = (bytes, k) => (bytes[k >> 3] >> (k & 7)) & 1;
function half(h) {
  const sign = h & 0x8000 ? -1 : 1, e = (h >> 10) & 31, m = h & 1023;
  return sign * (e === 0 ? m * 2 ** -24 : e === 31 ? (m ? NaN : Infinity) : (1 + m / 1024) * 2 ** (e - 15));
}
// How often each token is recomputed as a key, and how often it could be, per layer and head.
const columns = layers.map((l) => Array.from({ length: l.heads }, (_, h) => {
  const chosen = new Float64Array(N), visible = new Float64Array(N);
  for (let i = 0; i < N; i++) for (let j = 0; j <= i; j++) {
    const k = h * ENTRIES + at(i, j);
    chosen[j] += bit(l.chosen, k);
    visible[j] += bit(l.visible, k);
  }
  return { chosen, visible };
}));
const sum = (v) => v.reduce((a, b) => a + b, 0);
const rates = columns.map((heads) => heads.map((c) => sum(c.chosen) / Math.max(1, sum(c.visible))));
const show = (token) => token.replace(/\n/g, "⏎").replace(/\t/g, "⇥") || "∅";
const short = (token) => { const t = show(token).trim() || "␣"; return t.length > 9 ? t.slice(0, 8) + "…" : t; };
const SHADES = [["head", "this head"], ["layer", "this layer"], ["all", "all heads"], ["kl", "KL of the next token"]];
let pinned = -1;

fill(el("layer"), layers.map((l, i) => [String(i), String(l.number)]));
fill(el("shade"), SHADES, "all");
fill(el("lines"), [["all", "all layers"], ["layer", "the heads of this layer"]]);
// Begin with the head that recomputes most.
let best = [0, 0];
rates.forEach((heads, l) => heads.forEach((r, h) => { if (r > rates[best[0]][best[1]]) best = [l, h]; }));
el("layer").value = String(best[0]);
const fillHeads = (keep) => fill(el("head"), rates[el("layer").value].map((r, h) => [String(h),
  `${h} (${percentText(r)})`]), keep);
fillHeads(String(best[1]));

function drawWords(l, h) {
  const kind = el("shade").value, total = new Float64Array(N), seen = new Float64Array(N);
  if (kind !== "kl") columns.forEach((heads, x) => heads.forEach((c, y) => {
    if (kind === "all" || (x === l && (kind === "layer" ||
      y === h))) for (let j = 0; j < N; j++) { total[j] += c.chosen[j]; seen[j] += c.visible[j]; }
  }));
  const values = kind === "kl" ? DATA.kl.map((v) => v ?? 0) : [...total], top = Math.max(...values) || 1;
  el("words").replaceChildren(...DATA.tokens.map((token, j) => {
    const word = document.createElement("button");
    word.type = "button";
    word.textContent = token.trim() ? token : show(token) + (token.includes("\n") ? "\n" : "");
    word.style.backgroundColor = `rgba(${css("--shade")}, ${(0.75 * Math.sqrt(values[j] / top)).toFixed(3)})`;
    word.setAttribute("aria-pressed", String(j === pinned));
    word.title = kind === "kl" ? `token ${j}: KL ${number(values[j], 3)}` : `token ${j}: recomputed as a key ${total[j]} of ${seen[j]} times (${percentText(total[j] / Math.max(1, seen[j]))}); KL ${number(DATA.kl[j], 3)}`;
    word.addEventListener("click", () => { pinned = pinned === j ? -1 : j; redraw(); });
    return word;
  }));
  el("scale-high").textContent = kind === "kl" ? `${number(top, 3)} nats, the most (square root)` : `${top}, the most (square root)`;
  el("scale-key").style.background = `linear-gradient(90deg, ${[0, 0.25, 0.5, 0.75, 1].map((part) =>
    `rgba(${css("--shade")}, ${(0.75 * Math.sqrt(part)).toFixed(3)})`)})`;
  el("words-note").textContent = kind === "kl" ? "Shaded by how far the prediction after each token moves. Press a token to mark it in the map."
    : `Shaded by how often each token is recomputed as a key in ${kind === "all" ? "all layers and heads" : kind === "layer" ? "this layer" : "this head"} (square root; most: ${top}). Press a token to mark it in the map.`;
}

function drawMap(l, h) {
  const layer = layers[l], z = [], text = [];
  for (let i = 0; i < N; i++) {
    const row = [], words = [];
    for (let j = 0; j < N; j++) {
      const k = h * ENTRIES + at(i, j);
      if (j > i || !bit(layer.visible, k)) { row.push(null); words.push(""); continue; }
      const root = layer.p[k] / 255, chosen = bit(layer.chosen, k);
      row.push(chosen ? 1.02 + 0.98 * root : 0.98 * root);
      let note = `query ${i} “${safe(show(DATA.tokens[i]))}”<br>key ${j} “${safe(show(DATA.tokens[j]))}”<br>probability ${number(root * root, 2)}`;
      if (layer.exact) { const exact = half(layer.exact[k]),
        error = half(layer.error[k]); note += `<br>score, low precision ${number(exact + error, 4)}<br>score, float32 ${number(exact, 4)}`; }
      words.push(note + (chosen ? "<br><b>recomputed</b>" : ""));
    }
    z.push(row);
    text.push(words);
  }
  const kept = dark() ? ["#23272c", "#e8e8e4"] : ["#f1f1ee", "#26262a"], hot = dark() ? ["#5a3413",
    "#ffb061"] : ["#fbd3b4", "#b04300"];
  el("key-kept").style.background = `linear-gradient(90deg, ${kept})`;
  el("key-chosen").style.background = `linear-gradient(90deg, ${hot})`;
  // On a phone every token has its label, and the map scrolls sideways where that is too wide.
  const width = el("map").closest("figure").clientWidth || 600, cell = Math.max(narrow() ? 12 : 3, Math.min(22, (width - 90) / N)), step = Math.max(1,
    Math.ceil(12 / cell));
  const ticks = DATA.tokens.map((_, i) => i).filter((i) => i % step === 0);
  const shapes = pinned < 0 ? [] : [["x", "y"], ["y", "x"]].map(([a, b]) => ({ type: "rect", [a + "0"]: pinned - 0.5,
    [a + "1"]: pinned + 0.5, [b + "0"]: -0.5, [b + "1"]: N - 0.5, line: { color: css("--accent"), width: 1.5 },
    fillcolor: "rgba(0,0,0,0)" }));
  const axis = { tickmode: "array", tickvals: ticks, ticktext: ticks.map((i) => safe(short(DATA.tokens[i]))),
    showgrid: false, ticks: "", tickfont: { size: Math.max(9, Math.min(12, cell)), color: css("--muted") },
    range: [-0.5, N - 0.5] };
  el("map").style.width = narrow() && cell * N + 90 > width ? `${Math.round(cell * N + 90)}px` : "";
  draw("map", [{ type: "heatmap", z, text, hoverongaps: false, hovertemplate: "%{text}<extra></extra>", zmin: 0,
    zmax: 2, showscale: false, xgap: cell > 8 ? 1 : 0, ygap: cell > 8 ? 1 : 0,
    colorscale: [[0, kept[0]], [0.495, kept[1]], [0.505, hot[0]], [1, hot[1]]] }],
    { height: Math.round(cell * N + 90), shapes, margin: { l: 8, r: 8, t: 70, b: 8 }, xaxis: { ...axis, side: "top",
      tickangle: -60 }, yaxis: { ...axis, range: [N - 0.5, -0.5] } });
  el("map-title").textContent = `Layer ${layer.number}, head ${h}: ${percentText(rates[l][h])} recomputed`;
}

function drawRates(l, h) {
  const heads = Math.max(...rates.map((r) => r.length));
  draw("rates", [{ type: "heatmap", z: rates.map((r) => r.map((v) => 100 * v)), y: layers.map((x) => x.number),
    colorscale: "Cividis", zmin: 0, xgap: 1, ygap: 1,
    hovertemplate: "layer %{y}, head %{x}: %{z:.3~g} %<extra></extra>",
    colorbar: { thickness: 10, outlinewidth: 0, tickfont: { color: css("--muted"), size: 11 }, ticksuffix: " %" } }],
    { height: Math.max(220, Math.min(620, 17 * layers.length + 70)), shapes: [{ type: "rect", x0: h - 0.5, x1: h + 0.5,
      y0: layers[l].number - 0.5, y1: layers[l].number + 0.5, line: { color: dark() ? "#ffffff" : "#d55e00",
      width: 2.5 } }],
      xaxis: { words: "head", dtick: heads > 12 ? 4 : 1, showgrid: false }, yaxis: { words: "layer",
        autorange: "reversed", showgrid: false } });
}

// ---- where recomputation happens across layers -----------------------------------------------------------------------
const MAX_LINES = 2000, ROW = 17;
// Between two colours, 0 to 1.
function mixed(from, to, part) {
  return `rgb(${[1, 3, 5].map((i) => { const [a, b] = [from, to].map((c) => parseInt(c.slice(i, i + 2), 16));
    return Math.round(a + (b - a) * part); })})`;
}
const depthColor = (part) => dark() ? mixed("#56a8e0", "#f0883e", part) : mixed("#0072b2", "#d55e00", part);
const headColor = (h, count) => `hsl(${Math.round(360 * h / count)}, 65%, ${dark() ? 66 : 40}%)`;

// The lines from queries to keys that are recomputed, of the pinned token or of all, strongest last.
function lines(l) {
  const found = [], all = el("lines").value === "all", total = sum(layers.map((x) => x.heads));
  for (let i = 0; i < N; i++) for (let j = 0; j <= i; j++) {
    if (pinned >= 0 && i !== pinned && j !== pinned) continue;
    if (all) {
      let count = 0, depth = 0;
      layers.forEach((layer, x) => { for (let h = 0; h < layer.heads; h++)
        if (bit(layer.chosen, h * ENTRIES + at(i, j))) { count++; depth += x; } });
      if (count) found.push({ i, j, weight: count / total, color: depthColor(depth / count / Math.max(1, layers.length - 1)),
        words: `recomputed by ${count} of ${total} heads, layer ${number(depth / count, 3)} on average` });
    } else for (let h = 0; h < layers[l].heads; h++) {
      const k = h * ENTRIES + at(i, j);
      if (bit(layers[l].chosen, k)) found.push({ i, j, weight: (layers[l].p[k] / 255) ** 2, color: headColor(h, layers[l].heads),
        words: `head ${h}, probability ${number((layers[l].p[k] / 255) ** 2, 2)}` });
    }
  }
  return found.sort((a, b) => a.weight - b.weight);
}

function drawAcross(l) {
  const svg = el("across"), found = lines(l), shown = found.slice(-MAX_LINES), all = el("lines").value === "all";
  const width = Math.min(640, svg.parentElement.clientWidth - 16), side = narrow() ? 84 : 130, height = ROW * (N + 1);
  const shape = (tag, attributes, words) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (words !== undefined) made.textContent = words;
    return made;
  };
  for (const [name, value] of Object.entries({ width, height, viewBox: `0 0 ${width} ${height}` })) svg.setAttribute(name, value);
  const top = shown.length ? shown[shown.length - 1].weight || 1 : 1, y = (i) => ROW * (i + 1);
  svg.replaceChildren(...shown.map((line) => {
    const part = Math.sqrt(line.weight / top), made = shape("line", { x1: side + 6, y1: y(line.i) - 4, x2: width - side - 6,
      y2: y(line.j) - 4, stroke: line.color, "stroke-width": (0.5 + 2.5 * part).toFixed(2), "stroke-opacity": (0.12 + 0.78 * part).toFixed(3) });
    made.append(shape("title", {}, `query ${line.i} “${show(DATA.tokens[line.i])}”, key ${line.j} “${show(DATA.tokens[line.j])}”: ${line.words}`));
    return made;
  }), ...DATA.tokens.flatMap((token, i) => [[side, "end"], [width - side, "start"]].map(([x, anchor]) => {
    const made = shape("text", { x, y: y(i), "text-anchor": anchor, class: i === pinned ? "pinned" : "" }, short(token));
    made.addEventListener("click", () => { pinned = pinned === i ? -1 : i; redraw(); });
    return made;
  })));
  el("across-note").textContent = "Queries on the left, keys on the right; a line where a score is recomputed" +
    (pinned < 0 ? ", press a token for its lines alone. " : `, for token ${pinned} alone. `) +
    (all ? "Thicker: in more heads. Blue: in early layers, orange: in late ones." : `A colour a head of layer ${layers[l].number}; stronger: more probable.`) +
    (shown.length < found.length ? ` The strongest ${shown.length} of ${found.length} lines.` : "");
}

// Layers by tokens: the share of the heads and queries that recompute a key, or of the heads for the pinned query.
function drawDepth() {
  const z = layers.map((layer, x) => DATA.tokens.map((_, j) => {
    if (pinned < 0) return 100 * sum(columns[x].map((c) => c.chosen[j])) / Math.max(1, sum(columns[x].map((c) => c.visible[j])));
    if (j > pinned) return null;
    return 100 * sum(Array.from({ length: layer.heads }, (_, h) => bit(layer.chosen, h * ENTRIES + at(pinned, j)))) / layer.heads;
  }));
  const box = el("depth"), width = box.closest("figure").clientWidth || 600, cell = Math.max(narrow() ? 12 : 3, (width - 110) / N);
  const step = Math.max(1, Math.ceil(12 / cell)), ticks = DATA.tokens.map((_, i) => i).filter((i) => i % step === 0);
  box.style.width = narrow() && cell * N + 110 > width ? `${Math.round(cell * N + 110)}px` : "";
  el("depth-note").textContent = pinned < 0 ? "By layer: of the queries and heads that see a token, the share that recomputes its score." :
    `By layer: the share of heads that recompute the score of query ${pinned} with each key.`;
  draw("depth", [{ type: "heatmap", z, x: DATA.tokens.map((_, i) => i), y: layers.map((x) => x.number), colorscale: "Cividis", zmin: 0,
    text: layers.map(() => DATA.tokens.map((token) => safe(show(token)))), hoverongaps: false,
    hovertemplate: "layer %{y}, key %{x} “%{text}”: %{z:.3~g} %<extra></extra>",
    colorbar: { thickness: 10, outlinewidth: 0, tickfont: { color: css("--muted"), size: 11 }, ticksuffix: " %" } }],
    { height: Math.max(240, Math.min(560, 14 * layers.length + 110)), xaxis: { words: "", showgrid: false, tickmode: "array",
      tickvals: ticks, ticktext: ticks.map((i) => safe(short(DATA.tokens[i]))), tickangle: -60 },
      yaxis: { words: "layer", autorange: "reversed", showgrid: false, ...(layers.length < 3 ? { dtick: 1 } : {}) } });
}

// ---- files -----------------------------------------------------------------------------------------------------------
const slug = (text) => String(text).replace(/[^A-Za-z0-9.]+/g, "_").slice(-60);
function save(name, rows) {
  const cell = (v) => /[",\n\r]/.test(String(v)) ? `"${String(v).replace(/"/g, '""')}"` : String(v);
  const address = URL.createObjectURL(new Blob([rows.map((row) => row.map(cell).join(",") + "\n").join("")], { type: "text/csv" }));
  const link = node("a", { href: address, download: `${slug(DATA.model)}-${name}.csv` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}
const chosenHead = () => { const l = Number(el("layer").value); return [l, Math.min(Number(el("head").value), layers[l].heads - 1)]; };
el("save-tokens").addEventListener("click", () => save("tokens", [["position", "token", "recomputed", "visible", "kl"],
  ...DATA.tokens.map((token, j) => [j, token, sum(columns.flat().map((c) => c.chosen[j])), sum(columns.flat().map((c) => c.visible[j])), DATA.kl[j] ?? ""])]));
el("save-map").addEventListener("click", () => {
  const [l, h] = chosenHead(), layer = layers[l], rows = [["layer", "head", "query", "query_token", "key", "key_token", "probability", "recomputed",
    ...(layer.exact ? ["score", "score_float32"] : [])]];
  for (let i = 0; i < N; i++) for (let j = 0; j <= i; j++) {
    const k = h * ENTRIES + at(i, j);
    if (!bit(layer.visible, k)) continue;
    const exact = layer.exact ? half(layer.exact[k]) : 0;
    rows.push([layer.number, h, i, DATA.tokens[i], j, DATA.tokens[j], ((layer.p[k] / 255) ** 2).toPrecision(3), bit(layer.chosen, k),
      ...(layer.exact ? [(exact + half(layer.error[k])).toPrecision(5), exact.toPrecision(5)] : [])]);
  }
  save(`layer${layer.number}-head${h}`, rows);
});
for (const format of ["svg", "png"]) el(`save-${format}`).addEventListener("click", () => {
  const [l, h] = chosenHead(), { width, height } = el("map").getBoundingClientRect();
  Plotly.downloadImage("map", { format, width, height, scale: format === "png" ? 2 : 1, filename: `${slug(DATA.model)}-layer${layers[l].number}-head${h}` });
});

// ---- what is chosen stands in the page's address -----------------------------------------------------------------------
function writeAddress() {
  const chosen = new URLSearchParams(["layer", "head", "shade", "lines"].map((name) => [name, el(name).value]));
  if (pinned >= 0) chosen.set("token", pinned);
  try { history.replaceState(null, "", "#" + chosen); } catch (e) { /* a page in a frame may have no address */ }
}
function readAddress() {
  const chosen = new URLSearchParams(location.hash.slice(1));
  for (const name of ["layer", "head", "shade", "lines"]) {
    if ([...el(name).options].some((option) => option.value === chosen.get(name))) el(name).value = chosen.get(name);
    if (name === "layer") fillHeads();
  }
  const token = Number(chosen.get("token") ?? -1);
  if (Number.isInteger(token) && token >= 0 && token < N) pinned = token;
}

function redraw() {
  const l = Number(el("layer").value), h = Math.min(Number(el("head").value), layers[l].heads - 1);
  drawWords(l, h);
  drawMap(l, h);
  drawRates(l, h);
  drawAcross(l);
  drawDepth();
  writeAddress();
}
for (const select of document.querySelectorAll("select")) select.addEventListener("change",
  () => { if (select.id === "layer") fillHeads(); redraw(); });
whenThemeChanges(redraw);
if (location.hash) readAddress();
redraw();
el("rates").on("plotly_click", (event) => {
  el("layer").value = String(layers.findIndex((l) => l.number === event.points[0].y));
  fillHeads(String(event.points[0].x));
  redraw();
});
