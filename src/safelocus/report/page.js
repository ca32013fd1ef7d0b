"use strict";
// Draws what blocks.py describes. Text from outside reaches the document as text only, and plotly's labels escaped.

const PALETTE = JSON.parse(document.getElementById("palette").textContent);
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"];
const MARKS = ["circle", "square", "diamond", "triangle-up", "x", "cross", "triangle-down", "star"];
const MOST_ROWS = 400;
const root = document.documentElement;
const spoken = document.getElementById("spoken");
const darkMode = window.matchMedia("(prefers-color-scheme: dark)");

// ---- words and numbers, spelled as in text.py

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
const narrow = value => value === 0 ? "0" : value < 0.05 ? "<.1" : value.toFixed(value < 9.95 ? 1 : 0);
const plain = text => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const wrapped = (text, width) => {
  const lines = [""];
  for (const word of String(text).split(" ")) {
    if (lines[lines.length - 1] && (lines[lines.length - 1] + " " + word).length > width) lines.push("");
    lines[lines.length - 1] += (lines[lines.length - 1] && " ") + word;
  }
  return lines.map(plain).join("<br>");
};
const stem = text => text.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, "") || "figure";

function element(tag, text, attributes = {}) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

// ---- tables: {columns: name -> format, rows}

const names = table => Object.keys(table.columns);
const column = (table, name) => names(table).indexOf(name);

function describe(table, row, skip) {
  return names(table).map((name, i) => skip.includes(name) || row[i] === null ? null : [name, spelled(row[i], table.columns[name])]).filter(Boolean);
}

