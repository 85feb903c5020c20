// The grid of units, with the images of all contenders side by side, in any order. Loaded in parts, because there may be thousands.
(function () {
  "use strict";

  const { make, find, all, keys, remember, remembered, sprite } = ATLAS;
  const order = ATLAS.order;
  const here = ATLAS.html.dataset.layer;
  const PART = 120;
  const BESIDE = 4;
  let words = null;
  let now = null;
  let listed = [];
  let given = 0;
  let turn = 0;

  ATLAS.indexed.then(() => {
    const contenders = ATLAS.index.contenders;
    now = order.parse(window.location.hash);
    if (here !== undefined) now.in = here;
    find(".controls").hidden = find(".grid").hidden = false;
    find(".in").hidden = here !== undefined;
    if (here === undefined) ATLAS.index.layers.forEach(([name]) => find("#in").append(make("option", { value: name, text: name })));
    for (const m of ATLAS.index.measures) find("#of").append(make("option", { value: m.name, text: m.title }));
    for (const side of ["a", "b"]) contenders.forEach((c, i) => find("#" + side).append(make("option", { value: String(i), text: c.label })));
    find(".between").hidden = contenders.length < 3;
    for (const key of ["in", "of", "a", "b", "by"]) find("#" + key).addEventListener("change", () => { take(key); show(); });
    find("#filter").addEventListener("input", show);
    find(".controls").addEventListener("submit", (event) => event.preventDefault());
    const size = find("#size");
    if (window.innerWidth < 700) size.value = "72"; // two units side by side on a phone
    if (remembered("compared")) size.value = remembered("compared");
    size.addEventListener("input", () => { sized(); remember("compared", size.value); });
    window.addEventListener("hashchange", () => {
      if (!/[#&](by|of|in|a|b)=/.test(window.location.hash)) return;
      now = { ...order.parse(window.location.hash), in: here ?? order.parse(window.location.hash).in };
      show();
    });
    new IntersectionObserver((seen) => { if (seen.some((s) => s.isIntersecting)) more(); }, { rootMargin: "1200px" }).observe(find("#more"));
    show();
  });

  function take(key) {
    const value = find("#" + key).value;
    if (key === "a" || key === "b") {
      const other = key === "a" ? "b" : "a";
      if (now[other] === Number(value)) now[other] = now[key];
      now[key] = Number(value);
    } else now[key] = value;
    const said = order.text(here === undefined ? now : { ...now, in: "" });
    // Browsers may forbid this for pages opened from disk; the address then does not contain the order.
    try { window.history.replaceState(null, "", "#" + (said || "units")); } catch { /* see above */ }
  }
  // Contenders whose images a tile shows: all if they are few, else the two that are being compared.
  const shown = () => (ATLAS.index.contenders.length <= BESIDE ? ATLAS.index.contenders.map((_, i) => i) : [now.a, now.b]);
  function sized() {
    find(".grid").style.setProperty("--tile", shown().length * Number(find("#size").value) + "px");
  }

  async function show() {
    const own = ++turn;
    const [a, b] = [now.a, now.b].map((i) => ATLAS.index.contenders[i].label);
    find("#by").replaceChildren(...Object.entries(order.ORDERS).map(([key, title]) => make("option", { value: key, text: title(a, b) })));
    for (const key of ["in", "of", "a", "b", "by"]) find("#" + key).value = String(now[key]);
    const wanted = find("#filter").value.trim().toLowerCase();
    const [units, known] = await Promise.all([order.list(now), ATLAS.need("search", ATLAS.index.identity)]);
    if (own !== turn) return;
    words = known;
    listed = units.filter((unit) => matches(unit, wanted));
    find("#count").textContent = listed.length < units.length ? listed.length + " of " + units.length : "";
    find(".grid").replaceChildren();
    given = 0;
    sized();
    more();
    document.body.dataset.ready = now.by + " " + now.of + " " + listed.length;
  }
  const label = (unit) => { const of = words.units[unit.layer.order]; return of.length && of[unit.row] >= 0 ? words.words[of[unit.row]] : ""; };
  function matches(unit, wanted) {
    if (!wanted) return true;
    const channel = String(ATLAS.channelAt(unit.layer, unit.row));
    if (/^\d+$/.test(wanted)) return channel.startsWith(wanted);
    return (unit.layer.name + ":" + channel).toLowerCase().includes(wanted) || label(unit).toLowerCase().includes(wanted);
  }

  function tile(unit) {
    const { layer, row, key } = unit;
    const channel = ATLAS.channelAt(layer, row);
    const name = layer.name + ":" + channel;
    const plain = now.by === "layer" || now.by === "channel" || now.by === "up" || now.by === "down";
    const told = key === null || key === undefined ? "" : plain ? order.signed(key) : ATLAS.number(key);
    const pictures = shown().map((at) => make("span", { class: "pic", "data-at": at }));
    const word = label(unit);
    const title = [name, word, told && (find("#by").selectedOptions[0].text + ": " + told)].filter(Boolean).join(", ");
    return make("div", { role: "listitem" }, make("a", { class: "tile", href: order.address(layer.name, channel, now), "data-name": name, title },
      make("span", { class: "beside" }, pictures),
      make("span", { class: "name" }, make("b", { text: here === undefined ? name : String(channel) }), told ? make("span", { class: "gap", text: told }) : "", word ? " " + word : "")));
  }

  function more() {
    if (given >= listed.length) { find("#more").textContent = listed.length ? "" : "No unit matches."; return; }
    const part = listed.slice(given, given + PART);
    given += part.length;
    const tiles = part.map(tile);
    find(".grid").append(...tiles);
    find("#more").textContent = given < listed.length ? given + " of " + listed.length + " shown" : "";
    const [per, columns] = ATLAS.index.sizes.thumb;
    const count = ATLAS.index.contenders.length;
    const units = new Map(tiles.map((item, i) => [item, part[i]]));
    ATLAS.lazily(tiles, (item) => {
      const { layer, row } = units.get(item);
      const start = row - (row % per);
      const rows = Math.ceil((Math.min(per, ATLAS.count(layer) - start) * count) / columns);
      for (const pic of all(".pic", item)) sprite(pic, ATLAS.media(layer, "a" + start), columns, rows, (row - start) * count + Number(pic.dataset.at));
    }, "900px");
  }

  const step = (by) => {
    const tiles = all(".tile");
    if (!tiles.length) return;
    const at = tiles.indexOf(document.activeElement);
    tiles[at < 0 ? 0 : Math.min(Math.max(at + by, 0), tiles.length - 1)].focus();
  };
  keys.ArrowLeft = () => step(-1);
  keys.ArrowRight = () => step(1);
  const vertical = (sign) => () => {
    if (!document.activeElement || !document.activeElement.classList.contains("tile")) return false;
    step(sign * getComputedStyle(find(".grid")).gridTemplateColumns.split(" ").length);
    return true;
  };
  keys.ArrowUp = vertical(-1);
  keys.ArrowDown = vertical(1);
  keys.c = () => false;
})();
