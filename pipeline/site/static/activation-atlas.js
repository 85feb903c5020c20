// The activation atlas of a layer: cells in a plane that is moved and zoomed, and the samples of the selected cell.
(function () {
  "use strict";

  const { make, find, sprite, number, share, need, html, root } = ATLAS;
  const shard = html.dataset.shard;
  const view = find(".atlas-view");
  const plane = find(".atlas-plane");
  const aside = find(".atlas-cell");
  const box = find("#atlas-class");
  const SIDE = 96; // of a cell in the plane, in pixels
  const SMALLEST = 0.5; // side of the cell with the fewest samples, of that with the most
  const [LEAST, MOST] = [0.1, 6]; // of the zoom
  const at = { x: 0, y: 0, scale: 1 };
  let data = null;
  let buttons = [];
  let selected = -1;

  Promise.all([ATLAS.indexed, need(shard)]).then(([, found]) => {
    data = found;
    const version = "?v=" + ATLAS.index.identity;
    data.media = (name, suffix) => root + "media/" + shard + "/" + name + "." + suffix + version;
    const most = Math.max(...data.cells.map((cell) => cell.count), 1);
    buttons = data.cells.map((cell, i) => {
      const pic = make("span", { class: "pic" });
      picture(pic, i);
      const button = make("button", { type: "button", class: "cell" + (cell.failed ? " failed" : ""), tabindex: "-1", "aria-label": labelOf(cell), onfocus: () => select(i) },
        pic, make("span", { class: "tint", "aria-hidden": "true" }));
      button.addEventListener("click", () => { select(i); button.focus({ preventScroll: true }); });
      button.style.left = cell.column * SIDE + "px";
      button.style.top = cell.row * SIDE + "px";
      button.style.setProperty("--part", String(SMALLEST + (1 - SMALLEST) * Math.sqrt(cell.count / most)));
      return button;
    });
    plane.append(...buttons);
    if (buttons.length) buttons[0].tabIndex = 0;
    const names = Object.values(data.classes).sort((a, b) => a.localeCompare(b));
    find("#atlas-classes").append(...names.map((name) => make("option", { value: name })));
    find("label:has(#atlas-class)").hidden = !names.length;
    for (const hidden of [".atlas-controls", ".atlas-parts", ".script-only"]) find(hidden).hidden = false;
    sizes();
    whole();
    new ResizeObserver(() => { if (!at.touched) whole(); }).observe(view);
    fromAddress();
    window.addEventListener("hashchange", fromAddress);
    document.body.dataset.ready = "yes";
  });

  // --------------------------------------------------------------------- cells

  const nameOf = (kind) => data.classes[String(kind)];
  const samples = (count) => count + (count === 1 ? " sample" : " samples");
  function labelOf(cell) {
    const most = cell.classes.slice(0, 2).map(([kind, count]) => nameOf(kind) + " " + count);
    return ["Row " + (cell.row + 1) + ", column " + (cell.column + 1), samples(cell.count), ...most].join(", ");
  }
  function picture(element, i) {
    const [per, columns] = data.sheet;
    const start = i - (i % per);
    const rows = Math.ceil(Math.min(per, data.cells.length - start) / columns);
    sprite(element, data.media("s" + start, ATLAS.index.suffix), columns, rows, i - start);
  }
  function nearest(i) {
    const [per, each, columns] = data.crops;
    const start = i - (i % per);
    const rows = Math.ceil((Math.min(per, data.cells.length - start) * each) / columns);
    const shown = data.cells[i].nearest.map(([path, label, crop], k) => {
      const pic = crop ? make("span", { class: "pic", role: "img", "aria-label": "Dataset image: " + (label || path) }) : null;
      if (pic) sprite(pic, data.media("n" + start, ATLAS.index.photo_suffix), columns, rows, (i - start) * each + k);
      return make("li", {}, pic, make("span", { class: "path", text: label || path, title: path }));
    });
    return shown.length ? [make("h3", { text: "Nearest samples" }), make("ul", { class: "nearest" }, shown)] : [];
  }
  function select(i) {
    const cell = data.cells[i];
    if (!cell || i === selected) return;
    if (selected >= 0) { buttons[selected].tabIndex = -1; buttons[selected].removeAttribute("aria-current"); } else buttons[0].tabIndex = -1;
    selected = i;
    buttons[i].tabIndex = 0;
    buttons[i].setAttribute("aria-current", "true");
    const pic = make("span", { class: "pic large", role: "img", "aria-label": "Feature visualization of the cell" });
    picture(pic, i);
    const classes = cell.classes.slice(0, 5).map(([kind, count]) => make("li", {},
      make("button", { type: "button", class: "plain", text: nameOf(kind), onclick: () => { box.value = nameOf(kind); colour(); } }), " " + count));
    aside.replaceChildren(pic, make("h2", { text: "Row " + (cell.row + 1) + ", column " + (cell.column + 1) }),
      make("p", { class: "note", text: samples(cell.count) + ", objective " + number(cell.activation) + (cell.failed ? ": it did not rise above its start, so that this image says nothing" : "") }),
      ...(classes.length ? [make("h3", { text: "Largest output of their images" }), make("ul", { class: "kinds" }, classes)] : []), ...nearest(i));
    window.history.replaceState(null, "", "#" + i);
  }
  function fromAddress() {
    const i = /^#(\d+)$/.exec(window.location.hash);
    if (i && Number(i[1]) < data.cells.length) { select(Number(i[1])); reveal(Number(i[1])); }
  }

  // --------------------------------------------------------------------- class

  // The color of a cell is the share of its samples whose images have this class as the largest output.
  function colour() {
    const name = box.value.trim().toLowerCase();
    const kinds = name ? Object.keys(data.classes).filter((kind) => nameOf(kind).toLowerCase() === name || nameOf(kind).toLowerCase().startsWith(name + ",")) : [];
    plane.classList.toggle("by-class", kinds.length > 0);
    let [total, own] = [0, 0];
    data.cells.forEach((cell, i) => {
      const count = cell.classes.filter(([kind]) => kinds.includes(String(kind))).reduce((sum, [, n]) => sum + n, 0);
      const part = count / cell.count;
      total += count;
      own += count ? 1 : 0;
      buttons[i].classList.toggle("without", kinds.length > 0 && !count);
      buttons[i].style.setProperty("--share", String(part));
      buttons[i].title = kinds.length ? share(part) + " of " + samples(cell.count) : "";
    });
    find("#atlas-count").textContent = kinds.length ? samples(total) + " in " + own + (own === 1 ? " cell" : " cells") : name ? "No sample of this class" : "";
  }

  // ---------------------------------------------------------------------- view

  function draw() {
    plane.style.transform = "translate(" + at.x + "px, " + at.y + "px) scale(" + at.scale + ")";
    view.dataset.scale = String(at.scale);
  }
  function whole() {
    const [rows, columns] = data.grid;
    at.scale = Math.min(view.clientWidth / (columns * SIDE), view.clientHeight / (rows * SIDE), MOST);
    at.x = (view.clientWidth - columns * SIDE * at.scale) / 2;
    at.y = (view.clientHeight - rows * SIDE * at.scale) / 2;
    draw();
  }
  function zoom(factor, px, py) {
    const [x, y] = [px ?? view.clientWidth / 2, py ?? view.clientHeight / 2];
    const scale = Math.min(Math.max(at.scale * factor, LEAST), MOST);
    at.x = x - ((x - at.x) * scale) / at.scale;
    at.y = y - ((y - at.y) * scale) / at.scale;
    at.scale = scale;
    at.touched = true;
    draw();
  }
  // Move the plane until a cell is inside of the view.
  function reveal(i) {
    const cell = data.cells[i];
    const [left, top, side] = [at.x + cell.column * SIDE * at.scale, at.y + cell.row * SIDE * at.scale, SIDE * at.scale];
    at.x -= Math.min(left, 0) + Math.max(left + side - view.clientWidth, 0);
    at.y -= Math.min(top, 0) + Math.max(top + side - view.clientHeight, 0);
    draw();
  }
  function sizes() { plane.classList.toggle("equal", !find("#atlas-sizes").checked); }

  function point(event) {
    const frame = view.getBoundingClientRect();
    return [event.clientX - frame.left, event.clientY - frame.top];
  }
  const fingers = new Map();
  let moved = 0;
  view.addEventListener("pointerdown", (event) => { fingers.set(event.pointerId, point(event)); if (fingers.size === 1) moved = 0; });
  view.addEventListener("pointermove", (event) => {
    const held = fingers.get(event.pointerId);
    if (!held) return;
    const [x, y] = point(event);
    moved += Math.hypot(x - held[0], y - held[1]);
    // One finger scrolls the page; two move and zoom the plane.
    if (event.pointerType === "touch" && fingers.size < 2) return;
    if (moved > 4 && !view.hasPointerCapture(event.pointerId)) view.setPointerCapture(event.pointerId);
    const others = Array.from(fingers.entries()).filter(([id]) => id !== event.pointerId);
    const part = others.length ? 0.5 : 1; // the point between two fingers moves with them
    at.x += (x - held[0]) * part;
    at.y += (y - held[1]) * part;
    at.touched = true;
    if (others.length === 1) {
      const [ox, oy] = others[0][1];
      zoom(Math.hypot(x - ox, y - oy) / Math.max(1, Math.hypot(held[0] - ox, held[1] - oy)), (x + ox) / 2, (y + oy) / 2);
    } else draw();
    fingers.set(event.pointerId, [x, y]);
  });
  for (const kind of ["pointerup", "pointercancel", "pointerleave"]) view.addEventListener(kind, (event) => { fingers.delete(event.pointerId); });
  for (const kind of ["touchstart", "touchmove"]) view.addEventListener(kind, (event) => { if (event.touches.length > 1) event.preventDefault(); }, { passive: false });
  // The end of a drag is no click on the cell below.
  view.addEventListener("click", (event) => { if (moved > 4) { event.stopPropagation(); event.preventDefault(); } }, true);
  view.addEventListener("dragstart", (event) => event.preventDefault());
  view.addEventListener("scroll", () => { view.scrollTop = view.scrollLeft = 0; }); // of a focused cell: the plane moves instead
  view.addEventListener("wheel", (event) => { event.preventDefault(); zoom(Math.exp(-event.deltaY * 0.0015), ...point(event)); }, { passive: false });

  // The nearest cell in a direction: little to the side counts as much as twice as far ahead.
  function neighbour(dx, dy) {
    const from = data.cells[Math.max(selected, 0)];
    let [best, least] = [-1, Infinity];
    data.cells.forEach((cell, i) => {
      const [x, y] = [cell.column - from.column, cell.row - from.row];
      const [ahead, aside_] = [x * dx + y * dy, Math.abs(x * dy) + Math.abs(y * dx)];
      if (ahead > 0 && ahead + 2 * aside_ < least) { least = ahead + 2 * aside_; best = i; }
    });
    return best;
  }
  view.addEventListener("keydown", (event) => {
    const arrow = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (arrow) {
      const i = neighbour(...arrow);
      if (i >= 0) { buttons[i].focus({ preventScroll: true }); reveal(i); }
    } else if (event.key === "+" || event.key === "=") zoom(1.4);
    else if (event.key === "-") zoom(1 / 1.4);
    else if (event.key === "0") whole();
    else return;
    event.preventDefault();
    event.stopPropagation();
  });

  find(".atlas-controls").addEventListener("submit", (event) => event.preventDefault());
  box.addEventListener("input", colour);
  find("#atlas-sizes").addEventListener("change", sizes);
  find("#atlas-in").addEventListener("click", () => zoom(1.4));
  find("#atlas-out").addEventListener("click", () => zoom(1 / 1.4));
  find("#atlas-whole").addEventListener("click", () => { at.touched = false; whole(); });
})();
