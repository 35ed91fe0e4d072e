"use strict";
// State, controls, tables. Text of the record is set as textContent, never as HTML.

const MOST_PICKS = 12;
const MOST_CHIPS = 300;
const LINKED = ["heat", "lines", "speed", "residual", "loss"];

const allSteps = [...data.measured.steps, ...data.predicted.steps, ...data.loss.steps];
const first = allSteps.reduce((a, b) => Math.min(a, b), Infinity), last = allSteps.reduce((a, b) => Math.max(a, b), -Infinity);
const hasRows = allSteps.length > 0;
const state = { quantity: quantities.length ? quantities[0].id : null, log: false, search: "", kind: "layers", from: first, to: last, showInvalid: false, picks: [] };

const quantity = () => quantities.find((q) => q.id === state.quantity);
const kindRows = () => (state.kind === "groups" ? groupRows : layerRows);
const shownRows = () => matching(kindRows(), state.search);
function range() {
  const pad = Math.max(0.5, (state.to - state.from) * 0.004);
  return [state.from - pad, state.to + pad];
}

// ---- the guide

function guideLink(anchor, words) {
  const made = element("a", words);
  made.href = `#guide-${anchor}`;
  made.addEventListener("click", () => { $("guide").open = true; });
  return made;
}
const ruleLink = (rule) => (data.guide.alerts[rule] ? guideLink(data.guide.alerts[rule], rule) : document.createTextNode(rule));
// Text with **bold**, *emphasis* and `code`; nothing else of Markdown is in the guide.
function marked(tag, text) {
  const made = element(tag), kinds = { "**": "b", "*": "i", "`": "code" };
  for (const part of text.split(/(\*\*[^*]+\*\*|\*[^*]+\*|`[^`]+`)/)) {
    const mark = part.match(/^(\*\*|\*|`)/)?.[0];
    made.append(mark && part.length > 2 ? element(kinds[mark], part.slice(mark.length, -mark.length)) : part);
  }
  return made;
}
function drawGuide() {
  for (const paragraph of data.guide.paragraphs) {
    const article = element("article");
    article.id = `guide-${paragraph.anchor}`;
    article.append(element("h3", paragraph.title), ...paragraph.text.split("\n\n").map((one) => marked("p", one)));
    $("guide").append(article);
  }
  for (const sign of data.signs) {
    const item = element("li", sign.text + " ");
    if (sign.anchor) item.append(guideLink(sign.anchor, "What to do"));
    $("signs").append(item);
  }
}

// ---- drawn once

function drawStatic() {
  $("title").textContent = data.title;
  $("subtitle").textContent = [data.source, `fastfs report`].filter(Boolean).join(" · ");
  for (const card of data.cards) {
    const box = element("div", null, "card");
    box.append(element("span", card.label), element("b", card.value), element("span", card.note));
    $("cards").append(box);
  }
  for (const text of data.findings) $("findings").append(element("li", text));
  if (data.alert_rules.length) {
    $("alarm").hidden = false;
    $("alarm").append("Alerts: ", ...data.alert_rules.flatMap(([rule, count], i) => [i ? ", " : "", ruleLink(rule), ` (${whole(count)})`]), ". Details are in the table below.");
  }
  const total = data.alert_rules.reduce((sum, [, count]) => sum + count, 0);
  $("alerts-note").textContent = total ? `${whole(total)} in total` + (total > data.alerts.length ? `; the first and last ${data.alerts.length / 2} are listed.` : ".") : "None.";
  if (total) fillTable($("alerts"), [["step", 1], ["rule"], ["layer"], ["value", 1], ["message"]], data.alerts.map((a) => [whole(a.step), ruleLink(a.rule), a.layer ?? "-", format(a.value), a.message ?? ""]));
  if (data.skipped.length) { $("skipped-panel").hidden = false; fillTable($("skipped"), [["step", 1], ["reason"]], data.skipped.map((s) => [whole(s.step), s.reason ?? ""])); }
  const known = layerRows.filter((row) => data.rows[row].cut !== null), cuts = known.filter((row) => data.rows[row].cut);
  $("structure-summary").textContent = known.length ? `Structure: ${cuts.length} of ${known.length} layers are cuts` : `Structure: ${layerRows.length} layers (cuts are not recorded)`;
  fillTable($("structure"), [["", 1], ["layer"], ["cut"], ["parameters", 1], ["reason"]], data.rows.map((row, i) => [String(i), row.name + (row.group ? " (group)" : ""), row.cut === null ? "-" : row.cut ? "yes" : "no", row.parameters === null ? "-" : whole(row.parameters), row.reason ?? (row.members === null ? "" : `${row.members} layers`)]));
  fillTable($("facts"), [[""], [""]], data.facts);
  if (data.thinned.length) for (const text of data.thinned) $("thinned").append(element("li", text));
  else $("thinned").append(element("li", hasRows ? "Nothing: every recorded step is drawn." : "The record has no rows yet."));

  const menu = $("quantity");
  for (const [name, part] of [["Measured steps", data.measured], ["Between measured steps", data.predicted]]) {
    const group = element("optgroup");
    group.label = name;
    for (const q of quantities.filter((one) => one.part === part)) { const option = element("option", q.label); option.value = q.id; group.append(option); }
    if (group.children.length) menu.append(group);
  }
  $("check-box").hidden = !data.measured.total;
  $("nothing").hidden = hasRows;
  $("kind-box").hidden = !groupRows.length;
  for (const id of ["controls", "heat-panel", "lines-panel"]) $(id).hidden = !quantities.length;
  $("formula-panel").hidden = !data.measured.columns.update_rms && !data.predicted.columns.update_rms;
  $("residual-panel").hidden = !data.measured.columns.residual;
  $("loss-panel").hidden = !data.loss.steps.length;
}

