// The order of units: parsed from and written to addresses, and the list of all units in it.
ATLAS.order = (function () {
  "use strict";

  const { need } = ATLAS;
  const KEYS = ["by", "of", "a", "b", "in"];
  // Titles of the orders. Higher values come first unless the title says otherwise; units without a number come last.
  const ORDERS = {
    spread: () => "disagreement",
    unlike: () => "image distance",
    up: (a, b) => b + " − " + a + ", highest first",
    down: (a, b) => b + " − " + a + ", lowest first",
    layer: () => "by layer",
    channel: () => "by channel",
  };

  const usual = () => ({ by: "spread", of: ATLAS.index.main, a: 0, b: 1, in: "" });
  function decoded(text) { try { return decodeURIComponent(text); } catch { return text; } }

  // "#layer:channel&by=up&of=gain" → {unit: "layer:channel", by: "up", of: "gain", …}; missing or invalid keys have their defaults.
  function parse(hash) {
    const [first, ...rest] = hash.replace(/^#/, "").split("&");
    const named = KEYS.some((key) => first.startsWith(key + "="));
    const told = Object.fromEntries((named ? [first, ...rest] : rest).map((part) => part.split("=").map(decoded)));
    const count = ATLAS.index.contenders.length;
    const found = { ...usual(), unit: named ? "" : decoded(first) };
    if (Object.hasOwn(ORDERS, told.by || "")) found.by = told.by;
    if (ATLAS.index.measures.some((m) => m.name === told.of)) found.of = told.of;
    if (ATLAS.layer(told.in || "")) found.in = told.in;
    const [a, b] = [Number(told.a ?? 0), Number(told.b ?? 1)];
    if (a !== b && [a, b].every((v) => Number.isInteger(v) && v >= 0 && v < count)) Object.assign(found, { a, b });
    return found;
  }
  // The keys of an order that differ from their defaults, as part of an address.
  function text(order) {
    const plain = usual();
    return KEYS.filter((key) => order[key] !== plain[key]).map((key) => key + "=" + encodeURIComponent(order[key])).join("&");
  }
  function address(layer, channel, order) {
    const said = text(order);
    return ATLAS.linkTo(layer, channel) + (said ? "&" + said : "");
  }

  // Values of a measure: [layer][contender][row].
  const values = (name) => need("measures/" + ATLAS.fileOf(name), ATLAS.index.identity);
  const known = (v) => v !== null && v !== undefined;

  // All units in order: [{layer, row, key}]. Only contenders that are comparable to contender a count for the key.
  async function list(asked) {
    const order = { ...asked }; // the caller may change its own while the values load
    const [held, unlike] = await Promise.all([values(order.of), order.by === "unlike" ? need("difference", ATLAS.index.identity) : null]);
    const alike = measure(order.of).alike[order.a];
    const found = [];
    for (let at = 0; at < ATLAS.index.layers.length; at++) {
      const layer = ATLAS.layerAt(at);
      if (order.in && layer.name !== order.in) continue;
      const of = held[at];
      for (let row = 0, total = ATLAS.count(layer); row < total; row++) {
        let key = null;
        if (order.by === "unlike") key = unlike[at][row];
        else if (order.by === "spread") {
          const own = of.filter((_, i) => alike[i]).map((v) => v[row]).filter(known);
          if (own.length > 1) key = Math.max(...own) - Math.min(...own);
        } else if (alike[order.b] && known(of[order.a][row]) && known(of[order.b][row])) key = of[order.b][row] - of[order.a][row];
        found.push({ layer, row, key });
      }
    }
    if (order.by === "channel") found.sort((x, y) => ATLAS.channelAt(x.layer, x.row) - ATLAS.channelAt(y.layer, y.row) || x.layer.order - y.layer.order);
    else if (order.by !== "layer") {
      const sign = order.by === "down" ? 1 : -1;
      const rank = (unit) => (known(unit.key) ? sign * unit.key : Infinity);
      found.sort((x, y) => { const [p, q] = [rank(x), rank(y)]; return p === q ? x.layer.order - y.layer.order || x.row - y.row : p < q ? -1 : 1; });
    }
    return found;
  }

  // Escape a name to a file name in the same way as the builder of the site.
  ATLAS.fileOf = (name) => name.replace(/[^A-Za-z0-9_.-]/g, (c) => Array.from(new TextEncoder().encode(c), (b) => "~" + b.toString(16).padStart(2, "0")).join("")).replace(/^\./, "~2e");
  const signed = (value) => (known(value) ? (value > 0 ? "+" : "") + ATLAS.number(value) : "—");
  const measure = (name) => ATLAS.index.measures.find((m) => m.name === name);
  return { ORDERS, parse, text, address, values, list, signed, measure, known };
})();
