// The map of all units, on a 2-D canvas, which also works for pages opened from disk.
(function () {
  "use strict";

  const { make, find, need, keys, say } = ATLAS;
  const canvas = find("#map");
  const tip = find("#map-tip");
  const context = canvas.getContext("2d");
  const WHOLE = 4095;
  // The middle of matplotlib's viridis: even steps of lightness, which readers with any color vision can tell apart.
  const SCALE = [[71, 44, 122], [59, 81, 139], [44, 113, 142], [33, 144, 141], [39, 173, 129], [92, 200, 99], [170, 220, 50]];
  const sheets = new Map();
  let points = [];
  let tiles = { levels: [], many: 1500 }; // up to `many` units in view, each has an image of its own
  const grids = new Map();
  let reps = []; // what the images of tiles show, and where
  let view = null;
  let hits = null;
  let only = null;
  let drawing = false;

  Promise.all([ATLAS.indexed, need("map")]).then(([, found]) => {
    let at = 0;
    find("#map-method").textContent = found.method === "UMAP" ? "Computed with UMAP." : "Computed from the first two principal components.";
    const layers = ATLAS.index.layers.length;
    for (let order = 0; order < layers; order++) {
      const layer = ATLAS.layerAt(order);
      const colour = colorAt(order / Math.max(1, layers - 1));
      for (let row = 0; row < ATLAS.count(layer); row++, at++) {
        points.push({ layer, row, x: found.x[at], y: found.y[at], rank: found.tiny[order][row], colour });
      }
      find("#map-layer").append(make("option", { value: String(order), text: layer.name }));
    }
    tiles = found.tiles;
    if (layers > 1) legend();
    find(".map-controls").hidden = false;
    resize();
    new ResizeObserver(resize).observe(canvas);
    fromAddress();
    window.addEventListener("hashchange", fromAddress);
    document.body.dataset.ready = "yes";
  });

  // --------------------------------------------------------------------- color

  function colorAt(share) {
    const place = share * (SCALE.length - 1);
    const at = Math.min(SCALE.length - 2, Math.floor(place));
    const mixed = SCALE[at].map((low, i) => Math.round(low + (SCALE[at + 1][i] - low) * (place - at)));
    return "rgb(" + mixed.join(" ") + ")";
  }
  function legend() {
    const last = ATLAS.index.layers.length - 1;
    const bar = make("span", { class: "scale", "aria-hidden": "true" });
    bar.style.background = "linear-gradient(to right, " + SCALE.map((color) => "rgb(" + color.join(" ") + ")").join(", ") + ")";
    find("#map-legend").replaceChildren(ATLAS.layerAt(0).name, bar, ATLAS.layerAt(last).name);
  }

  // ---------------------------------------------------------------------- view

  const size = () => [canvas.clientWidth, canvas.clientHeight];
  function whole() {
    const [w, h] = size();
    const scale = Math.max(40, Math.min(w, h) - 60) / WHOLE; // images at the edge are whole
    view = { scale, x: WHOLE / 2 - w / 2 / scale, y: WHOLE / 2 - h / 2 / scale };
    draw();
  }
  function resize() {
    const [w, h] = size();
    const ratio = window.devicePixelRatio || 1;
    canvas.width = Math.round(w * ratio);
    canvas.height = Math.round(h * ratio);
    if (view) draw(); else whole();
  }
  function zoom(factor, px, py) {
    const [w, h] = size();
    const [x, y] = [px ?? w / 2, py ?? h / 2];
    const least = Math.min(w, h) / (WHOLE * 2);
    const scale = Math.min(Math.max(view.scale * factor, least), 6);
    view.x += x / view.scale - x / scale;
    view.y += y / view.scale - y / scale;
    view.scale = scale;
    draw();
  }
  const on = (p) => [(p.x - view.x) * view.scale, (p.y - view.y) * view.scale];

  // ---------------------------------------------------------------------- draw

  function draw() {
    if (drawing) return;
    drawing = true;
    window.requestAnimationFrame(() => { drawing = false; paint(); });
  }

  // An image, or null until it is loaded; the map is then drawn again.
  function loaded(url) {
    if (!sheets.has(url)) {
      const image = new Image();
      sheets.set(url, image);
      image.onload = draw;
      image.src = url;
    }
    const image = sheets.get(url);
    return image.complete && image.naturalWidth ? image : null;
  }

  // The image of a unit from its sheet, or null until the sheet is loaded; units close to each other share few sheets. Few units on a
  // screen of high density are shown from the sheets of larger images, in the order of the layer, once these are loaded.
  function picture(p, large) {
    const of = (name, [per, columns, px], place) => {
      const start = place - (place % per);
      const image = loaded(ATLAS.media(p.layer, name + start));
      const at = place - start;
      return image ? [image, (at % columns) * px, Math.floor(at / columns) * px, px] : null;
    };
    return (large && of("a", ATLAS.index.sizes.thumb, p.row)) || of("b", ATLAS.index.sizes.tiny, p.rank);
  }

  // The unit of each cell of a level: the nearest to its middle, by the rule that the tiles were made by.
  function gridOf(level) {
    if (grids.has(level)) return grids.get(level);
    const count = 2 ** level;
    const best = new Map();
    for (const p of points) {
      const [column, row] = [p.x, p.y].map((v) => Math.floor((v * count) / (WHOLE + 1)));
      const far = (2 * p.x * count - (2 * column + 1) * (WHOLE + 1)) ** 2 + (2 * p.y * count - (2 * row + 1) * (WHOLE + 1)) ** 2;
      const key = row * count + column;
      if (!best.has(key) || far < best.get(key).far) best.set(key, { p, far, column, row });
    }
    const cells = Array.from(best.values());
    grids.set(level, cells);
    return cells;
  }
  // A tile of the map, or null until it is loaded.
  function tileOf(level, across, down) {
    const url = ATLAS.root + "media/map/t" + level + "-" + across + "-" + down + "." + ATLAS.index.suffix + "?v=" + ATLAS.index.identity;
    return loaded(url);
  }
  // Images of cells, each with the color of its layer: of the finest level whose cells are large enough.
  const LEAST = 26;
  function paintTiles(w, h) {
    const sideOf = (level) => (view.scale * (WHOLE + 1)) / 2 ** level;
    const level = tiles.levels.filter((l) => sideOf(l) >= LEAST).pop() ?? tiles.levels[0];
    const side = sideOf(level);
    let shown = 0;
    canvas.dataset.level = level;
    for (const { p, column, row } of gridOf(level)) {
      const [x, y] = [column * side - view.x * view.scale, row * side - view.y * view.scale];
      if (x < -side || y < -side || x > w || y > h) continue;
      const image = tileOf(level, Math.floor(column / tiles.tile), Math.floor(row / tiles.tile));
      if (!image) continue;
      const size = Math.min(side - 2, 52);
      const [left, top] = [x + (side - size) / 2, y + (side - size) / 2];
      context.globalAlpha = hits !== null && !hits.has(p) ? 0.25 : 1;
      context.drawImage(image, (column % tiles.tile) * tiles.cell, (row % tiles.tile) * tiles.cell, tiles.cell, tiles.cell, left, top, size, size);
      context.lineWidth = 2;
      context.strokeStyle = p.colour;
      context.strokeRect(left, top, size, size);
      reps.push({ p, left, top, size });
      shown++;
    }
    return shown;
  }

  function paint() {
    const [w, h] = size();
    const ratio = window.devicePixelRatio || 1;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, w, h);
    const near = points.filter((p) => {
      if (only !== null && p.layer.order !== only) return false;
      [p.px, p.py] = on(p);
      return p.px > -40 && p.py > -40 && p.px < w + 40 && p.py < h + 40;
    });
    const dim = hits !== null;
    const radius = Math.min(5, Math.max(1.2, 30 / Math.sqrt(near.length + 1)));
    for (const p of near) {
      context.globalAlpha = dim && !hits.has(p) ? 0.15 : 0.85;
      context.fillStyle = p.colour;
      context.beginPath();
      context.arc(p.px, p.py, radius, 0, 7);
      context.fill();
    }
    // Images where there is room: one for each square of the screen.
    const side = near.length > 400 ? 30 : near.length > 120 ? 40 : 52;
    const taken = new Set();
    let shown = 0;
    // A single layer has few sheets.
    const few = near.length <= tiles.many || only !== null;
    reps = [];
    const tiled = few || !tiles.levels.length ? 0 : paintTiles(w, h);
    shown += tiled;
    canvas.dataset.tiled = tiled;
    const order = dim ? near.filter((p) => hits.has(p)).slice(0, 400).concat(few ? near : []) : few ? near : [];
    for (const p of order) {
      const place = Math.floor(p.px / side) + "," + Math.floor(p.py / side);
      if (taken.has(place)) continue;
      taken.add(place);
      const found = picture(p, ratio >= 1.5 && near.length <= 400);
      if (!found) continue;
      const [image, sx, sy, px] = found;
      context.globalAlpha = dim && !hits.has(p) ? 0.25 : 1;
      context.drawImage(image, sx, sy, px, px, p.px - side / 2 + 1, p.py - side / 2 + 1, side - 2, side - 2);
      context.lineWidth = dim && hits.has(p) ? 3 : 2;
      context.strokeStyle = dim && hits.has(p) ? "#e8692c" : p.colour;
      context.strokeRect(p.px - side / 2 + 1, p.py - side / 2 + 1, side - 2, side - 2);
      p.side = side;
      shown++;
    }
    context.globalAlpha = 1;
    canvas.dataset.shown = shown;
    canvas.dataset.near = near.length;
  }

  // -------------------------------------------------------------------- pointing

  function under(x, y) {
    const rep = reps.find(({ left, top, size: s }) => x >= left && x <= left + s && y >= top && y <= top + s);
    if (rep) return rep.p;
    let best = null;
    let least = 26 * 26;
    for (const p of points) {
      if (only !== null && p.layer.order !== only) continue;
      const [px, py] = on(p);
      const far = (px - x) ** 2 + (py - y) ** 2;
      if (far < least) { least = far; best = p; }
    }
    return best;
  }
  const nameOf = (p) => p.layer.name + ":" + ATLAS.channelAt(p.layer, p.row);
  function at(event) {
    const box = canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  }

  const fingers = new Map();
  let moved = 0;
  canvas.addEventListener("pointerdown", (event) => { fingers.set(event.pointerId, at(event)); canvas.setPointerCapture(event.pointerId); moved = 0; });
  canvas.addEventListener("pointermove", (event) => {
    const [x, y] = at(event);
    const held = fingers.get(event.pointerId);
    if (!held) {
      const p = under(x, y);
      canvas.style.cursor = p ? "pointer" : "grab";
      tip.hidden = !p;
      if (p) {
        const pic = make("span", { class: "pic" });
        ATLAS.tiny(pic, p.layer, p.rank, p.row);
        const word = make("span", {});
        tip.replaceChildren(pic, make("span", {}, make("b", { text: nameOf(p) }), word));
        ATLAS.words().then((words) => {
          const label = (words.units[p.layer.order] || [])[p.row];
          if (label >= 0) word.textContent = " " + words.words[label];
        });
        tip.style.left = Math.min(x + 14, size()[0] - 190) + "px";
        tip.style.top = y + 14 + "px";
      }
      return;
    }
    // One finger scrolls the page; two move and zoom the map.
    if (event.pointerType === "touch" && fingers.size < 2) { moved += Math.hypot(x - held[0], y - held[1]); return; }
    const others = Array.from(fingers.entries()).filter(([id]) => id !== event.pointerId);
    if (others.length === 1) {
      const [ox, oy] = others[0][1];
      const before = Math.hypot(held[0] - ox, held[1] - oy);
      // The point between the fingers moves with them.
      view.x -= (x - held[0]) / 2 / view.scale;
      view.y -= (y - held[1]) / 2 / view.scale;
      zoom(Math.hypot(x - ox, y - oy) / Math.max(1, before), (x + ox) / 2, (y + oy) / 2);
    } else {
      view.x -= (x - held[0]) / view.scale;
      view.y -= (y - held[1]) / view.scale;
      draw();
    }
    moved += Math.hypot(x - held[0], y - held[1]);
    fingers.set(event.pointerId, [x, y]);
  });
  const lift = (event) => {
    const held = fingers.delete(event.pointerId);
    if (held && event.type === "pointerup" && moved < 5) {
      const p = under(...at(event));
      if (p) window.location.assign(ATLAS.linkTo(p.layer.name, ATLAS.channelAt(p.layer, p.row)));
    }
  };
  for (const kind of ["touchstart", "touchmove"]) canvas.addEventListener(kind, (event) => { if (event.touches.length > 1) event.preventDefault(); }, { passive: false });
  canvas.addEventListener("pointerup", lift);
  canvas.addEventListener("pointercancel", lift);
  canvas.addEventListener("pointerleave", () => { tip.hidden = true; });
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoom(Math.exp(-event.deltaY * 0.0015), ...at(event));
  }, { passive: false });
  canvas.addEventListener("keydown", (event) => {
    const step = 60 / view.scale;
    const moves = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
    if (moves[event.key]) { view.x += moves[event.key][0]; view.y += moves[event.key][1]; draw(); }
    else if (event.key === "+" || event.key === "=") zoom(1.4);
    else if (event.key === "-") zoom(1 / 1.4);
    else if (event.key === "Enter") {
      const [w, h] = size();
      const p = under(w / 2, h / 2);
      if (p) window.location.assign(ATLAS.linkTo(p.layer.name, ATLAS.channelAt(p.layer, p.row)));
    } else return;
    const [w, h] = size();
    const middle = under(w / 2, h / 2);
    find("#map-near").textContent = middle ? "In the center: " + nameOf(middle) + " (press Enter to open it)." : "";
    event.preventDefault();
  });
  keys.ArrowLeft = keys.ArrowRight = () => false;

  // ---------------------------------------------------------------------- search

  const box = find("#map-find");
  async function light() {
    const text = box.value.trim();
    if (!text) { hits = null; find("#map-count").textContent = ""; draw(); return; }
    const words = await ATLAS.words();
    if (box.value.trim() !== text) return;
    const answer = ATLAS.search(text, words, 100000);
    const wanted = new Set(answer.results.filter((r) => r.layer).map((r) => r.layer.order + ":" + r.row));
    const layers = new Set(ATLAS.layersNamed(text).map((layer) => layer.order));
    hits = new Set(points.filter((p) => wanted.has(p.layer.order + ":" + p.row) || (!wanted.size && layers.has(p.layer.order))));
    find("#map-count").textContent = hits.size + (hits.size === 1 ? " unit" : " units");
    draw();
  }
  function fromAddress() {
    const query = /[#&]q=([^&]*)/.exec(window.location.hash);
    if (query) { try { box.value = decodeURIComponent(query[1]); } catch { box.value = query[1]; } light(); }
  }
  find(".map-controls").addEventListener("submit", (event) => event.preventDefault());
  box.addEventListener("input", light);
  find("#map-layer").addEventListener("change", (event) => { only = event.target.value === "" ? null : Number(event.target.value); draw(); });
  find("#map-whole").addEventListener("click", whole);
  if (!context) say("This browser does not support the canvas element.");
})();
