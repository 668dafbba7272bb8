(() => {
  const page = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const all = (selector) => [...document.querySelectorAll(selector)];
  const decimal = new Intl.NumberFormat("en", { maximumSignificantDigits: 4 });
  const number = (value) =>
    (value && Math.abs(value) < 1e-2 ? Number(value.toPrecision(3)).toExponential() : decimal.format(value));

  const { css, groupColor, plain, shorten, config, zooming, layout } = charts;

  // Curves

  const hidden = new Set(page.groups.flatMap((group, index) => (group.shown ? [] : [index])));
  const choice = { smoothing: page.smoothing, x: "step", log: false };

  const drawCurves = (element, spec) => charts.curves(element, spec, { groups: page.groups, hidden, choice });

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
    const groups = new Map();
    spec.values.forEach((value, index) => {
      if (value !== null) groups.set(value, [...(groups.get(value) ?? []), y[index]]);
    });
    if (![...groups.values()].some((list) => list.length > 1)) return [[], []];
    const order = known(spec);
    return [order, order.map((key) => groups.get(key).reduce((a, b) => a + b, 0) / groups.get(key).length)];
  };

  const drawScatter = (element, spec) => {
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
    return Plotly.react(element, [line, points], layout(x, y, { hovermode: "closest" }), zooming);
  };

  const drawFront = (element, spec) => {
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
    return Plotly.react(element, stairs ? [line, points] : [points], layout(named(x), named(y), { hovermode: "closest" }), zooming);
  };

  const drawImportance = (element, spec) => {
    const names = spec.names.map(plain);
    const bars = {
      type: "bar", orientation: "h", x: spec.values, y: names, marker: { color: css("hue-0") }, cliponaxis: false,
      text: spec.values.map((value) => `${Math.round(100 * value)} %`), textposition: "outside",
      textfont: { color: css("ink") }, hovertemplate: "%{y}: %{x:.1%}<extra></extra>",
    };
    const y = { autorange: "reversed", tickvals: names, ticktext: spec.names.map((name) => plain(shorten(name, 26))) };
    const x = { tickformat: ".0%", nticks: 4, range: [0, Math.min(1.12, 1.2 * Math.max(...spec.values, 0.05))] };
    return Plotly.react(element, [bars], layout(x, { ...y, gridcolor: css("card") }, { bargap: 0.45 }), config());
  };

  const drawParallel = (element, spec) => {
    const dimension = (spec) => {
      const title = spec.title.length > 18 ? spec.title.split(".").pop() : spec.title;
      const names = known(spec);
      const scale = spec.numeric ? (spec.log ? Math.log10 : Number) : (name) => names.indexOf(name);
      const [low, high] = [scale(names[0]), scale(names.at(-1))];
      const room = (high - low || 1) / 6;
      const between = [1, 2, 3].map((step) => low + (high - low) * step / 4);
      const middle = !spec.numeric || (spec.key && names.length <= 8) ? names.slice(1, -1)
        : between.map((tick) => Number((spec.log ? 10 ** tick : tick).toPrecision(2)));
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
        colorscale: ["rank-best", "rank-middle", "rank-worst"].map((name, index) => [index / 2, css(name)]) },
      unselected: { line: { color: css("soft"), opacity: 0.15 } },
    };
    return Plotly.react(element, [trace], layout({}, {}, { margin: { l: 70, r: 70, t: 46, b: 22 } }), config());
  };

  const kinds = { curves: drawCurves, fronts: drawFront, scatters: drawScatter, importance: drawImportance,
    parallel: drawParallel };
  const elements = all(".chart");
  const drawOne = (element) => {
    const { kind, index } = element.dataset;
    element.classList.remove("wait");
    return kinds[kind](element, page[kind][index]);
  };
  const draw = (kind) => window.Plotly && elements.filter((element) => !kind || element.dataset.kind === kind).forEach(drawOne);

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
    legend.forEach((button, index) => button.setAttribute("aria-pressed", String(!hidden.has(index))));
    draw("curves");
  };
  legend.forEach((button, index) => button.addEventListener("click", () => {
    if (!hidden.delete(index)) hidden.add(index);
    showGroups();
  }));
  const sets = { all: () => true, none: () => false, best: (index) => index < 5 };
  for (const button of all("[data-show]")) button.addEventListener("click", () => {
    page.groups.forEach((_, index) => (sets[button.dataset.show](index) ? hidden.delete(index) : hidden.add(index)));
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

  // The page of a run that is alive loads itself again; what a reader has set stays.

  const memory = `qlora ${location.pathname}`;
  const remember = () => {
    const fields = all("input, select").map((field) => (field.type === "checkbox" ? field.checked : field.value));
    const open = all("details").map((part) => part.open);
    const inner = all("pre, .scroll, .across").map((part) => [part.scrollTop, part.scrollLeft]);
    const kept = { at: Date.now(), y: scrollY, theme: root.dataset.theme, hidden: [...hidden], fields, open, inner };
    try {
      sessionStorage.setItem(memory, JSON.stringify(kept));
    } catch { /* no storage: the page begins anew */ }
  };
  const recall = () => {
    let kept = null;
    try {
      kept = JSON.parse(sessionStorage.getItem(memory));
      sessionStorage.removeItem(memory);
    } catch { /* no storage */ }
    if (!kept || Date.now() - kept.at > 60_000) return;
    if (kept.theme) root.dataset.theme = kept.theme;
    if (kept.hidden.every((index) => index < page.groups.length)) kept.hidden.forEach((index) => hidden.add(index));
    const set = (list, values, put) => list.length === values.length && list.forEach((item, index) => put(item, values[index]));
    set(all("details"), kept.open, (part, open) => (part.open = open));
    set(all("input, select"), kept.fields, (field, value) => {
      const name = field.type === "checkbox" ? "checked" : "value";
      if (field[name] === value) return;
      field[name] = value;
      for (const event of ["input", "change"]) field.dispatchEvent(new Event(event));
    });
    set(all("pre, .scroll, .across"), kept.inner, (part, [top, left]) => part.scrollTo(left, top));
    scrollTo(0, kept.y);
  };
  const follow = ({ written, seconds, silent }) => {
    const note = document.getElementById("alive");
    const isRead = () => !getSelection().isCollapsed || document.activeElement?.matches("input[type=search]:not(:placeholder-shown)");
    const look = () => {
      if (Date.now() - written > 1000 * silent) {
        note.textContent = `no news for ${Math.round(silent / 60)} minutes: it has ended, or does something long; load the page again to see`;
        clearInterval(timer);
      } else if (!document.hidden && !isRead() && Date.now() - opened >= 1000 * seconds) {
        remember();
        location.reload();
      }
    };
    const opened = Date.now();
    const timer = setInterval(look, 1000);
    document.addEventListener("visibilitychange", look);
    if (Date.now() - written > 1000 * silent) look();
  };

  (async () => {
    recall();
    if (page.live) follow(page.live);
    if (elements.length) await load();
    for (const element of elements) {
      await new Promise(requestAnimationFrame); // the page can be read and scrolled between two charts
      await drawOne(element);
    }
  })();
})();