// ---- drawn after every change

function drawHeat() {
  const q = quantity(), rows = shownRows();
  $("heat-title").textContent = `${q.label}, layer by step`;
  $("heat-about").textContent = q.about + " ";
  const anchor = data.guide.columns[q.key];
  if (anchor) $("heat-about").append(guideLink(anchor, "What do I do with this number?"));
  const { traces, layout, notes } = heatFigure(q, rows, { log: state.log, range: range(), showInvalid: state.showInvalid });
  const parts = [];
  if (!rows.length) parts.push([null, "No layer matches the search."]);
  if (notes.invalidCells) parts.push([css("--invalid"), `not valid (${whole(notes.invalidCells)} cells): hover for the reason`]);
  if (notes.belowCells) parts.push(["#D55E00", `zero or negative, which a logarithmic scale cannot show (${whole(notes.belowCells)})`]);
  if (notes.withheldCells) parts.push([css("--plot"), `predictions withheld (${whole(notes.withheldCells)}): ${whyWithheld}`]);
  if (notes.emptyCells) parts.push([css("--plot"), q.part === data.predicted ? `nothing recorded (${whole(notes.emptyCells)}): not a cut, or no angle yet` : `not measured (${whole(notes.emptyCells)})`]);
  if (notes.alerts) parts.push([null, "▼ alert."]);
  if (notes.showDots) parts.push([null, "●: some of the steps that it represents were not valid."]);
  else if (notes.dots) parts.push([null, `${whole(notes.dots)} cells represent several steps, some of which were not valid: see the quantity "Share not valid".`]);
  if (notes.clipped) parts.push([null, "Colors span the 1st to the 99th percentile; values beyond have the end color."]);
  legend($("heat-legend"), parts);
  return Plotly.react("heat", traces, layout, CONFIG);
}

function drawLines() {
  const q = quantity(), { traces, layout, notes } = linesFigure(q, state.picks, { log: state.log, range: range() });
  const parts = [];
  if (notes.bands) parts.push([null, q.id === "predicted:update_rms" ? `Bands: the factor of each prediction (${percent} of comparisons).` : "Bands: one standard error (only a sample of the rows was kept)."]);
  if (notes.bad) parts.push([null, `Crosses: not valid (${whole(notes.bad)}); lines skip them.`]);
  if (!state.picks.length) parts.push([null, "Pick layers above, or click on a row of the heat map."]);
  legend($("lines-legend"), parts);
  const residual = quantities.find((one) => one.id === "measured:residual");
  const work = [Plotly.react("lines", traces, layout, CONFIG)];
  if (residual) {
    const figure = residualFigure(residual, state.picks, range()), largest = largestResidual(residual, shownRows()), said = [];
    if (largest) said.push([null, `Largest of the shown layers: ${format(largest.value, 3)}, in ${data.rows[largest.row].name} at step ${whole(largest.step)}.`]);
    if (figure.notes.most >= FIRST_ORDER) said.push([null, `Between the dotted lines, first order describes the step${figure.notes.wide ? "; beyond them, the axis is logarithmic" : ""}.`]);
    legend($("residual-legend"), said);
    work.push(Plotly.react("residual", figure.traces, figure.layout, CONFIG));
  }
  if (!$("formula-panel").hidden) {
    const speed = speedFigure(state.picks, range());
    $("speed").hidden = !speed.traces.some((trace) => trace.y.some((value) => value !== null));
    if (!$("speed").hidden) work.push(Plotly.react("speed", speed.traces, speed.layout, CONFIG));
  }
  return Promise.all(work);
}

