// The report: draws the tables in DATA.figures, DATA.points and DATA.rates, which are those of the files in figures/, in
// the order and with the styles that come with them. Only what the controls choose is decided here.
const hidden = new Set();
const state = () => Object.fromEntries(["model", "text", "tokens", "site", "accumulate", "transform", "metric", "axis",
  "error"].map((n) => [n, el(n).value]));
const ofGroup = (rows, s) => rows.filter((r) => r.model === s.model && r.text === s.text && r.tokens === s.tokens);
const NONE = { rows: [] };
const figure = (kind, s, site = "") => ofGroup(DATA.figures, s).find((f) => f.kind === kind && f.site === site) || NONE;
// An accumulator's spelling without its transforms, and these.
const [SUMS, TRANSFORM] = [0, 1].map((i) => (r) => DATA.precisions[r.accumulate][i]);
const ofSums = (rows, s) => rows.filter((r) => s.accumulate === "" || SUMS(r) === s.accumulate);
const ofAccumulator = (rows, s) => ofSums(rows, s).filter((r) => s.transform === "" || TRANSFORM(r) === s.transform);
// Whether several accumulators or transforms are drawn together.
const several = (rows) => accumulators(rows).length > 1;
// The names of an ordered list that some row has.
const present = (names, rows, column) => names.filter((name) => rows.some((r) => r[column] === name));
const accumulators = (rows) => present(DATA.accumulators, rows, "accumulate");
const rules = (rows) => present(DATA.rules, rows, "rule");
const selecting = (rows) => rows.filter((r) => r.rate > 0 && r.rate < 1);

function style(rule) {
  const own = DATA.styles[rule];
  return { ...own, color: dark() ? own.dark : own.light };
}
// Error bars of a metric; an error as large as the value has no lower end on a log axis.
function bars(rows, metric, color) {
  const error = (r) => r[metric + "_se"] || 0;
  const down = (r) => Math.min(error(r), 0.9 * r[metric]);
  return { type: "data", symmetric: false, array: rows.map(error), arrayminus: rows.map(down), thickness: 1,
    width: 2, color };
}

// Later controls offer what the earlier ones leave.
function updateControls() {
  fill(el("model"), unique(DATA.points.map((p) => p.model)).map((v) => [v, v]));
  const ofModel = DATA.points.filter((p) => p.model === el("model").value);
  fill(el("text"), unique(ofModel.map((p) => p.text)).map((v) => [v, v]));
  const ofText = ofModel.filter((p) => p.text === el("text").value);
  fill(el("tokens"), unique(ofText.map((p) => p.tokens)).map((v) => [v, v]));
  const curves = ofGroup(DATA.figures, state()).filter((f) => f.kind === "curves");
  fill(el("site"), curves.map((f) => [f.site, f.site]));
  const { rows, usual = "" } = figure("curves", state(), el("site").value);
  // One of the names, or all of them: the reader's choice where it is there, else the usual one.
  const offer = (id, names, common) => {
    const own = el(id), kept = own.options.length && (own.value === "" || names.includes(own.value));
    fill(own, [...names.map((v) => [v, v]), ...(names.length > 1 ? [["", "all"]] : [])], kept ? own.value : common);
  };
  const own = DATA.precisions[usual] || ["", ""], curved = selecting(rows).length ? selecting(rows) : rows;
  const ordered = accumulators(curved).map((accumulate) => ({ accumulate }));
  offer("accumulate", unique(ordered.map(SUMS)), own[0]);
  offer("transform", unique(ofSums(ordered, state()).map(TRANSFORM)), own[1]);
  fill(el("metric"), [["kl", "KL"], ["flip", "flips"]]);
  fill(el("axis"), Object.entries(DATA.axes).filter(([name]) => rows.some((r) => r[name] !== null)));
  fill(el("error"), [["", "float32"], ["_narrow", "narrow format"]]);
  el("error").parentElement.hidden = el("axis").value === "rate";
}

