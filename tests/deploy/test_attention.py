"Heads of PyTorch's own attention: pruned in a training, removed, and the same outputs as with zeros"
import copy, io

import pytest, torch, torchvision
from onecycle_prune.callback import SparsifyCallback
from onecycle_prune.deploy.attention import NarrowAttention
from onecycle_prune.deploy.shrink import shrink, shrink_like
from onecycle_prune.deploy.speed_up import speed_up
from onecycle_prune.sparsifier import Sparsifier
from torch import nn

from channel_networks import assert_equal_outputs, outputs
from helpers import Probe, assert_resumes, assert_same
from networks import tiny_images
from reference import expected_sparsities

dim, n_heads, head_dim = 12, 4, 3
# Other settings of `nn.MultiheadAttention`
forms = {'usual': {}, 'batch first': dict(batch_first=True), 'no bias': dict(bias=False),
    'other keys': dict(kdim=5, vdim=7), 'dropout': dict(dropout=.5)}


class Calls(nn.Module):
    "One attention, and a linear layer"
    def __init__(self, form, call=None):
        super().__init__()
        torch.manual_seed(0)
        self.attention, self.out = nn.MultiheadAttention(dim, n_heads, **form), nn.Linear(dim, 4)
        for name, p in self.named_parameters():
            if 'bias' in name: nn.init.normal_(p)
        self.call = call or (lambda attention, *xs: attention(*xs)[0])

    def forward(self, *xs): return self.out(self.call(self.attention, *xs))


def inputs(form, n=2, length=5):
    "Queries, keys and values in float64; other keys are shorter and differ from the queries"
    sizes = form.get('kdim', dim), form.get('vdim', dim)
    if sizes == (dim, dim): return [torch.randn(length, n, dim, dtype=torch.double)]*3
    return [torch.randn(length, n, dim, dtype=torch.double), *(torch.randn(6, n, o, dtype=torch.double) for o in sizes)]


def projections(attention):
    names = ['in_proj'] if attention.in_proj_weight is not None else ['q_proj', 'k_proj', 'v_proj']
    return [getattr(attention, f'{n}_weight') for n in names]


def zero_heads(attention, heads):
    with torch.no_grad():
        for w in projections(attention): w.view(-1, n_heads, head_dim, w.shape[1])[:, heads] = 0
        if attention.in_proj_bias is not None: attention.in_proj_bias.view(3, n_heads, head_dim)[:, heads] = 0


def n_zero_heads(attention):
    w = torch.cat([o.view(-1, n_heads, head_dim*o.shape[1]) for o in projections(attention)], -1)
    is_zero = w.eq(0).all(2).all(0)
    if attention.in_proj_bias is not None: is_zero &= attention.in_proj_bias.view(3, n_heads, -1).eq(0).all(2).all(0)
    return int(is_zero.sum())


class Encoder(nn.Module):
    "Two layers of PyTorch's transformer over the 36 positions of a tiny image"
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.out = nn.Linear(4, dim), nn.Linear(dim, 4)
        layer = nn.TransformerEncoderLayer(dim, n_heads, 16, 0., batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x): return self.out(self.encoder(self.embed(x.flatten(2).transpose(1, 2))).mean(1))

    @property
    def attention(self): return [o.self_attn for o in self.encoder.layers]


