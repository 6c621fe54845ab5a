// The report: everything is drawn from DATA.points and DATA.rates by what the controls say.
for (const p of DATA.points) {
  const rates = p.by_head ? Array.from(unpack(p.by_head.rates, Uint16Array), (v) => v / 65535) : [];
  p.by_head = p.by_head ? Array.from({ length: p.by_head.layers }, (_, l) => rates.slice(l * p.by_head.heads,
    (l + 1) * p.by_head.heads)) : [];
}
const AXES = [["rate", "recompute rate"], ["cost_entry", "cost, entry by entry"], ["cost_row_block_16",
  "cost, row blocks of 16 keys"],
  ["cost_tile_16x16", "cost, tiles of 16 x 16"]];
const METRICS = { kl: "KL per token, nats", flip: "flip rate" };
const hidden = new Set();
const state = () => Object.fromEntries(["model", "text", "tokens", "site", "accumulate", "metric", "axis",
  "error"].map((n) => [n, el(n).value]));

function style(rule) {
  const s = DATA.styles[rule];
  return { color: dark() ? s.dark : s.light, symbol: s.symbol, dash: s.dash };
}
// Error bars of a metric; an error as large as the value has no lower end on a log axis.
function bars(points, metric, color) {
  const error = (p) => p[metric + "_se"] || 0;
  const down = (p) => Math.min(error(p), 0.9 * p[metric]);
  return { type: "data", symmetric: false, array: points.map(error), arrayminus: points.map(down), thickness: 1,
    width: 2, color };
}
const ofGroup = (s) => DATA.points.filter((p) => p.model === s.model && p.text === s.text && p.tokens === s.tokens);
const ofSite = (s) => ofGroup(s).filter((p) => p.site === s.site && p.layers === "all");
const ratesOf = (s) => DATA.rates.filter((r) => r.model === s.model && r.text === s.text && r.tokens === s.tokens &&
  r.site === s.site && r.layers === "all");
const byMu = (a, b) => (a.mu ?? 99) - (b.mu ?? 99) || a.accumulate.localeCompare(b.accumulate);
const accumulators = (points) => unique([...points].sort(byMu).map((p) => p.accumulate));
const rules = (points) => DATA.rules.filter((r) => points.some((p) => p.rule === r));
const selecting = (points) => points.filter((p) => p.rate > 0 && p.rate < 1);
const label = (rule) => rule === "none" ? "none (uniform precision)" : rule.startsWith("oracle") ? rule + " (not realisable)" : rule;

// Later controls offer what the earlier ones leave.
function updateControls() {
  fill(el("model"), unique(DATA.points.map((p) => p.model)).map((v) => [v, v]));
  let points = DATA.points.filter((p) => p.model === el("model").value);
  fill(el("text"), unique(points.map((p) => p.text)).map((v) => [v, v]));
  points = points.filter((p) => p.text === el("text").value);
  fill(el("tokens"), unique(points.map((p) => p.tokens)).map((v) => [v, v]));
  points = points.filter((p) => p.tokens === el("tokens").value && p.layers === "all");
  fill(el("site"), unique(points.map((p) => p.site)).map((v) => [v, v]));
  points = points.filter((p) => p.site === el("site").value);
  const names = accumulators(selecting(points)).length ? accumulators(selecting(points)) : accumulators(points);
  const most = (n) => selecting(points).filter((p) => p.accumulate === n).length;
  const known = names.includes(el("accumulate").value) || el("accumulate").value === "";
  const usual = [...names].sort((a, b) => most(b) - most(a) || (b === "ps4") - (a === "ps4"))[0] || "";
  const first = !el("accumulate").options.length;
  fill(el("accumulate"), [...names.map((v) => [v, v]), ...(names.length > 1 ? [["", "all"]] : [])], known &&
    !first ? el("accumulate").value : usual);
  fill(el("metric"), [["kl", "KL"], ["flip", "flips"]]);
  fill(el("axis"), AXES.filter(([name]) => points.some((p) => p[name] !== null)));
  fill(el("error"), [["", "float32"], ["_narrow", "narrow format"]]);
  el("error").parentElement.hidden = el("axis").value === "rate";
}

