"""Scores beside those of torch-fidelity, a program of other people: the same pictures, Inception with the same (random)
weights, read from a file."""
import numpy as np
import pytest
import torch
from PIL import Image

from ctm_nb.evaluation.metrics import frechet_distance, inception_score, kernel_distance, precision_recall

fidelity = pytest.importorskip("torch_fidelity")
from torch_fidelity import feature_extractor_inceptionv3 as inception  # noqa: E402

N = 32


@pytest.mark.filterwarnings("ignore:.*span at most:RuntimeWarning")
def test_four_scores_are_those_of_torch_fidelity(tmp_path, monkeypatch):
    class Weights(Exception): "Holds the names and shapes that the network asks for."
    def blank(net, state):
        raise Weights(net.state_dict())
    monkeypatch.setattr(inception.FeatureExtractorInceptionV3, "load_state_dict", blank)
    torch.save({}, file := tmp_path / "inception.pth")
    make = lambda: inception.FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], str(file))
    with pytest.raises(Weights) as asked: make()
    monkeypatch.undo()
    gen = torch.Generator().manual_seed(0)
    drawn = lambda v: torch.randn(v.shape, generator=gen) * 1.4 / v[0].numel()**.5
    torch.save({k: drawn(v) if v.ndim > 1 else v for k, v in asked.value.args[0].items()}, file)  # norms as they begin
    net, rng = make().eval(), np.random.default_rng(0)
    folders, found = [], []
    for side, spread in (("real", 60), ("drawn", 75)):
        (folder := tmp_path / side).mkdir()
        base = rng.normal(128, spread, (N, 4, 4, 3))
        images = np.kron(base, np.ones((1, 8, 8, 1))) + rng.normal(0, 20, (N, 32, 32, 3))
        images = np.clip(images, 0, 255).astype(np.uint8)
        for i, x in enumerate(images): Image.fromarray(x).save(folder / f"{i:03}.png")
        with torch.no_grad(): found.append(net(torch.from_numpy(images).permute(0, 3, 1, 2)))
        folders.append(str(folder))
    (real, _), (drawn, logits) = found
    theirs = fidelity.calculate_metrics(
        input1=folders[1], input2=folders[0], cuda=False, isc=True, fid=True, kid=True, prc=True, verbose=False,
        feature_extractor="inception-v3-compat", feature_extractor_weights_path=str(file), feature_layer_prc="2048",
        isc_splits=1, kid_subsets=2, kid_subset_size=N, prc_neighborhood=3, cache=False, save_cpu_ram=True)
    precision, recall = precision_recall(real, drawn, 3)
    ours = {
        "inception_score_mean": inception_score(logits.double().softmax(1)),
        "frechet_inception_distance": frechet_distance(real, drawn),
        "kernel_inception_distance_mean": kernel_distance(real, drawn, 2, N)[0],
        "precision": precision, "recall": recall,
    }
    assert ours["frechet_inception_distance"] > 1e-3 and 0 < precision < 1 and ours["inception_score_mean"] > 1.0001
    for k, v in ours.items(): assert theirs[k] == pytest.approx(v, rel=1e-3), k