class TestNarrow:
    "`NarrowAttention` computes what the attention with zeros computes"
    @pytest.mark.parametrize('form', forms.values(), ids=forms)
    @pytest.mark.parametrize('heads', [[0], [1, 3], [0, 2, 3]], ids=str)
    def test_forms(self, form, heads):
        net, xs = Calls(form).double(), inputs(form)
        zero_heads(net.attention, heads)
        small = shrink(net, xs)
        assert type(small.attention) is NarrowAttention and small.attention.num_heads == n_heads - len(heads)
        assert sum(map(len, projections(small.attention))) == 3*head_dim*small.attention.num_heads
        assert_equal_outputs(net, small, xs, training=form.get('dropout') is None)

    @pytest.mark.parametrize('form', [{}, dict(batch_first=True)], ids=['usual', 'batch first'])
    @pytest.mark.parametrize('masks', [
        dict(attn_mask=torch.ones(5, 5).triu(1).bool()), dict(attn_mask=torch.randn(5, 5, dtype=torch.double)),
        dict(attn_mask=torch.ones(5, 5).triu(1).bool(), is_causal=True),
        dict(key_padding_mask=torch.tensor([[0, 0, 0, 1, 1], [0, 1, 0, 0, 1]]).bool()),
        dict(key_padding_mask=torch.randn(2, 5, dtype=torch.double), attn_mask=torch.randn(5, 5, dtype=torch.double))],
        ids=['bool', 'float', 'causal', 'padding', 'both'])
    @pytest.mark.parametrize('need_weights', [False, True], ids=['output', 'weights'])
    def test_masks(self, form, masks, need_weights):
        net = Calls(form, lambda m, x: m(x, x, x, need_weights=need_weights, **masks)[0]).double()
        x = torch.randn(*((2, 5) if form else (5, 2)), dim, dtype=torch.double)
        zero_heads(net.attention, [1, 2])
        small = shrink(net, x)
        assert small.attention.num_heads == 2
        assert_equal_outputs(net, small, (x,))

    def test_without_batch(self):
        net, x = Calls({}, lambda m, x: m(x, x, x)[0]).double(), torch.randn(5, dim, dtype=torch.double)
        zero_heads(net.attention, [3])
        small = shrink(net, x)
        assert small.attention.num_heads == 3
        assert_equal_outputs(net, small, (x,))

    @pytest.mark.parametrize('average', [True, False])
    @pytest.mark.parametrize('shape', [(5, dim), (5, 2, dim)], ids=['one', 'batch'])
    def test_weights(self, average, shape):
        "The weights of attention are those of the heads that stay"
        net, x = Calls({}, lambda m, x: m(x, x, x)[0]).double(), torch.randn(*shape, dtype=torch.double)
        zero_heads(net.attention, [0])
        small = shrink(net, x)
        _, expected = net.attention(x, x, x, average_attn_weights=False)
        _, found = small.attention(x, x, x, average_attn_weights=average)
        axis = expected.ndim - 3
        expected = expected.narrow(axis, 1, 3)
        torch.testing.assert_close(found, expected.mean(axis) if average else expected)

    def test_mask_of_heads(self):
        "Masks for each head must be as many as there are heads"
        net, x = Calls({}, lambda m, x: m(x, x, x)[0]).double(), torch.randn(5, 2, dim, dtype=torch.double)
        zero_heads(net.attention, [0, 1])
        attention = shrink(net, x).attention
        masks = torch.randn(2*2, 5, 5, dtype=torch.double)
        full = torch.zeros(2, n_heads, 5, 5, dtype=torch.double)
        full[:, 2:] = masks.view(2, 2, 5, 5)
        expected = net.attention(x, x, x, attn_mask=full.flatten(0, 1))[0]
        torch.testing.assert_close(attention(x, x, x, attn_mask=masks)[0], expected)
        with pytest.raises(ValueError, match='has 8 masks, but 2 samples with 2 heads need 4'):
            attention(x, x, x, attn_mask=full.flatten(0, 1))

    def test_causal_without_mask(self):
        net, x = Calls({}, lambda m, x: m(x, x, x)[0]).double(), torch.randn(5, 2, dim, dtype=torch.double)
        zero_heads(net.attention, [0])
        with pytest.raises(ValueError, match='needs attn_mask'): shrink(net, x).attention(x, x, x, is_causal=True)

    def test_torchvision(self):
        net = torchvision.models.VisionTransformer(32, 8, 2, n_heads, 64, 128, num_classes=5)
        nn.init.normal_(net.heads[0].weight)
        net, x = net.double(), torch.randn(2, 3, 32, 32, dtype=torch.double)
        Sparsifier(net, 'head', inputs=x).prune(.5)
        small = shrink(net, x)
        assert [o.num_heads for o in small.encoder.layers] == [2, 2]
        assert_equal_outputs(net, small, (x,))

    def test_again(self):
        "Further heads are pruned and removed"
        net, x = Encoder().double(), tiny_images().double()
        for expected in (3, 2):
            Sparsifier(net, 'head', inputs=x).prune(1/(expected+1))
            small = shrink(net, x)
            assert [o.num_heads for o in small.attention] == [expected]*2
            assert_equal_outputs(net, small, (x,))
            net = small


