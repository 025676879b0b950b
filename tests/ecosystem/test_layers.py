"""Every attention layer in OpenVINO, by each way that it is exported: a trace, a program, an ONNX file."""
import pytest
import torch

from timm_ela import ATTN_LAYERS

openvino = pytest.importorskip('openvino', reason="needs pip install '.[ecosystem]'")


def onnx(layer, x, folder):
    torch.onnx.export(layer, (x,), folder / 'layer.onnx', dynamo=True, verbose=False)
    return openvino.convert_model(folder / 'layer.onnx')


WAYS = {
    'traced': lambda layer, x, folder: openvino.convert_model(layer, example_input=x),
    'exported': lambda layer, x, folder: openvino.convert_model(torch.export.export(layer, (x,))),
    'onnx': onnx,
}


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('name', ATTN_LAYERS)
def test_openvino_computes_the_same(name, way, tmp_path):
    torch.manual_seed(0)
    layer, x = ATTN_LAYERS[name].create(48).eval(), torch.randn(1, 48, 6, 11)
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.3)
    with torch.no_grad():
        expected = layer(x.clone())  # ELA's rows gate in place
        compiled = openvino.compile_model(WAYS[way](layer, x, tmp_path), 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    torch.testing.assert_close(torch.from_numpy(compiled([x.numpy()])[0]), expected, rtol=1e-4, atol=1e-4)
