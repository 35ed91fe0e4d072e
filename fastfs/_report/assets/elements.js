"use strict";
// Elements of both pages. Text of the record is set as textContent, never as HTML.

const $ = (id) => document.getElementById(id);
// By default Plotly offers to upload a chart to its cloud; no data may leave this page.
const CONFIG = { responsive: true, displaylogo: false, showSendToCloud: false, plotlyServerURL: "", displayModeBar: !narrow(), modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"], doubleClick: "reset" };

function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined && text !== null) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function fillTable(table, columns, rows) {
  table.replaceChildren();
  const head = element("tr");
  for (const [title, numeric] of columns) head.append(element("th", title, numeric ? "n" : ""));
  if (columns.some(([title]) => title)) { const top = element("thead"); top.append(head); table.append(top); }
  const body = element("tbody");
  for (const row of rows) {
    const line = element("tr");
    row.forEach((cell, i) => {
      const made = element("td", cell instanceof Node ? null : cell, columns[i][1] ? "n" : "");
      if (cell instanceof Node) made.append(cell);
      line.append(made);
    });
    body.append(line);
  }
  table.append(body);
}

function legend(node, parts) {
  node.replaceChildren();
  for (const [color, words] of parts) {
    const text = words.endsWith(".") ? words : words + ".";
    if (color) { const mark = element("i"); mark.style.background = color; node.append(mark); }
    node.append(document.createTextNode((color ? "" : " ") + text));
  }
}
