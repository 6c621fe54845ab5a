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
  const width = el("map").clientWidth || 600, cell = Math.max(3, Math.min(22, (width - 90) / N)), step = Math.max(1,
    Math.ceil(12 / cell));
  const ticks = DATA.tokens.map((_, i) => i).filter((i) => i % step === 0);
  const shapes = pinned < 0 ? [] : [["x", "y"], ["y", "x"]].map(([a, b]) => ({ type: "rect", [a + "0"]: pinned - 0.5,
    [a + "1"]: pinned + 0.5, [b + "0"]: -0.5, [b + "1"]: N - 0.5, line: { color: css("--accent"), width: 1.5 },
    fillcolor: "rgba(0,0,0,0)" }));
  const axis = { tickmode: "array", tickvals: ticks, ticktext: ticks.map((i) => safe(short(DATA.tokens[i]))),
    showgrid: false, ticks: "", tickfont: { size: Math.max(9, Math.min(12, cell)), color: css("--muted") },
    range: [-0.5, N - 0.5] };
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

function redraw() {
  const l = Number(el("layer").value), h = Math.min(Number(el("head").value), layers[l].heads - 1);
  drawWords(l, h);
  drawMap(l, h);
  drawRates(l, h);
}
for (const select of document.querySelectorAll("select")) select.addEventListener("change",
  () => { if (select.id === "layer") fillHeads(); redraw(); });
whenThemeChanges(redraw);
redraw();
el("rates").on("plotly_click", (event) => {
  el("layer").value = String(layers.findIndex((l) => l.number === event.points[0].y));
  fillHeads(String(event.points[0].x));
  redraw();
});
