"use strict";
// The page works without this, but for the filters; serve.py's page is edited by it.

const all = (selector, inside = document) => [...inside.querySelectorAll(selector)];
const byId = (id) => document.getElementById(id);
const cards = all(".card");
const search = byId("search");
const sort = byId("sort");
const chips = all(".chips input");
const editable = document.body.classList.contains("editable");
const pictureFlags = chips.filter((chip) => chip.closest(".shape")).map((chip) => chip.value);
const texts = new Map(); // what a card is searched by

function index(card) {
  const caption = editable ? card.querySelector("textarea").value : "";
  texts.set(card, `${card.textContent} ${caption} ${card.dataset.name}`.toLowerCase());
}

const flagsOf = (card) => JSON.parse(card.dataset.flags);

function filter() {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  const wanted = chips.filter((chip) => chip.checked).map((chip) => chip.value);
  let shown = 0;
  for (const card of cards) {
    const flags = wanted.length ? flagsOf(card) : [];
    const fits = words.every((word) => texts.get(card).includes(word));
    card.hidden = !fits || (wanted.length > 0 && !wanted.some((flag) => flags.includes(flag)));
    shown += card.hidden ? 0 : 1;
  }
  byId("shown").textContent = shown === cards.length ? `${shown} pictures` : `${shown} of ${cards.length} pictures`;
  byId("nothing").hidden = shown > 0 || cards.length === 0;
}

function reorder() {
  const down = sort.value.startsWith("-") || sort.value === "cropped" ? -1 : 1;
  const key = sort.value.replace("-", "");
  const order = key ? [...cards].sort((a, b) => down * (a.dataset[key] - b.dataset[key])) : cards;
  byId("cards").append(...order);
}

function count() {
  const kept = cards.filter((card) => !card.classList.contains("dropped"));
  const flags = kept.map(flagsOf);
  for (const chip of chips) {
    const number = flags.filter((some) => some.includes(chip.value)).length;
    chip.closest("label").hidden = number === 0 && !chip.checked;
    chip.closest("label").querySelector("b").textContent = number;
  }
  const toCheck = flags.filter((some) => some.some((flag) => !pictureFlags.includes(flag))).length;
  byId("kept").textContent = kept.length;
  byId("check").className = toCheck ? "warn" : "good";
  byId("check").querySelector("dd").textContent = toCheck;
}

function clear() {
  search.value = "";
  for (const chip of chips) chip.checked = false;
  filter();
}

function begin() {
  cards.forEach(index);
  document.querySelector(".tools").hidden = cards.length === 0;
  filter();
  let waiting = 0;
  search.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(filter, 60);
  });
  for (const chip of chips) chip.addEventListener("change", filter);
  sort.addEventListener("change", reorder);
  byId("frames").addEventListener("change", (event) => {
    document.body.classList.toggle("unframed", !event.target.checked);
  });
  byId("clear").addEventListener("click", clear);
  for (const button of all("[data-word]")) {
    button.addEventListener("click", () => {
      search.value = button.dataset.word;
      filter();
      byId("pictures").scrollIntoView();
    });
  }
  document.addEventListener("keydown", (event) => {
    if (event.key === "/" && !/^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName)) {
      event.preventDefault();
      search.focus();
    } else if (event.key === "Escape" && event.target === search) {
      clear();
    }
  });
}

// --- editing: each change is a request to the server that this page is from ---

async function post(action, content) {
  const token = location.pathname.split("/")[1];
  const headers = { "Content-Type": "application/json", "X-Minisd-Token": token };
  let answer;
  try {
    answer = await fetch(action, { method: "POST", headers, body: JSON.stringify(content) });
  } catch {
    throw new Error("Not saved: prepare_data.py serve has ended. Start it again, and open its new address.");
  }
  const said = await answer.json();
  if (answer.ok) return said;
  throw Object.assign(new Error(said.error), { caption: said.caption });
}

function say(place, text, kind) {
  place.textContent = text;
  place.className = kind;
}

function showFlags(card, flags, tokens) {
  card.dataset.flags = JSON.stringify(flags);
  card.dataset.tokens = tokens;
  card.querySelector(".tokens").textContent = tokens;
  card.querySelector(".flags").replaceChildren(
    ...flags.map((flag) => {
      const item = document.createElement("li");
      const chip = chips.find((other) => other.value === flag);
      item.textContent = flag;
      item.title = chip ? chip.closest("label").title : "";
      item.classList.toggle("shape", pictureFlags.includes(flag));
      return item;
    }),
  );
}

const unsaved = []; // a question for each caption

function edit(card) {
  const field = card.querySelector("textarea");
  const place = card.querySelector(".edit output");
  const button = card.querySelector(".drop");
  let saved = field.value;
  let conflict = false; // somebody else has changed it: from then on only Ctrl-Enter saves, knowingly
  let last = Promise.resolve(); // changes of one caption go one after the other

  async function save() {
    const text = field.value;
    if (text === saved || field.disabled) return;
    say(place, "Saving ...", "");
    try {
      const said = await post("caption", { file_name: card.dataset.name, before: saved, text });
      saved = said.caption;
      conflict = false;
      const newer = field.value !== text;
      if (!newer) field.value = said.caption;
      showFlags(card, said.flags, said.tokens);
      index(card);
      count();
      say(place, newer ? "Not saved yet" : "Saved", newer ? "" : "good");
    } catch (error) {
      say(place, error.message, "bad");
      if (error.caption !== undefined) {
        saved = error.caption;
        conflict = true;
      }
    }
  }

  field.addEventListener("input", () => say(place, field.value === saved ? "" : "Not saved yet", ""));
  field.addEventListener("blur", () => {
    if (!conflict) last = last.then(save);
  });
  field.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      last = last.then(save);
    } else if (event.key === "Escape") {
      field.value = saved;
      conflict = false;
      say(place, "", "");
    }
  });
  unsaved.push(() => !field.disabled && field.value !== saved);
  button.addEventListener("click", async () => {
    const isDropped = card.classList.contains("dropped");
    button.disabled = true;
    try {
      await last;
      await post(isDropped ? "restore" : "drop", { file_name: card.dataset.name });
      card.classList.toggle("dropped");
      field.disabled = !isDropped;
      button.textContent = isDropped ? "Drop" : "Restore";
      count();
      say(place, isDropped ? "Restored" : "Dropped", "good");
    } catch (error) {
      say(place, error.message, "bad");
    }
    button.disabled = false;
  });
}

function restorable(row) {
  const button = row.querySelector(".restore");
  button.addEventListener("click", async () => {
    const place = row.querySelector("output");
    button.disabled = true;
    try {
      await post("restore", { file_name: row.dataset.name });
      button.remove();
      say(place, "Restored. Reload the page to see it.", "good");
    } catch (error) {
      button.disabled = false;
      say(place, error.message, "bad");
    }
  });
}

begin();
if (editable) {
  cards.forEach(edit);
  all(".outs [data-name]").forEach(restorable);
  addEventListener("beforeunload", (event) => {
    if (unsaved.some((asked) => asked())) event.preventDefault();
  });
}
