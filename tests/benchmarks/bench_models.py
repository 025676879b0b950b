"""Compares time and memory of models with attention with the plain model's, in several runtimes, as Markdown tables.

A time is the median over the repeats of the ratio to the plain model, with its quartiles. A training step is forward,
cross entropy and backward, without an optimizer. Its peak memory does not count what was allocated before it. On a GPU,
convolutions and matrix products are in bfloat16 by autocast.
"""
import argparse
import logging
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from timing import Call, describe, interleave, markdown, peak_mib, ratio
from torch import Tensor, nn

import timm_ela  # noqa: F401  registers the models

ATTENTION = ('ela_b', 'se', 'eca', 'ca')
# plain model -> models with attention
BASES = {
    'mobilenetv2_100': [f'mobilenetv2_{layer}' for layer in ATTENTION],
    'resnet50': [f'resnet50_{layer}' for layer in ATTENTION],
    'tf_efficientnet_lite0': [f'tf_efficientnet_lite0_{layer}' for layer in ATTENTION],
    'swin_tiny_patch4_window7_224': ['elsa_swin_tiny'],
    'volo_d1_224': ['elsa_volo_d1'],
}
WAYS = ('contiguous', 'channels_last', 'compile', 'onnxruntime')
BATCH_SIZES = {'cpu': [1, 8], 'cuda': [128]}
_logger = logging.getLogger(__name__)


def onnx_session(model: nn.Module, x: Tensor, path: Path):
    """Returns a session of onnxruntime for any batch of x's height and width, with PyTorch's number of threads."""
    import onnxruntime
    sample = torch.rand(2, *x.shape[1:])
    program = torch.onnx.export(
        model, (sample,), dynamo=True, dynamic_shapes=({0: torch.export.Dim('batch')},), verbose=False)
    assert program is not None
    program.save(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])


def train(model: nn.Module, x: Tensor, labels: Tensor) -> None:
    with torch.autocast('cuda', torch.bfloat16, enabled=x.is_cuda):
        loss = F.cross_entropy(model(x), labels)
    torch.autograd.grad(loss, list(model.parameters()))


def infer(model: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode(), torch.autocast('cuda', torch.bfloat16, enabled=x.is_cuda):
        return model(x)


def settings(names: list[str], way: str, args: argparse.Namespace) -> Iterator[tuple[str, dict[str, Call]]]:
    """Yields what is timed together: a title, and a call for each model."""
    memory_format = torch.channels_last if way == 'channels_last' else torch.contiguous_format
    on_device = dict(device=args.device, memory_format=memory_format)
    models = {name: timm.create_model(name, exportable=way == 'onnxruntime').to(**on_device) for name in names}
    batches = [torch.rand(n, 3, args.img_size, args.img_size).to(**on_device) for n in args.batch_sizes]
    if way == 'onnxruntime':
        with tempfile.TemporaryDirectory() as folder:
            sessions = {
                name: onnx_session(model.eval(), batches[0], Path(folder, f'{name}.onnx'))
                for name, model in models.items()}
            for x in batches:
                yield f'inference, batch {len(x)}', {
                    name: partial(s.run, None, {s.get_inputs()[0].name: x.numpy()}) for name, s in sessions.items()}
        return
    called = {}
    for name, model in models.items():
        # otherwise PyTorch would compile the second batch size as a dynamic one
        called[name] = torch.compile(model, dynamic=False) if way == 'compile' else model
    for x in batches:
        for model in models.values():
            model.eval()
        yield f'inference, batch {len(x)}', {name: partial(infer, f, x) for name, f in called.items()}
    if not args.no_training:
        for model in models.values():
            model.train()
        labels = torch.randint(1000, (len(batches[-1]),), device=args.device)
        yield f'training, batch {len(batches[-1])}', {
            name: partial(train, f, batches[-1], labels) for name, f in called.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--bases', nargs='+', choices=BASES, default=list(BASES), help='plain models')
    parser.add_argument('--ways', nargs='+', choices=WAYS, default=list(WAYS), help='ways of running')
    parser.add_argument('--device', choices=BATCH_SIZES, default='cpu')
    parser.add_argument(
        '--batch-sizes', nargs='+', type=int,
        help='training takes the last (default: ' + ', '.join(f'{v} on {k}' for k, v in BATCH_SIZES.items()) + ')')
    parser.add_argument('--img-size', type=int, default=224, help='height and width of the input')
    parser.add_argument('--repeats', type=int, default=11, help='times that each call is run')
    parser.add_argument('--no-training', action='store_true', help='inference only')
    args = parser.parse_args()
    args.batch_sizes = args.batch_sizes or BATCH_SIZES[args.device]
    logging.basicConfig(level=logging.ERROR, format='%(message)s')
    _logger.setLevel(logging.INFO)
    torch.manual_seed(0)
    # one forward is compiled for each model and batch size
    torch._dynamo.config.recompile_limit = 64
    print(f'Beside the plain model at {args.img_size} px: {describe(args.repeats, args.device)}.')
    for base in args.bases:
        names, rows = [base, *BASES[base]], []
        for way in args.ways:
            if way == 'onnxruntime' and args.device != 'cpu':
                continue
            torch.compiler.reset()
            for mode, calls in settings(names, way, args):
                _logger.info(f'{base}, {way}, {mode}')
                times = interleave(calls, args.repeats, device=args.device)
                cells = [ratio(times[name], times[base]) for name in names[1:]]
                rows.append([way, mode, f'{np.median(times[base]):.1f} ms', *cells])
                if mode.startswith('training'):
                    plain, *others = (peak_mib(calls[name], args.device) for name in names)
                    cells = [f'{other / plain:.2f}' for other in others]
                    rows.append([way, 'peak memory of it', f'{plain:.0f} MiB', *cells])
        print(f'\n{markdown(["way", "mode", *names], rows)}', flush=True)


if __name__ == '__main__':
    main()
