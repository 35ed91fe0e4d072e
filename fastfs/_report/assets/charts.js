"use strict";
// Figures for Plotly: each function returns traces and layout.

const DARK_LINES = ["#4AA3DF", "#F0803C", "#2FC79A", "#E08FBC", "#A9DCFF", "#F5C04A"]; // the same hues, lighter
const LINES = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"]; // palette of Okabe and Ito, without black and yellow
// Blue to red; 0 has the color of the background, pale or dark, to differ from the gray of "not valid".
const DIVERGING = [[0, "#2166ac"], [0.25, "#7fb6d9"], [0.5, "#fbf7ef"], [0.75, "#f0976b"], [1, "#b2182b"]];
const DARK_DIVERGING = [[0, "#a6d8f5"], [0.25, "#3b87bd"], [0.5, "#0b0e12"], [0.75, "#c94f3d"], [1, "#ffcdb0"]];
const DASHES = ["solid", "dash", "dot"];
const MOST_DOTS = 1500;
const MOST_SCATTER = 4000;
const FIRST_ORDER = 0.1; // up to this residual, first order describes a step

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const isDark = () => document.documentElement.dataset.theme === "dark";
const narrow = () => window.innerWidth < 760;

function frame(height, more = {}) {
  return {
    height, autosize: true, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: css("--plot"), font: { color: css("--ink"), size: 12 },
    margin: { l: 64, r: 16, t: narrow() ? 14 : 32, b: 44 }, dragmode: narrow() ? false : "zoom", hoverlabel: { align: "left" },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: css("--quiet"), activecolor: css("--accent") },
    legend: { orientation: "h", y: -46 / (height - 80), yanchor: "top", x: 0 }, ...more,
  };
}
function axis(title, more = {}) {
  return { title: { text: title, standoff: 8 }, gridcolor: css("--grid"), linecolor: css("--line"), zeroline: false, automargin: true, exponentformat: "e", ...more };
}
const stepAxis = (range, more = {}) => axis("optimizer step", { range, separatethousands: true, nticks: narrow() ? 5 : 10, exponentformat: "none", ...more });

function colorOf(index) {
  const colors = isDark() ? DARK_LINES : LINES;
  return { color: colors[index % colors.length], dash: DASHES[Math.floor(index / LINES.length) % DASHES.length] };
}

// Ticks for a color bar of log10 values: decades, with steps of 2 and 5 if there are few.
function logTicks(low, high) {
  const vals = [], text = [];
  for (let e = Math.floor(low); e <= Math.ceil(high); e++) for (const m of high - low < 0.9 ? [1, 1.5, 2, 3, 5, 7] : high - low < 2.2 ? [1, 2, 5] : [1]) {
    const at = e + Math.log10(m);
    if (at >= low - 1e-9 && at <= high + 1e-9) { vals.push(at); text.push(format(m * 10 ** e, 3)); }
  }
  return { tickvals: vals, ticktext: text };
}

// A logarithmic axis over the values of the traces, with readable ticks.
function logAxis(title, traces, more = {}) {
  const all = traces.flatMap((trace) => trace.y).filter((v) => v > 0);
  if (!all.length) return axis(title, { showticklabels: false, ...more });
  let low = Math.log10(all.reduce((a, b) => Math.min(a, b))), high = Math.log10(all.reduce((a, b) => Math.max(a, b)));
  const pad = Math.max(0.05, (high - low) * 0.05);
  low -= pad; high += pad;
  const { tickvals, ticktext } = logTicks(low, high);
  return axis(title, { type: "log", range: [low, high], tickvals: tickvals.map((v) => 10 ** v), ticktext, ...more });
}

