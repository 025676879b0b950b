"""Exporters and compilers, from weights whose batch norms and gates are random: ONNX, torch.export, AOTInductor."""
import shutil

import pytest

EXTRA = "needs pip install '.[ecosystem]'"
SIZES = '((1, 3, 64, 96), (3, 3, 160, 128), (2, 3, 81, 115))'


@pytest.mark.parametrize('name', ['resnet18_ela_b', 'mobilenetv2_050_ela_s'])
def test_onnx_with_dynamic_sizes_equals_pytorch_in_onnxruntime(execute, write_my_model, name):
    pytest.importorskip('onnxruntime', reason=EXTRA)
    write_my_model(name)
    lines = execute(f'''
        import onnx, onnxruntime
        from pathlib import Path
        for name in ('my-model.onnx', 'my-model-jit.onnx'):
            graph = onnx.load(name)
            onnx.checker.check_model(graph)
            operators = {{node.op_type for node in graph.graph.node}}
            assert not operators & {{'Loop', 'If', 'Scan'}}, operators
            assert {{node.domain for node in graph.graph.node}} <= {{'', 'ai.onnx'}}
            assert not graph.functions
            session = onnxruntime.InferenceSession(name, providers=['CPUExecutionProvider'])
            for shape in {SIZES}:
                x = torch.randn(shape)
                y = torch.from_numpy(session.run(None, {{session.get_inputs()[0].name: x.numpy()}})[0])
                expected = model(x)
                assert expected.std() > 1e-2
                # of the greatest logit: float32 itself is off by 5e-4 from float64 where logits are about 30
                assert (y - expected).abs().max() < 1e-4 * expected.abs().max()
            size = sum(path.stat().st_size for path in Path().glob(f'{{name}}*')) / 2**20
            print(name, 'opset', graph.opset_import[0].version, f'{{size:.1f}} MiB')
    ''', 'ONNX')
    print(name, *lines, sep='\n')


@pytest.mark.skipif(not (shutil.which('g++') or shutil.which('clang++')), reason='AOTInductor needs a C++ compiler')
def test_an_exported_program_runs_in_another_process_and_by_aotinductor(execute, write_my_model):
    write_my_model()
    execute(f'''
        pairs = []
        for shape in {SIZES}:
            x = torch.randn(shape)
            pairs.append((x, model(x).detach()))
            torch.testing.assert_close(compiled(x), pairs[-1][1], rtol=1e-4, atol=1e-4)
        torch.save(pairs, 'pairs.pt')
        assert all(node.target.namespace == 'aten' for node in program.graph.nodes if hasattr(node.target, 'namespace'))
    ''', 'torch.export and AOTInductor')
    execute('''
        import sys
        program = torch.export.load('my-model.pt2').module()
        for x, y in torch.load('pairs.pt'):
            torch.testing.assert_close(program(x), y, rtol=1e-4, atol=1e-4)
        assert 'timm' not in sys.modules
    ''')


def test_torch_compile_compiles_once_for_all_sizes(execute, write_my_model):
    write_my_model()
    execute('''
        from torch._dynamo.utils import counters
        with torch.no_grad():
            for shape in ((2, 3, 64, 96), (3, 3, 160, 128), (4, 3, 81, 115)):
                x = torch.randn(shape)
                torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
        assert counters['stats']['unique_graphs'] == 1, counters
        assert not counters['graph_break'], counters
    ''', 'torch.compile')


def test_casts_and_copies(execute, write_my_model):
    write_my_model()
    execute('''
        x = torch.rand(2, 3, 64, 96)
        y = model(x)
        assert torch.equal(again(x), y) and torch.equal(average.module(x), y)
        cast = half(x.bfloat16())
        assert cast.dtype == torch.bfloat16
        assert (cast.float() - y).norm() < 0.05 * y.norm()
    ''', 'Casts, copies, averages')
