// The order and the selection of a layer's units, and how addresses carry them: …#sort=max-down&find=dog. The page of a layer
// and the arrows of a unit's page use the same ones.
ATLAS.listing = (function () {
  "use strict";

  const DEFAULT = { sort: "channel", find: "", status: "", measure: "", from: "", to: "" };
  // The columns of a grid that are no metrics of the table in core/metric_specs.py.
  const STATISTICS = {
    max: "maximum activation", mean: "mean activation", sparsity: "sparsity", nonzero: "share above zero", ratio: "activation ratio",
  };

  // Statuses that do not explain themselves, in words; the stored ones are in the addresses of listings.
  const STATUSES = { limit: "still rising at the last step", unselected: "not selected for visualization" };
  const statusOf = (status) => STATUSES[status] || status || "unknown";

  // The listing that a part of an address describes: name=value, joined by "&". Other names are ignored.
  function parse(text) {
    const listing = { ...DEFAULT };
    for (const [name, value] of new URLSearchParams(text)) if (Object.hasOwn(DEFAULT, name)) listing[name] = value;
    return listing;
  }
  // The same as text; empty for the default listing.
  function format(listing) {
    const kept = Object.keys(DEFAULT).filter((name) => listing[name] !== DEFAULT[name] && !(listing.measure === "" && (name === "from" || name === "to")));
    return new URLSearchParams(kept.map((name) => [name, listing[name]])).toString();
  }

  // [key, title] of the columns that units can be ordered and selected by.
  function measures(columns) {
    return [...Object.entries(STATISTICS), ...ATLAS.index.grid.map((name) => [name, ATLAS.index.metrics[name].title])].filter(([key]) => columns[key]);
  }
  const label = (columns, row) => (columns.label && columns.label[row] >= 0 ? columns.labels[columns.label[row]] : "");

  function bound(text, otherwise) {
    const value = text.trim().replace(",", ".").replace("−", "-");
    return value === "" || Number.isNaN(Number(value)) ? otherwise : Number(value);
  }

  // The rows of the units that a listing selects, in its order. What it names and the layer lacks is ignored.
  function rows(layer, columns, listing) {
    const wanted = listing.find.trim().toLowerCase();
    const limited = columns[listing.measure] ? listing.measure : "";
    const [low, high] = [bound(listing.from, -Infinity), bound(listing.to, Infinity)];
    const matches = (row) => {
      const channel = String(ATLAS.channelAt(layer, row));
      if (wanted && !(/^\d+$/.test(wanted) ? channel.startsWith(wanted) : label(columns, row).toLowerCase().includes(wanted))) return false;
      if (listing.status && columns.status && columns.status[row] !== listing.status) return false;
      const value = limited ? columns[limited][row] : 0;
      return !limited || (value !== null && value >= low && value <= high);
    };
    const found = Array.from({ length: ATLAS.count(layer) }, (_, row) => row).filter(matches);
    const [key, direction] = listing.sort.split("-");
    const text = { label: (row) => label(columns, row) || "\uffff", status: (row) => columns.status[row] }[key];
    if (text && columns[key]) return found.sort((a, b) => (text(a) < text(b) ? -1 : text(a) > text(b) ? 1 : a - b));
    if (!measures(columns).some(([name]) => name === key)) return found;
    const sign = direction === "down" ? -1 : 1;
    // Units without a number come last in both directions; ties are ordered by channel.
    const rank = (row) => (columns[key][row] === null ? Infinity : sign * columns[key][row]);
    return found.sort((a, b) => (rank(a) === rank(b) ? a - b : rank(a) < rank(b) ? -1 : 1));
  }

  // The columns whose values say why a unit is where it is in a listing, as [key, title]:
  // of the order, and of the selection.
  function deciding(columns, listing) {
    const titles = new Map(measures(columns));
    const keys = new Set([listing.sort.split("-")[0], listing.measure]);
    return Array.from(keys).filter((key) => titles.has(key)).map((key) => [key, titles.get(key)]);
  }

  // A listing in words, without the units that it selects.
  function describe(columns, listing) {
    const titles = new Map(measures(columns));
    const [key, direction] = listing.sort.split("-");
    const wanted = listing.find.trim();
    const limits = [listing.from.trim() && "from " + listing.from.trim(), listing.to.trim() && "to " + listing.to.trim()].filter(Boolean);
    return [
      titles.has(key) ? "by " + titles.get(key) + (direction === "down" ? ", highest first" : ", lowest first") : key === "label" || key === "status" ? "by " + key : "by channel",
      wanted && (/^\d+$/.test(wanted) ? "channels beginning with " : "labels containing ") + "“" + wanted + "”",
      listing.status && "status: " + statusOf(listing.status),
      titles.has(listing.measure) && limits.length && titles.get(listing.measure) + " " + limits.join(" "),
    ].filter(Boolean).join("; ");
  }

  return { parse, format, measures, label, rows, deciding, describe, statusOf };
})();