function drawFormula() {
  if ($("formula-panel").hidden) return null;
  const { traces, layout, notes } = scatterFigure(shownRows());
  const some = notes.points > 0;
  $("scatter").hidden = $("formula-about").hidden = !some;
  $("scatter").parentElement.style.gridTemplateColumns = some ? "" : "minmax(0, 1fr)";
  const why = data.measured.total ? "No valid measurement of the shown layers has a valid and linear angle before it" : "This run has no measured rows";
  const withheld = data.predicted.withheld.reduce((sum, one) => sum + one, 0);
  const left = some
    ? `${whole(notes.shown)} of ${whole(notes.points)} points drawn; ${percent} of the measured speeds are within a factor ${format(notes.factor, 3)} of the prediction, between the dotted lines. `
    : `${why}, so there is nothing to compare. `;
  const drawn = data.predicted.columns.factor ? "Right: measured (dots) and predicted speed (lines; the band is the factor of each prediction) of the layers picked above. " : "";
  $("formula-note").textContent = left + drawn + (withheld ? `${whole(withheld)} predictions are withheld: ${whyWithheld}.` : "");
  return some ? Plotly.react("scatter", traces, layout, CONFIG) : null;
}

function drawLoss() {
  if ($("loss-panel").hidden) return null;
  const { traces, layout } = lossFigure(range());
  legend($("loss-legend"), data.resumed.length ? [[null, "Dotted lines: the run was resumed."]] : []);
  return Plotly.react("loss", traces, layout, CONFIG);
}

function drawPicks() {
  const rows = shownRows(), box = $("picks");
  box.replaceChildren();
  for (const row of rows.slice(0, MOST_CHIPS)) {
    const chip = element("button", data.rows[row].name);
    chip.type = "button"; chip.dataset.row = row; chip.title = data.rows[row].name;
    chip.setAttribute("aria-pressed", String(state.picks.includes(row)));
    chip.addEventListener("click", () => togglePick(row));
    box.append(chip);
  }
  const more = rows.length > MOST_CHIPS ? ` The first ${MOST_CHIPS} are listed: narrow them with the search.` : "";
  $("picked").textContent = `${state.picks.length} layers picked (at most ${MOST_PICKS}); ${rows.length} of ${kindRows().length} match the search.${more}`;
}

function spread(rows, count) {
  if (rows.length <= count) return [...rows];
  return [...new Set(Array.from({ length: count }, (_, i) => rows[Math.round((i * (rows.length - 1)) / (count - 1))]))];
}
function togglePick(row) {
  state.picks = state.picks.includes(row) ? state.picks.filter((r) => r !== row) : [...state.picks, row].slice(-MOST_PICKS);
  drawPicks();
  drawLines();
}

// Draws from scratch: Plotly.react keeps parts of a color bar that moves.
function redraw() {
  for (const id of [...LINKED, "scatter"]) if ($(id).data) Plotly.purge(id);
  CONFIG.displayModeBar = !narrow();
  return drawAll().then(attach);
}

function drawAll() {
  const work = [drawLoss()];
  if (quantities.length) { drawPicks(); work.push(drawHeat(), drawLines(), drawFormula()); }
  return Promise.all(work);
}

// ---- the tooltip of the heat map

function tipText(row, c) {
  const q = quantity(), part = q.part, width = part.steps.length, at = row * width + c;
  const lines = [data.rows[row].name + (data.rows[row].cut === false ? " (not a cut)" : ""), `step ${whole(part.steps[c])}`];
  const value = q.values[at];
  lines.push(`${q.label}: ${format(value)} ${Number.isFinite(value) ? q.unit : ""}` + (q.key === "angle" && Number.isFinite(value) ? ` (${((value * 180) / Math.PI).toFixed(1)}°)` : ""));
  const error = q.error && part.columns[q.error] ? part.columns[q.error][at] : NaN;
  if (Number.isFinite(error)) lines.push(`standard error: ${format(error, 2)}`);
  if (q.id === "predicted:update_rms") {
    const ends = Number.isFinite(value) ? band(q, at, value, true) : null;
    if (ends) lines.push(`${percent}: within ${format(ends[0], 3)} to ${format(ends[1], 3)}`);
    if (part.withheld[at]) lines.push(`withheld: ${whyWithheld}`);
  }
  if (part === data.measured) {
    if (q.key !== "relative_update" && part.columns.relative_update) lines.push(`relative update: ${format(part.columns.relative_update[at])} per step`);
    if (part.columns.noise_floor) lines.push(`noise floor: ${format(part.columns.noise_floor[at])} per step`);
    if (part.invalid[at]) lines.push(`NOT VALID: ${part.reasons[part.why[at]] ?? "no reason given"}`);
  }
  if (part.merged[c] > 1) lines.push(`represents ${part.merged[c]} recorded steps` + (part === data.measured ? `, ${part.invalid_merged[at]} of them not valid` : ""));
  const alerts = data.alerts.filter((a) => a.row === row && a.step >= part.steps[c] && (c + 1 >= width || a.step < part.steps[c + 1]));
  for (const a of alerts.slice(0, 3)) lines.push(`▼ ${a.rule}: ${shorten(a.message ?? "", 160)}`);
  return lines.join("\n");
}

