"""The kernels as PyTorch's operators, and where the module takes them; as in test_kernels.py, interpreted too."""
import sys

import pytest
import torch
from helpers import ROOT, run
from kernel_cases import EPS, INTERPRETED, LAYOUTS, make, new_memory_is_nan, pick_device, results  # noqa: F401
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from timm_ela import EfficientLocalAttention, set_fused
from timm_ela.fused import ela_reference

triton_op = pytest.importorskip('timm_ela.triton_op')
pytest.importorskip('triton')


def test_without_triton_nothing_fails_and_nothing_is_supported():
    run([sys.executable, '-c', WITHOUT_TRITON], cwd=ROOT)


WITHOUT_TRITON = """
import sys
sys.modules['triton'] = None
import torch
from timm_ela import triton_op
assert triton_op.kernels is None
assert not triton_op.supported(torch.ones(2, 4, 5, 6), torch.ones(4, 1, 3), torch.ones(4), torch.ones(4), 2)
"""


@pytest.mark.parametrize('group_size', [1, 8])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_operators_are_registered_as_pytorch_wants_them(layout, group_size):
    inputs = make((1, 16, 3, 4), group_size, 3, layout=layout)
    torch.library.opcheck(triton_op.ela_forward, (*inputs, 2, EPS))
    x, *params = (t.detach() for t in inputs)
    gates = triton_op.ela_forward(x, *params, 2, EPS)[1]
    for needs_dx in (True, False):
        torch.library.opcheck(triton_op.ela_backward, (x, x, *params[:2], gates, 2, EPS, needs_dx))


@pytest.mark.parametrize(('shape', 'channels'), [((2, 32, 1, 1), 16), ((2, 32, 3, 1), 16), ((2, 32, 1, 3), 1)])
def test_strides_are_told_truly_where_sizes_of_one_make_them_ambiguous(shape, channels):
    x = torch.randn(shape, device=pick_device()).to(memory_format=torch.channels_last)[:, :channels]
    inputs = x, *(p.detach() for p in make((1, channels, 1, 1))[1:])
    torch.library.opcheck(triton_op.ela_forward, (*inputs, 1, EPS), test_utils='test_faketensor')


@pytest.mark.parametrize('layout', LAYOUTS)
def test_compiled_whole_and_checkpointed_it_gives_the_same_bits(layout):
    def f(*args):
        return triton_op.ela_triton(*args) if triton_op.supported(*args[:-1]) else None

    compiled = torch.compile(f, fullgraph=True, backend='aot_eager' if INTERPRETED else 'inductor', dynamic=True)
    for height, width in ((3, 5), (6, 4)):
        inputs = make((2, 8, height, width), kernel_size=3, layout=layout)
        upstream = torch.randn_like(inputs[0])
        want = results(triton_op.ela_triton, inputs, 2, upstream)
        for way in (compiled, lambda *args: checkpoint(triton_op.ela_triton, *args, use_reentrant=False)):
            got = results(way, inputs, 2, upstream)
            assert all(map(torch.equal, got, want))
        with torch.no_grad():
            assert compiled(*inputs, 2, EPS).stride() == inputs[0].stride()


