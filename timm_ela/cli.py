"""The command line: timm-ela list | run | convert | export | push | plot, and `python -m timm_ela`."""
import argparse
import io
import json
import logging
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

from . import __version__


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f'{self.prog}: error: {message} (see {self.prog} --help)\n')


def _list(args: argparse.Namespace) -> None:
    from fnmatch import fnmatch

    from timm.models import get_arch_pretrained_cfgs, get_deprecated_models, list_models, split_model_name_tag

    from .models.registry import MODELS, read_counts

    arch, tag = split_model_name_tag(args.filter, '*')
    # other names of the models, such as mobilenetv2_100_ela_b, are deprecated names to timm
    others = [
        f'{name}.{tag}' for other, name in get_deprecated_models().items() if name in MODELS and fnmatch(other, arch)]
    found = set(list_models([args.filter, *others], include_tags=True))
    rows = []
    for model in MODELS.values():
        cfgs = [cfg for name, cfg in get_arch_pretrained_cfgs(model.name).items() if name in found]
        if cfgs:
            rows.append(dict(
                name=model.name,
                backbone=model.base,
                **read_counts()[model.name]._asdict(),
                # the first tag is the default
                tags=[cfg.tag for cfg in cfgs if cfg.has_weights],
            ))
    if not rows:
        raise ValueError(
            f'No model of timm_ela matches {args.filter!r}: `timm-ela list` shows all, "resnet50*" is a wildcard.')
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    width = max(len(row['name']) for row in rows)
    for layer in dict.fromkeys(MODELS[row['name']].layer for row in rows):
        print(f'{layer.title} - {layer.paper.url}')
        for row in rows:
            if MODELS[row['name']].layer == layer:
                tags = row['tags'] if args.tags else row['tags'][:1]
                more = f' (+{len(row["tags"]) - 1})' if len(row['tags']) > len(tags) else ''
                counts = f'{row["params"] / 1e6:8.3f} M params  {row["macs"] / 1e9:7.3f} G multiply-adds'
                print(f'  {row["name"]:{width}}  {counts}  {" ".join(tags)}{more}'.rstrip())


def _run(args: argparse.Namespace) -> None:
    if not Path(args.script).is_file():
        raise FileNotFoundError(f'There is no script {args.script}.')
    sys.argv = [args.script, *args.args]
    # `python SCRIPT` puts the script's folder first too, unless safe_path switches that off
    if not getattr(sys.flags, 'safe_path', False):
        sys.path[0] = str(Path(args.script).resolve().parent)
    runpy.run_path(args.script, run_name='__main__')


def _given_options(args: argparse.Namespace) -> dict[str, Any]:
    names = ('tag', 'dataset', 'ema', 'class_names', 'license', 'checkpoint')
    return {name: value for name, value in vars(args).items() if name in names}


def _convert(args: argparse.Namespace) -> None:
    from .hub.publish import convert_checkpoint

    out = convert_checkpoint(args.source, args.model, args.out_dir, force=args.force, **_given_options(args))
    _print_written(out, f'local-dir:{out}')


def _export(args: argparse.Namespace) -> None:
    from .hub.publish import export_run

    out = export_run(args.run_dir, args.out_dir, force=args.force, **_given_options(args))
    _print_written(out, f'local-dir:{out}')


def _print_written(place: str | Path, source: str) -> None:
    print(f'Wrote {place}. Load it with: timm.create_model({source!r}, pretrained=True)')


def _push(args: argparse.Namespace) -> None:
    from .hub.push import is_run, push_folder, push_run

    options = _given_options(args)
    if is_run(args.folder):
        commit = push_run(args.folder, args.repo_id, private=args.private, **options)
    elif options:
        names = ', '.join('--no-ema' if name == 'ema' else f'--{name.replace("_", "-")}' for name in options)
        raise ValueError(f'{args.folder} is not a train.py run, so {names} cannot be set: use them with export.')
    else:
        commit = push_folder(args.folder, args.repo_id, private=args.private)
    _print_written(commit, f'hf-hub:{args.repo_id}')