// A piece of a rule's line for the legend, with its marker.
function lineSample(color, dash, symbol) {
  const shape = (tag, attributes) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    return made;
  };
  const picture = shape("svg", { width: 30, height: 12, viewBox: "-4 -1 30 12", "aria-hidden": "true" });
  picture.append(shape("line", { x1: -4, y1: 5, x2: 26, y2: 5, stroke: color, "stroke-width": 2,
    "stroke-dasharray": dash }));
  // The marker's shape, by its name in plotly; a name that isn't here is a circle.
  const bare = symbol.replace(/-(thin|open)/g, ""), open = symbol.endsWith("-open");
  const points = { square: "7.5,1.5 14.5,1.5 14.5,8.5 7.5,8.5", diamond: "11,0.5 15.5,5 11,9.5 6.5,5",
    "triangle-up": "11,0.5 15.5,9 6.5,9", "triangle-down": "11,9.5 15.5,1 6.5,1", "triangle-left": "6.5,5 15,0.5 15,9.5",
    "triangle-right": "15.5,5 7,0.5 7,9.5", pentagon: "11,0.5 15.5,4 13.8,9.2 8.2,9.2 6.5,4",
    hexagon: "15.2,2.6 15.2,7.4 11,9.8 6.8,7.4 6.8,2.6 11,0.2", hexagon2: "15.8,5 13.4,9.2 8.6,9.2 6.2,5 8.6,0.8 13.4,0.8",
    octagon: "15,3.3 15,6.7 12.7,9 9.3,9 7,6.7 7,3.3 9.3,1 12.7,1", "diamond-tall": "11,-0.8 14,5 11,10.8 8,5",
    star: "11,0 12.4,3.6 16,3.8 13.2,6.2 14.2,10 11,7.8 7.8,10 8.8,6.2 6,3.8 9.6,3.6" }[bare];
  const look = { fill: open ? css("--paper") : color, stroke: color, "stroke-width": 1.2 };
  // Markers that are lines alone, from the middle (11, 5) outwards or through it.
  const strokes = { x: [[7, 1, 15, 9], [7, 9, 15, 1]], cross: [[11, 0, 11, 10], [6, 5, 16, 5]],
    "y-up": [[11, 5, 11, 0], [11, 5, 7, 8.5], [11, 5, 15, 8.5]], "y-down": [[11, 5, 11, 10], [11, 5, 7, 1.5], [11, 5, 15, 1.5]],
    "y-left": [[11, 5, 6, 5], [11, 5, 14.5, 1], [11, 5, 14.5, 9]],
    "y-right": [[11, 5, 16, 5], [11, 5, 7.5, 1], [11, 5, 7.5, 9]] }[bare];
  if (strokes) {
    const ends = strokes;
    for (const [x1, y1, x2, y2] of ends) picture.append(shape("line", { x1, y1, x2, y2, stroke: color, "stroke-width": 2.4 }));
  } else picture.append(points ? shape("polygon", { points, ...look }) : shape("circle", { cx: 11, cy: 5, r: 3.8, ...look }));
  return picture;
}

function drawLegend(names) {
  el("legend").replaceChildren(...names.map((rule) => {
    const item = document.createElement("li"), button = document.createElement("button"), own = style(rule);
    button.type = "button";
    button.dataset.rule = rule;
    button.setAttribute("aria-pressed", String(!hidden.has(rule)));
    const dash = { dash: "5 3", dot: "1.5 2.5", longdash: "9 3", dashdot: "6 2 1 2", longdashdot: "9 2 1 2" }[own.dash] || "";
    button.append(lineSample(own.color, dash, own.symbol), own.label);
    button.addEventListener("click", () => { hidden.has(rule) ? hidden.delete(rule) : hidden.add(rule); redraw(); });
    item.append(button);
    return item;
  }));
}

function hover(p) {
  return `<b>${safe(p.policy)}</b><br>KL ${number(p.kl, 3)} ± ${number(p.kl_se, 1)}<br>flips ${percentText(p.flip)} ± ${percentText(p.flip_se || 0)}` +
    `<br>recomputed ${percentText(p.rate)}` + (p.cost_entry === null ? "" : `<br>cost ${number(p.cost_entry, 3)}, row blocks ${number(p.cost_row_block_16, 3)}, tiles ${number(p.cost_tile_16x16, 3)}`) +
    (p.realisable ? "" : "<br>not realisable");
}