class TestTraining:
    "In a training"
    @pytest.mark.parametrize('context', ['local', 'global'])
    def test_exact(self, new_learner, context):
        learn, probe = new_learner(Encoder()), Probe(lambda net: [n_zero_heads(o) for o in net.attention])
        learn.fit_one_cycle(3, 1e-2, cbs=[SparsifyCallback(.6, 'head', context), probe])
        for counts, s in zip(probe.seen, expected_sparsities('one_cycle', .6), strict=True):
            if context == 'local': assert counts == [round(s*n_heads)]*2
            else: assert sum(counts) == round(s*2*n_heads)

    def test_resume(self, new_learner):
        whole = assert_resumes(lambda: new_learner(Encoder()), starts=[2], sparsity=.5, granularity='head')
        assert [n_zero_heads(o) for o in whole.model.attention] == [2, 2]

    def test_after(self, new_learner, tmp_path):
        "The small network is copied, saved, loaded, exported, and trains on"
        learn, x = new_learner(Encoder()), tiny_images()
        learn.fit_one_cycle(2, 1e-2, cbs=[SparsifyCallback(.5, 'head'), SparsifyCallback(.5, 'structured')])
        small = shrink(learn.model, x, record=tmp_path/'small.json').eval()
        assert_equal_outputs(learn.model, small, (x,))
        assert [o.linear1.out_features for o in small.encoder.layers] == [8, 8]
        file = io.BytesIO()
        torch.save(small, file)
        file.seek(0)
        other = shrink_like(Encoder(), tmp_path/'small.json').eval()
        other.load_state_dict(small.state_dict())
        exported = torch.export.export(small, (x,)).module()
        for o in (copy.deepcopy(small), torch.load(file, weights_only=False), other, exported):
            torch.testing.assert_close(o(x), small(x))
        before = small(x)
        learn.model = small
        learn.create_opt()
        learn.fit(1, 1e-2)
        assert not torch.equal(small.eval()(x), before)

    def test_speed_up(self, new_learner):
        "Its zeros are skipped too"
        small, x = shrink(self.half_pruned(), tiny_images()).eval(), tiny_images()
        Sparsifier(small).prune(.95)
        fast = speed_up(small, x)
        torch.testing.assert_close(fast(x), small(x), rtol=1e-4, atol=1e-5)

    def half_pruned(self):
        net = Encoder()
        Sparsifier(net, 'head', inputs=tiny_images()).prune(.5)
        return net


class TestNotRemoved:
    "Where heads cannot be removed, nothing changes, and the error gives the reason"
    @pytest.mark.parametrize('form,call', [
        (dict(add_bias_kv=True), None), (dict(add_zero_attn=True), None),
        ({}, lambda m, x: m(x, x, x, attn_mask=torch.zeros(2*n_heads, 5, 5, dtype=torch.double))[0]),
        ({}, lambda m, x: (lambda y, weights: y + weights.sum())(*m(x, x, x)))],
        ids=['biases', 'zero', 'masks of heads', 'weights are used'])
    def test_refused(self, form, call):
        call = call or (lambda m, x: m(x, x, x)[0])
        net, x = Calls(form, call).double(), torch.randn(5, 2, dim, dtype=torch.double)
        with pytest.raises(ValueError, match='no heads .* can be removed .multi_head_attention_forward'):
            Sparsifier(net, 'head', inputs=x)
        zero_heads(net.attention, [0])
        small = shrink(net, x)
        assert type(small.attention) is nn.MultiheadAttention and small.attention.num_heads == n_heads
        assert_same(outputs(small, (x,)), outputs(net, (x,)))

    def test_own_class(self):
        "A class of one's own may use the heads in another way, so it keeps them"
        class Own(nn.MultiheadAttention): pass
        net, x = Calls({}, lambda m, x: m(x, x, x)[0]).double(), torch.randn(5, 2, dim, dtype=torch.double)
        net.attention.__class__ = Own
        zero_heads(net.attention, [0])
        small = shrink(net, x)
        assert type(small.attention) is Own and small.attention.num_heads == n_heads
        assert_same(outputs(small, (x,)), outputs(net, (x,)))

    def test_structured(self):
        "The other granularity says which one prunes heads"
        sp = Sparsifier(Encoder(), 'structured', inputs=tiny_images())
        assert "'head'" in sp.coupled.not_pruned['encoder.layers.0.self_attn.in_proj']
