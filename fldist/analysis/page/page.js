// Draws the report: tables and charts from the JSON in #data. What came from a run's files becomes text, never markup.
"use strict";
(() => {
const report = JSON.parse(document.getElementById("data").textContent);
const runs = report.runs;

// Okabe and Ito's colours, without the yellow, which is too light for lines; tell-apart for the colour-blind.
const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000", "#e69f00", "#56b4e9"];
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash"];
const MARKERS = ["circle", "square", "diamond", "triangle-up", "x", "triangle-down", "star", "cross", "hexagon"];
const PATTERNS = ["", "/", "x", "-", ".", "\\", "|", "+"];
const KINDS = {
  wait: { label: "waiting", colour: "#d9dcdf", pattern: "", width: 0.2, offset: -0.1 },
  server: { label: "server's half", colour: "#cc79a7", pattern: "\\", width: 0.5, offset: -0.25 },
  compute: { label: "computing", colour: "#0072b2", pattern: "", width: 0.5, offset: -0.25 },
  evaluate: { label: "scoring", colour: "#009e73", pattern: "x", width: 0.5, offset: -0.25 },
  encode: { label: "packing and folding", colour: "#e69f00", pattern: "/", width: 0.5, offset: -0.25 },
  down: { label: "on the wire, down (upper edge)", colour: "#56b4e9", pattern: "", width: 0.14, offset: -0.44 },
  up: { label: "on the wire, up (lower edge)", colour: "#d55e00", pattern: "|", width: 0.14, offset: 0.3 },
};

// ---- small helpers
const $ = (id) => document.getElementById(id);
const count = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;
const grouped = (n) => (n === null || n === undefined ? "" : n.toLocaleString("en-US", { maximumFractionDigits: 0 }));
const fixed = (x, digits) => (x === null || x === undefined ? "" : x.toFixed(digits));
// Plotly reads a few tags and entities in its texts; so a name is escaped before it becomes one.
const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
// long names are cut in the middle, since either end may be what tells them apart
const short = (text, most = 70) => (text.length > most ? `${text.slice(0, most / 2)}…${text.slice(1 - most / 2)}` : text);

// a name in one line or two
function inLines(text, most = 34) {
  const at = text.length > most ? text.lastIndexOf(" ", most) : -1;
  return at > 0 ? [text.slice(0, at), short(text.slice(at + 1), most)] : [short(text, most)];
}

function make(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

function list(id, texts) {
  $(id).replaceChildren(...texts.map((text) => make("li", { textContent: text })));
}

function options(id, texts, values = texts.keys()) {
  const of = [...values];
  $(id).replaceChildren(...texts.map((text, i) => make("option", { textContent: short(text), value: of[i] })));
}

function durationText(seconds) {
  const size = Math.abs(seconds);
  if (size >= 100) return `${seconds.toFixed(0)} s`;
  if (size >= 1) return `${seconds.toFixed(2)} s`;
  return size >= 1e-3 ? `${(seconds * 1e3).toFixed(2)} ms` : `${(seconds * 1e6).toFixed(0)} µs`;
}

function bytesText(n) {
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (Math.abs(n) < 1000) return unit === "B" ? `${n.toFixed(0)} B` : `${Number(n.toPrecision(3))} ${unit}`;
    n /= 1000;
  }
  return `${Number(n.toPrecision(4))} TB`;
}

// head: [{text, number?, long?}]; rows: arrays of {text, value?, title?, node?} or texts
function table(id, head, rows, sortable = false) {
  const cell = (of, i) => {
    const value = of !== null && typeof of === "object" ? of : { text: of };
    const kind = head[i].number ? "number" : head[i].long ? (String(value.text).length > 40 ? "long longer" : "long") : "";
    const made = make(i ? "td" : "th", { className: kind });
    if (!i) made.scope = "row";
    if (value.node) made.append(value.node);
    made.append(String(value.text ?? ""));
    if (value.title) made.title = value.title;
    made.dataset.value = value.value ?? value.text ?? "";
    return made;
  };
  const body = make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row.map(cell))));
  const heads = head.map((column, i) => {
    const made = make("th", { scope: "col", className: column.number ? "number" : "" });
    if (!sortable) made.textContent = column.text;
    else made.append(make("button", { type: "button", textContent: column.text, onclick: () => sort(i, made) }));
    return made;
  });
  function sort(i, of) {
    const down = of.ariaSort === "ascending";
    heads.forEach((other) => { other.ariaSort = null; });
    of.ariaSort = down ? "descending" : "ascending";
    const key = (row) => row.children[i].dataset.value;
    const order = (a, b) => (head[i].number ? (Number(a) || 0) - (Number(b) || 0) : a.localeCompare(b));
    body.append(...[...body.children].sort((a, b) => order(key(a), key(b)) * (down ? -1 : 1)));
  }
  $(id).replaceChildren(make("thead", {}, make("tr", {}, ...heads)), body);
}

