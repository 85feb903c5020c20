// Pinned units side by side, pinned.html#layer:channel,layer:channel. Without units in the address: those that the reader pinned.
(function () {
  "use strict";

  const { make, find, number, data, say, sprite, pixels } = ATLAS;
  const { parse, decoded, fragmentOf, nameOf, load, cellOf, viewOf, LISTS, exampleView } = ATLAS.units;
  const root = ATLAS.root;
  const place = find("#pinned");
  const EXAMPLES = { max: 4, min: 2 };
  let latest = 0;

  // ------------------------------------------------------------------- address

  const asked = () => window.location.hash.slice(1).split(",").filter(Boolean).map(decoded);
  const addressOf = (names) => "#" + names.map((name) => { const unit = parse(name); return unit ? fragmentOf(unit) : encodeURIComponent(name); }).join(",");
  function remove(name) {
    if (ATLAS.pinned().includes(name)) ATLAS.pin(name);
    window.location.hash = addressOf(asked().filter((other) => other !== name)).slice(1) || "none";
  }

  // ---------------------------------------------------------------------- rows

  function visualization(unit, key) {
    const i = unit.facts.rendered.findIndex((rendered) => rendered.key === key);
    const rendered = unit.facts.rendered[i];
    const p = rendered && (unit.record.pictures[key] || [])[0];
    if (!p || p.status === "missing") return "—";
    const box = make("span", { class: "pic", role: "img", "aria-label": "Feature visualization of " + nameOf(unit) + ", " + rendered.title });
    box.style.aspectRatio = rendered.sheet[3] + " / " + rendered.sheet[4];
    sprite(box, ...cellOf("p", unit, rendered, i, 0));
    return [box, p.status === "failed" ? make("strong", { class: "bad", text: "failed" }) : ""];
  }

  function examples(unit, list) {
    const [, , measured] = LISTS.find(([name]) => name === list);
    const found = ((unit.record.examples || {})[list] || []).slice(0, EXAMPLES[list]).map((entry) => {
      const view = entry && exampleView(unit, entry, "crop", list);
      if (!view) return null;
      const [path, label] = unit.shard.photos[entry[1]] || ["", ""];
      const inner = pixels.element(view);
      inner.style[view.aspect >= 1 ? "width" : "height"] = "100%";
      return make("span", { class: "frame", role: "img", "aria-label": "Dataset image " + (label || path) + ", " + measured + " " + number(entry[0]), title: (label || path) + ": " + number(entry[0]) }, inner);
    });
    return found.some(Boolean) ? make("div", { class: "few" }, found) : "—";
  }

  // A histogram of the maximum activation for each dataset image, on an axis that all units share.
  function distribution(unit, [low, high]) {
    const h = unit.record.histogram;
    if (!h) return "—";
    const [width, height] = [220, 60];
    const x = (value) => (width * (value - low)) / (high - low || 1);
    const most = Math.max(1, ...h.counts);
    const svg = make("svg", { viewBox: "0 0 " + width + " " + (height + 14), class: "histogram", role: "img",
      "aria-label": "Maximum activation for each dataset image, from " + number(h.ends[0]) + " to " + number(h.ends[1]) + "; axis from " + number(low) + " to " + number(high) });
    h.counts.forEach((count, i) => {
      const tall = Math.sqrt(count / most) * height;
      if (count) svg.append(make("rect", { class: "bar-of", x: x(h.from + h.step * i), y: height - tall, width: Math.max(1, x(h.from + h.step) - x(h.from)), height: tall }));
    });
    if (low < 0 && high > 0) svg.append(make("line", { class: "zero", x1: x(0), x2: x(0), y1: 0, y2: height }));
    svg.append(make("text", { x: 0, y: height + 12, text: number(low) }), make("text", { x: width, y: height + 12, "text-anchor": "end", text: number(high) }));
    return svg;
  }
  function axisOf(units) {
    const ends = units.map((unit) => unit.record.histogram).filter(Boolean).flatMap((h) => [h.ends[0] ?? h.from, h.ends[1] ?? h.from + h.step * h.counts.length]);
    return [Math.min(...ends), Math.max(...ends)];
  }

  // Measurements of the first visualization and statistics of the dataset as [title, value of each unit].
  function measured(units) {
    const first = (unit) => { const main = unit.facts.rendered[0]; return (main && unit.record.pictures[main.key][0]) || {}; };
    const rows = Object.entries(ATLAS.index.metrics).map(([name, metric]) => [metric.title, units.map((unit) => first(unit)[name])]);
    const statistics = { max: "maximum activation", min: "minimum activation", best_mean: "highest mean", sparsity: "sparsity" };
    rows.push(...Object.entries(statistics).map(([name, title]) => [title + " over the dataset", units.map((unit) => (unit.record.stats || {})[name])]));
    return rows.filter(([, values]) => values.some((value) => typeof value === "number"));
  }

  // ---------------------------------------------------------------------- page

  function head(unit) {
    const name = nameOf(unit);
    const word = ATLAS.wordOf(unit.record);
    return make("th", { scope: "col" }, make("a", { href: ATLAS.linkTo(unit.layer.name, unit.channel), text: name }), word ? make("span", { class: "class", text: word }) : "",
      make("button", { type: "button", text: "Remove", "aria-label": "Remove " + name, onclick: () => remove(name) }));
  }

  function table(units) {
    const row = (title, cells) => make("tr", {}, make("th", { scope: "row", text: title }), cells.map((content) => make("td", {}, content)));
    const keys = new Map(units.flatMap((unit) => unit.facts.rendered.map((rendered) => [rendered.key, rendered.title])));
    const rows = Array.from(keys, ([key, title]) => row(title, units.map((unit) => visualization(unit, key))));
    for (const [list, title] of LISTS.filter(([name]) => name in EXAMPLES)) {
      if (units.some((unit) => ((unit.record.examples || {})[list] || []).length)) rows.push(row(title, units.map((unit) => examples(unit, list))));
    }
    if (units.some((unit) => unit.record.histogram)) { const axis = axisOf(units); rows.push(row("Maximum activation per dataset image", units.map((unit) => distribution(unit, axis)))); }
    rows.push(...measured(units).map(([title, values]) => row(title, values.map((value) => (typeof value === "number" ? data(value) : "—")))));
    return make("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "Pinned units" }, make("table", { class: "pinned" },
      make("thead", {}, make("tr", {}, make("td", {}), units.map(head))), make("tbody", {}, rows)));
  }

  const quoted = (text) => (/[",\n]/.test(text) ? '"' + text.replace(/"/g, '""') + '"' : text);
  function saveTable(units) {
    const rows = [["", ...units.map(nameOf)], ...measured(units).map(([title, values]) => [title, ...values.map((value) => (typeof value === "number" ? String(value) : ""))])];
    pixels.save(new Blob([rows.map((row) => row.map(quoted).join(",")).join("\r\n") + "\r\n"], { type: "text/csv" }), "pinned-units", "csv");
  }
  // The first visualizations side by side, with the names of the units below.
  async function sheet(units) {
    const side = 256;
    const shown = units.filter((unit) => unit.facts.rendered.length);
    if (!shown.length) throw new Error("None of the units has a feature visualization.");
    const canvas = make("canvas", { width: side * shown.length, height: side + 28 });
    const context = canvas.getContext("2d");
    Object.assign(context, { fillStyle: "#fff", textAlign: "center", font: "14px sans-serif" });
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.fillStyle = "#000";
    for (const [i, unit] of shown.entries()) {
      const drawn = await pixels.canvasOf(viewOf(unit, unit.facts.rendered[0], 0, 0, false));
      const scale = Math.min(side / drawn.width, side / drawn.height);
      const [width, height] = [drawn.width * scale, drawn.height * scale];
      context.drawImage(drawn, i * side + (side - width) / 2, (side - height) / 2, width, height);
      context.fillText(nameOf(unit), (i + 0.5) * side, side + 19, side - 8);
    }
    return canvas;
  }

  async function show() {
    const turn = ++latest;
    if (!window.location.hash && ATLAS.pinned().length) window.history.replaceState(null, "", addressOf(ATLAS.pinned()));
    const names = asked().filter((name) => name !== "none");
    const parsed = names.map(parse);
    const absent = names.filter((_, i) => !parsed[i] || parsed[i].row < 0);
    const units = await Promise.all(parsed.filter((unit) => unit && unit.row >= 0).slice(0, ATLAS.PINS).map(load));
    if (turn !== latest) return;
    const [first, second] = units;
    place.replaceChildren(...[
      absent.length ? make("p", { class: "note", text: "Not in this atlas: " + absent.join(", ") + "." }) : null,
      units.length ? make("div", { class: "actions" },
        make("button", { type: "button", text: "Copy link", onclick: () => ATLAS.copyText(window.location.href.split("#")[0] + addressOf(units.map(nameOf)), "link") }),
        make("button", { type: "button", text: "Save numbers (CSV)", onclick: () => saveTable(units) }),
        make("button", { type: "button", text: "Save images (PNG)", onclick: () => pixels.savePng(sheet(units), "pinned-units") }),
        second ? make("a", { href: ATLAS.linkTo(first.layer.name, first.channel) + "&with=" + fragmentOf(second), text: "The pages of the first two side by side" }) : null) : null,
      units.length ? table(units) : make("p", { class: "note", text: "No unit is pinned. Pin up to " + ATLAS.PINS + " units with the button on their pages or with the key c." }),
    ].filter(Boolean));
    document.body.dataset.ready = "pinned " + units.length;
  }

  ATLAS.indexed.then(() => {
    const safely = () => show().catch((error) => say(error.message));
    safely();
    window.addEventListener("hashchange", safely);
  });
})();