function csv(table) {
  const quoted = value => value === null ? "" : /[",\n\r]/.test(String(value)) ? `"${String(value).replace(/"/g, '""')}"` : String(value);
  return [names(table), ...table.rows].map(row => row.map(quoted).join(",")).join("\r\n") + "\r\n";
}

function save(name, text) {
  const link = element("a", undefined, {download: name, href: URL.createObjectURL(new Blob(["\ufeff" + text], {type: "text/csv"}))});
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function htmlTable(headings, rows) {
  const box = element("div", undefined, {class: "table", tabindex: "0", role: "region", "aria-label": "the numbers"});
  const table = box.appendChild(element("table"));
  const head = table.appendChild(element("thead")).appendChild(element("tr"));
  for (const heading of headings) head.append(element("th", heading, {scope: "col"}));
  const body = table.appendChild(element("tbody"));
  for (const row of rows) {
    const line = body.appendChild(element("tr"));
    for (const cell of row) line.append(element("td", cell));
  }
  return box;
}

// heatmaps as a grid where that fits, everything else as it is
function numbersOf(spec) {
  const {table} = spec;
  if (spec.kind === "heat" && spec.ys.length <= 16 && spec.panels.length === 1) {
    const cells = new Map(table.rows.map(row => [row[column(table, spec.x)] + "\n" + row[column(table, spec.y)], row]));
    const z = column(table, spec.panels[0].z), format = table.columns[spec.panels[0].z];
    const ys = [...spec.ys, "all"];
    return htmlTable([spec.x, ...ys], [...spec.xs, "all"].map(x => [x, ...ys.map(y => {
      const row = cells.get(x + "\n" + y);
      return row ? spelled(row[z], format) : "–";
    })]));
  }
  const box = htmlTable(names(table), table.rows.slice(0, MOST_ROWS).map(row => row.map((value, i) => spelled(value, Object.values(table.columns)[i]))));
  if (table.rows.length > MOST_ROWS) box.append(element("p", `The first ${MOST_ROWS} of ${FORMATS.count(table.rows.length)} rows; the CSV has all.`, {class: "note"}));
  return box;
}

// ---- charts: functions from (spec, panel, width, theme) to [data, layout]

function themeNow(forced) {
  const kind = forced || root.dataset.theme || (darkMode.matches ? "dark" : "light");
  const theme = {kind, heat: PALETTE[kind].heat.map((colour, i, all) => [i / (all.length - 1), colour]), series: PALETTE[kind].series};
  const style = getComputedStyle(root);
  for (const name of ["paper", "ink", "muted", "line", "accent", "panel", "unrouted"]) theme[name] = style.getPropertyValue("--" + name).trim();
  return theme;
}

function common(theme) {
  const axis = {fixedrange: true, zeroline: false, showgrid: false, ticks: "", ticklabelstandoff: 5, showline: false, tickfont: {size: 12}};
  return {
    axis,
    grid: {...axis, showgrid: true, gridcolor: theme.line},
    layout: {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", dragmode: false, showlegend: false, hovermode: "closest",
      font: {family: getComputedStyle(document.body).fontFamily, color: theme.ink, size: 12},
      hoverlabel: {bgcolor: theme.panel, bordercolor: theme.line, font: {color: theme.ink, size: 13}, align: "left"},
    },
  };
}

const axisTitle = (text, theme) => ({text: plain(text), font: {size: 12, color: theme.muted}, standoff: 8});
const transparent = (colour, alpha) => `rgba(${[1, 3, 5].map(i => parseInt(colour.slice(i, i + 2), 16)).join(",")},${alpha})`;

// every n-th label, so that labels stay apart; the totals' always
function thinned(places, labels, room) {
  const step = [1, 2, 4, 8, 16, 32, 64].find(n => n * room >= 1) || 128;
  const kept = places.map((_, i) => i).filter(i => labels[i] === "all" || i % step === 0);
  return {tickmode: "array", tickvals: kept.map(i => places[i]), ticktext: kept.map(i => plain(labels[i]).replace(" ", "<br>"))};
}

const logged = value => value === null || value === undefined ? null : value > 0 ? Math.log2(value) : -99;

function heatHover(spec, row, z) {
  const at = name => row[column(spec.table, name)];
  const place = [at(spec.x) === "all" ? null : `${spec.x} ${at(spec.x)}`, at(spec.y) === "all" ? null : spec.y === "component" ? at(spec.y) : `${spec.y} ${at(spec.y)}`];
  const lines = describe(spec.table, row, [spec.x, spec.y, z]).map(([name, value]) => name === "tokens" && value === "0" ? "never given a token" : `${name}: ${value}`);
  return [`${place.filter(Boolean).join(", ")}: ${spelled(at(z), spec.table.columns[z])}`, ...lines];
}

// cells, and totals at the far ends: [{xs, ys, rows}], with places along each axis
function heatBlocks(spec) {
  const {table} = spec, x = column(table, spec.x), y = column(table, spec.y);
  const cells = new Map(table.rows.map(row => [row[x] + "\n" + row[y], row]));
  const span = Math.max(1, spec.xs.length / 24); // the totals stay legible beside many layers
  const farX = spec.xs.length - 0.5 + 0.35 * span, farY = spec.ys.length + 0.35;
  const across = spec.xs.map((_, i) => i), down = spec.ys.map((_, i) => i);
  const grid = (xs, ys) => ys.map(j => xs.map(i => cells.get(i + "\n" + j) || null));
  const blocks = [{x: across, y: down, rows: grid(spec.xs, spec.ys)}];
  const right = cells.has("all\n" + spec.ys[0]), below = cells.has(spec.xs[0] + "\nall");
  if (right) blocks.push({x: [farX, farX + span], y: down, rows: grid(["all"], spec.ys), span});
  if (below) blocks.push({x: across, y: [farY], rows: grid(spec.xs, ["all"])});
  return {
    blocks,
    xs: right ? [...across, farX + span / 2] : across, xLabels: right ? [...spec.xs, "all"] : spec.xs, end: right ? farX + span : spec.xs.length - 0.5,
    ys: below ? [...down, farY] : down, yLabels: below ? [...spec.ys, "all"] : spec.ys,
  };
}

function heat(spec, panel, width, theme) {
  const {axis, layout} = common(theme);
  const placed = heatBlocks(spec);
  const z = column(spec.table, panel.z), tokens = column(spec.table, "tokens");
  const left = 14 + 7 * Math.max(...placed.yLabels.map(label => label.length));
  const cell = (width - left - 4) / (placed.end + 0.5);
  const stacked = placed.xLabels.some(label => label.includes(" "));
  const data = [];
  for (const block of placed.blocks) {
    const unrouted = row => row !== null && tokens >= 0 && row[tokens] === 0;
    const trace = {
      type: "heatmap", x: block.x, y: block.y, hoverinfo: "text", hoverongaps: false, showscale: false,
      xgap: cell > 9 ? 1.5 : cell > 4 ? 0.5 : 0, ygap: spec.row > 9 ? 1.5 : 0.5, zmin: -spec.limit, zmax: spec.limit,
      hovertext: block.rows.map(rows => rows.map(row => row ? wrappedHover(heatHover(spec, row, panel.z)) : "")),
    };
    const shown = rows => rows.map(row => row === null || unrouted(row) ? null : row[z]);
    const text = cell * (block.span || 1) >= 27 && spec.row >= 17 ? {text: block.rows.map(rows => shown(rows).map(v => v === null ? "" : narrow(v))), texttemplate: "%{text}", textfont: {size: 12}} : {};
    data.push({...trace, z: block.rows.map(rows => shown(rows).map(logged)), colorscale: theme.heat, ...text});
    if (block.rows.some(rows => rows.some(unrouted))) {
      data.push({...trace, z: block.rows.map(rows => rows.map(row => unrouted(row) ? 0 : null)), colorscale: [[0, theme.unrouted], [1, theme.unrouted]]});
    }
  }
  Object.assign(layout, {
    height: spec.row * (Math.max(...placed.ys) + 1) + 48 + (stacked ? 12 : 0), margin: {l: left, r: 4, t: 8, b: 40 + (stacked ? 12 : 0)},
    xaxis: {...axis, ...thinned(placed.xs, placed.xLabels, cell / (stacked ? 52 : 20)), title: axisTitle(spec.x, theme), range: [-0.5, placed.end]},
    yaxis: {...axis, ...thinned(placed.ys, placed.yLabels, spec.row / 14), range: [Math.max(...placed.ys) + 0.5, -0.5]},
  });
  return [data, layout];
}

const wrappedHover = lines => `<b>${plain(lines[0])}</b><br>${lines.slice(1).map(plain).join("<br>")}`;
const heatWidth = spec => 90 * (heatBlocks(spec).end + 0.5) + 100;

// series -> rows, in order of appearance; with each one's colour, dash and mark
function seriesOf(spec, theme) {
  const at = column(spec.table, spec.series), found = new Map();
  for (const row of spec.table.rows) {
    if (!found.has(row[at])) found.set(row[at], []);
    found.get(row[at]).push(row);
  }
  return [...found].map(([name, rows], i) => {
    const style = (spec.styles || {})[name] || {};
    const number = style.colour === undefined ? i : style.colour;
    return {name, rows, colour: theme.series[number % theme.series.length], dash: style.dash || DASHES[i % DASHES.length], mark: MARKS[i % MARKS.length]};
  });
}

function valueAxis(spec, grid) {
  const format = spec.table.columns[spec.value];
  const axis = {...grid, ...(spec.range ? {range: [...spec.range]} : {})};
  if (spec.range && spec.range[1] === null) {
    const most = Math.max(spec.reference || 0, ...spec.table.rows.map(row => Math.max(row[column(spec.table, spec.value)] || 0, row[column(spec.table, spec.high || "high")] || 0)));
    axis.range = [spec.range[0], most * 1.06];
  }
  if (format === "percent") {
    const tens = spec.range && spec.range[0] < -0.5 ? [-10, -5, 0, 5, 10] : [0, 2, 4, 6, 8, 10];
    Object.assign(axis, {tickvals: tens.map(ten => ten / 10), ticktext: tens.map(ten => `${10 * ten} %`.replace("-", "\u2212"))});
  }
  if (format === "times") axis.ticksuffix = "×";
  return axis;
}

function pointHover(spec, row) {
  const value = row[column(spec.table, spec.value)], format = spec.table.columns[spec.value];
  const low = row[column(spec.table, spec.low || "low")], high = row[column(spec.table, spec.high || "high")];
  const interval = low === undefined || low === null ? "" : ` [${spelled(low, format)}, ${spelled(high, format)}]`;
  const named = [spec.series, spec.value, spec.low || "low", spec.high || "high"];
  return wrappedHover([`${row[column(spec.table, spec.series)]}: ${spelled(value, format)}${interval}`, ...describe(spec.table, row, named).map(([name, shown]) => `${name}: ${shown}`)]);
}

function lines(spec, panel, width, theme) {
  const {axis, grid, layout} = common(theme);
  const {table} = spec, x = column(table, spec.x), y = column(table, spec.value), low = column(table, "low"), high = column(table, "high");
  const category = spec.x_type === "category";
  const places = category ? [...new Set(table.rows.map(row => row[x]))] : null;
  const place = row => category ? places.indexOf(row[x]) : row[x];
  const series = seriesOf(spec, theme), data = [], bands = [];
  const format = table.columns[spec.value];
  for (const {name, rows, colour, dash, mark} of series) {
    const known = low < 0 ? [] : rows.filter(row => row[low] !== null && row[high] !== null);
    if (known.length > 1) {
      bands.push({x: [...known.map(place), ...known.map(place).reverse()], y: [...known.map(row => row[high]), ...known.map(row => row[low]).reverse()], fill: "toself", fillcolor: transparent(colour, theme.kind === "dark" ? 0.2 : 0.14), line: {width: 0}, mode: "lines", hoverinfo: "skip", showlegend: false});
    }
    const alone = known.length === 1 ? {error_y: {type: "data", symmetric: false, array: known.map(row => row[high] - row[y]), arrayminus: known.map(row => row[y] - row[low]), color: colour, thickness: 1.5, width: 4}} : {};
    data.push({
      name: plain(name), x: rows.map(place), y: rows.map(row => row[y]), mode: spec.plain ? "lines" : "lines+markers", hoverinfo: "text", hovertext: rows.map(row => pointHover(spec, row)),
      line: {color: colour, width: 2, dash}, marker: {color: colour, size: 7, symbol: mark}, cliponaxis: false, ...alone,
    });
  }
  layout.annotations = [];
  if (spec.mark) {
    data.push({x: [spec.mark.x], y: [spec.mark.y], mode: "markers", hoverinfo: "skip", showlegend: false, marker: {size: 9, color: theme.ink}, cliponaxis: false});
    layout.annotations.push({x: spec.x_type === "log" ? Math.log10(spec.mark.x) : spec.mark.x, y: spec.mark.y, text: spec.mark.label.map(plain).join(width < 480 ? "<br>" : " "), align: "right", showarrow: false, xanchor: "right", yanchor: "bottom", xshift: -6, yshift: 4, font: {size: 13, color: theme.ink}});
  }
  if (spec.reference !== undefined && spec.reference !== null) layout.shapes = [{type: "line", xref: "paper", x0: 0, x1: 1, y0: spec.reference, y1: spec.reference, line: {color: theme.muted, width: 1.25, dash: "dot"}, layer: "below"}];
  const across = {...grid, title: spec.x_title ? axisTitle(spec.x_title, theme) : undefined, automargin: false};
  if (category) Object.assign(across, {tickmode: "array", tickvals: places.map((_, i) => i), ticktext: places.map(plain), range: [-0.35, places.length - 0.65]});
  else if (spec.x_type === "log") {
    across.type = "log";
    if (!spec.ticks) {
      const values = [...new Set(table.rows.map(row => row[x]))].sort((a, b) => a - b);
      const step = Math.ceil(values.length / (width / 55)), some = values.filter((_, i) => i % step === 0);
      Object.assign(across, {tickmode: "array", tickvals: some, ticktext: some.map(FORMATS.number)});
    } else {
      const thin = width < 480 ? (_, i) => (spec.ticks.length - 1 - i) % 2 === 0 : () => true;
      Object.assign(across, {tickmode: "array", tickvals: spec.ticks.filter(thin), ticktext: spec.tick_labels.filter(thin), range: [Math.log10(spec.ticks[0]), 0]});
    }
  }
  if (spec.x_range) across.range = [...spec.x_range];
  Object.assign(layout, {
    height: width < 460 ? 230 : Math.min(380, 200 + width / 4), margin: {l: format === "percent" ? 52 : 46, r: 22, t: 10, b: spec.x_title ? 48 : 30},
    xaxis: across, yaxis: valueAxis(spec, grid),
  });
  return [[...bands, ...data], layout];
}

function dots(spec, panel, width, theme) {
  const {axis, grid, layout} = common(theme);
  const {table} = spec, at = column(table, spec.group), value = column(table, spec.value), low = column(table, spec.low || "low"), high = column(table, spec.high || "high");
  const groups = [...new Set(table.rows.map(row => row[at]))];
  const series = seriesOf(spec, theme);
  const step = Math.min(0.2, 0.72 / series.length);
  const data = series.map(({name, rows, colour, mark}, i) => ({
    name: plain(name), mode: "markers", hoverinfo: "text", hovertext: rows.map(row => pointHover(spec, row)), cliponaxis: false,
    x: rows.map(row => row[value]), y: rows.map(row => groups.indexOf(row[at]) + (i - (series.length - 1) / 2) * step),
    marker: {color: colour, size: series.length > 6 ? 7 : 9, symbol: mark},
    error_x: low < 0 ? undefined : {type: "data", symmetric: false, array: rows.map(row => row[high] === null ? 0 : row[high] - row[value]), arrayminus: rows.map(row => row[low] === null ? 0 : row[value] - row[low]), color: colour, thickness: 1.75, width: 3},
  }));
  const room = Math.max(34, 14 * series.length + 14);
  const most = width < 480 ? 15 : 26;
  const label = groups.map(group => wrapped(group, most));
  const longest = Math.max(...label.flatMap(text => text.split("<br>").map(line => line.length)));
  if (spec.reference !== undefined) layout.shapes = [{type: "line", yref: "paper", y0: 0, y1: 1, x0: spec.reference, x1: spec.reference, line: {color: theme.muted, width: 1.25, dash: "dot"}, layer: "below"}];
  const edges = groups.slice(1).map((_, i) => ({type: "line", xref: "paper", x0: 0, x1: 1, y0: i + 0.5, y1: i + 0.5, line: {color: theme.line, width: 1}, layer: "below"}));
  layout.shapes = [...(layout.shapes || []), ...edges];
  Object.assign(layout, {
    height: room * groups.length + 44, margin: {l: Math.min(width * 0.45, 22 + 6.6 * longest), r: 22, t: 6, b: 34},
    xaxis: valueAxis(spec, grid), yaxis: {...axis, tickmode: "array", tickvals: groups.map((_, i) => i), ticktext: label, range: [groups.length - 0.5, -0.5]},
  });
  return [data, layout];
}

// inside of a matrix: bins of rows and columns
function density(spec, panel, width, theme) {
  const {axis, layout} = common(theme);
  const [height, across] = spec.matrix.shape;
  const rowEdges = edgesOf(spec.matrix.rows, height), columnEdges = edgesOf(spec.matrix.columns, across);
  const rowLabels = binLabels(spec.matrix, "row", rowEdges), columnLabels = binLabels(spec.matrix, "column", columnEdges);
  const left = 70, cell = Math.min(26, (width - left - 8) / across), row = Math.max(8, Math.min(24, 560 / height));
  const counts = spec.counts, value = (i, j) => counts[i * across + j] / ((rowEdges[i + 1] - rowEdges[i]) * (columnEdges[j + 1] - columnEdges[j]));
  const each = make => rowLabels.map((_, i) => columnLabels.map((_, j) => make(i, j)));
  const data = [{
    type: "heatmap", z: each((i, j) => logged(value(i, j) / spec.rate)), zmin: -spec.limit, zmax: spec.limit, colorscale: theme.heat, showscale: false, hoverinfo: "text", xgap: cell > 9 ? 1 : 0, ygap: row > 9 ? 1 : 0,
    hovertext: each((i, j) => wrappedHover([`${rowLabels[i]}, ${columnLabels[j]}: ${FORMATS.times(value(i, j) / spec.rate)}`, `${FORMATS.count(counts[i * across + j])} of ${FORMATS.count((rowEdges[i + 1] - rowEdges[i]) * (columnEdges[j + 1] - columnEdges[j]))} selected (${FORMATS.percent(value(i, j))})`])),
  }];
  const ticks = (edges, heads, bins, room) => heads
    ? thinned([...Array(heads).keys()].map(h => (h + 0.5) * bins / heads - 0.5), [...Array(heads).keys()].map(String), room * bins / heads / 16)
    : thinned([...Array(bins).keys()].map(i => i - 0.5), edges.slice(0, -1).map(String), room / 34);
  const unit = side => spec.matrix[side + "_heads"] ? "head" : spec.matrix[side + "_unit"];
  Object.assign(layout, {
    width: left + 8 + cell * across, height: row * height + 62, margin: {l: left, r: 8, t: 6, b: 56},
    xaxis: {...axis, ...ticks(columnEdges, spec.matrix.column_heads, across, cell), title: axisTitle(unit("column"), theme), range: [-0.5, across - 0.5]},
    yaxis: {...axis, ...ticks(rowEdges, spec.matrix.row_heads, height, row * 2), title: axisTitle(unit("row"), theme), range: [height - 0.5, -0.5]},
  });
  return [data, layout];
}

const edgesOf = (extent, bins) => [...Array(bins + 1).keys()].map(i => Math.ceil(i * extent / bins));

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

// ---- a figure: plots, key, numbers, downloads

const KINDS = {heat, lines, dots, density};
const charts = [];

function build(figure, spec) {
  const panels = spec.panels || [{title: ""}];
  const box = figure.appendChild(element("div", undefined, {class: "panels" + (panels.length > 1 ? " two" : "")}));
  const made = panels.map(panel => {
    const part = box.appendChild(element("div"));
    if (panel.title) part.append(element("h4", panel.title));
    const key = spec.kind === "lines" || spec.kind === "dots" ? part.appendChild(element("div", undefined, {class: "key"})) : null;
    const keyboard = spec.kind === "heat";
    const plot = part.appendChild(element("div", undefined, {
      class: "plot", role: keyboard ? "application" : "img", "aria-label": (panel.title || spec.title) + (keyboard ? ". Arrow keys go from cell to cell." : ". The numbers follow."),
      ...(keyboard ? {tabindex: "0"} : {}), ...(spec.opens ? {"data-opens": ""} : {}),
    }));
    const chart = {spec, panel, plot, key, part, figure, drawn: false};
    const under = part.appendChild(element("div", undefined, {class: "under"}));
    const button = (label, what, action) => under.appendChild(element("button", label, {type: "button", "aria-label": `${what}: ${panel.title || spec.title}`})).addEventListener("click", action);
    button("CSV", "download the numbers", () => save(fileName(chart) + ".csv", csv(chart.spec.table)));
    for (const format of ["svg", "png"]) button(format.toUpperCase(), `download as ${format.toUpperCase()}`, () => exportImage(chart, format));
    const details = under.appendChild(element("details"));
    details.append(element("summary", "numbers"));
    details.addEventListener("toggle", () => {
      if (details.open && !details.querySelector("table")) details.append(numbersOf(chart.spec));
    });
    chart.details = details;
    if (keyboard) walkable(chart);
    charts.push(chart);
    return chart;
  });
  return made;
}

const headingOf = chart => chart.figure.closest("section").querySelector("h2").textContent;
const fileName = chart => stem([headingOf(chart), chart.spec.title, chart.panel.title].filter(Boolean).join(" "));

function render(chart, theme) {
  const {spec, panel, plot} = chart;
  const most = spec.kind === "heat" ? heatWidth(spec) : spec.kind === "density" ? 900 : 720;
  const width = Math.min(chart.part.clientWidth || 600, most);
  const [data, layout] = KINDS[spec.kind](spec, panel, width, theme);
  return [data, {width, ...layout}];
}

function drawChart(chart, theme) {
  const [data, layout] = render(chart, theme);
  Plotly.react(chart.plot, data, layout, {displayModeBar: false});
  if (chart.key) drawKey(chart, theme);
  if (!chart.drawn && chart.spec.opens) {
    chart.plot.on("plotly_click", event => {
      const point = event.points[0], block = heatBlocks(chart.spec).blocks.find(b => b.y.includes(point.y) && (b.x.includes(point.x) || b.span && point.x > b.x[0] && point.x < b.x[1]));
      const row = block && block.rows[block.y.indexOf(point.y)][block.span ? 0 : block.x.indexOf(point.x)];
      if (row) openCell(chart, row);
    });
  }
  chart.drawn = true;
}

function drawKey(chart, theme) {
  const series = seriesOf(chart.spec, theme);
  if (series.length < 2) return chart.key.replaceChildren();
  const lined = chart.spec.kind === "lines";
  chart.key.replaceChildren(...series.map(({name, colour, dash, mark}) => {
    const label = element("span");
    const drawing = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    drawing.setAttribute("width", lined ? 30 : 14);
    drawing.setAttribute("height", 14);
    drawing.setAttribute("aria-hidden", "true");
    const dashes = {solid: "", dash: "7 4", dot: "2 3", dashdot: "7 3 2 3", longdash: "10 4", longdashdot: "10 3 2 3"}[dash];
    const shape = {
      circle: "M7 3a4 4 0 1 0 .01 0z", square: "M3.5 3.5h7v7h-7z", diamond: "M7 2l5 5-5 5-5-5z", "triangle-up": "M7 2.5l4.7 8H2.3z", "triangle-down": "M7 11.5l4.7-8H2.3z",
      x: "M4 2.5l3 3 3-3 1.5 1.5-3 3 3 3L10 11.500l-3-3-3 3L2.500 10l3-3-3-3z", cross: "M5.500 2.500h3v3h3v3h-3v3h-3v-3h-3v-3h3z", star: "M7 2l1.500 3.300 3.600.400-2.700 2.400.800 3.600L7 9.900l-3.200 1.800.800-3.600L1.900 5.700l3.600-.400z",
    }[mark];
    drawing.innerHTML = (lined ? `<path d="M0 7h30" stroke="${colour}" stroke-width="2" stroke-dasharray="${dashes}"/>` : "") + (lined && chart.spec.plain ? "" : `<path d="${shape}" fill="${colour}"${lined ? ' transform="translate(8 0)"' : ""}/>`);
    label.append(drawing, element("span", name));
    return label;
  }));
}

// pictures for papers: light, opaque, with title and legend or scale
function exportImage(chart, format) {
  const theme = lightTheme();
  const [data, layout] = render(chart, theme);
  const top = 44;
  layout.margin = {...layout.margin, t: (layout.margin.t || 0) + top};
  layout.height += top;
  layout.paper_bgcolor = layout.plot_bgcolor = "#ffffff";
  const title = [headingOf(chart), chart.panel.title || chart.spec.title].join(": ");
  layout.title = {text: wrapped(title, Math.floor(layout.width / 8)), font: {size: 14}, x: 0, xref: "container", xanchor: "left", y: 1, yref: "container", yanchor: "top", pad: {l: 12, t: 12}};
  if (chart.key) {
    layout.showlegend = data.length > 1;
    layout.legend = {orientation: "h", x: 0, y: 0.01, yanchor: "bottom", yref: "container"};
    const rows = Math.ceil(seriesOf(chart.spec, theme).length / Math.max(1, Math.floor(layout.width / 170)));
    layout.margin.b += 22 * rows + 14;
    layout.height += 22 * rows + 14;
  } else {
    const limit = chart.spec.limit, powers = [...Array(2 * limit + 1).keys()].map(i => i - limit);
    data[0] = {...data[0], showscale: true, colorbar: {thickness: 12, outlinewidth: 0, tickvals: powers, ticktext: powers.map(p => p < 0 ? `1/${2 ** -p}×` : `${2 ** p}×`), tickfont: {size: 11}}};
    layout.margin.r += 62;
    layout.width += 62;
  }
  const size = {width: Math.round(layout.width), height: Math.round(layout.height)};
  return Plotly.downloadImage({data, layout, config: {}}, {format, filename: fileName(chart), scale: format === "png" ? 3 : 1, ...size});
}

function lightTheme() {
  const before = root.dataset.theme;
  root.dataset.theme = "light";
  const theme = themeNow("light");
  if (before === undefined) delete root.dataset.theme; else root.dataset.theme = before;
  return theme;
}

// ---- from cell to cell by keyboard

function walkable(chart) {
  const {plot, spec} = chart;
  let at = null;
  const show = () => {
    const placed = heatBlocks(spec);
    const main = placed.blocks[0], row = main.rows[at[1]][at[0]];
    Plotly.relayout(plot, {shapes: [{type: "rect", x0: at[0] - 0.5, x1: at[0] + 0.5, y0: at[1] - 0.5, y1: at[1] + 0.5, line: {color: themeNow().ink, width: 2}}]});
    spoken.textContent = row ? heatHover(spec, row, chart.panel.z).join(", ") : `${spec.x} ${spec.xs[at[0]]}, ${spec.ys[at[1]]}: no such cell`;
    if (row && chart.drawn) Plotly.Fx.hover(plot, [{curveNumber: 0, pointNumber: [at[1], at[0]]}]);
  };
  plot.addEventListener("keydown", event => {
    const move = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[event.key];
    if (move) {
      at = at ? [Math.min(spec.xs.length - 1, Math.max(0, at[0] + move[0])), Math.min(spec.ys.length - 1, Math.max(0, at[1] + move[1]))] : [0, 0];
      show();
      event.preventDefault();
    } else if (at && (event.key === "Enter" || event.key === " ") && spec.opens) {
      const row = heatBlocks(spec).blocks[0].rows[at[1]][at[0]];
      if (row) openCell(chart, row);
      event.preventDefault();
    }
  });
  plot.addEventListener("blur", () => {
    if (at) Plotly.relayout(plot, {shapes: []});
  });
}

// ---- inside a matrix

const viewers = new Map(); // section -> viewer

function openCell(chart, row) {
  const viewer = viewers.get(chart.figure.closest("section"));
  const {table} = chart.spec;
  const value = name => column(table, name) < 0 || row[column(table, name)] === "all" ? null : row[column(table, name)];
  if (viewer) viewer.open({layer: value("layer"), component: value("component"), expert: value("expert")}, true);
}

const layerLabel = matrix => matrix.layer === null ? "none" : (matrix.stack ? matrix.stack + " " : "") + matrix.layer;
const expertLabel = matrix => matrix.expert === null ? "–" : String(matrix.expert);

function decoded(matrix) {
  const bytes = Uint8Array.from(atob(matrix.counts), character => character.charCodeAt(0));
  const size = matrix.bytes;
  return Array.from({length: bytes.length / size}, (_, i) => {
    let value = 0;
    for (let j = size - 1; j >= 0; j--) value = value * 256 + bytes[i * size + j];
    return value;
  });
}

function tableOf(spec) {
  const {matrix, counts} = spec, [height, across] = matrix.shape;
  const rows = edgesOf(matrix.rows, height), columns = edgesOf(matrix.columns, across);
  return {
    columns: {"first row": "count", "last row": "count", "first column": "count", "last column": "count", selected: "count", weights: "count"},
    rows: counts.map((count, i) => {
      const r = Math.floor(i / across), c = i % across;
      return [rows[r], rows[r + 1] - 1, columns[c], columns[c + 1] - 1, count, (rows[r + 1] - rows[r]) * (columns[c + 1] - columns[c])];
    }),
  };
}

// "head 1 holds 61 %, head 0 39 %" of the rows' or columns' sums
function fullest(spec, side) {
  const {matrix, counts} = spec, [height, across] = matrix.shape, bins = side === "row" ? height : across;
  const labels = binLabels(matrix, side, edgesOf(side === "row" ? matrix.rows : matrix.columns, bins));
  const sums = Array(bins).fill(0);
  counts.forEach((count, i) => { sums[side === "row" ? Math.floor(i / across) : i % across] += count; });
  const best = sums.map((sum, i) => [sum, labels[i]]).sort((a, b) => b[0] - a[0]).slice(0, 2);
  return best.map(([sum, label]) => `${label} (${FORMATS.percent(sum / matrix.num_selected)})`).join(" and ");
}

function viewer(box) {
  const spec = JSON.parse(box.querySelector("script").textContent);
  const form = box.querySelector("form"), which = box.querySelector(".which"), figure = box.querySelector("figure");
  const all = spec.matrices, options = {layer: layerLabel, component: matrix => matrix.component, expert: expertLabel};
  if (!all.length) return null;
  let chart = null;
  const fill = (name, list, chosen) => {
    const select = form.elements[name];
    select.replaceChildren(...list.map(value => element("option", value)));
    select.value = chosen;
    select.parentElement.hidden = list.length < 2 && list[0] === "–";
  };
  const unique = list => [...new Set(list)];
  // the fullest matrix that fits; what does not fit is given up from the right
  const open = (wanted, scroll) => {
    let fitting = all;
    const missed = [];
    for (const [name, label] of Object.entries(options)) {
      if (wanted[name] === null || wanted[name] === undefined) continue;
      const fewer = fitting.filter(matrix => label(matrix) === wanted[name]);
      if (fewer.length) fitting = fewer; else missed.push(`${name} ${wanted[name]}`);
    }
    const asked = Object.entries(wanted).filter(([, value]) => value !== null && value !== undefined).map(([name, value]) => `${name} ${value}`).join(", ");
    if (missed.length) {
      which.textContent = `${asked}: holds no selected weights${spec.num_left_out ? ", or too few to be on this page" : ""}.`;
      figure.hidden = true;
    } else {
      const matrix = fitting.reduce((best, each) => each.num_selected > best.num_selected ? each : best);
      fill("layer", unique(all.map(layerLabel)), layerLabel(matrix));
      fill("component", unique(all.filter(m => layerLabel(m) === layerLabel(matrix)).map(m => m.component)), matrix.component);
      fill("expert", unique(all.filter(m => layerLabel(m) === layerLabel(matrix) && m.component === matrix.component).map(expertLabel)), expertLabel(matrix));
      const density = matrix.num_selected / (matrix.rows * matrix.columns);
      const shown = {kind: "density", title: matrix.name, matrix, counts: decoded(matrix), rate: density, limit: spec.limit};
      shown.table = tableOf(shown);
      which.textContent = `${matrix.name}: ${FORMATS.count(matrix.num_selected)} of ${FORMATS.count(matrix.rows * matrix.columns)} weights selected (${FORMATS.percent(density)}, ${FORMATS.times(density / spec.rate)}). Fullest by output: ${fullest(shown, "row")}; by input: ${fullest(shown, "column")}.`;
      figure.hidden = false;
      if (chart) {
        chart.spec = shown;
        chart.details.open = false;
        chart.details.querySelectorAll(".table").forEach(table => table.remove());
      } else {
        [chart] = build(figure, shown);
      }
      drawChart(chart, themeNow());
    }
    if (scroll) box.scrollIntoView({block: "nearest"});
  };
  form.addEventListener("change", event => {
    const order = Object.keys(options), upTo = order.indexOf(event.target.name);
    const wanted = {};
    order.slice(0, upTo + 1).forEach(name => { if (!form.elements[name].parentElement.hidden) wanted[name] = form.elements[name].value; });
    // keep the component across layers where there is such a matrix
    if (event.target.name === "layer" && all.some(m => layerLabel(m) === wanted.layer && m.component === form.elements.component.value)) wanted.component = form.elements.component.value;
    open(wanted, false);
  });
  form.addEventListener("submit", event => event.preventDefault());
  return {open};
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

function draw(forced) {
  const theme = themeNow(forced);
  const onScreen = chart => chart.plot.getBoundingClientRect().top < window.innerHeight;
  const [now, later] = [charts.filter(onScreen), charts.filter(chart => !onScreen(chart))];
  now.forEach(chart => drawChart(chart, theme));
  if (forced) return later.forEach(chart => drawChart(chart, theme));
  // the rest one by one, so that the page answers meanwhile
  const turn = ++draw.turn;
  const next = () => {
    if (turn !== draw.turn || !later.length) {
      if (turn === draw.turn) root.dataset.drawn = String(charts.length);
      return;
    }
    drawChart(later.shift(), theme);
    setTimeout(next);
  };
  next();
}
draw.turn = 0;

const themeButton = document.getElementById("theme");
const isDark = () => (root.dataset.theme || (darkMode.matches ? "dark" : "light")) === "dark";
const nameTheme = () => { themeButton.textContent = isDark() ? "Light" : "Dark"; themeButton.setAttribute("aria-label", `Switch to ${isDark() ? "light" : "dark"} colours`); };
themeButton.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; nameTheme(); draw(); });
darkMode.addEventListener("change", () => { nameTheme(); draw(); });
nameTheme();

let waiting, lastWidth = window.innerWidth;
window.addEventListener("resize", () => {
  if (window.innerWidth === lastWidth) return; // address bars of phones come and go
  lastWidth = window.innerWidth;
  clearTimeout(waiting);
  waiting = setTimeout(draw, 120);
});
window.addEventListener("beforeprint", () => draw("light"));
window.addEventListener("afterprint", () => draw());

draw();
for (const box of document.querySelectorAll(".matrices")) {
  const made = viewer(box);
  if (made) {
    viewers.set(box.closest("section"), made);
    made.open({}, false);
  }
}
for (const details of document.querySelectorAll("details.responses")) responses(details);
