"use strict";
// Click an image for its full size; "compare" lays two images of a row over each other, with a slider between them.
const viewer = document.querySelector(".viewer");
const [under, over] = viewer.querySelectorAll("img");
const [left, right] = viewer.querySelectorAll("select");
const slider = viewer.querySelector("input");
const zoom = viewer.querySelector(".zoom");
let images = [];

function draw() {
  const first = images[left.value] || images[0];
  const second = images[right.value] || first;
  const names = [first.dataset.name, second.dataset.name];
  over.src = first.src;
  under.src = second.src;
  over.alt = first.alt;
  under.alt = second.alt;
  // Images of other sizes are shown at the size of the larger one, so that places correspond.
  const width = Math.max(first.naturalWidth || first.width, second.naturalWidth || second.width);
  viewer.style.setProperty("--width", `${width / window.devicePixelRatio}px`);
  viewer.style.setProperty("--cut", images.length > 1 ? `${100 - slider.value}%` : "0%");
  viewer.querySelector(".names").textContent = images.length > 1 ? names.join(" | ") : names[0];
}

function open(chosen, start) {
  images = chosen;
  for (const select of [left, right]) {
    select.replaceChildren(...chosen.map((image, index) => new Option(image.dataset.name, index)));
  }
  left.value = start;
  right.value = chosen.length - 1;
  slider.value = 50;
  viewer.classList.toggle("single", chosen.length === 1);
  draw();
  viewer.showModal();
  (chosen.length > 1 ? slider : viewer.querySelector(".stage")).focus();
}

function toggleZoom() {
  const on = viewer.classList.toggle("full-size");
  zoom.setAttribute("aria-pressed", on);
}

document.addEventListener("click", (event) => {
  const full = event.target.closest(".full");
  const compare = event.target.closest(".compare");
  const copy = event.target.closest(".copy");
  if (full) {
    event.preventDefault();
    open([full.querySelector("img")], 0);
  } else if (compare) {
    const row = [...compare.closest("tr").querySelectorAll("img")];
    open(row, Math.max(0, row.length - 2));
  } else if (copy) {
    navigator.clipboard.writeText(copy.dataset.text).then(() => {
      const words = copy.textContent;
      copy.textContent = "copied";
      setTimeout(() => (copy.textContent = words), 1500);
    });
  }
});
viewer.addEventListener("input", draw);
zoom.addEventListener("click", toggleZoom);
viewer.addEventListener("keydown", (event) => {
  if (event.key === "z" || event.key === "1") toggleZoom();
});
viewer.querySelector(".stage").addEventListener("dblclick", toggleZoom);
