"""The folder that export and convert write: all of it or nothing, and nothing that is not theirs."""
import os
import signal
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from folders import FILES, MODEL, PLAIN, load

from timm_ela.hub.publish import ALL_FILES, convert_checkpoint, export_run


def listing(folder: Path) -> dict[str, bytes | None]:
    """What lies in a folder and below: contents of the files, None for folders."""
    return {str(p.relative_to(folder)): None if p.is_dir() else p.read_bytes() for p in sorted(folder.rglob('*'))}


@pytest.mark.parametrize('step, error, before', [
    ('run_card', OSError(), FILES),
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


def test_an_existing_folder_such_as_a_mount_point_is_written_into(train_run, tmp_path, monkeypatch):
    out = tmp_path / 'out'
    out.mkdir()
    inode = out.stat().st_ino
    monkeypatch.chdir(out)
    export_run(train_run, '.')
    assert out.stat().st_ino == inode and set(os.listdir('.')) == set(ALL_FILES)
    assert (out / 'model.safetensors').stat().st_mode == (out / 'config.json').stat().st_mode  # others may read both


def test_force_replaces_an_export_and_nothing_else(new_model, train_run, tmp_path):
    out = tmp_path / 'a' / 'out'
    export_run(train_run, out)
    with pytest.raises(FileExistsError, match='--force replaces an export'):
        export_run(train_run, out)
    export_run(train_run, out, force=True, tag='second')
    assert set(os.listdir(out)) == set(ALL_FILES) and os.listdir(out.parent) == ['out']
    assert load(out).pretrained_cfg['tag'] == 'second'
    torch.save(new_model(PLAIN).state_dict(), tmp_path / 'plain.pth')
    convert_checkpoint(tmp_path / 'plain.pth', MODEL, out, force=True)
    assert set(os.listdir(out)) == FILES  # the recipe is not that of these weights
    (out / 'mine.txt').write_text('mine')
    for folder, kept in ((out, 'mine.txt'), (train_run, 'checkpoint-0.pth.tar'), (tmp_path, 'a')):
        files = listing(folder)
        with pytest.raises(FileExistsError, match=f'holds {kept}: .* and nothing else'):
            export_run(train_run, folder, force=True)
        assert listing(folder) == files


def test_an_export_inside_its_run_can_be_replaced(train_run):
    for tag in ('first', 'second'):
        export_run(train_run, train_run / 'export', tag=tag, force=True)
        assert load(train_run / 'export').pretrained_cfg['tag'] == tag


INTERRUPTED = '''
import os, signal, sys
from timm_ela import cli
from timm_ela.hub import publish

card = publish.run_card
for name, disposition in (
        ('SIGTERM', signal.SIG_DFL), ('SIGINT', signal.default_int_handler), ('SIGHUP', signal.SIG_DFL),
        ('SIGHUP', signal.SIG_IGN)):  # as nohup sets it
    number = getattr(signal, name)
    signal.signal(number, disposition)
    publish.run_card = lambda *args: os.kill(os.getpid(), number) or card(*args)
    sys.argv = ['timm-ela', 'export', sys.argv[-2], sys.argv[-1]]
    try:
        cli.main()
    except SystemExit as end:
        print(name, end.code, os.path.exists(sys.argv[-1]))
'''


@pytest.mark.skipif(not hasattr(signal, 'SIGHUP'), reason='Windows has no SIGHUP')
def test_a_signal_leaves_nothing_and_nohup_is_heeded(forks, train_run, tmp_path):
    done = forks(INTERRUPTED, train_run, tmp_path / 'out')
    *interrupted, last = done.stdout.splitlines()
    assert interrupted == [f'{name} 2 False' for name in ('SIGTERM', 'SIGINT', 'SIGHUP')]
    assert last.startswith('Wrote ') and set(os.listdir(tmp_path / 'out')) == set(ALL_FILES)
    assert done.stderr.count('timm-ela export: error: interrupted; nothing was written\n') == 3
