// A canvas to draw on: what is drawn goes as a PNG into the hidden text field beside it. `element` is the output that
// this script came with.
(function draw(tries) {
  const root = element.closest('.widget-vbox');
  const [canvas, text] = ['canvas', 'textarea'].map(k => root?.querySelector(k));
  if (!canvas || !text) return tries && setTimeout(draw, 100, tries - 1);
  const [pen, clear] = ['input', 'button'].map(k => canvas.parentNode.querySelector(k));
  const c = canvas.getContext('2d'), n = canvas.width;
  let last, due;
  const send = () => {
    due = 0;
    text.value = canvas.toDataURL();
    text.dispatchEvent(new Event('input', {bubbles: true}));
  };
  const later = () => { due = due || setTimeout(send, 60); };
  const at = e => [e.offsetX / canvas.clientWidth * n, e.offsetY / canvas.clientHeight * n];
  const line = e => {
    if (!last) return;
    Object.assign(c, {strokeStyle: pen.value, lineWidth: Math.max(1.2, n / 10), lineCap: 'round'}).beginPath();
    c.moveTo(...last);
    c.lineTo(...(last = at(e)));
    c.stroke();
    later();
  };
  canvas.onpointerdown = e => { canvas.setPointerCapture(e.pointerId); last = at(e); line(e); };
  canvas.onpointermove = line;
  canvas.onpointerup = () => { last = null; };
  clear.onclick = () => { Object.assign(c, {fillStyle: canvas.dataset.ground}).fillRect(0, 0, n, n); later(); };
  clear.onclick();
})(100)
