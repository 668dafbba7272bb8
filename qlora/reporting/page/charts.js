"use strict";
/** What charts of every page share: colours, layout and curves. */
const charts = (() => {
  // Colours are the style sheet's, so that charts follow the page from light to dark.
  const probe = document.createElement("span");
  probe.hidden = true;
  document.body.append(probe);
  const css = (name) => {
    probe.style.color = `var(--${name})`;
    return getComputedStyle(probe).color;
  };
  const channels = (name) => css(name).match(/[\d.]+/g).slice(0, 3).map(Number);
  const between = (a, b, share) => `rgb(${a.map((from, index) => Math.round(from + (b[index] - from) * share))})`;
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

  /** Draws a chart of curves: `groups` is the legend, `hidden` the entries that are off, `choice` what a person set. */
  const curves = (element, spec, { groups, hidden, choice }) => {
    const lines = spec.lines.filter((line) => !hidden.has(line.group));
    const few = lines.length <= 12; // more are no longer told apart, nor read one by one
    const traces = lines.flatMap((line) => {
      const group = groups[line.group];
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
    return Plotly.react(element, traces, layout(x, y, { hovermode: lines.length <= 6 ? "x unified" : "closest" }), zooming);
  };

  return { css, channels, groupColor, plain, shorten, config, zooming, axis, layout, smooth, curves };
})();