function drawLegend(names) {
  el("legend").replaceChildren(...names.map((rule) => {
    const item = document.createElement("li"), button = document.createElement("button"), look = style(rule);
    button.type = "button";
    button.dataset.rule = rule;
    button.setAttribute("aria-pressed", String(!hidden.has(rule)));
    const dash = { dash: "4 3", dot: "1 3" }[look.dash] || "";
    button.innerHTML = `<svg width="22" height="10" aria-hidden="true"><line x1="0" y1="5" x2="22" y2="5" stroke="${look.color}" stroke-width="2.5" stroke-dasharray="${dash}"/></svg>`;
    button.append(label(rule));
    button.addEventListener("click", () => { hidden.has(rule) ? hidden.delete(rule) : hidden.add(rule); redraw(); });
    item.append(button);
    return item;
  }));
}

function hover(p) {
  return `<b>${p.policy}</b><br>KL ${number(p.kl, 3)} ± ${number(p.kl_se, 1)}<br>flips ${percentText(p.flip)} ± ${percentText(p.flip_se || 0)}` +
    `<br>recomputed ${percentText(p.rate)}` + (p.cost_entry === null ? "" : `<br>cost ${number(p.cost_entry, 3)}, row blocks ${number(p.cost_row_block_16, 3)}, tiles ${number(p.cost_tile_16x16, 3)}`) +
    (p.realisable ? "" : "<br>not realisable");
}

function drawPareto(s) {
  const points = ofSite(s), cost = s.axis !== "rate", key = cost ? s.axis + s.error : "rate";
  const names = rules(selecting(points));
  drawLegend([...names, ...(points.some((p) => p.rule === "none") ? ["none"] : [])]);
  const shown = selecting(points).filter((p) => !hidden.has(p.rule) && (s.accumulate === "" ||
    p.accumulate === s.accumulate) && p[s.metric] > 0 && p[key] > 0);
  const traces = [], annotations = [], shapes = [];
  for (const accumulate of accumulators(shown)) for (const rule of names) {
    const curve = shown.filter((p) => p.rule === rule && p.accumulate === accumulate).sort((a, b) => a.rate - b.rate);
    if (!curve.length) continue;
    const look = style(rule);
    traces.push({
      x: curve.map((p) => p[key]), y: curve.map((p) => p[s.metric]), text: curve.map(hover),
        hovertemplate: "%{text}<extra></extra>",
      mode: "lines+markers", name: rule, line: { color: look.color, dash: look.dash, width: 2 },
        marker: { symbol: look.symbol, size: 7, color: look.color, line: { width: 1.4, color: look.color } },
      error_y: bars(curve, s.metric, look.color),
    });
    if (s.accumulate === "") annotations.push({ x: Math.log10(curve[0][key]), y: Math.log10(curve[0][s.metric]),
      text: accumulate, showarrow: false, xanchor: "right", xshift: -8, font: { size: 10, color: look.color } });
  }
  let plain = points.filter((p) => p.rule === "none" && p[s.metric] > 0).sort(byMu);
  if (hidden.has("none")) plain = [];
  const ink = style("none").color;
  if (plain.length && cost) {
    traces.push({ x: plain.map((p) => p[key]), y: plain.map((p) => p[s.metric]), mode: "lines+markers+text",
      name: "uniform", text: plain.map((p) => p.accumulate),
      textposition: "top right", textfont: { color: ink, size: 11 }, line: { color: ink, width: 1 },
        marker: { symbol: "diamond-tall", size: 8, color: ink },
      customdata: plain.map(hover), hovertemplate: "%{customdata}<extra>uniform</extra>" });
    shapes.push({ type: "line", x0: 1, x1: 1, y0: 0, y1: 1, yref: "paper", line: { color: css("--muted"), width: 1,
      dash: "dot" } });
    annotations.push({ x: 0, y: 1, yref: "paper", yanchor: "top", xanchor: "left", xshift: 3, text: "float32",
      showarrow: false, font: { size: 11, color: css("--muted") } });
  } else for (const p of plain) {
    shapes.push({ type: "line", xref: "paper", x0: 0, x1: 1, y0: p[s.metric], y1: p[s.metric], line: { color: ink,
      width: 1, dash: "dot" }, opacity: 0.7 });
    annotations.push({ xref: "paper", x: 1, xanchor: "left", xshift: 2, y: Math.log10(p[s.metric]), yanchor: "middle",
      text: p.accumulate, showarrow: false, font: { size: 11, color: ink } });
  }
  const ys = [...traces.flatMap((t) => t.y), ...plain.map((p) => p[s.metric])], xs = [...traces.flatMap((t) => t.x),
    ...(cost ? [1] : [])];
  const range = (v, pad) => [Math.log10(Math.min(...v)) - pad, Math.log10(Math.max(...v)) + pad];
  const words = cost ? "operations / operations in float32" : "recompute rate";
  draw("pareto", traces, {
    height: narrow() ? 420 : 520, annotations, shapes, margin: { l: 8, r: cost ? 12 : 8 + 7 * Math.max(2,
      ...plain.map((p) => p.accumulate.length)), t: 12, b: 8 },
    xaxis: { ...logTicks(xs, !cost), words, ...(xs.length ? { range: range(xs, narrow() ? 0.12 : 0.06) } : {}) },
    yaxis: { ...logTicks(ys, s.metric === "flip"), words: METRICS[s.metric], ...(ys.length ? { range: range(ys,
      0.12) } : {}) },
  });
  el("pareto-title").textContent = `${s.metric === "kl" ? "KL" : "Flips"} against ${cost ? "cost" : "recompute rate"}`;
  const estimated = cost && s.axis !== "cost_entry" && shown.some((p) => p.cost_estimated);
  el("pareto-note").textContent = "Lower left is better. Grey dashes: the same number of entries chosen at random. " +
    (cost ? "Diamonds: uniform precision, nothing recomputed. Cost is relative to float32 and includes the look-ahead." : "Dotted levels: uniform precision, nothing recomputed, its accumulator on the right.") +
    (estimated ? " Blocks were not counted in this sweep: their share is estimated as if entries were independent, which is too high for rules that cluster." : "");
}

