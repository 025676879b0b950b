"""The folder that export and convert write: all of it or nothing, and nothing that is not theirs."""
import os
import subprocess
from functools import partial
from pathlib import Path

import pytest
import timm
from helpers import run_python

from timm_ela.hub import publish
from timm_ela.hub.publish import ALL_FILES, FILES, convert_checkpoint, export_run

MODEL = 'mobilenetv2_050_ela_t'  # the smallest


@pytest.fixture
def train_run(write_run) -> Path:
    return write_run(timm.create_model(MODEL, num_classes=3))


def listing(folder: Path) -> dict[str, bytes | None]:
    """What lies in a folder and below: contents of the files, None for folders."""
    return {str(p.relative_to(folder)): None if p.is_dir() else p.read_bytes() for p in sorted(folder.rglob('*'))}


def fail(error: BaseException, *_, **__):
    raise error


@pytest.mark.parametrize('step, error, before', [
    ('TrainRun.read', OSError(), FILES),
    ('run_card', OSError(), FILES),
    ('save_for_hf', OSError('no space left'), FILES),
    ('save_for_hf', OSError('no space left'), ()),
    ('save_for_hf', KeyboardInterrupt(), None),
])
def test_whatever_fails_the_folder_stays_as_it_was(train_run, tmp_path, monkeypatch, step, error, before):
    out = tmp_path / 'new' / 'out' if before is None else tmp_path / 'out'
    if before is not None:
        out.mkdir()
    for name in before or ():
        (out / name).write_text('old')
    files = listing(tmp_path)
    monkeypatch.setattr(f'timm_ela.hub.publish.{step}', partial(fail, error))
    with pytest.raises(type(error)):
        export_run(train_run, out, force=True)
    assert listing(tmp_path) == files


def test_an_existing_folder_is_written_into(train_run, tmp_path, monkeypatch):
    out = tmp_path / 'out'
    out.mkdir()
    inode = out.stat().st_ino
    monkeypatch.chdir(out)
    export_run(train_run, '.')
    assert out.stat().st_ino == inode and set(os.listdir('.')) == set(ALL_FILES)


def test_a_mount_point_is_written_into(train_run, tmp_path):
    out = tmp_path / 'out'
    out.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', 'tmpfs', out], capture_output=True, check=False).returncode:
        pytest.skip('this user may not mount')
    try:
        (out / 'lost+found').mkdir()  # as a new disk has it
        export_run(train_run, out)
        assert set(os.listdir(out)) == {*ALL_FILES, 'lost+found'}
    finally:
        subprocess.run(['umount', out], check=True)


def test_force_replaces_an_export_and_nothing_else(train_run, tmp_path):
    out = tmp_path / 'a' / 'out'
    export_run(train_run, out)
    with pytest.raises(FileExistsError, match='--force replaces an export'):
        export_run(train_run, out)
    export_run(train_run, out, force=True, tag='second')
    assert set(os.listdir(out)) == set(ALL_FILES) and os.listdir(out.parent) == ['out']
    assert timm.create_model(f'local-dir:{out}', pretrained=True).pretrained_cfg['tag'] == 'second'

    (out / 'mine.txt').touch()
    files = listing(out)
    with pytest.raises(FileExistsError, match=r'holds mine.txt and is no export'):
        export_run(train_run, out, force=True)
    assert listing(out) == files


def test_a_readme_alone_is_no_export(train_run, tmp_path):
    out = tmp_path / 'out'
    out.mkdir()
    (out / 'README.md').write_text('mine')
    with pytest.raises(FileExistsError, match=r'holds README.md and is no export'):
        export_run(train_run, out, force=True)
    assert listing(out) == {'README.md': b'mine'}


@pytest.mark.parametrize('out', ['run', '.', 'run/../run'])
def test_force_never_touches_what_is_read(train_run, tmp_path, out):
    files = listing(tmp_path)
    with pytest.raises(FileExistsError, match='could be overwritten'):
        export_run(train_run, tmp_path / out, force=True)
    with pytest.raises(FileExistsError, match='could be overwritten'):
        convert_checkpoint(train_run / 'last.pth.tar', MODEL, tmp_path / out, force=True)
    assert listing(tmp_path) == files


