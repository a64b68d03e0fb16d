"""Formulas as they stand, for comparison with what the package computes faster."""
import torch

from ctm_nb.method.balance import average, balance


def adaptive_weight(loss, other, last_layer, *bounds):
    "Weight of `other` that makes both gradients equally long at the last layer.  # CTM: adaptive weight"
    grads = [torch.autograd.grad(v, last_layer, retain_graph=True)[0] for v in (loss, other)]
    return balance(*average(*grads), *bounds)
