// A unit in a frame of another page, embed.html#layer:channel: its first visualization, four dataset examples, title and link.
(function () {
  "use strict";

  const { make, find, number, data, sprite, pixels } = ATLAS;
  const { parse, decoded, fragmentOf, nameOf, measuredOf, load, cellOf, exampleView, DOT } = ATLAS.units;
  const EXAMPLES = 4;
  const place = find("#embedded");

  const out = (href, text) => make("a", { href, target: "_blank", rel: "noopener", text });

  function visualization(unit) {
    const rendered = unit.facts.rendered[0];
    const p = rendered && (unit.record.pictures[rendered.key] || [])[0];
    if (!p || p.status === "missing") return null;
    const ratio = ["peak", "mean"].find((kind) => typeof p[kind + "_ratio"] === "number");
    const words = (p.status === "failed" ? "failed · " : "") + measuredOf(rendered) + " " + number(p.activation) + (ratio ? " · " + ratio + " " + number(p[ratio + "_ratio"]) + " × dataset maximum" : "");
    const box = make("span", { class: "pic", role: "img", "aria-label": "Feature visualization of " + nameOf(unit) + ", " + rendered.title + ": " + words });
    box.style.aspectRatio = rendered.sheet[3] + " / " + rendered.sheet[4];
    sprite(box, ...cellOf("p", unit, rendered, 0, 0));
    return make("figure", { class: "visualization" }, box, make("figcaption", { text: words }));
  }

  function example(unit, entry) {
    const view = entry && exampleView(unit, entry, "crop", "max");
    if (!view) return null;
    const [path, label] = unit.shard.photos[entry[1]] || ["", ""];
    const inner = pixels.element(view);
    inner.style[view.aspect >= 1 ? "width" : "height"] = "100%";
    if (view.field) inner.append(pixels.frameOf(view.field, Math.max(...unit.facts.field) <= DOT));
    return make("figure", { class: "example" }, make("span", { class: "frame", role: "img", "aria-label": "Dataset image: " + (label || path) + ", maximum activation " + number(entry[0]) }, inner), make("figcaption", {}, data(entry[0])));
  }

  function draw(unit) {
    const word = ATLAS.wordOf(unit.record);
    const examples = ((unit.record.examples || {}).max || []).slice(0, EXAMPLES).map((entry) => example(unit, entry)).filter(Boolean);
    const shown = visualization(unit);
    const name = nameOf(unit);
    document.title = name + " · " + ATLAS.index.title;
    place.replaceChildren(
      make("h1", {}, out(ATLAS.root + "unit.html#" + fragmentOf(unit), name), word ? make("span", { class: "class", text: " " + word }) : ""),
      make("div", { class: "embedded-images" }, shown, examples.length ? make("div", { class: "row", role: "group", "aria-label": "Dataset examples with the highest activations" }, examples) : null),
      make("p", { class: "note" }, examples.length ? "Right: dataset examples with the highest activations. " : "", ATLAS.index.model, " · ", out(ATLAS.root + "index.html", ATLAS.index.title)));
    document.body.dataset.ready = name;
  }

  function show() {
    const unit = parse(decoded(window.location.hash.slice(1)));
    if (!unit || unit.row < 0) {
      place.replaceChildren(make("p", { class: "note" }, "This atlas has no such unit. ", out(ATLAS.root + "index.html", ATLAS.index.title)));
      return;
    }
    load(unit).then(draw, (error) => place.replaceChildren(make("p", { class: "note", text: error.message })));
  }
  ATLAS.indexed.then(() => { show(); window.addEventListener("hashchange", show); });
})();
