"use strict";
// Decodes the data of the page, and formats numbers and names.

const data = JSON.parse(document.getElementById("data").textContent);

function bytes(text) {
  const raw = atob(text), out = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) out[i] = raw.charCodeAt(i);
  return out.buffer;
}

for (const part of [data.measured, data.predicted, ...(data.others ?? [])]) { // others: further runs on the page of fastfs diff
  for (const name of Object.keys(part.columns)) part.columns[name] = new Float32Array(bytes(part.columns[name]));
  part.invalid = new Uint8Array(bytes(part.invalid));
  part.invalid_merged = new Uint16Array(bytes(part.invalid_merged));
  part.why = new Uint8Array(bytes(part.why));
}
data.predicted.withheld = new Uint8Array(bytes(data.predicted.withheld));
const percent = `${Math.round(100 * data.confidence.share)} %`;
const whyWithheld = `their factor is above ${data.confidence.largest}, or not known: fewer than 4 comparisons at the last ${data.confidence.window} measured steps`;

// The menu: quantities of measured steps, then of predicted steps.
const quantities = [];
if (data.measured.total) {
  for (const q of data.measured.quantities) quantities.push({ ...q, id: "measured:" + q.key, part: data.measured, values: data.measured.columns[q.key] });
  const share = new Float32Array(data.measured.invalid.length);
  const width = data.measured.steps.length;
  for (let i = 0; i < share.length; i++) share[i] = data.measured.invalid_merged[i] / data.measured.merged[i % width];
  quantities.push({ id: "measured:share", key: "share", label: "Share not valid", unit: "0 to 1", log: false, guarded: false, error: null, part: data.measured, values: share,
    about: "Fraction of the measured steps represented by a column that were not valid." });
}
for (const q of data.predicted.quantities) {
  const predicted = q.key === "update_rms";
  quantities.push({ ...q, id: "predicted:" + q.key, part: data.predicted, values: data.predicted.columns[q.key], guarded: false, error: null,
    label: q.label + (predicted ? ", predicted" : ", between measurements"),
    about: predicted ? `Speed by the feature speed formula with the last measured angle, at steps without a measurement; empty for layers that are not cuts. With a probability of about ${percent}, the speed is within the factor of its prediction, the band around its line.` : q.about });
}
if (data.predicted.columns.factor) quantities.push({ id: "predicted:factor", key: "factor", label: "Factor of predictions", unit: "ratio", log: true, guarded: false, error: null, part: data.predicted, values: data.predicted.columns.factor,
  about: `${percent} of the measured speeds are within this factor of what the formula predicts for the same steps, over the last ${data.confidence.window} measured steps of the layer. Above ${data.confidence.largest}, predictions are withheld.` });

// The ends of the band around a value: the factor of a prediction, or one standard error. Null if there is none.
function band(q, at, value, log) {
  if (q.id === "predicted:update_rms") { const factor = q.part.columns.factor[at]; return [value / factor, value * factor]; }
  const error = q.error && q.part.columns[q.error] ? q.part.columns[q.error][at] : NaN;
  if (!Number.isFinite(error)) return null;
  return [log ? Math.max(value - error, value * 0.02) : value - error, value + error];
}

const layerRows = data.rows.map((row, i) => i).filter((i) => !data.rows[i].group);
const groupRows = data.rows.map((row, i) => i).filter((i) => data.rows[i].group);

function format(value, digits = 4) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "-";
  if (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e6)) return Number(value.toPrecision(digits)).toExponential();
  return String(Number(value.toPrecision(digits)));
}
const whole = (value) => (Number.isFinite(value) ? value.toLocaleString("en") : "-");

// Plotly interprets some HTML in labels.
function escapeLabel(text) {
  return String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
}

// The common prefix of all names, up to and including a dot.
function sharedParents(names) {
  if (names.length < 2) return "";
  const parents = names.map((name) => name.split(".").slice(0, -1));
  const shared = [];
  for (let i = 0; parents.every((p) => i < p.length && p[i] === parents[0][i]); i++) shared.push(parents[0][i]);
  return shared.map((part) => part + ".").join("");
}

function shorten(text, most) {
  if (text.length <= most) return text;
  const head = Math.floor((most - 1) / 3);
  return text.slice(0, head) + "…" + text.slice(text.length - (most - 1 - head));
}

// Rows that match a search: parts of names, separated by commas; 10-20 and 7 are indices unless a name contains them.
function matching(rows, search) {
  const terms = search.toLowerCase().split(",").map((term) => term.trim()).filter(Boolean);
  if (!terms.length) return rows;
  return rows.filter((row) => terms.some((term) => {
    const range = /^(\d+)\s*-\s*(\d+)$/.exec(term);
    if (range) return row >= Number(range[1]) && row <= Number(range[2]);
    return data.rows[row].name.toLowerCase().includes(term);
  }));
}

function percentile(sorted, share) {
  if (!sorted.length) return NaN;
  return sorted[Math.min(sorted.length - 1, Math.max(0, Math.round(share * (sorted.length - 1))))];
}
