"use strict";
// What a drawn page does: shows numbers on hover, opens matrices, lists and downloads numbers, switches colours.
// Text from outside reaches the document as text only.

const MOST_ROWS = 400;
const root = document.documentElement;
const spoken = document.getElementById("spoken"), tip = document.getElementById("tip");
const LIGHT = document.getElementById("light").textContent;

// ---- words and numbers, spelled as in words.py

const trimmed = text => text.includes(".") ? text.replace(/0+$/, "").replace(/\.$/, "") : text;
const FORMATS = {
  text: value => String(value),
  count: value => value.toLocaleString("en-US"),
  number: value => String(Number(value.toPrecision(4))),
  times(value) {
    if (value === 0) return "0×";
    if (value < 0.01) return "<.01×";
    if (value < 0.995) return value.toFixed(2) + "×";
    return value.toFixed(value < 9.95 ? 1 : 0) + "×";
  },
  percent(value) {
    const hundredths = 100 * value;
    if (value > 0 && value < 0.0001) return "<0.01 %";
    if (hundredths <= 0 || hundredths >= 99.95) return hundredths.toFixed(0) + " %";
    if (hundredths >= 9.95) return hundredths.toFixed(hundredths < 99 ? 0 : 1) + " %";
    let digits = 1;
    while (hundredths < 0.95 * 10 ** (1 - digits)) digits++;
    return trimmed(hundredths.toFixed(digits)) + " %";
  },
};
const spelled = (value, format) => value === null || value === undefined ? "–" : (FORMATS[format] || FORMATS.text)(value);
const stem = text => text.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, "") || "figure";

function element(tag, text, attributes = {}) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

// ---- tables: {columns: name -> format, rows}

const names = table => Object.keys(table.columns);

