// Connections between units, for the pages that show them: kernels as small images, and what is said about them.
ATLAS.wires = (function () {
  "use strict";

  const { make, number, pixels } = ATLAS;
  const root = ATLAS.root;
  const SIDES = [["inputs", "Strongest inputs"], ["outputs", "Strongest outputs"]];
  // Colors of a kernel: most negative, zero, most positive. Zero is gray in both themes.
  const COLORS = [[38, 96, 188], [226, 224, 219], [196, 62, 36]];

  const signed = (value) => (value < 0 ? "−" : "+") + number(Math.abs(value));
  const says = (sum) => (sum < 0 ? "inhibits" : sum > 0 ? "excites" : "neither excites nor inhibits");

  function colorOf(value) {
    const end = value < 0 ? COLORS[0] : COLORS[2];
    const size = Math.min(1, Math.abs(value));
    return COLORS[1].map((zero, i) => Math.round(zero + size * (end[i] - zero)));
  }
  // The kernel of connection `i` of one side of a record as an image; null without kernels, and for single weights.
  function kernel(side, i, attributes) {
    const { size: [height, width], values } = side.kernels || { size: [0, 0], values: [] };
    if (!values[i] || height * width < 2) return null;
    const canvas = make("canvas", { class: "weights", width, height, role: "img",
      "aria-label": "Kernel of " + height + " × " + width + " weights: " + says(side.units[i][2]) + ", sum " + signed(side.units[i][2]), ...attributes });
    canvas.style.aspectRatio = width + " / " + height;
    const context = canvas.getContext("2d");
    const image = context.createImageData(width, height);
    pixels.bytesOf(values[i]).forEach((byte, at) => image.data.set([...colorOf((byte - 128) / 127), 255], 4 * at));
    context.putImageData(image, 0, 0);
    return canvas;
  }
  // What a connection goes through, in words.
  function route(side) {
    if (!side.linearized) return side.path ? "through " + side.path.join(", ") : "direct";
    const around = side.bypassed || [];
    const through = side.path || [];
    if (!through.length) return "direct";
    const always = through.filter((path) => !around.includes(path));
    const parts = [];
    if (always.length) parts.push("through " + always.join(", "));
    if (around.length) parts.push((side.residual ? "past " : "beside one another ") + around.join(", ") + (side.residual ? " and through them (residual)" : " (parallel paths)"));
    return parts.join("; ");
  }
  // How the numbers of one side were computed, for a note.
  function method(side, from, to) {
    const scaled = side.scale === "sd" ? " times the standard deviation of " + to + " over the dataset" : "";
    const included = !side.scale ? " Normalizations and activation functions are not included."
      : side.linearized ? " Along the linear path " + route(side) + "." + (side.gated ? " Activation functions between are replaced by their mean gates." : "")
        : " Normalizations and depthwise convolutions between are included, activation functions are not.";
    return "By the L2 norm of the " + (side.scale ? "effective " : "") + "weights " + from + scaled + ", with the sign of the weights’ sum: + excitatory, − inhibitory." + included +
      (side.approximate ? (side.linearized ? " Held constant or replaced: " : " Included only in part: ") + side.approximate.join(", ") + "." : "");
  }
  const walk = (name, trail) => root + "circuit.html#" + [...(trail || []), name].map((unit) => encodeURIComponent(unit).replace(/%3A/g, ":").replace(/%2F/g, "/")).join(",");

  return { SIDES, kernel, route, method, signed, says, walk };
})();