const fixed = (v) => v < 10 ? v.toFixed(2) : String(Number(v.toPrecision(3)));
function drawEqual(s) {
  const rows = ratesOf(s).filter((r) => s.accumulate === "" || r.accumulate === s.accumulate);
  el("equal-section").hidden = !rows.length;
  el("equal-measure").textContent = s.metric === "kl" ? "KL" : "Flip rate";
  const rates = unique(rows.map((r) => r.rate)).sort((a, b) => a - b), ratio = s.metric + "_ratio";
  const curves = unique(rows.map((r) => r.accumulate + "|" + r.rule));
  curves.sort((a, b) => { const [x, y] = [a, b].map((c) => c.split("|")); return x[0].localeCompare(y[0], "en",
    { numeric: true }) || DATA.rules.indexOf(x[1]) - DATA.rules.indexOf(y[1]); });
  const best = {};
  for (const r of rows) if (r.realisable &&
    isFinite(r[ratio] ?? NaN)) { const k = r.accumulate + "|" + r.rate; best[k] = Math.min(best[k] ?? Infinity,
    r[ratio]); }
  const head = `<thead><tr><th>Rule</th>${rates.map((r) => `<th>${percentText(r)}</th>`).join("")}</tr></thead>`;
  const body = curves.map((c) => {
    const [accumulate, rule] = c.split("|");
    const cells = rates.map((rate) => {
      const r = rows.find((x) => x.accumulate === accumulate && x.rule === rule && x.rate === rate);
      if (!r) return "<td>–</td>";
      const se = r[ratio + "_se"], isBest = r.realisable && r[ratio] === best[accumulate + "|" + rate];
      const text = r[ratio] === null ? `<span class="se">${number(r[s.metric], 3)}</span>` : `${fixed(r[ratio])}${se ? ` <span class="se">± ${fixed(se)}</span>` : ""}`;
      return `<td class="${isBest ? "best" : ""}" title="${s.metric} ${number(r[s.metric], 3)} ± ${number(r[s.metric + "_se"], 1)}">${text}</td>`;
    }).join("");
    return `<tr><td><span class="swatch" style="background:${style(rule).color}"></span>${s.accumulate === "" ? accumulate + " " : ""}${label(rule)}</td>${cells}</tr>`;
  }).join("");
  el("equal").innerHTML = head + `<tbody>${body}</tbody>`;
}

function drawMu(s) {
  const points = ofSite(s).filter((p) => p.mu !== null), rates = ratesOf(s).filter((r) => r.mu !== null);
  fill(el("mu-rate"), unique(rates.map((r) => r.rate)).sort((a, b) => a - b).map((r) => [String(r), percentText(r)]),
    el("mu-rate").value || "0.01");
  const traces = [];
  const add = (curve, rule, name) => {
    curve = curve.filter((p) => p[s.metric] > 0).sort(byMu);
    if (!curve.length || hidden.has(rule)) return;
    const look = style(rule);
    traces.push({ x: curve.map((p) => p.mu), y: curve.map((p) => p[s.metric]), name, mode: "lines+markers",
      line: { color: look.color, dash: look.dash, width: 2 }, marker: { symbol: look.symbol, size: 7,
      color: look.color },
      error_y: bars(curve, s.metric, look.color),
      text: curve.map((p) => p.accumulate), hovertemplate: `${name}<br>%{text}: %{y:.3~g}<extra></extra>` });
  };
  add(points.filter((p) => p.rule === "none"), "none", "uniform, nothing recomputed");
  add(points.filter((p) => p.rule === "all"), "all", "all recomputed");
  for (const rule of rules(rates)) add(rates.filter((r) => r.rule === rule && String(r.rate) === el("mu-rate").value),
    rule, label(rule));
  el("mu-section").hidden = unique(traces.flatMap((t) => t.x)).length < 2;
  el("mu-title").textContent = `${s.metric === "kl" ? "KL" : "Flips"} against mantissa bits`;
  const ys = traces.flatMap((t) => t.y);
  if (!el("mu-section").hidden) draw("mu", traces, { height: 360, xaxis: { words: "mantissa bits", dtick: 1 },
    yaxis: { ...logTicks(ys, s.metric === "flip"), words: METRICS[s.metric] } });
}

