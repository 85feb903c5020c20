// The page of a walk through a circuit, circuit.html#layer:channel,layer:channel,…: the last unit of the walk, with what it
// reads and what reads it. The address has the whole walk, so that it can be sent.
(function () {
  "use strict";

  const { make, find, number, data, tiny, sprite, keys, wires } = ATLAS;
  const { parse, decoded, nameOf, load, cellOf } = ATLAS.units;
  const root = ATLAS.root;
  const place = find("#circuit");
  const LONGEST = 30; // units of a walk that the address keeps
  let latest = 0;
  let trail = []; // names of the units of the walk

  const cut = (names) => names.slice(-LONGEST);
  const onward = (name) => wires.walk(name, cut(trail).slice(1 - LONGEST));

  function picture(unit) {
    const shown = unit.facts.rendered.map((rendered, i) => [rendered, i, (unit.record.pictures[rendered.key] || [])[0]]).find(([, , p]) => p && p.status !== "missing");
    if (!shown) return null;
    const [rendered, i, p] = shown;
    const box = make("span", { class: "pic", role: "img", "aria-label": "Feature visualization of " + nameOf(unit) + ", " + rendered.title + ": activation " + number(p.activation) });
    box.style.aspectRatio = rendered.sheet[3] + " / " + rendered.sheet[4];
    sprite(box, ...cellOf("p", unit, rendered, i, 0));
    return box;
  }

  // One connection: the other unit, the kernel and the numbers; `numbers` are [word, value] pairs.
  function wire(layer, channel, rank, kernel, words, numbers) {
    const name = layer.name + ":" + channel;
    const pic = make("span", { class: "pic" });
    const said = make("span", {}, make("b", { text: name }), words,
      numbers.map(([word, value]) => make("span", { class: "number" }, make("br", {}), word + " ", data(value, wires.signed))));
    if (rank < 0) return make("div", { class: "wire", title: name + " is not in this atlas" }, make("span", {}), kernel || make("span", {}), said);
    const link = make("a", { class: "wire", href: onward(name), title: "Go on to " + name, "data-name": name }, pic, kernel || make("span", {}), said);
    ATLAS.lazily([link], () => tiny(pic, layer, rank, ATLAS.rowOf(layer, channel)), "200px");
    return link;
  }
  const word = (sum) => make("span", { class: wires.says(sum).split(" ")[0], text: wires.says(sum) });

  function byWeights(unit, key) {
    const side = (unit.record.wiring || {})[key];
    const other = side && ATLAS.layer(side.layer);
    if (!other || !side.units.length) return null;
    const [before, source] = key === "inputs" ? ["from " + other.name + ",", "the input unit"] : ["to " + other.name + ",", "this unit"];
    const rows = side.units.map(([channel, , sum, rank, strength], i) => {
      const numbers = [["strength", sum < 0 ? -strength : strength], ["sum of weights", sum]];
      if (side.residual && typeof side.residual[i] === "number") numbers.push(["of it by the residual path", side.residual[i]]);
      if (side.attribution && typeof side.attribution[i] === "number") numbers.push(["attribution", side.attribution[i]]);
      return wire(other, channel, rank, wires.kernel(side, i), word(sum), numbers);
    });
    return make("div", {}, make("h3", {}, make("a", { href: root + "layers/" + other.slug + ".html", text: other.name })),
      make("p", { class: "note", text: "Path: " + wires.route(side) + "." }), rows, make("p", { class: "note", text: wires.method(side, before, source) }));
  }
  function byAttribution(unit, key) {
    const side = (unit.record.attributed || {})[key];
    const other = side && ATLAS.layer(side.layer);
    if (!other || !side.units.length) return null;
    return make("div", { class: "attributed" }, make("h3", { text: "By attribution" }),
      make("p", { class: "note", text: "What of the reading unit’s contribution to the largest output came through the other, mean over " + side.images + " dataset images; " + other.name + "." }),
      side.units.map(([channel, rank, value]) => wire(other, channel, rank, null, null, [["attribution", value]])));
  }
  function column(unit, key, title) {
    const parts = [byWeights(unit, key), byAttribution(unit, key)].filter(Boolean);
    return make("section", { class: key, "aria-label": title }, make("h2", { text: title }),
      parts.length ? parts : make("p", { class: "note", text: "This atlas has no connections " + (key === "inputs" ? "to a layer before." : "to a layer after.") }));
  }

  function asked() {
    return window.location.hash.slice(1).split(",").filter(Boolean).map((part) => decoded(part));
  }
  function walked(names) {
    if (names.length < 2) return null;
    return make("nav", { "aria-label": "Walk" }, make("ol", { class: "trail" }, names.map((name, i) => make("li", {},
      i === names.length - 1 ? make("b", { "aria-current": "page", text: name }) : make("a", { href: wires.walk(name, names.slice(0, i)), text: name })))));
  }

  async function show() {
    const turn = ++latest;
    trail = asked();
    const text = trail[trail.length - 1] || "";
    const asked_ = text ? parse(text) : null;
    if (!text) { window.location.replace(root + "index.html#network"); return; }
    if (!asked_ || asked_.row < 0) {
      place.replaceChildren(make("h1", { class: "layer", text }), make("p", { class: "lead", text: "This atlas has no such unit." }), walked(trail) || "");
      return;
    }
    const unit = await load(asked_);
    if (turn !== latest) return;
    trail = [...trail.slice(0, -1), nameOf(unit)];
    document.title = "Circuit of " + nameOf(unit) + " · " + ATLAS.index.title;
    const own = make("section", { class: "own", "aria-label": "Unit" }, make("h2", { text: "Unit" }), picture(unit) || "",
      make("p", {}, make("a", { href: ATLAS.linkTo(unit.layer.name, unit.channel), text: "The page of " + nameOf(unit) })));
    place.replaceChildren(...[make("p", { class: "kicker", text: "Circuit" }), make("h1", { class: "layer", tabindex: "-1" }, make("span", { text: unit.layer.name + ":" }), String(unit.channel)),
      walked(trail), make("div", { class: "walk" }, column(unit, "inputs", "Inputs"), own, column(unit, "outputs", "Outputs"))].filter(Boolean));
    ATLAS.html.dataset.layer = unit.layer.name;
    document.body.dataset.ready = nameOf(unit);
  }

  keys.Backspace = () => { if (trail.length > 1) window.location.assign(wires.walk(trail[trail.length - 2], trail.slice(0, -2))); };
  ATLAS.indexed.then(() => {
    show();
    window.addEventListener("hashchange", () => { window.scrollTo(0, 0); show().then(() => { const title = find("h1", place); if (title) title.focus({ preventScroll: true }); }); });
  });
})();
