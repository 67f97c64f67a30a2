"use strict";

// One slider for all pictures: each figure shows its newest picture up to that step.
const slider = document.getElementById("step-slider");

function showStep(step) {
  for (const figure of document.querySelectorAll(".over-time")) {
    const images = [...figure.querySelectorAll("img")];
    const before = images.filter((image) => Number(image.dataset.step) <= step);
    const shown = before[before.length - 1];
    images.forEach((image) => { image.hidden = image !== shown; });
    const words = shown ? `step ${grouped(Number(shown.dataset.step))}` : "no picture yet";
    figure.querySelector(".step").textContent = ` ${words}`;
  }
}

function grouped(number) {
  return String(number).replace(/\B(?=(\d{3})+(?!\d))/g, ",");
}

if (slider) {
  const steps = slider.dataset.steps.split(",").map(Number);
  const move = () => {
    const step = steps[Number(slider.value)];
    slider.setAttribute("aria-valuetext", `step ${grouped(step)}`);
    slider.parentElement.querySelector("b").textContent = grouped(step);
    showStep(step);
  };
  slider.value = String(steps.length - 1); // a browser may have kept another one
  slider.addEventListener("input", move);
  slider.parentElement.hidden = steps.length < 2;
  move();
}

// Values of a chart under the pointer, or by arrow keys.
function written(value) {
  if (value === null) return "no finite value";
  if (value === 0) return "0";
  const size = Math.floor(Math.log10(Math.abs(Number(value.toExponential(3)))));
  if (size < -4 || size >= 7) return value.toExponential(2).replace("e+", "e");
  const [whole, part] = value.toFixed(Math.max(0, 3 - size)).split(".");
  return grouped(whole) + (part === undefined ? "" : `.${part}`);
}

function nearest(points, step) {
  let low = 0, high = points.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (points[middle][0] < step) low = middle + 1; else high = middle;
  }
  const closer = low > 0 && step - points[low - 1][0] <= points[low][0] - step;
  return points[closer ? low - 1 : low];
}

for (const plot of document.querySelectorAll(".plot")) {
  const chart = JSON.parse(plot.dataset.chart);
  const cells = [...plot.parentElement.querySelectorAll(".reading dd")];
  const atEnd = cells.map((cell) => cell.textContent);
  const cursor = plot.querySelector(".cursor");
  const steps = [...new Set(chart.lines.flatMap((line) => line.map((point) => point[0])))]
    .sort((a, b) => a - b);
  let at = steps.length - 1;

  const read = (step) => {
    chart.lines.forEach((line, i) => {
      const [where, value] = nearest(line, step);
      cells[i].textContent = `${written(value)} at step ${grouped(where)}`;
    });
    const share = (step - chart.first) / (chart.last - chart.first || 1);
    const x = (chart.left + chart.width * share).toFixed(1);
    cursor.setAttribute("d", `M${x} ${chart.top}v${chart.height}`);
  };
  const leave = () => {
    if (plot === document.activeElement) return;
    cursor.setAttribute("d", "");
    cells.forEach((cell, i) => { cell.textContent = atEnd[i]; });
  };

  plot.tabIndex = 0;
  plot.setAttribute("role", "group");
  plot.setAttribute("aria-label", `${plot.dataset.title}: left and right arrow keys read values`);
  plot.parentElement.querySelector(".reading").setAttribute("aria-live", "polite");
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    const share = ((event.clientX - box.left) / box.width * chart.total - chart.left) / chart.width;
    const step = chart.first + share * (chart.last - chart.first);
    at = steps.indexOf(nearest(steps.map((s) => [s]), step)[0]);
    read(steps[at]);
  });
  plot.addEventListener("pointerleave", leave);
  plot.addEventListener("focus", () => read(steps[at]));
  plot.addEventListener("blur", leave);
  plot.addEventListener("keydown", (event) => {
    const far = Math.max(1, Math.round(steps.length / 10));
    const moves = { ArrowLeft: -1, ArrowRight: 1, PageDown: -far, PageUp: far, Home: -Infinity, End: Infinity };
    if (!(event.key in moves) || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    at = Math.min(steps.length - 1, Math.max(0, at + moves[event.key]));
    read(steps[at]);
  });
}
