// A switch that unfolds all code of a page, remembered from page to page.
document.addEventListener("DOMContentLoaded", () => {
  const folds = document.querySelectorAll("details.code");
  const key = "flux4d-unfolded";
  let stored = null;
  try { stored = localStorage.getItem(key); } catch { /* no storage: the switch works for this page */ }
  let unfolded = stored === "yes";
  const show = () => folds.forEach((fold) => { fold.open = unfolded; });
  const title = document.querySelector("article h1");
  if (folds.length && title) {
    const button = document.createElement("button");
    button.className = "unfold";
    const say = () => { button.textContent = unfolded ? "Fold all code" : "Unfold all code"; };
    button.addEventListener("click", () => {
      unfolded = !unfolded;
      try { localStorage.setItem(key, unfolded ? "yes" : "no"); } catch { /* as above */ }
      show();
      say();
    });
    say();
    title.after(button);
    if (unfolded) show();
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
      time.textContent = `${seconds(Number(slider.value)).toFixed(2)} s`;
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
    if (target) target.scrollIntoView();
  };
  addEventListener("hashchange", reveal);
  reveal();
});
