// The page of a layer: the grid of all its units, with order, filter and size.
(function () {
  "use strict";

  const { make, find, all, cell, data, keys, say, remember, remembered, listing } = ATLAS;
  const html = ATLAS.html;

  // Redirect addresses of earlier versions, layers/x.html#447, to the unit.
  function former() {
    const channel = /^#(\d+)$/.exec(window.location.hash);
    if (channel) window.location.replace(ATLAS.linkTo(html.dataset.layer, channel[1]));
  }
  former();
  window.addEventListener("hashchange", former);

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
    const label = (row) => listing.label(columns, row);
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
      }, make("span", { class: "pic" }), make("span", { class: "name" }, make("b", { text: String(channel) }), bad[status] ? make("i", { text: " " + status }) : "", word ? " " + word : ""), make("span", { class: "values" }));
      tiles.push(make("div", { role: "listitem" }, tile));
    }
    grid.append(...tiles);
    grid.hidden = controls.hidden = false;
    const fill = (item) => {
      const tile = item.firstChild;
      if (tile.firstChild.dataset.sharp !== undefined) return;
      cell(tile.firstChild, layer, "a", per, across, Number(tile.dataset.row), total);
    };
    // At first, load little more than the visible part. At the first input of the reader, load far enough ahead that
    // scrolling shows no gray tiles, then all other sheets one by one, for jumps.
    const seen = ATLAS.lazily(tiles, fill, "100px 0px 200px");
    // On screens of high density, sharper images of the visible part only.
    if (window.devicePixelRatio >= 1.5) ATLAS.lazily(tiles.map((item) => item.firstChild.firstChild), (pic) => ATLAS.sharpen(pic, layer, Number(pic.parentNode.dataset.row), ATLAS.index.sizes.thumb[2]), "0px");
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

    const controlOf = Object.fromEntries(Object.entries({ sort: "#sort", find: "#filter", status: "#status", measure: "#measure", from: "#from", to: "#to" }).map(([name, id]) => [name, find(id)]));
    const { sort, measure, status } = controlOf;
    for (const [key, text] of listing.measures(columns)) {
      sort.append(make("option", { value: key + "-down", text: text + ", highest first" }), make("option", { value: key + "-up", text: text + ", lowest first" }));
      measure.append(make("option", { value: key, text }));
    }
    if (columns.label) sort.append(make("option", { value: "label", text: "by label" }));
    if (columns.status) sort.append(make("option", { value: "status", text: "by status" }));
    for (const name of Array.from(new Set(columns.status || [])).sort()) status.append(make("option", { value: name, text: listing.statusOf(name) }));

    // Show the units that the controls select, in their order, with the values that decide it.
    const counted = find("#count");
    const apply = () => {
      const now = Object.fromEntries(Object.entries(controlOf).map(([name, control]) => [name, control.value]));
      find("#from-label").hidden = find("#to-label").hidden = !now.measure;
      const rows = listing.rows(layer, columns, now);
      const listed = new Set(rows);
      const deciding = listing.deciding(columns, now);
      const address = listing.format(now);
      tiles.forEach((item, row) => {
        const tile = item.firstChild;
        item.hidden = !listed.has(row);
        tile.setAttribute("href", ATLAS.linkTo(layer.name, tile.dataset.channel) + (address ? "&" + address : ""));
        find(".values", tile).replaceChildren(...deciding.map(([key, title]) => make("span", { title }, data(columns[key][row]))));
      });
      grid.append(...rows.map((row) => tiles[row]));
      counted.textContent = rows.length < total ? rows.length ? rows.length + " of " + total : "no unit of " + total + " matches" : "";
      return address;
    };
    // The address follows the controls, so that it can be sent, and so that Back finds it again.
    const changed = () => {
      const address = apply();
      window.history.replaceState(null, "", window.location.pathname + window.location.search + (address ? "#" + address : ""));
    };
    const restore = () => {
      const asked = listing.parse(window.location.hash.slice(1));
      for (const [name, control] of Object.entries(controlOf)) {
        control.value = asked[name];
        if (control.value !== asked[name]) control.selectedIndex = 0; // the layer has no such choice
      }
      apply();
    };
    controls.addEventListener("submit", (event) => event.preventDefault());
    for (const control of Object.values(controlOf)) control.addEventListener("input", changed);
    window.addEventListener("hashchange", restore);
    restore();

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
