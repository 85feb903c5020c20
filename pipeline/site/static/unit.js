// The page of a unit, unit.html#layer:channel; &with=layer:channel shows a second unit beside it, &sort=… and other parts of a
// listing (see listing.js) say which units are before and after it, &image=… opens one of its images.
(function () {
  "use strict";

  const { make, find, number, share, data, need, keys, say, remember, remembered, sprite, tiny, pixels, lightbox, listing, wires } = ATLAS;
  const { parse, decoded, fragmentOf, nameOf, measuredOf, load, cellOf, viewOf, LISTS, DOT, clamp, shape, exampleView, maskOf, heatOf } = ATLAS.units;
  const root = ATLAS.root;
  const place = find("#unit");
  let latest = 0;
  let now = null;
  let pinButtons = []; // redraw what says whether a unit is pinned

  // ------------------------------------------------------------------- address

  function asked() {
    const [before, image] = window.location.hash.slice(1).split("&image=");
    const [unit, ...more] = before.split("&");
    const second = more.find((part_) => part_.startsWith("with="));
    const text = decoded(unit);
    return { first: parse(text), second: second ? parse(decoded(second.slice(5))) : null, text, image, listed: listing.parse(more.filter((part_) => part_ !== second).join("&")) };
  }
  // The rows before and after a unit in the listing that it was reached by (−1: none), and the listing in words and as a part of
  // addresses. In the whole layer if the listing does not contain the unit.
  async function around(unit, listed) {
    const total = ATLAS.count(unit.layer);
    const whole = { before: unit.row - 1, after: unit.row + 1 < total ? unit.row + 1 : -1, address: "", words: "" };
    const address = listing.format(listed);
    if (!address) return whole;
    const columns = await need(unit.layer.slug + "/grid", unit.layer.version);
    const rows = listing.rows(unit.layer, columns, listed);
    const at = rows.indexOf(unit.row);
    if (at < 0) return { ...whole, address, words: "not among the units selected (" + listing.describe(columns, listed) + ")" };
    return { before: at ? rows[at - 1] : -1, after: at + 1 < rows.length ? rows[at + 1] : -1, address, words: at + 1 + " of " + rows.length + ", " + listing.describe(columns, listed) };
  }

  async function show() {
    const turn = ++latest;
    const { first, second, text, image, listed } = asked();
    lightbox.close();
    if (!first && !text) { window.location.replace(root + "index.html#network"); return; }
    if (!first || first.row < 0) {
      place.replaceChildren(make("section", { class: "opening" }, make("h1", { class: "layer", text: text }),
        make("p", { class: "lead", text: first ? first.layer.name + " has no channel " + first.channel + " in this atlas." : "This atlas has no such unit." }),
        first ? make("p", {}, make("a", { href: root + "layers/" + first.layer.slug + ".html", text: "All units of " + first.layer.name })) : null));
      return;
    }
    try {
      const units = await Promise.all([first, second].filter((unit) => unit && unit.row >= 0).map(load));
      const families = ATLAS.index.families.length ? await need("families", ATLAS.index.identity) : {};
      const neighbours = await around(units[0], listed);
      if (turn !== latest) return;
      now = units[0] = { ...units[0], around: neighbours };
      if (units.length > 1) units[1].around = await around(units[1], listing.parse(""));
      document.title = units.map(nameOf).join(" | ") + " · " + ATLAS.index.title;
      place.className = units.length > 1 ? "pair" : "";
      veils = [];
      pinButtons = [];
      place.replaceChildren(...units.map((unit, i) => page(unit, families, i)));
      veils.forEach((draw) => draw());
      ATLAS.html.dataset.layer = now.layer.name;
      document.body.dataset.ready = nameOf(now);
      if (image) openAsked(now, image);
      // Load the next unit in advance, because readers often go there.
      const next = neighbours.after;
      if (next >= 0) window.setTimeout(() => load({ ...now, row: next }), 400);
    } catch (error) {
      if (turn !== latest) return;
      place.replaceChildren(make("section", { class: "opening" }, make("h1", { class: "layer", text }), make("p", { class: "lead", text: error.message })));
    }
  }

  // -------------------------------------------------------------------- pictures

  function picture(unit, rendered, number_, variant) {
    const [, , , width, height] = rendered.sheet;
    const box = make("span", { class: "pic", role: "img" });
    box.style.aspectRatio = width + " / " + height;
    sprite(box, ...cellOf("p", unit, rendered, number_, variant));
    if (rendered.masked) {
      const veil = make("span", { class: "veil", hidden: true });
      box.append(veil);
      veils.push(() => {
        veil.hidden = !transparent;
        if (transparent && !veil.style.backgroundImage) sprite(veil, ...cellOf("m", unit, rendered, number_, variant));
      });
    }
    return box;
  }
  // -------------------------------------------------------------------- transparency

  // The sheets of opacities are gray images that are blended over the pictures, which shows them on white. A CSS mask would not load from disk.
  let transparent = remembered("transparent") === "yes";
  let veils = []; // redraw what depends on `transparent`
  function transparency() {
    const button = make("button", { type: "button", text: "Transparency", title: "Fade the pixels that the objective hardly depended on during the optimization",
      onclick: () => { transparent = !transparent; remember("transparent", transparent ? "yes" : "no"); veils.forEach((draw) => draw()); } });
    veils.push(() => button.setAttribute("aria-pressed", String(transparent)));
    return make("p", { class: "masking" }, button, " ", make("a", { href: root + "method.html#transparency", text: "What is transparent?" }));
  }
  // The activation ratio of peaks, in older atlases of means, as [ratio, "peak" or "mean"]; null where there is none.
  function ratioOf(p) {
    for (const kind of ["peak", "mean"]) if (typeof p[kind + "_ratio"] === "number") return [p[kind + "_ratio"], kind];
    return null;
  }

  // ---------------------------------------------------------------- images in the dialog

  const exact = (value) => (value === null || value === undefined ? "—" : make("data", { value: String(value), text: String(value).replace("-", "−") }));
  const fileName = (unit, rendered, variant) => [nameOf(unit), rendered.title, variant ? variant + 1 : ""].filter(Boolean).join("-");
  const linkOf = (unit, id) => window.location.href.split("#")[0] + "#" + fragmentOf(unit) + "&image=" + id;
  function openAsked(unit, image) {
    const [id, first] = image.split("&view=");
    const opener = Array.from(place.querySelectorAll("[data-image]")).find((element) => element.dataset.image === id);
    lightbox.open(unit.items, id, MODES.some(([key]) => key === first) ? first : mode, opener);
  }

  function pictures(unit) {
    const found = [];
    unit.facts.rendered.forEach((rendered, i) => {
      (unit.record.pictures[rendered.key] || []).forEach((p, variant) => {
        if (p.status === "missing") { found.push(make("figure", { class: "absent" }, make("figcaption", { text: rendered.title + ": missing" }))); return; }
        const box = picture(unit, rendered, i, variant);
        const id = "visualization/" + encodeURIComponent(rendered.key) + "/" + (variant + 1);
        const failed = p.status === "failed";
        const measured = measuredOf(rendered);
        const times = ratioOf(p);
        const title = rendered.title + (unit.record.pictures[rendered.key].length > 1 ? ", " + (variant + 1) : "");
        box.setAttribute("aria-label", "Feature visualization of " + nameOf(unit) + ", " + title + ": " + measured + " " + number(p.activation) +
          (times === null ? "" : ", " + times[1] + " " + number(times[0]) + " times the maximum activation over the dataset") + (failed ? "; failed" : ""));
        const opener = make("button", { type: "button", class: "zoomed-by", "aria-haspopup": "dialog", title: "Enlarge", "data-image": id, onclick: () => lightbox.open(unit.items, id, "", opener) }, box);
        unit.items.push({ id, title: nameOf(unit) + ", " + title, alt: box.getAttribute("aria-label"), views: [], view: () => viewOf(unit, rendered, i, variant, transparent), heat: null, name: fileName(unit, rendered, variant), link: linkOf(unit, id),
          facts: [[measured, exact(p.activation)], times === null ? null : [times[1] + " ÷ dataset maximum", exact(times[0])], ["status", listing.statusOf(p.status) + (p.reason ? ": " + p.reason : "")],
            p.seed ? ["seed", String(p.seed)] : null, rendered.digest ? ["digest", make("code", { text: rendered.digest.slice(0, 12), title: rendered.digest })] : null].filter(Boolean) });
        found.push(make("figure", { class: failed ? "failed" : "" }, opener,
          make("figcaption", {}, make("b", { text: title }), " · " + measured + " ", data(p.activation), times === null ? "" : [" · " + times[1] + " ", number(times[0]), " × dataset maximum"],
            failed ? make("strong", { class: "bad", text: " failed" }) : "",
            rendered.masked ? make("span", { class: "saving" }, " · ", make("button", { type: "button", class: "plain", text: "PNG", title: "Download with transparency (RGBA)", onclick: () => pixels.savePng(pixels.canvasOf(viewOf(unit, rendered, i, variant, true)), fileName(unit, rendered, variant)) })) : "",
            p.reason ? make("strong", { class: "reason", text: " " + p.reason }) : "")));
      });
      const larger = display(unit, rendered, i);
      if (larger) found.push(larger);
    });
    if (!found.length) return make("div", { class: "pictures" }, make("figure", { class: "absent" }, make("figcaption", { text: "Dataset examples only: the unit is not selected for visualization." })));
    const shown = make("div", { class: "pictures" + (found.length > 1 ? " many" : "") }, found);
    return unit.facts.rendered.some((rendered) => rendered.masked) ? make("div", {}, shown, transparency()) : shown;
  }

  // The same visualization on a larger canvas; no measure belongs to it.
  function display(unit, rendered, number_) {
    const drawn = rendered.display;
    if (!drawn || !drawn.channels.includes(unit.channel)) return null;
    const [width, height] = drawn.size;
    const url = ATLAS.media(unit.layer, "d" + number_ + "-" + unit.channel);
    const id = "display/" + encodeURIComponent(rendered.key);
    const title = rendered.title + ", display image";
    const alt = "Display image of " + nameOf(unit) + ", " + rendered.title + ", " + width + " × " + height + " px";
    const belong = "measures belong to the image of " + rendered.stored.slice().reverse().join(" × ") + " px";
    const opener = make("button", { type: "button", class: "zoomed-by", "aria-haspopup": "dialog", title: "Enlarge", "data-image": id, onclick: () => lightbox.open(unit.items, id, "", opener) },
      make("img", { src: url, width, height, alt, loading: "lazy", decoding: "async" }));
    unit.items.push({ id, title: nameOf(unit) + ", " + title, alt, views: [], view: () => ({ cell: [url, 1, 1, 0], part: [0, 0, 1, 1], aspect: width / height, veil: null, area: null, field: null }), heat: null, name: fileName(unit, rendered, 0) + "-" + width, link: linkOf(unit, id),
      facts: [["display image", width + " × " + height + " px; " + belong], ["digest", make("code", { text: drawn.digest.slice(0, 12), title: drawn.digest })]] });
    return make("figure", { class: "display" }, opener, make("figcaption", {}, make("b", { text: "Display image" }), " · " + width + " × " + height + " px; " + belong));
  }

  // The kernel of a unit that is linear in the pixels, and its parts.
  function kernel(unit) {
    const k = unit.record.kernel;
    if (!k) return null;
    return make("section", { class: "kernels" }, make("h2", { text: "Kernel" }),
      make("p", { class: "note" }, "This layer is linear in the pixels: the activation is the sum of this kernel of " + k.size.join(" × ") + " pixels times the image, plus a constant. Gray is 0, the strongest value ", data(k.scale),
        " per pixel value from black to white. ", k.exact ? "Normalizations are included." : "The normalization of the layer, which divides by statistics of each image, is not included.", " ", make("a", { href: root + "method.html#kernels", text: "How kernels are drawn" }), "."),
      make("div", { class: "row" }, k.views.map(([title, source]) => make("figure", {}, make("img", { class: "kernel", src: source, width: 120, height: Math.round((120 * k.size[0]) / k.size[1]), alt: "Kernel of " + nameOf(unit) + (title === "kernel" ? "" : ", " + title) }), make("figcaption", { text: title })))));
  }

  // -------------------------------------------------------------------- examples

  const MODES = [["crop", "Receptive field"], ["heat", "Heat map"], ["whole", "Whole image"]];
  let mode = remembered("mode") || "crop";
  const exampleId = (list, place_) => "example/" + list + "/" + (place_ + 1);

  // The items of the dialog for all examples of a unit.
  function exampleItems(unit) {
    const able = choicesOf(unit);
    const [height, width] = unit.facts.map;
    return LISTS.flatMap(([list, heading, measured]) => {
      const entries = (unit.record.examples || {})[list] || [];
      return entries.map((entry, i) => {
        if (!entry || !exampleView(unit, entry, "crop", list)) return null;
        const s = shape(unit, entry, list);
        const [path, label] = s.photo;
        const whole = !s.field;
        const at = list === "mean" ? "maximum at" : "position on the map";
        const [w, h] = s.input;
        const seen = whole ? null : [clamp(s.field[0] / w) * w, clamp(s.field[1] / h) * h, clamp(s.field[2] / w) * w, clamp(s.field[3] / h) * h].map(Math.round);
        const id = exampleId(list, i);
        return { id, title: nameOf(unit) + ", " + heading.toLowerCase() + ", " + (i + 1) + " of " + entries.length, alt: "Dataset image " + (label || path) + ", " + measured + " " + number(entry[0]),
          views: able, view: (key) => exampleView(unit, entry, key, list), heat: () => heatOf(unit, entry), name: nameOf(unit) + "-" + list + "-" + (i + 1), link: linkOf(unit, id),
          facts: [[measured, exact(entry[0])], height * width > 1 ? [at, "row " + entry[2] + ", column " + entry[3] + " of " + height + " × " + width + ", counted from 0"] : null,
            ["receptive field", whole ? "the whole input" : "columns " + seen[0] + "–" + (seen[2] - 1) + ", rows " + seen[1] + "–" + (seen[3] - 1) + " of the input, " + w + " × " + h + " px"],
            ["dataset image", path], label ? ["label", label] : null].filter(Boolean) };
      }).filter(Boolean);
    });
  }

  // The figure of an example as `view` shows it, with `kind` for those who hear it. The dialog opens as `opensAs`; `draw(inner, outer)`
  // adds to the image.
  function figureOf(unit, list, place_, { view, kind, opensAs, title, draw }) {
    const entry = unit.record.examples[list][place_];
    const [path, label] = unit.shard.photos[entry[1]] || ["", ""];
    const words = (label || path) + ", " + LISTS.find(([key]) => key === list)[2] + " " + number(entry[0]);
    const caption = make("figcaption", {}, data(entry[0]), label ? make("span", { text: label, title: label }) : "");
    if (!view) return make("figure", { class: "example" }, make("span", { class: "frame absent", role: "img", "aria-label": "Dataset image: " + words, title: path + title, text: path }), caption);
    const inner = pixels.element(view);
    inner.style[view.aspect >= 1 ? "width" : "height"] = "100%";
    const id = exampleId(list, place_);
    const outer = make("button", { type: "button", class: "frame", "aria-haspopup": "dialog", "data-image": id, "aria-label": kind + ": " + words,
      title: path + title, onclick: () => lightbox.open(unit.items, id, opensAs, outer) }, inner);
    draw(inner, outer);
    return make("figure", { class: "example" }, outer, caption);
  }

  function frame(unit, list, place_) {
    const entry = unit.record.examples[list][place_];
    const view = exampleView(unit, entry, mode, list);
    const title = Math.max(...unit.facts.map) > 1 ? " (row " + entry[2] + ", column " + entry[3] + ")" : "";
    return figureOf(unit, list, place_, { view, kind: mode === "heat" ? "Heat map on dataset image" : "Dataset image", opensAs: mode, title, draw(inner, outer) {
      if (mode === "heat") {
        heatOf(unit, entry).then((heat) => {
          if (!heat) return;
          inner.append(pixels.placed(heat.canvas, view.area));
          outer.title += "; heat map from " + number(heat.low) + " to " + number(heat.high);
        }).catch(() => {});
      }
      if (view.field) inner.append(pixels.frameOf(view.field, Math.max(...unit.facts.field) <= DOT));
    } });
  }

  // The views that the site has of a unit's examples.
  function choicesOf(unit) {
    const able = Object.values(unit.record.examples || {}).flat().filter(Boolean).map((entry) => shape(unit, entry));
    const shown = able.some((s) => s.whole || s.cell >= 0);
    return MODES.filter(([key]) => shown && (key === "crop" || (key === "whole" ? able.some((s) => s.whole) : unit.facts.heat)))
      .map(([key, text]) => [key, key === "crop" && unit.facts.field && Math.min(...unit.facts.field) < 48 ? "Receptive field, with surroundings" : text]);
  }

  // What the lists contain, and of how many images.
  function told(unit) {
    const { images, sources } = ATLAS.index;
    const counted = (n) => n.toLocaleString("en-US");
    const of = images === sources ? counted(images) + " dataset images" : counted(images) + " crops of " + counted(sources) + " dataset images, at most one of each in a list";
    const field = unit.facts.whole || !unit.facts.field ? "" : Math.max(...unit.facts.field) <= DOT ? " The dot marks the receptive field of " + unit.facts.field.join(" × ") + " pixels." : " The frame is the receptive field.";
    return "The largest and smallest activations at any position of the map, of " + of + "." + field;
  }

  function examples(unit, part, redraw) {
    const lists = unit.record.examples || {};
    const section = make("section", { class: "examples" });
    if (!lists.max && !lists.min) { section.append(make("p", { class: "note", text: "No dataset examples are stored for this unit." })); return section; }
    const choices = choicesOf(unit);
    const toggle = make("div", { class: "toggle", role: "radiogroup", "aria-label": "Part of the dataset images to show" });
    for (const [key, text] of choices.length > 1 ? choices : []) {
      const id = "mode-" + part + "-" + key;
      toggle.append(make("input", { type: "radio", name: "mode-" + part, id, value: key, checked: key === mode,
        onchange: () => { mode = key; remember("mode", key); redraw(); } }), make("label", { for: id, text }));
    }
    section.append(make("div", { class: "tools" }, make("h2", { text: "Dataset examples" }), toggle), make("p", { class: "note", text: told(unit) }));
    const body = make("div", {});
    section.append(body);
    section.redraw = () => {
      body.replaceChildren();
      for (const [key, title] of LISTS.slice(0, 3)) {
        const list = lists[key] || [];
        const note = key === "mean" && list.length ? make("p", { class: "note", text: "The mean over all positions of the map, so the whole input of the network counts." }) : "";
        if (list.length) body.append(make("h3", { text: title }), note, make("div", { class: "row of-" + key }, list.map((_, i) => frame(unit, key, i))));
        else if (key === "max") body.append(make("p", { class: "note", text: "No dataset image activated this unit above zero." }));
      }
    };
    section.redraw();
    return section;
  }

  // -------------------------------------------------------------------- spectrum

  // The largest activations on the feature visualizations, on the axis of the histogram, or at its end if they lie beyond.
  function marksOf(unit, low, high, width, height) {
    const marks = [];
    for (const rendered of unit.facts.rendered) {
      for (const p of unit.record.pictures[rendered.key] || []) {
        if (p.status === "missing" || p.status === "failed" || typeof p.peak !== "number" || ["least", "min"].includes(rendered.natural)) continue;
        const x = Math.min(width - 1, Math.max(1, (width * (p.peak - low)) / (high - low || 1)));
        const beyond = p.peak > high ? " (beyond the axis)" : "";
        marks.push(make("g", { class: "own-value" }, make("line", { x1: x, x2: x, y1: 0, y2: height }), make("text", { x: x + (x > width / 2 ? -4 : 4), y: 10 + 13 * marks.length, "text-anchor": x > width / 2 ? "end" : "start", text: rendered.title + " " + number(p.peak) + (beyond ? " →" : "") }),
          make("title", { text: "Maximum activation on the feature visualization by " + rendered.title + ": " + number(p.peak) + beyond })));
      }
    }
    return marks.slice(0, 6);
  }

  function spectrum(unit) {
    const h = unit.record.histogram;
    const list = (unit.record.examples || {}).spectrum;
    const edges = unit.facts.edges;
    if (!h) return null;
    const bins = Math.max(0, edges.length - 1);
    const each = bins && list ? list.length / bins : 0;
    const width = 640;
    const height = 110;
    const low = h.ends[0] ?? h.from;
    const high = h.ends[1] ?? h.from + h.step * h.counts.length;
    const span = high - low || 1;
    const x = (value) => Math.min(width, Math.max(0, (width * (value - low)) / span));
    const most = Math.max(1, ...h.counts);
    const svg = make("svg", { viewBox: "0 0 " + width + " " + (height + 16), class: "histogram", role: "img",
      "aria-label": "Histogram of the maximum activation for each dataset image, from " + number(h.ends[0]) + " to " + number(h.ends[1]) });
    const zones = [];
    for (let i = 0; i < bins; i++) {
      const [a, b] = [h.quantiles[i], h.quantiles[i + 1]];
      if (a === null || b === null) continue;
      zones[i] = make("rect", { class: "zone", x: x(a), y: 0, width: Math.max(2, x(b) - x(a)), height, "data-bin": i, onpointerenter: () => choose(i), onclick: () => choose(i) });
      svg.append(zones[i]);
    }
    h.counts.forEach((count, i) => {
      const value = h.from + h.step * i;
      // Square root of the count, so that the few images in a tail are visible.
      const tall = Math.sqrt(count / most) * (height - 4);
      if (count) svg.append(make("rect", { class: "bar-of", x: x(value), y: height - tall, width: Math.max(1, x(value + h.step) - x(value) - 1), height: tall }, make("title", { text: count + " dataset images from " + number(value) })));
    });
    if (low < 0 && high > 0) svg.append(make("line", { class: "zero", x1: x(0), x2: x(0), y1: 0, y2: height }), make("text", { x: x(0), y: height + 13, "text-anchor": "middle", text: "0" }));
    svg.append(...marksOf(unit, low, high, width, height));
    svg.append(make("text", { x: 0, y: height + 13, text: number(low) }), make("text", { x: width, y: height + 13, "text-anchor": "end", text: number(high) }));
    const row = make("div", { class: "row" });
    const buttons = [];
    const names = make("div", { class: "bins", role: "group", "aria-label": "Quantile bins" });
    let chosen = -1;
    function choose(i) {
      if (chosen === i || !each) return;
      chosen = i;
      buttons.forEach((b, j) => b && b.setAttribute("aria-pressed", String(j === i)));
      zones.forEach((z, j) => z && z.classList.toggle("on", j === i));
      const places = Array.from({ length: each }, (_, j) => i * each + j).filter((j) => list[j]);
      row.replaceChildren(...(places.length ? places.map((j) => frame(unit, "spectrum", j)) : [make("p", { class: "note", text: "There are no examples from this bin." })]));
    }
    for (let i = 0; i < (each ? bins : 0); i++) {
      buttons[i] = make("button", { type: "button", "aria-pressed": "false", "data-bin": i, onclick: () => choose(i), onpointerenter: () => choose(i),
        title: number(h.quantiles[i]) + " to " + number(h.quantiles[i + 1]) }, edges[i] + "–" + edges[i + 1] + " %");
      names.append(buttons[i]);
    }
    const section = make("section", { class: "spectrum" }, make("h2", { text: "Quantile examples" }),
      make("p", { class: "note", text: "Distribution of the maximum activation per dataset image (heights: square root of the count); lines mark the maximum activation on the feature visualizations. Select a quantile bin to see random examples from it." }), svg, names, row);
    section.redraw = () => { const i = chosen; chosen = -1; choose(i < 0 ? bins - 1 : i); };
    // Load its images when it becomes visible.
    ATLAS.lazily([section], () => section.redraw(), "0px");
    return section;
  }

  // --------------------------------------------------------------------- numbers

  const STATS = [
    ["max", "maximum activation", number, "Over all positions of all dataset images."],
    ["mean", "mean activation", number, "Over all positions of all dataset images."],
    ["sd", "standard deviation", number, "Over all positions of all dataset images."],
    ["min", "minimum activation", number, "Over all positions of all dataset images."],
    ["nonzero", "above zero", share, "Share of positions with a positive activation, over all dataset images."],
    ["fired", "active images", share, "Share of dataset images with a positive activation at any position."],
    ["sparsity", "sparsity", number, "0: equal activation for all dataset images. 1: a single image activates the unit."],
    ["kurtosis", "kurtosis", number, "Excess kurtosis of the maximum activation per image: the weight of the tails."],
    ["best_mean", "highest mean", number, "Highest mean of an activation map over all dataset images."],
    ["least_mean", "lowest mean", number, "Lowest mean of an activation map over all dataset images."],
  ];

  // Statistics that compare activations with zero.
  const AGAINST_ZERO = ["nonzero", "fired", "sparsity"];

  // Statistics that compare the positions of a map, or its mean.
  const OF_MAPS = ["fired", "best_mean", "least_mean"];

  const metric = (name) => ATLAS.index.metrics[name];

  function numbers(unit) {
    const main = unit.facts.rendered[0];
    const p = main && unit.record.pictures[main.key][0];
    const items = [];
    const meanings = [];
    const item = (name, node, hint, strong) => { if (hint) meanings.push(make("dt", { text: name }), make("dd", { text: hint })); items.push(make("div", { class: strong ? "main" : "", title: hint }, make("dt", { text: name }), make("dd", {}, node))); };
    if (p && p.status !== "missing") {
      // What the objective is, which these three numbers share; the statistics of the dataset below are of single positions.
      const over = ["mean", "least"].includes(main.natural) ? " (mean over positions)" : main.objective === "rectified" ? " (mean over positions, negative values reduced)" : "";
      const measured = (name, strong) => item(metric(name).title + (["activation", "natural", "robust"].includes(name) ? over : ""), data(p[name]), metric(name).explanation, strong);
      measured("activation", true);
      measured("natural", true);
      for (const name of ["peak_ratio", "mean_ratio", "robust"]) if (name in p) measured(name, name !== "mean_ratio");
    }
    const stats = unit.record.stats || {};
    const linear = unit.facts.reference === "none";
    // With one position, means over the map are its only value.
    const single = Math.max(...unit.facts.map) <= 1;
    for (const [key, name, form, hint] of STATS) if (key in stats && !(single && OF_MAPS.includes(key)) && !(linear && AGAINST_ZERO.includes(key))) item(name, data(stats[key], form), hint);
    if (linear) item("above zero, sparsity", /@(heads|attention)$/.test(unit.layer.name) ? "never below zero" : "linear output: no zero", "No rectifier follows this layer, so the sign of its activations has no meaning.");
    for (const key of Object.keys(stats)) if (!STATS.some(([k]) => k === key) && typeof stats[key] === "number") item(key.replace(/_/g, " "), data(stats[key]), "");
    let says = null;
    const times = p ? ratioOf(p) : null;
    const word = times && times[1];
    if (p && p.status === "failed") says = make("p", { class: "says bad", text: "The optimization failed: it did not raise the activation above that of the initial image, or values overflowed. This image carries no information about the unit." });
    else if (times !== null && times[0] >= 1) says = make("p", { class: "says" }, "The " + word + " activation on the feature visualization is ", make("b", { text: number(times[0]) + " times" }), " the largest one on any dataset image.");
    else if (times !== null) says = make("p", { class: "says" }, "The " + word + " activation on the feature visualization is only ", make("b", { text: number(times[0]) }), " of the largest one on any dataset image, so the dataset examples are the better evidence.");
    else if (p && p.natural !== null && p.activation !== null) says = make("p", { class: "says", text: "The maximum activation over the dataset is not positive, so there is no activation ratio." });
    else if (main && main.objective === "energy") says = make("p", { class: "says", text: "The feature visualization raises the energy of the channel (its variance over the map), which is not measured on the dataset: there is no activation ratio." });
    if (stats.inactive === true) says = make("p", { class: "says bad", text: "No dataset image activated this unit above zero." });
    return make("section", { class: "figures" }, make("h2", { text: "Numbers" }), says, judged(unit), make("dl", { class: "numbers" }, items),
      make("details", { class: "meanings" }, make("summary", { text: "What each number is" }), make("dl", { class: "table" }, meanings)),
      make("p", { class: "note" }, "Activations are in the layer’s own scale: compare them within a layer only. ", make("a", { href: root + "method.html#numbers", text: "What the numbers mean" })));
  }

  // One line for each visualization and judge; none without judges.
  function judged(unit) {
    const lines = [];
    for (const rendered of unit.facts.rendered) {
      const all = unit.record.pictures[rendered.key] || [];
      all.forEach((p, i) => {
        const title = unit.facts.rendered.length > 1 || all.length > 1 ? rendered.title + (all.length > 1 ? ", " + (i + 1) : "") + ": " : "";
        for (const [judge, j] of Object.entries(p.judges || {})) {
          const name = make("b", { text: judge });
          if (typeof j.rank === "number") lines.push([title, title ? "recognized by " : "Recognized by ", name, ": rank ", data(j.rank, String), ", probability ", data(j.probability), "."]);
          else if (typeof j.quantile === "number") lines.push([title, title ? "matched in " : "Matched in ", name, ": quantile ", data(j.quantile), " among dataset images, held-out correlation ", data(j.correlation), "."]);
          else if (typeof j.correlation === "number" && rendered.objective === "energy") lines.push([title, title ? "best direction in " : "Best direction in ", name, ": held-out correlation ", data(j.correlation), ". It predicts the activation, not the energy that the image raises, so the image has no quantile."]);
          else if (typeof j.correlation === "number") lines.push([title, title ? "no matching direction in " : "No matching direction in ", name, ": held-out correlation ", data(j.correlation), "."]);
        }
      });
    }
    return lines.map((line) => make("p", { class: "says judged" }, line));
  }

  // Who or what gave the name, and how sure that is.
  function reasonOf(n) {
    if (n.method === "person") return ["by ", n.author, ...(typeof n.confidence === "number" ? [", confidence ", data(n.confidence, share)] : [])];
    if (n.method === "labels") return ["label of ", data(n.support), " of the ", data(n.examined), " strongest dataset images; p ", data(n.p), ", false discovery rate ", data(n.q)];
    return [n.author, ", soft-WPMI ", data(n.score), "; p ", data(n.p), ", false discovery rate ", data(n.q)];
  }
  function names(unit) {
    const found = unit.record.names || [];
    const meanings = unit.record.meanings || [];
    if (!found.length && !meanings.length) return null;
    return make("section", { class: "called" }, make("h2", { text: "Names" }),
      found.length ? make("ul", {}, found.map((n) => make("li", {},
        make("b", { text: n.name }), " ", make("span", { class: "note" }, ...reasonOf(n), "."), n.comment ? make("span", { class: "comment", text: " " + n.comment }) : ""))) : null,
      meanings.map((m) => make("p", { class: "note" }, "By ", m.model, ": clarity ", data(m.clarity), ", polysemanticity ", data(m.polysemanticity),
        m.similar ? [", most similar unit ", make("a", { href: ATLAS.linkTo(m.similar[0], m.similar[1]), text: m.similar[0] + ":" + m.similar[1] }), " (", data(m.similar[2]), ")"] : "", ". ", make("a", { href: root + "method.html#names", text: "What these are" }), ".")));
  }

  function labels(unit) {
    const l = unit.record.labels;
    if (!l || (!l.over.length && !l.best && !l.chosen)) return null;
    const rows = l.over.map(([name, count, lift, p]) => make("tr", {}, make("th", { scope: "row", text: name }), make("td", { text: String(count) }), make("td", {}, lift === null ? "—" : data(lift), lift === null ? "" : " ×"), make("td", {}, data(p))));
    const measured = [", ", typeof l.selectivity === "number" ? ["selectivity ", data(l.selectivity), ", "] : [], "AUROC ", data(l.auroc), ", measured on the half that did not choose the label."].flat();
    const name = (text) => make("b", { text });
    return make("section", { class: "labels" }, make("h2", { text: "Labels" }),
      rows.length ? make("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "Labels" }, make("table", {}, make("thead", {}, make("tr", {}, make("th", { scope: "col", text: "among the top dataset images" }), make("th", { scope: "col", text: "count" }), make("th", { scope: "col", text: "lift" }), make("th", { scope: "col", text: "p" }))), make("tbody", {}, rows))) : null,
      l.best ? make("p", { class: "note" }, "Highest mean activation in both halves of the images for ", name(l.best), ...measured) : null,
      l.chosen ? make("p", { class: "note" }, "Highest mean activation in one half of the images for ", name(l.chosen[0]), ", in the other for ", name(l.chosen[1]), ...measured) : null);
  }

  // What the outputs lose when the unit is removed.
  function effects(unit) {
    const e = unit.record.effects;
    if (!e || e.mean === null) return null;
    const table = (title, rows) => make("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": title }, make("table", {},
      make("thead", {}, make("tr", {}, make("th", { scope: "col", text: title }), make("th", { scope: "col", text: "effect" }), make("th", { scope: "col", text: "95 % interval" }))),
      make("tbody", {}, rows.map(([name, effect, low, high]) => make("tr", {}, make("th", { scope: "row", text: name }), make("td", {}, data(effect)), make("td", {}, data(low), " to ", data(high)))))));
    return make("section", { class: "effects" }, make("h2", { text: "Effect on the outputs" }),
      make("p", { class: "note" }, "An effect is the output minus the output without the unit. On the largest output of each of ", String(e.images), " dataset images it is ", data(e.mean), " on average, and ", data(e.size), " in absolute value: an approximation by gradient × (activation − mean)."),
      e.raises && e.raises.length ? make("div", { class: "two" }, table("raises most", e.raises), table("lowers most", e.lowers)) : null,
      e.raises ? make("p", { class: "note" }, "Measured exactly: the network was run with the unit’s map set to its mean over the dataset. The intervals are over the images.",
        typeof e.rank_correlation === "number" ? [" In this layer the approximation has a rank correlation of ", data(e.rank_correlation), " with the exact effects."] : "") : null);
  }

  // The images that use the unit, with what their relevance does not come from darkened.
  function relevant(unit) {
    const list = (unit.record.examples || {}).relevant || [];
    if (!list.length) return null;
    const figures = list.map((entry, i) => {
      const view = exampleView(unit, entry, "crop", "mean"); // the whole input of the network, or the crop if the site has no whole images
      const mask = maskOf(unit, entry[1]);
      return figureOf(unit, "relevant", i, { view, kind: "Dataset image with mask", opensAs: "heat", title: "", draw(inner) {
        if (mask) inner.append(pixels.placed(pixels.veil(mask.width, mask.height, mask.bytes), view.area));
      } });
    });
    return make("section", { class: "relevant" }, make("h2", { text: "Images that use the unit" }),
      make("p", { class: "note", text: "The images, of those that effects were measured on, with the largest relevance: the part of the image’s largest output that passes through the unit, by activation × gradient. The bright parts are the pixels that it comes from; an image without dark parts is one whose blurred copy the unit responds to nearly as much." }),
      make("div", { class: "row of-relevant" }, figures));
  }

  // Groups of the images with the highest mean activation, each with an image of its own.
  function facets(unit) {
    const found = unit.record.facets;
    if (!found || !found.facets.length) return null;
    const [per, columns, total] = found.sheet;
    const cell = (at, kind, words, title) => {
      const start = at.row - (at.row % per);
      const url = root + "media/facets-" + unit.layer.slug + "/" + start / per + "." + ATLAS.index.photo_suffix + "?v=" + unit.layer.version;
      const frame = make("span", { class: "frame " + kind, role: "img", "aria-label": words, title: title || words });
      ATLAS.sprite(frame, url, columns, Math.min(per, total - start), (at.row - start) * columns + at.column);
      return frame;
    };
    const many = found.facets.length;
    const rows = found.facets.map((facet, i) => make("figure", { class: "facet" },
      make("div", { class: "cells" }, cell({ row: facet.row, column: 0 }, "made", "Visualization of facet " + (i + 1)),
        facet.nearest.map(([path, label], k) => (found.pictured ? cell({ row: facet.row, column: k + 1 }, "", "Dataset image: " + (label || path), path)
          : make("span", { class: "frame absent", role: "img", "aria-label": "Dataset image: " + (label || path), title: path, text: path })))),
      make("figcaption", {}, many > 1 ? "Facet " + (i + 1) + ": " : "", data(facet.size), " of ", data(found.examples), " examples",
        typeof facet.separation === "number" ? [" · separation ", data(facet.separation)] : "",
        " · image: activation ", data(facet.activation), ", cosine with the facet ", data(facet.cosine),
        facet.failed ? [" ", make("strong", { class: "flag", text: "failed" })] : "")));
    return make("section", { class: "facets" }, make("h2", { text: many > 1 ? many + " facets" : "One facet" }),
      make("p", { class: "note" }, "The ", data(found.examples), " dataset images with the highest mean activation, grouped by the responses of " + found.embedding + ", with one visualization for each group and its most typical images. ",
        typeof found.monosemanticity === "number" ? ["Monosemanticity ", data(found.monosemanticity), ": 0 for images as alike as random ones, 1 for images as alike as the nearest neighbors of an image."] : ""),
      rows);
  }

  // `drawn` is shown below the text, and `more` is what it shows, in words; the layer is named if they are of several.
  function neighbour(layer, channel, rank, text, drawn, more, several) {
    const name = layer.name + ":" + channel;
    const pic = make("span", { class: "pic" });
    const inside = [pic, several ? make("small", { text: layer.name }) : null, make("b", { text: String(channel) }), make("span", { text }), drawn];
    if (rank < 0) return make("span", { class: "near", title: name + " is not in this atlas" + (more ? "; it " + more : "") }, inside);
    const link = make("a", { class: "near", href: ATLAS.linkTo(layer.name, channel), title: name + (more ? ", " + more : ""), "aria-label": name + ", " + text + (more ? ", " + more : "") }, inside);
    ATLAS.lazily([link], () => tiny(pic, layer, rank, ATLAS.rowOf(layer, channel)), "0px");
    return link;
  }

  // The units of all layers with the most similar activations, from a shard that is loaded when the section comes near.
  function similar(unit) {
    const [per, least, version] = ATLAS.index.similar || [];
    if (!per) return null;
    const body = make("div", { class: "nears with-layers" });
    const section = make("section", { class: "similar" }, make("h2", { text: "Most similar units of all layers" }), make("p", { class: "note" }, "By the correlation of their maximum activations per dataset image, at least " + least + ". ", make("a", { href: root + "method.html#numbers", text: "Definition" }), "."), body);
    let number_ = unit.row;
    for (let order = 0; order < unit.layer.order; order++) number_ += ATLAS.count(ATLAS.layerAt(order));
    const start = number_ - (number_ % per);
    ATLAS.lazily([section], () => need("similar/" + start, version).then((shard) => {
      const flat = shard[number_ - start];
      if (!flat.length) { section.querySelector(".note").textContent = "No unit has a correlation of at least " + least + " with this one."; return; }
      for (let i = 0; i < flat.length; i += 4) {
        const [order, channel, r, rank] = flat.slice(i, i + 4);
        body.append(neighbour(ATLAS.layerAt(order), channel, rank, r.toFixed(2), null, "", true));
      }
    }).catch(() => section.remove()), "300px");
    return section;
  }

  function relations(unit) {
    const found = [similar(unit)].filter(Boolean);
    const wiring = unit.record.wiring || {};
    for (const [key, title] of wires.SIDES) {
      const side = wiring[key];
      const other = side && ATLAS.layer(side.layer);
      if (!other || !side.units.length) continue;
      const [before, source] = key === "inputs" ? ["from " + other.name + ",", "the input unit"] : ["to " + other.name + ",", "this unit"];
      const near = ([channel, , sum, rank, strength], i) => neighbour(other, channel, rank, (sum < 0 ? "−" : "+") + number(strength), wires.kernel(side, i), wires.says(sum) + (side.kernels ? ", sum of weights " + wires.signed(sum) : ""));
      found.push(make("section", { class: "wiring" }, make("h2", {}, title + " ", make("a", { class: "onward", href: wires.walk(nameOf(unit)), text: "Walk the circuit" })),
        make("p", { class: "note", text: wires.method(side, before, source) }),
        make("div", { class: "nears" }, side.units.map(near))));
    }
    return found;
  }

  function quality(unit) {
    const shown = [];
    for (const rendered of unit.facts.rendered) {
      const all = unit.record.pictures[rendered.key] || [];
      all.forEach((p, i) => { if (p.status !== "missing") shown.push([rendered.title + (all.length > 1 ? ", " + (i + 1) : ""), p]); });
    }
    // Activation ratios are shown among the numbers already; the table is shown only if there are other measures.
    const there = ATLAS.index.quality.filter((key) => shown.some(([, p]) => typeof p[key] === "number"));
    if (!there.some((key) => !key.endsWith("_ratio") && key !== "robust_share")) return null;
    const rows = there.map((key) => make("tr", { "data-measure": key }, make("th", { scope: "row", text: metric(key).title }),
      shown.map(([, p]) => make("td", {}, typeof p[key] === "number" ? data(p[key], metric(key).percent ? share : number) : "—"))));
    const meanings = there.flatMap((key) => [make("dt", { text: metric(key).title }), make("dd", { "data-meaning": key, text: metric(key).explanation })]);
    return make("section", { class: "quality" }, make("h2", { text: shown.length > 1 ? "Quality of the feature visualizations" : "Quality of the feature visualization" }),
      make("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "Quality measures" }, make("table", {},
        make("thead", {}, make("tr", {}, make("th", { scope: "col", text: "measure" }), shown.map(([title]) => make("th", { scope: "col", text: title })))), make("tbody", {}, rows))),
      make("details", { class: "meanings" }, make("summary", { text: "What each measure is" }), make("dl", { class: "table" }, meanings)),
      make("p", { class: "note" }, "Measured on the saved images; none of the measures was optimized. ", make("a", { href: root + "method.html#numbers", text: "Definitions" }), "."));
  }

  // How similar the visualization and the unit's dataset examples are in the layers up to the unit, with both baselines.
  function path(unit) {
    const shown = [];
    for (const rendered of unit.facts.rendered) {
      const all = unit.record.pictures[rendered.key] || [];
      all.forEach((p, i) => {
        if (p.status === "missing" || typeof p.transfer !== "number") return;
        const title = unit.facts.rendered.length > 1 || all.length > 1 ? rendered.title + (all.length > 1 ? ", " + (i + 1) : "") : "";
        const known = p.path && p.path.similarity.some((v) => v !== null);
        shown.push(make("figure", {}, title ? make("figcaption", { text: title }) : null,
          known ? pathChart(rendered.path, p.path) : make("p", { class: "note", text: "Not known: made by a version without path similarity." })));
      });
    }
    if (!shown.length) return null;
    return make("section", { class: "path" }, make("h2", { text: "Path through the network" }),
      make("p", { class: "note" }, "Similarity of the activations of all channels, in layers up to this one, between ", make("b", { class: "curve own", text: "the visualization and the unit’s top dataset examples" }), ", ", make("b", { class: "curve natural", text: "these examples with each other" }), " and ", make("b", { class: "curve random", text: "with random dataset images" }), ". If the first curve follows the second, the visualization reaches the unit as natural images do; if it follows the third, on another path. The unit’s own channel is left out. ", make("a", { href: root + "method.html#numbers", text: "Definition" }), "."),
      shown);
  }

  function pathChart(names, path) {
    const [width, height, left] = [640, 120, 44];
    const curves = [["random", path.random], ["natural", path.natural], ["own", path.similarity]];
    const values = curves.flatMap(([, curve]) => curve).filter((v) => v !== null);
    const [low, high] = [Math.min(0, ...values), Math.max(0.1, ...values)];
    const x = (i) => left + ((width - left - 8) * (i + 0.5)) / names.length;
    const y = (v) => 6 + ((height - 12) * (high - v)) / (high - low);
    const svg = make("svg", { viewBox: "0 0 " + width + " " + (height + 16), class: "histogram path-chart", role: "img",
      "aria-label": "Path similarity by layer: " + names.map((name, i) => name + " " + number(path.similarity[i]) + ", of dataset examples " + number(path.natural[i]) + ", of random images " + number(path.random[i])).join("; ") });
    svg.append(make("line", { class: "zero", x1: left, x2: width, y1: y(0), y2: y(0) }), make("text", { x: left - 6, y: y(0) + 4, "text-anchor": "end", text: "0" }), make("text", { x: left - 6, y: y(high) + 6, "text-anchor": "end", text: number(high) }));
    for (const [name, curve] of curves) {
      const points = curve.map((v, i) => (v === null ? null : [x(i), y(v)])).filter(Boolean);
      svg.append(make("polyline", { class: name, points: points.map((p) => p.join(",")).join(" ") }));
      curve.forEach((v, i) => { if (v !== null) svg.append(make("rect", { class: name, x: x(i) - 2.5, y: y(v) - 2.5, width: 5, height: 5 }, make("title", { text: names[i] + ": " + number(v) }))); });
    }
    names.forEach((name, i) => svg.append(make("text", { x: x(i), y: height + 13, "text-anchor": "middle", text: name.length > 640 / names.length / 7 ? "…" + name.slice(-Math.floor(640 / names.length / 7)) : name }, make("title", { text: name }))));
    return svg;
  }

  function provenance(unit) {
    const rows = [];
    for (const rendered of unit.facts.rendered) {
      (unit.record.pictures[rendered.key] || []).forEach((p, variant) => {
        const trace = (p.trace || []).filter((v) => v !== null);
        const low = Math.min(...trace);
        const line = trace.length > 1 ? make("svg", { class: "trace", viewBox: "0 0 80 20", "aria-hidden": "true" }, make("polyline", { points: trace.map((v, i) => (80 * i) / (trace.length - 1) + "," + (19 - (18 * (v - low)) / (Math.max(...trace) - low || 1))).join(" ") })) : "—";
        rows.push(make("tr", {}, make("th", { scope: "row", text: rendered.title + (variant ? ", " + (variant + 1) : "") }), make("td", { text: listing.statusOf(p.status) + (p.reason ? ": " + p.reason : "") }),
          make("td", {}, data(p.activation)), make("td", {}, data(p.robust)), make("td", {}, data(p.start)), make("td", {}, data(p.natural)), make("td", {}, data(p.steps, String)), make("td", {}, data(p.seconds)), make("td", {}, p.seed ? make("data", { value: p.seed, text: p.seed }) : "—"), make("td", {}, line),
          make("td", {}, make("code", { text: rendered.digest.slice(0, 12) || "—", title: rendered.digest }))));
      });
    }
    if (!rows.length) return null;
    const heads = ["visualization", "status", ...["activation", "robust", "start", "natural", "steps", "seconds", "seed"].map((name) => metric(name).title), "optimization", "digest"];
    return make("section", { class: "provenance" }, make("h2", { text: "Optimization" }),
      make("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "Optimization of each visualization" }, make("table", {}, make("thead", {}, make("tr", {}, heads.map((text) => make("th", { scope: "col", text })))), make("tbody", {}, rows))),
      make("p", { class: "note" }, "Activations are those of the saved 8-bit images", unit.facts.rendered[0] ? ", stored at " + unit.facts.rendered[0].stored.join(" × ") + " px" : "", ". The digest identifies all settings and inputs of a visualization; see the ", make("a", { href: root + "method.html", text: "method" }), "."));
  }

  // ----------------------------------------------------------------------- page

  // Images with a larger share of values near black or white say little; the wall of the home page leaves them out too (context/wall.py).
  const MAX_SATURATION = 0.5;

  function page(unit, families, part) {
    const name = nameOf(unit);
    const word = ATLAS.wordOf(unit.record);
    const tags = (families[name] || []).map((i) => make("a", { class: "tag", href: root + ATLAS.index.families[i][1], text: ATLAS.index.families[i][0] }));
    const failed = unit.facts.rendered.filter((rendered) => (unit.record.pictures[rendered.key] || []).some((p) => p.status === "failed"));
    const saturated = unit.facts.rendered.filter((rendered) => (unit.record.pictures[rendered.key] || []).some((p) => p.status !== "failed" && p.saturation > MAX_SATURATION));
    const { before, after, address, words } = unit.around;
    const step = (row, text) => row >= 0 ? make("a", { href: ATLAS.linkTo(unit.layer.name, ATLAS.channelAt(unit.layer, row)) + (address && "&" + address), text: text(ATLAS.channelAt(unit.layer, row)) }) : make("span", { text: "" });
    let photographs = null;
    let drawn = null;
    const redraw = () => { photographs.redraw(); if (drawn) drawn.redraw(); };
    unit.items = [];
    const visualizations = unit.facts.rendered.length ? pictures(unit) : null;
    unit.items.push(...exampleItems(unit));
    photographs = examples(unit, part, redraw);
    drawn = spectrum(unit);
    const actions = make("div", { class: "actions" },
      make("button", { type: "button", text: "Copy link", onclick: () => ATLAS.copyText(window.location.href.split("#")[0] + "#" + fragmentOf(unit), "link") }),
      make("button", { type: "button", text: "Copy citation", onclick: () => ATLAS.copyText(citation(unit), "citation") }),
      make("button", { type: "button", text: "Copy embed code", title: "HTML that shows this unit in a frame of another page", onclick: () => ATLAS.copyText(embedCode(unit), "HTML") }),
      make("button", { type: "button", text: "Download", title: "All numbers of this unit as JSON", onclick: () => download(unit) }),
      pinButton(unit),
      make("button", { type: "button", text: "Random", title: "r", onclick: ATLAS.random }));
    return make("article", { class: "unit", "data-unit-shown": name },
      make("section", { class: "opening" },
        make("nav", { class: "neighbours", "aria-label": "Units" }, step(before, (channel) => "← " + channel), make("a", { href: root + "layers/" + unit.layer.slug + ".html" + (address && "#" + address), text: unit.layer.name }), step(after, (channel) => channel + " →")),
        words ? make("p", { class: "note listed" }, words, ". ", make("a", { href: "#" + fragmentOf(unit), text: "All units in the order of channels" })) : null,
        make("h1", { class: "layer" }, make("span", { text: unit.layer.name + ":" }), String(unit.channel)),
        make("p", { class: "subtitle" }, !word ? "" : unit.record.class ? make("a", { class: "class", href: root + "class.html#" + encodeURIComponent(word), text: word }) : make("span", { class: "class", text: word }), " ", tags,
          saturated.length ? make("strong", { class: "flag", title: "More than half of the values are near black or white", text: (unit.facts.rendered.length > 1 ? saturated.map((rendered) => rendered.title).join(", ") + " " : "") + "saturated" }) : "", failed.map((rendered) => make("strong", { class: "flag", text: (unit.facts.rendered.length > 1 ? rendered.title + " " : "") + "failed" })), (unit.record.stats || {}).inactive ? make("span", { class: "flag quiet", text: "never above zero" }) : ""),
        actions),
      kernel(unit),
      make("div", { class: "evidence" }, visualizations, make("div", { class: "beside" }, photographs)),
      make("div", { class: "two" }, drawn, make("div", {}, numbers(unit), names(unit), labels(unit))),
      facets(unit), quality(unit), path(unit), effects(unit), relevant(unit), relations(unit), provenance(unit));
  }

  // --------------------------------------------------------------------- actions

  function citation(unit) {
    const r = unit.facts.rendered[0];
    return ATLAS.index.title + ", unit " + nameOf(unit) + " of " + ATLAS.index.model + (r && r.digest ? ", preset " + (r.preset || r.title) + " " + r.digest.slice(0, 12) : "") +
      (ATLAS.index.identity ? ", atlas " + ATLAS.index.identity : "") + ". " + window.location.href;
  }
  function embedCode(unit) {
    const quoted = (text) => text.replace(/[&"<>]/g, (c) => "&#" + c.charCodeAt(0) + ";");
    const base = ATLAS.index.url ? ATLAS.index.url.replace(/\/*$/, "/") : new URL(root || "./", window.location.href).href;
    return '<iframe src="' + quoted(base + "embed.html#" + fragmentOf(unit)) + '" title="' + quoted(nameOf(unit) + " of " + ATLAS.index.model) + '" width="640" height="420" loading="lazy" style="border: 0; max-width: 100%"></iframe>';
  }
  function download(unit) {
    const photographs = Object.fromEntries(Object.entries(unit.shard.photos).map(([i, p]) => [i, { path: p[0], label: p[1] }]));
    const record = { unit: nameOf(unit), model: ATLAS.index.model, rendered: unit.facts.rendered, ...unit.record, photographs };
    pixels.save(new Blob([JSON.stringify(record, null, 1)], { type: "application/json" }), nameOf(unit), "json");
  }
  function pinButton(unit) {
    const name = nameOf(unit);
    const button = make("button", { type: "button", title: "Compare up to " + ATLAS.PINS + " pinned units side by side (c)", onclick: () => ATLAS.pin(name) });
    const draw = () => { const there = ATLAS.pinned().includes(name); button.textContent = there ? "Pinned" : "Pin"; button.setAttribute("aria-pressed", String(there)); };
    pinButtons.push(draw);
    draw();
    return button;
  }

  const go = (layer, channel) => { window.location.hash = fragmentOf({ layer, channel }) + (now.around.address && "&" + now.around.address); };
  const step = (by) => () => {
    const row = now ? (by < 0 ? now.around.before : now.around.after) : -1;
    if (row >= 0) go(now.layer, ATLAS.channelAt(now.layer, row));
  };
  const across = (by) => () => {
    const to = now && ATLAS.layerAt(now.layer.order + by);
    if (to && ATLAS.count(to)) go(to, ATLAS.channelAt(to, Math.min(now.row, ATLAS.count(to) - 1)));
  };
  keys.ArrowLeft = step(-1);
  keys.ArrowRight = step(1);
  keys.ArrowUp = across(-1);
  keys.ArrowDown = across(1);
  keys["["] = across(-1);
  keys["]"] = across(1);
  keys.c = () => { if (now) ATLAS.pin(nameOf(now)); };

  window.addEventListener("pinned", () => pinButtons.forEach((draw) => draw()));
  let listening = false;
  ATLAS.indexed.then(() => {
    show();
    if (!listening) window.addEventListener("hashchange", () => { window.scrollTo(0, 0); show(); });
    listening = true;
  });
})();
