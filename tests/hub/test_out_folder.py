"""The folder that export and convert write: all of it or nothing, and nothing that is not theirs."""
import os
import subprocess
from pathlib import Path
from unittest.mock import Mock

import pytest
import timm

from timm_ela.hub import publish
from timm_ela.hub.publish import ALL_FILES, FILES, convert_checkpoint, export_run

MODEL = 'mobilenetv2_050_ela_t'  # the smallest


def listing(folder: Path) -> dict[str, bytes | None]:
    """What lies in a folder and below: contents of the files, None for folders."""
    return {str(p.relative_to(folder)): None if p.is_dir() else p.read_bytes() for p in sorted(folder.rglob('*'))}


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
    monkeypatch.setattr(f'timm_ela.hub.publish.{step}', Mock(side_effect=error))
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
    with pytest.raises(FileExistsError, match='README.md is a file'):
        export_run(train_run, out / 'README.md', force=True)
    export_run(train_run, out, force=True, tag='second')
    assert set(os.listdir(out)) == set(ALL_FILES) and os.listdir(out.parent) == ['out']
    assert timm.create_model(f'local-dir:{out}', pretrained=True).pretrained_cfg['tag'] == 'second'


@pytest.mark.parametrize('old, kept', [(FILES, 'mine.txt'), ((), 'README.md')], ids=['beside an export', 'alone'])
def test_what_is_no_export_is_kept(train_run, tmp_path, old, kept):
    out = tmp_path / 'out'
    out.mkdir()
    for name in (*old, kept):
        (out / name).write_text('mine')
    files = listing(out)
    with pytest.raises(FileExistsError, match=f'holds {kept} and is no export'):
        export_run(train_run, out, force=True)
    assert listing(out) == files


@pytest.mark.parametrize('out', ['run', '.', 'run/../run'])
def test_force_never_touches_what_is_read(train_run, tmp_path, out):
    files = listing(tmp_path)
    with pytest.raises(FileExistsError, match='could be overwritten'):
        export_run(train_run, tmp_path / out, force=True)
    with pytest.raises(FileExistsError, match='could be overwritten'):
        convert_checkpoint(train_run / 'last.pth.tar', MODEL, tmp_path / out, force=True)
    assert listing(tmp_path) == files


def test_force_never_touches_what_is_read_through_a_link_or_an_option(train_run, tmp_path):
    out, best = export_run(train_run, tmp_path / 'out'), train_run / 'model_best.pth.tar'
    (out / 'README.md').write_text('a\nb\nc\n')
    files = listing(tmp_path)
    with pytest.raises(FileExistsError, match='could be overwritten'):
        export_run(train_run, out, force=True, class_names=out / 'README.md')
    assert listing(tmp_path) == files
    best.rename(out / 'README.md')
    best.symlink_to(out / 'README.md')
    files = listing(tmp_path)
    with pytest.raises(FileExistsError, match='could be overwritten'):
        export_run(train_run, out, force=True)
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
    monkeypatch.setattr(
        publish, 'run_card', lambda *args: (out / 'README.md').write_text('mine') and card(*args))
    with pytest.raises(FileExistsError, match='README.md'):
        export_run(train_run, out)
    assert listing(out) == {'README.md': b'mine'}


INTERRUPTED = '''
import os, signal, sys
from pathlib import Path
from timm_ela.cli import main

source, out = sys.argv[1:]
SIGNALS = [getattr(signal, name) for name in ('SIGTERM', 'SIGINT', 'SIGHUP') if hasattr(signal, name)]
armed = []


def strike(event, args):
    """Sends a signal to this process: as the card is opened, or as a file is moved, at the n-th time."""
    if armed and (event == 'os.rename' or event == 'open' and Path(str(args[0])).name == 'README.md'):
        armed[0] -= 1
        if not armed[0]:
            os.kill(os.getpid(), armed.pop(1))


def listing():
    return {path.name: path.read_bytes() for path in Path(out).rglob('*')} if os.path.exists(out) else None


def export(nth, heeded=True):
    """Whether an export that is struck at the n-th time is written; if not, nothing has changed."""
    number, before = SIGNALS[nth % len(SIGNALS)], listing()
    # Not as inherited: a shell starts a program in the background with signals ignored.
    default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    signal.signal(number, default if heeded else signal.SIG_IGN)
    armed[:] = [nth, number]
    sys.argv = ['timm-ela', 'export', source, out, '--force', '--tag', f'number{nth}']
    try:
        main()
        return True
    except SystemExit as end:
        assert (end.code, listing()) == (2, before), (nth, number)
        return False
    finally:
        struck.append(armed[0] <= 0)
        armed.clear()


sys.addaudithook(strike)
for before in ('nothing', 'an export'):
    struck = []
    while not export(len(struck) + 1):
        pass
    print(f'{before}: {sum(struck)}')
struck = []
print('ignored:', [export(nth, heeded=False) for nth in (3, 4, 5)], struck)
'''


def test_wherever_a_signal_strikes_the_folder_stays_as_it_was_and_nohup_is_heeded(forks, train_run, tmp_path):
    """SIGTERM, SIGINT and SIGHUP in turn: at the card and 4 moves, or 8 where each file is first moved away."""
    done = forks(INTERRUPTED, train_run, tmp_path / 'out')
    told = [line for line in done.stdout.splitlines() if not line.startswith('Wrote')]
    assert told == ['nothing: 5', 'an export: 9', f'ignored: {[True] * 3} {[True] * 3}']
    said = [line for line in done.stderr.splitlines() if 'error' in line]
    assert said == ['timm-ela export: error: interrupted; nothing was written'] * 14
    assert set(listing(tmp_path / 'out')) == {*ALL_FILES}
