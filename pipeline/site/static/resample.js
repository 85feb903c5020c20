// Resizing and center crop of an image as Pillow does it, in integers: the results are equal to the bit.
// Canvases resize without antialiasing, or each browser in its own way.
ATLAS.resample = (function () {
  "use strict";

  const BITS = 22; // fraction bits of the weights
  const sinc = (x) => (x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x));
  // Radius and weight at a distance in pixels.
  const FILTERS = {
    bilinear: [1, (x) => Math.max(0, 1 - Math.abs(x))],
    bicubic: [2, (x) => {
      const a = -0.5, d = Math.abs(x);
      return d < 1 ? ((a + 2) * d - (a + 3)) * d * d + 1 : d < 2 ? (((d - 5) * d + 8) * d - 4) * a : 0;
    }],
    lanczos: [3, (x) => (-3 <= x && x < 3 ? sinc(x) * sinc(x / 3) : 0)],
  };

  // For each of the positions `from` … `to` of the result: the first source position and the weights.
  function weights(source, target, name, from, to) {
    const scale = source / target;
    const found = [];
    if (name === "nearest") {
      // Pillow adds up the steps, with the rounding errors of that.
      for (let i = 0, at = 0.5 * scale; i < to; i++, at += scale) {
        if (i >= from) found.push([Math.min(source - 1, Math.floor(at)), [1 << BITS]]);
      }
      return found;
    }
    const [radius, filter] = FILTERS[name];
    const stretch = Math.max(1, scale);
    const support = radius * stretch;
    for (let i = from; i < to; i++) {
      const center = (i + 0.5) * scale;
      const first = Math.max(0, Math.trunc(center - support + 0.5));
      const last = Math.min(source, Math.trunc(center + support + 0.5));
      const row = [];
      let sum = 0;
      for (let x = first; x < last; x++) {
        row.push(filter((x - center + 0.5) * (1 / stretch)));
        sum += row[row.length - 1];
      }
      found.push([first, row.map((w) => { const v = sum ? w / sum : w; return Math.trunc(v * (1 << BITS) + (v < 0 ? -0.5 : 0.5)); })]);
    }
    return found;
  }

  const level = (sum) => { const v = Math.floor(sum / (1 << BITS)); return v < 0 ? 0 : v > 255 ? 255 : v; };

  // One plane, `width` × `height`, resized to `across` × `down`; only the region [left, top, right, bottom] of the result.
  function plane(values, width, height, [across, down], [left, top, right, bottom], name) {
    const columns = weights(width, across, name, left, right);
    const rows = weights(height, down, name, top, bottom);
    const begin = Math.min(...rows.map(([first]) => first));
    const end = Math.max(...rows.map(([first, w]) => first + w.length));
    const wide = right - left;
    const middle = new Uint8Array(wide * (end - begin));
    const half = 1 << (BITS - 1);
    for (let y = begin; y < end; y++) {
      for (let x = 0; x < wide; x++) {
        const [first, w] = columns[x];
        let sum = half;
        for (let k = 0; k < w.length; k++) sum += values[y * width + first + k] * w[k];
        middle[(y - begin) * wide + x] = level(sum);
      }
    }
    const result = new Uint8Array(wide * (bottom - top));
    for (let y = 0; y < bottom - top; y++) {
      const [first, w] = rows[y];
      for (let x = 0; x < wide; x++) {
        let sum = half;
        for (let k = 0; k < w.length; k++) sum += middle[(first - begin + k) * wide + x] * w[k];
        result[y * wide + x] = level(sum);
      }
    }
    return result;
  }

  // Round as Python: halves to even numbers.
  function round(value) {
    const floor = Math.floor(value);
    return value - floor === 0.5 ? floor + (floor % 2 === 0 ? 0 : 1) : Math.round(value);
  }

  // The planes of RGBA pixels: red, green and blue, or gray as ITU-R 601-2.
  function planes(pixels, channels) {
    const count = pixels.length / 4;
    const found = Array.from({ length: channels }, () => new Uint8Array(count));
    for (let i = 0; i < count; i++) {
      const [r, g, b] = [pixels[4 * i], pixels[4 * i + 1], pixels[4 * i + 2]];
      if (channels === 1) found[0][i] = (r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16;
      else { found[0][i] = r; found[1][i] = g; found[2][i] = b; }
    }
    return found;
  }

  // RGBA pixels as the levels of the network's input, one Uint8Array for each channel: the shorter side is resized to `resize`, and
  // the center is cropped to `size` (height, width); beyond the edges there is black.
  function fitted(pixels, width, height, { size, resize, interpolation, channels }) {
    const shorter = Math.min(width, height);
    const [across, down] = [width, height].map((side) => (side === shorter ? resize : Math.trunc((resize * side) / shorter)));
    const [high, wide] = size;
    const [x, y] = [round((across - wide) / 2), round((down - high) / 2)];
    const region = [Math.max(0, x), Math.max(0, y), Math.min(across, x + wide), Math.min(down, y + high)];
    return planes(pixels, channels).map((values) => {
      const part = plane(values, width, height, [across, down], region, interpolation);
      if (part.length === wide * high) return part;
      const whole = new Uint8Array(wide * high);
      const columns = region[2] - region[0];
      for (let row = 0; row < region[3] - region[1]; row++) {
        whole.set(part.subarray(row * columns, (row + 1) * columns), (row + region[1] - y) * wide + region[0] - x);
      }
      return whole;
    });
  }

  return { fitted };
})();
