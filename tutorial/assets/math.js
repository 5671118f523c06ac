/* MathJax typesets the formulas that arithmatex marked; html[data-math=ready] says it is done. */
const narrow = matchMedia("(max-width: 44.9em)").matches;
window.MathJax = {
  tex: {
    inlineMath: [["\\(", "\\)"]],
    displayMath: [["\\[", "\\]"]],
    processEscapes: true,
    tags: "none",
  },
  options: { ignoreHtmlClass: ".*|", processHtmlClass: "arithmatex", enableMenu: false },
  chtml: narrow ? { displayAlign: "left", displayIndent: "0" } : {},
  startup: { typeset: false },
};

document$.subscribe(() => {
  if (!MathJax.startup.promise) return;
  MathJax.startup.promise = MathJax.startup.promise
    .then(() => MathJax.typesetPromise())
    .then(() => {
      document.documentElement.dataset.math = "ready";
      const target = location.hash && document.getElementById(location.hash.slice(1));
      if (target) target.scrollIntoView(); // formulas above it have changed the layout
    });
});
