"""What leaves the package, and what it loses on the way: nbs/results/export/NAME.json, which notebook 4.7 reads.

    python benchmarks/export.py emoji nbs/results/emoji/student.safetensors
    python benchmarks/export.py digits runs/digits --browser

For each form of a student: the largest difference of its pictures to PyTorch's, bytes, processor milliseconds a picture
on one thread (PyTorch as it is and compiled, onnxruntime; with --browser the page in a browser, by its own clock), and
the Fréchet distance of the same noise, three seeds, in the features of the data's classifier.
"""

import argparse
import base64
import io
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from digits import hardware
from PIL import Image

from ctm_nb.checkpoints.export import WEIGHT_TYPES, Drawing, _narrow, onnx_bytes, web_page
from ctm_nb.checkpoints.models import load, save_model
from ctm_nb.data.batches import load_splits
from ctm_nb.data.images import to_uint8
from ctm_nb.evaluation.evaluate import drawn_samples, run_evaluator
from ctm_nb.evaluation.reference import SampleSet
from ctm_nb.method.flow import noise

ROOT = Path(__file__).resolve().parents[1]
SEEDS, N, AT_ONCE, ROUNDS, COMPARED = (0, 1, 2), 1000, 16, 15, 64


def session(content):
    "A model, ready to draw on one thread."
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    s = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    labelled = len(s.get_inputs()) > 1

    def draw(z, y):
        return torch.from_numpy(s.run(None, {"noise": z.numpy(), **({"label": y.numpy()} if labelled else {})})[0])

    return draw


class Calibration:
    "Noise and labels that ONNX Runtime's quantization looks at to choose its ranges."

    def __init__(self, m):
        y = torch.arange(COMPARED) % max(m.n_classes, 1)
        rows = zip(noise(m.data_shape, 99, range(COMPARED)).split(AT_ONCE), y.split(AT_ONCE))
        self.rows = iter([{"noise": z.numpy(), **({"label": k.numpy()} if m.n_classes else {})} for z, k in rows])

    def get_next(self):
        return next(self.rows, None)


def narrowed(content, weights):
    "As `onnx_bytes` does it, without exporting again."
    model = onnx.load_from_string(content)
    if weights != "float32":
        _narrow(model, weights)
    return model.SerializeToString()


def quantized(m, content, folder):
    "The file with products of whole numbers too, in ONNX Runtime's two ways, and in half precision."
    from onnxruntime.quantization import QuantType, quantize_dynamic, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process
    from onnxruntime.transformers.float16 import convert_float_to_float16

    plain, ready, out = folder / "plain.onnx", folder / "ready.onnx", folder / "out.onnx"
    plain.write_bytes(content)
    half = convert_float_to_float16(onnx.load(plain), keep_io_types=True)
    yield "float16 arithmetic", half.SerializeToString()
    quant_pre_process(str(plain), str(ready), skip_symbolic_shape=True)
    quantize_dynamic(ready, out, weight_type=QuantType.QUInt8)
    yield "int8 arithmetic, dynamic", out.read_bytes()
    quantize_static(ready, out, Calibration(m), per_channel=True)
    yield "int8 arithmetic, static", out.read_bytes()


def page_noise(seed, i, size):
    "The noise of picture i in a page: splitmix32, then Box and Muller."
    with np.errstate(over="ignore"):
        u = np.uint32
        state = (u(seed) ^ u(0x9E3779B9)) * u(0x85EBCA6B) + u(i + 1) * u(0xC2B2AE35)
        z = state + np.arange(1, 2 * size + 1, dtype=u) * u(0x9E3779B9)
        z = (z ^ (z >> u(16))) * u(0x21F0AAAD)
        z = (z ^ (z >> u(15))) * u(0x735A2D97)
        v = ((z ^ (z >> u(15))) + 0.5) / 2**32
    return (np.sqrt(-2 * np.log(v[::2])) * np.cos(2 * np.pi * v[1::2])).astype(np.float32)


def browsed(m, html, folder):
    "Largest difference in bytes of a page's picture, and its own milliseconds a picture."
    sys.path.insert(0, str(ROOT / "tests" / "system"))
    from browser_lab import page

    (folder / "page.html").write_text(html, encoding="utf-8")
    C, H, W = m.data_shape
    with page() as p:
        p.goto((folder / "page.html").as_uri())
        p.locator("#draw:enabled").wait_for(timeout=600_000)
        data = p.evaluate("document.querySelector('canvas').toDataURL()").partition(",")[2]
        times = []
        for seed in range(1, ROUNDS + 1):
            p.locator("#next").click()
            said = "document.querySelector('#status').textContent"
            p.wait_for_function(f"{said}.startsWith('seed {seed}:')", timeout=600_000)
            times.append(float(p.evaluate(said).split(", ")[1].split()[0]))
    seen = torch.from_numpy(np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))).permute(2, 0, 1)
    tiles = [seen[:C, r * (H + 1) : r * (H + 1) + H, c * (W + 1) : c * (W + 1) + W] for r in (0, 1) for c in range(8)]
    z = torch.from_numpy(np.stack([page_noise(0, i, C * H * W) for i in range(16)])).view(16, C, H, W)
    with torch.no_grad():
        own = to_uint8(Drawing(m)(z, torch.arange(16) % m.n_classes if m.n_classes else None))
    return int((torch.stack(tiles).int() - own.int()).abs().max()), statistics.median(times)


