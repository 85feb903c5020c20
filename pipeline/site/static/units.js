// What the pages that show units have in common: addresses, records, and the views of images in sheets (see pixels.js).
ATLAS.units = (function () {
  "use strict";

  const { need } = ATLAS;
  const root = ATLAS.root;

  // ------------------------------------------------------------------- address

  function parse(text) {
    const colon = text.lastIndexOf(":");
    if (colon < 1 || !/^\d+$/.test(text.slice(colon + 1))) return null;
    const wanted = text.slice(0, colon);
    const layer = ATLAS.layer(wanted) || ATLAS.layersNamed(wanted)[0];
    return layer && { layer, channel: Number(text.slice(colon + 1)), row: ATLAS.rowOf(layer, Number(text.slice(colon + 1))) };
  }
  function decoded(text) { try { return decodeURIComponent(text); } catch { return text; } }
  const fragmentOf = (unit) => ATLAS.linkTo(unit.layer.name, unit.channel).split("#")[1];
  const nameOf = (unit) => unit.layer.name + ":" + unit.channel;
  // What the number `activation` of a visualization is: the value of its objective.
  const measuredOf = (rendered) => ({ energy: "energy", rectified: "rectified activation" })[rendered.objective] || (["mean", "least"].includes(rendered.natural) ? "mean activation" : "activation");

  async function load(unit) {
    const per = ATLAS.index.sizes.shard;
    const start = unit.row - (unit.row % per);
    const [facts, shard] = await Promise.all([
      need(unit.layer.slug + "/layer", unit.layer.version), need(unit.layer.slug + "/u" + start, unit.layer.version),
    ]);
    return { ...unit, facts, shard, record: shard.units[unit.row - start] };
  }

  // ------------------------------------------------------------ visualizations

  // The place of a picture in its sheets, the arguments of `sprite`: kind "p" is the picture, "m" its opacity.
  function cellOf(kind, unit, rendered, number_, variant) {
    const [per, variants, columns] = rendered.sheet;
    const start = unit.row - (unit.row % per);
    const cells = Math.min(per, ATLAS.count(unit.layer) - start) * variants;
    return [ATLAS.media(unit.layer, kind + number_ + "-" + start), columns, Math.ceil(cells / columns), (unit.row - start) * variants + variant];
  }
  function viewOf(unit, rendered, number_, variant, veiled) {
    const [, , , width, height] = rendered.sheet;
    return { cell: cellOf("p", unit, rendered, number_, variant), part: [0, 0, 1, 1], aspect: width / height, veil: veiled && rendered.masked ? cellOf("m", unit, rendered, number_, variant) : null, area: null, field: null };
  }

  // ---------------------------------------------------------- dataset examples

  // Lists of examples: name, heading, and what the value of an example is.
  const LISTS = [["max", "Maximum activations", "maximum activation"], ["mean", "Highest mean activations", "mean activation"], ["min", "Minimum activations", "minimum activation"], ["spectrum", "Quantile examples", "maximum activation"], ["relevant", "Images that use the unit", "relevance"]];

  const clamp = (v) => Math.min(1, Math.max(0, v));
  // Frames around smaller receptive fields, in input pixels, would hide them in small images: a dot shows where they are.
  const DOT = 8;

  // What the site stores of an example; crops, whole images or both may be missing.
  function shape(unit, entry, list) {
    const [, index, y, x, pair, cell] = entry;
    const photo = unit.shard.photos[index] || ["", ""];
    const [down, across] = unit.facts.input;
    const whole = photo.length > 2;
    // The crop, at least 48 pixels wide, and the receptive field itself, which can extend beyond the input; left, top, right, bottom in input pixels.
    const box = entry.length > 6 ? entry.slice(6, 10) : [0, 0, across, down];
    let field = null;
    if (list !== "mean" && !unit.facts.whole && unit.facts.field) {
      const [stride, first] = unit.facts.grid;
      const [top, left] = [first[0] + y * stride[0], first[1] + x * stride[1]];
      field = [left, top, left + unit.facts.field[1], top + unit.facts.field[0]];
    }
    return { photo, whole, box, field, pair, cell, index, input: [across, down] };
  }

  // The receptive field as a part of the region of the image in which the network's input lies at `area`.
  function fieldIn(s, [left, top, width, height]) {
    if (!s.field) return null;
    const [w, h] = s.input;
    const [l, t, r, b] = [clamp(s.field[0] / w), clamp(s.field[1] / h), clamp(s.field[2] / w), clamp(s.field[3] / h)];
    return [left + width * l, top + height * t, width * (r - l), height * (b - t)];
  }

  // The view of an example (see pixels.js); null if the site has no such image.
  function exampleView(unit, entry, key, list) {
    const s = shape(unit, entry, list);
    const [w, h] = s.input;
    const crops = unit.facts.crops;
    const made = (cell, part, aspect, area) => ({ cell, part, aspect, veil: null, area, field: fieldIn(s, area) });
    const ofPhoto = ([l, t, r, b]) => {
      const [per, columns, total] = ATLAS.index.sizes.photo;
      const [, , position, width, height, left, top, right, bottom] = s.photo;
      const [across, down] = [Math.max(0.01, r - l), Math.max(0.01, b - t)];
      const start = position - (position % per);
      const url = root + "photos/" + (per > 1 ? "s" + start : s.index) + "." + ATLAS.index.photo_suffix;
      const rows = per > 1 ? Math.ceil(Math.min(per, total - start) / columns) : 1;
      return made([url, columns, rows, position - start], [l, t, across, down], (across * width) / (down * height), [(left - l) / across, (top - t) / down, (right - left) / across, (bottom - top) / down]);
    };
    if (key !== "crop" && s.whole) return ofPhoto([0, 0, 1, 1]);
    // A mean is over all positions: the whole input of the network, if the site has it.
    if (list === "mean" && s.whole) return ofPhoto(s.photo.slice(5));
    const [l, t, r, b] = s.box;
    if (s.cell >= 0 && crops) {
      const [per, each, columns] = crops;
      const start = unit.row - (unit.row % per);
      const cells = Math.min(per, ATLAS.count(unit.layer) - start) * each;
      // Crops that are not square are in the middle of a square cell.
      const aspect = (r - l) / (b - t);
      const [across, down] = Math.abs(aspect - 1) > 0.02 ? [Math.min(1, aspect), Math.min(1, 1 / aspect)] : [1, 1];
      const [sx, sy] = [across / (r - l), down / (b - t)];
      return made([ATLAS.media(unit.layer, "x" + start, ATLAS.index.photo_suffix), columns, Math.ceil(cells / columns), (unit.row - start) * each + s.cell], [0, 0, 1, 1], 1,
        [(1 - across) / 2 - l * sx, (1 - down) / 2 - t * sy, w * sx, h * sy]);
    }
    if (!s.whole) return null;
    const [left, top, right, bottom] = s.photo.slice(5);
    const [ax, ay] = [(right - left) / w, (bottom - top) / h];
    return ofPhoto([left + l * ax, top + t * ay, left + r * ax, top + b * ay].map(clamp));
  }

  // Which pixels of an image that uses the unit its relevance comes from: bytes of cells over the network's input; null where it needs
  // no part of the image in particular.
  function maskOf(unit, index) {
    const { size: [height, width], values } = unit.record.masks || { size: [0, 0], values: {} };
    const bytes = values[index] && ATLAS.pixels.bytesOf(values[index]);
    return bytes && bytes.some((value) => value > 0) ? { height, width, bytes } : null;
  }

  // The heat map of an example; of an image that uses the unit, which has none, its mask.
  async function heatOf(unit, entry) {
    if (entry[4] < 0) {
      const mask = maskOf(unit, entry[1]);
      return mask && { low: 0, high: 1, canvas: ATLAS.pixels.shaded(mask.width, mask.height, mask.bytes, 0, 1), note: "Where the relevance comes from, relative to its largest value." };
    }
    const start = unit.row - (unit.row % ATLAS.index.sizes.heat);
    return need(unit.layer.slug + "/h" + start, unit.layer.version).then((shard) => {
      const [height, width] = unit.facts.map;
      const averaged = shard.height < height || shard.width < width;
      const heat = ATLAS.pixels.heatMap(shard, entry[4]);
      return heat && { ...heat, note: averaged ? "The map of " + height + " × " + width + " positions, averaged to " + shard.height + " × " + shard.width + ": single activations can lie beyond the ends." : "" };
    });
  }

  return { parse, decoded, fragmentOf, nameOf, measuredOf, load, cellOf, viewOf, LISTS, DOT, clamp, shape, exampleView, maskOf, heatOf };
})();
