/* The theme puts every table into a box that scrolls. The keyboard must reach the box as well. */
document$.subscribe(() => {
  for (const box of document.querySelectorAll(".md-typeset__scrollwrap")) box.tabIndex = 0;
});
