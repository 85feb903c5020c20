// Synchronized zooming and panning: all images inside elements of class .lens show the same region.
ATLAS.magnifier = (function () {
  "use strict";

  const MOST = 16;
  const view = { scale: 1, left: 0, top: 0 };
  const lenses = new Set();

  function apply() {
    const most = 1 - 1 / view.scale;
    view.left = Math.min(Math.max(view.left, 0), most);
    view.top = Math.min(Math.max(view.top, 0), most);
    const moved = "scale(" + view.scale + ") translate(" + -100 * view.left + "%, " + -100 * view.top + "%)";
    for (const lens of lenses) {
      for (const picture of lens.querySelectorAll(".pic")) picture.style.transform = moved;
      lens.classList.toggle("zoomed", view.scale > 1);
      lens.style.setProperty("--zoom", view.scale); // lines drawn over an image divide their width by it
    }
    document.body.dataset.zoom = view.scale.toFixed(2);
  }
  // Zoom by `factor` and move the point at `from` to `to`, both as fractions of the element; by default it stays in place.
  function zoom(factor, from = [0.5, 0.5], to = from) {
    const scale = Math.min(Math.max(view.scale * factor, 1), MOST);
    view.left += from[0] / view.scale - to[0] / scale;
    view.top += from[1] / view.scale - to[1] / scale;
    view.scale = scale;
    apply();
  }
  function move(x, y) {
    view.left -= x / view.scale;
    view.top -= y / view.scale;
    apply();
  }
  function whole() {
    Object.assign(view, { scale: 1, left: 0, top: 0 });
    apply();
  }

  // Add an element: wheel and pinch zoom, dragging pans, a double click zooms in or resets.
  function add(lens) {
    lenses.add(lens);
    const fingers = new Map();
    const share = (x, y) => { const box = lens.getBoundingClientRect(); return [(x - box.left) / box.width, (y - box.top) / box.height]; };
    lens.addEventListener("wheel", (event) => {
      event.preventDefault();
      const lines = event.deltaMode === 1 ? 16 : 1;
      zoom(Math.exp(-event.deltaY * lines * (event.ctrlKey ? 0.01 : 0.002)), share(event.clientX, event.clientY));
    }, { passive: false });
    lens.addEventListener("dblclick", (event) => { if (view.scale > 1) whole(); else zoom(4, share(event.clientX, event.clientY)); });
    lens.addEventListener("pointerdown", (event) => {
      if (event.target.closest(".divider")) return;
      fingers.set(event.pointerId, share(event.clientX, event.clientY));
      lens.setPointerCapture(event.pointerId);
    });
    lens.addEventListener("pointermove", (event) => {
      if (!fingers.has(event.pointerId)) return;
      const before = Array.from(fingers.values());
      const old = fingers.get(event.pointerId);
      const to = share(event.clientX, event.clientY);
      fingers.set(event.pointerId, to);
      if (fingers.size === 1) move(to[0] - old[0], to[1] - old[1]);
      else {
        const after = Array.from(fingers.values());
        const [from, now] = [before, after].map(([p, q]) => ({ apart: Math.hypot(p[0] - q[0], p[1] - q[1]), middle: [(p[0] + q[0]) / 2, (p[1] + q[1]) / 2] }));
        if (from.apart > 0.01) zoom(now.apart / from.apart, from.middle, now.middle);
      }
    });
    for (const end of ["pointerup", "pointercancel"]) lens.addEventListener(end, (event) => fingers.delete(event.pointerId));
    return lens;
  }
  // Remove all elements, but keep the region for the images of the next unit.
  function clear() { lenses.clear(); }

  return { add, clear, zoom, move, whole, apply, view };
})();