@pytest.mark.parametrize('group_size', [1, 8])
def test_saved_tensors_may_come_back_in_another_layout(group_size):
    inputs = make((2, 16, 5, 11), group_size)  # C = H + W: the shape does not tell the layout
    upstream = torch.randn_like(inputs[0])
    want = results(triton_op.ela_triton, inputs, 2, upstream)
    for changed in ((4,), (3,), (3, 4)):  # x has 4 dimensions, the gates 3
        with torch.autograd.graph.saved_tensors_hooks(
                lambda t, changed=changed: t.contiguous() if t.ndim in changed else t, lambda t: t):
            got = results(triton_op.ela_triton, inputs, 2, upstream)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_an_upstream_gradient_that_is_not_there_gives_none():
    class Cut(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    inputs = make((2, 16, 5, 4))
    Cut.apply(triton_op.ela_triton(*inputs, 2, EPS)).sum().backward()
    assert [t.grad for t in inputs] == [None] * 4


@pytest.mark.parametrize('group_size', [1, 8])
def test_autocast_changes_nothing(group_size):
    inputs = make((2, 16, 5, 4), group_size, dtype=torch.bfloat16)
    upstream = torch.randn_like(inputs[0])
    want = results(triton_op.ela_triton, inputs, 2, upstream)
    with torch.autocast(inputs[0].device.type, torch.bfloat16):
        got = results(triton_op.ela_triton, inputs, 2, upstream)
    assert all(map(torch.equal, got, want))


class Distributed(torch.Tensor):
    pass


def test_what_it_does_not_support_is_left_to_the_plain_path():
    inputs = x, *params = make((2, 16, 5, 4))
    assert triton_op.supported(*inputs, 2)
    for other in (x.double(), x[0], x[:0], x[..., :0], x.to('meta'), x[..., :1].expand(-1, -1, -1, 1025)):
        assert not triton_op.supported(other, *params, 2)
    assert not triton_op.supported(x.detach().as_subclass(Distributed), *params, 2)
    conv, *norm = params
    assert not triton_op.supported(x, conv.double(), *norm, 2)
    for groups in (3, 0, -2):
        assert not triton_op.supported(x, *params, groups)
    for other in (conv[1:], torch.cat([conv, conv]), conv[..., :4], conv.expand(-1, 3, -1)):
        assert not triton_op.supported(x, other, *norm, 2)
    assert not triton_op.supported(x, conv, norm[0], norm[1][1:], 2)
    assert not triton_op.supported(x, params[0].to('meta'), *params[1:], 2)
    alone = x[:1, :, :1]  # with 16 groups, each holds one value of a column's strip
    assert triton_op.supported(alone, *params, 8) and not triton_op.supported(alone, *params, 16)
    with pytest.raises(ValueError, match='Expected more than 1 value per channel'):
        ela_reference(alone, *params, 16)


def module_and_input():
    device = pick_device()
    return EfficientLocalAttention(16, num_groups=2).to(device), torch.randn(2, 16, 5, 7, device=device)


@pytest.fixture
def experimental():
    """Switches the kernels on and off."""
    yield lambda on: set_fused(experimental=on)
    set_fused()


def test_the_module_takes_it_only_where_it_is_asked_for(monkeypatch, experimental):
    calls, fused = [], triton_op.ela_triton
    monkeypatch.setattr(triton_op, 'ela_triton', lambda *args: calls.append(1) or fused(*args))
    m, x = module_and_input()
    lean = m(x)
    assert not calls
    experimental(True)
    torch.testing.assert_close(m(x), lean)
    assert len(calls) == 1
    torch.testing.assert_close(torch.vmap(m)(x[None])[0], lean)
    with forward_ad.dual_level():
        m(forward_ad.make_dual(x, x))
    m.double()(x.double())  # not supported: as if it were off
    assert len(calls) == 1


@pytest.mark.skipif(not hasattr(torch.compiler, 'is_exporting'), reason='PyTorch cannot tell a compiler from an export')
def test_a_compiler_keeps_the_operator_and_an_export_the_formula(experimental):
    m, x = module_and_input()
    graphs = []

    def record(graph, _):
        graphs.append(str(graph.graph))
        return graph

    compiled, mapped = (torch.compile(f, fullgraph=True, backend=record) for f in (m, torch.vmap(lambda x: m(x))))
    experimental(True)
    torch.testing.assert_close(compiled(x), m(x))
    mapped(x[None])
    experimental(False)
    compiled(x)
    experimental(True)
    compiled(x[..., :1].expand(-1, -1, -1, 1025))
    assert ['ela_forward' in graph for graph in graphs] == [True, False, False, False]
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r'ELA expects an input of shape \(N, 16, H, W\)'):
        compiled(x[:, 4:])
    for strict in (True, False):
        assert 'timm_ela' not in str(torch.export.export(m, (x,), strict=strict).graph)
    assert 'ela_forward' not in str(torch.jit.trace(m, x).inlined_graph)


@pytest.mark.skipif(INTERPRETED, reason='too slow for the interpreter')
def test_fifty_steps_of_training_end_where_the_other_path_ends(experimental):
    def train():
        torch.manual_seed(0)
        m, x = module_and_input()
        head, target = torch.nn.Linear(16, 2).to(x.device), torch.arange(2, device=x.device)
        optimizer = torch.optim.SGD([*m.parameters(), *head.parameters()], lr=0.5, momentum=0.9)
        for _ in range(50):
            loss = torch.nn.functional.cross_entropy(head(m(x).square().mean((2, 3))), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return torch.stack([loss.detach(), *(p.detach().norm() for p in m.parameters())])

    lean = train()
    experimental(True)
    assert lean[0] < 0.3
    torch.testing.assert_close(train(), lean, rtol=1e-3, atol=1e-4)