// Each rule's point nearest to 1 %, at the chosen accumulator.
function typical(s) {
  const points = selecting(ofSite(s)).filter((p) => p.accumulate === (s.accumulate ||
    accumulators(selecting(ofSite(s)))[0]));
  return rules(points).map((rule) => points.filter((p) => p.rule === rule).sort((a,
    b) => Math.abs(Math.log(a.rate / 0.01)) - Math.abs(Math.log(b.rate / 0.01)))[0]);
}

function drawPosition(s) {
  const curves = typical(s).filter((p) => p.by_position.length > 1 && !hidden.has(p.rule));
  el("position-section").hidden = !curves.length;
  const traces = curves.map((p) => { const look = style(p.rule); return { x: p.by_position.map((_, i) => 16 * i + 8),
    y: p.by_position.map((v) => v > 0 ? v : null), name: p.policy, mode: "lines",
    line: { color: look.color, dash: look.dash, width: 2 },
      hovertemplate: `${p.policy}<br>position %{x}: %{y:.2%}<extra></extra>` }; });
  if (curves.length) draw("position", traces, { height: 360, xaxis: { words: "position of the token",
    rangemode: "tozero" }, yaxis: { ...logTicks(traces.flatMap((t) => t.y), true), words: "recompute rate" } });
}

function drawHeads(s) {
  const points = selecting(ofSite(s)).filter((p) => p.by_head.length && (s.accumulate === "" ||
    p.accumulate === s.accumulate));
  el("heads-section").hidden = !points.length;
  if (!points.length) return;
  const usual = typical(s).find((p) => p.by_head.length && p.rule === "strict") || typical(s)[0] || points[0];
  fill(el("heads-policy"), points.map((p) => [p.policy, `${p.policy} (${percentText(p.rate)})`]),
    points.some((p) => p.policy === el("heads-policy").value) ? el("heads-policy").value : usual.policy);
  const p = points.find((q) => q.policy === el("heads-policy").value),
    heads = Math.max(...p.by_head.map((h) => h.length));
  draw("heads", [{ type: "heatmap",
    z: p.by_head.map((h) => h.length ? h.map((v) => 100 * v) : Array(heads).fill(null)), colorscale: "Cividis",
    zmin: 0, xgap: 1, ygap: 1,
    hovertemplate: "layer %{y}, head %{x}: %{z:.3~g} %<extra></extra>", colorbar: { title: { text: "%",
      font: { color: css("--muted") } }, tickfont: { color: css("--muted") }, outlinewidth: 0, thickness: 12 } }],
    { height: Math.max(240, Math.min(560, 14 * p.by_head.length + 90)), xaxis: { words: "head",
      dtick: heads > 16 ? 4 : 1, showgrid: false }, yaxis: { words: "layer", autorange: "reversed",
      showgrid: false } });
}

function drawLayers(s) {
  const points = ofGroup(s).filter((p) => /^\d+$/.test(p.layers) && p[s.metric] > 0);
  el("layers-section").hidden = !points.length;
  if (!points.length) return;
  const DASHES = ["solid", "dash", "dot", "dashdot", "longdash"];
  const names = unique(points.map((p) => p.site + "|" + p.policy)), per = {};
  const traces = names.map((name) => {
    const curve = points.filter((p) => p.site + "|" + p.policy === name).sort((a, b) => a.layers - b.layers),
      rule = curve[0].rule;
    per[rule] = (per[rule] ?? -1) + 1;
    const color = rule === "none" ? css("--ink") : style(rule).color,
      text = curve[0].policy.includes("=") ? curve[0].policy : "scores=" + curve[0].policy;
    return { x: curve.map((p) => Number(p.layers)), y: curve.map((p) => p[s.metric]), name: text,
      mode: "lines+markers", line: { color, width: 1.5, dash: DASHES[per[rule] % 5] }, marker: { size: 6, color },
      error_y: bars(curve, s.metric, color), hovertemplate: `${text}<br>layer %{x}: %{y:.3~g}<extra></extra>` };
  });
  draw("layers", traces, { height: 340 + 18 * names.length, showlegend: true, legend: { orientation: "h", y: -0.22,
    font: { size: 11 } }, xaxis: { words: "the only narrow layer" }, yaxis: { ...logTicks(traces.flatMap((t) => t.y),
    s.metric === "flip"), words: METRICS[s.metric] } });
}

