"""The command line: timm-ela list | run | convert | export | push | plot | bench, and `python -m timm_ela`."""
import argparse
import json
import logging
import re
import runpy
import shlex
import sys
from pathlib import Path

from . import __version__


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f'{self.prog}: error: {message} (see {self.prog} --help)\n')


def _list(args: argparse.Namespace) -> None:
    from .catalog import describe, model_names
    from .layers import ATTN_LAYERS
    from .registry import MODELS

    names = model_names(args.filter)
    if not names:
        raise ValueError(f'No model of timm_ela matches {args.filter!r}; without a filter, all are listed.')
    names.sort(key=lambda name: list(ATTN_LAYERS).index(MODELS[name][1]))
    models = map(describe, names)  # takes seconds: a line each, as they come
    if args.json:
        print(json.dumps([vars(m) for m in models], indent=2))
        return
    width = max(map(len, names))
    title = None
    for m in models:
        layer = ATTN_LAYERS[MODELS[m.name][1]]
        if title != layer.title:
            title = layer.title
            print(f'{title} - {layer.paper}')
        tags = ' '.join(m.tags if args.tags else m.tags[:1])
        if not args.tags and len(m.tags) > 1:
            tags += f' (+{len(m.tags) - 1})'
        print(f'  {m.name:{width}}  {m.params / 1e6:8.3f} M params  {m.macs / 1e9:7.3f} G mult-adds  {tags}'.rstrip())


def _run(args: argparse.Namespace) -> None:
    if not Path(args.script).is_file():
        raise FileNotFoundError(f'There is no script {args.script}.')
    sys.argv = [args.script, *args.args]
    if not getattr(sys.flags, 'safe_path', False):  # as `python SCRIPT` has it, where that is not switched off
        sys.path[0] = str(Path(args.script).resolve().parent)
    runpy.run_path(args.script, run_name='__main__')


def _given(args: argparse.Namespace) -> dict:
    """The options of weights that stand on the command line; publish.py has the defaults of the others."""
    return {k: getattr(args, k) for k in ('tag', 'ema', 'class_names', 'checkpoint', 'license') if k in args}


def _convert(args: argparse.Namespace) -> None:
    from .publish import convert_checkpoint

    out_dir = convert_checkpoint(args.source, args.model, args.out_dir, force=args.force, **_given(args))
    num_classes = json.loads((out_dir / 'config.json').read_text())['num_classes']
    print(f'Wrote {out_dir}: train.py --model {args.model} --num-classes {num_classes} '
          f'--initial-checkpoint {out_dir}/model.safetensors ...')


def _export(args: argparse.Namespace) -> None:
    from .publish import export_run

    out_dir = export_run(args.run_dir, args.out_dir, force=args.force, **_given(args))
    print(f"Wrote {out_dir}: timm.create_model('local-dir:{out_dir}', pretrained=True)")


def _push(args: argparse.Namespace) -> None:
    from .publish import push_folder

    print(push_folder(args.folder, args.repo_id, private=args.private, **_given(args)))


def _plot(args: argparse.Namespace) -> None:
    from .plot import plot_file

    plot_file(args.image, args.model, args.output, stages=args.stages, pretrained=args.pretrained)
    print(f'Wrote {args.output}')


def _bench(args: argparse.Namespace) -> None:
    import torch

    from .bench import MODELS, SHAPES, run_bench
    from .bench_report import check_outputs, report, write_outputs
    from .timing import Setting, pick_device

    check_outputs(args.json, args.plot)
    device = pick_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    setting = Setting(
        device, args.batch_size or (8 if device.type == 'cpu' else 256), args.repeats, args.channels_last,
        args.amp_dtype and getattr(torch, args.amp_dtype), args.compile)
    result = run_bench(
        setting,
        shapes=() if args.only == 'models' else args.shapes or SHAPES,
        models=() if args.only == 'layers' else args.models or MODELS,
        variant=args.variant,
        img_size=args.img_size,
    )
    result['command'] = shlex.join(['timm-ela', *args.words])
    print(report(result))
    write_outputs(result, args.json, args.plot)


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f'{text!r} is no whole number above 0')
    return int(text)


