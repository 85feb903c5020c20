// Jump box, help, keys; on a layer's page size, order, filter. All pages read well without any of it.
(function () {
  "use strict";

  const html = document.documentElement;
  const root = html.dataset.root || "";
  const here = html.dataset.layer;
  const index = window.NEURON_ATLAS || { layers: [], classes: [] };
  const find = (selector, inside) => (inside || document).querySelector(selector);
  const all = (selector, inside) => Array.from((inside || document).querySelectorAll(selector));

  // Storage may be refused, from disk above all; the site does without it then.
  function remembered(key) {
    try { return window.localStorage.getItem("neuron-atlas." + key); } catch { return null; }
  }
  function remember(key, value) {
    try { window.localStorage.setItem("neuron-atlas." + key, value); } catch { /* as above */ }
  }

  // ---------------------------------------------------------------- jump box

  // Places in index.layers that a name stands for: the whole name, else the end after a dot, else any part.
  function layersNamed(name) {
    const wanted = name.toLowerCase();
    const tests = [
      (n) => n === name,
      (n) => n.toLowerCase() === wanted,
      (n) => n.toLowerCase().endsWith("." + wanted),
      (n) => n.toLowerCase().endsWith(wanted),
      (n) => n.toLowerCase().includes(wanted),
    ];
    for (const test of tests) {
      const found = index.layers.filter((layer) => test(layer[0]));
      if (found.length) return found;
    }
    return [];
  }

  function classesNamed(name) {
    const wanted = name.toLowerCase();
    const exact = index.classes.filter((c) => c[0].toLowerCase() === wanted);
    return exact.length ? exact : index.classes.filter((c) => c[0].toLowerCase().includes(wanted));
  }

  function few(names) {
    return names.slice(0, 4).join(", ") + (names.length > 4 ? ", …" : "");
  }

  // {href} to go to, or {says} why not.
  function resolve(text) {
    const query = text.trim();
    if (!query) return { says: "" };
    const parts = /^(.*?)\s*:\s*(\d+)$/.exec(query);
    const bare = here !== undefined && /^\d+$/.test(query);
    const name = bare ? here : parts ? parts[1] : query;
    const channel = bare ? Number(query) : parts ? Number(parts[2]) : null;
    const layers = name ? layersNamed(name) : [];
    if (layers.length > 1) return { says: layers.length + " layers match: " + few(layers.map((l) => l[0])) };
    if (!layers.length) {
      const classes = channel === null ? classesNamed(name) : [];
      if (classes.length === 1) return { href: index.layers[classes[0][1]][1] + "#" + classes[0][2] };
      if (classes.length) return { says: classes.length + " classes match: " + few(classes.map((c) => c[0])) };
      return { says: "No layer is called “" + name + "”." };
    }
    const [full, href, runs] = layers[0];
    if (channel === null) return { href };
    if (runs.some(([first, last]) => first <= channel && channel <= last)) return { href: href + "#" + channel };
    return { says: full + " has no channel " + channel + " in this atlas." };
  }

  const jump = find(".jump");
  const box = find("#jump");
  const says = find("#jump-says");
  jump.hidden = false;
  const list = find("#jump-list");
  for (const [name] of index.layers) {
    const option = document.createElement("option");
    option.value = name;
    list.append(option);
  }
  jump.addEventListener("submit", (event) => {
    event.preventDefault();
    const answer = resolve(box.value);
    says.textContent = answer.says || "";
    if (answer.href) {
      box.blur();
      window.location.assign(root + answer.href);
    }
  });
  box.addEventListener("input", () => { says.textContent = ""; });

  // -------------------------------------------------------------------- help

  const help = find("#help");
  const helpButton = find(".help-button");
  helpButton.hidden = false;
  helpButton.addEventListener("click", () => help.showModal());

  // --------------------------------------------------------------- layer page

  const grid = find(".grid");
  const units = find(".units");
  const articles = new Map(all("article", units || document.createElement("div")).map((a) => [a.id, a]));
  const hashed = () => articles.get(decodeURIComponent(window.location.hash.slice(1)));

  function go(id) {
    window.location.replace("#" + id);
    const article = articles.get(id);
    article.tabIndex = -1;
    article.focus({ preventScroll: true });
  }

  if (grid) {
    const controls = find(".controls");
    const size = find("#size");
    const sort = find("#sort");
    const filter = find("#filter");
    const count = find("#count");
    const tiles = all("li", grid);
    controls.hidden = false;
    controls.addEventListener("submit", (event) => event.preventDefault());

    const resize = () => {
      grid.style.setProperty("--tile", size.value + "px");
      grid.classList.toggle("bare", Number(size.value) < 72);
    };
    const last = remembered("size");
    if (last) size.value = last;
    resize();
    size.addEventListener("input", () => { resize(); remember("size", size.value); });

    sort.addEventListener("change", () => {
      const [key, direction] = sort.value.split("-");
      const sign = direction === "down" ? -1 : 1;
      // Units without the number come last whatever the direction; equal ones by channel.
      const rank = (tile) => tile.dataset[key] === undefined ? Infinity : sign * Number(tile.dataset[key]);
      const ranked = tiles.map((tile) => [rank(tile), Number(tile.dataset.channel), tile]);
      ranked.sort((a, b) => (a[0] === b[0] ? a[1] - b[1] : a[0] < b[0] ? -1 : 1));
      grid.append(...ranked.map((r) => r[2]));
      units.append(...ranked.map((r) => articles.get(r[2].dataset.channel)));
    });

    // A number is the beginning of a channel's; words are sought in the unit's class and its photographs' labels.
    let words = null;
    const apply = () => {
      const wanted = filter.value.trim().toLowerCase();
      words = words || new Map(tiles.map((tile) => {
        const article = articles.get(tile.dataset.channel);
        const parts = all(".class, figcaption span, .flag", article).map((e) => e.textContent);
        return [tile, parts.join("\n").toLowerCase()];
      }));
      let shown = 0;
      for (const tile of tiles) {
        const channel = tile.dataset.channel;
        const match = /^\d+$/.test(wanted) ? channel.startsWith(wanted) : words.get(tile).includes(wanted);
        tile.hidden = articles.get(channel).hidden = !match;
        shown += match;
      }
      count.textContent = wanted ? shown + " of " + tiles.length : "";
    };
    filter.addEventListener("input", apply);

    // A link to a unit must lead there, whatever was typed before.
    const reveal = () => {
      const article = hashed();
      if (article && article.hidden) {
        filter.value = "";
        apply();
        // Articles out of sight have a guessed height until they are drawn: scroll, let draw, scroll again.
        let times = 3;
        const land = () => {
          article.scrollIntoView();
          if (--times) window.requestAnimationFrame(land);
        };
        land();
      }
    };
    window.addEventListener("hashchange", reveal);
    // Browsers bring typed text back on reload, without telling.
    if (filter.value) apply();
    if (sort.value !== "channel") sort.dispatchEvent(new Event("change"));
    reveal();
  }

  function step(by) {
    const shown = all("article:not([hidden])", units);
    if (!shown.length) return;
    const at = shown.indexOf(hashed());
    const to = at < 0 ? 0 : Math.min(Math.max(at + by, 0), shown.length - 1);
    go(shown[to].id);
  }

  // -------------------------------------------------------------------- keys

  document.addEventListener("keydown", (event) => {
    const typing = event.target.closest("input, select, textarea, dialog, .scroll, pre");
    // On many keyboards [ and ] need AltGr, which Windows reports as Ctrl and Alt together.
    const graph = event.getModifierState("AltGraph");
    if (typing || event.metaKey || ((event.ctrlKey || event.altKey) && !graph)) return;
    const link = { "[": "prev", "]": "next" }[event.key];
    if (link) {
      const to = find(`link[rel=${link}]`);
      const first = here === undefined && link === "next" && index.layers.length;
      if (to) window.location.assign(to.href);
      else if (first) window.location.assign(root + index.layers[0][1]);
    } else if (event.key === "?") {
      help.showModal();
    } else if (event.key === "/") {
      box.focus();
      box.select();
    } else if (units && event.key === "ArrowLeft") {
      step(-1);
    } else if (units && event.key === "ArrowRight") {
      step(1);
    } else {
      return;
    }
    event.preventDefault();
  });
})();
