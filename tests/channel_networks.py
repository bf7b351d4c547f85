"Networks whose channels are coupled, with random norms, and a comparison of two networks' outputs."
import copy

import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def randomize(net):
    "In float64, with norms and scales as after a training, in which no number is zero by luck"
    for m in net.modules():
        if isinstance(m, _BatchNorm):
            nn.init.normal_(m.running_mean)
            nn.init.uniform_(m.running_var, .5, 2)
            nn.init.uniform_(m.weight, .5, 1.5)
            nn.init.normal_(m.bias)
        elif isinstance(m, (nn.Linear, nn.Conv2d)) and m.bias is not None: nn.init.normal_(m.bias)
        if hasattr(m, 'layer_scale'): nn.init.uniform_(m.layer_scale, .5, 1.5)
    return net.double().eval()


def without_dropout(net):
    for m in net.modules():
        if 'Dropout' in type(m).__name__ or type(m).__name__ == 'StochasticDepth': m.eval()
    return net


def outputs(net, xs):
    with torch.no_grad(): y = net(*xs)
    if isinstance(y, dict): y = tuple(y.values())
    return [o for o in (y if isinstance(y, tuple) else [y]) if o is not None]


def assert_equal_outputs(net, small, xs, training=True):
    "In evaluation mode, and in training mode without dropout"
    for mode in (False, True)[:1 + training]:
        pair = [without_dropout(copy.deepcopy(o).train(mode)) for o in (net, small)]
        for expected, y in zip(*(outputs(o, xs) for o in pair)):
            assert expected.shape == y.shape and expected.abs().max() > 0
            assert (expected - y).abs().max() <= 1e-5*expected.abs().max()


def images(n=2, size=32): return torch.randn(n, 3, size, size, dtype=torch.double)


class RandomNet(nn.Module):
    "Random layers, and by plain lists of their own the channels that belong together"
    def __init__(self, draw):
        super().__init__()
        self.layers, self.steps, self.pairs, self.n_ids = nn.ModuleList(), [], [], 3
        #: For each feature map its channels, by number; for each layer those that it writes, and those that it reads
        self.maps, self.written, self.read = [[0, 1, 2]], [], []
        for _ in range(draw(st.integers(2, 8))): self.add(draw)
        self.last = nn.Linear(sum(map(len, self.maps[1:])), 2)

    def new(self, n):
        self.n_ids += n
        return list(range(self.n_ids - n, self.n_ids))

    def tie(self, a, b): self.pairs += zip(a, b)

    def add_layer(self, ins, outs, groups=1):
        conv = nn.Conv2d(len(ins), len(outs), 3, padding=1, groups=groups)
        self.layers.append(nn.Sequential(conv, nn.BatchNorm2d(len(outs)), nn.ReLU()))
        self.written.append(outs)
        self.read.append(ins)
        return len(self.layers) - 1

    def add(self, draw):
        kind = draw(st.sampled_from(['conv', 'depthwise', 'grouped', 'add', 'mul', 'cat', 'shuffle', 'again']))
        i = draw(st.integers(0, len(self.maps) - 1))
        ids, n = self.maps[i], len(self.maps[i])
        same = [j for j, o in enumerate(self.maps) if len(o) == n]
        half = n//2
        layer, j, outs = None, None, ids
        if kind in ('grouped', 'shuffle') and (n % 2 or n < 4): kind = 'conv'
        if kind == 'conv':
            outs = self.new(draw(st.sampled_from([2, 4, 6, n])))
            layer = self.add_layer(ids, outs)
        elif kind == 'depthwise': layer = self.add_layer(ids, ids, n)
        elif kind == 'grouped':
            outs = self.new(draw(st.sampled_from([2, 4, 8])))
            self.tie(ids[:half], ids[half:])
            self.tie(outs[:len(outs)//2], outs[len(outs)//2:])
            layer = self.add_layer(ids, outs, 2)
        elif kind in ('add', 'mul'):
            j = draw(st.sampled_from(same))
            self.tie(ids, self.maps[j])
        elif kind == 'cat':
            j = draw(st.integers(0, len(self.maps) - 1))
            outs = ids + self.maps[j]
        elif kind == 'shuffle':
            self.tie(ids[:half], ids[half:])
            outs = [o for pair in zip(ids[:half], ids[half:]) for o in pair]
        elif kind == 'again':
            fit = [k for k, (o, r) in enumerate(zip(self.written, self.read)) if len(r) == n]
            if not fit: return
            layer = draw(st.sampled_from(fit))
            self.tie(ids, self.read[layer])
            outs = self.written[layer]
        self.steps.append((kind, i, j, layer))
        self.maps.append(outs)

    def forward(self, x):
        maps = [x]
        for kind, i, j, layer in self.steps:
            x = maps[i]
            if layer is not None: y = self.layers[layer](x)
            elif kind == 'add': y = x + maps[j]
            elif kind == 'mul': y = x*maps[j]
            elif kind == 'cat': y = torch.cat([x, maps[j]], 1)
            else: y = x.view(len(x), 2, x.shape[1]//2, *x.shape[2:]).transpose(1, 2).reshape(x.shape)
            maps.append(y)
        return self.last(torch.cat(maps[1:], 1).mean((2, 3)))

    def together(self):
        "For each channel the number of its group; 0 for those that belong to the input"
        group = list(range(self.n_ids))
        for a, b in self.pairs + [(0, 1), (0, 2)]:
            old, new = sorted((group[a], group[b]))[::-1]
            group = [new if o == old else o for o in group]
        return group

    @torch.no_grad()
    def silence(self, draw):
        "Zero random groups of channels; return the groups that are silent"
        group = self.together()
        dead = {g for g in sorted(set(group) - {0}) if draw(st.booleans())}
        for written in self.written: dead -= {group[written[0]]} # One channel of each layer stays.
        for layer, written in zip(self.layers, self.written):
            rows = [i for i, o in enumerate(written) if group[o] in dead]
            for t in (*layer[0].parameters(), *layer[1].parameters()): t[rows] = 0
        return dead
