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
    { title: { text: (own && own.words) || "", font: { color: muted, size: 13 }, standoff: 8 } });
  const { xaxis, yaxis, ...rest } = extra;
  return Object.assign(
    { paper_bgcolor: css("--paper"), plot_bgcolor: css("--paper"),
      font: { family: getComputedStyle(document.body).fontFamily, color: ink, size: 13 },
      margin: { l: 8, r: narrow() ? 12 : 24, t: 12, b: 8 }, showlegend: false, dragmode: narrow() ? false : "zoom",
      hoverlabel: { bgcolor: css("--raised"), bordercolor: line, font: { color: ink, size: 12 }, align: "left" },
      xaxis: axis(xaxis), yaxis: axis(yaxis) }, rest);
}
function draw(id, traces, extra) {
  return Plotly.react(id, traces, layout(extra), Object.assign({ displayModeBar: narrow() ? false : "hover" }, CONFIG));
}
const SUPER = { "-": "\u207b", 0: "\u2070", 1: "\u00b9", 2: "\u00b2", 3: "\u00b3", 4: "\u2074", 5: "\u2075",
  6: "\u2076", 7: "\u2077", 8: "\u2078", 9: "\u2079" };
// Ticks of a log axis over values, at powers of ten and, where these are few, at 2 and 5 times them.
function logTicks(values, percent) {
  const good = values.filter((v) => v > 0 && isFinite(v));
  if (!good.length) return { type: "log" };
  const low = Math.floor(Math.log10(Math.min(...good))), high = Math.ceil(Math.log10(Math.max(...good)));
  const span = Math.log10(Math.max(...good) / Math.min(...good));
  const digits = span < 0.7 ? [1, 1.5, 2, 3, 4, 5, 6, 8] : span < 2.5 ? [1, 2, 5] : [1];
  const tickvals = [], ticktext = [];
  for (let e = low; e <= high; e++) for (const d of digits) {
    const v = d * 10 ** e;
    tickvals.push(v);
    ticktext.push(percent ? percentText(v) : v > 0.0009 && v < 1000 ? String(Number(v.toPrecision(3))) :
      (d === 1 ? "" : d + "·") + "10" + [...String(e)].map((c) => SUPER[c]).join(""));
  }
  return { type: "log", tickvals, ticktext };
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