def _plot(args: argparse.Namespace) -> None:
    from .plot import plot_file

    plot_file(
        args.image, args.model, args.output, args.pretrained, stages=args.stages, class_index=args.class_index,
        channel=args.channel, mean=args.mean)
    print(f'Wrote {args.output}')


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog='timm-ela', description='Efficient Local Attention models for timm.',
                     epilog='COMMAND --help has an example; COMMAND --debug shows the traceback of an error.')
    parser.add_argument('--version', action='version', version=__version__)
    # --debug is an option of each command, so that a user can add it at the end of a line that failed
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument('--debug', action='store_true', help='show the traceback of an error')
    # An option that is not given is left out, so that the defaults of export_run and convert_checkpoint hold.
    weights = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    weights.add_argument(
        '--tag', help='tag of the weights, as in MODEL.TAG: letters, digits, "_", "-", "." (default: the dataset; '
        'convert: custom or graft_custom)')
    weights.add_argument(
        '--no-ema', dest='ema', action='store_false', help='take the raw weights, not their moving average')
    weights.add_argument('--class-names', metavar='FILE', help='text file with one class name per line')
    weights.add_argument('--license', help='licence of the weights, such as apache-2.0, for the model card')
    run = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    run.add_argument(
        '--checkpoint', metavar='NAME', help='file name of the checkpoint in the run (default: model_best.pth.tar)')
    run.add_argument(
        '--dataset', metavar='NAME',
        help='name of the dataset in the card (default: that of the run, or its data folder)')
    commands: argparse._SubParsersAction = parser.add_subparsers(dest='command', metavar='COMMAND')

    def command(function, name: str, help: str, example: str, *parents) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=help, description=f'{help[0].upper()}{help[1:]}.', epilog=f'example: timm-ela {name} {example}',
            parents=[common, *parents])
        sub.set_defaults(function=function)
        return sub

    sub = command(_list, 'list', 'list the models', '"resnet50*" --tags')
    sub.add_argument('filter', nargs='?', default='*', help='wildcard, as in timm.list_models')
    sub.add_argument('--tags', action='store_true', help='show all tags, not only the default')
    sub.add_argument('--json', action='store_true', help='print JSON')

    sub = command(
        _run, 'run', 'run a script with the models registered, even if PyTorch\'s autoload is switched off',
        'train.py --model resnet50_ela_b ...')
    sub.add_argument('script', help='Python script, such as timm\'s train.py')
    sub.add_argument('args', nargs=argparse.REMAINDER, help='its arguments')

    sub = command(
        _convert, 'convert', 'write a model folder from a checkpoint of the plain model (graft: add attention that '
        'changes nothing until it is trained) or of a paper\'s authors (rename the weights)',
        'resnet50.pth --model resnet50_ela_b grafted', weights)
    sub.add_argument(
        'source', metavar='checkpoint', help='.pth.tar of train.py, .pth or .safetensors')
    sub.add_argument('out_dir', help='folder to write')
    sub.add_argument('--model', required=True, help='name of a timm_ela model')
    sub.add_argument('--force', action='store_true', help='replace an earlier export in the folder')

    sub = command(
        _export, 'export', 'write a run of train.py as a model folder: weights, config and model card',
        'output/train/my-run my-model --tag flowers', weights, run)
    sub.add_argument('run_dir', help='output folder of train.py')
    sub.add_argument('out_dir', help='folder to write')
    sub.add_argument('--force', action='store_true', help='replace an earlier export in the folder')

    sub = command(
        _push, 'push', 'upload a model folder, or a run of train.py, to the Hugging Face Hub in one commit',
        'my-model me/my-model', weights, run)
    sub.add_argument('folder', help='folder that export or convert wrote, or output folder of train.py')
    sub.add_argument('repo_id', metavar='OWNER/NAME', help='repository; created if needed')
    sub.add_argument('--private', action='store_true', help='create a private repository, and refuse a public one')

    sub = command(
        _plot, 'plot', 'draw where models look (Grad-CAM) and what their ELA gates do',
        'cat.png --model resnet50 resnet50_ela_b -o plot.png')
    sub.add_argument('image', help='image file')
    sub.add_argument(
        '--model', required=True, nargs='+',
        help='any model of timm, hf-hub:OWNER/NAME or local-dir:FOLDER; several are drawn one below the other')
    sub.add_argument('-o', '--output', default='attention.png', help='image file to write (default: %(default)s)')
    sub.add_argument(
        '--class', dest='class_index', type=int, metavar='N',
        help='class that Grad-CAM explains, from 0 (default: the most probable)')
    sub.add_argument('--stages', type=int, nargs='+', metavar='N', help='stages to draw, from 0 (default: all)')
    shown = sub.add_mutually_exclusive_group()
    shown.add_argument(
        '--channel', type=int, metavar='N',
        help='channel whose gates are drawn, from 0 (default: in each stage, the one that varies most)')
    shown.add_argument('--mean', action='store_true', help='draw the mean of the gates of all channels')
    sub.add_argument(
        '--no-pretrained', dest='pretrained', action='store_false',
        help='use random weights (models of hf-hub: and local-dir: load their weights anyway)')
    return parser


def _interrupt(number: int, frame: object) -> None:
    # a second signal must not interrupt the clean-up
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> None:
    """Runs one command. An error is one line on stderr and exit code 2.

    `--debug`, and a script under `run`, keep the traceback.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command is None:
        return parser.print_help()
    if args.command == 'run' and Path(args.script).is_file():
        # outside the try below: an error of the script keeps its traceback
        return _run(args)
    logging.basicConfig(level=logging.WARNING, format='%(message)s')
    if isinstance(sys.stdout, io.TextIOWrapper):
        # a name that the terminal cannot show must not make the command fail
        sys.stdout.reconfigure(errors='backslashreplace')
    # Raise an exception on these signals, so that what is half-written is removed. Under nohup, SIGHUP is ignored and
    # stays so; Windows has no SIGHUP.
    for name in ('SIGTERM', 'SIGHUP'):
        number = getattr(signal, name, None)
        if argv is None and number and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _interrupt)
    if argv is None and args.command == 'list' and hasattr(signal, 'SIGPIPE'):
        # `timm-ela list | head` ends without an error
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        return args.function(args)
    except KeyboardInterrupt as error:
        if args.debug:
            raise
        line = f'interrupted; {str(error) or "nothing was written"}'
    except Exception as error:
        # every error becomes one line
        if args.debug:
            raise
        line = ' '.join(str(error).split()) or repr(error)
    # The upload's progress bar closes only after the except block and leaves spaces on the line: '\r' goes back to its
    # start.
    start = '\r' if args.command == 'push' else ''
    print(f'{start}timm-ela {args.command}: error: {line}', file=sys.stderr)
    sys.exit(2)
