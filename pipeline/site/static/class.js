// The page of a class, class.html#NAME; without a name, the list of all classes.
(function () {
  "use strict";

  const { make, find, need, number, data, tiny, sprite, pixels } = ATLAS;
  const { decoded, nameOf, load, cellOf, exampleView, DOT } = ATLAS.units;
  const root = ATLAS.root;
  const place = find("#class");
  const EXAMPLES = 8;
  const PER_LAYER = 12; // units of a layer before the others are asked for
  let latest = 0;

  const linkOf = (name) => root + "class.html#" + encodeURIComponent(name);
  const unitLink = (layer, channel) => ATLAS.linkTo(layer.name, channel);

  function classImage(unit) {
    const found = [];
    unit.facts.rendered.forEach((rendered, i) => {
      const p = (unit.record.pictures[rendered.key] || [])[0];
      if (!p || p.status === "missing") return;
      const box = make("span", { class: "pic", role: "img", "aria-label": "Class image, " + rendered.title + ": activation " + number(p.activation) });
      box.style.aspectRatio = rendered.sheet[3] + " / " + rendered.sheet[4];
      sprite(box, ...cellOf("p", unit, rendered, i, 0));
      const judged = Object.entries(p.judges || {}).filter(([, said]) => typeof said.rank === "number");
      found.push(make("figure", {}, make("a", { href: unitLink(unit.layer, unit.channel) }, box),
        make("figcaption", {}, make("b", { text: rendered.title }), p.status === "failed" ? make("strong", { class: "bad", text: " failed" }) : "",
          judged.map(([name, said]) => make("span", { class: "judged" }, make("br", {}), name + ": rank ", data(said.rank, String), ", probability ", data(said.probability))))));
    });
    return make("div", { class: "pictures class-images" }, found);
  }

  function examples(unit) {
    const shown = ((unit.record.examples || {}).max || []).slice(0, EXAMPLES).map((entry) => {
      const view = entry && exampleView(unit, entry, "whole", "max");
      if (!view) return null;
      const [path, label] = unit.shard.photos[entry[1]] || ["", ""];
      const inner = pixels.element(view);
      inner.style[view.aspect >= 1 ? "width" : "height"] = "100%";
      if (view.field && unit.facts.field) inner.append(pixels.frameOf(view.field, Math.max(...unit.facts.field) <= DOT));
      return make("figure", { class: "example" }, make("span", { class: "frame", role: "img", "aria-label": "Dataset image: " + (label || path) + ", maximum activation " + number(entry[0]) }, inner),
        make("figcaption", {}, data(entry[0]), label ? make("span", { text: label, title: label }) : ""));
    }).filter(Boolean);
    return shown.length ? make("div", { class: "beside" }, make("h2", { text: "Dataset examples" }), make("p", { class: "note", text: "The dataset images with the highest activations of the class." }), make("div", { class: "row" }, shown)) : null;
  }

  function tile(layer, channel, rank, text, title) {
    const pic = make("span", { class: "pic" });
    const name = layer.name + ":" + channel;
    const link = make("a", { class: "near", href: unitLink(layer, channel), title: name + (title ? ", " + title : ""), "aria-label": name + ", " + (title || text) }, pic, make("b", { text: String(channel) }), make("span", { text }));
    ATLAS.lazily([link], () => tiny(pic, layer, rank, ATLAS.rowOf(layer, channel)), "200px");
    return link;
  }

  const member = (layer, [channel, rank, auroc]) => tile(layer, channel, rank, "AUROC " + number(auroc));
  const layerLink = (layer) => make("a", { class: "layer", href: root + "layers/" + layer.slug + ".html", text: layer.name });
  const signed = (value) => (value < 0 ? "−" : "+") + number(Math.abs(value));

  function units(entry) {
    if (!entry.layers.length) return null;
    return make("section", { class: "class-units" }, make("h2", { text: "Units of each layer" }),
      make("p", { class: "note", text: "Units whose best label is this class: the label with the highest mean activation in each of two halves of the dataset. Ordered by AUROC, by which the label chosen in one half is told from all others in the other." }),
      entry.layers.map(([order, members]) => {
        const layer = ATLAS.layerAt(order);
        const row = make("div", { class: "nears" }, members.slice(0, PER_LAYER).map((one) => member(layer, one)));
        const more = members.length > PER_LAYER ? make("button", { type: "button", text: "All " + members.length, onclick: () => { row.append(...members.slice(PER_LAYER).map((one) => member(layer, one))); more.remove(); } }) : "";
        return make("section", { class: "class-layer" }, make("h3", {}, layerLink(layer), " ", make("span", { class: "count", text: members.length + " of " + ATLAS.count(layer) + " units" })), row, more);
      }));
  }

  function effects(entry) {
    if (!entry.effects.length) return null;
    return make("section", { class: "class-effects" }, make("h2", { text: "Units that move the output" }),
      make("p", { class: "note", text: "Change of the logit of this class by the unit: the logit minus the logit without the unit, whose map is set to its mean over the dataset. Measured exactly, for the ablated units of each layer. Shown are the largest changes whose 95 % interval over the images does not contain 0; such an interval is for one unit and one class, and of many some leave out 0 by chance." }),
      entry.effects.map(([order, units]) => {
        const layer = ATLAS.layerAt(order);
        return make("section", { class: "class-layer" }, make("h3", {}, layerLink(layer)),
          make("div", { class: "nears" }, units.map(([channel, rank, effect, low, high]) => tile(layer, channel, rank, signed(effect), "changes the logit by " + signed(effect) + ", 95 % interval " + signed(low) + " to " + signed(high)))));
      }));
  }

  function connections(entry) {
    if (!entry.connections.length) return null;
    return make("section", { class: "class-connections" }, make("h2", { text: "Connections among these units" }),
      make("p", { class: "note", text: "Of the strongest connections of each unit, those between two units of this page: norm of the effective weights, with the sign of their sum (+ excitatory, − inhibitory), times the standard deviation of the source unit where it is known. Not comparable between layers." }),
      entry.connections.map(([from, to, found]) => {
        const source = ATLAS.layerAt(from), reader = ATLAS.layerAt(to);
        return make("section", { class: "class-layer" }, make("h3", {}, layerLink(source), " → ", layerLink(reader)),
          make("ul", { class: "links" }, found.map(([a, rankA, b, rankB, sum, strength]) => make("li", {}, tile(source, a, rankA, ""), make("span", { class: "weight", text: (sum < 0 ? "−" : "+") + number(strength) + " →" }), tile(reader, b, rankB, "")))));
      }));
  }

  function list(names) {
    document.title = "Classes · " + ATLAS.index.title;
    place.replaceChildren(make("h1", { text: "Classes" }), make("p", { class: "note", text: names.length + (names.length === 1 ? " class" : " classes") + " of the network, and labels of the dataset, with a unit in this atlas." }),
      make("ul", { class: "classes" }, names.map((name) => make("li", {}, make("a", { href: linkOf(name), text: name })))));
    document.body.dataset.ready = "classes";
  }

  async function show() {
    const turn = ++latest;
    const asked = decoded(window.location.hash.slice(1));
    const { classes } = await ATLAS.words();
    if (turn !== latest) return;
    if (!asked) { list(classes); return; }
    const at = classes.indexOf(asked);
    if (at < 0) {
      place.replaceChildren(make("h1", { text: asked }), make("p", { class: "lead", text: "This atlas has no such class." }), make("p", {}, make("a", { href: root + "class.html", text: "All classes" })));
      return;
    }
    const per = ATLAS.index.sizes.classes;
    const entry = (await need("classes/" + (at - (at % per)), ATLAS.index.identity))[at % per];
    const layer = entry.unit.length ? ATLAS.layerAt(entry.unit[0]) : null;
    const unit = layer && await load({ layer, channel: entry.unit[1], row: ATLAS.rowOf(layer, entry.unit[1]) });
    if (turn !== latest) return;
    document.title = asked + " · " + ATLAS.index.title;
    const step = (to, text) => classes[to] === undefined ? make("span", {}) : make("a", { href: linkOf(classes[to]), text });
    place.replaceChildren(...[
      make("nav", { class: "neighbours", "aria-label": "Classes" }, step(at - 1, "← " + (classes[at - 1] ?? "")), make("a", { href: root + "class.html", text: "All classes" }), step(at + 1, (classes[at + 1] ?? "") + " →")),
      make("p", { class: "kicker", text: unit || entry.effects.length ? "Class" : "Label of the dataset" }), make("h1", { text: asked }),
      unit ? make("p", {}, "Unit ", make("a", { href: unitLink(layer, unit.channel), text: nameOf(unit) }), " of the classifier.") : make("p", { class: "note", text: "No unit of a classifier in this atlas stands for it." }),
      unit ? make("div", { class: "evidence" }, unit.facts.rendered.length ? classImage(unit) : null, examples(unit)) : null,
      units(entry), effects(entry), connections(entry)].filter(Boolean));
    document.body.dataset.ready = asked;
  }
  ATLAS.indexed.then(() => { show(); window.addEventListener("hashchange", () => { window.scrollTo(0, 0); show(); }); });
})();