// ---- charts
// while the page is printed, charts are as wide as paper is
const PAPER_PX = 680;
let paper = null;
const widthOf = (id) => paper || $(id).clientWidth;

const FONT = { family: "system-ui, 'Segoe UI', 'Helvetica Neue', Arial, sans-serif", size: 13, color: "#1b1f23" };
const AXIS = { showgrid: true, gridcolor: "#e6e8ea", zeroline: false, linecolor: "#8b9298", showline: true, ticks: "outside" };
// only what stays on this machine: plotly.js would also offer to upload a chart
const CONFIG = { displaylogo: false, showSendToCloud: false, plotlyServerURL: "",
  modeBarButtons: [["toImage", "zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]] };

// words: what the chart shows, for who does not see it; as long as they are the same, a zoom stays
function draw(id, traces, layout, words) {
  const below = { orientation: "h", x: 0, xanchor: "left", y: 0, yanchor: "bottom", yref: "container", traceorder: "normal" };
  const all = { font: FONT, paper_bgcolor: "#fff", plot_bgcolor: "#fff", hovermode: "closest", dragmode: "zoom", uirevision: words,
    hoverlabel: { align: "left", namelength: -1 }, width: widthOf(id) };
  // plotly.js keeps the room of a legend that is no longer there, and moves the axis' title into the ticks
  if ($(id).layout && $(id).layout.showlegend !== layout.showlegend) Plotly.purge(id);
  $(id).setAttribute("aria-label", words);
  $(id).style.height = `${layout.height}px`;
  return Plotly.react(id, traces, { ...all, ...layout, legend: { ...below, ...layout.legend } }, CONFIG);
}

function style(number) {
  return { colour: COLOURS[number % COLOURS.length], dash: DASHES[number % DASHES.length],
    marker: MARKERS[number % MARKERS.length], pattern: PATTERNS[number % PATTERNS.length] };
}

// the same method looks the same in all charts and tasks
const labels = [...new Set(report.methods.map((method) => method.label))];
const look = (method) => style(labels.indexOf(method.label));
const ofTask = (task) => report.methods.filter((method) => method.task === task);
const faded = (colour) => `rgba(${[1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16)).join(",")},0.16)`;
const leftOf = (texts) => Math.min(260, 24 + 7.4 * Math.max(...texts.map((text) => text.length), 4));
// the height that a legend below a chart of this width needs, and how wide its entries are
function legendSize(texts, width) {
  const entry = 14 + 7.4 * Math.max(...texts.map((text) => text.length), 4);
  return { entry, room: 20 * Math.ceil(texts.length / Math.max(1, Math.floor((width - 24) / (entry + 53)))) + 12 };
}

// ---- 1. summary
function summary() {
  const several = report.tasks.length > 1;
  const head = [{ text: "Run", long: true }, { text: "Method", long: true }, ...(several ? [{ text: "Task", long: true }] : []),
    { text: "Seed", number: true }, { text: "Status", long: true }, { text: "Rounds", number: true }, { text: "Accuracy", number: true },
    { text: "Uplink bytes", number: true }, { text: "Downlink bytes", number: true }, { text: "Seconds", number: true },
    { text: "state_hash" }];
  table("runs-table", head, runs.map((run) => [
    run.label, run.method_label, ...(several ? [report.tasks[run.task].label] : []), run.seed,
    run.status + (run.ended ? ` (${run.ended})` : ""), run.rounds,
    { text: fixed(run.accuracy, 4), value: run.accuracy, title: run.accuracy === null ? "" : String(run.accuracy) },
    { text: grouped(run.uplink_bytes), value: run.uplink_bytes }, { text: grouped(run.downlink_bytes), value: run.downlink_bytes },
    { text: fixed(run.seconds, 2), value: run.seconds },
    { text: (run.state_hash || "").slice(0, 12), title: run.state_hash || "", value: run.state_hash || "" },
  ]), true);
  list("notes", [...report.notes, ...runs.flatMap((run) => run.notes.map((note) => `${run.label}: ${note}`))]);
}

// ---- 2. accuracy or loss against cost
function curves() {
  const task = Number($("curves-task").value), figure = $("curves-y").value, every = $("curves-runs").value === "every";
  const axis = report.axes.find((one) => one.key === $("curves-x").value);
  const chosen = ofTask(task), traces = [];
  const line = (method, of, number, name) => {
    const { colour, dash, marker } = look(method);
    return { type: "scatter", mode: of.rounds.length > 1 ? "lines+markers" : "markers", x: of[axis.key], y: of[figure],
      name: plain(short(method.label)), legendgroup: method.label, showlegend: number === 0, line: { color: colour, dash, width: 2 },
      marker: { color: colour, symbol: marker, size: 8, maxdisplayed: 12 }, hoverinfo: "text",
      hovertext: of.rounds.map((round, i) => `${plain(name)}<br>round ${round}: ${figure} ${fixed(of[figure][i], 4)}` +
        (of[`${figure}_sd`] ? ` ± ${fixed(of[`${figure}_sd`][i], 4)}` : "") +
        (axis.key === "rounds" ? "" : `<br>${plain(axis.label)}: ${axis.bytes ? bytesText(of[axis.key][i]) : durationText(of[axis.key][i])}`)) };
  };
  for (const method of chosen) {
    if (every) {
      method.runs.forEach((index, number) => traces.push(line(method, runs[index].curve, number, runs[index].label)));
      continue;
    }
    const { mean } = method, sd = mean[`${figure}_sd`], x = mean[axis.key];
    if (sd) {
      traces.push({ type: "scatter", mode: "lines", x: [...x, ...[...x].reverse()], fill: "toself", fillcolor: faded(look(method).colour),
        y: [...mean[figure].map((y, i) => y + sd[i]), ...mean[figure].map((y, i) => y - sd[i]).reverse()], line: { width: 0 },
        hoverinfo: "skip", legendgroup: method.label, showlegend: false, name: "band" });
    }
    traces.push(line(method, mean, 0, `${method.label}, mean of ${count(method.averaged.length, "run")}`));
  }
  const { room, entry } = legendSize(chosen.map((method) => short(method.label)), widthOf("curves-plot") - 88);
  const log = $("curves-log").checked;
  draw("curves-plot", traces, { height: 430 + room, margin: { t: 16, r: 24, l: 64, b: 58 + room }, showlegend: true, legend: { entrywidth: entry },
    xaxis: { ...AXIS, title: { text: axis.label, standoff: 8 }, type: log ? "log" : "linear", ticksuffix: axis.bytes ? "B" : "",
      tickformat: axis.bytes ? "~s" : "", ...(log ? { dtick: 1, minor: { ticks: "outside" } } : { rangemode: "tozero" }) },
    yaxis: { ...AXIS, title: { text: figure } } },
  `${figure} of ${count(chosen.length, "method")} of ${report.tasks[task].label} against ${axis.label}${log ? ", logarithmic" : ""}; last values are in the summary`);
  list("curves-notes", [...chosen.flatMap((method) => method.notes), ...report.tasks[task].notes]);
}

// ---- 3. bytes
function bytes() {
  const task = Number($("bytes-task").value), view = report.views.find((one) => one.key === $("bytes-view").value);
  const perRun = $("bytes-of").value === "runs", ways = [["up", "up, to the server"], ["down", "down, to the hosts"]];
  const rows = ofTask(task).flatMap((method) => (perRun
    ? method.runs.map((index) => ({ label: runs[index].label, of: [runs[index]] }))
    : [{ label: method.label, of: method.averaged.map((index) => runs[index]) }]));
  const names = report.byte_names[view.key].filter((name) => rows.some((row) => row.of.some((run) => run.bytes[view.key][name])));
  const value = (row, name, way) =>
    row.of.reduce((sum, run) => sum + (run.bytes[view.key][name] ? run.bytes[view.key][name][way] : 0), 0) / row.of.length;
  const traces = names.flatMap((name) => ways.map(([way], side) => {
    const { colour, pattern } = style(report.byte_names[view.key].indexOf(name));
    const x = rows.map((row) => value(row, name, way));
    return { type: "bar", orientation: "h", y: rows.map((_, i) => i), x, name: plain(name), legendgroup: name, showlegend: side === 0,
      xaxis: side ? "x2" : "x", yaxis: "y", hoverinfo: "text", marker: { color: colour, line: { width: 0 },
        pattern: { shape: pattern, fillmode: "overlay", fgcolor: "#fff", fgopacity: 0.6, size: 8 } },
      hovertext: rows.map((row, i) => `${plain(row.label)}<br>${plain(name)}, ${ways[side][1]}: ${grouped(x[i])} B`) };
  }));
  const left = leftOf(rows.flatMap((row) => inLines(row.label)));
  const high = Math.max(30 + 8 * Math.max(...rows.map((row) => inLines(row.label).length - 1)), view.stacked ? 0 : 15 * names.length);
  const { room, entry } = legendSize(names, widthOf("bytes-plot") - left);
  const most = Math.max(1, ...rows.flatMap((row) => ways.map(([way]) => {
    const of = names.map((name) => value(row, name, way));
    return view.stacked ? of.reduce((a, b) => a + b, 0) : Math.max(0, ...of);
  })));
  const x = (side) => ({ ...AXIS, domain: side ? [0.54, 1] : [0, 0.46], range: [0, 1.04 * most], tickformat: "~s", ticksuffix: "B", tickangle: 0,
    nticks: Math.max(2, Math.floor((widthOf("bytes-plot") - left) / 180)),
    title: { text: ways[side][1], standoff: 8 } });
  draw("bytes-plot", traces, { height: 110 + room + Math.max(2, rows.length) * high, barmode: view.stacked ? "stack" : "group", bargap: 0.3,
    margin: { t: 12, r: 24, l: left, b: 56 + room }, showlegend: names.length > 0, legend: { entrywidth: entry }, xaxis: x(0), xaxis2: x(1),
    yaxis: { ...AXIS, showgrid: false, autorange: "reversed", tickvals: rows.map((_, i) => i),
      ticktext: rows.map((row) => inLines(row.label).map(plain).join("<br>")), tickangle: 0, ticks: "" } },
  `${view.label} of ${count(rows.length, perRun ? "run" : "method")} of ${report.tasks[task].label}, up and down; the table below has the numbers`);
  $("bytes-hint").textContent = view.hint;
  table("bytes-table", [{ text: perRun ? "Run" : "Method", long: true }, ...names.flatMap((name) => ["up", "down"].map((way) =>
    ({ text: `${name} ${way}`, number: true })))],
  rows.map((row) => [row.label, ...names.flatMap((name) => ["up", "down"].map((way) => grouped(value(row, name, way))))]));
}

// ---- 4. timeline
const timed = runs.filter((run) => run.timeline);
const timeName = (round) => (round.number ? `round ${round.number}` : "setup");

function timelineRun() {
  const { rounds } = timed[Number($("timeline-run").value)].timeline;
  for (const id of ["timeline-from", "timeline-to"]) options(id, rounds.map(timeName));
  const first = Math.max(0, rounds.findIndex((round) => round.number > 0));
  $("timeline-from").value = first;
  $("timeline-to").value = Math.min(first + 1, rounds.length - 1);
  timeline();
}

function moveTimeline(step) {
  const { length } = $("timeline-from").options, from = Number($("timeline-from").value), to = Number($("timeline-to").value);
  const by = Math.max(-from, Math.min(step * (to - from + 1), length - 1 - to));
  $("timeline-from").value = from + by;
  $("timeline-to").value = to + by;
  timeline();
}

function timeline(event) {
  const run = timed[Number($("timeline-run").value)], { lanes, rounds } = run.timeline;
  if (Number($("timeline-from").value) > Number($("timeline-to").value)) {
    const other = event && event.target.id === "timeline-from" ? "timeline-to" : "timeline-from";
    $(other).value = $(other === "timeline-to" ? "timeline-from" : "timeline-to").value;
  }
  const shown = rounds.slice(Number($("timeline-from").value), Number($("timeline-to").value) + 1);
  const zero = $("timeline-zero").value === "run" ? 0 : shown[0].begin_us;
  const seconds = (us) => (us - zero) / 1e6, share = (span) => (span.length > 7 ? span[7] : 1);
  const traces = Object.entries(KINDS).map(([kind, { label, colour, pattern, width, offset }]) => {
    const spans = shown.flatMap((round) => round.spans.filter((span) => run.timeline.kinds[span[1]] === kind).map((span) => [round, ...span]));
    return { type: "bar", orientation: "h", name: label, y: spans.map((span) => span[1]), base: spans.map((span) => seconds(span[0].begin_us + span[3])),
      x: spans.map((span) => span[4] / 1e6), hoverinfo: "text",
      width: spans.map((span) => width * share(span)), offset: spans.map((span) => offset + 0.5 * width * (1 - share(span))),
      marker: { color: colour, line: { width: 0 }, pattern: { shape: pattern, fillmode: "overlay", fgcolor: "#fff", fgopacity: 0.7, size: 6 } },
      hovertext: spans.map(([round, lane, , begin, us, whose, wire, part]) => `${plain(lanes[lane].label)}, ${timeName(round)}<br>${label}` +
        `${whose === "" ? "" : `: ${plain(whose)}`}<br>${durationText(us / 1e6)}, from ${seconds(round.begin_us + begin).toFixed(4)} s` +
        (part === undefined ? "" : `<br>in ${(100 * part).toFixed(0)} % of that time`) + (wire ? `<br>${grouped(wire)} B handed to the transport` : "")) };
  }).filter((trace) => trace.x.length);
  const named = shown.length <= 30, left = leftOf(lanes.map((lane) => short(lane.label, 30)));
  const { room, entry } = legendSize(traces.map((trace) => trace.name), widthOf("timeline-plot") - left);
  const ends = shown.flatMap((round) => [round.begin_us, round.end_us, ...round.spans.map((span) => round.begin_us + span[2] + span[3])]);
  const range = [Math.min(...ends), Math.max(...ends)].map(seconds), air = 0.01 * (range[1] - range[0]);
  draw("timeline-plot", traces, { height: 110 + room + 54 * lanes.length, barmode: "overlay", showlegend: true, legend: { entrywidth: entry },
    margin: { t: 30, r: 20, l: left, b: 56 + room },
    xaxis: { ...AXIS, title: { text: `seconds from ${$("timeline-zero").selectedOptions[0].textContent}`, standoff: 8 }, range: [range[0] - air, range[1] + air] },
    yaxis: { ...AXIS, showgrid: false, fixedrange: true, range: [lanes.length - 0.45, -0.55], tickvals: lanes.map((_, i) => i),
      ticktext: lanes.map((lane) => plain(short(lane.label, 30))), ticks: "" },
    shapes: shown.flatMap((round) => [round.begin_us, round.end_us].map((us) => ({ type: "line", x0: seconds(us), x1: seconds(us), yref: "paper",
      y0: 0, y1: 1, line: { color: "#8b9298", width: 1, dash: "dot" }, layer: "below" }))),
    annotations: named ? shown.map((round) => ({ text: timeName(round), x: seconds((round.begin_us + round.end_us) / 2), yref: "paper", y: 1,
      yanchor: "bottom", showarrow: false })) : [] },
  `what ${lanes.map((lane) => lane.label).join(", ")} did in ${timeName(shown[0])} to ${timeName(shown[shown.length - 1])} of ${run.label}, ` +
    `in seconds from ${$("timeline-zero").selectedOptions[0].textContent}; seconds of all rounds are in the table below`);
  aboutTimeline(run, shown);
}

function aboutTimeline(run, shown) {
  const { lanes, rounds, busy, seconds, hint, notes } = run.timeline;
  const where = run.trace ? make("a", { href: run.trace.href, textContent: run.trace.path }) : "";
  $("timeline-hint").replaceChildren(hint, run.trace ? " The whole timeline is in " : "", where,
    run.trace ? ", which ui.perfetto.dev and chrome://tracing open as it is." : "");
  const last = rounds.indexOf(shown[shown.length - 1]), first = rounds.indexOf(shown[0]);
  const holes = rounds.slice(first + 1, last + 1).filter((round, i) => round.number > rounds[first + i].number + 1);
  list("timeline-notes", [...notes, ...(holes.length ? [`Between the shown rounds are some that this page does not hold: before ${holes.map(timeName).join(", ")}.`] : [])]);
  const kinds = Object.keys(KINDS).filter((kind) => lanes.some((_, i) => busy[i][kind]));
  table("timeline-busy", [{ text: "Rank" }, ...kinds.map((kind) => ({ text: KINDS[kind].label.replace(/ \(.*/, ""), number: true }))],
    lanes.map((lane, i) => [lane.label, ...kinds.map((kind) =>
      (busy[i][kind] ? `${busy[i][kind].toFixed(3)} s (${(100 * busy[i][kind] / seconds).toFixed(0)} %)` : ""))]));
  const { clocks } = shown[shown.length - 1];
  $("timeline-clock-hint").textContent = Object.keys(clocks).length
    ? `A host's times are moved to the server's clock, by the offset as it was estimated with each message (in the table: at the end of ${timeName(shown[shown.length - 1])}). Its bars may be off by the uncertainty.`
    : "All times are of one clock.";
  $("timeline-clocks").hidden = !Object.keys(clocks).length;
  table("timeline-clocks", [{ text: "Rank" }, { text: "Server's clock minus this one's", number: true }, { text: "Uncertain by", number: true }],
    Object.entries(clocks).map(([rank, [offset, unsure]]) => [rank === "0" ? "host, in the same process" : `host ${rank}`, `${(offset / 1e6).toFixed(6)} s`,
      unsure === null ? "not known" : `± ${durationText(unsure / 1e6)}`]));
}

// ---- 5. participation
const taking = runs.filter((run) => run.participation);

function participation() {
  const run = taking[Number($("participation-run").value)], of = run.participation, { bins, histogram } = of;
  const what = $("participation-what").value, sense = what === "used" ? "called, and replied" : "called, and not used";
  $("participation-what-label").hidden = !bins;
  const frame = { margin: { t: 16, r: 20, l: 64, b: 54 }, showlegend: false };
  const axes = (height) => ({ ...frame, height, xaxis: { ...AXIS, showgrid: false, title: { text: "round", standoff: 8 } },
    yaxis: { ...AXIS, showgrid: false, title: { text: "client" }, autorange: "reversed" } });
  if (bins) {
    const size = (edges, i) => edges[i + 1] - edges[i], span = (edges, i) => (size(edges, i) > 1 ? `${edges[i]} to ${edges[i + 1] - 1}` : `${edges[i]}`);
    const z = bins[what].map((row, c) => row.map((n, r) => n / (size(bins.clients, c) * size(bins.rounds, r))));
    draw("participation-plot", [{ type: "heatmap", x: bins.rounds, y: bins.clients, z, zmin: 0, zmax: Math.max(1e-9, ...z.flat()), hoverinfo: "text",
      colorscale: [[0, "#ffffff"], [0.5, "#56b4e9"], [1, "#00324e"]], colorbar: { title: { text: "share" }, tickformat: ".0%" },
      hovertext: z.map((row, c) => row.map((share, r) => `clients ${span(bins.clients, c)}, rounds ${span(bins.rounds, r)}<br>` +
        `${(100 * share).toFixed(1)} % ${sense}`)) }],
    { ...axes(420), margin: { ...frame.margin, r: 90 } }, `${run.label}: the share of rounds in which clients were ${sense}, in bins of rounds and clients`);
  } else {
    const states = ["not called", "called, not used", "called, and replied"], scale = ["#eceef0", "#d55e00", "#0072b2"];
    draw("participation-plot", [{ type: "heatmap", x0: 1, dx: 1, y0: 0, dy: 1, z: of.cells.map((row) => [...row].map(Number)), zmin: -0.5, zmax: 2.5,
      xgap: of.rounds <= 120 ? 1 : 0, ygap: of.clients <= 60 ? 1 : 0, hoverinfo: "text",
      colorscale: scale.flatMap((colour, i) => [[i / 3, colour], [(i + 1) / 3, colour]]),
      colorbar: { tickvals: [0, 1, 2], ticktext: states.map((text) => text.replace(", ", ",<br>")), len: 0.9, thickness: 18 },
      hovertext: of.cells.map((row, client) => [...row].map((state, i) => `client ${client}, round ${i + 1}<br>${states[state]}`)) }],
    { ...axes(Math.min(560, 130 + 14 * of.clients)), margin: { ...frame.margin, r: 130 } }, `${run.label}: which client was called in which round, and whether its reply was used`);
  }
  const bar = (name, y, colour, pattern) => ({ type: "bar", name, y, marker: { color: colour, pattern: { shape: pattern, fillmode: "overlay", fgcolor: "#fff", fgopacity: 0.75, size: 7 } } });
  const often = histogram ? [{ ...bar("clients", histogram.clients, COLOURS[0], ""), x: histogram.clients.map((_, i) => i * histogram.step), width: 0.94 * histogram.step, offset: 0 }]
    : [bar("replied", of.by_client.used, COLOURS[0], ""), bar("not used", of.by_client.unused, COLOURS[1], "/")];
  draw("often-plot", often, { height: 270, margin: { t: 12, r: 20, l: 64, b: 54 + (histogram ? 0 : 30) }, showlegend: !histogram, barmode: "stack", bargap: 0.2,
    xaxis: { ...AXIS, showgrid: false, title: { text: histogram ? "rounds in which a client took part" : "client", standoff: 8 } },
    yaxis: { ...AXIS, title: { text: histogram ? "clients" : "rounds" } } }, `${run.label}: how often each client took part`);
  $("participation-hint").textContent = `${run.label}: ${grouped(of.called)} calls of ${count(of.clients, "client")} in ${count(of.rounds, "round")}; ` +
    `${of.unused ? `${grouped(of.unused)} of them brought no reply that was used` : "each brought a reply that was used"}. A client took part in ${of.least} to ${of.most} rounds, the median is ${of.median}.`;
}

// ---- 6. and 7. pictures, configuration, environment
function pictures() {
  const having = runs.filter((run) => run.pictures.length);
  $("pictures-list").replaceChildren(...having.flatMap((run) => [make("h3", { textContent: run.label }), make("div", { className: "pictures" },
    ...run.pictures.map(({ name, round, source }) => make("figure", {}, make("img", { src: source, alt: `${name} after round ${round} of ${run.label}` }),
      make("figcaption", { textContent: `${name}, round ${round}` }))))]));
  $("pictures-hint").textContent = report.pictures_hint;
  return having.length > 0;
}

function facts(id, { same, differing, rows }) {
  $(`${id}-same`).replaceChildren(...same.map(([key, text]) => make("div", {}, make("dt", { textContent: key }), make("dd", { textContent: text }))));
  $(`${id}-differing`).hidden = !differing.length;
  table(`${id}-table`, [{ text: "Run", long: true }, ...differing.map((text) => ({ text, long: true }))], rows.map((row, i) => [runs[i].label, ...row]));
}

// ---- all of it
const redraws = [];

function section(id, there, fill, redraw = fill) {
  $(id).hidden = !there;
  document.querySelector(`nav a[href="#${id}"]`).hidden = !there;
  if (!there) return;
  fill();
  redraws.push(redraw);
}

function redraw() {
  redraws.forEach((one) => one());
}

function listen(ids, then) {
  ids.forEach((id) => $(id).addEventListener("change", then));
}

$("made").textContent = report.made;
summary();
for (const id of ["curves-task", "bytes-task"]) {
  options(id, report.tasks.map((task) => task.label));
  $(`${id}-label`).hidden = report.tasks.length < 2;
}
options("curves-x", report.axes.map((axis) => axis.label), report.axes.map((axis) => axis.key));
options("bytes-view", report.views.map((view) => view.label), report.views.map((view) => view.key));
options("timeline-run", timed.map((run) => run.label));
options("participation-run", taking.map((run) => run.label));
section("curves", report.methods.some((method) => method.runs.some((index) => runs[index].curve.rounds.length)), curves);
section("bytes", report.views.length > 0, bytes);
section("timeline", timed.length > 0, timelineRun, timeline);
section("participation", taking.length > 0, participation);
section("pictures", pictures(), () => {});
facts("config", report.config);
facts("environment", report.environment);
listen(["curves-task", "curves-y", "curves-x", "curves-runs", "curves-log"], curves);
listen(["bytes-task", "bytes-view", "bytes-of"], bytes);
listen(["timeline-run"], timelineRun);
listen(["timeline-from", "timeline-to", "timeline-zero"], timeline);
listen(["participation-run", "participation-what"], participation);
$("timeline-back").onclick = () => moveTimeline(-1);
$("timeline-on").onclick = () => moveTimeline(1);

addEventListener("beforeprint", () => { paper = PAPER_PX; redraw(); });
addEventListener("afterprint", () => { paper = null; redraw(); });
let waiting = 0;
addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(redraw, 150); });
document.documentElement.dataset.ready = "yes";
})();
