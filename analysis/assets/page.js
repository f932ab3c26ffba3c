"use strict";
(() => {
  // Nothing here makes markup out of text: cells are moved, hidden and read, never parsed.
  const UNKNOWN = "–";
  const collator = new Intl.Collator("en", { numeric: true });

  // ---- Sorting -------------------------------------------------------------------------------

  /** What a cell sorts by: a number, a text, or null where it has neither. */
  function keyOf(cell) {
    const number = cell.getAttribute("data-number");
    return number === null ? cell.getAttribute("data-key") : Number(number);
  }

  /** Numbers come before texts. Equal infinities differ by NaN, which sorts as equal. */
  function compare(a, b) {
    if (typeof a === "number" && typeof b === "number") return a - b;
    if (typeof a === "string" && typeof b === "string") return collator.compare(a, b);
    return typeof a === "number" ? -1 : 1;
  }

  /** Rows by a column; equal ones keep their order, and those without a key come last always. */
  function sorted(rows, column, sign) {
    const keyed = rows.map((row) => ({ row, key: keyOf(row.cells[column]) }));
    keyed.sort((a, b) => {
      if (a.key === null || b.key === null) return (a.key === null) - (b.key === null);
      return sign * compare(a.key, b.key);
    });
    return keyed.map((pair) => pair.row);
  }

  /** Emptied first: taking rows out one by one, in any order but theirs, is quadratic. */
  function putInOrder(body, rows) {
    body.replaceChildren();
    const fragment = document.createDocumentFragment();
    for (const row of rows) fragment.append(row);
    body.append(fragment);
  }

  const isGroup = (row) => row.classList.contains("group");
  const isEntry = (row) => !isGroup(row);

  /** Rows in groups, each with its head, if it has one, in front. */
  function groupsOf(rows) {
    const groups = [];
    for (const row of rows) {
      if (isGroup(row) || groups.length === 0) groups.push([]);
      groups.at(-1).push(row);
    }
    return groups;
  }

  /** Sorted within their groups, whose heads stay where they are. */
  function sortedInGroups(rows, column, sign) {
    return groupsOf(rows).flatMap((group) => [
      ...group.filter(isGroup),
      ...sorted(group.filter(isEntry), column, sign),
    ]);
  }

  /** A heading's button goes through: ascending, descending, as the page came. */
  function makeSortable(table, original) {
    const body = table.tBodies[0];
    const headings = [...table.tHead.rows[0].cells];
    for (const heading of headings) {
      heading.querySelector("button").addEventListener("click", () => {
        const before = heading.getAttribute("aria-sort");
        const after = { ascending: "descending", descending: null }[before];
        const direction = after === undefined ? "ascending" : after;
        for (const other of headings) other.removeAttribute("aria-sort");
        if (direction) heading.setAttribute("aria-sort", direction);
        const sign = direction === "descending" ? -1 : 1;
        const rows = [...body.rows];
        putInOrder(body, direction ? sortedInGroups(rows, heading.cellIndex, sign) : original);
      });
    }
  }

  // ---- Filtering -----------------------------------------------------------------------------

  /** A row stays if each word is somewhere in it and each chosen column says what was chosen. */
  function makeFilterable(figure, table, rows) {
    const search = figure.querySelector("input[type=search]");
    const selects = [...figure.querySelectorAll("select")];
    const count = figure.querySelector(".count");
    // Lines part the cells, so that no word is found across two of them.
    const textOf = (row) => [...row.cells].map((cell) => cell.textContent).join("\n").toLowerCase();
    let texts = null;

    function apply() {
      const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      const chosen = selects
        .filter((select) => select.selectedIndex > 0)
        .map((select) => ({ column: Number(select.dataset.column), text: select.value }));
      texts ??= rows.map(textOf);
      let kept = 0;
      rows.forEach((row, index) => {
        const stays =
          words.every((word) => texts[index].includes(word)) &&
          chosen.every(({ column, text }) => row.cells[column].textContent === text);
        if (row.hidden === stays) row.hidden = !stays;
        if (stays) kept += 1;
      });
      for (const [first, ...own] of groupsOf(table.tBodies[0].rows)) {
        if (isGroup(first)) first.hidden = own.every((row) => row.hidden);
      }
      count.textContent = `${kept} of ${rows.length} rows`;
    }

    search.addEventListener("input", apply);
    for (const select of selects) select.addEventListener("change", apply);
    // A browser that comes back to a page may fill in what was typed before.
    if (search.value || selects.some((select) => select.selectedIndex > 0)) apply();
  }

  // ---- Copying -------------------------------------------------------------------------------

  /** A field of CSV. A spreadsheet would run what begins like a formula, unless it is a number. */
  function field(text) {
    if (text === UNKNOWN) return "";
    const isFormula = /^[=+\-@\t\r]/.test(text) && !/^[+-]?[\d.]+(e[+-]?\d+)?%?$/i.test(text);
    const safe = isFormula ? `'${text}` : text;
    return /[",\r\n]/.test(safe) || isFormula ? `"${safe.replaceAll('"', '""')}"` : safe;
  }

  /** Rows in view; where they stand in groups, a last column says in which. */
  function csvOf(table) {
    const lines = [];
    const groups = groupsOf(table.tBodies[0].rows);
    const hasGroups = groups.some(([first]) => isGroup(first));
    const write = (row, group) => {
      const texts = [...row.cells].map((cell) => cell.textContent);
      lines.push([...texts, ...(hasGroups ? [group] : [])].map(field).join(","));
    };
    write(table.tHead.rows[0], "Group");
    for (const group of groups) {
      const name = isGroup(group[0]) ? group[0].textContent : "";
      for (const row of group) if (isEntry(row) && !row.hidden) write(row, name);
    }
    return { text: `${lines.join("\r\n")}\r\n`, num: lines.length - 1 };
  }

  /** Where the clipboard is closed: the text, selected, for the reader to copy. */
  function offer(controls, text) {
    controls.parentElement.querySelector(".offer")?.remove();
    const box = document.createElement("div");
    const label = document.createElement("label");
    const area = document.createElement("textarea");
    const close = document.createElement("button");
    box.className = "offer";
    label.textContent = "The clipboard is closed to this page: copy the selected text yourself.";
    area.readOnly = true;
    area.rows = 6;
    area.value = text;
    close.type = "button";
    close.textContent = "Close";
    close.addEventListener("click", () => {
      box.remove();
      controls.querySelector(".copy").focus();
    });
    label.append(area);
    box.append(label, close);
    controls.after(box);
    area.focus();
    area.select();
  }

  function makeCopyable(figure, table) {
    const controls = figure.querySelector(".controls");
    const button = controls.querySelector(".copy");
    const label = button.textContent;
    button.addEventListener("click", async () => {
      const { text, num } = csvOf(table);
      try {
        await navigator.clipboard.writeText(text);
        button.textContent = `Copied ${num} rows`;
        setTimeout(() => { button.textContent = label; }, 2000);
      } catch {
        offer(controls, text);
      }
    });
  }

  for (const figure of document.querySelectorAll("figure.table")) {
    const table = figure.querySelector("table");
    const rows = [...table.tBodies[0].rows];
    makeSortable(table, rows);
    makeFilterable(figure, table, rows.filter(isEntry));
    makeCopyable(figure, table);
    figure.querySelector(".controls").hidden = false;
  }

  // ---- Theme: the system's, until the reader chooses; forgotten with the page ------------------

  const root = document.documentElement;
  const systemIsDark = matchMedia("(prefers-color-scheme: dark)");
  const toggle = document.querySelector("button.theme");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : systemIsDark.matches);
  const sayTheme = () => { toggle.textContent = isDark() ? "Light theme" : "Dark theme"; };
  toggle.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    sayTheme();
  });
  systemIsDark.addEventListener("change", sayTheme);
  sayTheme();
  toggle.hidden = false;

  // ---- Folded parts: a link opens the way to its place, and paper shows everything -------------

  function openTheWay(hash) {
    const target = document.getElementById(hash.slice(1));
    for (let node = target; node; node = node.parentElement) {
      if (node.localName === "details") node.open = true;
    }
    return target;
  }
  for (const link of document.querySelectorAll("nav a")) {
    link.addEventListener("click", () => openTheWay(link.hash));
  }
  addEventListener("hashchange", () => openTheWay(location.hash)?.scrollIntoView());
  openTheWay(location.hash)?.scrollIntoView();

  for (const button of document.querySelectorAll("button.unfold")) {
    const parts = [...button.parentElement.querySelectorAll(":scope > details.part")];
    const say = () => {
      button.textContent = parts.every((part) => part.open) ? "Close all" : "Open all";
    };
    button.addEventListener("click", () => {
      const open = !parts.every((part) => part.open);
      for (const part of parts) part.open = open;
      say();
    });
    for (const part of parts) part.addEventListener("toggle", say);
    button.hidden = false;
  }

  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open])")];
    for (const details of opened) details.open = true;
  });
  addEventListener("afterprint", () => {
    for (const details of opened) details.open = false;
  });

  // ---- Where the reader is ---------------------------------------------------------------------

  const inView = new Set();
  const sections = [...document.querySelectorAll("main > section")];
  const watcher = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) inView[entry.isIntersecting ? "add" : "delete"](entry.target);
      const here = sections.find((section) => inView.has(section));
      for (const link of document.querySelectorAll("nav > ul > li > a")) {
        if (here && link.hash === `#${here.id}`) link.setAttribute("aria-current", "true");
        else link.removeAttribute("aria-current");
      }
    },
    { rootMargin: "-10% 0px -60% 0px" },
  );
  for (const section of sections) watcher.observe(section);
})();