function drawSites(s) {
  const points = ofGroup(s).filter((p) => p.layers === "all" && p.rule === "none" && !p.site.includes(" + ") &&
    p[s.metric] > 0);
  const sites = unique(points.map((p) => p.site));
  el("sites-section").hidden = sites.length < 2;
  if (sites.length < 2) return;
  const worst = (site) => Math.max(...points.filter((p) => p.site === site).map((p) => p[s.metric]));
  sites.sort((a, b) => worst(b) - worst(a));
  const names = accumulators(points), SYMBOLS = ["circle", "square", "diamond", "triangle-up", "x", "star", "pentagon",
    "hexagon"];
  const shade = (i) => dark() ? `hsl(205, 65%, ${80 - 45 * i / Math.max(1, names.length - 1)}%)` : `hsl(205, 80%, ${22 + 43 * i / Math.max(1, names.length - 1)}%)`;
  const traces = names.map((name,
    i) => { const part = points.filter((p) => p.accumulate === name); return { y: part.map((p) => p.site),
    x: part.map((p) => p[s.metric]), name, mode: "markers", marker: { size: 9, symbol: SYMBOLS[i % 8],
    color: shade(i) },
    error_x: bars(part, s.metric, shade(i)), hovertemplate: `%{y}=${name}: %{x:.3~g}<extra></extra>` }; });
  draw("sites", traces, { height: 150 + 34 * sites.length, showlegend: true, legend: { orientation: "h", y: -0.3,
    font: { size: 11 } }, yaxis: { words: "", categoryorder: "array", categoryarray: [...sites].reverse() },
    xaxis: { ...logTicks(traces.flatMap((t) => t.x), s.metric === "flip"), words: METRICS[s.metric] } });
}

function drawPoints(s) {
  const points = ofGroup(s).filter((p) => p.site === s.site && (s.accumulate === "" || p.accumulate === s.accumulate ||
    p.rule === "none"));
  points.sort((a, b) => (a.layers !== "all") - (b.layers !== "all") || byMu(a, b) ||
    (a.rule !== "none") - (b.rule !== "none") || DATA.rules.indexOf(a.rule) - DATA.rules.indexOf(b.rule) ||
    a.rate - b.rate || a.layers.localeCompare(b.layers, "en", { numeric: true }));
  const layered = points.some((p) => p.layers !== "all");
  const head = ["Policy", ...(layered ? ["layers"] : []), "PPL", "ΔPPL", "KLD", "99 % KLD", "RMS Δp", "same top",
    "recomputed"];
  const pm = (v, e, d) => `${number(v, d)} <span class="se">± ${number(e, 1)}</span>`;
  const body = points.map((p) => `<tr><td>${p.policy}</td>${layered ? `<td>${p.layers}</td>` : ""}<td>${number(p.perplexity, 5)}</td><td>${pm(p.perplexity - p.reference_perplexity, p.perplexity * p.log_ratio_se, 2)}</td>` +
    `<td>${pm(p.kl, p.kl_se, 3)}</td><td>${number(p.kl_99, 3)}</td><td>${percentText(p.rms_delta_p)}</td><td>${(100 * (1 - p.flip)).toFixed(2)} <span class="se">± ${(100 * p.flip_se).toFixed(2)}</span> %</td><td>${percentText(p.rate)}</td></tr>`).join("");
  el("points").innerHTML = `<thead><tr>${head.map((h) => `<th>${h}</th>`).join("")}</tr></thead><tbody>${body}</tbody>`;
}

function redraw() {
  updateControls();
  const s = state();
  for (const step of [drawPareto, drawEqual, drawMu, drawPosition, drawHeads, drawLayers, drawSites,
    drawPoints]) step(s);
}
for (const select of document.querySelectorAll("select")) select.addEventListener("change", redraw);
whenThemeChanges(redraw);
redraw();
