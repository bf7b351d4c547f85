"What several test files need: small layers with known weights."
import torch
from torch import nn


def fill(m, values):
    "Give `m` the weights `values`, in any shape of as many numbers, and return it"
    with torch.no_grad(): m.weight.copy_(torch.as_tensor(values, dtype=m.weight.dtype).view_as(m.weight))
    return m


def line(*values): return fill(nn.Linear(len(values), 1, bias=False), values)


def zeros(m): return (m.weight == 0).flatten().tolist()


def channel(m, c):
    "The view of `m.weight` that makes output channel `c`, in a transposed convolution too"
    if not getattr(m, 'transposed', False): return m.weight[c]
    n_in, n_out = m.in_channels//m.groups, m.out_channels//m.groups
    g = c//n_out
    return m.weight[g*n_in:(g+1)*n_in, c%n_out]
