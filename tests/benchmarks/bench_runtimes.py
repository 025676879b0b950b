"""Time of models with attention beside the plain model in the runtimes of phones and PCs, as a Markdown table.

A cell is the median of the ratio within a repeat, with its quartiles. The runtimes are installed by
`pip install executorch openvino`; each uses the threads that it takes by itself.
"""
import argparse
import logging
from collections.abc import Callable

import numpy as np
import timm
import torch
from timing import Call, describe, interleave, markdown, ratio
from torch import Tensor, nn

import timm_ela  # noqa: F401  registers the models

_logger = logging.getLogger(__name__)


def executorch(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """A call in ExecuTorch's runtime, lowered to XNNPACK."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime
    lowered = to_edge_transform_and_lower(torch.export.export(model, (x,)), partitioner=[XnnpackPartitioner()])
    calls = [n.target for n in lowered.exported_program().graph.nodes if n.op == 'call_function']
    delegates = sum('delegate' in str(target) for target in calls)
    others = sum('delegate' not in str(target) and 'getitem' not in str(target) for target in calls)
    _logger.info(f'{delegates} delegates, {others} operators outside')
    program = Runtime.get().load_program(lowered.to_executorch().buffer)
    method = program.load_method('forward')
    assert method is not None
    # the program holds the memory that the method runs in
    return lambda program=program: method.execute([x])[0]


def openvino(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """A call in OpenVINO's runtime on the CPU, for the least latency."""
    import openvino
    converted = openvino.convert_model(torch.export.export(model, (x,)))
    compiled = openvino.compile_model(converted, 'CPU', {'PERFORMANCE_HINT': 'LATENCY'})
    request, value = compiled.create_infer_request(), x.numpy()
    return lambda: torch.from_numpy(request.infer([value])[0])


RUNTIMES: dict[str, Callable[[nn.Module, Tensor], Callable[[], Tensor]]] = {
    'ExecuTorch': executorch,
    'OpenVINO': openvino,
}
BASES = {  # plain model -> prefix of those with attention
    'mobilenetv2_100': 'mobilenetv2',
    'resnet50': 'resnet50',
    'tf_efficientnet_lite0': 'tf_efficientnet_lite0',
}


def prepare(name: str, runtime: str, x: Tensor) -> Call:
    """A model's call in a runtime, which gives what PyTorch does."""
    _logger.info(f'{name}, {runtime}')
    torch.manual_seed(0)
    model = timm.create_model(name, exportable=True).eval()
    call = RUNTIMES[runtime](model, x)
    with torch.no_grad():
        expected = model(x)
    torch.testing.assert_close(call(), expected, rtol=0, atol=1e-3 * expected.abs().max().item())
    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--bases', nargs='+', choices=BASES, default=['mobilenetv2_100'], help='plain models')
    parser.add_argument('--layers', nargs='+', default=['ela_b', 'se', 'eca', 'ca'], help='suffixes of the others')
    parser.add_argument('--runtimes', nargs='+', choices=RUNTIMES, default=list(RUNTIMES), help='where they run')
    parser.add_argument('--img-size', type=int, default=224, help='height and width of the input')
    parser.add_argument('--repeats', type=int, default=31, help='times that each call is run')
    args = parser.parse_args()
    logging.basicConfig(level=logging.ERROR, format='%(message)s')
    _logger.setLevel(logging.INFO)
    x, rows = torch.rand(1, 3, args.img_size, args.img_size), []
    for base in args.bases:
        names = [base, *(f'{BASES[base]}_{layer}' for layer in args.layers)]
        for runtime in args.runtimes:
            times = interleave({name: prepare(name, runtime, x) for name in names}, args.repeats)
            cells = [ratio(times[name], times[base]) for name in names[1:]]
            rows.append([base, runtime, 'inference, batch 1', f'{np.median(times[base]):.1f}', *cells])
    head = ['plain model', 'way', 'mode', 'plain, ms', *(f'_{layer}' for layer in args.layers)]
    print(f'Time beside the plain model at {args.img_size} px: {describe(args.repeats)}.\n\n{markdown(head, rows)}')


if __name__ == '__main__':
    main()
