// The 404 page: finds the root of the site from the address of this script, and searches for the new address of a unit.
(function () {
  "use strict";
  if (window.NEURON_ATLAS_MISSING || !document.currentScript) return;
  window.NEURON_ATLAS_MISSING = true;
  const root = document.currentScript.src.replace(/static\/missing\.js.*$/, "");
  const add = (tag, attributes) => document.head.append(Object.assign(document.createElement(tag), attributes));
  add("link", { rel: "stylesheet", href: root + "static/atlas.css" });
  window.ATLAS = { put: (name, index) => { if (name === "index") resolve(index); } };
  add("script", { src: root + "data/index.js" });

  function resolve(index) {
    const path = decodeURI(window.location.pathname);
    const hash = decodeURIComponent(window.location.hash.slice(1));
    const names = index.layers.map((layer) => layer[0]);
    const bySlug = Object.fromEntries(index.layers.map((layer) => [layer[1], layer[0]]));
    // layers/SLUG.html#447, …/layer:447, …/SLUG/447
    const page = /layers\/([^/]+?)(?:\.html)?$/.exec(path);
    const colon = /([^/]+):(\d+)(?:\.html)?\/?$/.exec(path) || /([^/]+)\/(\d+)(?:\.html)?\/?$/.exec(path);
    const within = /^(.+):(\d+)$/.exec(hash);
    const wanted = page ? page[1] : colon ? colon[1] : within ? within[1] : "";
    const channel = /^\d+$/.test(hash) ? hash : colon ? colon[2] : within ? within[2] : "";
    const name = wanted.replace(/~([0-9a-f]{2})/g, (_, code) => String.fromCharCode(parseInt(code, 16)));
    const alias = Object.hasOwn(index.aliases, name) ? index.aliases[name] : null;
    const layer = bySlug[wanted] || [name, alias].find((n) => names.includes(n)) ||
      names.find((n) => name && (n.endsWith("." + name) || name.endsWith("." + n)));
    const slug = layer && index.layers.find((l) => l[0] === layer)[1];
    const encode = (text) => encodeURIComponent(text).replace(/%2F/g, "/").replace(/%3A/g, ":");
    const to = !layer ? "index.html" : channel ? "unit.html#" + encode(layer) + ":" + channel : "layers/" + slug + ".html";
    const link = Object.assign(document.createElement("a"), { href: root + to, textContent: layer ? layer + (channel ? ":" + channel : "") : "Home page" });
    document.getElementById("found").append(link);
    if (layer) window.location.replace(root + to);
  }
})();
