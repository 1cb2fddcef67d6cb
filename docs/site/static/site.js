// A reader's choice, remembered from page to page; without storage it holds for the page.
const remembered = (key) => { try { return localStorage.getItem(key) === "yes"; } catch { return false; } };
const remember = (key, chosen) => { try { localStorage.setItem(key, chosen ? "yes" : "no"); } catch { /* no storage */ } };
document.addEventListener("DOMContentLoaded", () => {
  // a switch that unfolds all code of a page, and one that leaves only prose, formulas and pictures
  const folds = document.querySelectorAll("details.code");
  const key = "flux4d-unfolded";
  let unfolded = remembered(key);
  const show = () => folds.forEach((fold) => { fold.open = unfolded; });
  const title = document.querySelector("article h1");
  if (folds.length && title) {
    const button = document.createElement("button");
    button.className = "unfold";
    const say = () => { button.textContent = unfolded ? "Fold all code" : "Unfold all code"; };
    button.addEventListener("click", () => {
      unfolded = !unfolded;
      remember(key, unfolded);
      show();
      say();
    });
    say();
    title.after(button);
    if (unfolded) show();
  }
  const root = document.documentElement;
  const proseKey = "flux4d-prose-only";
  const showProse = (only) => {
    root.classList.toggle("prose-only", only);
    document.querySelectorAll("button.prose").forEach((b) => { b.textContent = only ? "Show code" : "Prose only"; });
  };
  if (title && document.querySelector("article .show .highlight-python, article .definition")) {
    const button = document.createElement("button");
    button.className = "unfold prose";
    button.title = "Hide code, parameter tables and tests; formulas, pictures and tables stay";
    button.addEventListener("click", () => {
      const only = !root.classList.contains("prose-only");
      remember(proseKey, only);
      showProse(only);
    });
    (document.querySelector("button.unfold") || title).after(button);
    showProse(remembered(proseKey));
  }
  // the navigation on the left can be folded away
  const sidebar = document.querySelector(".bd-sidebar-primary");
  const place = document.querySelector(".navbar-header-items__start");
  if (sidebar && place && !sidebar.classList.contains("hide-on-wide")) {
    const button = document.createElement("button");
    button.className = "fold-navigation";
    button.type = "button";
    const fold = (folded) => {
      root.classList.toggle("navigation-folded", folded);
      button.textContent = folded ? "\u25b8" : "\u25c2";
      button.title = folded ? "Show the list of pages" : "Hide the list of pages";
      button.setAttribute("aria-label", button.title);
      button.setAttribute("aria-expanded", String(!folded));
    };
    button.addEventListener("click", () => {
      const folded = !root.classList.contains("navigation-folded");
      remember("flux4d-navigation-folded", folded);
      fold(folded);
    });
    fold(remembered("flux4d-navigation-folded"));
    place.append(button);
  }
  // on a narrow screen a wide table is shown row by row, each cell with the name of its column
  document.querySelectorAll("article table").forEach((table) => {
    const heads = [...table.querySelectorAll("thead th")].map((head) => head.textContent.trim());
    if (heads.length < 3) return;
    table.classList.add("as-cards");
    table.querySelectorAll("tbody tr").forEach((row) => [...row.cells].forEach((cell, k) => {
      if (heads[k]) cell.dataset.label = heads[k];
    }));
  });
  // long names in tables break at their underscores
  document.querySelectorAll("article table td > a, article table td > p > a").forEach((link) => {
    if (link.childElementCount || !link.textContent.includes("_")) return;
    const parts = link.textContent.split("_");
    link.replaceChildren(...parts.flatMap((part, k) => (k ? ["_", document.createElement("wbr"), part] : [part])));
  });
  // a formula that is wider than the page says that it can be moved
  document.querySelectorAll(".formula").forEach((formula) => {
    const say = () => formula.classList.toggle("wide", formula.scrollWidth > formula.clientWidth + 1);
    new ResizeObserver(say).observe(formula);
  });
  // excerpts of search results are prose
  if (typeof Search !== "undefined") {
    const whole = Search.htmlToText;
    Search.htmlToText = (text, anchor) => {
      const page = new DOMParser().parseFromString(text, "text/html");
      page.querySelectorAll(".highlight-python, details.code, table.arguments").forEach((code) => code.remove());
      page.querySelectorAll("td, th").forEach((cell) => cell.append(" "));
      return whole(page.documentElement.outerHTML, anchor);
    };
  }
  // a scene is loaded when it is asked for
  document.querySelectorAll("div.scene").forEach((place) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = "Load the scene (2.5 MB, drawn by this machine)";
    button.addEventListener("click", () => {
      const frame = document.createElement("iframe");
      frame.src = place.dataset.src;
      frame.title = "A scene that can be turned";
      place.replaceChildren(frame);
    });
    place.append(button);
  });
  // a film is one tall picture behind a window; a slider moves it
  document.querySelectorAll("div.film").forEach((film) => {
    const [picture] = film.getElementsByTagName("img");
    const moments = Number(film.dataset.moments);
    const known = film.dataset.seconds.split(" ").map(Number);
    const seconds = (k) => (known.length === moments ? known[k] : known[0] + (k * (known[1] - known[0])) / (moments - 1));
    const slider = document.createElement("input");
    const time = document.createElement("output");
    Object.assign(slider, { type: "range", min: 0, max: moments - 1, value: 0 });
    slider.setAttribute("aria-label", "time");
    const show = () => {
      picture.style.transform = `translateY(${(-100 * slider.value) / moments}%)`;
      const now = seconds(Number(slider.value));
      const isFuture = film.dataset.inputsEnd && now > Number(film.dataset.inputsEnd) + 1e-6;
      time.textContent = `${now.toFixed(2)} s${isFuture ? ", future" : ""}`;
      slider.setAttribute("aria-valuetext", time.textContent);
    };
    slider.addEventListener("input", show);
    const controls = document.createElement("p");
    controls.append(slider, time);
    film.append(controls);
    show();
  });
  // code and commands are copied by a click
  if (navigator.clipboard) {
    document.querySelectorAll(".highlight-bash, .highlight-python").forEach((block) => {
      const button = document.createElement("button");
      button.type = "button";
      button.className = "copy";
      button.textContent = "Copy";
      button.addEventListener("click", async () => {
        await navigator.clipboard.writeText(block.querySelector("pre").textContent);
        button.textContent = "Copied";
        setTimeout(() => { button.textContent = "Copy"; }, 1500);
      });
      block.append(button);
    });
  }
  // a link to a definition or into a fold opens what hides it
  const reveal = () => {
    const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    for (let e = target; e; e = e.parentElement) if (e.tagName === "DETAILS") e.open = true;
    if (target && !target.checkVisibility()) showProse(false);
    if (target) target.scrollIntoView();
  };
  addEventListener("hashchange", reveal);
  reveal();
});
