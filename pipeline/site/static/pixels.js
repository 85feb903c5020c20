// Images as pixels: heat maps in color, one cell of a sheet with what is drawn over it, saving and copying as PNG.
// A view is {cell, part, aspect, veil, area, field}: `cell` are the arguments of ATLAS.sprite, `part` is the region of the cell that
// is shown (left, top, width, height as fractions), `veil` the cell of opacities, `area` the region that the network saw and `field`
// the receptive field, both as fractions of what is shown; all but the first three may be null.
ATLAS.pixels = (function () {
  "use strict";

  const { make, sprite, say } = ATLAS;
  const FROM_DISK = "A browser reads no pixels of pages from disk: open the site with `atlas serve`, or use pipeline.open_atlas in Python.";
  // Longer side of saved images that have a heat map or a frame drawn over them, at least.
  const DRAWN = 512;

  // ---------------------------------------------------------------- heat maps

  // Color and opacity of an activation: blue below zero, orange above. Maps with both signs have one scale for both, so equal opacities
  // are equal distances from zero; maps of one sign go from their end near zero to the other end.
  function heatColor(value, low, high) {
    const span = high - low || 1;
    const x = low < 0 && high > 0 ? value / Math.max(-low, high) : high <= 0 ? (value - high) / span : (value - low) / span;
    const s = Math.min(1, Math.abs(x));
    const opacity = 225 * s ** 0.7; // less than linear, so that the weaker sign stays visible
    return x < 0 ? [20 + 90 * s, 60 + 140 * s, 255, opacity] : [255, 70 + 150 * s, 20 + 40 * s, opacity];
  }
  function painted(width, height, color, attributes) {
    const canvas = make("canvas", { width, height, ...attributes });
    const context = canvas.getContext("2d");
    const image = context.createImageData(width, height);
    for (let i = 0; i < width * height; i++) image.data.set(color(i), 4 * i);
    context.putImageData(image, 0, 0);
    return canvas;
  }
  // The stored map [low, high, base64 of bytes] of a shard of heat maps as {low, high, canvas}; null if there is none.
  function heatMap(shard, pair) {
    const held = shard.maps[pair];
    if (!held) return null;
    const [low, high, coded] = held;
    return { low, high, canvas: shaded(shard.width, shard.height, bytesOf(coded), low, high) };
  }
  const bytesOf = (coded) => Uint8Array.from(window.atob(coded), (c) => c.charCodeAt(0));
  // Bytes in the colors of a heat map, 0 for `low` and 255 for `high`; or as a veil that leaves high values clear.
  const shaded = (width, height, bytes, low, high) => painted(width, height, (i) => heatColor(low + ((high - low) * bytes[i]) / 255, low, high), { class: "heat", "aria-hidden": "true" });
  const veil = (width, height, bytes) => painted(width, height, (i) => [0, 0, 0, Math.round(175 * (1 - Math.sqrt(bytes[i] / 255)))], { class: "heat", "aria-hidden": "true" });
  const colorBar = (low, high) => painted(256, 1, (i) => heatColor(low + ((high - low) * i) / 255, low, high), { "aria-hidden": "true" });

  // ------------------------------------------------------------------ on the page

  function placed(element, [left, top, width, height]) {
    Object.assign(element.style, { left: 100 * left + "%", top: 100 * top + "%", width: 100 * width + "%", height: 100 * height + "%" });
    return element;
  }
  // The frame around the receptive field, clipped to what is shown; a dot in its middle if it is `small`.
  function frameOf([left, top, width, height], small) {
    if (small) {
      const dot = make("span", { class: "seen dot" });
      Object.assign(dot.style, { left: 100 * (left + width / 2) + "%", top: 100 * (top + height / 2) + "%" });
      return dot;
    }
    const [l, t, r, b] = [left, top, left + width, top + height].map((v) => Math.min(1, Math.max(0, v)));
    return placed(make("span", { class: "seen" }), [l, t, r - l, b - t]);
  }
  function element(view) {
    const box = make("span", { class: "pic" });
    box.style.aspectRatio = String(view.aspect);
    sprite(box, ...view.cell, view.part);
    if (view.veil) {
      const veil = make("span", { class: "veil" });
      sprite(veil, ...view.veil);
      box.append(veil);
    }
    return box;
  }

  // --------------------------------------------------------------------- as a file

  function loaded(url) {
    return new Promise((resolve, reject) => {
      const image = new Image();
      image.onload = () => resolve(image);
      image.onerror = () => reject(new Error("The image could not be loaded."));
      image.src = url;
    });
  }
  // Draw the shown part of a cell on `context`, or return its size in pixels if there is none.
  async function cut([url, columns, rows, at], [left, top, width, height], context) {
    const image = await loaded(url);
    const [w, h] = [image.naturalWidth / columns, image.naturalHeight / rows];
    if (!context) return [w * width, h * height];
    context.drawImage(image, ((at % columns) + left) * w, (Math.floor(at / columns) + top) * h, w * width, h * height, 0, 0, context.canvas.width, context.canvas.height);
    return [w * width, h * height];
  }
  // The image as it is shown: with the opacities of its veil, the heat map and the frame.
  async function canvasOf(view, heat, opacity) {
    const [w, h] = await cut(view.cell, view.part);
    // Cells of dataset images are squares that are stretched to the aspect ratio of the image.
    const size = w / h >= view.aspect ? [w, w / view.aspect] : [h * view.aspect, h];
    const times = heat || view.field ? Math.max(1, Math.ceil(DRAWN / Math.max(...size))) : 1;
    const [width, height] = size.map((v) => Math.max(1, Math.round(v * times)));
    const context = make("canvas", { width, height }).getContext("2d");
    await cut(view.cell, view.part, context);
    if (view.veil) {
      const other = make("canvas", { width, height }).getContext("2d");
      await cut(view.veil, [0, 0, 1, 1], other);
      const [shown, alpha] = [context, other].map((c) => c.getImageData(0, 0, width, height));
      for (let i = 3; i < shown.data.length; i += 4) shown.data[i] = alpha.data[i - 3];
      context.putImageData(shown, 0, 0);
    }
    if (heat) {
      const [l, t, across, down] = view.area;
      context.globalAlpha = opacity;
      context.drawImage(heat.canvas, l * width, t * height, across * width, down * height);
      context.globalAlpha = 1;
    }
    if (view.field) {
      const [l, t, across, down] = view.field;
      for (const [color, line] of [["#000", 4], ["#fff", 2]]) {
        Object.assign(context, { strokeStyle: color, lineWidth: line });
        context.strokeRect(l * width, t * height, across * width, down * height);
      }
    }
    return context.canvas;
  }
  const png = async (canvas) => {
    const drawn = await canvas;
    return new Promise((resolve, reject) => {
      drawn.toBlob((file) => (file ? resolve(file) : reject(new Error("The browser could not write the image."))), "image/png");
    });
  };

  function save(file, name, suffix) {
    const url = URL.createObjectURL(file);
    make("a", { href: url, download: name.replace(/[^A-Za-z0-9_.-]+/g, "_") + "." + suffix }).click();
    window.setTimeout(() => URL.revokeObjectURL(url), 1000);
  }
  const sayWhy = (error) => say(error.name === "SecurityError" ? FROM_DISK : error.message);
  // `canvas` is a promise: saving and copying report its errors, among them that pages from disk must not read pixels.
  async function savePng(canvas, name) {
    try { save(await png(canvas), name, "png"); } catch (error) { sayWhy(error); }
  }
  async function copyPng(canvas) {
    try {
      const file = await png(canvas);
      if (!window.isSecureContext || !navigator.clipboard || !window.ClipboardItem) throw new Error("This browser copies images only from pages of https or of this machine. Save the image instead.");
      await navigator.clipboard.write([new ClipboardItem({ "image/png": file })]);
      say("Copied the image.");
    } catch (error) {
      sayWhy(error.name === "NotAllowedError" ? new Error("The browser did not allow copying. Save the image instead.") : error);
    }
  }

  return { heatColor, heatMap, bytesOf, shaded, veil, colorBar, placed, frameOf, element, canvasOf, save, savePng, copyPng };
})();
