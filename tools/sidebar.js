// The sidebar of the reference is longer than the window: scroll it to the page that is shown.
addEventListener("DOMContentLoaded", () => {
  const sidebar = document.querySelector("#quarto-sidebar");
  const here = sidebar?.querySelector(".sidebar-link.active");
  if (here) sidebar.scrollTop += here.getBoundingClientRect().top - sidebar.getBoundingClientRect().top - sidebar.clientHeight / 2;
});
