// The review sheet: one item at a time, judged by keys or buttons. Verdicts stay in this browser, under this run's key.
"use strict";
(() => {
  const run = JSON.parse(document.getElementById("run").textContent);
  const storageKey = `ftune-review:${run.run}`;
  const find = (id) => document.getElementById(id);
  const articles = [...document.querySelectorAll("article.item")];
  const total = articles.length;
  const fileOrder = articles.map((_, index) => index);
  const rows = new Map(run.items.map((item, index) => [item.row_id, index]));
  const RATINGS = ["good", "bad"];

  let verdicts = new Map(); // row_id -> {best: an answer's key, "none" or null; tuned: "good", "bad" or null; blind}
  let isBlind = false;
  let current = 0;
  const history = []; // what `verdicts` was before each change, and where
  const revealed = new Set(); // rows whose names were shown after a blind choice: an undo cannot make them unknown

  const rowOf = (index) => run.items[index].row_id;
  const verdictOf = (index) => verdicts.get(rowOf(index)) ?? { best: null, tuned: null, blind: false };
  const sequence = () => (isBlind ? run.blind_order : fileOrder);
  const panelsOf = (article) => [...article.querySelectorAll(".answer")];
  const isHidden = (index) => isBlind && verdictOf(index).best === null && !revealed.has(rowOf(index));
  const nameOf = (article, key) => article.querySelector(`[data-key="${key}"]`).dataset.name;

  function keep() {
    try {
      localStorage.setItem(storageKey, JSON.stringify({ ...asDocument(), blind: isBlind, at: rowOf(current) }));
    } catch {
      say("This browser keeps nothing for this page: download the verdicts before you close it.");
    }
  }

  function recall() {
    try {
      const kept = JSON.parse(localStorage.getItem(storageKey) ?? "null");
      if (kept === null) return;
      verdicts = accepted(kept).verdicts;
      isBlind = kept.blind === true;
      current = rows.get(kept.at) ?? sequence()[0];
    } catch {
      say("What this browser kept of an earlier visit could not be read.");
    }
  }

  function asDocument() {
    return {
      format: run.format,
      run: run.run,
      name: run.name,
      verdicts: [...verdicts].map(([row_id, verdict]) => ({ row_id, ...verdict })),
    };
  }

  // The verdicts of a document that fit this sheet, and how many do not. Throws a text when it is another run's.
  function accepted(found) {
    if (found === null || found.format !== run.format || !Array.isArray(found.verdicts)) {
      throw new Error("This is not a file of verdicts.");
    }
    if (found.run !== run.run) throw new Error(`These verdicts are about another run (${found.name}).`);
    const fitting = new Map();
    let others = 0;
    for (const { row_id, best, tuned, blind } of found.verdicts) {
      const keys = ["none", ...(rows.has(row_id) ? run.items[rows.get(row_id)].order : [])];
      const isKnown = rows.has(row_id) && (best === null || keys.includes(best));
      if (isKnown && (tuned === null || RATINGS.includes(tuned))) {
        fitting.set(row_id, { best, tuned, blind: blind === true });
      } else {
        others += 1;
      }
    }
    return { verdicts: fitting, others };
  }

  function say(text) {
    find("status").textContent = text;
  }

  // Names, order, marks and pressed buttons of one item.
  function arrange(index) {
    const article = articles[index];
    const verdict = verdictOf(index);
    const hidden = isHidden(index);
    const panels = new Map(panelsOf(article).map((panel) => [panel.dataset.key, panel]));
    const keys = isBlind ? run.items[index].order : ["zero_shot", "few_shot", "tuned"].filter((key) => panels.has(key));
    if (panelsOf(article).some((panel, place) => panel.dataset.key !== keys[place])) {
      article.querySelector(".answers").append(...keys.map((key) => panels.get(key)));
    }
    panelsOf(article).forEach((panel, place) => {
      const twin = panelsOf(article).findIndex((other) => other.dataset.group === panel.dataset.group);
      panel.querySelector("kbd").textContent = place + 1;
      panel.querySelector(".who").textContent = hidden ? `Answer ${place + 1}` : panel.dataset.name;
      panel.querySelector(".twin").textContent = twin < place ? `same text as answer ${twin + 1}` : "";
      const score = panel.querySelector(".score");
      if (score) score.hidden = hidden;
      press(panel.querySelector(".best"), verdict.best === panel.dataset.key);
      panel.querySelector(".best").setAttribute("aria-label", `Answer ${place + 1} is best`);
      panel.classList.toggle("chosen", verdict.best === panel.dataset.key);
    });
    article.querySelector(".place").textContent = sequence().indexOf(index) + 1;
    article.querySelector(".why").hidden = hidden;
    article.querySelector(".why-later").hidden = !hidden;
    press(article.querySelector(".none"), verdict.best === "none");
    for (const button of article.querySelectorAll(".rate")) {
      press(button, verdict.tuned === button.dataset.rating);
      button.setAttribute("aria-disabled", hidden);
    }
    const best = verdict.best && (verdict.best === "none" ? "none best" : `${nameOf(article, verdict.best)} best`);
    const parts = [best, verdict.tuned && `tuned ${verdict.tuned}`].filter(Boolean);
    const given = article.querySelector(".given");
    given.textContent = parts.join(", ");
    given.hidden = parts.length === 0;
  }

  function press(button, isPressed) {
    button.setAttribute("aria-pressed", isPressed);
  }

  function showProgress() {
    const judged = verdicts.size;
    const meter = document.querySelector(".meter");
    meter.setAttribute("aria-valuenow", judged);
    meter.firstElementChild.style.width = `${(100 * judged) / total}%`;
    find("count").textContent = `${judged} of ${total} judged`;
    find("undo").setAttribute("aria-disabled", history.length === 0);
  }

  function showCurrent() {
    articles.forEach((article, index) => article.classList.toggle("current", index === current));
    const place = sequence().indexOf(current);
    find("previous").setAttribute("aria-disabled", place === 0);
    find("next").setAttribute("aria-disabled", place === total - 1);
  }

  function refresh() {
    find("blind").checked = isBlind;
    articles.forEach((_, index) => arrange(index));
    showCurrent();
    showProgress();
  }

  function go(step) {
    const place = sequence().indexOf(current) + step;
    if (place < 0 || place >= total) {
      say(step < 0 ? "This is the first item." : `This is the last item. ${advice()}`);
      return;
    }
    current = sequence()[place];
    showCurrent();
    say("");
    window.scrollTo(0, 0);
    articles[current].focus({ preventScroll: true });
    keep();
  }

  function advice() {
    const open = total - verdicts.size;
    return open ? `${open} of ${total} are not judged yet.` : "All are judged: download verdicts.json.";
  }

  function judge(change, told) {
    history.push({ verdicts: new Map(verdicts), at: current });
    const before = verdictOf(current);
    const blind = before.best === null && change.best ? isHidden(current) : before.blind;
    verdicts.set(rowOf(current), { ...before, ...change, blind });
    if (isBlind && change.best) revealed.add(rowOf(current));
    arrange(current);
    showProgress();
    say(`${told}. ${verdicts.size === total ? advice() : ""}`);
    keep();
  }

  function choose(number) {
    const panel = panelsOf(articles[current])[number - 1];
    if (number && !panel) return;
    judge({ best: panel ? panel.dataset.key : "none" }, panel ? `Best: ${panel.dataset.name}` : "None is best, or a tie");
  }

  function rate(rating) {
    if (isHidden(current)) {
      say("First choose the best answer: which one is the tuned one is told then.");
      return;
    }
    judge({ tuned: rating }, `The tuned answer is ${rating}`);
  }

  function undo() {
    const last = history.pop();
    if (!last) {
      say("Nothing to undo.");
      return;
    }
    ({ verdicts, at: current } = last);
    refresh();
    say("Undone.");
    keep();
  }

  // Blind judging begins at the first open item of its own order, so that nothing tells which kind comes next.
  function setBlind(value) {
    isBlind = value;
    if (isBlind) current = sequence().find((index) => !verdicts.has(rowOf(index))) ?? current;
    refresh();
    say(isBlind ? "Blind: another order of items and answers, without names." : "");
    keep();
  }

  function download() {
    const text = JSON.stringify(asDocument(), null, 2) + "\n";
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    link.download = "verdicts.json";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    say(`Downloaded ${verdicts.size} verdicts.`);
  }

  async function load(file) {
    try {
      const found = accepted(JSON.parse(await file.text()));
      history.push({ verdicts: new Map(verdicts), at: current });
      verdicts = new Map([...verdicts, ...found.verdicts]);
      refresh();
      keep();
      const left = found.others ? `, ${found.others} left out that do not fit this sheet` : "";
      say(`Loaded ${found.verdicts.size} verdicts${left}.`);
    } catch (error) {
      say(error instanceof SyntaxError ? "This file is not JSON." : error.message);
    }
  }

  const KEYS = {
    j: () => go(1),
    arrowright: () => go(1),
    k: () => go(-1),
    arrowleft: () => go(-1),
    0: () => choose(0),
    1: () => choose(1),
    2: () => choose(2),
    3: () => choose(3),
    g: () => rate("good"),
    b: () => rate("bad"),
    u: undo,
    "?": () => find("keys").showModal(),
  };

  document.addEventListener("keydown", (event) => {
    const action = KEYS[event.key.toLowerCase()];
    if (!action || event.ctrlKey || event.metaKey || event.altKey || find("keys").open) return;
    event.preventDefault();
    action();
  });
  articles.forEach((article) => {
    panelsOf(article).forEach((panel) => {
      panel.querySelector(".best").addEventListener("click", () => choose(panelsOf(article).indexOf(panel) + 1));
    });
    article.querySelector(".none").addEventListener("click", () => choose(0));
    for (const button of article.querySelectorAll(".rate")) {
      button.addEventListener("click", () => rate(button.dataset.rating));
    }
  });
  find("previous").addEventListener("click", () => go(-1));
  find("next").addEventListener("click", () => go(1));
  find("undo").addEventListener("click", undo);
  find("help").addEventListener("click", KEYS["?"]);
  find("blind").addEventListener("change", (event) => setBlind(event.target.checked));
  find("download").addEventListener("click", download);
  find("load").addEventListener("click", () => find("file").click());
  find("file").addEventListener("change", (event) => {
    if (event.target.files.length) load(event.target.files[0]);
    event.target.value = "";
  });
  window.addEventListener("storage", (event) => {
    if (event.key !== storageKey) return;
    recall();
    refresh();
  });

  document.documentElement.classList.add("js");
  recall();
  refresh();
})();
