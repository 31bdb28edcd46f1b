"use strict";
// The report's interaction. All texts of models are set as text nodes, never as HTML.

const data = JSON.parse(document.getElementById("data").textContent);

function download(name, text, type) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

// Return the text of a CSV file (RFC 4180). A text that a spreadsheet would run as a formula gets
// an apostrophe before it.
function csv(columns, rows) {
  const cell = (value) => {
    if (value === null || value === undefined) return "";
    if (typeof value === "number") return String(value);
    const text = /^[=+\-@\t\r]/.test(value) ? "'" + value : String(value);
    return /[",\r\n]/.test(text) ? '"' + text.replaceAll('"', '""') + '"' : text;
  };
  return [columns, ...rows].map((row) => row.map(cell).join(",")).join("\r\n") + "\r\n";
}

function slug(title) {
  return title.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, "");
}

function button(label, title, action) {
  const element = document.createElement("button");
  element.type = "button";
  element.textContent = label;
  element.title = title;
  element.addEventListener("click", action);
  return element;
}

// The drawn SVG has the colours of the page. A file has dark text on a white background.
async function standaloneSvg(view) {
  const svg = await view.toSVG();
  return svg.replaceAll("currentColor", "#1b1b1b").replace("<svg ", '<svg style="background:#fff" ');
}

const tooltip = document.createElement("table");
tooltip.id = "tooltip";
tooltip.hidden = true;
document.body.append(tooltip);

// Show the values of a point next to the pointer. datum: null hides them.
function showValues(chart, event, datum) {
  tooltip.hidden = datum === null;
  if (datum === null) return;
  const row = datum.datum ?? datum; // the area around a point holds the point's own datum
  tooltip.replaceChildren(...chart.columns.map((column) => {
    const line = document.createElement("tr");
    const value = row[column];
    line.insertCell().textContent = column;
    line.insertCell().textContent = typeof value === "number" ? Number(value.toPrecision(4)) : value;
    return line;
  }));
  const { offsetWidth, offsetHeight } = tooltip;
  tooltip.style.left = `${Math.max(0, Math.min(event.clientX + 12, innerWidth - offsetWidth - 8))}px`;
  tooltip.style.top = `${Math.max(0, Math.min(event.clientY + 12, innerHeight - offsetHeight - 8))}px`;
}

async function drawChart(figure, chart) {
  const values = chart.rows.map((row) => Object.fromEntries(row.map((x, i) => [chart.columns[i], x])));
  const spec = { ...chart.spec, width: "container", data: { values }, config: data.config };
  spec.autosize = { type: "fit-x", contains: "padding" };
  const plot = figure.querySelector(".plot");
  const { view } = await vegaEmbed(plot, spec, {
    mode: "vega-lite",
    renderer: "svg",
    actions: false,
    defaultStyle: false,
    ast: true, // the content security policy forbids eval
    tooltip: (handler, event, item, value) => showValues(chart, event, value ? item.datum : null),
  });
  const name = slug(chart.title);
  const buttons = document.createElement("div");
  buttons.className = "buttons";
  buttons.append(
    button("SVG", `Save ${chart.title} as an SVG file`, async () =>
      download(`${name}.svg`, await standaloneSvg(view), "image/svg+xml")),
    " ",
    button("CSV", `Save the data of ${chart.title} as a CSV file`, () =>
      download(`${name}.csv`, csv(chart.columns, chart.rows), "text/csv")),
  );
  figure.append(buttons);
}

async function drawCharts() {
  for (const figure of document.querySelectorAll("figure[data-chart]")) {
    await drawChart(figure, data.charts[Number(figure.dataset.chart)]);
  }
  document.body.dataset.drawn = "true";
}

// Completions: filters, a search, and a list that grows by a button.

const PAGE_SIZE = 20;

function samples() {
  return data.completions.map(([run, step, kind, reward, finish, question, completion]) => {
    const [prompt, answer, level] = data.questions[question];
    const { name, method, seed } = data.runs[run];
    const searched = `${prompt}\n${answer}\n${completion}`.toLowerCase();
    return { run: name, method, seed, step, kind, level, reward, finish, prompt, answer, completion, searched };
  });
}

function distinct(rows, field) {
  const values = [...new Set(rows.map((row) => row[field]))];
  const numeric = values.every((value) => value === null || typeof value === "number");
  return numeric ? values.sort((a, b) => (a ?? -Infinity) - (b ?? -Infinity)) : values;
}

function label(text, control) {
  const element = document.createElement("label");
  element.append(text, control);
  return element;
}

