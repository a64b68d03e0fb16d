// The sliders' handles get the names of their tooltips and the values beside them, for screen readers. `element` is
// the output that this script came with.
(function name(tries) {
  const root = element.closest('.widget-vbox');
  if (!root) return tries && setTimeout(name, 100, tries - 1);
  const put = (node, key, value) => node.getAttribute(key) === value || node.setAttribute(key, value);
  const all = () => root.querySelectorAll('.widget-slider').forEach(row => {
    const [handle, label, value] = ['.noUi-handle', '.widget-label', '.widget-readout'].map(k => row.querySelector(k));
    if (handle && label) put(handle, 'aria-label', label.title || label.textContent);
    if (handle && value) put(handle, 'aria-valuetext', value.textContent);
  });
  all();
  const what = {subtree: true, childList: true, characterData: true, attributeFilter: ['aria-valuetext', 'title']};
  new MutationObserver(all).observe(root, what);
})(100)
