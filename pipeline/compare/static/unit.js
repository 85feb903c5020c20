// The page of a unit, unit.html#layer:channel: the images of all contenders side by side, and two of them with a divider.
(function () {
  "use strict";

  const { make, find, number, data, need, keys, sprite, order, magnifier } = ATLAS;
  const place = find("#unit");
  let now = null;
  let asked = null;
  let listed = [];
  let latest = 0;
  let variant = 0;
  let part = 50;

  const nameOf = (unit) => unit.layer.name + ":" + unit.channel;
  const contender = (at) => ATLAS.index.contenders[at];
  const swatch = (at) => make("span", { class: "swatch c" + (at % 8), "aria-hidden": "true" });

  function parse(text) {
    const colon = text.lastIndexOf(":");
    if (colon < 1 || !/^\d+$/.test(text.slice(colon + 1))) return null;
    const layer = ATLAS.layer(text.slice(0, colon)) || ATLAS.layersNamed(text.slice(0, colon))[0];
    const channel = Number(text.slice(colon + 1));
    return layer && { layer, channel, row: ATLAS.rowOf(layer, channel) };
  }
  async function load(unit) {
    const per = ATLAS.index.sizes.shard;
    const start = unit.row - (unit.row % per);
    const [facts, shard] = await Promise.all([
      need(unit.layer.slug + "/layer", unit.layer.version), need(unit.layer.slug + "/u" + start, unit.layer.version),
    ]);
    return { ...unit, facts, record: shard.units[unit.row - start] };
  }
  function nothing(text, lead) {
    place.replaceChildren(make("section", { class: "opening" }, make("h1", { class: "layer", text }), make("p", { class: "lead", text: lead })));
  }

  async function show() {
    const turn = ++latest;
    asked = order.parse(window.location.hash);
    const unit = parse(asked.unit);
    if (!asked.unit) { window.location.replace(ATLAS.root + "index.html#units"); return; }
    if (!unit || unit.row < 0) { nothing(asked.unit, unit ? unit.layer.name + " has no channel " + unit.channel + " in this comparison." : "This comparison has no such unit."); return; }
    try {
      const [loaded, units] = await Promise.all([load(unit), order.list(asked)]);
      if (turn !== latest) return;
      now = loaded;
      listed = units;
      document.title = nameOf(now) + " · compared";
      draw();
      ATLAS.html.dataset.layer = now.layer.name;
      document.body.dataset.ready = nameOf(now);
    } catch (error) { if (turn === latest) nothing(asked.unit, error.message); }
  }

  // -------------------------------------------------------------------- pictures

  function picture(at) {
    const sheet = now.facts.sheets[at];
    const told = (now.record.pictures[at] || [])[variant];
    if (!sheet || !told || told.status === "missing") return null;
    const [per, variants, columns, width, height] = sheet;
    const start = now.row - (now.row % per);
    const cells = Math.min(per, ATLAS.count(now.layer) - start) * variants;
    const box = make("span", { class: "pic" });
    box.style.aspectRatio = width + " / " + height;
    sprite(box, ATLAS.media(now.layer, "p" + at + "-" + start), columns, Math.ceil(cells / columns), (now.row - start) * variants + variant);
    return box;
  }
  const absent = () => make("span", { class: "frame absent", text: "no feature visualization" });

  function figure(at) {
    const box = picture(at);
    const told = (now.record.pictures[at] || [])[variant];
    const value = now.record.values[ATLAS.index.main][at];
    const lensed = box && magnifier.add(make("div", { class: "lens", role: "img", "aria-label": "Feature visualization of " + nameOf(now) + " by " + contender(at).label }, box));
    return make("figure", { class: told && told.status === "failed" ? "failed" : "" }, lensed || absent(),
      make("figcaption", {}, swatch(at), make("b", { text: contender(at).label }), " ", data(value),
        make("span", { class: "measure", text: " " + order.measure(ATLAS.index.main).title }),
        told && told.status === "failed" ? make("strong", { text: " failed" }) : ""));
  }

  // Two images in one place: the second one covers the first one to the right of the divider.
  function swipe() {
    const [left, right] = [picture(asked.a), picture(asked.b)];
    if (!left || !right) return null;
    const over = make("div", { class: "over" }, right);
    const divider = make("span", { class: "divider", "aria-hidden": "true" });
    const stage = magnifier.add(make("div", { class: "lens stage", role: "img", "aria-label": contender(asked.a).label + " on the left, " + contender(asked.b).label + " on the right" }, left, over, divider));
    const slider = make("input", { type: "range", min: "0", max: "100", step: "1", class: "slider", "aria-label": "Swipe between " + contender(asked.a).label + " and " + contender(asked.b).label });
    const set = (to) => {
      part = Math.min(100, Math.max(0, to));
      slider.value = String(part);
      over.style.clipPath = "inset(0 0 0 " + part + "%)";
      divider.style.left = part + "%";
    };
    slider.addEventListener("input", () => set(Number(slider.value)));
    divider.addEventListener("pointerdown", (event) => divider.setPointerCapture(event.pointerId));
    divider.addEventListener("pointermove", (event) => {
      if (!divider.hasPointerCapture(event.pointerId)) return;
      const box = stage.getBoundingClientRect();
      set((100 * (event.clientX - box.left)) / box.width);
    });
    set(part);
    keys[","] = () => set(part - 5);
    keys["."] = () => set(part + 5);
    return make("figure", { class: "swipe" }, stage, slider, make("figcaption", {}, ["a", "b"].map((key) => make("span", {}, swatch(asked[key]), side(key)))));
  }
  function side(key) {
    const many = ATLAS.index.contenders.length > 2;
    if (!many) return make("b", { text: contender(asked[key]).label });
    const other = key === "a" ? "b" : "a";
    return make("select", { "aria-label": key === "a" ? "On the left" : "On the right", id: "side-" + key,
      onchange: (event) => {
        const to = Number(event.target.value);
        if (asked[other] === to) asked[other] = asked[key];
        asked[key] = to;
        go(now.layer, now.channel, "#side-" + key);
      } }, ATLAS.index.contenders.map((c, i) => make("option", { value: String(i), text: c.label, selected: i === asked[key] })));
  }

  // ------------------------------------------------------------- dataset examples

  // The examples of each group of runs that have the same ones, from sheets with `each` crops a unit.
  function examples() {
    const groups = now.facts.examples || [];
    const shown = groups.map((group, i) => [group, ((now.record.examples || [])[i] || []), i]).filter(([, found]) => found.length);
    if (!shown.length) return null;
    return make("section", { class: "examples", "aria-labelledby": "examples" }, make("h2", { id: "examples", text: "Dataset examples" }),
      make("p", { class: "note", text: "The dataset images with the highest activations of the unit, by the maximum of the map: what the feature visualizations are to be judged by." + (groups.length > 1 ? "" : " All runs that have dataset examples have these.") }),
      shown.flatMap(([group, found, i]) => [
        groups.length > 1 ? make("h3", { text: group.runs.join(", ") }) : null,
        make("div", { class: "row" }, found.map(([value, name], k) => make("figure", { class: "example" }, crop(group, i, k, name, value), make("figcaption", {}, data(value), make("span", { text: name }))))),
      ]));
  }
  function crop(group, i, k, name, value) {
    if (!group.sheet) return make("span", { class: "frame absent", text: name });
    const [per, each, columns] = group.sheet;
    const start = now.row - (now.row % per);
    const cells = Math.min(per, ATLAS.count(now.layer) - start) * each;
    const box = make("span", { class: "pic square", role: "img", "aria-label": "Dataset image " + name + ", maximum activation " + number(value) });
    sprite(box, ATLAS.media(now.layer, "x" + i + "-" + start, ATLAS.index.photo_suffix), columns, Math.ceil(cells / columns), (now.row - start) * each + k);
    return box;
  }

  // --------------------------------------------------------------------- numbers

  // Contenders with the best value; none if they are not comparable or no direction is better.
  function best(measure, values) {
    const alike = values.map((v, i) => i).filter((i) => order.known(values[i]) && measure.signs[i] !== 0);
    const first = alike[0];
    if (alike.length < 2 || !alike.every((i) => measure.alike[first][i])) return [];
    const most = Math.max(...alike.map((i) => measure.signs[i] * values[i]));
    const winners = alike.filter((i) => measure.signs[i] * values[i] === most);
    return winners.length < alike.length ? winners : [];
  }
  function numbers() {
    const head = make("tr", {}, make("th", { scope: "col", text: "Measure" }), ATLAS.index.contenders.map((c, i) => make("th", { scope: "col" }, swatch(i), c.label)));
    const rows = ATLAS.index.measures.filter((m) => now.record.values[m.name].some(order.known)).map((m) => {
      const values = now.record.values[m.name];
      const won = best(m, values);
      const way = m.better === "neither" ? "" : make("span", { class: "way", title: m.better + " is better", text: m.better === "higher" ? " ↑" : " ↓" });
      return make("tr", {}, make("th", { scope: "row", title: m.says }, m.title, way),
        values.map((v, i) => make("td", { class: won.includes(i) ? "best" : "" }, data(v), won.includes(i) ? make("span", { class: "off", text: " best" }) : "")));
    });
    const told = (title, of) => make("tr", {}, make("th", { scope: "row", text: title }), ATLAS.index.contenders.map((_, i) => make("td", {}, of(i))));
    const pictures = (i) => now.record.pictures[i] || [];
    rows.push(told("dataset maximum", (i) => data(now.record.natural[i])),
      told("status", (i) => pictures(i).map((p) => p.status).join(", ") || "—"),
      told("seed", (i) => make("span", { class: "seed", title: pictures(i).map((p) => p.seed).join(", "), text: pictures(i).map((p) => p.seed).join(", ") || "—" })));
    return make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Numbers of this unit" },
      make("table", { class: "values-of" }, make("thead", {}, head), make("tbody", {}, rows)));
  }

  // ------------------------------------------------------------------------ page

  function variants() {
    const most = Math.max(...now.record.pictures.map((p) => (p || []).length));
    if (variant >= most) variant = 0;
    if (most < 2) return null;
    return make("div", { class: "toggle", role: "radiogroup", "aria-label": "Which visualization" }, Array.from({ length: most }, (_, i) => i).flatMap((i) => [
      make("input", { type: "radio", name: "variant", id: "variant-" + i, checked: i === variant, onchange: () => { variant = i; draw(); find("#variant-" + i).focus(); } }),
      make("label", { for: "variant-" + i, text: "visualization " + (i + 1) })]));
  }
  function draw() {
    magnifier.clear();
    delete keys[","];
    delete keys["."];
    const at = listed.findIndex((unit) => unit.layer === now.layer && unit.row === now.row);
    const chosen = variants();
    const link = (unit, text) => (unit ? make("a", { href: order.address(unit.layer.name, ATLAS.channelAt(unit.layer, unit.row), asked), text }) : make("span", { text }));
    const to = (by) => (at < 0 ? null : listed[at + by]);
    const named = (unit) => (unit ? unit.layer.name + ":" + ATLAS.channelAt(unit.layer, unit.row) : "");
    const [a, b] = [asked.a, asked.b].map((i) => contender(i).label);
    const said = order.text(asked);
    const many = ATLAS.index.contenders.length;
    const by = order.ORDERS[asked.by](a, b) + (["spread", "up", "down"].includes(asked.by) ? ", " + order.measure(asked.of).title : "") + (asked.in ? ", in " + asked.in : "");
    const buttons = [["Zoom in", "+", () => magnifier.zoom(1.5)], ["Zoom out", "−", () => magnifier.zoom(1 / 1.5)], ["Whole image", "0", magnifier.whole]];
    place.replaceChildren(make("article", { class: "compared", "data-unit-shown": nameOf(now) },
      make("section", { class: "opening" },
        make("nav", { class: "neighbours", "aria-label": "Units" }, link(to(-1), to(-1) ? "← " + named(to(-1)) : "first unit"),
          make("a", { href: ATLAS.root + "index.html#" + (said || "units"), text: "all units" }), link(to(1), to(1) ? named(to(1)) + " →" : "last unit")),
        make("h1", { class: "layer" }, make("span", { text: now.layer.name + ":" }), String(now.channel)),
        make("p", { class: "subtitle" }, now.record.label ? make("span", { class: "class", text: now.record.label }) : "",
          make("a", { class: "tag", href: ATLAS.root + "layers/" + encodeURIComponent(now.layer.slug) + ".html", text: "layer " + now.layer.name }),
          make("span", { class: "note", text: at < 0 ? "" : (at + 1) + " of " + listed.length + ": " + by })),
        make("div", { class: "actions" }, buttons.map(([title, key, act]) => make("button", { type: "button", title: title + " (" + key + ")", text: title, onclick: () => act() })), chosen)),
      make("section", { class: "sides" + (many > 3 ? " several" : ""), "aria-label": "Feature visualizations" }, ATLAS.index.contenders.map((_, i) => figure(i)), swipe()),
      make("p", { class: "note", text: "Scroll or pinch to zoom all images at once; drag to move them. " + (order.known(now.record.difference) ? "Image distance: " + number(now.record.difference) + " (0 to 1)." : "") }),
      examples(),
      make("section", { "aria-labelledby": "its" }, make("h2", { id: "its", text: "Numbers" }), numbers())));
    magnifier.apply();
  }

  function go(layer, channel, focus) {
    window.location.hash = order.address(layer.name, channel, asked).split("#")[1];
    if (focus) window.addEventListener("compared", () => { const found = find(focus); if (found) found.focus(); }, { once: true });
  }
  const step = (by) => () => {
    const at = now ? listed.findIndex((unit) => unit.layer === now.layer && unit.row === now.row) : -1;
    const next = at < 0 ? null : listed[at + by];
    if (next) go(next.layer, ATLAS.channelAt(next.layer, next.row));
  };
  const across = (by) => () => {
    const to = now && ATLAS.layerAt(now.layer.order + by);
    if (to && ATLAS.count(to)) { if (asked.in) asked.in = to.name; go(to, ATLAS.channelAt(to, Math.min(now.row, ATLAS.count(to) - 1))); }
  };
  keys.ArrowLeft = step(-1);
  keys.ArrowRight = step(1);
  keys.ArrowUp = across(-1);
  keys.ArrowDown = across(1);
  keys["["] = across(-1);
  keys["]"] = across(1);
  keys["+"] = keys["="] = () => magnifier.zoom(1.5);
  keys["-"] = keys["−"] = () => magnifier.zoom(1 / 1.5);
  keys["0"] = magnifier.whole;
  keys.c = () => false;

  ATLAS.indexed.then(() => show()).then(() => {
    window.addEventListener("hashchange", () => {
      const same = now && order.parse(window.location.hash).unit === nameOf(now);
      if (!same) window.scrollTo(0, 0);
      show().then(() => window.dispatchEvent(new Event("compared")));
    });
  });
})();