function drawPareto(s) {
  const points = figure("curves", s, s.site).rows, cost = s.axis !== "rate", key = cost ? s.axis + s.error : "rate";
  const names = rules(selecting(points));
  drawLegend([...names, ...(points.some((p) => p.rule === "none") ? ["none"] : [])]);
  const shown = ofAccumulator(selecting(points), s).filter((p) => !hidden.has(p.rule) && p[s.metric] > 0 && p[key] > 0);
  const traces = [], annotations = [], shapes = [];
  const together = accumulators(shown);
  for (const accumulate of together) for (const rule of names) {
    const curve = shown.filter((p) => p.rule === rule && p.accumulate === accumulate);
    if (!curve.length) continue;
    const own = among(style(rule), together.indexOf(accumulate));
    traces.push({
      x: curve.map((p) => p[key]), y: curve.map((p) => p[s.metric]), text: curve.map(hover),
        hovertemplate: "%{text}<extra></extra>",
      mode: "lines+markers", name: safe(rule), line: { color: own.color, dash: own.dash, width: 2 },
        marker: { symbol: own.symbol, size: 7, color: own.color, line: { width: 1.4, color: own.color } },
      error_y: bars(curve, s.metric, own.color),
    });
    if (together.length > 1) annotations.push({ x: Math.log10(curve[0][key]), y: Math.log10(curve[0][s.metric]),
      text: safe(accumulate), showarrow: false, xanchor: "right", xshift: -8, font: { size: 10, color: own.color } });
  }
  const levels = points.filter((p) => p.rule === "none" && p[s.metric] > 0);
  const plain = hidden.has("none") ? [] : levels.filter((p) => s.transform === "" ? s.accumulate === "" || SUMS(p) === s.accumulate ||
    TRANSFORM(p) === "none" : [s.transform, "none"].includes(TRANSFORM(p)));
  const { color: ink, symbol } = style("none");
  if (plain.length && cost) {
    traces.push({ x: plain.map((p) => p[key]), y: plain.map((p) => p[s.metric]), mode: "lines+markers+text",
      name: "uniform", text: plain.map((p) => safe(p.accumulate)),
      textposition: "top right", textfont: { color: ink, size: 11 }, line: { color: ink, width: 1 },
        marker: { symbol, size: 8, color: ink },
      customdata: plain.map(hover), hovertemplate: "%{customdata}<extra>uniform</extra>" });
    shapes.push({ type: "line", x0: 1, x1: 1, y0: 0, y1: 1, yref: "paper", line: { color: css("--muted"), width: 1,
      dash: "dot" } });
    annotations.push({ x: 0, y: 1, yref: "paper", yanchor: "top", xanchor: "left", xshift: 3, text: "float32",
      showarrow: false, font: { size: 11, color: css("--muted") } });
  } else for (const p of plain) {
    shapes.push({ type: "line", xref: "paper", x0: 0, x1: 1, y0: p[s.metric], y1: p[s.metric], line: { color: ink,
      width: 1, dash: "dot" }, opacity: 0.7 });
    annotations.push({ xref: "paper", x: 1, xanchor: "left", xshift: 2, y: Math.log10(p[s.metric]), yanchor: "middle",
      text: safe(p.accumulate), showarrow: false, font: { size: 11, color: ink } });
  }
  const ys = [...traces.flatMap((t) => t.y), ...plain.map((p) => p[s.metric])], xs = [...traces.flatMap((t) => t.x),
    ...(cost ? [1] : [])];
  // Room for the names at the left ends of curves, and for those of points at the right.
  const span = xs.length ? Math.log10(Math.max(...xs) / Math.min(...xs)) : 0, longest = Math.max(0, ...together.map((v) => v.length));
  const room = together.length > 1 ? Math.min(0.5, 0.012 * longest) * span : 0;
  const words = cost ? "operations / operations in float32" : DATA.axes.rate;
  draw("pareto", traces, {
    height: narrow() ? 420 : 520, annotations, shapes, margin: { r: cost ? 12 : 8 + 7 * Math.max(2, ...plain.map((p) => p.accumulate.length)) },
    xaxis: { ...logTicks(xs, !cost, room, cost ? 0.04 * span : 0), words },
    yaxis: { ...logTicks(ys, s.metric === "flip"), words: DATA.metrics[s.metric] },
  });
  el("pareto-title").textContent = `${s.metric === "kl" ? "KL" : "Flips"} against ${cost ? "cost" : "recompute rate"}`;
  const estimated = cost && s.axis !== "cost_entry" && shown.some((p) => p.cost_estimated);
  const has = (start) => names.some((rule) => rule.startsWith(start));
  el("pareto-note").textContent = "Lower left is better. " +
    (has("random") ? "Grey dashes: as many entries, chosen at random. " : "") +
    (has("oracle") ? "Dots: an oracle, which no hardware can have. " : "") +
    (together.length > 1 ? `Lines by accumulator and transform, named at their left ends (${together.slice(0, 4).map((name, i) =>
      `${name} ${["solid", "long dashes", "dash and dot", "long dash and dot"][i]}`).join(", ")}${together.length > 4 ? ", then open markers" : ""}). ` : "") +
    (cost ? "Diamonds: uniform precision, nothing recomputed. Cost is relative to float32 and includes the look-ahead." : "Dotted levels: uniform precision, nothing recomputed, its accumulator on the right.") +
    (estimated ? " Blocks were not counted in this sweep: their share is estimated as if entries were independent, which is too high for rules that cluster." : "");
}

