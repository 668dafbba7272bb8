"use strict";
(() => {
  const MOST = 12; // curves that are drawn where nothing is selected
  const POLL = 2000; // milliseconds
  const root = document.documentElement;
  const byId = (id) => document.getElementById(id);
  const el = (tag, options = {}, ...children) => {
    const { data, ...rest } = options;
    const node = Object.assign(document.createElement(tag), rest);
    Object.assign(node.dataset, data);
    node.append(...children.filter((child) => child !== null)); // texts stay texts
    return node;
  };
  const address = (path) => path.split("/").map((part) => encodeURIComponent(part.toWellFormed?.() ?? part)).join("/");

  // Numbers as people read them

  const isNumber = (value) => typeof value === "number";
  const isShare = (name) => /(exact_match|win_rate|accuracy|acc|acc_norm|_match|mfu|data_wait)$/.test(name);
  const share = (value) => {
    if (value > 0 && value < 0.0005) return "<0.1 %";
    return value < 1 && value >= 0.9995 ? ">99.9 %" : `${(100 * value).toFixed(1)} %`;
  };
  const format = (name, value) => {
    if (value === null || value === undefined) return "–";
    if (!isNumber(value)) return String(value);
    if (isShare(name)) return share(value);
    return Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : value.toPrecision(4);
  };
  const duration = (seconds) => {
    if (!isNumber(seconds)) return "–";
    const two = (value) => String(Math.floor(value)).padStart(2, "0");
    const [hours, rest] = [Math.floor(seconds / 3600), seconds % 3600];
    return hours ? `${hours}:${two(rest / 60)}:${two(rest % 60)}` : `${Math.floor(rest / 60)}:${two(rest % 60)}`;
  };
  const time = (seconds) => (seconds ? new Date(1000 * seconds).toLocaleString(undefined, { dateStyle: "short", timeStyle: "short" }) : "–");
  const lastPart = (path) => path?.replace(/\/+$/, "").split("/").pop();
  const NAMES = { peak_memory_gb: "peak memory (GB)", train_tokens_per_second: "tokens/s", train_mfu: "MFU", train_data_wait: "data wait" };
  const title = (name) => NAMES[name] ?? name.replace(/^eval_/, "").replaceAll("_", " ");

  // State: what is selected, searched and sorted stands in the address, so that it can be kept and sent.

  let list = { runs: [], sweeps: [], keys: [] };
  const state = { runs: [], q: "", status: "", data: "", model: "", sweep: "", sort: "started", up: "" };
  const readAddress = () => {
    const values = new URLSearchParams(location.search);
    for (const key of Object.keys(state)) state[key] = key === "runs" ? values.getAll("run") : (values.get(key) ?? state[key]);
  };
  const writeAddress = () => {
    const values = new URLSearchParams();
    for (const [key, value] of Object.entries(state)) {
      if (key === "runs") value.forEach((run) => values.append("run", run));
      else if (value && !(key === "sort" && value === "started")) values.set(key, value);
    }
    history.replaceState(null, "", values.size ? `?${values}` : location.pathname);
  };

  // The table

  const metricsOf = (runs) => {
    const counts = new Map();
    for (const run of runs) for (const name of Object.keys(run.metrics))
      if (/^eval_/.test(name) && !/perplexity|\/|_accuracy_\w/.test(name)) counts.set(name, (counts.get(name) ?? 0) + 1);
    return [...counts].sort((a, b) => b[1] - a[1]).slice(0, 4).map(([name]) => name).sort((a, b) => (b === "eval_loss") - (a === "eval_loss"));
  };
  /** Without those in which all runs are the same. */
  const columns = () => {
    const differs = (column) => new Set(list.runs.map((run) => column.value(run) ?? "")).size > 1;
    return allColumns().filter((column) => !column.minor || list.runs.length < 2 || differs(column));
  };
  const allColumns = () => [
    { key: "name", title: "run", value: label, cell: nameCell },
    { key: "status", title: "status", value: (run) => run.status, cell: statusCell },
    ...metricsOf(list.runs).map((name) => ({
      key: name, title: title(name), number: true, value: (run) => run.metrics[name],
      cell: (run) => metricCell(run, name),
    })),
    { key: "data.name", title: "data", minor: true, value: (run) => run.config["data.name"] },
    { key: "model.name", title: "model", minor: true, value: (run) => run.config["model.name"], text: (run) => lastPart(run.config["model.name"]) },
    ...list.keys.filter((key) => !["data.name", "model.name"].includes(key)).map((key) => ({
      key, title: key.split(".").pop().replaceAll("_", " "), number: true, minor: true, value: (run) => run.config[key],
    })),
    { key: "seconds", title: "time", number: true, minor: true, value: (run) => run.seconds, text: (run) => duration(run.seconds) },
    { key: "started", title: "started", number: true, minor: true, value: (run) => run.started, text: (run) => time(run.started) },
  ];
  /** The name of a run; a job of a sweep by what it varies. */
  const label = (run) => (run.sweep && run.overrides.length
    ? run.overrides.map((override) => override.replace(/^[+~]*([^=]*\.)?/, "")).join("  ") : run.name);
  const nameCell = (run) => {
    const name = run.page
      ? el("a", { href: `/files/${address(run.path)}/report.html`, textContent: label(run) })
      : el("span", { className: "name", textContent: label(run) });
    const more = [run.sweep && `of ${run.sweep.split("/").pop()}`, run.task !== "train" && (run.of ? `${run.task} of ${run.of}` : run.task)].filter(Boolean).join(", ");
    return el("td", { className: "run", title: run.path }, name, more ? el("span", { className: "soft", textContent: more }) : null);
  };
  const statusCell = (run) => {
    const cell = el("td", { className: "state", title: run.reason ?? "" }, el("span", { className: `pill ${run.status}`, textContent: run.status }));
    if (run.status === "finished" || !isNumber(run.step) || !isNumber(run.steps)) return cell;
    const left = run.status === "running" && isNumber(run.left) ? `, ${duration(run.left)} left` : "";
    cell.append(el("span", { className: "soft", textContent: `step ${run.step} of ${run.steps}${left}` }));
    if (run.status === "running") cell.append(el("progress", { max: run.steps, value: run.step }));
    return cell;
  };
  const metricCell = (run, name) => {
    const base = run.metrics[`base_${name}`];
    const known = run.metrics[name] !== undefined;
    return el("td", { className: "number" },
      known && base !== undefined ? el("span", { className: "base", textContent: `${format(name, base)} →` }) : null,
      known ? format(name, run.metrics[name]) : "–");
  };
  const rowOf = (run, shown) => {
    const box = el("input", { type: "checkbox", checked: state.runs.includes(run.path) });
    box.setAttribute("aria-label", `select ${run.name}`);
    box.addEventListener("change", () => select(run.path, box.checked));
    const cells = shown.map((column) => {
      const text = String((column.text ?? column.value)(run) ?? "–");
      const cell = column.cell ? column.cell(run) : el("td", { textContent: text === "null" ? "–" : text, title: column.key === "model.name" ? (column.value(run) ?? "") : "" });
      cell.classList.toggle("number", Boolean(column.number));
      cell.classList.toggle("minor", Boolean(column.minor));
      cell.classList.toggle("model", column.key === "model.name");
      return cell;
    });
    const row = el("tr", { data: { path: run.path } }, el("td", {}, box), ...cells);
    row.setAttribute("aria-selected", String(box.checked));
    return row;
  };

  const text = (run) => [run.path, run.status, run.reason, ...run.overrides, ...Object.values(run.config)].join(" ").toLowerCase();
  const isShown = (run) =>
    state.q.toLowerCase().split(/\s+/).every((word) => text(run).includes(word)) &&
    (!state.status || run.status === state.status) &&
    (!state.data || run.config["data.name"] === state.data) &&
    (!state.model || run.config["model.name"] === state.model) &&
    (!state.sweep || run.sweep === state.sweep);
  const compare = (a, b) => {
    const [x, y] = [Number(a), Number(b)];
    return Number.isNaN(x) || Number.isNaN(y) ? String(a).localeCompare(String(b), "en", { numeric: true }) : x - y;
  };
  const shownRuns = () => {
    const column = columns().find(({ key }) => key === state.sort);
    const runs = list.runs.filter(isShown);
    if (!column) return runs;
    const isKnown = (value) => value !== undefined && value !== null && value !== "";
    return runs.sort((a, b) => {
      const [x, y] = [column.value(a), column.value(b)];
      if (!isKnown(x) || !isKnown(y)) return isKnown(y) - isKnown(x); // what is unknown: last
      return state.up ? compare(x, y) : compare(y, x);
    });
  };

  const kept = new Map(); // rows that have not changed stay, and so does what has the focus in them
  const drawTable = () => {
    const shown = columns();
    const head = document.querySelector("#runs thead tr");
    const heads = shown.map((column) => {
      const button = el("button", { textContent: column.title });
      button.addEventListener("click", () => {
        state.up = state.sort === column.key ? (state.up ? "" : "1") : /name|status/.test(column.key) || /loss/.test(column.key) ? "1" : "";
        state.sort = column.key;
        writeAddress();
        drawTable();
      });
      const cell = el("th", { scope: "col", className: `${column.number ? "number" : ""} ${column.minor ? "minor" : ""}` }, button);
      if (state.sort === column.key) cell.setAttribute("aria-sort", state.up ? "ascending" : "descending");
      return cell;
    });
    head.replaceChildren(el("th", {}), ...heads);
    const layout = shown.map(({ key }) => key).join();
    const runs = shownRuns();
    const rows = runs.map((run) => {
      const stamp = JSON.stringify([run, layout, state.runs.includes(run.path)]);
      if (kept.get(run.path)?.stamp !== stamp) kept.set(run.path, { stamp, row: rowOf(run, shown) });
      return kept.get(run.path).row;
    });
    const body = document.querySelector("#runs tbody");
    if (rows.length !== body.rows.length || rows.some((row, index) => row !== body.rows[index])) body.replaceChildren(...rows);
    const selected = state.runs.length ? `, ${state.runs.length} selected` : "; select one to look at it, two to compare them";
    byId("count").textContent = list.runs.length
      ? `${runs.length} of ${list.runs.length} runs${selected}`
      : "There are no runs in this folder yet; the first one appears here by itself.";
    byId("clear").hidden = !state.runs.length;
  };
  const options = (id, key) => {
    const known = [...new Set(list.runs.map(key).filter(Boolean))].sort();
    const select = byId(id);
    const now = [...select.options].slice(1).map((option) => option.value);
    if (select.options.length && now.join("\n") === known.join("\n")) return;
    const short = (name) => (id === "sweep" || id === "model" ? lastPart(name) : name);
    select.replaceChildren(el("option", { value: "", textContent: "all" }), ...known.map((name) => el("option", { value: name, textContent: short(name) })));
    select.value = state[id];
    select.closest("label").hidden = known.length < 2 && !state[id];
  };
  const drawSweeps = () => {
    byId("sweeps").hidden = !list.sweeps.length;
    document.querySelector("nav a[href='#sweeps']").hidden = !list.sweeps.length;
    byId("sweeps-body").replaceChildren(...list.sweeps.map(({ path, runs, page, verdicts = [] }) => {
      const name = page ? el("a", { href: `/files/${address(path)}/report.html`, textContent: path }) : el("span", { textContent: path });
      const only = el("button", { textContent: "its runs" });
      only.addEventListener("click", () => {
        state.sweep = byId("sweep").value = path;
        writeAddress();
        drawAll();
        byId("table").scrollIntoView();
      });
      return el("p", {}, name, el("span", { className: "soft", textContent: ` ${runs} run${runs === 1 ? "" : "s"} ` }), only, ...verdicts.flatMap((text) => [el("br"), el("span", { textContent: text })]));
    }));
  };

  // Curves

  const choice = { smoothing: 0.6, x: "step", log: false };
  const hidden = new Set();
  let curves = { runs: [], charts: [] };
  let loading = null;
  const load = () => (loading ??= new Promise((done, failed) => {
    document.head.append(el("script", { src: "/assets/plotly.js", onload: done, onerror: failed }));
  }));
  const ask = async (path) => {
    const answer = await fetch(path, { cache: "no-store" });
    if (!answer.ok) throw new Error(await answer.text());
    return answer.json();
  };
  const query = (paths) => paths.map((path) => `run=${encodeURIComponent(path.toWellFormed?.() ?? path)}`).join("&");
  /** The name of a run among others: its path where two have the same name. */
  const nameOf = (path, among) => {
    const known = (other) => list.runs.find((run) => run.path === other);
    const name = (other) => (known(other) ? label(known(other)) : other.split("/").pop());
    return among.some((other) => other !== path && name(other) === name(path)) ? path : name(path);
  };
  const charted = () => (state.runs.length ? state.runs : shownRuns().slice(0, MOST).map((run) => run.path));
  const groups = () => curves.runs.map((path, index) => ({
    label: nameOf(path, curves.runs),
    hue: curves.runs.length <= 8 ? index : null, rank: index / Math.max(curves.runs.length - 1, 1), best: false,
  }));
  const drawCurves = () => {
    const legend = groups();
    const drawn = new Set(curves.charts.flatMap((spec) => spec.lines.map((line) => line.group)));
    byId("legend").replaceChildren(...legend.map((group, index) => {
      const swatch = el("i", { className: "swatch" });
      swatch.style.background = charts.groupColor(group);
      const button = el("button", { title: group.label }, swatch, el("span", { textContent: group.label }));
      button.setAttribute("aria-pressed", String(!hidden.has(curves.runs[index])));
      button.hidden = !drawn.has(index);
      button.addEventListener("click", () => {
        if (!hidden.delete(curves.runs[index])) hidden.add(curves.runs[index]);
        drawCurves();
      });
      return button;
    }));
    const off = new Set(curves.runs.flatMap((path, index) => (hidden.has(path) ? [index] : [])));
    const holder = byId("charts");
    const names = curves.charts.map(({ name }) => name);
    for (const figure of [...holder.children]) if (!names.includes(figure.dataset.name)) figure.remove();
    const figures = names.map((name, index) => {
      let figure = [...holder.children].find((node) => node.dataset.name === name);
      const spec = curves.charts[index];
      figure ??= el("figure", { data: { name } }, el("figcaption", {}, spec.title, el("small", { textContent: spec.unit })), el("div", { className: "chart" }));
      if (holder.children[index] !== figure) holder.insertBefore(figure, holder.children[index] ?? null);
      return figure;
    });
    // A chart is as wide as its figure, which the others make narrower: all of them stand before one is drawn.
    figures.forEach((figure, index) => charts.curves(figure.lastElementChild, curves.charts[index], { groups: legend, hidden: off, choice }));
    const total = list.runs.filter(isShown).length;
    byId("curves-note").textContent = !curves.charts.length ? "Nothing was logged yet."
      : !state.runs.length && total > MOST ? `The first ${MOST} of ${total} runs of the table; select others to see theirs.` : "";
  };
  let askedCurves = "";
  const refreshCurves = async () => {
    const paths = charted();
    const stamps = paths.map((path) => list.runs.find((run) => run.path === path)).map((run) => run && [run.path, run.status, run.step]);
    const wanted = JSON.stringify([paths, stamps]);
    if (wanted === askedCurves) return;
    askedCurves = wanted;
    const [answer] = await Promise.all([paths.length ? ask(`/api/curves?${query(paths)}`) : { runs: [], charts: [] }, load()]);
    if (wanted !== askedCurves) return; // another selection since
    curves = answer;
    drawCurves();
  };

  // One run, or two side by side

  const table = (heads, rows) => el("div", { className: "scroll" }, el("table", {},
    el("thead", {}, el("tr", {}, ...heads.map((head) => el("th", { scope: "col", textContent: head })))),
    el("tbody", {}, ...rows)));
  const cells = (...texts) => texts.map((text) => (text instanceof Node ? text : el("td", { textContent: text ?? "–" })));
  const verdict = (answer, right) =>
    (answer === null || answer === undefined ? el("td", { textContent: "–" })
      : el("td", { className: right ? "right" : "wrong" }, el("div", { textContent: `${right ? "✓" : "✗"} ${answer || "(nothing)"}` })));
  const keyCell = (key) => el("td", {}, ...key.split(/(?<=[._])(?=[a-z])/i).flatMap((part) => [part, el("wbr")]));
  const drawDetail = (paths, runs) => {
    const labels = paths.map((path) => nameOf(path, paths));
    const all = (pick) => [...new Set(runs.flatMap((run) => Object.keys(pick(run) ?? {})))];
    const body = [];
    const isZero = (name) => /^train_(watchdog|memory)_/.test(name) && runs.every((run) => !run.metrics[name]);
    const rank = (name) => (/^eval_/.test(name) ? 0 : /^base_eval_/.test(name) ? 1 : 2);
    const metrics = all((run) => run.metrics).filter((name) => !/\/|_accuracy_\w/.test(name) && !isZero(name))
      .sort((a, b) => rank(a) - rank(b));
    if (metrics.length) body.push(el("h3", { textContent: "Metrics" }), table(["metric", ...labels], metrics.map((name) =>
      el("tr", {}, ...cells(/^base_eval_/.test(name) ? `${title(name.slice(5))} of the untuned base` : title(name), ...runs.map((run) => (/runtime/.test(name) ? duration(run.metrics[name]) : format(name, run.metrics[name]))))))));
    const keys = runs.length > 1
      ? all((run) => run.config).filter((key) => runs[0].config[key] !== runs[1].config[key] && !/^(name|task\..*)$/.test(key))
      : Object.keys(runs[0].preset ?? {});
    body.push(el("h3", { textContent: runs.length > 1 ? "Config: what differs" : "Config: what differs from the preset" }));
    body.push(keys.length
      ? table(["key", ...labels, ...(runs.length > 1 ? [] : ["preset"])], keys.map((key) => el("tr", { className: "value" },
        ...cells(keyCell(key), ...runs.map((run) => run.config[key]), ...(runs.length > 1 ? [] : [runs[0].preset[key]])))))
      : el("p", { className: "soft", textContent: "nothing" }));
    const answers = runs.map((run) => new Map(run.answers.map((answer) => [answer.prompt, answer])));
    const prompts = [...new Set(runs.flatMap((run) => run.answers.map((answer) => answer.prompt)))];
    if (prompts.length) body.push(el("h3", { textContent: "Answers to held-out rows" }), table(["asked", "expected", "base", ...labels], prompts.map((prompt) => {
      const known = answers.map((map) => map.get(prompt));
      const first = known.find(Boolean);
      const base = known.find((answer) => answer && answer.base !== null);
      return el("tr", {}, el("td", { className: "asked", title: prompt, textContent: first.asked }), ...cells(first.expected),
        verdict(base?.base, base?.base_right), ...known.map((answer) => verdict(answer?.got, answer?.right)));
    })));
    const examples = runs[0].examples;
    if (runs.length === 1 && examples.length) body.push(el("h3", { textContent: "Training rows: marked text carries loss" }), ...examples.map((row) =>
      el("article", { className: "card" }, el("p", { className: "soft", textContent: `row ${row.row}: ${[row.tokens, ...row.notes].join(" · ")}` }),
        el("pre", { className: "row", dir: "auto" }, ...row.parts.map((part) => (part.trained ? el("mark", { textContent: part.text }) : part.text))))));
    byId("detail-body").replaceChildren(...body);
  };
  let askedDetail = "";
  const refreshDetail = async () => {
    const paths = state.runs.slice(0, 2);
    const one = state.runs.length === 1;
    byId("detail-title").textContent = one ? nameOf(state.runs[0], state.runs) : "Side by side";
    const wanted = JSON.stringify([state.runs, paths.map((path) => list.runs.find((run) => run.path === path)?.status)]);
    if (wanted === askedDetail) return;
    askedDetail = wanted;
    if (!paths.length || state.runs.length > 2) {
      const hint = paths.length ? "Two runs are shown side by side; more are selected now." : "Select one run to see its config and answers, two to see both side by side.";
      byId("detail-body").replaceChildren(el("p", { className: "soft", textContent: hint }));
      return;
    }
    const runs = await Promise.all(paths.map((path) => ask(`/api/run?${query([path])}`)));
    if (wanted === askedDetail) drawDetail(paths, runs);
  };

  // Everything

  const report = (error) => {
    byId("live").textContent = `· no answer: has the board ended? (${error.message})`;
    byId("live").className = "lost";
  };
  const drawAll = () => {
    options("status", (run) => run.status);
    options("data", (run) => run.config["data.name"]);
    options("model", (run) => run.config["model.name"]);
    options("sweep", (run) => run.sweep);
    drawTable();
    drawSweeps();
    refreshDetail().catch(report);
    refreshCurves().catch(report);
  };
  const select = (path, on) => {
    state.runs = on ? [...state.runs, path] : state.runs.filter((other) => other !== path);
    writeAddress();
    drawAll();
  };
  let tag = null;
  const poll = async () => {
    if (document.hidden && tag) return;
    try {
      const answer = await fetch("/api/runs", { cache: "no-store", headers: tag ? { "If-None-Match": tag } : {} });
      if (answer.status !== 304) {
        if (!answer.ok) throw new Error(await answer.text());
        list = await answer.json();
        tag = answer.headers.get("ETag");
        byId("root").textContent = list.root;
        state.runs = state.runs.filter((path) => list.runs.some((run) => run.path === path));
        drawAll();
      }
      byId("live").textContent = "· live";
      byId("live").className = "";
    } catch (error) {
      report(error);
    }
  };

  byId("search").addEventListener("input", ({ target }) => {
    state.q = target.value.trim();
    writeAddress();
    drawAll();
  });
  for (const id of ["status", "data", "model", "sweep"]) byId(id).addEventListener("change", ({ target }) => {
    state[id] = target.value;
    writeAddress();
    drawAll();
  });
  byId("clear").addEventListener("click", () => {
    state.runs = [];
    writeAddress();
    drawAll();
  });
  byId("smoothing").addEventListener("input", ({ target }) => {
    choice.smoothing = Number(target.value);
    target.nextElementSibling.textContent = choice.smoothing.toFixed(2);
    drawCurves();
  });
  byId("x").addEventListener("change", ({ target }) => { choice.x = target.value; drawCurves(); });
  byId("log").addEventListener("change", ({ target }) => { choice.log = target.checked; drawCurves(); });
  byId("theme").addEventListener("click", () => {
    const dark = (root.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
    root.dataset.theme = dark ? "light" : "dark";
    drawCurves();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawCurves);
  document.addEventListener("visibilitychange", poll);
  readAddress();
  byId("search").value = state.q;
  poll();
  setInterval(poll, POLL);
})();
