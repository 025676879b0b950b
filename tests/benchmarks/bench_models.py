"""Compares the time of models with attention with the plain model's in PyTorch, as Markdown tables.

A cell is the median over the repeats of the ratio to the plain model, with its quartiles. A training step is forward,
cross entropy and backward, without an optimizer. On a GPU, convolutions and matrix products are in bfloat16 by
autocast. bench_runtimes.py has onnxruntime and others.
"""
import argparse
import logging
from collections.abc import Iterator
from functools import partial

import numpy as np
import timm
import torch
import torch.nn.functional as F
from timing import BASES, Call, describe, interleave, markdown, names_of, ratio
from torch import Tensor, nn

WAYS = ('contiguous', 'channels_last', 'compile')
BATCH_SIZES = {'cpu': [1, 8], 'cuda': [128]}
_logger = logging.getLogger(__name__)


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
    models = {name: timm.create_model(name).to(**on_device) for name in names}
    batches = [torch.rand(n, 3, args.img_size, args.img_size).to(**on_device) for n in args.batch_sizes]
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
    parser.add_argument('--bases', nargs='+', choices=BASES, default=['mobilenetv2_100'], help='plain models')
    layers = ['ela_b', 'ca', 'eca', 'se']
    parser.add_argument('--layers', nargs='+', default=layers, help='suffixes of the others, but for ELSA')
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
        names, rows = names_of(base, args.layers), []
        for way in args.ways:
            torch.compiler.reset()
            for mode, calls in settings(names, way, args):
                _logger.info(f'{base}, {way}, {mode}')
                times = interleave(calls, args.repeats, device=args.device)
                cells = [ratio(times[name], times[base]) for name in names[1:]]
                rows.append([way, mode, f'{np.median(times[base]):.1f} ms', *cells])
        print(f'\n{markdown(["way", "mode", *names], rows)}', flush=True)


if __name__ == '__main__':
    main()