// A rule's style in the curves of the accumulator with this number, where several are drawn: no two curves are alike.
// Controls and oracles keep their lines, which the caption names, and take other markers.
const LINES = ["solid", "longdash", "dashdot", "longdashdot"];
const MARKERS = ["", "triangle-up", "square", "diamond", "star", "pentagon", "hexagon", "triangle-down"];
function among(own, index) {
  if (own.dash !== "solid") return index ? { ...own, symbol: MARKERS[index % 8] + (index >= 8 ? "-open" : "") } : own;
  const open = Math.floor(index / LINES.length) % 2 && !own.symbol.endsWith("-open");
  return { ...own, dash: LINES[index % LINES.length], symbol: own.symbol + (open ? "-open" : "") };
}

const fixed = (v) => v < 10 ? v.toFixed(2) : String(Number(v.toPrecision(3)));
function drawEqual(s) {
  const rows = ofAccumulator(ofGroup(DATA.rates, s), s).filter((r) => r.site === s.site && r.layers === "all");
  el("equal-section").hidden = !rows.length;
  el("equal-measure").textContent = s.metric === "kl" ? "KL" : "Flip rate";
  // The rates at which there is something to compare: two rules of an accumulator; without any, all there are.
  const all = unique(rows.map((r) => r.rate)).sort((a, b) => a - b), ratio = s.metric + "_ratio";
  const compared = all.filter((rate) => rows.some((p) => p.rate === rate &&
    rows.some((q) => q.rate === rate && q.accumulate === p.accumulate && q.rule !== p.rule)));
  const rates = compared.length ? compared : all;
  const cell = (r) => {
    if (!r) return node("td", {}, "–");
    const se = r[ratio + "_se"], small = (words) => node("span", { class: "se" }, words);
    const text = r[ratio] === null ? [small(number(r[s.metric], 3))] :
      [fixed(r[ratio]), ...(se ? [" ", small(`± ${fixed(se)}`)] : [])];
    const title = `${s.metric} ${number(r[s.metric], 3)} ± ${number(r[s.metric + "_se"], 1)}`;
    return node("td", { class: r[s.metric + "_best"] ? "best" : "", title }, text);
  };
  const body = accumulators(rows).flatMap((accumulate) => rules(rows).flatMap((rule) => {
    const curve = rows.filter((r) => r.accumulate === accumulate && r.rule === rule);
    if (!curve.some((r) => rates.includes(r.rate))) return [];
    const own = style(rule), name = (several(rows) ? accumulate + " " : "") + own.label;
    const swatch = node("span", { class: "swatch", style: `background:${own.color}` });
    return [[node("td", {}, swatch, name), ...rates.map((rate) => cell(curve.find((r) => r.rate === rate)))]];
  }));
  fillTable(el("equal"), ["Rule", ...rates.map(percentText)], body);
}