function csv(table) {
  // a spreadsheet runs text that begins like a formula; one before it makes it text
  const plain = value => typeof value === "string" ? value.replace(/^(?=[=+\-@\t\r])/, "'") : String(value);
  const quoted = value => value === null ? "" : /[",\n\r]/.test(plain(value)) ? `"${plain(value).replace(/"/g, '""')}"` : plain(value);
  return "\ufeff" + [names(table), ...table.rows].map(row => row.map(quoted).join(",")).join("\r\n") + "\r\n";
}

function save(name, blob) {
  const link = element("a", undefined, {download: name, href: URL.createObjectURL(blob)});
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function numbersOf(table) {
  const box = element("div", undefined, {class: "table", tabindex: "0", role: "region", "aria-label": "the numbers"});
  const made = box.appendChild(element("table")), formats = Object.values(table.columns);
  const head = made.appendChild(element("thead")).appendChild(element("tr"));
  for (const heading of names(table)) head.append(element("th", heading, {scope: "col"}));
  const body = made.appendChild(element("tbody"));
  for (const row of table.rows.slice(0, MOST_ROWS)) {
    const line = body.appendChild(element("tr"));
    row.forEach((value, i) => line.append(element("td", spelled(value, formats[i]))));
  }
  if (table.rows.length > MOST_ROWS) box.append(element("p", `The first ${MOST_ROWS} of ${FORMATS.count(table.rows.length)} rows; the CSV has all.`, {class: "note"}));
  return box;
}

// ---- charts: drawn already; each mark and cell has the number of its row

const charts = [];

function build(figure, spec) {
  const chart = {figure, spec, drawn: figure.querySelector(".drawn")};
  const under = figure.appendChild(element("div", undefined, {class: "under"}));
  const button = (label, what, action) => under.appendChild(element("button", label, {type: "button", "aria-label": `${what}: ${spec.title}`})).addEventListener("click", action);
  button("CSV", "download the numbers", () => save(fileName(chart) + ".csv", new Blob([csv(chart.spec.table)], {type: "text/csv"})));
  button("SVG", "download as SVG", () => save(fileName(chart) + ".svg", new Blob([exported(chart)], {type: "image/svg+xml"})));
  button("PNG", "download as PNG", () => exportPng(chart));
  const details = under.appendChild(element("details"));
  details.append(element("summary", "numbers"));
  details.addEventListener("toggle", () => {
    if (details.open && !details.querySelector("table")) details.append(numbersOf(chart.spec.table));
  });
  chart.details = details;
  chart.drawn.addEventListener("pointermove", event => show(chart, event.target, event));
  chart.drawn.addEventListener("pointerleave", () => { tip.hidden = true; });
  chart.drawn.addEventListener("click", event => open(chart, event.target));
  if ("opens" in chart.drawn.dataset) walkable(chart);
  charts.push(chart);
  return chart;
}

const rowOf = (chart, mark) => mark && mark.dataset && mark.dataset.row !== undefined ? chart.spec.table.rows[mark.dataset.row] : null;

function describe(table, row) {
  return names(table).map((name, i) => row[i] === null || row[i] === "all" ? null : `${name}: ${spelled(row[i], table.columns[name])}`).filter(Boolean)
    .map(line => line === "tokens: 0" ? "never given a token" : line);
}

function show(chart, mark, at) {
  const row = rowOf(chart, mark);
  tip.hidden = !row;
  if (!row) return;
  tip.textContent = describe(chart.spec.table, row).join("\n");
  const {width, height} = tip.getBoundingClientRect();
  tip.style.left = Math.max(4, Math.min(at.clientX + 14, window.innerWidth - width - 4)) + "px";
  tip.style.top = Math.max(4, at.clientY + 14 + height > window.innerHeight ? at.clientY - height - 10 : at.clientY + 14) + "px";
}
window.addEventListener("scroll", () => { tip.hidden = true; }, {passive: true});

// from cell to cell by keyboard
function walkable(chart) {
  const placeOf = cell => cell.dataset.at.split(",").map(Number);
  const cells = () => [...chart.drawn.querySelectorAll("[data-at]")];
  let at = null; // the cell
  // the first one, then the nearest in a direction: a layer need not have every component
  const after = ([across, down]) => {
    if (!at) return cells()[0] || null;
    const [x, y] = placeOf(at), far = cell => { const [i, j] = placeOf(cell); return (across ? j === y : i === x) ? (i - x) * across + (j - y) * down : 0; };
    return cells().filter(cell => far(cell) > 0).reduce((best, cell) => best && far(best) < far(cell) ? best : cell, null) || at;
  };
  const leave = () => { for (const cell of chart.drawn.querySelectorAll(".at")) cell.classList.remove("at"); };
  chart.drawn.addEventListener("keydown", event => {
    const move = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[event.key];
    if (move) {
      event.preventDefault();
      at = after(move);
      if (!at) return;
      leave();
      const box = at.getBoundingClientRect();
      at.classList.add("at");
      at.scrollIntoView({block: "nearest", inline: "nearest"});
      show(chart, at, {clientX: box.right, clientY: box.bottom});
      spoken.textContent = describe(chart.spec.table, rowOf(chart, at)).join(", ");
    } else if (at && (event.key === "Enter" || event.key === " ")) {
      open(chart, at);
      event.preventDefault();
    }
  });
  chart.drawn.addEventListener("blur", () => { leave(); tip.hidden = true; });
}

// pictures: light, opaque, with title
const headingOf = chart => chart.figure.closest("section").querySelector("h2").textContent;
const fileName = chart => stem(`${headingOf(chart)} ${chart.spec.title}`);

function exported(chart, scale = 1) {
  const svg = chart.drawn.querySelector("svg"), {width, height} = svg.viewBox.baseVal, top = 30;
  const copy = svg.cloneNode(true);
  const style = document.createElementNS(svg.namespaceURI, "style"), ground = document.createElementNS(svg.namespaceURI, "rect"), title = document.createElementNS(svg.namespaceURI, "text");
  for (const [name, value] of Object.entries({class: "paper", x: 0, y: -top, width, height: height + top})) ground.setAttribute(name, value);
  for (const [name, value] of Object.entries({class: "ink", x: 8, y: 18 - top, "font-size": 14, "font-weight": 600})) title.setAttribute(name, value);
  style.textContent = LIGHT;
  title.textContent = `${headingOf(chart)}: ${chart.spec.title}`;
  copy.prepend(style, ground, title);
  copy.setAttribute("viewBox", `0 ${-top} ${width} ${height + top}`);
  copy.setAttribute("width", width * scale);
  copy.setAttribute("height", (height + top) * scale);
  return new XMLSerializer().serializeToString(copy);
}

function exportPng(chart) {
  const image = new Image();
  image.addEventListener("load", () => {
    const canvas = element("canvas", undefined, {width: image.width, height: image.height});
    canvas.getContext("2d").drawImage(image, 0, 0);
    canvas.toBlob(blob => save(fileName(chart) + ".png", blob));
  });
  image.src = "data:image/svg+xml;charset=utf-8," + encodeURIComponent(exported(chart, 3));
}

// ---- inside a matrix

const viewers = new Map(); // section -> viewer

function open(chart, mark) {
  const row = rowOf(chart, mark), viewer = viewers.get(chart.figure.closest("section"));
  if (!row || !viewer || !("opens" in chart.drawn.dataset)) return;
  const value = name => chart.spec.table.columns[name] === undefined ? null : row[names(chart.spec.table).indexOf(name)];
  const wanted = {};
  for (const name of ["layer", "component", "expert"]) wanted[name] = value(name) === "all" ? null : value(name);
  viewer(wanted, true);
}

const layerLabel = matrix => matrix.layer === null ? "none" : (matrix.stack ? matrix.stack + " " : "") + matrix.layer;
const expertLabel = matrix => matrix.expert === null ? "–" : String(matrix.expert);
const edgesOf = (extent, bins) => [...Array(bins + 1).keys()].map(i => Math.ceil(i * extent / bins));

function decoded(matrix) {
  const bytes = Uint8Array.from(atob(matrix.counts), character => character.charCodeAt(0));
  const size = matrix.bytes;
  return Array.from({length: bytes.length / size}, (_, i) => {
    let value = 0;
    for (let j = size - 1; j >= 0; j--) value = value * 256 + bytes[i * size + j];
    return value;
  });
}

function binLabels(matrix, side, edges) {
  const heads = matrix[side + "_heads"], extent = matrix[side === "row" ? "rows" : "columns"], unit = matrix[side + "_unit"];
  return edges.slice(0, -1).map((from, i) => {
    const to = edges[i + 1] - 1;
    if (!heads) return from === to ? `${unit} ${from}` : `${unit}s ${from}–${to}`;
    const size = extent / heads, first = Math.floor(from / size), last = Math.floor(to / size);
    if (first < last) return `heads ${first}–${last}`;
    return to - from + 1 === size ? `head ${first}` : `head ${first}, channels ${from % size}–${to % size}`;
  });
}

// "head 1 (61 %) and head 0 (39 %)" of the rows' or columns' sums
function fullest(matrix, counts, side, labels) {
  const across = matrix.shape[1], sums = labels.map(() => 0);
  counts.forEach((count, i) => { sums[side === "row" ? Math.floor(i / across) : i % across] += count; });
  const best = sums.map((sum, i) => [sum, labels[i]]).sort((a, b) => b[0] - a[0]).slice(0, 2);
  return best.map(([sum, label]) => `${label} (${FORMATS.percent(sum / matrix.num_selected)})`).join(" and ");
}

// bins as a table, and as a drawing like those of drawing.py
function density(matrix, counts, rate, limit, labels) {
  const [height, across] = matrix.shape, rows = edgesOf(matrix.rows, height), columns = edgesOf(matrix.columns, across);
  const cell = Math.max(8, Math.min(22, 620 / across)), line = Math.max(8, Math.min(22, 560 / height)), left = 60;
  const table = {columns: {[matrix.row_unit + "s"]: "text", [matrix.column_unit + "s"]: "text", density: "times", selected: "count", weights: "count"}, rows: []};
  const size = `${Math.ceil(left + across * cell + 6)} ${Math.ceil(height * line + 40)}`, [w, h] = size.split(" ");
  const parts = [`<svg viewBox="0 0 ${size}" width="${w}" height="${h}" style="font-family:system-ui,sans-serif;font-size:12px">`];
  counts.forEach((count, i) => {
    const r = Math.floor(i / across), c = i % across;
    const weights = (rows[r + 1] - rows[r]) * (columns[c + 1] - columns[c]), times = count / weights / rate;
    const place = times > 0 ? Math.min(1, Math.max(0, 0.5 + Math.log2(times) / (2 * limit))) : 0;
    parts.push(`<rect class="h${Math.round(32 * place)}" x="${(left + c * cell).toFixed(1)}" y="${(r * line).toFixed(1)}" width="${(cell - 1).toFixed(1)}" height="${(line - 1).toFixed(1)}" data-row="${i}"/>`);
    table.rows.push([labels.row[r], labels.column[c], times, count, weights]);
  });
  const text = (x, y, anchor, words, look = "ink") => parts.push(`<text class="${look}" x="${x.toFixed(1)}" y="${y.toFixed(1)}" text-anchor="${anchor}">${words}</text>`);
  const ticks = (heads, edges, bins, room, put) => {
    const all = heads ? [...Array(heads).keys()].map(n => [(n + 0.5) * bins / heads, n]) : edges.slice(0, -1).map((edge, n) => [n, edge]);
    const step = Math.ceil((heads ? 18 : 36) / (room * bins / all.length));
    all.filter((_, n) => n % step === 0).forEach(([at, label]) => put(at * room, label));
  };
  ticks(matrix.column_heads, columns, across, cell, (at, label) => text(left + at, height * line + 16, matrix.column_heads ? "middle" : "start", label));
  ticks(matrix.row_heads, rows, height, line, (at, label) => text(left - 6, at + (matrix.row_heads ? 4 : 10), "end", label));
  text(left + across * cell / 2, height * line + 33, "middle", `across: ${matrix.column_heads ? "heads" : matrix.column_unit + "s"}; down: ${matrix.row_heads ? "heads" : matrix.row_unit + "s"}`, "muted");
  return {table, svg: parts.join("") + "</svg>"};
}

function viewer(box) {
  const spec = JSON.parse(box.querySelector("script").textContent);
  const form = box.querySelector("form"), which = box.querySelector(".which"), figure = box.querySelector("figure");
  const all = spec.matrices, options = {layer: layerLabel, component: matrix => matrix.component, expert: expertLabel};
  if (!all.length) return null;
  let chart = null;
  const fill = (name, list, chosen) => {
    const select = form.elements[name];
    select.replaceChildren(...[...new Set(list)].map(value => element("option", value)));
    select.value = chosen;
    select.parentElement.hidden = select.length < 2 && list[0] === "–";
  };
  // the fullest matrix that fits; what does not fit is given up from the right
  const show = (wanted, scroll) => {
    const asked = Object.entries(wanted).filter(([, value]) => value !== null && value !== undefined);
    let fitting = all, missed = false;
    for (const [name, value] of asked) {
      const fewer = fitting.filter(matrix => options[name](matrix) === value);
      if (fewer.length) fitting = fewer; else missed = true;
    }
    if (scroll) box.scrollIntoView({block: "nearest"});
    figure.hidden = missed;
    if (missed) {
      which.textContent = `${asked.map(([name, value]) => `${name} ${value}`).join(", ")}: holds no selected weights${spec.num_left_out ? ", or too few to be on this page" : ""}.`;
      return;
    }
    const matrix = fitting.reduce((best, each) => each.num_selected > best.num_selected ? each : best), counts = decoded(matrix);
    const alike = all.filter(m => layerLabel(m) === layerLabel(matrix));
    fill("layer", all.map(layerLabel), layerLabel(matrix));
    fill("component", alike.map(m => m.component), matrix.component);
    fill("expert", alike.filter(m => m.component === matrix.component).map(expertLabel), expertLabel(matrix));
    const weights = matrix.rows * matrix.columns, part = matrix.num_selected / weights;
    const labels = {row: binLabels(matrix, "row", edgesOf(matrix.rows, matrix.shape[0])), column: binLabels(matrix, "column", edgesOf(matrix.columns, matrix.shape[1]))};
    const made = density(matrix, counts, part, spec.limit, labels);
    which.textContent = `${matrix.name}: ${FORMATS.count(matrix.num_selected)} of ${FORMATS.count(weights)} weights selected (${FORMATS.percent(part)}, ${FORMATS.times(part / spec.rate)}). Fullest by output: ${fullest(matrix, counts, "row", labels.row)}; by input: ${fullest(matrix, counts, "column", labels.column)}.`;
    figure.querySelector(".drawn").innerHTML = made.svg;
    chart = chart || build(figure, {});
    chart.spec = {title: matrix.name, table: made.table};
    chart.details.open = false;
    chart.details.querySelectorAll(".table").forEach(table => table.remove());
  };
  form.addEventListener("change", event => {
    const order = Object.keys(options), upTo = order.indexOf(event.target.name);
    const wanted = {};
    order.slice(0, upTo + 1).forEach(name => { if (!form.elements[name].parentElement.hidden) wanted[name] = form.elements[name].value; });
    // keep the component across layers where there is such a matrix
    if (event.target.name === "layer" && all.some(m => layerLabel(m) === wanted.layer && m.component === form.elements.component.value)) wanted.component = form.elements.component.value;
    show(wanted, false);
  });
  form.addEventListener("submit", event => event.preventDefault());
  return show;
}

// ---- responses

function responses(details) {
  const {columns, rows} = JSON.parse(details.querySelector("script").textContent);
  const form = details.querySelector("form"), box = details.querySelector(".answers"), more = details.querySelector(".more"), count = details.querySelector(".count");
  const STEP = 20;
  let found = [], shown = 0;
  const sets = ["all", ...new Set(rows.map(row => row.set))];
  form.elements.set.replaceChildren(...sets.map(name => element("option", name)));
  const tags = answer => answer ? answer.tags.filter(tag => !tag.startsWith("safety")).join("; ") : null;
  const differs = row => new Set(row.answers.filter(Boolean).map(tags)).size > 1;
  const add = () => {
    for (const row of found.slice(shown, shown + STEP)) {
      const entry = box.appendChild(element("div", undefined, {class: "answer"}));
      entry.append(element("p", row.prompt));
      const list = entry.appendChild(element("div", undefined, {class: "columns"}));
      row.answers.forEach((answer, i) => {
        if (!answer) return;
        const cell = list.appendChild(element("div"));
        cell.append(element("h4", columns[i] + (answer.tags.length ? ` – ${answer.tags.join("; ")}` : "")), element("blockquote", answer.text));
      });
    }
    shown = Math.min(found.length, shown + STEP);
    count.textContent = `${FORMATS.count(shown)} of ${FORMATS.count(found.length)} prompts`;
    more.hidden = shown >= found.length;
  };
  const filter = () => {
    const words = form.elements.find.value.toLowerCase();
    found = rows.filter(row => (form.elements.set.value === "all" || row.set === form.elements.set.value)
      && (form.elements.show.value === "all" || differs(row))
      && (!words || row.prompt.toLowerCase().includes(words) || row.answers.some(answer => answer && answer.text.toLowerCase().includes(words))));
    shown = 0;
    box.replaceChildren();
    add();
  };
  form.addEventListener("input", filter);
  form.addEventListener("submit", event => event.preventDefault());
  more.addEventListener("click", add);
  details.addEventListener("toggle", () => { if (details.open && !shown) filter(); });
}

// ---- all of it

for (const figure of document.querySelectorAll("figure.chart")) {
  const data = figure.querySelector("script");
  if (data) build(figure, JSON.parse(data.textContent));
}
for (const box of document.querySelectorAll(".matrices")) {
  const made = viewer(box);
  if (made) {
    viewers.set(box.closest("section"), made);
    made({}, false);
  }
}
for (const details of document.querySelectorAll("details.responses")) responses(details);

const themeButton = document.getElementById("theme"), darkMode = window.matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (root.dataset.theme || (darkMode.matches ? "dark" : "light")) === "dark";
const nameTheme = () => { themeButton.textContent = isDark() ? "Light" : "Dark"; themeButton.setAttribute("aria-label", `Switch to ${isDark() ? "light" : "dark"} colours`); };
themeButton.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; nameTheme(); });
darkMode.addEventListener("change", nameTheme);
nameTheme();
root.dataset.drawn = String(charts.length);