// The heat map of layers x steps. Returns traces, layout, and notes on what is drawn.
function heatFigure(q, rows, { log, range, showInvalid }) {
  const part = q.part, steps = part.steps, width = steps.length;
  const z = [], grey = [], below = [];
  const finite = [];
  let invalidCells = 0, belowCells = 0, emptyCells = 0, withheldCells = 0;
  const dots = { x: [], y: [] };
  rows.forEach((row, y) => {
    const line = new Array(width), greyLine = new Array(width), belowLine = new Array(width);
    for (let c = 0; c < width; c++) {
      const at = row * width + c, value = q.values[at];
      const bad = q.guarded && part.invalid[at] === 1;
      line[c] = greyLine[c] = belowLine[c] = null;
      if (bad && !showInvalid) { greyLine[c] = 1; invalidCells++; continue; }
      if (q.guarded && !showInvalid && part.invalid_merged[at] > 0) { dots.x.push(steps[c]); dots.y.push(y); }
      if (!Number.isFinite(value)) { if (q.id === "predicted:update_rms" && part.withheld[at] === 1) withheldCells++; else emptyCells++; continue; }
      if (log && value <= 0) { belowLine[c] = 1; belowCells++; continue; }
      line[c] = log ? Math.log10(value) : value;
      finite.push(line[c]);
    }
    z.push(line); grey.push(greyLine); below.push(belowLine);
  });
  finite.sort((a, b) => a - b);
  let low = percentile(finite, 0.01), high = percentile(finite, 0.99);
  const clipped = finite.length > 0 && (finite[0] < low || finite[finite.length - 1] > high);
  if (!finite.length) { low = 0; high = 1; }
  const least = log ? 0.05 : Math.max(1e-12, Math.abs(high) * 1e-3);
  if (high - low < least) { const mid = (low + high) / 2; low = mid - least; high = mid + least; }
  const diverging = !log && low < 0;
  // The color range is at least one half, so that a healthy residual stays pale.
  if (diverging) { high = Math.max(-low, high, q.key === "residual" ? 0.5 : 0); low = -high; }

  const phone = narrow();
  const names = rows.map((row) => data.rows[row].name);
  const prefix = sharedParents(names);
  const plotHeight = Math.min(720, Math.max(150, rows.length * 18));
  const every = Math.max(1, Math.ceil((rows.length * 15) / plotHeight));
  const labels = rows.map((row, y) => y).filter((y) => y % every === 0);
  const text = labels.map((y) => escapeLabel(shorten(names[y].slice(prefix.length), phone ? 12 : 26)));
  const left = Math.max(...text.map((t) => t.length), 3) * 7 + (prefix ? 34 : 30);
  const ticks = log ? logTicks(low, high) : {};
  const unit = escapeLabel(q.unit);
  const bar = phone
    ? { orientation: "h", y: 1.01, yanchor: "bottom", x: 0.5, thickness: 10, len: 1, title: { text: unit, side: "top", font: { size: 11 } }, exponentformat: "e", ...ticks }
    : { thickness: 14, len: 1, title: { text: unit, side: "right", font: { size: 11 } }, exponentformat: "e", ...ticks };
  const x = steps;
  const common = { type: "heatmap", x, y: rows.map((row, y) => y), xgap: width <= 60 ? 1 : 0, ygap: rows.length <= 40 ? 1 : 0 };
  const flat = (name) => [[0, name], [1, name]];
  const traces = [{ ...common, name: "values", z, zmin: low, zmax: high, colorscale: diverging ? (isDark() ? DARK_DIVERGING : DIVERGING) : "Viridis", colorbar: bar, showscale: finite.length > 0, hoverinfo: "none" }];
  if (invalidCells) traces.push({ ...common, name: "not valid", z: grey, zmin: 0, zmax: 1, colorscale: flat(css("--invalid")), showscale: false, hoverinfo: "skip" });
  if (belowCells) traces.push({ ...common, name: "not above zero", z: below, zmin: 0, zmax: 1, colorscale: flat("#D55E00"), showscale: false, hoverinfo: "skip" });
  const showDots = dots.x.length > 0 && dots.x.length <= MOST_DOTS;
  if (showDots) traces.push({ type: "scatter", mode: "markers", ...dots, name: "some not valid", marker: { color: css("--invalid"), size: 4, line: { color: css("--ink"), width: 0.5 } }, hoverinfo: "skip", showlegend: false });
  const place = new Map(rows.map((row, y) => [row, y]));
  const alerts = data.alerts.filter((a) => a.row !== null && place.has(a.row));
  if (alerts.length) traces.push({ type: "scatter", mode: "markers", name: "alerts", x: alerts.map((a) => a.step), y: alerts.map((a) => place.get(a.row)), showlegend: false,
    marker: { symbol: "triangle-down", size: 9, color: "#D55E00", line: { color: "#fff", width: 1 } }, hoverinfo: "skip" });
  const layout = frame(plotHeight + (phone ? 120 : 84), {
    margin: { l: Math.min(left, phone ? 110 : 240), r: phone ? 10 : 20, t: phone ? 66 : 32, b: 48 },
    xaxis: stepAxis(range, { showgrid: false }),
    yaxis: axis(prefix ? `layer (${escapeLabel(shorten(prefix, 30))}*)` : "layer", { tickvals: labels, ticktext: text, range: [rows.length - 0.5, -0.5], showgrid: false, automargin: false, fixedrange: phone }),
  });
  return { traces, layout, notes: { invalidCells, belowCells, emptyCells, withheldCells, dots: dots.x.length, showDots, alerts: alerts.length, clipped } };
}