function drawMu(s) {
  const rows = figure("mu", s, s.site).rows.filter((r) => s.transform === "" || TRANSFORM(r) === s.transform);
  const rates = unique(selecting(rows).map((r) => r.rate)).sort((a, b) => a - b);
  fill(el("mu-rate"), rates.map((r) => [String(r), percentText(r)]), el("mu-rate").value || "0.01");
  const shown = rows.filter((r) => !hidden.has(r.rule) && r[s.metric] > 0 &&
    (r.rate === 0 || r.rate === 1 || String(r.rate) === el("mu-rate").value));
  const transforms = unique(shown.map(TRANSFORM));
  const traces = rules(shown).flatMap((rule) => transforms.map((transform, index) => {
    const curve = shown.filter((r) => r.rule === rule && TRANSFORM(r) === transform), own = among(style(rule), index);
    return { x: curve.map((r) => r.mu), y: curve.map((r) => r[s.metric]), name: safe(own.label), mode: "lines+markers",
      line: { color: own.color, dash: own.dash, width: 2 }, marker: { symbol: own.symbol, size: 7, color: own.color },
      error_y: bars(curve, s.metric, own.color), text: curve.map((r) => safe(r.accumulate)),
      hovertemplate: `${safe(own.label)}<br>%{text}: %{y:.3~g}<extra></extra>` };
  })).filter((trace) => trace.x.length);
  el("mu-section").hidden = unique(traces.flatMap((t) => t.x)).length < 2;
  el("mu-title").textContent = `${s.metric === "kl" ? "KL" : "Flips"} against mantissa bits`;
  if (!el("mu-section").hidden) draw("mu", traces, { height: 360, xaxis: { words: "mantissa bits", ...wholeNumbers(traces.flatMap((t) => t.x)) },
    yaxis: { ...logTicks(traces.flatMap((t) => t.y), s.metric === "flip"), words: DATA.metrics[s.metric] } });
}

// The accumulator of figures that show one: the chosen one, or of all the usual one.
function oneAccumulator(s) {
  const rows = figure("curves", s, s.site).rows, usual = DATA.precisions[figure("curves", s, s.site).usual] || ["", ""];
  const accumulate = s.accumulate || usual[0];
  const transforms = unique(ofSums(rows, { accumulate }).map(TRANSFORM));
  return { ...s, accumulate, transform: s.transform || (transforms.includes(usual[1]) ? usual[1] : transforms[0] || "") };
}

function drawPosition(s) {
  const rows = ofAccumulator(figure("positions", s, s.site).rows, oneAccumulator(s)).filter((r) => !hidden.has(r.rule));
  el("position-section").hidden = !rows.length;
  const equal = unique(rows.map((r) => r.at));
  el("position-note").textContent = "Share of the entries recomputed for the queries at a position. " + (equal.length === 1 ?
    `Every rule recomputes ${percentText(equal[0])} of all entries, interpolated between its points around this rate; rules without such points are left out.` :
    "No two rules have points around one rate: each has its own, which its name says.");
  const traces = unique(rows.map((r) => r.policy)).map((policy) => {
    const curve = rows.filter((r) => r.policy === policy), own = style(curve[0].rule);
    return { x: curve.map((r) => r.position), y: curve.map((r) => r.rate > 0 ? r.rate : null), name: safe(`${policy} (${percentText(curve[0].at)})`),
      mode: "lines+markers", line: { color: own.color, dash: own.dash, width: 2 },
      marker: { symbol: own.symbol, size: 6, color: own.color, line: { width: 1.4, color: own.color } },
      hovertemplate: `${safe(policy)}, ${percentText(curve[0].at)} of all<br>position %{x}: %{y:.2%}<extra></extra>` };
  });
  if (rows.length) draw("position", traces, { height: 360 + (narrow() ? 18 : 9) * traces.length, showlegend: true, legend: { orientation: "h",
    y: -0.2, font: { size: 11 } }, xaxis: { words: "position of the token",
    rangemode: "tozero" }, yaxis: { ...logTicks(traces.flatMap((t) => t.y), true), words: DATA.axes.rate } });
}