function showTip(event) {
  const point = event.points.find((p) => p.data.name === "values");
  if (!point) return;
  const [y, c] = Array.isArray(point.pointIndex) ? point.pointIndex : [point.y, data.measured.steps.indexOf(point.x)];
  const tip = $("tip");
  tip.textContent = tipText(shownRows()[y], c);
  tip.hidden = false;
  const mouse = event.event, box = tip.getBoundingClientRect();
  const x = mouse.clientX ?? 20, top = mouse.clientY ?? 20;
  tip.style.left = `${Math.max(8, Math.min(x + 14, window.innerWidth - box.width - 8))}px`;
  tip.style.top = `${top + 18 + box.height > window.innerHeight ? Math.max(8, top - box.height - 12) : top + 18}px`;
}

// ---- controls

function setRange(from, to) {
  if (!(from <= to)) return;
  state.from = Math.max(first, from);
  state.to = Math.min(last, to);
  if (state.from > state.to) { state.from = first; state.to = last; }
  $("from").value = Math.round(state.from);
  $("to").value = Math.round(state.to);
  for (const id of LINKED) if ($(id).data) Plotly.relayout(id, { "xaxis.range": range() });
}
let linking = false;
function link(id) {
  $(id).on("plotly_relayout", (change) => {
    if (linking) return;
    const low = change["xaxis.range[0]"] ?? change["xaxis.range"]?.[0], high = change["xaxis.range[1]"] ?? change["xaxis.range"]?.[1];
    if (low === undefined && !change["xaxis.autorange"]) return;
    const wanted = range();
    if (low === wanted[0] && high === wanted[1]) return;
    linking = true;
    setRange(low ?? first, high ?? last);
    setTimeout(() => { linking = false; }, 0);
  });
}
function chooseQuantity(id) {
  state.quantity = id;
  state.log = quantity().log;
  $("quantity").value = id;
  $("scale").value = state.log ? "log" : "linear";
}
function attach() {
  for (const id of LINKED) if ($(id).data) link(id);
  if (!$("heat").data) return;
  $("heat").on("plotly_hover", showTip);
  $("heat").on("plotly_unhover", () => { $("tip").hidden = true; });
  $("heat").on("plotly_click", (e) => { const p = e.points.find((one) => one.data.name === "values"); if (p) togglePick(shownRows()[p.y]); });
}
function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
}

function wire() {
  $("quantity").addEventListener("change", (e) => { chooseQuantity(e.target.value); drawHeat(); drawLines(); });
  $("scale").addEventListener("change", (e) => { state.log = e.target.value === "log"; drawHeat(); drawLines(); });
  let waiting = 0;
  $("filter").addEventListener("input", (e) => { clearTimeout(waiting); waiting = setTimeout(() => { state.search = e.target.value; drawPicks(); drawHeat(); drawFormula(); }, 150); });
  $("kind").addEventListener("change", (e) => { state.kind = e.target.value; state.picks = spread(shownRows(), MOST_PICKS); drawAll(); });
  $("show-invalid").addEventListener("change", (e) => { state.showInvalid = e.target.checked; drawHeat(); });
  for (const id of ["from", "to"]) {
    $(id).min = first; $(id).max = last;
    $(id).addEventListener("change", () => setRange(Number($("from").value), Number($("to").value)));
  }
  $("reset").addEventListener("click", () => setRange(first, last));
  $("pick-shown").addEventListener("click", () => { state.picks = spread(shownRows(), MOST_PICKS); drawPicks(); drawLines(); });
  $("pick-none").addEventListener("click", () => { state.picks = []; drawPicks(); drawLines(); });
  $("theme").addEventListener("click", () => { setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"); drawAll(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", (e) => { setTheme(e.matches ? "dark" : "light"); drawAll(); });
  let small = narrow();
  window.addEventListener("resize", () => { if (narrow() !== small) { small = narrow(); redraw(); } });
}

setTheme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
drawStatic();
drawGuide();
wire();
if (quantities.length) { chooseQuantity(state.quantity); state.picks = spread(layerRows, MOST_PICKS); }
if (hasRows) { $("from").value = first; $("to").value = last; }
drawAll().then(() => {
  attach();
  document.documentElement.dataset.ready = "yes";
});
