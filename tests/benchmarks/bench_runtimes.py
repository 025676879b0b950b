"""Time of models with attention beside the plain model in the runtimes of phones and PCs, as a Markdown table.

A cell is the median of the ratio within a repeat, with its quartiles, or the size of the model's files. It
is 'refused' if the converter does not take the model; the log has its message. `pip install '.[edge]'` installs the
runtimes. Each has its default number of threads, and LiteRT that of PyTorch.
"""
import argparse
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import timm
import torch
from timing import BASES, Call, describe, interleave, markdown, names_of, ratio
from torch import Tensor, nn

_logger = logging.getLogger(__name__)


def load_in_executorch(program: torch.export.ExportedProgram, path: Path) -> Callable[[Tensor], Tensor]:
    """Lowers a program to XNNPACK, saves it and loads it in ExecuTorch's runtime. A call overwrites the last output."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.exir.passes.constant_prop_pass import constant_prop_pass
    from executorch.runtime import Runtime
    lowered = to_edge_transform_and_lower(constant_prop_pass(program), partitioner=[XnnpackPartitioner()])
    calls = [n.target for n in lowered.exported_program().graph.nodes if n.op == 'call_function']
    delegates = sum('delegate' in str(target) for target in calls)
    others = sum('delegate' not in str(target) and 'getitem' not in str(target) for target in calls)
    _logger.info(f'{delegates} delegates, {others} operators outside')
    lowered.to_executorch().save(str(path))
    loaded = Runtime.get().load_program(path)
    method = loaded.load_method('forward')
    assert method is not None
    # the loaded program holds the memory that the method runs in
    return lambda x, loaded=loaded: method.execute([x])[0]


def executorch(model: nn.Module, x: Tensor, folder: Path) -> Callable[[], Tensor]:
    """A call in ExecuTorch's runtime."""
    return partial(load_in_executorch(torch.export.export(model, (x,)), folder / 'model.pte'), x)


def litert(model: nn.Module, x: Tensor, folder: Path) -> Callable[[], Tensor]:
    """A call in LiteRT's runtime, which takes one thread unless it is told."""
    import litert_torch
    from ai_edge_litert.interpreter import Interpreter
    path, value = str(folder / 'model.tflite'), x.numpy()
    litert_torch.convert(model, (x,)).export(path)
    signature = Interpreter(path, num_threads=torch.get_num_threads()).get_signature_runner()
    return lambda: torch.from_numpy(signature(args_0=value)['output_0'])


def openvino(model: nn.Module, x: Tensor, folder: Path) -> Callable[[], Tensor]:
    """A call in OpenVINO's runtime on the CPU, for the least latency."""
    import openvino
    converted = openvino.convert_model(torch.export.export(model, (x,)))
    openvino.save_model(converted, folder / 'model.xml', compress_to_fp16=False)
    # by default it computes in bfloat16 on CPUs that can
    hints = {'PERFORMANCE_HINT': 'LATENCY', 'INFERENCE_PRECISION_HINT': 'f32'}
    compiled = openvino.compile_model(folder / 'model.xml', 'CPU', hints)
    request, value = compiled.create_infer_request(), x.numpy()
    return lambda: torch.from_numpy(request.infer([value])[0])


def onnxruntime(model: nn.Module, x: Tensor, folder: Path) -> Callable[[], Tensor]:
    """A call in onnxruntime on the CPU."""
    import onnxruntime
    torch.onnx.export(
        model, (x,), folder / 'model.onnx', dynamo=True, external_data=False, verbose=False, input_names=['x'])
    options = onnxruntime.SessionOptions()
    # idle threads that spin would slow the other models of the row
    options.add_session_config_entry('session.intra_op.allow_spinning', '0')
    session = onnxruntime.InferenceSession(folder / 'model.onnx', options, providers=['CPUExecutionProvider'])
    inputs = {'x': x.numpy()}
    return lambda: torch.from_numpy(session.run(None, inputs)[0])


RUNTIMES: dict[str, Callable[[nn.Module, Tensor, Path], Callable[[], Tensor]]] = {
    'ExecuTorch': executorch,
    'LiteRT': litert,
    'OpenVINO': openvino,
    'onnxruntime': onnxruntime,
}


def prepare(name: str, runtime: str, x: Tensor) -> tuple[Call, float]:
    """A model's call in a runtime, which gives what PyTorch does, and the MiB of its files."""
    _logger.info(f'{name}, {runtime}')
    torch.manual_seed(0)
    model = timm.create_model(name, exportable=True).eval()
    with TemporaryDirectory() as folder:
        call = RUNTIMES[runtime](model, x, Path(folder))
        size = sum(path.stat().st_size for path in Path(folder).iterdir()) / 2 ** 20
    with torch.no_grad():
        expected = model(x)
    torch.testing.assert_close(call(), expected, rtol=0, atol=1e-3 * expected.abs().max().item())
    return call, size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--bases', nargs='+', choices=BASES, default=['mobilenetv2_100'], help='plain models')
    layers = ['ela_b', 'ca', 'eca', 'se']
    parser.add_argument('--layers', nargs='+', default=layers, help='suffixes of the others')
    parser.add_argument('--runtimes', nargs='+', choices=RUNTIMES, default=list(RUNTIMES), help='where they run')
    parser.add_argument('--batch-size', type=int, default=1)
    parser.add_argument('--img-size', type=int, default=224, help='height and width of the input')
    parser.add_argument('--repeats', type=int, default=101, help='times that each call is run')
    args = parser.parse_args()
    logging.basicConfig(level=logging.ERROR, format='%(message)s')
    _logger.setLevel(logging.INFO)
    print(f'Beside the plain model at {args.img_size} px: {describe(args.repeats)}.')
    x = torch.rand(args.batch_size, 3, args.img_size, args.img_size)
    for base in args.bases:
        names, rows = names_of(base, args.layers), []
        for runtime in args.runtimes:
            prepared = {}
            for name in names:
                try:
                    prepared[name] = prepare(name, runtime, x)
                except (RuntimeError, ValueError) as error:
                    # what converters raise for a model that they do not take
                    _logger.error(f'{name}: {error}')
            times = interleave({name: call for name, (call, _) in prepared.items()}, args.repeats)
            cells = [ratio(times[name], times[base]) if name in times else 'refused' for name in names[1:]]
            sizes = [f'{prepared[name][1]:.2f}' if name in prepared else '' for name in names]
            rows += [
                [runtime, f'batch {args.batch_size}', f'{np.median(times[base]):.1f} ms', *cells],
                [runtime, 'file, MiB', *sizes]]
            _logger.info(markdown(rows[-2], rows[-1:]))
        print(f'\n{markdown(["runtime", "what", *names], rows)}', flush=True)


if __name__ == '__main__':
    main()