function drawHeads(s) {
  const rows = ofAccumulator(figure("heads", s, s.site).rows, s);
  el("heads-section").hidden = !rows.length;
  if (!rows.length) return;
  const typical = ofAccumulator(rows, oneAccumulator(s)).filter((r) => r.typical);
  const usual = typical.find((r) => r.rule === DATA.base) || typical[0] || rows[0];
  fill(el("heads-policy"), rows.map((r) => [r.policy, `${r.policy} (${percentText(r.rate)})`]),
    rows.some((r) => r.policy === el("heads-policy").value) ? el("heads-policy").value : usual.policy);
  const { layers, heads, rates } = rows.find((r) => r.policy === el("heads-policy").value).by_head;
  const percent = Array.from(unpack(rates, Uint16Array), (v) => 100 * v / 65535);
  const z = Array.from({ length: layers }, (_, layer) => percent.slice(layer * heads, (layer + 1) * heads));
  draw("heads", [{ type: "heatmap", z, colorscale: "Cividis", zmin: 0, xgap: 1, ygap: 1,
    hovertemplate: "layer %{y}, head %{x}: %{z:.3~g} %<extra></extra>", colorbar: { title: { text: "%",
      font: { color: css("--muted") } }, tickfont: { color: css("--muted") }, outlinewidth: 0, thickness: 12 } }],
    { height: Math.max(240, Math.min(560, 14 * layers + 90)), xaxis: { words: "head", dtick: heads > 16 ? 4 : 1,
      showgrid: false }, yaxis: { words: "layer", autorange: "reversed", showgrid: false } });
}

// Ticks at whole numbers, at most ten, and room for two of them where there is one value.
function wholeNumbers(values) {
  const low = Math.min(...values), high = Math.max(...values);
  const pad = high > low ? 0.04 * (high - low) + 0.2 : 1.2;
  return { dtick: Math.max(1, Math.ceil((high - low) / 10)), range: [low - pad, high + pad] };
}

function drawTransforms(s) {
  const rows = figure("transforms", s, s.site).rows.filter((r) => (s.accumulate === "" || r.untransformed === s.accumulate) &&
    !hidden.has(r.rule) && r[s.metric] > 0);
  const names = unique(rows.map((r) => r.accumulate));
  el("transforms-section").hidden = names.length < 2;
  if (names.length < 2) return;
  const traces = rules(rows).map((rule) => {
    const part = rows.filter((r) => r.rule === rule), own = style(rule);
    return { x: part.map((r) => safe(r.accumulate)), y: part.map((r) => r[s.metric]), name: safe(own.label), mode: "markers",
      marker: { symbol: own.symbol, size: 9, color: own.color, line: { width: 1.4, color: own.color } },
      error_y: bars(part, s.metric, own.color),
      text: part.map((r) => `${safe(r.policy)}<br>recomputed ${percentText(r.rate)}<br>KL ${number(r.kl, 3)}` +
        (r.times ? `, ${number(r.times, 3)} times less than plain ${safe(r.untransformed)}` : "")),
      hovertemplate: "%{text}<extra></extra>" };
  });
  draw("transforms", traces, { height: 420, xaxis: { words: "", type: "category", categoryorder: "array",
    categoryarray: names.map(safe), tickangle: narrow() ? -60 : -25 }, yaxis: { ...logTicks(traces.flatMap((t) => t.y), s.metric === "flip"),
    words: DATA.metrics[s.metric] } });
}

