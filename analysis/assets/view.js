"use strict";
// A page of rows at a time, and what the run is doing every two seconds. Texts are never markup.
(() => {
  const LIMIT = 100, WAIT = 2000;
  const by = (id) => document.getElementById(id);
  const asked = { offset: 0, sort: "", down: false };
  let turn = 0;

  const ask = async (path) => {
    const answer = await fetch(path, { cache: "no-store" });
    const found = await answer.json();
    if (!answer.ok) throw new Error(found.error || answer.statusText);
    return found;
  };
  const element = (tag, text) => {
    const made = document.createElement(tag);
    made.textContent = text;
    return made;
  };

  const look = async () => {
    try {
      const found = await ask("/status");
      by("name").textContent = found.name;
      document.title = `${found.name}: ${found.state}`;
      by("state").textContent = found.words[0] || found.state;
      by("done").max = Math.max(1, found.planned);
      by("done").value = found.ended;
      by("cells").textContent = found.words.slice(1, 4).join("; ");
      by("running").replaceChildren(...found.running.map((line) => element("li", line)));
    } catch (error) {
      by("state").textContent = `the view does not answer: ${error.message}`;
    }
    setTimeout(look, WAIT);
  };

  const shown = (value, kind, words) => {
    if (value === null) return kind === "rate" ? "targeted" : "–";
    if (kind === "percent") return (100 * value).toFixed(1);
    if (kind === "rate") return `${Number((100 * value).toPrecision(4))} %`;
    if (kind === "number") return value.toFixed(2);
    if (kind === "status") return words[value] || value;
    return String(value);
  };
  // A list keeps what is chosen, also where a run has added to it meanwhile.
  const offer = (list, names, words) => {
    const there = [...list.options].slice(1).map((option) => option.value);
    if (there.join("\n") === names.join("\n")) return;
    const chosen = list.value;
    list.replaceChildren(list.options[0], ...names.map((name) => {
      const option = element("option", words[name] || name);
      option.value = name;
      return option;
    }));
    list.value = names.includes(chosen) ? chosen : "";
  };

  const load = async () => {
    const mine = ++turn;
    const words = new URLSearchParams(new FormData(by("filters")));
    words.set("offset", asked.offset);
    words.set("limit", LIMIT);
    if (asked.sort) words.set("sort", (asked.down ? "-" : "") + asked.sort);
    let found;
    try {
      found = await ask(`/rows?${words}`);
    } catch (error) {
      by("place").textContent = error.message;
      return;
    }
    if (mine !== turn) return; // an answer that came late
    const options = by("filters").elements.set;
    if (!options.options.length) {
      options.replaceChildren(...found.sets.map((name) => element("option", name)));
      options.value = found.set;
    }
    for (const [name, names] of Object.entries(found.choices)) {
      offer(by("filters").elements[name], names, name === "status" ? found.words : {});
    }
    by("head").replaceChildren(...found.columns.map((name, place) => {
      const cell = document.createElement("th");
      const button = element("button", found.headings[place]);
      button.type = "button";
      button.addEventListener("click", () => {
        asked.down = asked.sort === name && !asked.down;
        asked.sort = name;
        asked.offset = 0;
        load();
      });
      if (asked.sort === name) cell.setAttribute("aria-sort", asked.down ? "descending" : "ascending");
      cell.scope = "col";
      cell.append(button);
      return cell;
    }));
    by("rows").replaceChildren(...found.rows.map((row) => {
      const line = document.createElement("tr");
      line.append(...row.map((value, place) => {
        const kind = found.kinds[place];
        const cell = element("td", shown(value, kind, found.words));
        if (kind !== "text" && kind !== "status") cell.className = "number";
        return cell;
      }));
      return line;
    }));
    const last = found.offset + found.rows.length;
    by("place").textContent = `${found.rows.length ? found.offset + 1 : 0} to ${last} of ${found.total}`;
    by("back").disabled = found.offset === 0;
    by("on").disabled = last >= found.total;
  };

  const turnTo = (offset) => { asked.offset = Math.max(0, offset); load(); };
  by("back").addEventListener("click", () => turnTo(asked.offset - LIMIT));
  by("on").addEventListener("click", () => turnTo(asked.offset + LIMIT));
  let waiting;
  by("filters").addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => turnTo(0), 200);
  });
  by("filters").addEventListener("submit", (event) => event.preventDefault());
  look();
  load();
})();
