/* Sorting, filtering, unit and hash of clbench pages. The page is complete without it. */
"use strict";
(() => {
  const tables = [...document.querySelectorAll("table[data-sortable]")].map((table) => ({
    body: table.tBodies[0],
    rows: [...table.tBodies[0].rows],
    heads: [...table.querySelectorAll("th[data-key]")],
    name: table.dataset.sortable || "sort",
    first: { key: table.dataset.sort, order: "ascending" },
    sort: { key: table.dataset.sort, order: "ascending" },
  }));
  const fields = [...document.querySelectorAll("[data-filter]")];
  const units = [...document.querySelectorAll("input[name=unit]")];
  const status = document.querySelector("[role=status]");

  const unit = () => (units.find((u) => u.checked) || { value: "nats" }).value;

  function valueOf(row, column) {
    const cell = row.cells[column];
    const raw = cell.dataset[unit()] ?? cell.dataset.v ?? cell.textContent.trim();
    if (raw === "") return null;
    const number = Number(raw);
    return Number.isNaN(number) ? raw.toLowerCase() : number;
  }

  function compare(a, b, order) {
    if (a === null || b === null) return (a === null) - (b === null);
    const found = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
    return order === "descending" ? -found : found;
  }

  function showSort({ body, rows, heads, sort }) {
    const column = heads.findIndex((head) => head.dataset.key === sort.key);
    if (column < 0) return;
    heads.forEach((head, i) => i === column ? head.setAttribute("aria-sort", sort.order) : head.removeAttribute("aria-sort"));
    const keyed = rows.map((row, i) => [valueOf(row, column), i, row]);
    keyed.sort((x, y) => compare(x[0], y[0], sort.order) || x[1] - y[1]);
    body.append(...keyed.map((k) => k[2]));
  }

  function showFilter() {
    for (const { rows } of tables) {
      for (const row of rows) {
        row.hidden = !fields.every((field) => {
          const wanted = field.value.trim().toLowerCase();
          const has = row.dataset[field.dataset.filter].toLowerCase();
          return field.type === "search" ? wanted.split(/\s+/).every((word) => has.includes(word)) : !wanted || has === wanted;
        });
      }
    }
    const rows = tables.length ? tables[0].rows : [];
    const shown = rows.filter((row) => !row.hidden).length;
    if (status) status.textContent = `${shown} of ${rows.length} ${rows.length === 1 ? "method" : "methods"}`;
  }

  function writeHash() {
    const state = new URLSearchParams();
    for (const { name, sort, first } of tables) {
      if (sort.key !== first.key || sort.order !== first.order) state.set(name, `${sort.key},${sort.order}`);
    }
    for (const field of fields) if (field.value) state.set(field.dataset.filter, field.value);
    if (units.length && unit() !== "nats") state.set("unit", unit());
    const hash = state.toString();
    if (hash !== location.hash.slice(1)) history.replaceState(null, "", hash ? `#${hash}` : location.pathname + location.search);
  }

  function readHash() {
    const state = new URLSearchParams(location.hash.slice(1));
    if (![...state.values()].some(Boolean)) return;
    for (const one of tables) {
      const [key, order] = (state.get(one.name) || "").split(",");
      if (one.heads.some((head) => head.dataset.key === key)) one.sort = { key, order: order === "descending" ? order : "ascending" };
    }
    for (const field of fields) {
      const value = state.get(field.dataset.filter) || "";
      if (field.type === "search" || [...field.options].some((o) => o.value === value)) field.value = value;
    }
    for (const input of units) input.checked = input.value === (state.get("unit") || "nats");
  }

  function show() {
    tables.forEach(showSort);
    if (tables.length) showFilter();
  }

  readHash();
  for (const part of document.querySelectorAll("[data-script]")) part.hidden = false;
  for (const one of tables) {
    for (const head of one.heads) {
      const button = head.querySelector("button");
      button.disabled = false;
      button.addEventListener("click", () => {
        const again = one.sort.key === head.dataset.key && one.sort.order === "ascending";
        one.sort = { key: head.dataset.key, order: again ? "descending" : "ascending" };
        showSort(one);
        writeHash();
      });
    }
  }
  for (const field of fields) field.addEventListener("input", () => { showFilter(); writeHash(); });
  for (const input of units) input.addEventListener("change", () => { show(); writeHash(); });
  addEventListener("hashchange", () => { readHash(); show(); });
  for (const button of document.querySelectorAll("[data-copy]")) {
    button.addEventListener("click", async () => {
      const source = document.getElementById(button.dataset.copy);
      try {
        await navigator.clipboard.writeText(source.textContent.trim());
        button.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(source);
        button.textContent = "Selected";
      }
    });
  }
  show();
})();
