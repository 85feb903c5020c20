// The page own-image.html: the network runs in the browser on an image of the reader, which leads to the units that it activates.
(function () {
  "use strict";

  const { make, find, need, number, share, data, pixels, resample } = ATLAS;
  const PAGE = 24; // units that are shown at once
  const FLAT = 1e-4; // of an activation: ten times the difference of two ways to compute it
  const says = find("#own-says");
  const place = find("#own-result");
  let loading = null;
  let latest = 0;

  const tell = (text) => { says.textContent = text; };
  // Lets the browser show what was told before the network stops it for a moment.
  const shown = () => new Promise((done) => { window.requestAnimationFrame(() => window.setTimeout(done, 0)); });

  // ------------------------------------------------------------------- network

  async function unpacked(name, parts) {
    const coded = await Promise.all(Array.from({ length: parts }, (_, i) => need("own-image/" + name + "-" + i, version())));
    const stream = new Blob(coded.map(pixels.bytesOf)).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }
  const version = () => ATLAS.html.dataset.version;

  async function load() {
    const index = await need("own-image/index", version());
    tell("Loading the network: " + (index.bytes / 1e6).toFixed(1) + " MB …");
    const [runtime, wasm, network] = await Promise.all([need("own-image/runtime", version()), unpacked("wasm", index.parts.wasm), unpacked("network", index.parts.network)]);
    tell("Preparing the network …");
    await shown();
    // Without threads and workers, which pages from disk and most hosts do not allow.
    Object.assign(runtime.env.wasm, { numThreads: 1, proxy: false, wasmBinary: wasm });
    runtime.env.logLevel = "error";
    return { index, runtime, session: await runtime.InferenceSession.create(network, { executionProviders: ["wasm"], graphOptimizationLevel: "all" }) };
  }

  async function network() {
    loading = loading || load();
    try { return await loading; } catch (error) { loading = null; throw error; }
  }

  // --------------------------------------------------------------------- image

  // The pixels of a file, upright, on white, without conversion of colors: as the files of the dataset were read.
  async function decoded(file) {
    let bitmap;
    try {
      bitmap = await createImageBitmap(file, { colorSpaceConversion: "none", imageOrientation: "from-image" });
    } catch {
      throw new Error("The browser can't read " + (file.name || "this file") + " as an image.");
    }
    const context = make("canvas", { width: bitmap.width, height: bitmap.height }).getContext("2d", { willReadFrequently: true });
    context.fillStyle = "#fff";
    context.fillRect(0, 0, bitmap.width, bitmap.height);
    context.drawImage(bitmap, 0, 0);
    return context.getImageData(0, 0, bitmap.width, bitmap.height);
  }

  function inputCanvas(levels, [height, width]) {
    const canvas = make("canvas", { width, height });
    const image = new ImageData(width, height);
    for (let i = 0; i < width * height; i++) {
      for (let c = 0; c < 3; c++) image.data[4 * i + c] = levels[Math.min(c, levels.length - 1)][i];
      image.data[4 * i + 3] = 255;
    }
    canvas.getContext("2d").putImageData(image, 0, 0);
    return canvas;
  }

  async function run(file) {
    const { index, runtime, session } = await network();
    tell("Computing …");
    await shown();
    const { data: rgba, width, height } = await decoded(file);
    const levels = resample.fitted(rgba, width, height, index);
    const count = index.size[0] * index.size[1];
    const values = new Float32Array(index.channels * count);
    levels.forEach((plane, c) => { for (let i = 0; i < count; i++) values[c * count + i] = plane[i] / 255; });
    const began = performance.now();
    const outputs = await session.run({ image: new runtime.Tensor("float32", values, [1, index.channels, ...index.size]) });
    return { index, outputs, canvas: inputCanvas(levels, index.size), name: file.name || "the image", seconds: (performance.now() - began) / 1000 };
  }

  // --------------------------------------------------------------------- units

  // Where a value lies among the largest activations of the dataset images: the share of images below it, from the histogram of the
  // unit, and how far it is beyond the largest one, in ranges of the unit.
  function placeOf(value, { ends: [low, high], range: [begin, end], bins, first, shares }) {
    if (low === null || high === null || begin === null || end === null) return { below: 0, beyond: 0 };
    // A unit with the same activation for all images up to rounding errors has no distribution that a value could be compared with.
    const rounding = FLAT * Math.max(Math.abs(low), Math.abs(high));
    if (high - low <= rounding) return value > high + rounding ? { below: 1, beyond: 1 } : { below: 0, beyond: 0, flat: true };
    if (value > high) return { below: 1, beyond: (value - high) / (high - low) };
    if (value < low) return { below: 0, beyond: 0 };
    const clip = (v) => Math.min(high, Math.max(low, v));
    const border = (i) => (i === 0 ? low : i > bins + 1 ? high : clip(begin + ((end - begin) * (i - 1)) / bins));
    for (let i = 1; i < shares.length; i++) {
      const [from, to] = [border(first + i - 1), border(first + i)];
      if (value <= to && to > from) return { below: (shares[i - 1] + ((shares[i] - shares[i - 1]) * Math.max(0, value - from)) / (to - from)) / 65535, beyond: 0 };
    }
    return { below: 1, beyond: 0 };
  }

  // The histograms of a layer, one for each unit.
  function unpackedHistograms({ ends, range, bins, first, count, shares }) {
    const bytes = pixels.bytesOf(shares);
    let at = 0;
    return ends.map((pair, row) => {
      const own = Array.from({ length: count[row] }, (_, i) => bytes[2 * (at + i)] + 256 * bytes[2 * (at + i) + 1]);
      at += count[row];
      return { ends: pair, range: range[row], bins, first: first[row], shares: own };
    });
  }

  async function ranked(result, entry) {
    const [name, output] = entry;
    const layer = ATLAS.layer(name);
    const [histograms, facts] = await Promise.all([need("own-image/h-" + layer.slug, version()), need(layer.slug + "/layer", layer.version)]);
    const rows = unpackedHistograms(histograms);
    const { data: values, dims: [, channels, height, width] } = result.outputs[output];
    const units = [];
    for (let row = 0; row < channels; row++) {
      const map = values.subarray(row * height * width, (row + 1) * height * width);
      let [least, most] = [Infinity, -Infinity];
      for (const value of map) { if (value < least) least = value; if (value > most) most = value; }
      units.push({ row, map, least, most, ...placeOf(most, rows[row]) });
    }
    units.sort((a, b) => b.below - a.below || b.beyond - a.beyond || a.row - b.row);
    return { layer, facts, units, height, width, images: histograms.images, spatial: entry[2] && height * width > 1 };
  }

  function heatOf(unit, { height, width }) {
    const span = unit.most - unit.least || 1;
    return pixels.shaded(width, height, Uint8Array.from(unit.map, (v) => Math.round((255 * (v - unit.least)) / span)), unit.least, unit.most);
  }

  function figure(found, unit, canvas) {
    const { layer, facts } = found;
    const channel = ATLAS.channelAt(layer, unit.row);
    const name = layer.name + ":" + channel;
    const where = unit.flat ? "the same for all dataset images" : unit.beyond ? "above all " + found.images + " dataset images" : "above " + share(unit.below) + " of the dataset images";
    const pictures = [];
    if (facts.rendered.length) {
      const view = ATLAS.units.viewOf({ layer, row: unit.row }, facts.rendered[0], 0, 0, false);
      const picture = pixels.element(view);
      picture.setAttribute("role", "img");
      picture.setAttribute("aria-label", "Feature visualization of " + name);
      pictures.push(picture);
    }
    if (found.spatial) {
      const copy = make("canvas", { width: canvas.width, height: canvas.height, "aria-hidden": "true" });
      copy.getContext("2d").drawImage(canvas, 0, 0);
      pictures.push(make("span", { class: "frame own", role: "img", "aria-label": "Activation map over your image, from " + number(unit.least) + " to " + number(unit.most) }, copy, heatOf(unit, found)));
    }
    return make("li", {}, make("figure", {}, make("a", { class: "own-pictures", href: ATLAS.linkTo(layer.name, channel) }, pictures, make("b", { class: "layer", text: name })),
      make("figcaption", {}, data(unit.most), ", ", make("data", { value: String(unit.below), text: where }))));
  }

  async function showLayer(result, entry, into) {
    const turn = ++latest;
    const found = await ranked(result, entry);
    if (turn !== latest) return;
    const list = make("ol", { class: "own-units" });
    const more = make("button", { type: "button" });
    let next = 0;
    const extend = () => {
      const part = found.units.slice(next, next + PAGE);
      list.append(...part.map((unit) => figure(found, unit, result.canvas)));
      const first = list.children[next];
      next += part.length;
      more.hidden = next >= found.units.length;
      more.textContent = "More of the " + found.units.length + " units";
      if (next > PAGE && first) find("a", first).focus();
    };
    more.addEventListener("click", extend);
    extend();
    into.replaceChildren(list, more);
    tell(result.name + ": " + found.units.length + " units of " + found.layer.name + ", computed in " + result.seconds.toFixed(2) + " s.");
    document.body.dataset.ready = found.layer.name;
  }

  // The five classes with the largest outputs, as probabilities; a network may give these itself.
  function classes(result) {
    const { labels } = result.index;
    if (!labels.length) return null;
    const values = Array.from(result.outputs.classes.data);
    const sum = values.reduce((a, b) => a + b, 0);
    const most = Math.max(...values);
    const exponentials = values.map((v) => Math.exp(v - most));
    const total = exponentials.reduce((a, b) => a + b, 0);
    const already = Math.min(...values) >= 0 && Math.abs(sum - 1) < 1e-3;
    const probabilities = already ? values : exponentials.map((v) => v / total);
    const best = values.map((_, i) => i).sort((a, b) => values[b] - values[a]).slice(0, 5);
    return make("section", { class: "own-classes" }, make("h2", { text: "Classes" }),
      make("ol", {}, best.map((i) => make("li", {}, make("span", { text: labels[i] }), " ", data(probabilities[i], share)))));
  }

  function show(result) {
    const { layers } = result.index;
    const chosen = find("#own-layer");
    const before = chosen ? chosen.value : "";
    const last = layers.map((entry) => entry[2]).lastIndexOf(true);
    const at = layers.findIndex(([name]) => name === before);
    const start = at >= 0 ? at : last >= 0 ? last : layers.length - 1;
    const select = make("select", { id: "own-layer" }, layers.map(([name], i) => make("option", { value: name, selected: i === start, text: name })));
    const units = make("div", {});
    select.addEventListener("change", () => showLayer(result, layers[select.selectedIndex], units).catch(failed));
    result.canvas.setAttribute("role", "img");
    result.canvas.setAttribute("aria-label", "What the network sees of your image: its center, " + result.index.size[1] + " × " + result.index.size[0] + " pixels");
    place.replaceChildren(...[
      make("div", { class: "own-input" }, make("figure", {}, result.canvas, make("figcaption", { text: "What the network sees of it" })), classes(result)),
      make("section", {}, make("h2", { text: "Units" }), make("div", { class: "controls" }, make("label", {}, "Layer ", select)),
        make("p", { class: "note", text: "Units of the layer by the place of their maximum activation among those of the dataset images, the highest first. Orange and blue over your image are activations above and below zero." }), units)]);
    place.hidden = false;
    return showLayer(result, layers[start], units);
  }

  // ---------------------------------------------------------------------- input

  const failed = (error) => { document.body.dataset.ready = "failed"; tell(error instanceof WebAssembly.CompileError || error instanceof RangeError ? "The browser can't run the network: " + error.message : error.message); };

  let queue = Promise.resolve();
  // One image after the other: a session runs one at a time.
  function take(file) {
    if (!file) return;
    delete document.body.dataset.ready;
    queue = queue.then(() => run(file)).then(show).catch(failed);
  }

  function start() {
    if (typeof WebAssembly !== "object" || typeof DecompressionStream !== "function" || typeof createImageBitmap !== "function") {
      tell("This page needs a browser with WebAssembly and DecompressionStream: Chrome 97, Firefox 113, Safari 16.4 or a later one.");
      return;
    }
    const zone = find("#own-drop");
    const input = find("#own-file");
    zone.hidden = false;
    input.addEventListener("change", () => { take(input.files[0]); input.value = ""; });
    const over = (on) => zone.classList.toggle("over", on);
    document.addEventListener("dragover", (event) => { event.preventDefault(); over(true); });
    document.addEventListener("dragleave", () => over(false));
    document.addEventListener("drop", (event) => { event.preventDefault(); over(false); take(event.dataTransfer.files[0]); });
    document.addEventListener("paste", (event) => {
      const file = Array.from(event.clipboardData.files).find((one) => one.type.startsWith("image/"));
      if (file) { event.preventDefault(); take(file); }
    });
  }
  ATLAS.indexed.then(start);
})();
