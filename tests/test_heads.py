"Whole heads of attention: pruned in a training, exactly as many as asked, and removed"
import json

import pytest, torch
from onecycle_prune.callback import SparsifyCallback
from onecycle_prune.channels import Channels
from onecycle_prune.deploy.shrink import shrink, shrink_like
from onecycle_prune.sparsifier import Sparsifier
from torch import nn
from torch.nn import functional as F

from channel_networks import assert_equal_outputs
from helpers import Probe, assert_resumes, assert_same
from networks import tiny_images
from reference import expected_sparsities

n_heads, head_dim = 4, 5


class Fused(nn.Module):
    "Queries, keys and values from one layer, as in timm"
    def __init__(self, dim, num_heads=n_heads):
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = num_heads, head_dim, num_heads*head_dim
        self.qkv, self.proj = nn.Linear(dim, 3*self.attn_dim), nn.Linear(self.attn_dim, dim)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, self.attn_dim))


class Separate(nn.Module):
    "Three layers; the number of heads follows from the size of a head, as in Hugging Face's transformers"
    def __init__(self, dim):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(dim, n_heads*head_dim) for _ in range(3))
        self.proj = nn.Linear(n_heads*head_dim, dim)

    def forward(self, x):
        q, k, v = (m(x).view(*x.shape[:2], -1, head_dim).transpose(1, 2) for m in (self.q, self.k, self.v))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Counted(Separate):
    "Three layers, and a number of heads"
    def __init__(self, dim):
        super().__init__(dim)
        self.heads = n_heads

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (m(x).view(b, n, self.heads, head_dim).transpose(1, 2) for m in (self.q, self.k, self.v))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Chunked(Fused):
    "Queries, keys and values are thirds"
    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (o.view(b, n, -1, head_dim).transpose(1, 2) for o in self.qkv(x).chunk(3, -1))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


kinds = [Fused, Separate, Counted, Chunked]


class Transformer(nn.Module):
    "Two blocks of attention and a perceptron over the 36 positions of a tiny image"
    def __init__(self, kind, dim=12):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.out = nn.Linear(4, dim), nn.Linear(dim, 4)
        self.attention = nn.ModuleList(kind(dim) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(4))
        self.mlps = nn.ModuleList(nn.Sequential(nn.Linear(dim, 16), nn.GELU(), nn.Linear(16, dim)) for _ in range(2))

    def forward(self, x):
        x = self.embed(x.flatten(2).transpose(1, 2))
        for i, (attention, mlp) in enumerate(zip(self.attention, self.mlps)):
            x = x + attention(self.norms[2*i](x))
            x = x + mlp(self.norms[2*i+1](x))
        return self.out(x.mean(1))


def layers_of(attention):
    return [attention.qkv] if hasattr(attention, 'qkv') else [attention.q, attention.k, attention.v]


def n_zero_heads(net):
    "For each attention, how many heads are zero in all weights and biases of queries, keys and values"
    def is_zero(m):
        return torch.cat([m.weight, m.bias[:, None]], 1).eq(0).all(1).view(-1, n_heads, head_dim).all(2).all(0)
    return [int(torch.stack([is_zero(m) for m in layers_of(o)]).all(0).sum()) for o in net.attention]


@pytest.fixture(params=kinds, ids=lambda o: o.__name__)
def learner(request, new_learner):
    "A function that makes a learner of a transformer, with attention of each kind"
    return lambda: new_learner(Transformer(request.param))


class TestTraining:
    "In a training"
    @pytest.mark.parametrize('context', ['local', 'global'])
    def test_exact(self, learner, context):
        learn, probe = learner(), Probe(n_zero_heads)
        learn.fit_one_cycle(3, 1e-2, cbs=[SparsifyCallback(.6, 'head', context), probe])
        for counts, s in zip(probe.seen, expected_sparsities('one_cycle', .6), strict=True):
            if context == 'local': assert counts == [round(s*n_heads)]*2
            else: assert sum(counts) == round(s*2*n_heads)

    def test_shrink(self, learner, tmp_path):
        "The pruned heads are removed, the outputs are the same, and the network trains on and is loaded"
        learn, x = learner(), tiny_images()
        learn.fit_one_cycle(2, 1e-2, cbs=SparsifyCallback(.5, 'head'))
        small = shrink(learn.model, x, record=tmp_path/'small.json')
        assert_equal_outputs(learn.model, small, (x,))
        for attention in small.attention:
            assert attention.proj.in_features == 2*head_dim
            assert sum(m.out_features for m in layers_of(attention)) == 3*2*head_dim
        other = shrink_like(Transformer(type(small.attention[0])), tmp_path/'small.json')
        other.load_state_dict(small.state_dict())
        assert_same(other(x), small(x))
        learn.model = small
        learn.create_opt()
        before = small.attention[0].proj.weight.clone()
        learn.fit(1, 1e-2)
        assert not torch.equal(small.attention[0].proj.weight, before)

    def test_resume(self, learner):
        whole = assert_resumes(learner, starts=[2], sparsity=.5, granularity='head')
        assert n_zero_heads(whole.model) == [2, 2]

    def test_with_channels(self, learner):
        "One callback for heads, another for the hidden units of the perceptrons"
        learn, x = learner(), tiny_images()
        learn.fit_one_cycle(2, 1e-2, cbs=[SparsifyCallback(.5, 'head'), SparsifyCallback(.75, 'structured')])
        small = shrink(learn.model, x)
        assert_equal_outputs(learn.model, small, (x,))
        assert [o.proj.in_features for o in small.attention] == [2*head_dim]*2
        assert [o[0].out_features for o in small.mlps] == [4]*2