@pytest.mark.parametrize('what', ['checkpoint', 'class names'])
def test_force_never_touches_what_is_read_through_a_link_or_an_option(train_run, tmp_path, what):
    out = export_run(train_run, tmp_path / 'out')
    names = None
    if what == 'checkpoint':
        best = train_run / 'model_best.pth.tar'
        best.rename(out / 'README.md')
        best.symlink_to(out / 'README.md')
    else:
        names = out / 'README.md'
        names.write_text('a\nb\nc\n')
    files = listing(tmp_path)
    with pytest.raises(FileExistsError, match='could be overwritten'):
        export_run(train_run, out, force=True, class_names=names)
    assert listing(tmp_path) == files


def test_of_two_exports_at_the_same_time_the_second_fails(train_run, tmp_path, monkeypatch):
    out, card = tmp_path / 'out', publish.run_card

    def with_another(*args):
        with pytest.raises(FileExistsError, match='being written by another command'):
            export_run(train_run, out, tag='second')
        return card(*args)

    monkeypatch.setattr(publish, 'run_card', with_another)
    export_run(train_run, out, tag='first')
    assert set(os.listdir(out)) == set(ALL_FILES)
    assert timm.create_model(f'local-dir:{out}', pretrained=True).pretrained_cfg['tag'] == 'first'


def test_a_file_that_appears_meanwhile_is_kept_and_named(train_run, tmp_path, monkeypatch):
    out, card = tmp_path / 'out', publish.run_card

    def with_a_file(*args):
        (out / 'README.md').write_text('mine')
        return card(*args)

    monkeypatch.setattr(publish, 'run_card', with_a_file)
    with pytest.raises(FileExistsError, match=r'README.md'):
        export_run(train_run, out)
    assert listing(out) == {'README.md': b'mine'}


INTERRUPTED = '''
import os, signal, sys
from pathlib import Path
from timm_ela.cli import main

source, out, place, heeded = sys.argv[1:]
signals = [getattr(signal, name) for name in ('SIGTERM', 'SIGINT', 'SIGHUP') if hasattr(signal, name)]
armed = []


def strike(event, args):
    """Sends a signal to this process: as the card is opened, or at the n-th move of a file."""
    if armed and event == place and (event == 'os.rename' or Path(str(args[0])).name == 'README.md'):
        armed[0] -= 1
        if not armed[0]:
            armed.clear()
            os.kill(os.getpid(), number)


def listing():
    return {path.name: path.read_bytes() for path in Path(out).rglob('*')} if os.path.exists(out) else None


def export(nth):
    """Whether an export that is struck at the n-th time is written; if not, nothing has changed."""
    global number
    number, before = signals[nth % len(signals)], listing()
    # Not as inherited: a shell starts a program in the background with signals ignored.
    default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    signal.signal(number, default if heeded == 'heeded' else signal.SIG_IGN)
    armed[:] = [nth]
    sys.argv = ['timm-ela', 'export', source, out, '--force', '--tag', f'number{nth}']
    try:
        main()
        return True
    except SystemExit as end:
        assert (end.code, listing()) == (2, before), (nth, number)
        return False
    finally:
        armed.clear()


sys.addaudithook(strike)
for before in ('nothing', 'an export'):
    struck = next(nth for nth in range(1, 99) if export(nth)) - 1
    print(f'{before}: {struck}')
'''


@pytest.mark.parametrize('place, new, replaced', [('open', 1, 1), ('os.rename', 4, 8)], ids=['written', 'moved'])
def test_wherever_a_signal_strikes_the_folder_stays_as_it_was(train_run, tmp_path, place, new, replaced):
    """SIGTERM, SIGINT and SIGHUP in turn. Files that are replaced are moved away first."""
    done = run_python(INTERRUPTED, train_run, tmp_path / 'out', place, 'heeded')
    assert [line for line in done.stdout.splitlines() if ': ' in line and 'Wrote' not in line] == [
        f'nothing: {new}', f'an export: {replaced}']
    said = [line for line in done.stderr.splitlines() if 'error' in line]
    assert said == ['timm-ela export: error: interrupted; nothing was written'] * (new + replaced)
    assert set(listing(tmp_path / 'out')) == {*ALL_FILES}


def test_a_signal_that_is_ignored_stays_ignored_as_nohup_asks(train_run, tmp_path):
    done = run_python(INTERRUPTED, train_run, tmp_path / 'out', 'os.rename', 'ignored')
    assert 'nothing: 0' in done.stdout and 'interrupted' not in done.stderr
    assert set(listing(tmp_path / 'out')) == {*ALL_FILES}
