"use strict";
(() => {
  const page = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const all = (selector) => [...document.querySelectorAll(selector)];
  const decimal = new Intl.NumberFormat("en", { maximumSignificantDigits: 4 });
  const number = (value) =>
    (value && Math.abs(value) < 1e-2 ? Number(value.toPrecision(3)).toExponential() : decimal.format(value));

  // Colours are the style sheet's, so that charts follow the page from light to dark.
  const probe = document.createElement("span");
  probe.hidden = true;
  document.body.append(probe);
  const css = (name) => {
    probe.style.color = `var(--${name})`;
    return getComputedStyle(probe).color;
  };
  const channels = (name) => css(name).match(/[\d.]+/g).slice(0, 3).map(Number);
  const between = (a, b, share) => `rgb(${a.map((from, place) => Math.round(from + (b[place] - from) * share))})`;
  const ranked = (share) => {
    const [best, middle, worst] = ["rank-best", "rank-middle", "rank-worst"].map(channels);
    return share < 0.5 ? between(best, middle, 2 * share) : between(middle, worst, 2 * share - 1);
  };
  const groupColor = (group) => (group.hue === null ? ranked(group.rank) : css(`hue-${group.hue}`));

  // Plotly reads a little HTML in texts; what users write is text and nothing else.
  const plain = (text) => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
  const shorten = (text, most) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);

  const touch = matchMedia("(pointer: coarse)").matches; // a finger on a chart scrolls the page
  // Named one by one: the library has another that would send a chart to its makers.
  const config = (...buttons) => ({
    responsive: true, displaylogo: false, displayModeBar: touch ? false : "hover", modeBarButtons: [["toImage", ...buttons]],
  });
  const zooming = config("zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d");
  const axis = (more) => ({
    gridcolor: css("line"), linecolor: css("line"), zeroline: false, automargin: true, ticks: "", fixedrange: touch,
    title: { font: { size: 12, color: css("soft") }, standoff: 8 }, tickfont: { size: 11, color: css("soft") }, ...more,
  });
  const layout = (x, y, more) => ({
    paper_bgcolor: css("card"), plot_bgcolor: css("card"), showlegend: false, uirevision: "kept",
    font: { family: getComputedStyle(document.body).fontFamily, color: css("ink"), size: 12 },
    margin: { l: 12, r: 14, t: 12, b: 12 }, dragmode: touch ? false : "zoom",
    hoverlabel: { bgcolor: css("card"), bordercolor: css("line"), font: { color: css("ink"), size: 12 }, align: "left",
      namelength: 60 },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: css("soft"), activecolor: css("accent") },
    xaxis: axis(x), yaxis: axis(y), ...more,
  });

  // Curves

  const hidden = new Set(page.groups.flatMap((group, place) => (group.shown ? [] : [place])));
  const choice = { smoothing: page.smoothing, x: "step", log: false };

  /** Exponential moving average, weighted so that the first values count in full. */
  const smooth = (values, weight) => {
    let sum = 0;
    let norm = 0;
    return values.map((value) => {
      sum = weight * sum + (1 - weight) * value;
      norm = weight * norm + 1 - weight;
      return sum / norm;
    });
  };

  const drawCurves = (place, spec) => {
    const lines = spec.lines.filter((line) => !hidden.has(line.group));
    const few = lines.length <= 12; // more are no longer told apart, nor read one by one
    const traces = lines.flatMap((line) => {
      const group = page.groups[line.group];
      const color = groupColor(group);
      const smoothed = spec.noisy && choice.smoothing > 0 && line.value.length > 2 && line.smooth;
      const x = line[choice.x];
      const trace = {
        x, y: smoothed ? smooth(line.value, choice.smoothing) : line.value, name: plain(group.label), type: "scatter",
        mode: line.value.length < 40 && !(spec.noisy && line.value.length > 12) ? "lines+markers" : "lines",
        line: { color, width: group.best ? 2.6 : 1.6, dash: line.dash }, marker: { size: 5, color },
        hovertemplate: "%{y:.5~g}",
      };
      const raw = { ...trace, y: line.value, mode: "lines", hoverinfo: "skip", hovertemplate: null, opacity: 0.25,
        line: { color, width: 1 } };
      return smoothed && few ? [trace, raw] : [trace];
    });
    const x = {
      title: { text: choice.x, standoff: 8, font: { size: 12, color: css("soft") } },
      tickformat: choice.x === "step" ? ",d" : ".3~s", hoverformat: ",", unifiedhovertitle: { text: `${choice.x} %{x:,}` },
      spikethickness: 1, spikecolor: css("soft"), spikedash: "dot",
    };
    const y = { type: choice.log && spec.logarithmic ? "log" : "linear", tickformat: spec.format, nticks: 7,
      rangemode: spec.fromZero ? "tozero" : "normal", exponentformat: "e" };
    traces.reverse(); // the best on top
    return Plotly.react(place, traces, layout(x, y, { hovermode: lines.length <= 6 ? "x unified" : "closest" }), zooming);
  };

  // Parameters

  /** The different values that runs have, in order; some runs may have none. */
  const known = ({ numeric, values }) =>
    [...new Set(values.filter((value) => value !== null))].sort(numeric ? (a, b) => a - b : undefined);
  const ticks = (spec) => {
    const values = known(spec);
    if (spec.key && values.length <= 8) return { tickvals: values, ticktext: values.map((value) => number(value)) };
    return spec.log ? { dtick: 1 } : { nticks: 6 };
  };

  /** Means over the runs that share a value, where several do. */
  const means = (spec, y) => {
    const found = new Map();
    spec.values.forEach((value, place) => {
      if (value !== null) found.set(value, [...(found.get(value) ?? []), y[place]]);
    });
    if (![...found.values()].some((list) => list.length > 1)) return [[], []];
    const order = known(spec);
    return [order, order.map((key) => found.get(key).reduce((a, b) => a + b, 0) / found.get(key).length)];
  };

  const drawScatter = (place, spec) => {
    const { objective, labels, groups } = page.points;
    const [meanX, meanY] = means(spec, objective);
    const points = {
      x: spec.values, y: objective, type: "scatter", mode: "markers", text: labels.map(plain), cliponaxis: false,
      marker: { size: 10, color: groups.map((group) => groupColor(page.groups[group])),
        line: { width: 1.5, color: css("card") } },
      hovertemplate: `%{text}<br>${plain(page.objective)} %{y:.5~g}<extra></extra>`,
    };
    const line = { x: meanX, y: meanY, type: "scatter", mode: "lines", hoverinfo: "skip",
      line: { color: css("soft"), width: 1.5, dash: "dot" } };
    const x = spec.numeric
      ? { type: spec.log ? "log" : "linear", tickangle: 0, ...ticks(spec) }
      : { type: "category", categoryorder: "array", categoryarray: known(spec), tickvals: known(spec),
          ticktext: known(spec).map((value) => plain(shorten(value, 16))) };
    const y = { title: { text: plain(page.objective), standoff: 8, font: { size: 12, color: css("soft") } }, nticks: 6 };
    return Plotly.react(place, [line, points], layout(x, y, { hovermode: "closest" }), zooming);
  };

  const drawFront = (place, spec) => {
    const { x, y, labels, groups, front, stairs } = spec;
    const chosen = [...front.keys()].filter((nth) => front[nth]).sort((a, b) => x.values[a] - x.values[b]);
    const points = {
      x: x.values, y: y.values, type: "scatter", mode: "markers", text: labels.map(plain), cliponaxis: false,
      marker: { size: front.map((is) => (is ? 13 : 8)), opacity: front.map((is) => (is ? 1 : 0.45)),
        color: groups.map((group) => groupColor(page.groups[group])), line: { width: 1.5, color: css("card") } },
      hovertemplate: `%{text}<br>${plain(x.title)} %{x:.5~g}<br>${plain(y.title)} %{y:.5~g}<extra></extra>`,
    };
    const line = {
      x: chosen.map((nth) => x.values[nth]), y: chosen.map((nth) => y.values[nth]), type: "scatter", mode: "lines",
      hoverinfo: "skip", line: { color: css("soft"), width: 1.5, dash: "dot", shape: stairs },
    };
    const named = ({ title, unit }) => ({ nticks: 6,
      title: { text: plain(unit ? `${title} (${unit})` : title), standoff: 8, font: { size: 12, color: css("soft") } } });
    return Plotly.react(place, stairs ? [line, points] : [points], layout(named(x), named(y), { hovermode: "closest" }), zooming);
  };

  const drawImportance = (place, spec) => {
    const names = spec.names.map(plain);
    const bars = {
      type: "bar", orientation: "h", x: spec.values, y: names, marker: { color: css("hue-0") }, cliponaxis: false,
      text: spec.values.map((value) => `${Math.round(100 * value)} %`), textposition: "outside",
      textfont: { color: css("ink") }, hovertemplate: "%{y}: %{x:.1%}<extra></extra>",
    };
    const y = { autorange: "reversed", tickvals: names, ticktext: spec.names.map((name) => plain(shorten(name, 26))) };
    const x = { tickformat: ".0%", nticks: 4, range: [0, Math.min(1.12, 1.2 * Math.max(...spec.values, 0.05))] };
    return Plotly.react(place, [bars], layout(x, { ...y, gridcolor: css("card") }, { bargap: 0.45 }), config());
  };

  const drawParallel = (place, spec) => {
    const dimension = (spec) => {
      const title = spec.title.length > 18 ? spec.title.split(".").pop() : spec.title;
      const names = known(spec);
      const scale = spec.numeric ? (spec.log ? Math.log10 : Number) : (name) => names.indexOf(name);
      const [low, high] = [scale(names[0]), scale(names.at(-1))];
      const room = (high - low || 1) / 6;
      const between = [1, 2, 3].map((step) => low + (high - low) * step / 4);
      const middle = !spec.numeric || (spec.key && names.length <= 8) ? names.slice(1, -1)
        : between.map((place) => Number((spec.log ? 10 ** place : place).toPrecision(2)));
      const shown = [...new Set([names[0], ...middle, names.at(-1)])];
      const lacking = spec.values.includes(null);
      return {
        label: plain(shorten(title, 18)),
        values: spec.values.map((value) => (value === null ? low - room : scale(value))),
        tickvals: [...(lacking ? [low - room] : []), ...shown.map(scale)],
        // These texts are not read as HTML.
        ticktext: [...(lacking ? ["–"] : []), ...shown.map((value) => (spec.numeric ? number(value) : shorten(value, 16)))],
        range: [low - (lacking ? 1.3 : 0.1) * room, high + 0.1 * room],
      };
    };
    const { objective } = page.points;
    const sign = page.better === "lower" ? 1 : -1;
    const trace = {
      type: "parcoords", dimensions: spec.dimensions.map(dimension), labelfont: { size: 12, color: css("ink") },
      tickfont: { size: 11, color: css("soft") }, rangefont: { size: 1, color: "rgba(0,0,0,0)" },
      line: { color: objective.map((value) => sign * value),
        colorscale: ["rank-best", "rank-middle", "rank-worst"].map((name, place) => [place / 2, css(name)]) },
      unselected: { line: { color: css("soft"), opacity: 0.15 } },
    };
    return Plotly.react(place, [trace], layout({}, {}, { margin: { l: 70, r: 70, t: 46, b: 22 } }), config());
  };

  const kinds = { curves: drawCurves, fronts: drawFront, scatters: drawScatter, importance: drawImportance,
    parallel: drawParallel };
  const charts = all(".chart");
  const drawOne = (place) => {
    const { kind, index } = place.dataset;
    place.classList.remove("wait");
    return kinds[kind](place, page[kind][index]);
  };
  const draw = (kind) => charts.filter((place) => !kind || place.dataset.kind === kind).forEach(drawOne);

  /** Runs the plotting library, which the page holds packed: it is a third of the size. */
  const load = async () => {
    const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), (sign) => sign.charCodeAt(0));
    const text = new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
    const script = document.createElement("script");
    script.textContent = await text;
    document.head.append(script);
  };

  // Controls

  const legend = all(".legend button");
  const showGroups = () => {
    legend.forEach((button, place) => button.setAttribute("aria-pressed", String(!hidden.has(place))));
    draw("curves");
  };
  legend.forEach((button, place) => button.addEventListener("click", () => {
    if (!hidden.delete(place)) hidden.add(place);
    showGroups();
  }));
  const sets = { all: () => true, none: () => false, best: (place) => place < 5 };
  for (const button of all("[data-show]")) button.addEventListener("click", () => {
    page.groups.forEach((_, place) => (sets[button.dataset.show](place) ? hidden.delete(place) : hidden.add(place)));
    showGroups();
  });
  const listen = (id, event, action) => document.getElementById(id)?.addEventListener(event, action);
  listen("smoothing", "input", ({ target }) => {
    choice.smoothing = Number(target.value);
    target.nextElementSibling.textContent = choice.smoothing.toFixed(2);
    draw("curves");
  });
  listen("log", "change", ({ target }) => {
    choice.log = target.checked;
    draw("curves");
  });
  listen("x", "change", ({ target }) => {
    choice.x = target.value;
    draw("curves");
  });

  const isDark = () => (root.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  listen("theme", "click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    draw();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw());

  for (const button of all("button[data-copy]")) button.addEventListener("click", async () => {
    const source = document.getElementById(button.dataset.copy);
    let done = true;
    try {
      await navigator.clipboard.writeText(source.textContent);
    } catch { // a page opened from a file may not use the clipboard directly
      getSelection().selectAllChildren(source);
      done = document.execCommand("copy");
    }
    button.textContent = done ? "copied" : "press Ctrl-C";
    setTimeout(() => (button.textContent = "copy"), 2000);
  });

  const cellValue = (row, column) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
  const compare = (a, b) => {
    const [x, y] = [Number(a), Number(b)];
    return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b, "en", { numeric: true }) : x - y;
  };
  for (const button of all("th button")) button.addEventListener("click", () => {
    const head = button.closest("th");
    const body = head.closest("table").tBodies[0];
    const rising = head.getAttribute("aria-sort") !== "ascending";
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", rising ? "ascending" : "descending");
    const keyed = [...body.rows].map((row) => [cellValue(row, head.cellIndex), row]);
    keyed.sort(([a], [b]) => (a === "") - (b === "") || (rising ? compare(a, b) : compare(b, a))); // what is unknown: last
    body.append(...keyed.map(([, row]) => row));
  });

  for (const input of all("input[data-filter]")) input.addEventListener("input", () => {
    const wanted = input.value.toLowerCase();
    for (const row of document.getElementById(input.dataset.filter).tBodies[0].rows)
      row.hidden = !row.textContent.toLowerCase().includes(wanted);
  });
  listen("wrong", "change", ({ target }) => {
    for (const answer of all(".answers > [data-right='true']")) answer.hidden = target.checked;
  });

  (async () => {
    if (charts.length) await load();
    for (const place of charts) {
      await new Promise(requestAnimationFrame); // the page can be read and scrolled between two charts
      await drawOne(place);
    }
  })();
})();
