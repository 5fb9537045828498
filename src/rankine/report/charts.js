"use strict";
// Draws the charts of the page, again whenever the paper turns dark or the screen narrow, and shows
// what a touched cell of a map stands for. It reads the page only: no network, no eval.
(() => {
  const raw = document.getElementById("charts").textContent;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const narrow = matchMedia("(max-width: 700px)");
  const twins = JSON.parse(raw).dark;
  let picked = null;

  // Charts come in the colours of light paper; every value that is one of them becomes its twin.
  const charts = () =>
    JSON.parse(raw, (_, value) =>
      dark.matches && typeof value === "string" && Object.hasOwn(twins, value) ? twins[value] : value);

  let views = [];
  async function draw() {
    for (const view of views) view.clear();
    Bokeh.documents.length = 0;
    const { tradeoff, spectra } = charts();
    const jobs = [];
    const place = (item, id) => {
      document.getElementById(id).replaceChildren();
      jobs.push(Bokeh.embed.embed_item(item, id));
    };
    const overview = document.getElementById("tradeoff");
    if (tradeoff) place(narrow.matches ? tradeoff.narrow : tradeoff.wide, "tradeoff");
    else if (overview) overview.hidden = true;
    spectra.forEach((item, i) => {
      const id = `spectrum-${i}`;
      if (!item) return;
      document.getElementById(id).closest("figure").hidden = false;
      document.getElementById("spectra").hidden = false;
      place(item, id);
    });
    views = await Promise.all(jobs);
    if (picked !== null) highlight(picked);
  }

  // The line of one target, in all spectra (it is in one at most).
  function highlight(target) {
    for (const chart of Bokeh.documents) {
      const lines = chart.get_model_by_name("lines");
      if (lines === null) continue;
      const data = lines.data_source.data;
      const i = Array.from(data.target).indexOf(target);
      chart.get_model_by_name("picked").data_source.data =
        i < 0 ? { x: [], y: [] } : { x: data.xs[i], y: data.ys[i] };
    }
  }

  function pick(cell) {
    const detail = document.getElementById("detail");
    picked = cell.dataset.target;
    detail.textContent = cell.dataset.detail;
    for (const other of document.querySelectorAll(".map td.picked")) other.classList.remove("picked");
    for (const other of document.querySelectorAll(".map td[data-target]"))
      if (other.dataset.target === picked) other.classList.add("picked");
    highlight(picked);
  }

  // A finger does not hover: a tap on a chart stands for a mouse that comes to rest there, and the
  // next tap or a scroll for one that leaves. (Given its window, an event knows the page's scroll.)
  let resting = null;
  const mouse = (type, place, at) =>
    place.dispatchEvent(new PointerEvent(type, {
      ...at, view: window, pointerType: "mouse", isPrimary: true, bubbles: true, composed: true,
    }));
  const leave = () => {
    if (resting) mouse("pointerout", resting, {});
    resting = null;
  };
  document.addEventListener("pointerup", (e) => {
    leave();
    if (e.pointerType === "mouse" || !e.target.closest?.(".chart")) return;
    const { clientX, clientY } = e;
    [resting] = e.composedPath();
    setTimeout(() => resting && mouse("pointermove", resting, { clientX, clientY })); // finger gone
  });
  document.addEventListener("scroll", leave, { passive: true });

  for (const event of ["pointerover", "focusin", "click"])
    document.addEventListener(event, (e) => {
      const cell = e.target.closest?.(".map td[data-target]");
      if (cell) pick(cell);
    });

  Bokeh.set_log_level("warn");
  dark.addEventListener("change", draw);
  narrow.addEventListener("change", draw);
  draw();
})();