// The area between the ends [step, low, high] of bands; null separates areas.
function bandTrace(edges, color, row) {
  const x = [], y = [];
  let area = [];
  for (const edge of [...edges, null]) {
    if (edge) { area.push(edge); continue; }
    const back = area.slice().reverse();
    x.push(...area.map((e) => e[0]), ...back.map((e) => e[0]), null);
    y.push(...area.map((e) => e[2]), ...back.map((e) => e[1]), null);
    area = [];
  }
  return { type: "scatter", mode: "lines", name: "band", x, y, fill: "toself", fillcolor: color + "26", line: { width: 0 }, hoverinfo: "skip", showlegend: false, legendgroup: String(row) };
}

// A line per picked layer, with crosses for rows that are not valid and bands (see `band`).
function linesFigure(q, picks, { log, range, height = 380 }) {
  const part = q.part, steps = part.steps, width = steps.length, traces = [];
  let bad = 0, bands = 0;
  picks.forEach((row, index) => {
    const name = escapeLabel(shorten(data.rows[row].name, 40)), line = colorOf(index);
    const at = row * width, y = [], crossX = [], crossY = [], why = [], edges = [];
    for (let c = 0; c < width; c++) {
      const value = q.values[at + c], invalid = q.guarded && part.invalid[at + c] === 1;
      const drawable = Number.isFinite(value) && (!log || value > 0);
      y.push(drawable && !invalid ? value : null);
      if (drawable && invalid) { crossX.push(steps[c]); crossY.push(value); why.push(escapeLabel(part.reasons[part.why[at + c]] ?? "")); }
      const ends = drawable && !invalid ? band(q, at + c, value, log) : null;
      if (ends) edges.push([steps[c], ...ends]);
      else if (!drawable) edges.push(null);
    }
    bad += crossX.length;
    if (edges.some((e) => e)) { bands++; traces.push(bandTrace(edges, line.color, row)); }
    traces.push({ type: "scatter", mode: width <= 80 ? "lines+markers" : "lines", name, legendgroup: String(row), x: steps, y, connectgaps: part !== data.predicted, line: { ...line, width: 1.8 }, marker: { size: 5 },
      hovertemplate: `${name}<br>step %{x:,d}<br>%{y:.4g} ${escapeLabel(q.unit)}<extra></extra>` });
    if (crossX.length) traces.push({ type: "scatter", mode: "markers", name: name + ", not valid", legendgroup: String(row), showlegend: false, x: crossX, y: crossY, text: why, marker: { symbol: "x-thin", size: 6, line: { width: 1.2, color: line.color } }, opacity: 0.7,
      hovertemplate: `${name}: not valid<br>%{text}<br>step %{x:,d}<br>%{y:.4g}<extra></extra>` });
  });
  const layout = frame(height, { xaxis: stepAxis(range), yaxis: log ? logAxis(`${q.label} (${q.unit})`, traces) : axis(`${q.label} (${q.unit})`), showlegend: true });
  if (q.key === "angle") layout.shapes = [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: Math.PI / 2, y1: Math.PI / 2, line: { color: css("--quiet"), dash: "dot", width: 1 } }];
  if (q.key === "angle") layout.annotations = [{ xref: "paper", x: 1, xanchor: "right", y: Math.PI / 2, yanchor: "bottom", showarrow: false, text: "90°: the move does not change the loss", font: { size: 11, color: css("--quiet") } }];
  return { traces, layout, notes: { bad, bands } };
}

