// One image of a page in a dialog: zoomed, as crop, heat map or whole image, with its numbers, to save, copy and link to.
// An item is {id, title, alt, views: [[key, text]], view(key), heat(), facts: [[name, nodes]], name, link}: `view` returns a view of
// pixels.js, `heat` a promise of its heat map, `name` is the name of a saved file, and `link` the address that opens the item.
ATLAS.lightbox = (function () {
  "use strict";

  const { make, find, number, remember, remembered, magnifier, pixels } = ATLAS;
  let parts = null;
  let items = [];
  let at = 0;
  let key = "crop";
  let opener = null;
  let latest = 0;
  let heat = null; // of the item that is shown, if its heat map is
  let opacity = Number(remembered("heat-opacity") ?? 1);
  const SWIPE = 40; // pixels
  const STEP = 0.15; // of the image, for each key press

  const item = () => items[at];
  const keyOf = (shown) => (shown.views.some(([name]) => name === key) ? key : (shown.views[0] || [""])[0]);
  const isOpen = () => Boolean(parts && parts.dialog.open);

  // ---------------------------------------------------------------------- parts

  function build() {
    const button = (text, title, onclick, more) => make("button", { type: "button", text, title, onclick, ...more });
    const found = {
      title: make("h2", { id: "lightbox-title", tabindex: "-1" }), count: make("span", { class: "count" }),
      lens: make("div", { class: "lens", role: "img" }), views: make("div", { class: "toggle", role: "radiogroup", "aria-label": "Part of the dataset image to show" }),
      facts: make("dl", {}), scale: make("div", { class: "color-scale" }),
      before: button("← Previous", "Previous image (←)", () => go(-1)), after: button("Next →", "Next image (→)", () => go(1)),
    };
    const slider = make("input", { type: "range", min: "0", max: "1", step: "0.05", value: String(opacity), "aria-label": "Opacity of the heat map" });
    slider.addEventListener("input", () => { opacity = Number(slider.value); remember("heat-opacity", slider.value); fade(); });
    found.heat = make("div", { class: "heat-tools" }, make("label", {}, "Opacity ", slider), found.scale);
    const act = (run) => () => run(pixels.canvasOf(item().view(keyOf(item())), keyOf(item()) === "heat" ? heat : null, opacity), item().name);
    found.dialog = make("dialog", { id: "lightbox", "aria-labelledby": "lightbox-title" },
      make("div", { class: "head" }, found.title, found.count, button("Close", "Esc", () => found.dialog.close())),
      make("div", { class: "stage-of" }, found.lens),
      make("div", { class: "side" },
        make("div", { class: "tools-of" }, found.before, found.after, button("+", "Zoom in (+)", () => magnifier.zoom(1.5), { "aria-label": "Zoom in" }),
          button("−", "Zoom out (−)", () => magnifier.zoom(1 / 1.5), { "aria-label": "Zoom out" }), button("Reset", "Reset the zoom (0)", magnifier.whole)),
        found.views, found.heat, found.facts,
        make("div", { class: "tools-of" }, button("Save PNG", "The image as it is shown, without zoom", act(pixels.savePng)), button("Copy image", "The image as it is shown, without zoom", act(pixels.copyPng)),
          button("Copy link", "The address of this image", () => ATLAS.copyText(item().link + (item().views.length > 1 ? "&view=" + keyOf(item()) : ""), "link"))),
        make("p", { class: "note", text: "Scroll, pinch or + and − zoom; drag or Shift with arrow keys moves; ← and →, or a swipe, change the image." }),
        make("p", { class: "says", role: "status", "aria-live": "polite" })));
    magnifier.add(found.lens);
    swiped(found.lens);
    found.dialog.addEventListener("keydown", pressed);
    found.dialog.addEventListener("click", (event) => { if (event.target === found.dialog) found.dialog.close(); });
    found.dialog.addEventListener("close", () => { latest++; magnifier.whole(); if (opener && opener.isConnected) opener.focus(); });
    document.body.append(found.dialog);
    return found;
  }

  // A finger that moves sideways over an image that is not zoomed goes to the next or previous one.
  function swiped(lens) {
    let from = null;
    lens.addEventListener("pointerdown", (event) => { from = event.pointerType === "touch" && event.isPrimary && magnifier.view.scale === 1 ? [event.clientX, event.clientY] : null; });
    lens.addEventListener("pointercancel", () => { from = null; });
    lens.addEventListener("pointerup", (event) => {
      if (!from || !event.isPrimary || magnifier.view.scale > 1) return;
      const [x, y] = [event.clientX - from[0], event.clientY - from[1]];
      from = null;
      if (Math.abs(x) > SWIPE && Math.abs(x) > 2 * Math.abs(y)) go(x < 0 ? 1 : -1);
    });
  }

  function pressed(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const own = event.target.closest("input"); // a slider or a radio button
    const arrow = { ArrowLeft: [1, 0], ArrowRight: [-1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
    if (own && arrow) return;
    if (arrow && event.shiftKey) magnifier.move(STEP * arrow[0], STEP * arrow[1]);
    else if (event.key === "ArrowLeft") go(-1);
    else if (event.key === "ArrowRight") go(1);
    else if (event.key === "+" || event.key === "=") magnifier.zoom(1.5);
    else if (event.key === "-" || event.key === "−") magnifier.zoom(1 / 1.5);
    else if (event.key === "0") magnifier.whole();
    else return;
    event.preventDefault();
  }

  // ----------------------------------------------------------------------- show

  function go(by) {
    if (at + by < 0 || at + by >= items.length) return;
    at += by;
    magnifier.whole();
    draw();
  }
  function fade() { if (heat) heat.canvas.style.opacity = String(opacity); }

  function draw() {
    const shown = item();
    const now = keyOf(shown);
    const view = shown.view(now);
    const turn = ++latest;
    const box = pixels.element(view);
    const { lens } = parts;
    heat = null;
    parts.title.textContent = shown.title;
    parts.count.textContent = at + 1 + " of " + items.length;
    parts.before.disabled = at === 0;
    parts.after.disabled = at === items.length - 1;
    lens.setAttribute("aria-label", shown.alt);
    lens.style.aspectRatio = String(view.aspect);
    lens.style.setProperty("--aspect", view.aspect);
    lens.replaceChildren(box);
    parts.views.replaceChildren(...(shown.views.length > 1 ? shown.views.flatMap(([name, text]) => [
      make("input", { type: "radio", name: "lightbox-view", id: "lightbox-" + name, value: name, checked: name === now, onchange: () => { key = name; draw(); find("#lightbox-" + name).focus(); } }),
      make("label", { for: "lightbox-" + name, text })]) : []));
    parts.facts.replaceChildren(...shown.facts.flatMap(([name, ...nodes]) => [make("dt", { text: name }), make("dd", {}, nodes)]));
    parts.heat.hidden = true;
    if (now === "heat") {
      shown.heat().then((found) => {
        if (turn !== latest || !found) return;
        heat = found;
        fade();
        box.append(pixels.placed(found.canvas, view.area));
        const { low, high } = found;
        // Near an end, the zero would be written over its value.
        const zero = -low / (high - low);
        const ends = zero > 0.15 && zero < 0.85 ? [low, 0, high] : [low, high];
        const marks = ends.map((v) => { const mark = make("span", { text: number(v) }); mark.style.left = (100 * (v - low)) / (high - low || 1) + "%"; return mark; });
        parts.scale.replaceChildren(pixels.colorBar(low, high), make("div", { class: "ends" }, marks),
          found.note ? make("p", { class: "note", text: found.note }) : "");
        parts.heat.hidden = false;
      }).catch(() => {});
    }
    if (view.field) box.append(pixels.frameOf(view.field, false));
    magnifier.apply();
  }

  // Open the item `id` of `all`, as the view `first` if it has it; `from` gets the focus when the dialog is closed.
  function open(all, id, first, from) {
    const place = all.findIndex((one) => one.id === id);
    if (place < 0) return false;
    parts = parts || build();
    [items, at, key, opener] = [all, place, first || key, from];
    if (!parts.dialog.open) parts.dialog.showModal();
    draw();
    parts.title.focus();
    return true;
  }
  const close = () => { if (isOpen()) { opener = null; parts.dialog.close(); } };

  return { open, close };
})();