class TestOthers:
    "Attention whose heads cannot be removed, and records"
    def test_no_attention(self):
        with pytest.raises(ValueError, match='No channel can be pruned'):
            Sparsifier(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), 'head', inputs=torch.randn(3, 4))

    def test_norm_of_queries(self):
        "A norm mixes the numbers of a head, and heads stay whole"
        class Normed(Fused):
            def __init__(self, dim):
                super().__init__(dim)
                self.norm = nn.LayerNorm(head_dim)
            def forward(self, x):
                b, n, _ = x.shape
                q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, head_dim).permute(2, 0, 3, 1, 4).unbind(0)
                y = F.scaled_dot_product_attention(self.norm(q), k, v)
                return self.proj(y.transpose(1, 2).reshape(b, n, self.attn_dim))
        net, x = Transformer(Normed), tiny_images()
        assert_equal_outputs(net, shrink(net, x), (x,))

    def test_unknown_attribute(self):
        "A number of heads in an attribute of another name: nothing is cut there, and the outputs are the same"
        class Renamed(Fused):
            def __init__(self, dim):
                super().__init__(dim)
                self.how_many = self.num_heads
                del self.num_heads
            def forward(self, x):
                b, n, _ = x.shape
                q, k, v = self.qkv(x).reshape(b, n, 3, self.how_many, head_dim).permute(2, 0, 3, 1, 4).unbind(0)
                y = F.scaled_dot_product_attention(q, k, v)
                return self.proj(y.transpose(1, 2).reshape(b, n, self.attn_dim))
        net, x = Transformer(Renamed), tiny_images()
        Sparsifier(net, 'head', inputs=x).prune(.5)
        small = shrink(net, x)
        assert_equal_outputs(net, small, (x,))
        assert small.attention[0].qkv.out_features == net.attention[0].qkv.out_features

    def test_zero_columns(self):
        "A head that the next layer does not read is removed"
        net, x = Transformer(Fused), tiny_images()
        with torch.no_grad(): net.attention[0].proj.weight[:, head_dim:2*head_dim] = 0
        small = shrink(net, x)
        assert [o.num_heads for o in small.attention] == [n_heads-1, n_heads]
        assert_equal_outputs(net, small, (x,))

    def test_shuffle_keeps_its_groups(self):
        "A division into two axes without attention ties the parts, as before"
        class Shuffle(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)
            def forward(self, x): return self.b(self.a(x).view(-1, 2, 4).transpose(1, 2).flatten(1))
        net = Shuffle()
        channels = Channels(net, (torch.randn(5, 3),))
        assert channels.axes['a.weight', 0][:4].tolist() == channels.axes['a.weight', 0][4:].tolist()

    @pytest.mark.parametrize('change,message', [
        (lambda r: r['attention.0']['attributes'].update(num_heads=[3, 2]), 'has num_heads 4, but the record is for 3'),
        (lambda r: r['attention.0']['attributes'].update(forward=[4, 2]), 'is no entry of a record'),
        (lambda r: r['attention.0']['attributes'].update(num_heads=[4]), 'is no entry of a record'),
        (lambda r: r.update(other=dict(attributes=dict(num_heads=[4, 2]))), 'other is not in the model'),
        (lambda r: r.update({'attention.0': dict(attributes=3)}), 'is no entry of a record')])
    def test_wrong_record(self, tmp_path, change, message):
        net, x = Transformer(Fused), tiny_images()
        Sparsifier(net, 'head', inputs=x).prune(.5)
        shrink(net, x, record=tmp_path/'small.json')
        record = json.loads((tmp_path/'small.json').read_text())
        assert record['attention.0'] == dict(attributes=dict(num_heads=[4, 2], attn_dim=[20, 10]))
        change(record)
        with pytest.raises(ValueError, match=message): shrink_like(net, record)

    @pytest.mark.slow
    def test_timm(self):
        timm = pytest.importorskip('timm')
        net, x = timm.create_model('vit_tiny_patch16_224', num_classes=10, depth=3), torch.randn(2, 3, 224, 224)
        nn.init.normal_(net.head.weight)
        Sparsifier(net, 'head', inputs=x).prune(1/3)
        small = shrink(net, x)
        assert [o.attn.num_heads for o in small.blocks] == [2]*3
        assert_equal_outputs(net, small, (x,))
