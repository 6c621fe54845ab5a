"use strict";
// What both pages share: data, light and dark, and the look of a plot.
const DATA = JSON.parse(document.getElementById("data").textContent);
const el = (id) => document.getElementById(id);
const narrow = () => window.innerWidth < 640;

// ---- light and dark: the system's choice, until the reader chooses ------------------------------------------------
const systemDark = window.matchMedia("(prefers-color-scheme: dark)");
const THEMES = ["system", "light", "dark"];
let chosenTheme = "system";
try { chosenTheme = localStorage.getItem("torchlamp-theme") ||
  "system"; } catch (e) { /* a file: page may have no storage */ }
if (!THEMES.includes(chosenTheme)) chosenTheme = "system";
const dark = () => chosenTheme === "dark" || (chosenTheme === "system" && systemDark.matches);
function applyTheme() {
  document.documentElement.dataset.theme = dark() ? "dark" : "light";
  el("theme").textContent = "Theme: " + chosenTheme;
}
applyTheme();
function whenThemeChanges(redraw) {
  el("theme").addEventListener("click", () => {
    chosenTheme = THEMES[(THEMES.indexOf(chosenTheme) + 1) % THEMES.length];
    try { localStorage.setItem("torchlamp-theme", chosenTheme); } catch (e) { /* as above */ }
    applyTheme();
    redraw();
  });
  systemDark.addEventListener("change", () => { applyTheme(); redraw(); });
  let wasNarrow = narrow();
  window.addEventListener("resize", () => { if (narrow() !== wasNarrow) { wasNarrow = narrow(); redraw(); } });
}
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// ---- plots ---------------------------------------------------------------------------------------------------------
const CONFIG = { displaylogo: false, responsive: true, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };
function layout(extra) {
  const ink = css("--ink"), muted = css("--muted"), grid = css("--grid"), line = css("--line");
  const axis = (own) => Object.assign(
    { gridcolor: grid, linecolor: line, zeroline: false, tickfont: { color: muted, size: 12 }, automargin: true,
      ticks: "outside", tickcolor: line, ticklen: 4 }, own,
    { title: { text: (own && own.words) || "", font: { color: muted, size: narrow() ? 11 : 13 }, standoff: 8 } });
  const { xaxis, yaxis, margin, ...rest } = extra;
  return Object.assign(
    { paper_bgcolor: css("--paper"), plot_bgcolor: css("--paper"),
      font: { family: getComputedStyle(document.body).fontFamily, color: ink, size: 13 },
      // The bar of buttons has the room above the plot for itself.
      margin: { l: 8, r: narrow() ? 12 : 24, b: 8, t: narrow() ? 12 : 34, ...margin }, showlegend: false, dragmode: narrow() ? false : "zoom",
      hoverlabel: { bgcolor: css("--raised"), bordercolor: line, font: { color: ink, size: 12 }, align: "left" },
      xaxis: axis(xaxis), yaxis: axis(yaxis) }, rest);
}
function draw(id, traces, extra) {
  const made = Plotly.react(id, traces, layout(extra), Object.assign({ displayModeBar: narrow() ? false : "hover" }, CONFIG));
  const plot = el(id);
  plot.whole = extra;
  if (!plot.zooms) {
    // Zoomed axes get ticks of their own; a double click gives the whole range back.
    plot.zooms = true;
    plot.on("plotly_relayout", (change) => {
      const update = {};
      for (const name of ["xaxis", "yaxis"]) {
        const own = plot.whole[name], range = [`${name}.range[0]`, `${name}.range[1]`].map((key) => change[key]);
        if (!own || own.type !== "log" || !own.tickvals) continue;
        const all = change[`${name}.autorange`];
        if (!all && range[0] === undefined) continue;
        const { tickvals, ticktext } = logAxis(all ? own.range : range, own.percent);
        Object.assign(update, { [`${name}.tickvals`]: tickvals, [`${name}.ticktext`]: ticktext });
        if (all) update[`${name}.range`] = own.range;
      }
      if (Object.keys(update).length) Plotly.relayout(plot, update);
    });
  }
  return made;
}
const SUPER = { "-": "\u207b", 0: "\u2070", 1: "\u00b9", 2: "\u00b2", 3: "\u00b3", 4: "\u2074", 5: "\u2075",
  6: "\u2076", 7: "\u2077", 8: "\u2078", 9: "\u2079" };
// A log axis over values, as log_axis.py: its range, and round ticks within it, two at least.
const DIGITS = [[1], [1, 3], [1, 2, 5], [1, 1.5, 2, 3, 4, 5, 7], Array.from({ length: 90 }, (_, i) => 1 + i / 10)];
function logTicks(values, percent, padLow = 0, padHigh = 0) {
  const good = values.filter((v) => v > 0 && isFinite(v));
  if (!good.length) return { type: "log" };
  const low = Math.log10(Math.min(...good)), high = Math.log10(Math.max(...good));
  const pad = Math.max(0.1, (Math.log10(1.5) - (high - low)) / 2);
  return logAxis([low - pad - padLow, high + pad + padHigh], percent);
}
function logAxis(range, percent) {
  const [low, high] = range.map((v) => 10 ** v);
  let tickvals = [];
  for (const digits of DIGITS) {
    tickvals = [];
    for (let e = Math.floor(range[0]); e <= range[1]; e++) for (const d of digits) {
      const v = Number(`${Number(d.toFixed(1))}e${e}`);
      if (v >= low && v <= high) tickvals.push(v);
    }
    if (tickvals.length >= 3) break;
  }
  const every = Math.ceil(tickvals.length / (narrow() ? 7 : 10));
  tickvals = tickvals.filter((_, i) => i % every === 0);
  if (tickvals.length < 2) tickvals = [0.1, 0.5, 0.9].map((part) => Number((low * (high / low) ** part).toPrecision(4)));
  const words = (v) => {
    if (percent) return percentText(v);
    if (v > 0.0009 && v < 1000) return String(Number(v.toPrecision(4)));
    const [digits, power] = v.toExponential(3).split("e");
    return (Number(digits) === 1 ? "" : Number(digits) + "·") + "10" + [...String(Number(power))].map((c) => SUPER[c]).join("");
  };
  return { type: "log", range, tickvals, ticktext: tickvals.map(words), percent };
}
const percentText = (v) => Number((100 * v).toPrecision(3)) + " %";
function fill(select, options, keep) {
  const before = keep === undefined ? select.value : keep;
  select.replaceChildren(...options.map(([value, text]) => new Option(text, value)));
  if (options.some(([value]) => value === before)) select.value = before;
  if (select.parentElement.tagName === "LABEL") select.parentElement.hidden = options.length < 2;
}
// The inverse of page.py's pack.
function unpack(text, Kind) {
  return new Kind(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
}
const unique = (values) => [...new Set(values)];
// Strings of the data become text nodes, never HTML. Plotly reads tags in labels: there they are escaped.
const safe = (value) => String(value).replace(/[&<>]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;" })[c]);
function node(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children.flat());
  return made;
}
// A table of rows of cells, each a `td` or `th`, under a row of headings.
function fillTable(table, headings, rows) {
  table.replaceChildren(node("thead", {}, node("tr", {}, headings.map((words) => node("th", {}, words)))),
    node("tbody", {}, rows.map((cells) => node("tr", {}, cells))));
}
const number = (v, digits) => v === null || v === undefined || !isFinite(v) ? "–" :
  v === 0 ? "0" : Math.abs(v) < 1e-3 ||
    Math.abs(v) >= 1e5 ? v.toExponential(digits - 1) : String(Number(v.toPrecision(digits)));
