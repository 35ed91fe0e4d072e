"use strict";
// The page of `fastfs diff`: state, controls, tables. Text of the records is set as textContent, never as HTML.
{ // a scope of its own, since the linter reads the scripts of both pages together

const parts = [data.measured, ...data.others];
const menu = quantities.filter((q) => q.key !== "share");
const steps = data.measured.steps, pad = Math.max(0.5, (steps[steps.length - 1] - steps[0]) * 0.01);
const RANGE = [steps[0] - pad, steps[steps.length - 1] + pad];
const named = data.partings.length ? menu.find((q) => q.key === data.partings[0].key) : null;
const state = { quantity: (named ?? menu[0]).id, log: (named ?? menu[0]).log, search: "", second: parts.length > 1 ? 1 : 0, showInvalid: false };

const quantity = () => menu.find((q) => q.id === state.quantity);
const shownRows = () => matching(layerRows, state.search);
const ofRun = (q, i) => ({ ...q, part: parts[i], values: parts[i].columns[q.key] });

// A factor near 1 is easier to read in percent.
const changeOf = (one) => (!one.ratio ? format(one.change, 3) : Math.abs(one.change - 1) < 0.01 ? `${format(100 * (one.change - 1), 2)} %` : `x${format(one.change)}`);

function drawStatic() {
  $("title").textContent = data.title;
  for (const line of data.verdict) $("verdict").append(element("li", line));
  if (data.partings.length) fillTable($("partings"), [["run"], ["quantity"], ["layer"], ["step", 1], ["first", 1], ["second", 1], ["change", 1], ["standard errors", 1]],
    data.partings.map((one) => [one.second, one.quantity, one.layer + (one.others ? ` (and ${one.others} more)` : ""), whole(one.step), format(one.reference, 3), format(one.value, 3), changeOf(one), format(Math.abs(one.errors), 3)]));
  fillTable($("facts"), [[""], ...data.labels.map((label) => [label])], data.facts);
  for (const note of data.notes) $("notes").append(element("li", note));
  $("notes-fold").hidden = !data.notes.length;
  for (const q of menu) { const option = element("option", q.label); option.value = q.id; $("quantity").append(option); }
  data.labels.forEach((label, i) => { if (i) { const option = element("option", `${label} against ${data.labels[0]}`); option.value = i; $("second").append(option); } });
  parts.forEach((part, i) => {
    const box = element("div"), plot = element("div", null, "plot");
    plot.id = `run${i}`;
    box.append(element("h3", data.labels[i]), plot);
    $("runs").append(box);
  });
  $("runs").style.gridTemplateColumns = narrow() ? "" : "repeat(2, minmax(0, 1fr))";
  $("loss-panel").hidden = !data.losses.some((one) => one.values.some((value) => value !== null));
}

// ---- drawn after every change

function drawRuns() {
  const q = quantity(), rows = shownRows();
  $("heat-title").textContent = `${q.label}, layer by step`;
  $("heat-about").textContent = q.about;
  const figures = parts.map((part, i) => heatFigure(ofRun(q, i), rows, { log: state.log, range: RANGE, showInvalid: state.showInvalid }));
  const filled = figures.filter((figure) => figure.traces[0].showscale).map((figure) => figure.traces[0]);
  const low = Math.min(...filled.map((trace) => trace.zmin)), high = Math.max(...filled.map((trace) => trace.zmax));
  const diverging = filled.find((trace) => trace.colorscale !== "Viridis"), most = Math.max(-low, high);
  const said = [[null, "All runs have the same color scale."]];
  let invalid = 0, below = 0;
  for (const { traces, notes } of figures) {
    if (filled.length) Object.assign(traces[0], diverging ? { zmin: -most, zmax: most, colorscale: diverging.colorscale } : { zmin: low, zmax: high });
    if (state.log) Object.assign(traces[0].colorbar, logTicks(low, high));
    invalid += notes.invalidCells; below += notes.belowCells;
  }
  if (!rows.length) said.push([null, "No layer matches the search."]);
  if (invalid) said.push([css("--invalid"), `not valid (${whole(invalid)} cells)`]);
  if (below) said.push(["#D55E00", `zero or negative, which a logarithmic scale cannot show (${whole(below)})`]);
  legend($("heat-legend"), said);
  return Promise.all(figures.map(({ traces, layout }, i) => Plotly.react(`run${i}`, traces, layout, CONFIG)));
}

// The second run against the first: the logarithm of their ratio, or their difference.
function differenceOf(q, second) {
  const one = ofRun(q, 0), two = ofRun(q, second), values = new Float32Array(one.values.length), invalid = new Uint8Array(one.values.length);
  for (let i = 0; i < values.length; i++) {
    invalid[i] = one.part.invalid[i] | two.part.invalid[i];
    values[i] = !q.log ? two.values[i] - one.values[i] : two.values[i] > 0 && one.values[i] > 0 ? Math.log10(two.values[i] / one.values[i]) : NaN;
  }
  return { ...q, key: "difference", unit: q.log ? "factor" : q.unit, values, part: { ...one.part, invalid, invalid_merged: new Uint16Array(values.length) } };
}

function drawDifference() {
  const q = quantity(), rows = shownRows(), against = `${data.labels[state.second]} against ${data.labels[0]}`;
  $("difference-title").textContent = q.log ? `Factor between the runs: ${against}` : `Difference of the runs: ${against}`;
  $("difference-about").textContent = q.log ? "Red: larger than in the first run; blue: smaller." : "Red: above the first run; blue: below.";
  const { traces, layout, notes } = heatFigure(differenceOf(q, state.second), rows, { log: false, range: RANGE, showInvalid: state.showInvalid });
  const most = Math.max(Math.abs(traces[0].zmin), Math.abs(traces[0].zmax), q.log ? 0.004 : 1e-12); // 0.004: a factor of 1.01
  Object.assign(traces[0], { zmin: -most, zmax: most, colorscale: isDark() ? DARK_DIVERGING : DIVERGING });
  if (q.log) { const at = [-1, -0.5, 0, 0.5, 1].map((share) => share * most); Object.assign(traces[0].colorbar, { tickvals: at, ticktext: at.map((v) => "x" + format(10 ** v, most < 1e-3 ? 6 : 3)) }); }
  const marks = data.partings.filter((one) => one.key === q.key && one.second.split(", ").includes(data.labels[state.second]) && !one.all);
  const place = new Map(rows.map((row, y) => [data.rows[row].name, y])), drawn = marks.filter((one) => place.has(one.layer));
  if (drawn.length) traces.push({ type: "scatter", mode: "markers", name: "parts here", x: drawn.map((one) => one.step), y: drawn.map((one) => place.get(one.layer)), showlegend: false, hoverinfo: "skip",
    marker: { symbol: "triangle-down", size: 11, color: css("--ink"), line: { color: css("--card"), width: 1 } } });
  const said = [];
  if (notes.invalidCells) said.push([css("--invalid"), `not valid in one of the runs (${whole(notes.invalidCells)} cells)`]);
  if (notes.emptyCells) said.push([css("--plot"), `not in both runs (${whole(notes.emptyCells)})`]);
  if (drawn.length) said.push([null, "▼ the quantity parts here first."]);
  if (notes.clipped) said.push([null, "Colors span the 1st to the 99th percentile; values beyond have the end color."]);
  legend($("difference-legend"), said);
  return Plotly.react("difference", traces, layout, CONFIG);
}

function drawLoss() {
  if ($("loss-panel").hidden) return null;
  const traces = data.losses.map((one, i) => ({ type: "scatter", mode: one.steps.length <= 80 ? "lines+markers" : "lines", name: escapeLabel(shorten(data.labels[i], 40)), x: one.steps, y: one.values, line: { ...colorOf(i), width: 1.8 }, marker: { size: 5 } }));
  return Plotly.react("loss", traces, frame(320, { xaxis: stepAxis(RANGE), yaxis: axis("loss"), showlegend: true }), CONFIG);
}

function drawAll() { return Promise.all([drawRuns(), drawDifference(), drawLoss()]); }

// ---- the tooltip of the heat maps

function tipText(row, c, q) {
  const width = steps.length, at = row * width + c;
  const lines = [data.rows[row].name, `step ${whole(steps[c])}`, q.label];
  parts.forEach((part, i) => lines.push(`${data.labels[i]}: ${format(part.columns[q.key][at])}` + (q.guarded && part.invalid[at] ? `, NOT VALID: ${part.reasons[part.why[at]] ?? "no reason given"}` : "")));
  return lines.join("\n");
}
function showTip(event) {
  const point = event.points.find((p) => p.data.name === "values");
  if (!point || !Array.isArray(point.pointIndex)) return;
  const tip = $("tip"), mouse = event.event;
  tip.textContent = tipText(shownRows()[point.pointIndex[0]], point.pointIndex[1], quantity());
  tip.hidden = false;
  const box = tip.getBoundingClientRect(), x = mouse.clientX ?? 20, y = mouse.clientY ?? 20;
  tip.style.left = `${Math.max(8, Math.min(x + 14, window.innerWidth - box.width - 8))}px`;
  tip.style.top = `${y + 18 + box.height > window.innerHeight ? Math.max(8, y - box.height - 12) : y + 18}px`;
}

function wire() {
  $("quantity").addEventListener("change", (e) => { state.quantity = e.target.value; state.log = quantity().log; $("scale").value = state.log ? "log" : "linear"; drawAll(); });
  $("scale").addEventListener("change", (e) => { state.log = e.target.value === "log"; drawRuns(); });
  let waiting = 0;
  $("filter").addEventListener("input", (e) => { clearTimeout(waiting); waiting = setTimeout(() => { state.search = e.target.value; drawRuns(); drawDifference(); }, 150); });
  $("second").addEventListener("change", (e) => { state.second = Number(e.target.value); drawDifference(); });
  $("show-invalid").addEventListener("change", (e) => { state.showInvalid = e.target.checked; drawRuns(); drawDifference(); });
  $("theme").addEventListener("click", () => { setTheme(isDark() ? "light" : "dark"); drawAll(); });
}
function setTheme(theme) { document.documentElement.dataset.theme = theme; }

setTheme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
drawStatic();
wire();
$("quantity").value = state.quantity;
$("scale").value = state.log ? "log" : "linear";
drawAll().then(() => {
  for (const id of [...parts.map((part, i) => `run${i}`), "difference"]) {
    $(id).on("plotly_hover", showTip);
    $(id).on("plotly_unhover", () => { $("tip").hidden = true; });
  }
  document.documentElement.dataset.ready = "yes";
});
}
