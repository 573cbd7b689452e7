// Keeps the page current without reloading it: progress bars move, and when a job changes, the page's live part is fetched anew.
"use strict";

(() => {
  const live = () => document.getElementById("live");
  const link = document.getElementById("link");
  let fetching = false;
  let wanted = live().dataset.version;

  const show = (jobs) => {
    for (const [id, said] of Object.entries(jobs)) {
      const bar = document.getElementById(`bar-${id}`);
      const words = document.getElementById(`words-${id}`);
      if (bar && bar.hasAttribute("value")) bar.value = said.fraction;
      if (words && words.textContent !== said.words) words.textContent = said.words;
    }
  };

  // What a reader has opened or stands on stays as it is.
  const exchange = (fresh) => {
    const old = live();
    const focused = document.activeElement && document.activeElement.id;
    for (const part of old.querySelectorAll("details[id]")) {
      const same = fresh.querySelector(`details[id="${part.id}"]`);
      if (same) same.open = part.open;
    }
    const log = old.querySelector(".log");
    const scrolled = log ? log.scrollTop : 0;
    const pictures = new Map([...old.querySelectorAll("img")].map((image) => [image.getAttribute("src"), image]));
    for (const image of fresh.querySelectorAll("img")) {
      const same = pictures.get(image.getAttribute("src"));
      if (same) image.replaceWith(same);
    }
    old.replaceWith(document.importNode(fresh, true));
    const again = live().querySelector(".log");
    if (again) again.scrollTop = scrolled;
    const target = focused ? document.getElementById(focused) : null;
    if (target) target.focus({ preventScroll: true });
  };

  const refresh = async () => {
    if (fetching) return;
    fetching = true;
    try {
      while (live().dataset.version !== wanted) {
        const asked = wanted;
        const answer = await fetch(location.pathname, { headers: { Accept: "text/html" } });
        if (!answer.ok || answer.redirected) { location.reload(); return; }
        const page = new DOMParser().parseFromString(await answer.text(), "text/html");
        exchange(page.getElementById("live"));
        if (live().dataset.version !== asked && wanted === asked) wanted = live().dataset.version;
      }
    } catch (error) {
      link.hidden = false;
    } finally {
      fetching = false;
    }
  };

  // Without news (more pages are open than are told any, or the log-in is over) the page is asked for itself.
  const look = async () => {
    try {
      const answer = await fetch(location.pathname, { headers: { Accept: "text/html" } });
      if (answer.redirected || [401, 404].includes(answer.status)) { location.reload(); return; }
      if (!answer.ok) throw new Error(answer.status);
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      exchange(page.getElementById("live"));
      link.hidden = true;
    } catch (error) {
      link.hidden = false;
    }
  };

  const hear = (event) => {
    const said = JSON.parse(event.data);
    link.hidden = true;
    wanted = said.version;
    show(said.jobs);
    refresh();
  };

  const listen = () => {
    const source = new EventSource(live().dataset.events);
    source.onmessage = hear;
    source.onerror = () => {
      if (source.readyState !== EventSource.CLOSED) { link.hidden = false; return; }
      setTimeout(async () => { await look(); listen(); }, 5000);
    };
  };

  listen();
})();