function drawLayers(s) {
  const { rows: all, lines } = figure("layers", s), rows = all.filter((r) => r[s.metric] > 0);
  el("layers-section").hidden = !rows.length;
  if (!rows.length) return;
  const traces = unique(rows.map((r) => r.label)).map((label) => {
    const curve = rows.filter((r) => r.label === label), { color } = style(curve[0].rule);
    const { dash, symbol } = lines[curve[0].line];
    return { x: curve.map((r) => r.layer), y: curve.map((r) => r[s.metric]), name: safe(label), mode: "lines+markers",
      line: { color, width: 1.5, dash }, marker: { size: 6, symbol, color },
      error_y: bars(curve, s.metric, color), hovertemplate: `${safe(label)}<br>layer %{x}: %{y:.3~g}<extra></extra>` };
  });
  draw("layers", traces, { height: 340 + 18 * traces.length, showlegend: true, legend: { orientation: "h", y: -0.22,
    font: { size: 11 } }, xaxis: { words: "the only narrow layer", ...wholeNumbers(rows.map((r) => r.layer)) }, yaxis: { ...logTicks(traces.flatMap((t) => t.y),
    s.metric === "flip"), words: DATA.metrics[s.metric] } });
}

function drawSites(s) {
  const { rows: all, styles } = figure("sites", s), rows = all.filter((r) => r[s.metric] > 0);
  const sites = unique(rows.map((r) => r.site));
  el("sites-section").hidden = sites.length < 2;
  if (sites.length < 2) return;
  const traces = accumulators(rows).map((name) => {
    const part = rows.filter((r) => r.accumulate === name), color = styles[name][dark() ? "dark" : "light"];
    return { y: part.map((r) => safe(r.site)), x: part.map((r) => r[s.metric]), name: safe(name), mode: "markers",
      marker: { size: 9, symbol: styles[name].symbol, color }, error_x: bars(part, s.metric, color),
      hovertemplate: `%{y}=${safe(name)}: %{x:.3~g}<extra></extra>` };
  });
  draw("sites", traces, { height: 150 + 34 * sites.length, showlegend: true, legend: { orientation: "h", y: -0.3,
    font: { size: 11 } }, yaxis: { words: "", categoryorder: "array", categoryarray: sites.map(safe).reverse() },
    xaxis: { ...logTicks(traces.flatMap((t) => t.x), s.metric === "flip"), words: DATA.metrics[s.metric] } });
}

function drawPoints(s) {
  const everything = el("points-of").value === "all";
  const points = everything ? DATA.points : ofGroup(DATA.points, s).filter((p) => p.site === s.site &&
    (p.rule === "none" || ofAccumulator([p], s).length));
  const layered = points.some((p) => p.layers !== "all");
  const small = (words) => node("span", { class: "se" }, `± ${words}`);
  const pm = (p, name, digits) => [number(p[name], digits), " ", small(number(p[name + "_se"], 1))];
  const share = (v) => (100 * v).toFixed(2);
  const same = (p) => [share(p.same_top), " ", small(share(p.same_top_se)), " %"];
  // Heading, cell, and what the rows are sorted by.
  const columns = [
    ["Policy", (p) => node("span", { class: "policy", title: p.policy }, p.policy), (p) => p.policy],
    ...(everything ? ["model", "text", "tokens", "site"].filter((name) => unique(points.map((p) => p[name])).length > 1) : []).map(
      (name) => [name, (p) => node("span", { class: "policy short", title: p[name] }, p[name]), (p) => p[name]]),
    ...(layered ? [["layers", (p) => p.layers, (p) => p.layers]] : []), ["PPL", (p) => number(p.PPL, 5), (p) => p.PPL],
    ["ΔPPL", (p) => pm(p, "delta_PPL", 2), (p) => p.delta_PPL], ["KLD", (p) => pm(p, "KLD", 3), (p) => p.KLD],
    ["99 % KLD", (p) => number(p.KLD_99, 3), (p) => p.KLD_99],
    ["RMS Δp", (p) => percentText(p.rms_delta_p), (p) => p.rms_delta_p], ["same top", same, (p) => p.same_top],
    ["recomputed", (p) => percentText(p.recompute_rate), (p) => p.recompute_rate],
  ];
  const row = (p) => columns.map(([, cell]) => node("td", {}, cell(p)));
  const key = (columns.find(([name]) => name === sorted.by) || [])[2];
  const ordered = key ? [...points].sort((p, q) => sorted.sign * compared(key(p), key(q))) : points;
  const heading = ([name]) => {
    const button = node("button", { type: "button", title: "Sort by this column" }, name);
    button.addEventListener("click", () => {
      Object.assign(sorted, { by: name, sign: sorted.by === name ? -sorted.sign : 1 });
      redraw();
    });
    return button;
  };
  fillTable(el("points"), columns.map(heading), ordered.map(row));
  const at = columns.findIndex(([name]) => name === sorted.by);
  if (at >= 0) el("points").querySelectorAll("th")[at].setAttribute("aria-sort", sorted.sign > 0 ? "ascending" : "descending");
  el("points-count").textContent = `${points.length} of ${DATA.points.length} points` + (everything ? "" : ", those that the controls choose");
}
// How the table of points is sorted: the heading of a column, "" as the points come, and 1 or -1 for the direction.
const sorted = { by: "", sign: 1 };
// Order of two cells: numbers and words, what is missing last.
function compared(a, b) {
  if (a === null || b === null) return (a === null) - (b === null);
  return typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b;
}