def timed(ways, z, y):
    "Median processor milliseconds a picture of each way, in turns, one thread."
    for draw in ways.values():
        draw(z, y)
    found = {k: [] for k in ways}
    for _ in range(ROUNDS):
        for k, draw in ways.items():
            begun = time.process_time()
            draw(z, y)
            found[k].append(1000 * (time.process_time() - begun) / len(z))
    return {k: statistics.median(v) for k, v in found.items()}


def distances(evaluator, draw, m):
    "Frechet distance of N samples, a seed each."
    about = drawn_samples(m, N, {"solver": "ctm", "steps": 1}, evaluator.reference.label_counts)
    labels = torch.zeros(N, dtype=torch.long) if about.labels is None else about.labels
    for seed in SEEDS:
        read = lambda rows: to_uint8(draw(noise(m.data_shape, seed, range(N)[rows]), labels[rows]))
        samples = SampleSet("samples", N, read, about.labels)
        yield evaluator.score(evaluator.collect(samples))["frechet_distance"]


def measured(name, path, browser, folder):
    "A row for each form."
    m, rows = load(path).eval(), []
    evaluator = run_evaluator(load_splits(name, image_size=m.data_shape[-1]), keep=True)
    evaluator.metrics = ["fid"]
    plain = torch.no_grad()(lambda z, y: Drawing(m)(z, y if m.n_classes else None))
    z, y = noise(m.data_shape, 7, range(COMPARED)), torch.arange(COMPARED) % max(m.n_classes, 1)
    want, ways = plain(z, y), {"PyTorch": plain, "PyTorch, compiled": torch.compile(plain)}
    files = {"PyTorch": save_model(m, folder / "m.safetensors").read_bytes()}
    for end in ("safetensors", "pt"):
        try:
            kept = save_model(m, folder / f"other.{end}")
        except ValueError as e:  # a state dict can't hold every setting
            rows.append({"format": f".{end}", "direction": "out and in", "refused": str(e)})
            continue
        back = load(kept).eval()
        off = max((a - b).abs().max().item() for a, b in zip(m.state_dict().values(), back.state_dict().values()))
        rows.append({"format": f".{end}", "direction": "out and in", "parity": off, "bytes": kept.stat().st_size})
    graph = onnx_bytes(m)
    forms = {f"onnx, {w} weights": narrowed(graph, w) for w in WEIGHT_TYPES}
    for form, content in [*forms.items(), *quantized(m, graph, folder)]:
        try:
            ways[form], files[form] = session(content), content
            ways[form](z[:2], y[:2])
        except Exception as e:
            ways.pop(form, None)
            rows.append({"format": form, "direction": "out", "refused": " ".join(str(e).split())[:160]})
    ms = timed(ways, z[:AT_ONCE], y[:AT_ONCE])
    for form, draw in ways.items():
        row = {"format": form, "direction": "out", "parity": (draw(z, y) - want).abs().max().item(), "ms": ms[form]}
        if form in files:
            row |= {"bytes": len(files[form]), "distance": list(distances(evaluator, draw, m))}
        rows.append(row)
        print(json.dumps(row), flush=True)
    for w in ("float32", "float16") if browser else ():
        html = web_page(m, name, weights=w)
        off, each = browsed(m, html, folder)
        row = {"format": f"page, {w} weights", "direction": "out", "parity_bytes": off, "bytes": len(html), "ms": each}
        rows.append(row)
        print(json.dumps(row), flush=True)
    return {"student": name, "n": N, "seeds": SEEDS, "at_once": AT_ONCE, "features": evaluator.extractor.features_id,
            "weights": sum(p.numel() for p in m.parameters()), "hardware": hardware(), "torch": torch.__version__,
            "onnxruntime": onnxruntime.__version__, "rows": rows}  # fmt: skip


def main():
    p = argparse.ArgumentParser(description="What leaves the package, and what it loses on the way.")
    p.add_argument("name", choices=("digits", "emoji"))
    p.add_argument("path", help="a student of these pictures")
    p.add_argument("--browser", action="store_true", help="the page, too")
    a = p.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    with tempfile.TemporaryDirectory() as d:
        found = measured(a.name, a.path, a.browser, Path(d))
    out = ROOT / "nbs" / "results" / "export" / f"{a.name}.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