// The residual of the picked layers. An axis that has to show more than 0.5 is linear around 0 and logarithmic beyond
// FIRST_ORDER, so that nothing is cut off and the rest stays readable.
function residualFigure(q, picks, range) {
  const figure = linesFigure(q, picks, { log: false, range, height: 320 });
  const all = figure.traces.flatMap((trace) => trace.y).filter((v) => v !== null && Number.isFinite(v));
  const most = all.reduce((a, b) => Math.max(a, Math.abs(b)), 0), wide = most > 0.5;
  const place = (v) => (wide && v !== null ? Math.asinh(v / FIRST_ORDER) : v);
  for (const trace of figure.traces) {
    trace.customdata = trace.y;
    trace.y = trace.y.map(place);
    if (trace.hovertemplate) trace.hovertemplate = trace.hovertemplate.replace("%{y:", "%{customdata:");
  }
  if (wide) {
    const sizes = [FIRST_ORDER, 0.3];
    for (let e = 0; 10 ** e <= most; e++) sizes.push(10 ** e, 3 * 10 ** e);
    const stride = Math.ceil(sizes.length / 6), ticks = sizes.filter((v, i) => v <= most * 1.2 && i % stride === 0);
    const tickvals = [...ticks.map((v) => -v).reverse(), 0, ...ticks].filter((v) => all.some((one) => (v < 0 ? one <= v / 1.2 : v === 0 || one >= v / 1.2)));
    Object.assign(figure.layout.yaxis, { tickvals: tickvals.map(place), ticktext: tickvals.map((v) => format(v, 3)) });
  }
  if (most >= FIRST_ORDER) figure.layout.shapes = [-1, 1].map((sign) => ({ type: "line", xref: "paper", x0: 0, x1: 1, y0: place(sign * FIRST_ORDER), y1: place(sign * FIRST_ORDER), line: { color: css("--quiet"), dash: "dot", width: 1 } }));
  return { ...figure, notes: { wide, most } };
}

// The valid residual of these rows that is furthest from 0.
function largestResidual(q, rows) {
  const width = q.part.steps.length;
  let found = null;
  for (const row of rows) for (let c = 0; c < width; c++) {
    const value = q.values[row * width + c];
    if (Number.isFinite(value) && q.part.invalid[row * width + c] !== 1 && !(found && Math.abs(value) <= Math.abs(found.value))) found = { value, row, step: q.part.steps[c] };
  }
  return found;
}

// Measured speed against what the formula predicts for the same step with the angle before.
function scatterFigure(rows) {
  const part = data.measured, width = part.steps.length, before = part.columns.predicted, speed = part.columns.update_rms;
  const points = [];
  if (before && speed) for (const row of rows) for (let c = 0; c < width; c++) {
    const at = row * width + c;
    if (before[at] > 0 && speed[at] > 0 && part.invalid[at] !== 1) points.push([before[at], speed[at], row, c]);
  }
  const stride = Math.max(1, Math.ceil(points.length / MOST_SCATTER));
  const shown = points.filter((point, i) => i % stride === 0);
  const all = shown.flatMap((p) => [p[0], p[1]]);
  const low = all.reduce((a, b) => Math.min(a, b), Infinity) / 1.3, high = all.reduce((a, b) => Math.max(a, b), 0) * 1.3;
  const factor = Math.exp(percentile(points.map((p) => Math.abs(Math.log(p[1] / p[0]))).sort((a, b) => a - b), data.confidence.share));
  const aside = (times, dash) => ({ type: "scatter", mode: "lines", x: [low, high], y: [low * times, high * times], line: { color: css("--quiet"), dash, width: 1 }, hoverinfo: "skip", showlegend: false });
  const traces = [
    aside(1, "dash"), aside(factor, "dot"), aside(1 / factor, "dot"),
    { type: "scatter", mode: "markers", name: "layers at measured steps", x: shown.map((p) => p[0]), y: shown.map((p) => p[1]), showlegend: false,
      marker: { size: shown.length > 1000 ? 3.5 : 6, opacity: 0.7, color: shown.map((p) => p[2]), colorscale: "Viridis", showscale: true, cmin: 0, cmax: Math.max(1, layerRows.length - 1), colorbar: { thickness: 10, title: { text: "layer number", side: "right" }, nticks: 6 } },
      text: shown.map((p) => `${escapeLabel(data.rows[p[2]].name)}<br>step ${whole(part.steps[p[3]])}`),
      hovertemplate: "%{text}<br>predicted %{x:.4g}<br>measured %{y:.4g}<extra></extra>" },
  ];
  const both = [{ y: all }];
  const layout = frame(380, { xaxis: logAxis("predicted speed (units per step)", both, { tickangle: 0 }), yaxis: logAxis("measured speed (units per step)", both) });
  return { traces, layout, notes: { points: points.length, shown: shown.length, factor } };
}

