// Functions of all pages: data shards, search, keyboard shortcuts, small images. The pages are readable without scripts.
// Data are scripts that call ATLAS.put, because pages opened from disk cannot load other files.
window.ATLAS = (function () {
  "use strict";

  const html = document.documentElement;
  const root = html.dataset.root || "";
  const find = (selector, inside) => (inside || document).querySelector(selector);
  const all = (selector, inside) => Array.from((inside || document).querySelectorAll(selector));

  // Browsers may forbid local storage, mostly for pages opened from disk; the site then works without it.
  function remembered(key) {
    try { return window.localStorage.getItem("neuron-atlas." + key); } catch { return null; }
  }
  function remember(key, value) {
    try { window.localStorage.setItem("neuron-atlas." + key, value); } catch { /* as above */ }
  }

  // ------------------------------------------------------------------- shards

  const held = new Map();
  const asked = new Map();
  const waiting = new Map();

  function put(name, value) {
    held.set(name, value);
    (waiting.get(name) || []).forEach((tell) => tell(value));
    waiting.delete(name);
  }

  // Load a shard by name, once; `version` in the address invalidates browser caches.
  function need(name, version) {
    if (held.has(name)) return Promise.resolve(held.get(name));
    if (asked.has(name)) return asked.get(name);
    const promise = new Promise((done, fail) => {
      waiting.set(name, [done]);
      const script = document.createElement("script");
      script.src = root + "data/" + name + ".js" + (version ? "?v=" + version : "");
      script.onerror = () => { asked.delete(name); fail(new Error("There is no data for " + name)); };
      document.head.append(script);
    });
    asked.set(name, promise);
    return promise;
  }
  const ready = (name) => held.has(name) ? Promise.resolve(held.get(name)) : new Promise((done) => {
    waiting.set(name, (waiting.get(name) || []).concat(done));
  });

  // ------------------------------------------------------------------ elements

  // make("a", {class, href, "aria-label", text, on…: function}, children…)
  function make(tag, attributes, ...children) {
    const svg = /^(svg|g|rect|line|path|text|title|polyline)$/.test(tag);
    const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
    for (const [key, value] of Object.entries(attributes || {})) {
      if (value === null || value === undefined || value === false) continue;
      if (key === "text") element.textContent = value;
      else if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
      else element.setAttribute(key, value === true ? "" : value);
    }
    element.append(...children.flat().filter((c) => c !== null && c !== undefined && c !== ""));
    return element;
  }

  // ------------------------------------------------------------------- numbers

  const RAISED = { "-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹" };
  function number(value) {
    if (value === null || value === undefined || !Number.isFinite(value)) return "—";
    const size = Math.abs(value);
    let text;
    if (size === 0) return "0";
    if (size >= 1e7 || size < 0.001) {
      const [mantissa, exponent] = size.toExponential(1).split("e");
      text = mantissa + " × 10" + String(Number(exponent)).replace(/[-0-9]/g, (c) => RAISED[c]);
    } else if (size >= 100) text = Math.round(size).toString().replace(/\B(?=(\d{3})+$)/g, ",");
    else text = size.toFixed(size >= 10 ? 1 : size >= 1 ? 2 : 3);
    return value < 0 ? "−" + text : text;
  }
  function share(value) {
    if (value === null || value === undefined || !Number.isFinite(value)) return "—";
    if (value > 0 && value < 0.0005) return "< 0.1%";
    return (value < 1 ? Math.min(100 * value, 99.9) : 100 * value).toFixed(1).replace(/\.0$/, "") + "%";
  }
  // A <data> element with a short text and the exact stored number as its value.
  function data(value, form) {
    if (value === null || value === undefined) return document.createTextNode("—");
    return make("data", { value: String(value), text: (form || number)(value), title: String(value) });
  }

  // --------------------------------------------------------------------- units

  let index = { layers: [], families: [], aliases: {}, sizes: {}, suffix: "webp", photo_suffix: "jpg" };
  const bySlug = new Map();
  const byName = new Map();
  const indexed = ready("index").then((found) => {
    index = found;
    index.layers.forEach((layer, order) => {
      const [name, slug, kind, runs, version, total] = layer;
      const entry = { order, name, slug, kind, runs, version, total };
      bySlug.set(slug, entry);
      byName.set(name, entry);
    });
    return found;
  });

  const layerAt = (order) => { const l = index.layers[order]; return l && byName.get(l[0]); };
  const count = (layer) => layer.runs.reduce((sum, [a, b]) => sum + b - a + 1, 0);
  // Row of a channel in its layer's arrays, −1 if the atlas does not have it; channelAt is the inverse.
  function rowOf(layer, channel) {
    let before = 0;
    for (const [first, last] of layer.runs) {
      if (channel >= first && channel <= last) return before + channel - first;
      before += last - first + 1;
    }
    return -1;
  }
  function channelAt(layer, row) {
    for (const [first, last] of layer.runs) {
      if (row <= last - first) return first + row;
      row -= last - first + 1;
    }
    return -1;
  }
  const encode = (name) => encodeURIComponent(name).replace(/%2F/g, "/").replace(/%3A/g, ":");
  const linkTo = (layer, channel) => root + "unit.html#" + encode(layer) + ":" + channel;

  // Layers that match a name: equal, equal ignoring case, by a former name, by the end after a dot, by the end, by any part.
  function layersNamed(name) {
    const wanted = name.toLowerCase();
    const alias = Object.hasOwn(index.aliases, name) ? index.aliases[name].toLowerCase() : null;
    const tests = [
      (n) => n === name, (n) => n.toLowerCase() === wanted, (n) => n.toLowerCase() === alias,
      (n) => n.toLowerCase().endsWith("." + wanted), (n) => n.toLowerCase().endsWith(wanted),
      (n) => n.toLowerCase().includes(wanted),
    ];
    for (const test of tests) {
      const found = index.layers.filter((layer) => test(layer[0]));
      if (found.length) return found.map((layer) => byName.get(layer[0]));
    }
    return [];
  }

  // Class of a unit, or its first name that is earned; "" if there is none.
  const wordOf = (record) => record.class || ((record.names || []).find((n) => n.earned) || {}).name || "";

  // ------------------------------------------------------------------- sprites

  // Show one cell of a sheet as the background of `element`. Set by script, because the policy of the pages forbids inline styles.
  function sprite(element, url, columns, rows, at, box) {
    const [left, top, width, height] = box || [0, 0, 1, 1];
    const x = (at % columns) + left;
    const y = Math.floor(at / columns) + top;
    const style = element.style;
    style.backgroundImage = 'url("' + url + '")';
    style.backgroundSize = (100 * columns) / width + "% " + (100 * rows) / height + "%";
    const place = (from, part, whole) => (Math.abs(whole - part) < 1e-9 ? 0 : (100 * from) / (whole - part)) + "%";
    style.backgroundPosition = place(x, width, columns) + " " + place(y, height, rows);
  }
  function media(layer, name, suffix) {
    return root + "media/" + layer.slug + "/" + name + "." + (suffix || index.suffix) + "?v=" + layer.version;
  }
  // Show cell `at` of `total` cells, stored in sheets of `per` cells each.
  function cell(element, layer, prefix, per, columns, at, total) {
    const start = at - (at % per);
    const rows = Math.ceil(Math.min(per, total - start) / columns);
    sprite(element, media(layer, prefix + start), columns, rows, at - start);
  }
  // The small image of a unit; `row` is its row in the layer, for `sharpen`.
  function tiny(element, layer, rank, row) {
    const [per, columns, px] = index.sizes.tiny;
    cell(element, layer, "b", per, columns, rank, count(layer));
    sharpen(element, layer, row, px);
    return element;
  }
  // On a screen of high density, show the unit's cell of the sheets of feature visualizations in place of a smaller image of `px` pixels,
  // as soon as that sheet is loaded. Other screens never load it.
  function sharpen(element, layer, row, px) {
    if (!(row >= 0) || window.devicePixelRatio < 1.5) return;
    need(layer.slug + "/layer", layer.version).then((found) => {
      const [first] = found.rendered || [];
      if (!first || found.absent.includes(row) || element.clientWidth * window.devicePixelRatio <= px) return;
      const [per, variants, columns, width, height] = first.sheet;
      const short = Math.min(width, height);
      if (short <= px) return;
      const start = row - (row % per);
      const rows = Math.ceil((Math.min(per, count(layer) - start) * variants) / columns);
      const url = media(layer, "p0-" + start);
      const image = new Image();
      image.onload = () => {
        element.dataset.sharp = "";
        sprite(element, url, columns, rows, (row - start) * variants, [(1 - short / width) / 2, (1 - short / height) / 2, short / width, short / height]);
      };
      image.src = url;
    });
  }

  // Call `then` once for each element, when it comes near the visible area or the page is printed.
  const unseen = new WeakMap();
  function lazily(elements, then, margin) {
    if (!("IntersectionObserver" in window)) { elements.forEach(then); return null; }
    const see = (element) => { watcher.unobserve(element); delete element.dataset.unseen; then(element); };
    const watcher = new IntersectionObserver((entries) => {
      for (const entry of entries) if (entry.isIntersecting) see(entry.target);
    }, { rootMargin: margin || "400px" });
    for (const element of elements) {
      element.dataset.unseen = "";
      unseen.set(element, see);
      watcher.observe(element);
    }
    return watcher;
  }

  window.addEventListener("beforeprint", () => { for (const element of all("[data-unseen]")) unseen.get(element)(element); });

  // Show the small image of the unit that an element names: <a data-unit="layer:channel">.
  function fill(inside) {
    lazily(all("[data-unit]", inside), (element) => {
      const name = element.dataset.unit;
      const layer = byName.get(name.slice(0, name.lastIndexOf(":")));
      const channel = Number(name.slice(name.lastIndexOf(":") + 1));
      if (!layer || rowOf(layer, channel) < 0) return;
      need(layer.slug + "/layer", layer.version).then((found) => tiny(element, layer, found.tiny[rowOf(layer, channel)], rowOf(layer, channel)));
    });
  }

  // -------------------------------------------------------------------- search

  const here = () => html.dataset.layer;
  // A comparison site has no map.
  const mapped = all(".places a").some((a) => a.href.endsWith("map.html"));

  // Units whose label contains `word`, in the layers `only` if given: at most `most` as [layer, row, label], the total,
  // and the number of layers that they are in.
  function labelled(word, words, only, most) {
    const wanted = word.toLowerCase();
    const match = new Map();
    words.words.forEach((w, i) => { if (w.toLowerCase().includes(wanted)) match.set(i, w.toLowerCase() === wanted); });
    const exact = [];
    const others = [];
    let total = 0;
    const layers = new Set();
    const seen = new Set();
    const found = (order, row, word) => {
      const layer = layerAt(order);
      const unit = order + ":" + row;
      if (!match.has(word) || (only && !only.includes(layer)) || seen.has(unit)) return;
      seen.add(unit);
      total++;
      layers.add(order);
      const list = match.get(word) ? exact : others;
      if (list.length < most) list.push([layer, row, words.words[word]]);
    };
    if (match.size) {
      words.units.forEach((labels, order) => {
        for (let row = 0; row < labels.length; row++) found(order, row, labels[row]);
      });
      // Names beside the one in the title.
      const more = words.more || [];
      for (let i = 0; i < more.length; i += 3) found(more[i], more[i + 1], more[i + 2]);
    }
    return { units: exact.concat(others).slice(0, most), total, layers: layers.size };
  }

  // Units whose dataset examples are nearest to a word of the list that was computed beforehand: [layer, row, word, cosine × 1000].
  function nearTo(word, concepts, only) {
    if (!concepts) return [];
    const at = concepts.words.findIndex((w) => w.toLowerCase() === word.toLowerCase());
    const found = [];
    for (let i = 0; at >= 0 && i < concepts.units[at].length; i += 3) {
      const [order, row, cosine] = concepts.units[at].slice(i, i + 3);
      const layer = layerAt(order);
      if (!only || only.includes(layer)) found.push([layer, row, concepts.words[at], cosine]);
    }
    return found;
  }

  // Results of a query: {results: [{text, detail, href, layer, row}], total, units, layers, says}, with the number of units that a
  // label was found for and of their layers; `says` explains an empty result.
  function search(query, words, most) {
    const text = query.trim();
    const results = [];
    if (!text) return { results, total: 0, says: "" };
    const unit = /^(.*?)\s*:\s*(\d+)$/.exec(text);
    const bare = /^\d+$/.test(text) && here() !== undefined;
    if (unit || bare) {
      const channel = Number(unit ? unit[2] : text);
      const layers = bare ? [byName.get(here())] : layersNamed(unit[1]);
      for (const layer of layers.filter(Boolean)) {
        const row = rowOf(layer, channel);
        if (row >= 0) results.push({ text: layer.name + ":" + channel, href: linkTo(layer.name, channel), layer, row });
      }
      const says = results.length ? "" : !layers.length ? "No layer is called “" + (unit ? unit[1] : text) + "”."
        : layers.length === 1 ? layers[0].name + " has no channel " + channel + " in this atlas." : "No layer has that channel.";
      return { results: results.slice(0, most), total: results.length, says };
    }
    const within = /^(.*?)\s*:\s*(.+)$/.exec(text);
    const only = within ? layersNamed(within[1]) : null;
    if (!within) {
      for (const [name, href, size] of index.families) {
        if (name.toLowerCase().includes(text.toLowerCase())) results.push({ text: name, detail: "family, " + size, href: root + href });
      }
      for (const name of (words.classes || []).filter((n) => n.toLowerCase().includes(text.toLowerCase())).slice(0, 8)) {
        results.push({ text: name, detail: "class", href: root + "class.html#" + encodeURIComponent(name) });
      }
      const layers = layersNamed(text);
      for (const layer of layers.slice(0, 8)) {
        results.push({ text: layer.name, detail: layer.kind + ", " + count(layer), href: root + "layers/" + layer.slug + ".html" });
      }
    }
    const found = labelled(within ? within[2] : text, words, only && only.length ? only : null, most);
    for (const [layer, row, label] of found.units) {
      const channel = channelAt(layer, row);
      results.push({ text: layer.name + ":" + channel, detail: label, href: linkTo(layer.name, channel), layer, row });
    }
    const named = new Set(results.map((r) => r.text));
    for (const [layer, row, word, cosine] of nearTo(within ? within[2] : text, words.concepts, only && only.length ? only : null)) {
      const unit = layer.name + ":" + channelAt(layer, row);
      if (!named.has(unit)) results.push({ text: unit, detail: "near “" + word + "”, " + number(cosine / 1000), href: linkTo(layer.name, channelAt(layer, row)), layer, row });
    }
    const says = results.length ? "" : "Nothing is called “" + text + "”.";
    return { results: results.slice(0, most), total: results.length - found.units.length + found.total, units: found.total, layers: found.layers, says };
  }

  // What `search` needs: the names of units and classes, and the words of a CLIP model.
  async function words() {
    const known = await need("search", index.layers.length ? index.words || index.identity : "");
    if (index.concepts && !known.concepts) known.concepts = await need("concepts", index.concepts).catch(() => null);
    return known;
  }

  function searchBox() {
    const form = find(".search");
    const box = find("#search");
    const list = find("#results");
    const choices = find("#options");
    if (!form) return;
    form.hidden = false;
    let active = -1;
    let latest = 0;
    const options = () => all("[role=option]", list);
    const close = () => { list.hidden = true; box.setAttribute("aria-expanded", "false"); box.removeAttribute("aria-activedescendant"); active = -1; };
    const mark = (to) => {
      const found = options();
      if (!found.length) return;
      active = (to + found.length) % found.length;
      found.forEach((o, i) => o.setAttribute("aria-selected", i === active ? "true" : "false"));
      box.setAttribute("aria-activedescendant", found[active].id);
      found[active].scrollIntoView({ block: "nearest" });
    };
    const show = async () => {
      const turn = ++latest;
      const known = await words();
      if (turn !== latest) return null;
      const answer = search(box.value, known, 40);
      list.replaceChildren(choices);
      choices.replaceChildren();
      let group = null; // units of one layer that were found by their label
      answer.results.forEach((r, i) => {
        const picture = make("span", { class: "pic" });
        const option = make("a", { role: "option", id: "result-" + i, href: r.href, tabindex: "-1", "aria-selected": "false" },
          r.layer ? picture : null, make("b", { text: r.text }), r.detail ? make("span", { class: "detail", text: r.detail }) : null);
        if (r.layer) option.dataset.unit = r.text;
        if (!r.layer || !r.detail) group = null;
        else if (!group || group.layer !== r.layer) {
          group = { layer: r.layer, element: make("div", { role: "group", "aria-label": r.layer.name }, make("p", { class: "group", "aria-hidden": "true", text: r.layer.name })) };
          choices.append(group.element);
        }
        (group ? group.element : choices).append(option);
      });
      // The image belongs to the element inside the option; the option keeps its plain background.
      lazily(options().filter((o) => o.dataset.unit), (option) => {
        const r = answer.results[Number(option.id.slice(7))];
        need(r.layer.slug + "/layer", r.layer.version).then((l) => tiny(find(".pic", option), r.layer, l.tiny[r.row], r.row));
      });
      const counted = answer.units ? answer.units + (answer.units === 1 ? " unit" : " units") + " in " + answer.layers + (answer.layers === 1 ? " layer" : " layers") : "";
      const cut = answer.total > answer.results.length ? answer.results.length + " of " + answer.total + " shown" : "";
      const told = answer.says || [counted, cut].filter(Boolean).join("; ");
      if (told) list.append(make("p", { class: "detail", text: told }));
      if (mapped && answer.results.some((r) => r.layer)) {
        list.append(make("a", { class: "detail", href: root + "map.html#q=" + encodeURIComponent(box.value.trim()), text: "Highlight them on the map", tabindex: "-1" }));
      }
      list.hidden = !box.value.trim();
      box.setAttribute("aria-expanded", String(!list.hidden));
      active = -1;
      return answer;
    };
    box.addEventListener("focus", () => { words(); if (box.value.trim()) show(); });
    box.addEventListener("input", show);
    box.addEventListener("keydown", (event) => {
      if (event.key === "ArrowDown") mark(active + 1);
      else if (event.key === "ArrowUp") mark(active - 1);
      else if (event.key === "Escape") { close(); box.blur(); }
      else return;
      event.preventDefault();
    });
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      const chosen = options()[active];
      const answer = chosen ? null : await show();
      const to = chosen ? chosen.getAttribute("href") : answer && answer.results.length ? answer.results[0].href : null;
      if (to) { close(); box.blur(); window.location.assign(to); }
    });
    document.addEventListener("click", (event) => { if (!form.contains(event.target)) close(); });
    form.addEventListener("click", (event) => { if (event.target.closest("a")) close(); });
  }

  // --------------------------------------------------------------- keys and help

  let spoken = 0;
  function say(text) {
    // An open dialog hides the message of the page.
    const place = find("dialog[open] .says[role=status]") || find("#says");
    place.textContent = text;
    window.clearTimeout(spoken);
    spoken = window.setTimeout(() => { place.textContent = ""; }, 4000);
  }

  function copyText(text, what) {
    const told = () => say("Copied the " + what + ".");
    const by = () => {
      const area = make("textarea", { class: "off", text });
      (find("dialog[open]") || document.body).append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
      told();
    };
    if (navigator.clipboard && window.isSecureContext) navigator.clipboard.writeText(text).then(told, by);
    else by();
  }

  // Pages add their own shortcuts: keys[key] = function.
  const keys = {};
  function goLayer(by) {
    const link = find("a[rel=" + (by < 0 ? "prev" : "next") + "]");
    if (link) window.location.assign(link.href);
    else if (here() === undefined && by > 0 && index.layers.length) window.location.assign(root + "layers/" + index.layers[0][1] + ".html");
  }
  function random() {
    const total = index.layers.reduce((sum, l) => sum + count(byName.get(l[0])), 0);
    let at = Math.floor(Math.random() * total);
    for (const [name] of index.layers) {
      const layer = byName.get(name);
      if (at < count(layer)) { window.location.assign(linkTo(name, channelAt(layer, at))); return; }
      at -= count(layer);
    }
  }
  // Pinned units are compared on a page of their own. Without local storage they last until another page is opened.
  const PINS = 8;
  // Sites of one host have the same local storage.
  const pinKey = "pins " + new URL(root || "./", window.location.href).pathname;
  let unstored = [];
  function pinned() {
    try { return JSON.parse(window.localStorage.getItem("neuron-atlas." + pinKey)) || []; } catch { return unstored; }
  }
  // Pin a unit, or unpin it if it is pinned.
  function pin(name) {
    const before = pinned();
    const there = before.includes(name);
    if (!there && before.length >= PINS) { say(PINS + " units are pinned already. Remove one of them first."); return; }
    unstored = there ? before.filter((other) => other !== name) : [...before, name];
    remember(pinKey, JSON.stringify(unstored));
    showPins();
    say(name + (there ? " is no longer pinned." : " is pinned."));
    window.dispatchEvent(new Event("pinned"));
  }
  function showPins() {
    const link = find(".pins");
    if (!link) return;
    const count = pinned().length;
    link.hidden = !count;
    find(".count", link).textContent = String(count);
  }
  function pinFocused() {
    const now = here() !== undefined && document.activeElement && document.activeElement.dataset.name;
    if (now) pin(now); else say("Select a unit first, then press c to pin it.");
  }

  function start() {
    const help = find("#help");
    for (const button of all(".round")) button.hidden = false;
    find(".help-button").addEventListener("click", () => help.showModal());
    find(".theme").addEventListener("click", () => {
      const dark = html.style.colorScheme ? html.style.colorScheme === "dark" : window.matchMedia("(prefers-color-scheme: dark)").matches;
      html.style.colorScheme = dark ? "light" : "dark";
      remember("scheme", html.style.colorScheme);
    });
    const box = find("#search");
    document.addEventListener("keydown", (event) => {
      if (html.dataset.page === "embed") return;
      const typing = event.target.closest && event.target.closest("input:not([type=range]):not([type=radio]), select, textarea, dialog, pre");
      // On many keyboards [ and ] need AltGr, which Windows reports as Ctrl and Alt together.
      const graph = event.getModifierState("AltGraph");
      if (typing || event.metaKey || ((event.ctrlKey || event.altKey) && !graph)) return;
      const arrow = /^Arrow/.test(event.key);
      if (arrow && event.target.closest && event.target.closest("input, .scroll, [role=radiogroup], canvas")) return;
      if (keys[event.key]) { if (keys[event.key](event) === false) return; }
      else if (event.key === "[") goLayer(-1);
      else if (event.key === "]") goLayer(1);
      else if (event.key === "?") help.showModal();
      else if (event.key === "/" || event.key === "g") { box.focus(); box.select(); }
      else if (event.key === "m" && mapped) window.location.assign(root + "map.html");
      else if (event.key === "r") random();
      else if (event.key === "c") pinFocused();
      else return;
      event.preventDefault();
    });
    showPins();
    window.addEventListener("storage", showPins);
    indexed.then(() => {
      searchBox();
      fill();
      const classes = find(".to-classes"); // how many there are is known after the pages of layers are written
      if (classes) classes.hidden = !index.classes;
    });
  }
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
  else start();

  return {
    put, need, ready, indexed, make, find, all, number, share, data, remember, remembered, lazily, sprite, cell, tiny, sharpen, media, fill, search, words,
    rowOf, channelAt, count, wordOf, linkTo, layersNamed, layerAt, keys, say, copyText, random, root, html, pin, pinned, PINS,
    layer: (name) => byName.get(name), get index() { return index; },
  };
})();