// Links to each figure's files; where the axis or measure that is shown has none, to those nearest to it.
function linkFiles(s) {
  const links = { pareto: ["curves", `${s.metric}-${s.axis === "rate" ? "rate" : "cost"}`], transforms: ["transforms"], mu: ["mu"],
    position: ["positions"], heads: ["heads"], layers: ["layers"], sites: ["sites"] };
  for (const [plot, [kind, file = kind]] of Object.entries(links)) {
    const own = figure(kind, s, ["layers", "sites"].includes(kind) ? "" : s.site), name = (own.files || {})[file];
    el(`${plot}-files`).replaceChildren(...(name ? ["As a file: ", ...["SVG", "PNG", "CSV"].flatMap((end, i) =>
      [i ? ", " : "", node("a", { href: `figures/${encodeURIComponent(name)}.${end.toLowerCase()}` }, end)])] : []));
  }
}

// ---- what is chosen stands in the page's address, so that a link shows the same ---------------------------------------
function writeAddress() {
  const chosen = new URLSearchParams(state());
  chosen.set("heads-policy", el("heads-policy").value);
  chosen.set("mu-rate", el("mu-rate").value);
  chosen.set("points-of", el("points-of").value);
  if (hidden.size) chosen.set("hidden", [...hidden].join("|"));
  if (sorted.by) chosen.set("sort", (sorted.sign < 0 ? "-" : "") + sorted.by);
  try { history.replaceState(null, "", "#" + chosen); } catch (e) { /* a page in a frame may have no address */ }
}
function readAddress() {
  const chosen = new URLSearchParams(location.hash.slice(1));
  for (const rule of (chosen.get("hidden") || "").split("|").filter(Boolean)) hidden.add(rule);
  const sort = chosen.get("sort") || "";
  Object.assign(sorted, { by: sort.replace(/^-/, ""), sign: sort.startsWith("-") ? -1 : 1 });
  // Later controls offer what the earlier ones leave: each is chosen when those before it are.
  for (const [name, value] of chosen) {
    const control = document.querySelector(`select[id="${CSS.escape(name)}"]`);
    if (!control || ![...control.options].some((option) => option.value === value)) continue;
    control.value = value;
    redraw(false);
  }
}

function redraw(remember = true) {
  updateControls();
  const s = state();
  for (const step of [drawPareto, drawTransforms, drawEqual, drawMu, drawPosition, drawHeads, drawLayers, drawSites,
    drawPoints, linkFiles]) step(s);
  if (remember) writeAddress();
}
for (const select of document.querySelectorAll("select")) select.addEventListener("change", () => redraw());
fill(el("points-of"), [["chosen", "that the controls choose"], ["all", "all"]]);
whenThemeChanges(redraw);
redraw(false);
readAddress();
redraw();
