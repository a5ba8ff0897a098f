"use strict";
(() => {
  const meta = JSON.parse(document.getElementById("meta").textContent);
  const make = (name, text, type) => {
    const element = document.createElement(name);
    if (text !== undefined) element.textContent = text;
    if (type) element.className = type;
    return element;
  };

  // ---- The packed tables: see tables.py.
  let unpacked = null;
  async function unpack() {
    const text = document.getElementById("packed").textContent.trim();
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    const content = new Uint8Array(await new Response(stream).arrayBuffer());
    const length = new DataView(content.buffer).getUint32(0, true);
    const header = JSON.parse(new TextDecoder().decode(content.subarray(4, 4 + length)));
    let at = 4 + length;
    const tables = {};
    for (const [name, told] of Object.entries(header.tables)) {
      const table = { rows: told.rows };
      for (const column of told.columns) {
        const values = new Int32Array(told.rows);
        for (let plane = 0; plane < 4; plane++) {
          for (let row = 0; row < told.rows; row++) values[row] |= content[at + row] << (8 * plane);
          at += told.rows;
        }
        table[column.name] = column.scale === 1 ? values : Float64Array.from(values, (value) => value / column.scale);
      }
      tables[name] = table;
    }
    return { tables, texts: header.texts };
  }
  const data = () => (unpacked ??= unpack());

  // ---- Tables that sort.
  function sortBy(button) {
    const head = button.closest("th");
    const table = head.closest("table");
    const index = [...head.parentNode.children].indexOf(head);
    const isNumber = head.classList.contains("number");
    const before = head.getAttribute("aria-sort");
    const down = before ? before === "ascending" : isNumber;
    for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = (row) => {
      const cell = row.children[index];
      const text = cell.dataset.value ?? cell.textContent.trim();
      return isNumber ? Number.parseFloat(text.replaceAll(",", "")) : text;
    };
    const body = table.tBodies[0];
    const rows = [...body.rows].map((row) => [value(row), row]);
    rows.sort(([a], [b]) => {
      if (!isNumber) return (down ? -1 : 1) * a.localeCompare(b, undefined, { numeric: true });
      // Undefined numbers come last in both directions.
      if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b);
      return down ? b - a : a - b;
    });
    body.append(...rows.map(([, row]) => row));
  }

  // ---- Lists behind the counts.
  const PAGE = 200;
  const list = document.getElementById("list");
  let rest = [];
  let columns = [];
  function showMore() {
    const body = list.querySelector("tbody");
    for (const row of rest.splice(0, PAGE)) {
      const line = make("tr");
      for (const [, kind, text] of columns) line.append(make("td", text(row), kind));
      body.append(line);
    }
    document.getElementById("list-more").hidden = rest.length === 0;
  }
  const fixed = (value, digits) => value.toFixed(digits);
  function columnsOf(name, table, texts) {
    const box = (row) => ["x1", "y1", "x2", "y2"].map((side) => fixed(table[side][row], 1)).join(", ");
    const label = (row, column = "label") => texts.classes[table[column][row]] ?? "";
    const known = {
      file: ["image", "text", (row) => texts.images[table.image[row]]],
      split: ["split", "text", (row) => texts.splits[table.split[row]]],
      label: ["class", "text", (row) => label(row)],
      score: ["score", "number", (row) => fixed(table.score[row], 3)],
      box: ["box x1, y1, x2, y2", "number", box],
      kind: ["kind", "text", (row) => meta.kinds[table.kind[row]]],
      truth: ["labelled", "text", (row) => label(row, "truth")],
      iou: ["IoU", "number", (row) => fixed(table.iou[row], 2)],
      side: ["side, pixels", "number", (row) => fixed(table.side[row], 1)],
      aspect: ["height / width", "number", (row) => fixed(table.aspect[row], 2)],
      width: ["width", "number", (row) => String(table.width[row])],
      height: ["height", "number", (row) => String(table.height[row])],
      objects: ["objects", "number", (row) => String(table.objects[row])],
      detected: ["detections", "number", (row) => String(table.detected[row])],
      where: ["where", "text", (row) => texts.places[table.place[row]]],
      first: [meta.first ?? "", "number", (row) => fixed(table.first[row], 2)],
      second: [meta.second ?? "", "number", (row) => fixed(table.second[row], 2)],
    };
    return meta.lists[name].map((column) => known[column]);
  }
  async function openList(button) {
    const { table: name, where, total, title } = button.dataset;
    document.getElementById("list-title").textContent = title;
    const note = document.getElementById("list-note");
    const [head, body] = [list.querySelector("thead"), list.querySelector("tbody")];
    head.replaceChildren();
    body.replaceChildren();
    rest = [];
    note.textContent = "Reading the list";
    document.getElementById("list-more").hidden = true;
    list.showModal();
    try {
      const { tables, texts } = await data();
      const table = tables[name];
      const limits = JSON.parse(where);
      const found = [];
      for (let row = 0; row < table.rows; row++) {
        if (limits.every(([column, low, high]) => table[column][row] >= low && table[column][row] <= high)) found.push(row);
      }
      if (table.score) found.sort((a, b) => table.score[b] - table.score[a]);
      columns = columnsOf(name, table, texts);
      const line = make("tr");
      for (const [words, kind] of columns) {
        const cell = make("th", words, kind);
        cell.scope = "col";
        line.append(cell);
      }
      head.append(line);
      const all = Number(total);
      note.textContent = found.length === all
        ? `${all.toLocaleString("en")} in all.`
        : `${found.length.toLocaleString("en")} of ${all.toLocaleString("en")} are listed; this page has no room for the others.`;
      rest = found;
      showMore();
    } catch (error) {
      note.textContent = `This browser cannot read the list (${error.name}). It needs DecompressionStream, which browsers have since 2023.`;
    }
  }

  // ---- Pictures.
  function enlarge(button) {
    const figure = button.closest("figure");
    const body = document.getElementById("large-body");
    const caption = figure.querySelector("figcaption");
    const words = make("p");
    words.append(...[...caption.children].flatMap((part) => [make("span", part.textContent), make("br")]));
    body.replaceChildren(button.querySelector("svg").cloneNode(true), words);
    document.getElementById("large").showModal();
  }
  const AT_ONCE = 48;
  function filterPictures(form, most = AT_ONCE) {
    const gallery = document.getElementById(form.dataset.gallery);
    const [kind, label, score] = ["kind", "class", "score"].map((name) => form.elements[name]?.value ?? "");
    let shown = 0;
    let opened = 0;
    for (const figure of gallery.children) {
      const is = (kind === "" || figure.dataset.kind === kind) && (label === "" || figure.dataset.class === label)
        && Number(figure.dataset.score) >= Number(score || 0);
      figure.hidden = !is || opened >= most;
      shown += is;
      opened += !figure.hidden;
    }
    const more = document.querySelector(`[data-more="${form.dataset.gallery}"]`);
    more.hidden = opened === shown;
    more.textContent = `Open ${Math.min(AT_ONCE, shown - opened)} more pictures (${(shown - opened).toLocaleString("en")} left)`;
    more.onclick = () => filterPictures(form, most + AT_ONCE);
    let all = 0;
    for (const [group, of, counts] of meta.groups) {
      if ((kind === "" || String(group) === kind) && (label === "" || String(of) === label)) {
        all += counts[Math.round(Number(score || 0) * 20)] ?? 0;
      }
    }
    const output = form.querySelector("output.score");
    if (output) output.textContent = Number(score || 0).toFixed(2);
    document.querySelector(`[data-of="${form.dataset.gallery}"]`).textContent = all === 0
      ? "Nothing of this kind."
      : `${shown.toLocaleString("en")} of ${all.toLocaleString("en")} are here as pictures, ${(all - shown).toLocaleString("en")} are not: at most ${meta.most} per kind and class, the worst ones.`;
  }

  // ---- Curves of one class.
  async function showClass(select) {
    const { tables } = await data();
    const table = tables.curves;
    const [left, right, top, bottom] = meta.plot;
    for (const curve of ["precision", "f1"]) {
      const points = [];
      for (let row = 0; row < table.rows && select.value !== ""; row++) {
        if (table.label[row] !== Number(select.value)) continue;
        const [x, y] = [table.step[row] / 100, table[curve][row] / 1000];
        points.push(`${(left + x * (right - left)).toFixed(1)},${(bottom - y * (bottom - top)).toFixed(1)}`);
      }
      document.querySelector(`[data-line="${curve}"]`).setAttribute("points", points.join(" "));
    }
  }
  async function showPlaces(select) {
    for (const part of document.querySelectorAll(`[data-places="${select.dataset.for}"] > *`)) {
      part.hidden = part.dataset.class !== select.value;
    }
  }

  document.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) {
      if (event.target instanceof HTMLDialogElement) event.target.close(); // the backdrop
    } else if (button.classList.contains("sort")) sortBy(button);
    else if (button.classList.contains("count")) openList(button);
    else if (button.classList.contains("enlarge")) enlarge(button);
    else if (button.id === "list-more") showMore();
    else if ("close" in button.dataset) button.closest("dialog").close();
  });
  for (const form of document.querySelectorAll("form.filters")) {
    form.addEventListener("submit", (event) => event.preventDefault());
    if (form.dataset.gallery) {
      form.addEventListener("input", () => filterPictures(form));
      filterPictures(form);
    }
  }
  for (const select of document.querySelectorAll("select[data-curves]")) {
    select.addEventListener("change", () => showClass(select));
  }
  for (const select of document.querySelectorAll("select[data-for]")) {
    select.addEventListener("change", () => showPlaces(select));
  }
})();
