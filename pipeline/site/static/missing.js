// The 404 page: finds the root of the site from the address of this script, and searches for the new address of a unit.
(function () {
  "use strict";
  if (window.NEURON_ATLAS_MISSING || !document.currentScript) return;
  window.NEURON_ATLAS_MISSING = true;
  const root = document.currentScript.src.replace(/static\/missing\.js.*$/, "");
  const add = (tag, attributes) => document.head.append(Object.assign(document.createElement(tag), attributes));
  const found = document.getElementById("found");
  const none = found.textContent;
  for (const link of document.querySelectorAll("[data-to]")) link.href = root + link.dataset.to;
  if (!document.querySelector("link[rel=stylesheet]")) add("link", { rel: "stylesheet", href: root + "static/atlas.css" });
  found.textContent = "Searching for a page that it may have moved to …";
  window.ATLAS = { put: (name, index) => { if (name === "index") resolve(index); } };
  add("script", { src: root + "data/index.js", onerror: () => tell("index.html", "Home page", none) });

  function tell(to, text, before) {
    const link = Object.assign(document.createElement("a"), { href: root + to, textContent: text });
    found.replaceChildren(before + " ", link);
  }

  function resolve(index) {
    const decode = (text, by) => { try { return by(text); } catch { return text; } };
    const path = decode(window.location.pathname, decodeURI);
    const hash = decode(window.location.hash.slice(1), decodeURIComponent);
    const names = index.layers.map((layer) => layer[0]);
    const bySlug = Object.fromEntries(index.layers.map((layer) => [layer[1], layer[0]]));
    // layers/SLUG.html#447, …/layer:447, …/SLUG/447, u/SLUG/447.html
    const page = /layers\/([^/]+?)(?:\.html)?$/.exec(path);
    const colon = /([^/]+):(\d+)(?:\.html)?\/?$/.exec(path) || /([^/]+)\/(\d+)(?:\.html)?\/?$/.exec(path);
    const within = /^(.+):(\d+)$/.exec(hash);
    const wanted = page ? page[1] : colon ? colon[1] : within ? within[1] : "";
    const channel = /^\d+$/.test(hash) ? hash : colon ? colon[2] : within ? within[2] : "";
    const name = wanted.replace(/~([0-9a-f]{2})/g, (_, code) => String.fromCharCode(parseInt(code, 16)));
    const alias = Object.hasOwn(index.aliases, name) ? index.aliases[name] : null;
    const layer = bySlug[wanted] || [name, alias].find((n) => names.includes(n)) ||
      names.find((n) => name && (n.endsWith("." + name) || name.endsWith("." + n)));
    if (!layer) { tell("index.html", "Home page", none); return; }
    const slug = index.layers.find((l) => l[0] === layer)[1];
    const encode = (text) => encodeURIComponent(text).replace(/%2F/g, "/").replace(/%3A/g, ":");
    const to = channel ? "unit.html#" + encode(layer) + ":" + channel : "layers/" + slug + ".html";
    tell(to, layer + (channel ? ":" + channel : ""), "This page has moved:");
    window.location.replace(root + to);
  }
})();
