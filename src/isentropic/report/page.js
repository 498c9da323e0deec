"use strict";
// Draws the figures from the data beside them, in the colours of the theme; nothing here uses the network, except that
// a live page asks the server it came from whether the run has new rows.
(() => {
  const hidden = new Set();
  const config = {
    responsive: true, displayModeBar: false, doubleClick: "reset",
  };
  const now = performance.now.bind(performance);

  // "@ink" and other names that begin with @ become the theme's colours.
  const paint = (value, style) => {
    if (typeof value === "string" && value[0] === "@") return style.getPropertyValue("--" + value.slice(1)).trim();
    if (Array.isArray(value)) return value.length && typeof value[0] === "number" ? value : value.map((v) => paint(v, style));
    if (value && typeof value === "object")
      return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, paint(v, style)]));
    return value;
  };

  const draw = (figure) => {
    const plot = figure.querySelector(".plot");
    const { data, layout } = paint(
      JSON.parse(figure.querySelector("script").textContent), getComputedStyle(document.documentElement));
    for (const trace of data) if (trace.meta && hidden.has(trace.meta.run)) trace.visible = false;
    // A finger scrolls the page; a mouse drags a zoom.
    if (matchMedia("(pointer: coarse)").matches) layout.dragmode = false;
    plot.querySelector(".sketch")?.remove();
    figure.dataset.drawn = "yes";
    return Plotly.react(plot, data, layout, config);
  };
  const figures = () => [...document.querySelectorAll(".figure")];
  const redraw = () => figures().filter((f) => f.dataset.drawn).forEach(draw);

  // Figures of the first screens are drawn at once, one that comes near, is focused or printed at that time, and the
  // rest while the page is idle.
  const need = (figure) => figure.dataset.drawn || draw(figure);
  const near = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (!isIntersecting) continue;
      near.unobserve(target);
      need(target);
    }
  }, { rootMargin: "50% 0%" });
  const later = window.requestIdleCallback ?? setTimeout;
  const drawAll = async () => {
    for (const figure of figures()) if (figure.getBoundingClientRect().top < 2 * innerHeight) await need(figure);
    document.body.dataset.first = Math.round(now());
    figures().forEach((figure) => near.observe(figure));
    for (const figure of figures()) {
      await new Promise((done) => later(done));
      await need(figure);
    }
    document.body.dataset.ready = Math.round(now());
  };
  addEventListener("beforeprint", () => figures().forEach(need));
  document.addEventListener("focusin", ({ target }) => {
    const figure = target.closest(".figure");
    if (figure) need(figure);
  });

  // Arrow keys read a figure point by point.
  const places = new WeakMap();
  document.addEventListener("keydown", (event) => {
    const plot = event.target;
    if (!plot.classList || !plot.classList.contains("plot") || !plot._fullLayout) return;
    if (event.key === "Escape") return Plotly.Fx.unhover(plot);
    const by = { ArrowRight: 1, ArrowLeft: -1, PageDown: 10, PageUp: -10 }[event.key];
    if (!by) return;
    event.preventDefault();
    const traces = plot._fullData.filter((t) => t.visible === true && t.hoverinfo !== "skip" && t.x && t.x.length);
    if (!traces.length) return;
    const trace = traces.reduce((a, b) => (b.x.length > a.x.length ? b : a));
    const place = Math.min(Math.max((places.get(plot) ?? -1) + by, 0), trace.x.length - 1);
    places.set(plot, place);
    if (plot._fullLayout.hovermode === "x unified" && trace.type === "scatter")
      Plotly.Fx.hover(plot, { xval: trace.x[place] }, "xy");
    else Plotly.Fx.hover(plot, [{ curveNumber: trace.index, pointNumber: place }], "xy");
  });

  document.addEventListener("change", (event) => {
    if (!event.target.classList.contains("toggle")) return;
    hidden[event.target.checked ? "delete" : "add"](event.target.value);
    redraw();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);

  // A live page replaces what changed, and keeps its place, its zoom and what is open.
  const refresh = async () => {
    try {
      const { mark } = await (await fetch("/mark")).json();
      if (mark === document.body.dataset.live) return;
      const page = new DOMParser().parseFromString(await (await fetch("/")).text(), "text/html");
      const names = (root) => [...root.querySelectorAll(".figure, [data-live-part]")].map((e) => e.id || e.dataset.livePart);
      if (names(page).join() !== names(document).join()) return location.reload();
      for (const part of document.querySelectorAll("[data-live-part]")) {
        const open = [...part.querySelectorAll("details")].map((d) => d.open);
        part.innerHTML = page.querySelector(`[data-live-part="${part.dataset.livePart}"]`).innerHTML;
        part.querySelectorAll("details").forEach((d, i) => { if (i in open) d.open = open[i]; });
      }
      for (const figure of figures()) {
        figure.querySelector("script").textContent = page.getElementById(figure.id).querySelector("script").textContent;
        await draw(figure);
      }
      document.body.dataset.live = page.body.dataset.live;
    } catch (error) {
      console.info("the server of this page does not answer: " + error);
    }
  };
  drawAll().then(() => {
    if (document.body.dataset.live) setInterval(refresh, 2000);
  });
})();
