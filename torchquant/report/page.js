"use strict";
document.documentElement.classList.add("js");

/* Tables: a click on a column sorts by it, another click the other way round. */
const UNITS = { "%": 0.01, "kB": 1e3, "MB": 1e6, "GB": 1e9, "ms": 1e-3 };
function valueOf(cell) {
  if (cell.dataset.value !== undefined) return Number(cell.dataset.value.replace("inf", "Infinity"));
  const text = cell.textContent.trim().replace(/,/g, "").replace("−", "-").replace("∞", "Infinity");
  const number = parseFloat(text);
  return number * (UNITS[text.replace(/^[-+\d.e]+\s*/, "")] || 1);
}
function sortBy(head) {
  const table = head.closest("table"), column = head.cellIndex, body = table.tBodies[0];
  const isText = head.classList.contains("t") && !body.querySelector(`td:nth-child(${column + 1})[data-value]`);
  const isUp = head.getAttribute("aria-sort") === null ? isText : head.getAttribute("aria-sort") === "descending";
  const rows = Array.from(body.rows, row => {
    const cell = row.cells[column];
    return { row, key: isText ? cell.textContent : valueOf(cell) };
  });
  const none = key => typeof key === "number" && Number.isNaN(key);
  rows.sort((a, b) => {
    if (none(a.key) || none(b.key)) return none(a.key) - none(b.key);
    const order = isText ? a.key.localeCompare(b.key, "en", { numeric: true }) : a.key - b.key || 0;
    return isUp ? order : -order;
  });
  for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", isUp ? "ascending" : "descending");
  body.append(...rows.map(entry => entry.row));
}
for (const head of document.querySelectorAll("table.sortable th")) {
  head.tabIndex = 0;
  head.title = "sort";
  head.addEventListener("click", () => sortBy(head));
  head.addEventListener("keydown", event => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    sortBy(head);
  });
}

/* Figures: plotly is unpacked once, and a figure is drawn when it first comes into view. */
const COLORS = ["#2f6fab", "#d1495b", "#3f9b7a", "#e0a030", "#7d5ba6", "#5b6b7d", "#c46aa5", "#8a9a2f"];
const AXIS = { gridcolor: "#e8ecf0", linecolor: "#c3ccd6", zerolinecolor: "#c3ccd6", automargin: true, exponentformat: "power" };
function withDefaults(layout) {
  const found = {
    font: { family: "system-ui, sans-serif", size: 12, color: "#1d2733" }, colorway: COLORS,
    margin: { l: 50, r: 15, t: 34, b: 40 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    hoverlabel: { namelength: -1 }, modebar: { bgcolor: "rgba(0,0,0,0)", color: "#b8c4d6", activecolor: "#5b6b7d" },
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: 11 } }, ...layout,
  };
  for (const name of new Set(["xaxis", "yaxis", ...Object.keys(layout).filter(key => /^[xy]axis\d*$/.test(key))]))
    found[name] = { ...AXIS, ...layout[name] };
  return found;
}
let library = null;
async function unpack() {
  const packed = document.getElementById("plotly");
  const bytes = Uint8Array.from(atob(packed.textContent), letter => letter.charCodeAt(0));
  const unpacked = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(unpacked).text();
  document.head.append(script);
  script.remove();
  packed.remove();
}
async function draw(place) {
  const figure = JSON.parse(place.querySelector("script").textContent);
  library ??= unpack();
  await library;
  const config = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d"] };
  await Plotly.newPlot(place, figure.data, withDefaults(figure.layout), config);
  place.dataset.drawn = "";
}
function showTable(place) {
  place.hidden = true;
  place.parentNode.querySelector("details").open = true;
}
const seen = new IntersectionObserver(entries => {
  for (const { isIntersecting, target } of entries) {
    if (!isIntersecting) continue;
    seen.unobserve(target);
    draw(target).catch(error => { console.error(error); showTable(target); });
  }
}, { rootMargin: "300px" });
for (const place of document.querySelectorAll(".plot")) seen.observe(place);

/* Graphs: a click on a node shows its details; buttons and Ctrl with the wheel zoom, dragging moves. */
function choose(graph, key) {
  for (const one of graph.querySelectorAll(".chosen")) one.classList.remove("chosen");
  graph.querySelector(`.node[href="#${key}"]`).classList.add("chosen");
  document.getElementById(key).classList.add("chosen");
  graph.querySelector(".hint").hidden = true;
  graph.querySelector(".panel").scrollTop = 0;
}
function zoom(canvas, factor) {
  const svg = canvas.querySelector("svg"), box = svg.viewBox.baseVal;
  const now = svg.width.baseVal.value / box.width;
  const next = factor ? Math.min(Math.max(now * factor, 0.1), 4) : 1;
  const middle = [canvas.scrollLeft + canvas.clientWidth / 2, canvas.scrollTop + canvas.clientHeight / 2];
  svg.setAttribute("width", box.width * next);
  svg.setAttribute("height", box.height * next);
  canvas.scrollLeft = middle[0] * next / now - canvas.clientWidth / 2;
  canvas.scrollTop = middle[1] * next / now - canvas.clientHeight / 2;
}
for (const graph of document.querySelectorAll(".graph")) {
  const canvas = graph.querySelector(".canvas");
  let from = null, wasDragged = false;
  for (const node of graph.querySelectorAll(".node")) {
    node.addEventListener("dragstart", event => event.preventDefault());
    node.addEventListener("click", event => {
      event.preventDefault();
      if (!wasDragged) choose(graph, node.getAttribute("href").slice(1));
    });
  }
  for (const button of graph.querySelectorAll(".zoom button"))
    button.addEventListener("click", () => zoom(canvas, Number(button.dataset.zoom)));
  canvas.addEventListener("wheel", event => {
    if (!event.ctrlKey) return;
    event.preventDefault();
    zoom(canvas, event.deltaY < 0 ? 1.15 : 1 / 1.15);
  }, { passive: false });
  canvas.addEventListener("pointerdown", event => {
    wasDragged = false;
    from = [event.clientX + canvas.scrollLeft, event.clientY + canvas.scrollTop];
  });
  window.addEventListener("pointermove", event => {
    if (from === null) return;
    const to = [from[0] - event.clientX, from[1] - event.clientY];
    if (Math.hypot(to[0] - canvas.scrollLeft, to[1] - canvas.scrollTop) > 4) wasDragged = true;
    if (wasDragged) [canvas.scrollLeft, canvas.scrollTop] = to;
    canvas.classList.toggle("dragged", wasDragged);
  });
  if (graph.dataset.first) choose(graph, graph.dataset.first);
  window.addEventListener("pointerup", () => { from = null; canvas.classList.remove("dragged"); });
}