def _shape(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r'[1-9][0-9]*(x[1-9][0-9]*){2}', text):
        raise argparse.ArgumentTypeError(f'{text!r} is no CxHxW, channels by height by width, such as 256x56x56')
    return tuple(map(int, text.split('x')))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog='timm-ela', description='Efficient Local Attention models for timm.',
                     epilog='COMMAND --help has an example; COMMAND --debug shows the traceback of an error.')
    parser.add_argument('--version', action='version', version=__version__)
    # Takes --debug after the command, where one adds it to a line that failed.
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument('--debug', action='store_true', help='show the traceback of an error')
    weights = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    weights.add_argument('--tag', help='tag of the weights')
    weights.add_argument(
        '--no-ema', dest='ema', action='store_false', default=argparse.SUPPRESS,
        help='take the raw weights, not their average')
    weights.add_argument('--class-names', metavar='FILE', help='text file with one class name a line')
    run = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    run.add_argument('--checkpoint', metavar='NAME', help='which one of the run\'s (default: model_best.pth.tar)')
    run.add_argument('--license', help='licence of the weights; by default that of the graft the run began with')
    commands: argparse._SubParsersAction = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')

    def command(function, name: str, help: str, example: str, *parents) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=help, description=f'{help[0].upper()}{help[1:]}.', epilog=f'example: timm-ela {name} {example}',
            parents=[common, *parents])
        sub.set_defaults(function=function)
        return sub

    sub = command(_list, 'list', 'list the models', '"resnet50*" --tags')
    sub.add_argument('filter', nargs='?', default='', help='wildcard, as in timm.list_models')
    sub.add_argument('--tags', action='store_true', help='name every tag')
    sub.add_argument('--json', action='store_true', help='print JSON')

    sub = command(
        _run, 'run', 'run a script with the models registered, where PyTorch\'s autoloading is off',
        'train.py --model resnet50_ela_b ...')
    sub.add_argument('script', help='Python script, such as timm\'s train.py')
    sub.add_argument('args', nargs=argparse.REMAINDER, help='its arguments')

    sub = command(
        _convert, 'convert', 'graft a plain checkpoint, or rename an author\'s, and write it as a folder',
        'resnet50.pth --model resnet50_ela_b grafted', weights)
    sub.add_argument(
        'source', metavar='checkpoint', help='.pth.tar of train.py, .pth or .safetensors of the plain model')
    sub.add_argument('out_dir', help='folder to write')
    sub.add_argument('--model', required=True, help='model of ours')
    sub.add_argument('--force', action='store_true', help='replace the folder')

    sub = command(
        _export, 'export', 'write a run of train.py as a folder of weights, config and card',
        'output/train/my-run my-model --tag flowers', weights, run)
    sub.add_argument('run_dir', help='output folder of train.py')
    sub.add_argument('out_dir', help='folder to write')
    sub.add_argument('--force', action='store_true', help='replace the folder')

    sub = command(
        _push, 'push', 'upload a folder, or a run of train.py, to the Hub in one commit', 'my-model me/my-model',
        weights, run)
    sub.add_argument('folder', help='folder that export wrote, or output folder of train.py')
    sub.add_argument('repo_id', metavar='OWNER/NAME', help='repository; created if needed')
    sub.add_argument('--private', action='store_true', help='create it private')

    sub = command(
        _plot, 'plot', 'draw a model\'s attention on a picture', 'cat.png --model local-dir:my-model -o attention.png')
    sub.add_argument('image', help='picture')
    sub.add_argument('--model', required=True, help='model name, hf-hub:OWNER/NAME or local-dir:FOLDER')
    sub.add_argument('-o', '--output', default='attention.png', help='picture to write (default: %(default)s)')
    sub.add_argument('--stages', type=int, nargs='+', metavar='N', help='stages to draw (default: all)')
    sub.add_argument('--no-pretrained', dest='pretrained', action='store_false', help='random weights')

    sub = command(
        _bench, 'bench', 'time ELA beside timm\'s attention layers, and models beside their plain ones',
        '--threads 2 --channels-last --plot bench.png')
    sub.add_argument('--only', choices=('layers', 'models'), help='leave the others out')
    sub.add_argument('--shapes', type=_shape, nargs='+', metavar='CxHxW',
                     help='of the layers\' input (default: ResNet-50\'s, and two of MobileNetV2\'s)')
    sub.add_argument('--variant', choices=('t', 'b', 's', 'l'), default='b', help='ELA layer (default: %(default)s)')
    sub.add_argument('--models', nargs='+', metavar='NAME', help='models of ours (default: resnet50 and mobilenetv2)')
    sub.add_argument('--img-size', type=_positive, default=224, metavar='N', help='of models (default: %(default)s)')
    sub.add_argument('-b', '--batch-size', type=_positive, metavar='N', help='default: 8 on a CPU, 256 on a GPU')
    sub.add_argument('--device', choices=('cpu', 'cuda'), help='default: cuda where there is one')
    sub.add_argument('--threads', type=_positive, metavar='N', help='of a CPU (default: PyTorch\'s choice)')
    sub.add_argument('--channels-last', action='store_true', help='memory format')
    sub.add_argument('--amp-dtype', choices=('bfloat16', 'float16'), help='autocast to it')
    sub.add_argument('--compile', action='store_true', help='with torch.compile, all of them')
    sub.add_argument('--repeats', type=_positive, default=30, metavar='N', help='default: %(default)s')
    sub.add_argument('--json', metavar='FILE', help='file to write all numbers to')
    sub.add_argument('--plot', metavar='FILE', help='picture to write, such as bench.png')
    return parser


def main(argv: list[str] | None = None) -> None:
    """Runs one command; an error is one line on stderr and exit code 2."""
    args = _parser().parse_args(argv)
    args.words = sys.argv[1:] if argv is None else argv
    if args.command == 'run' and Path(args.script).is_file():
        return _run(args)  # the script's errors are its own
    logging.basicConfig(level=logging.WARNING, format='%(message)s')
    logging.getLogger(__package__).setLevel(logging.INFO)
    try:
        return args.function(args)
    except (Exception, KeyboardInterrupt) as error:  # the outermost place: every error becomes one line
        if args.debug:
            raise
        line = ' '.join(str(error).split()) or repr(error)
    # Only now are the frames of the error gone, and with them an upload's progress bar, which leaves a blanked line.
    start = '\r' if args.command == 'push' else ''
    print(f'{start}timm-ela {args.command}: error: {line}', file=sys.stderr)
    sys.exit(2)