// Speed of the picked layers: dots for measured steps, a thin line with its band for predicted ones.
function speedFigure(picks, range) {
  const traces = [], m = data.measured, p = data.predicted;
  picks.forEach((row, index) => {
    const name = escapeLabel(shorten(data.rows[row].name, 30)), { color } = colorOf(index);
    const series = (part, keep) => part.steps.map((s, c) => { const at = row * part.steps.length + c, v = part.columns.update_rms[at]; return v > 0 && keep(at) ? v : null; });
    const predicted = quantities.find((q) => q.id === "predicted:update_rms");
    if (predicted) {
      const edges = series(p, () => true).map((v, c) => (v === null ? null : [p.steps[c], ...band(predicted, row * p.steps.length + c, v, true)]));
      if (edges.some((e) => e)) traces.push(bandTrace(edges, color, row));
    }
    if (p.columns.update_rms) traces.push({ type: "scatter", mode: "lines", x: p.steps, y: series(p, () => true), name: name + ", predicted", legendgroup: String(row), showlegend: !m.columns.update_rms, line: { color, width: 1 }, opacity: 0.85,
      hovertemplate: `${name}<br>step %{x:,d}<br>predicted %{y:.4g}<extra></extra>` });
    if (m.columns.update_rms) traces.push({ type: "scatter", mode: "markers", x: m.steps, y: series(m, (at) => m.invalid[at] !== 1), name, legendgroup: String(row), marker: { color, size: 5, symbol: index < LINES.length ? "circle" : "diamond-open" },
      hovertemplate: `${name}<br>step %{x:,d}<br>measured %{y:.4g}<extra></extra>` });
  });
  return { traces, layout: frame(380, { xaxis: stepAxis(range), yaxis: logAxis("speed (units per step)", traces), showlegend: true }) };
}

function lossFigure(range) {
  const { steps, values } = data.loss;
  const near = (step) => { let lo = 0, hi = steps.length - 1; while (lo < hi) { const mid = (lo + hi + 1) >> 1; if (steps[mid] <= step) lo = mid; else hi = mid - 1; } return values[lo]; };
  const traces = [{ type: "scatter", mode: steps.length <= 80 ? "lines+markers" : "lines", name: "loss", x: steps, y: values, line: { color: css("--accent"), width: 1.5 }, hovertemplate: "step %{x:,d}<br>loss %{y:.5g}<extra></extra>" }];
  const marks = (list, name, symbol, color, label) => {
    if (list.length && steps.length) traces.push({ type: "scatter", mode: "markers", name, x: list.map((one) => one.step), y: list.map((one) => near(one.step)), text: list.map((one) => escapeLabel(shorten(label(one), 120))), marker: { symbol, color, size: 9, line: { color: "#fff", width: 1 } }, hovertemplate: "step %{x:,d}<br>%{text}<extra></extra>" });
  };
  marks(data.alerts, "alert", "triangle-down", "#D55E00", (one) => `${one.rule}: ${one.message ?? ""}`);
  marks(data.skipped, "skipped optimizer step", "x", "#CC79A7", (one) => `skipped: ${one.reason ?? ""}`);
  const layout = frame(300, { xaxis: stepAxis(range), yaxis: axis("loss"), showlegend: traces.length > 1 });
  layout.shapes = data.resumed.slice(0, 50).map((step) => ({ type: "line", x0: step, x1: step, yref: "paper", y0: 0, y1: 1, line: { color: css("--quiet"), dash: "dot", width: 1 } }));
  return { traces, layout };
}
