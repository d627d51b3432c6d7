// Draws every figure on the page in the reader's light or dark colours, and again when these change.
(() => {
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const token = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  // "ink" stands for the page's text colour wherever a figure cannot know it
  const painted = (value, ink) => {
    if (value === "ink") return ink;
    if (Array.isArray(value)) return value.map((v) => painted(v, ink));
    if (value && typeof value === "object")
      return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, painted(v, ink)]));
    return value;
  };

  const draw = () => {
    const ink = token("--ink"), line = token("--line"), soft = token("--soft");
    for (const source of document.querySelectorAll("script.figure")) {
      const figure = painted(JSON.parse(source.textContent), ink);
      const axis = { gridcolor: line, zerolinecolor: line, linecolor: line, automargin: true };
      const layout = {
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
        font: { family: getComputedStyle(document.body).fontFamily, color: ink, size: 13 },
        margin: { l: 60, r: 20, t: 30, b: 80 },
        modebar: { bgcolor: "rgba(0,0,0,0)", color: line, activecolor: soft },
        legend: { orientation: "h", yref: "container", y: 0, yanchor: "bottom", x: 0, traceorder: "normal", font: { color: soft } },
        hoverlabel: { bgcolor: token("--card"), bordercolor: line, font: { color: ink } },
        ...figure.layout,
        xaxis: { ...axis, ...figure.layout.xaxis }, yaxis: { ...axis, ...figure.layout.yaxis },
      };
      for (const shape of layout.shapes || []) shape.line.color = soft;
      Plotly.react(source.previousElementSibling, figure.data, layout, {
        responsive: true, displaylogo: false, displayModeBar: "hover", modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"],
      });
    }
  };
  draw();
  dark.addEventListener("change", draw);
})();