function select(rows, field) {
  const element = document.createElement("select");
  element.name = field;
  element.append(new Option("all", ""));
  distinct(rows, field).forEach((value, i) => {
    const option = new Option(value === null ? "none" : String(value), String(i + 1));
    option.filterValue = value;
    element.append(option);
  });
  return element;
}

function input(type, name) {
  const element = document.createElement("input");
  element.type = type;
  element.name = name;
  if (type === "number") element.step = "any";
  return element;
}

function bound(control, otherwise) {
  return control.value === "" ? otherwise : Number(control.value);
}

// Append the text, with <mark> around what was searched.
function appendMarked(element, text, word) {
  const lower = text.toLowerCase();
  let end = 0;
  // Lower case may have another length, as of a dotted capital I. Then nothing is marked.
  if (word && lower.length === text.length) {
    for (let at = lower.indexOf(word); at >= 0; at = lower.indexOf(word, end)) {
      const mark = document.createElement("mark");
      mark.textContent = text.slice(at, at + word.length);
      element.append(text.slice(end, at), mark);
      end = at + word.length;
    }
  }
  element.append(text.slice(end));
}

function block(text, word, className) {
  const element = document.createElement("pre");
  element.className = className;
  appendMarked(element, text, word);
  return element;
}

function shownSample(sample, word) {
  const element = document.createElement("article");
  element.className = "sample";
  const header = document.createElement("header");
  const kind = document.createElement("b");
  kind.textContent = data.kinds[sample.kind] ?? sample.kind;
  header.append(kind);
  const facts = [sample.run, `step ${sample.step}`];
  if (sample.reward !== null) facts.push(`reward ${Number(sample.reward.toPrecision(3))}`);
  if (sample.level !== null) facts.push(`level ${sample.level}`);
  if (sample.finish === "length") facts.push("cut at the length limit");
  facts.push(`answer ${sample.answer}`);
  for (const fact of facts) {
    const span = document.createElement("span");
    appendMarked(span, fact, "");
    header.append(span);
  }
  element.append(header, block(sample.prompt, word, "question"), block(sample.completion, word, "completion"));
  return element;
}

function showCompletions(section) {
  const all = samples();
  const fields = ["run", "method", "kind", "step", "level"];
  const several = fields.filter((field) => distinct(all, field).length > 1);
  const selects = several.map((field) => select(all, field));
  const low = input("number", "reward-from");
  const high = input("number", "reward-to");
  const search = input("search", "text");
  search.placeholder = "search all texts";
  const controls = [...selects, low, high, search];
  const filters = document.createElement("form");
  filters.className = "filters";
  filters.addEventListener("submit", (event) => event.preventDefault());
  const count = document.createElement("p");
  count.className = "remark count";
  count.setAttribute("aria-live", "polite");
  const list = document.createElement("div");
  let found = all;
  let shown = 0;

  const more = button("Show more", "Show more completions", () => {
    const word = search.value.toLowerCase();
    list.append(...found.slice(shown, shown + PAGE_SIZE).map((sample) => shownSample(sample, word)));
    shown = Math.min(found.length, shown + PAGE_SIZE);
    count.textContent = `${found.length} of ${all.length} completions match, ${shown} are shown.`;
    more.hidden = shown === found.length;
  });
  const update = () => {
    const chosen = selects.filter((each) => each.value !== "");
    const word = search.value.toLowerCase();
    const from = bound(low, -Infinity);
    const to = bound(high, Infinity);
    const byReward = low.value !== "" || high.value !== "";
    found = all.filter((sample) =>
      chosen.every((each) => sample[each.name] === each.selectedOptions[0].filterValue) &&
      (!byReward || (sample.reward !== null && sample.reward >= from && sample.reward <= to)) &&
      sample.searched.includes(word));
    list.replaceChildren();
    shown = 0;
    more.click();
  };
  const columns = ["run", "method", "seed", "step", "kind", "level", "reward", "prompt", "answer", "completion"];
  const save = button("CSV", "Save the completions that match as a CSV file", () =>
    download("completions.csv", csv(columns, found.map((row) => columns.map((key) => row[key]))), "text/csv"));
  const labels = several.map((field, i) => label(field, selects[i]));
  filters.append(...labels, label("reward from", low), label("reward to", high), label("text", search), save);
  controls.forEach((control) => control.addEventListener("input", update));
  section.append(filters, count, list, more);
  update();
}

const completions = document.getElementById("completions");
if (completions) showCompletions(completions);
drawCharts();
