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
const chosen = (id) => Number($(id).value);

// long names are cut in the middle, since either end may be what tells them apart
function short(text, most = 70) {
  return text.length > most ? `${text.slice(0, most / 2)}…${text.slice(1 - most / 2)}` : text;
}

// a name in one line or two
function inLines(text, most = 34) {
  const at = text.length > most ? text.lastIndexOf(" ", most) : -1;
  return at > 0 ? [text.slice(0, at), short(text.slice(at + 1), most)] : [short(text, most)];
}

function make(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
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

// head: [{text, number?, long?}]; rows: arrays of {text, value?, title?} or texts
function table(id, head, rows, sortable = false) {
  const cell = (of, i) => {
    const value = of !== null && typeof of === "object" ? of : { text: of };
    const text = String(value.text ?? "");
    const made = make(i ? "td" : "th", { textContent: text, className: head[i].number ? "number" : "" });
    if (head[i].long) made.classList.add("long");
    if (!i) made.scope = "row";
    if (head[i].long && text.length > 40) made.classList.add("longer");
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
const AXIS = { gridcolor: "#e6e8ea", zeroline: false, linecolor: "#8b9298", showline: true, ticks: "outside" };
const BARE = { ...AXIS, showgrid: false };
// only what stays on this machine: plotly.js would also offer to upload a chart
const CONFIG = { displaylogo: false, showSendToCloud: false, plotlyServerURL: "",
  modeBarButtons: [["toImage", "zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]] };

// words: what the chart shows, for who does not see it; as long as they are the same, a zoom stays
function draw(id, traces, layout, words) {
  const legend = { orientation: "h", x: 0, y: 0, yanchor: "bottom", yref: "container", traceorder: "normal", ...layout.legend };
  const all = { font: FONT, paper_bgcolor: "#fff", plot_bgcolor: "#fff", hovermode: "closest", dragmode: "zoom",
    hoverlabel: { align: "left", namelength: -1 }, uirevision: words, width: widthOf(id) };
  // plotly.js keeps the room of a legend that is no longer there, and moves the axis' title into the ticks
  if ($(id).layout && $(id).layout.showlegend !== layout.showlegend) Plotly.purge(id);
  $(id).setAttribute("aria-label", words);
  $(id).style.height = `${layout.height}px`;
  Plotly.react(id, traces, { ...all, ...layout, legend }, CONFIG);
}

function pattern(shape, size = 8) {
  return { shape, fillmode: "overlay", fgcolor: "#fff", fgopacity: 0.65, size };
}

const named = (text) => ({ text, standoff: 8 });

function style(number) {
  return { colour: COLOURS[number % COLOURS.length], dash: DASHES[number % DASHES.length],
    marker: MARKERS[number % MARKERS.length], shape: PATTERNS[number % PATTERNS.length] };
}

// the same method looks the same in all charts and tasks
const labels = [...new Set(report.methods.map((method) => method.label))];
const look = (method) => style(labels.indexOf(method.label));
const ofTask = (task) => report.methods.filter((method) => method.task === task);
const faded = (colour) => `${colour}29`;  // an opacity of 0.16

// the room that names need left of a chart
const leftOf = (texts) => Math.min(260, 24 + 7.4 * Math.max(...texts.map((text) => text.length), 4));
// the height that a legend below a chart of this width needs, and how wide its entries are
function legendSize(texts, width) {
  const entry = 14 + 7.4 * Math.max(...texts.map((text) => text.length), 4);
  return { entry, room: 20 * Math.ceil(texts.length / Math.max(1, Math.floor((width - 24) / (entry + 53)))) + 12 };
}

// ---- 1. summary
function summary() {
  const columns = [
    [{ text: "Run", long: true }, (run) => run.label],
    [{ text: "Method", long: true }, (run) => run.method_label],
    [{ text: "Task", long: true }, (run) => report.tasks[run.task].label],
    [{ text: "Seed", number: true }, (run) => run.seed],
    [{ text: "Status", long: true }, (run) => run.status + (run.ended ? ` (${run.ended})` : "")],
    [{ text: "Rounds", number: true }, (run) => run.rounds],
    [{ text: "Accuracy", number: true }, (run) => exact(run.accuracy, fixed(run.accuracy, 4))],
    [{ text: "Uplink bytes", number: true }, (run) => exact(run.uplink_bytes, grouped(run.uplink_bytes))],
    [{ text: "Downlink bytes", number: true }, (run) => exact(run.downlink_bytes, grouped(run.downlink_bytes))],
    [{ text: "Seconds", number: true }, (run) => exact(run.seconds, fixed(run.seconds, 2))],
    ...(report.axes.some((axis) => axis.key === "joules") ? [
      [{ text: "Simulated seconds", number: true }, (run) => exact(run.simulated_seconds, fixed(run.simulated_seconds, 1))],
      [{ text: "Joules (simulated)", number: true }, (run) => exact(run.joules, fixed(run.joules, 1))],
    ] : []),
    [{ text: "state_hash" }, (run) => exact(run.state_hash, (run.state_hash || "").slice(0, 12))],
  ].filter(([head]) => head.text !== "Task" || report.tasks.length > 1);
  table("runs-table", columns.map(([head]) => head), runs.map((run) => columns.map(([, of]) => of(run))), true);
  list("notes", [...report.notes, ...runs.flatMap((run) => run.notes.map((note) => `${run.label}: ${note}`))]);
}

function exact(value, text) {
  return { text, value, title: value === null ? "" : String(value) };
}

// ---- 2. accuracy or loss against cost
const COST_TEXT = { B: bytesText, s: durationText, J: (joules) => `${grouped(joules)} J`, rounds: String };

// of: a run's curve or a method's mean; name: whose it is
function line(method, of, figure, axis, name) {
  const { colour, dash, marker } = look(method), deviation = of[`${figure}_sd`];
  const cost = (i) => COST_TEXT[axis.unit](of[axis.key][i]);
  const hover = of.rounds.map((round, i) => `${plain(name)}<br>round ${round}: ${figure} ${fixed(of[figure][i], 4)}` +
    (deviation ? ` ± ${fixed(deviation[i], 4)}` : "") + (axis.key === "rounds" ? "" : `<br>${plain(axis.label)}: ${cost(i)}`));
  return { type: "scatter", mode: of.rounds.length > 1 ? "lines+markers" : "markers", x: of[axis.key], y: of[figure],
    name: plain(short(method.label)), legendgroup: method.label, line: { color: colour, dash, width: 2 },
    marker: { color: colour, symbol: marker, size: 8, maxdisplayed: 12 }, hoverinfo: "text", hovertext: hover };
}

function band(method, figure, axis) {
  const x = method.mean[axis.key], y = method.mean[figure], deviation = method.mean[`${figure}_sd`];
  if (!deviation) return [];
  const upper = y.map((value, i) => value + deviation[i]), lower = y.map((value, i) => value - deviation[i]);
  return [{ type: "scatter", mode: "lines", name: "band", x: [...x, ...[...x].reverse()], y: [...upper, ...lower.reverse()],
    fill: "toself", fillcolor: faded(look(method).colour), line: { width: 0 }, hoverinfo: "skip",
    legendgroup: method.label, showlegend: false }];
}

function curves() {
  const task = report.tasks[chosen("curves-task")], all = ofTask(chosen("curves-task"));
  const axis = report.axes.find((one) => one.key === $("curves-x").value), figure = $("curves-y").value;
  const every = $("curves-runs").value === "every", log = $("curves-log").checked;
  const tells = (method) => !method.mean[axis.key].includes(null);  // else nothing is simulated in some of its runs
  const methods = all.filter(tells), silent = all.filter((method) => !tells(method));
  const traces = methods.flatMap((method) => (every
    ? method.runs.map((index, i) => ({ ...line(method, runs[index].curve, figure, axis, runs[index].label), showlegend: !i }))
    : [...band(method, figure, axis),
      line(method, method.mean, figure, axis, `${method.label}, mean of ${count(method.averaged.length, "run")}`)]));
  const { room, entry } = legendSize(methods.map((method) => short(method.label)), widthOf("curves-plot") - 88);
  const scale = log ? { type: "log", dtick: 1, minor: { ticks: "outside" } } : { type: "linear", rangemode: "tozero" };
  const units = ["B", "J"].includes(axis.unit) ? { ticksuffix: axis.unit, tickformat: "~s" } : {};
  draw("curves-plot", traces, {
    height: 430 + room, margin: { t: 16, r: 24, l: 64, b: 58 + room }, showlegend: true, legend: { entrywidth: entry },
    xaxis: { ...AXIS, ...scale, ...units, title: named(axis.label) }, yaxis: { ...AXIS, title: { text: figure } },
  }, `${figure} of ${count(methods.length, "method")} of ${task.label} against ${axis.label}${log ? ", logarithmic" : ""}; ` +
    "last values are in the summary");
  list("curves-notes", [...silent.map((method) => `${method.label}: not all of its runs have ${axis.label}`),
    ...methods.flatMap((method) => method.notes), ...task.notes]);
}

// ---- 3. bytes
const WAYS = [["up", "up, to the server"], ["down", "down, to the hosts"]];

function bytes() {
  const task = report.tasks[chosen("bytes-task")], perRun = $("bytes-of").value === "runs";
  const view = report.views.find((one) => one.key === $("bytes-view").value);
  const rows = ofTask(chosen("bytes-task")).flatMap((method) => (perRun
    ? method.runs.map((index) => ({ label: runs[index].label, of: [runs[index].bytes[view.key]] }))
    : [{ label: method.label, of: method.averaged.map((index) => runs[index].bytes[view.key]) }]));
  const names = report.byte_names[view.key].filter((name) => rows.some((row) => row.of.some((bytes) => bytes[name])));
  const mean = (row, name, way) => row.of.reduce((sum, bytes) => sum + (bytes[name] ? bytes[name][way] : 0), 0) / row.of.length;
  const traces = names.flatMap((name) => WAYS.map(([way, words], side) => {
    const { colour, shape } = style(report.byte_names[view.key].indexOf(name));
    const x = rows.map((row) => mean(row, name, way));
    return { type: "bar", orientation: "h", x, y: rows.map((_, i) => i), xaxis: side ? "x2" : "x", name: plain(name),
      legendgroup: name, showlegend: side === 0, marker: { color: colour, pattern: pattern(shape) }, hoverinfo: "text",
      hovertext: rows.map((row, i) => `${plain(row.label)}<br>${plain(name)}, ${words}: ${grouped(x[i])} B`) };
  }));
  const longest = Math.max(1, ...rows.flatMap((row) => WAYS.map(([way]) => {
    const of = names.map((name) => mean(row, name, way));
    return view.stacked ? of.reduce((a, b) => a + b, 0) : Math.max(0, ...of);
  })));
  const ticks = rows.map((row) => inLines(row.label)), left = leftOf(ticks.flat()), width = widthOf("bytes-plot") - left;
  const high = Math.max(22 + 8 * Math.max(...ticks.map((tick) => tick.length)), view.stacked ? 0 : 15 * names.length);
  const { room, entry } = legendSize(names, width);
  const axis = (side) => ({ ...AXIS, domain: side ? [0.54, 1] : [0, 0.46], range: [0, 1.04 * longest], tickangle: 0,
    tickformat: "~s", ticksuffix: "B", nticks: Math.max(2, Math.floor(width / 180)), title: named(WAYS[side][1]) });
  draw("bytes-plot", traces, {
    height: 110 + room + Math.max(2, rows.length) * high, margin: { t: 12, r: 24, l: left, b: 56 + room },
    barmode: view.stacked ? "stack" : "group", bargap: 0.3, showlegend: true, legend: { entrywidth: entry },
    xaxis: axis(0), xaxis2: axis(1),
    yaxis: { ...BARE, autorange: "reversed", tickvals: rows.map((_, i) => i), ticks: "",
      ticktext: ticks.map((tick) => tick.map(plain).join("<br>")) },
  }, `${view.label} of ${count(rows.length, perRun ? "run" : "method")} of ${task.label}, up and down; ` +
    "the table below has the numbers");
  $("bytes-hint").textContent = view.hint;
  const columns = names.flatMap((name) => WAYS.map(([way]) => [name, way]));
  table("bytes-table",
    [{ text: perRun ? "Run" : "Method", long: true }, ...columns.map((column) => ({ text: column.join(" "), number: true }))],
    rows.map((row) => [row.label, ...columns.map(([name, way]) => grouped(mean(row, name, way)))]));
}

// ---- 4. timeline
const timed = runs.filter((run) => run.timeline);
const timeName = (round) => (round.number ? `round ${round.number}` : "setup");

function timelineRun() {
  const { rounds } = timed[chosen("timeline-run")].timeline;
  for (const id of ["timeline-from", "timeline-to"]) options(id, rounds.map(timeName));
  const first = Math.max(0, rounds.findIndex((round) => round.number > 0));
  $("timeline-from").value = first;
  $("timeline-to").value = Math.min(first + 1, rounds.length - 1);
  timeline();
}

function moveTimeline(step) {
  const from = chosen("timeline-from"), to = chosen("timeline-to"), last = $("timeline-to").options.length - 1;
  const by = Math.max(-from, Math.min(step * (to - from + 1), last - to));
  $("timeline-from").value = from + by;
  $("timeline-to").value = to + by;
  timeline();
}

// a span: [lane, kind, begin and length in µs, whose, wire bytes, share of the time in which it went on (absent: all)]
function bars(run, shown, kind, zero) {
  const { label, colour, pattern: shape, width, offset } = KINDS[kind], number = run.timeline.kinds.indexOf(kind);
  const trace = { type: "bar", orientation: "h", name: label, marker: { color: colour, pattern: pattern(shape, 6) },
    hoverinfo: "text", x: [], base: [], y: [], width: [], offset: [], hovertext: [] };
  for (const round of shown) {
    for (const [lane, , begin, length, whose, wire, share = 1] of round.spans.filter((span) => span[1] === number)) {
      const from = (round.begin_us + begin - zero) / 1e6;
      trace.x.push(length / 1e6);
      trace.base.push(from);
      trace.y.push(lane);
      trace.width.push(width * share);
      trace.offset.push(offset + 0.5 * width * (1 - share));
      trace.hovertext.push([
        `${plain(run.timeline.lanes[lane].label)}, ${timeName(round)}`,
        label + (whose ? `: ${plain(whose)}` : ""),
        `${durationText(length / 1e6)}, from ${from.toFixed(4)} s`,
        ...(share < 1 ? [`in ${(100 * share).toFixed(0)} % of that time`] : []),
        ...(wire ? [`${grouped(wire)} B handed to the transport`] : []),
      ].join("<br>"));
    }
  }
  return trace;
}

function timeline(event) {
  const run = timed[chosen("timeline-run")], { lanes, rounds } = run.timeline;
  if (chosen("timeline-from") > chosen("timeline-to")) {  // the end that was not chosen follows
    const [kept, moved] = event && event.target.id === "timeline-to" ? ["to", "from"] : ["from", "to"];
    $(`timeline-${moved}`).value = $(`timeline-${kept}`).value;
  }
  const shown = rounds.slice(chosen("timeline-from"), chosen("timeline-to") + 1);
  const zero = $("timeline-zero").value === "run" ? 0 : shown[0].begin_us, seconds = (us) => (us - zero) / 1e6;
  const since = `seconds from ${$("timeline-zero").selectedOptions[0].textContent}`;
  const traces = Object.keys(KINDS).map((kind) => bars(run, shown, kind, zero)).filter((trace) => trace.x.length);
  const ticks = lanes.map((lane) => short(lane.label, 30)), left = leftOf(ticks);
  const { room, entry } = legendSize(traces.map((trace) => trace.name), widthOf("timeline-plot") - left);
  const edges = shown.flatMap((round) => [round.begin_us, round.end_us]).map(seconds);
  const begin = Math.min(...edges, ...traces.flatMap((trace) => trace.base));
  const end = Math.max(...edges, ...traces.flatMap((trace) => trace.base.map((from, i) => from + trace.x[i])));
  const air = 0.01 * (end - begin);
  draw("timeline-plot", traces, {
    height: 110 + room + 54 * lanes.length, margin: { t: 30, r: 20, l: left, b: 56 + room },
    barmode: "overlay", showlegend: true, legend: { entrywidth: entry },
    xaxis: { ...AXIS, title: named(since), range: [begin - air, end + air] },
    yaxis: { ...BARE, fixedrange: true, range: [lanes.length - 0.45, -0.55], tickvals: lanes.map((_, i) => i), ticks: "",
      ticktext: ticks.map(plain) },
    shapes: edges.map((x) => ({ type: "line", x0: x, x1: x, yref: "paper", y0: 0, y1: 1, layer: "below",
      line: { color: "#8b9298", width: 1, dash: "dot" } })),
    annotations: shown.slice(0, 30).map((round) => ({ text: timeName(round), showarrow: false, yref: "paper", y: 1,
      yanchor: "bottom", x: seconds((round.begin_us + round.end_us) / 2) })),
  }, `what ${lanes.map((lane) => lane.label).join(", ")} did in ${timeName(shown[0])} to ${timeName(shown.at(-1))} of ` +
    `${run.label}, in ${since}; seconds of all rounds are in the table below`);
  aboutTimeline(run, shown);
}

function aboutTimeline(run, shown) {
  const { lanes, rounds, busy, seconds, hint, notes } = run.timeline, { clocks } = shown.at(-1);
  $("timeline-hint").replaceChildren(hint, ...(run.trace ? [" The whole timeline is in ",
    make("a", { href: run.trace.href, textContent: run.trace.path }),
    ", which ui.perfetto.dev and chrome://tracing open as it is."] : []));
  const holes = shown.slice(1).filter((round, i) => round.number > shown[i].number + 1).map(timeName).join(", ");
  const hole = `Between the shown rounds are some that this page does not hold: before ${holes}.`;
  list("timeline-notes", [...notes, ...(holes ? [hole] : [])]);
  const kinds = Object.keys(KINDS).filter((kind) => lanes.some((_, i) => busy[i][kind]));
  const spent = (of) => (of ? `${of.toFixed(3)} s (${(100 * of / seconds).toFixed(0)} %)` : "");
  table("timeline-busy",
    [{ text: "Rank" }, ...kinds.map((kind) => ({ text: KINDS[kind].label.replace(/ \(.*/, ""), number: true }))],
    lanes.map((lane, i) => [lane.label, ...kinds.map((kind) => spent(busy[i][kind]))]));
  $("timeline-clocks").hidden = !Object.keys(clocks).length;
  $("timeline-clock-hint").textContent = Object.keys(clocks).length
    ? "A host's times are moved to the server's clock by the offset as it was estimated with each message; in the table: " +
      `at the end of ${timeName(shown.at(-1))}. Its bars may be off by the uncertainty.`
    : "All times are of one clock.";
  table("timeline-clocks",
    [{ text: "Rank" }, { text: "Server's clock minus this one's", number: true }, { text: "Uncertain by", number: true }],
    Object.entries(clocks).map(([rank, [offset, unsure]]) => [
      rank === "0" ? "host, in the same process" : `host ${rank}`, `${(offset / 1e6).toFixed(6)} s`,
      unsure === null ? "not known" : `± ${durationText(unsure / 1e6)}`]));
}

// ---- 5. participation
const taking = runs.filter((run) => run.participation);

function participation() {
  const run = taking[chosen("participation-run")], of = run.participation;
  $("participation-what-label").hidden = !of.bins;
  if (of.bins) shares(run, $("participation-what").value);
  else cells(run);
  often(run);
  const unused = of.unused ? `${grouped(of.unused)} of them brought no reply that was used` : "each brought a reply that was used";
  $("participation-hint").textContent = `${run.label}: ${grouped(of.called)} calls of ${count(of.clients, "client")} in ` +
    `${count(of.rounds, "round")}; ${unused}. A client took part in ${of.least} to ${of.most} rounds, the median is ${of.median}.`;
}

function heatmap(map, height, right, words) {
  draw("participation-plot", [{ type: "heatmap", hoverinfo: "text", ...map }], {
    height, margin: { t: 16, r: right, l: 64, b: 54 }, showlegend: false,
    xaxis: { ...BARE, title: named("round") }, yaxis: { ...BARE, title: { text: "client" }, autorange: "reversed" },
  }, words);
}

function cells({ label, participation: of }) {
  const states = ["not called", "called, not used", "called, and replied"], colours = ["#eceef0", "#d55e00", "#0072b2"];
  heatmap({
    x0: 1, dx: 1, y0: 0, dy: 1, z: of.cells.map((row) => [...row].map(Number)), zmin: -0.5, zmax: 2.5,
    xgap: of.rounds <= 120 ? 1 : 0, ygap: of.clients <= 60 ? 1 : 0,
    colorscale: colours.flatMap((colour, i) => [[i / 3, colour], [(i + 1) / 3, colour]]),
    colorbar: { tickvals: [0, 1, 2], ticktext: states.map((text) => text.replace(", ", ",<br>")), len: 0.9, thickness: 18 },
    hovertext: of.cells.map((row, client) => [...row].map((state, i) => `client ${client}, round ${i + 1}<br>${states[state]}`)),
  }, Math.min(560, 130 + 14 * of.clients), 130,
  `${label}: which client was called in which round, and whether its reply was used`);
}

function shares({ label, participation: { bins } }, what) {
  const sense = what === "used" ? "called, and replied" : "called, and not used";
  const size = (edges, i) => edges[i + 1] - edges[i];
  const span = (edges, i) => (size(edges, i) > 1 ? `${edges[i]} to ${edges[i + 1] - 1}` : `${edges[i]}`);
  const z = bins[what].map((row, c) => row.map((n, r) => n / (size(bins.clients, c) * size(bins.rounds, r))));
  heatmap({
    x: bins.rounds, y: bins.clients, z, zmin: 0, zmax: Math.max(1e-9, ...z.flat()),
    colorscale: [[0, "#ffffff"], [0.5, "#56b4e9"], [1, "#00324e"]], colorbar: { title: { text: "share" }, tickformat: ".0%" },
    hovertext: z.map((row, c) => row.map((share, r) =>
      `clients ${span(bins.clients, c)}, rounds ${span(bins.rounds, r)}<br>${(100 * share).toFixed(1)} % ${sense}`)),
  }, 420, 90, `${label}: the share of rounds in which clients were ${sense}, in bins of rounds and clients`);
}

function often({ label, participation: { by_client: byClient, histogram } }) {
  const bar = (name, y, colour, shape) => ({ type: "bar", name, y, marker: { color: colour, pattern: pattern(shape) } });
  const traces = histogram
    ? [{ ...bar("clients", histogram.clients, COLOURS[0], ""), x: histogram.clients.map((_, i) => i * histogram.step),
      width: 0.94 * histogram.step, offset: 0 }]
    : [bar("replied", byClient.used, COLOURS[0], ""), bar("not used", byClient.unused, COLOURS[1], "/")];
  draw("often-plot", traces, {
    height: 270, margin: { t: 12, r: 20, l: 64, b: histogram ? 54 : 84 }, showlegend: !histogram, barmode: "stack", bargap: 0.2,
    xaxis: { ...BARE, title: named(histogram ? "rounds in which a client took part" : "client") },
    yaxis: { ...AXIS, title: { text: histogram ? "clients" : "rounds" } },
  }, `${label}: how often each client took part`);
}

// ---- 6. and 7. pictures, configuration, environment
function picture(run, { name, round, source }) {
  return make("figure", {}, make("img", { src: source, alt: `${name} after round ${round} of ${run.label}` }),
    make("figcaption", { textContent: `${name}, round ${round}` }));
}

function pictures() {
  const having = runs.filter((run) => run.pictures.length);
  $("pictures-list").replaceChildren(...having.flatMap((run) => [
    make("h3", { textContent: run.label }),
    make("div", { className: "pictures" }, ...run.pictures.map((one) => picture(run, one)))]));
  $("pictures-hint").textContent = report.pictures_hint;
  return having.length > 0;
}

function facts(id, { same, differing, rows }) {
  $(`${id}-same`).replaceChildren(...same.map(([key, text]) =>
    make("div", {}, make("dt", { textContent: key }), make("dd", { textContent: text }))));
  $(`${id}-differing`).hidden = !differing.length;
  table(`${id}-table`, [{ text: "Run", long: true }, ...differing.map((text) => ({ text, long: true }))],
    rows.map((row, i) => [runs[i].label, ...row]));
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
