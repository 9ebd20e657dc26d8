// Dark or light, before anything is drawn: the browser's wish, unless the switch on the page said otherwise.
(() => {
  const wish = matchMedia("(prefers-color-scheme: dark)");
  const chosen = () => localStorage.getItem("shardq-theme");
  const show = () => {
    document.documentElement.dataset.theme = chosen() ?? (wish.matches ? "dark" : "light");
    document.dispatchEvent(new Event("theme"));
  };
  wish.addEventListener("change", show);
  document.addEventListener("switch-theme", () => {
    const next = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    if (next === (wish.matches ? "dark" : "light")) localStorage.removeItem("shardq-theme");
    else localStorage.setItem("shardq-theme", next);
    show();
  });
  show();
})();
