// The page of a layer: the grid of all its units, with order, filter and size.
(function () {
  "use strict";

  const { make, find, all, cell, keys, say, remember, remembered } = ATLAS;
  const html = ATLAS.html;

  // Redirect addresses of earlier versions, layers/x.html#447, to the unit.
  function former() {
    const channel = /^#(\d+)$/.exec(window.location.hash);
    if (channel) window.location.replace(ATLAS.linkTo(html.dataset.layer, channel[1]));
  }
  former();
  window.addEventListener("hashchange", former);

  // The columns of the grid that are no metrics of the table in core/metric_specs.py.
  const STATISTICS = {
    max: "maximum activation", mean: "mean activation", sparsity: "sparsity", nonzero: "share above zero", ratio: "activation ratio",
  };
  const bad = { failed: 1, missing: 1 };

  ATLAS.indexed.then(() => {
    const layer = ATLAS.layer(html.dataset.layer);
    return ATLAS.need(layer.slug + "/grid", layer.version).then((columns) => show(layer, columns));
  });

  function show(layer, columns) {
    const grid = find(".grid");
    const controls = find(".controls");
    const total = ATLAS.count(layer);
    if (!total) return;
    const [per, across] = ATLAS.index.sizes.thumb;
    const label = (row) => (columns.label && columns.label[row] >= 0 ? columns.labels[columns.label[row]] : "");
    const tiles = [];
    for (let row = 0; row < total; row++) {
      const channel = ATLAS.channelAt(layer, row);
      const word = label(row);
      const status = columns.status ? columns.status[row] : "";
      const ratio = columns.ratio && columns.ratio[row];
      const words = [layer.name + ":" + channel, word, ratio ? "activation ratio " + ATLAS.number(ratio) : "", bad[status] ? status : ""];
      const tile = make("a", {
        class: bad[status] ? "tile failed" : "tile", href: ATLAS.linkTo(layer.name, channel), title: words.filter(Boolean).join(", "),
        "data-name": layer.name + ":" + channel, "data-channel": channel, "data-row": row,
      }, make("span", { class: "pic" }), make("span", { class: "name" }, make("b", { text: String(channel) }), bad[status] ? make("i", { text: " " + status }) : "", word ? " " + word : ""));
      tiles.push(make("div", { role: "listitem" }, tile));
    }
    grid.append(...tiles);
    grid.hidden = controls.hidden = false;
    const fill = (item) => {
      const tile = item.firstChild;
      cell(tile.firstChild, layer, "a", per, across, Number(tile.dataset.row), total);
    };
    // At first, load little more than the visible part. At the first input of the reader, load far enough ahead that
    // scrolling shows no gray tiles, then all other sheets one by one, for jumps.
    const seen = ATLAS.lazily(tiles, fill, "100px 0px 200px");
    const signs = ["scroll", "wheel", "pointermove", "pointerdown", "touchstart", "keydown"];
    if (seen) for (const sign of signs) window.addEventListener(sign, ahead, { passive: true });
    function ahead() {
      for (const sign of signs) window.removeEventListener(sign, ahead);
      seen.disconnect();
      ATLAS.lazily(tiles, fill, "900px 0px 2200px");
      let start = 0;
      const next = () => {
        if (start >= total) return;
        const image = new Image();
        image.onload = image.onerror = next;
        image.src = ATLAS.media(layer, "a" + start);
        start += per;
      };
      next();
    }

    const size = find("#size");
    const resize = () => {
      grid.style.setProperty("--tile", size.value + "px");
      grid.classList.toggle("bare", Number(size.value) < 72);
    };
    if (remembered("size")) size.value = remembered("size");
    resize();
    size.addEventListener("input", () => { resize(); remember("size", size.value); });

    const sort = find("#sort");
    const measure = find("#measure");
    for (const [key, text] of [...Object.entries(STATISTICS), ...ATLAS.index.grid.map((name) => [name, ATLAS.index.metrics[name].title])]) {
      if (!columns[key]) continue;
      sort.append(make("option", { value: key + "-down", text: text + ", highest first" }), make("option", { value: key + "-up", text: text + ", lowest first" }));
      measure.append(make("option", { value: key, text }));
    }
    if (columns.label) sort.append(make("option", { value: "label", text: "by label" }));
    if (columns.status) sort.append(make("option", { value: "status", text: "by status" }));
    const order = () => {
      const [key, direction] = sort.value.split("-");
      const rows = tiles.map((_, row) => row);
      const text = { label: (row) => label(row) || "\uffff", status: (row) => columns.status[row] }[key];
      if (text) rows.sort((a, b) => (text(a) < text(b) ? -1 : text(a) > text(b) ? 1 : a - b));
      else if (key !== "channel") {
        const sign = direction === "down" ? -1 : 1;
        // Units without a number come last in both directions; ties are ordered by channel.
        const rank = (row) => (columns[key][row] === null ? Infinity : sign * columns[key][row]);
        rows.sort((a, b) => (rank(a) === rank(b) ? a - b : rank(a) < rank(b) ? -1 : 1));
      }
      grid.append(...rows.map((row) => tiles[row]));
    };
    sort.addEventListener("change", order);

    const filter = find("#filter");
    const status = find("#status");
    for (const name of Array.from(new Set(columns.status || [])).sort()) status.append(make("option", { value: name, text: name || "unknown" }));
    const from = find("#from");
    const to = find("#to");
    const counted = find("#count");
    const bound = (input, other) => { const text = input.value.trim().replace(",", ".").replace("−", "-"); return text === "" || Number.isNaN(Number(text)) ? other : Number(text); };
    const apply = () => {
      const wanted = filter.value.trim().toLowerCase();
      const key = measure.value;
      find("#from-label").hidden = find("#to-label").hidden = !key;
      const low = bound(from, -Infinity);
      const high = bound(to, Infinity);
      let shown = 0;
      for (let row = 0; row < total; row++) {
        const channel = String(ATLAS.channelAt(layer, row));
        let match = !wanted || (/^\d+$/.test(wanted) ? channel.startsWith(wanted) : label(row).toLowerCase().includes(wanted));
        if (match && status.value) match = columns.status[row] === status.value;
        if (match && key) { const value = columns[key][row]; match = value !== null && value >= low && value <= high; }
        tiles[row].hidden = !match;
        shown += match;
      }
      counted.textContent = shown < total ? shown + " of " + total : "";
    };
    controls.addEventListener("submit", (event) => event.preventDefault());
    for (const control of [filter, status, measure, from, to]) control.addEventListener("input", apply);
    // Browsers restore typed text on reload without an event.
    if (filter.value || status.value || measure.value) apply();
    if (sort.value !== "channel") order();

    const step = (by) => {
      const shown = all(".tile", grid).filter((tile) => !tile.parentNode.hidden);
      if (!shown.length) return;
      const at = shown.indexOf(document.activeElement);
      shown[at < 0 ? 0 : Math.min(Math.max(at + by, 0), shown.length - 1)].focus();
    };
    keys.ArrowLeft = () => step(-1);
    keys.ArrowRight = () => step(1);
    const vertical = (sign) => () => {
      if (!document.activeElement || !document.activeElement.classList.contains("tile")) return false;
      step(sign * getComputedStyle(grid).gridTemplateColumns.split(" ").length);
      return true;
    };
    keys.ArrowUp = vertical(-1);
    keys.ArrowDown = vertical(1);
    if (say) document.body.dataset.ready = "yes";
  }
})();
