"""Time of attention layers beside ELA-B's plain formula, forward and backward, as a Markdown table."""
import argparse

import numpy as np
import torch
from timing import Call, describe, interleave, markdown, ratio
from torch import Tensor, nn

from timm_ela import set_fused
from timm_ela.layers.attn_layers import ATTN_LAYERS

SHAPES = ((256, 56, 56), (512, 28, 28), (1024, 14, 14), (144, 56, 56), (960, 7, 7))
PLAIN = 'ela_b, plain formula'


def step(layer: nn.Module, x: Tensor, upstream: Tensor, fused: bool) -> None:
    set_fused(fused)
    if layer.training:
        torch.autograd.grad(layer(x), (x, *layer.parameters()), upstream)
    else:
        with torch.inference_mode():
            # a copy, as the layer may write into its input: in a model that is new each time
            layer(x.clone())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--shapes', nargs='+', default=['x'.join(map(str, s)) for s in SHAPES], help='CxHxW')
    parser.add_argument('--layers', nargs='+', default=['ela_b', 'se', 'eca', 'ca', 'cbam'], choices=ATTN_LAYERS)
    parser.add_argument('--batch-size', type=int, default=8)
    parser.add_argument('--repeats', type=int, default=15)
    args = parser.parse_args()
    rows = []
    for shape in args.shapes:
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x, upstream = (
                torch.randn(args.batch_size, *map(int, shape.split('x'))).to(memory_format=memory_format)
                for _ in range(2))
            layers = {name: ATTN_LAYERS[name].create(x.shape[1]) for name in args.layers}
            layers[PLAIN] = ATTN_LAYERS['ela_b'].create(x.shape[1])
            for mode in ('inference', 'training'):
                leaf, calls = x.clone().requires_grad_(mode == 'training'), dict[str, Call]()
                for name, layer in layers.items():
                    layer.train(mode == 'training').to(memory_format=memory_format)
                    calls[name] = lambda layer=layer, leaf=leaf, upstream=upstream, fused=name != PLAIN: step(
                        layer, leaf, upstream, fused)
                times = interleave(calls, args.repeats)
                rows.append([
                    shape, str(memory_format).removeprefix('torch.').removesuffix('_format'), mode,
                    f'{np.median(times[PLAIN]):.2f}', *(ratio(times[name], times[PLAIN]) for name in args.layers)])
    head = ['C x H x W', 'format', 'mode', f'{PLAIN}, ms', *args.layers]
    print(f'Time beside the plain formula, batch {args.batch_size}: {describe(args.repeats)}.')
    print(f'\n{markdown(head, rows)}')


if __name__ == '__main__':
    main()
