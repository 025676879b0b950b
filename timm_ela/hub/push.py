"""Uploads a folder that publish.py wrote, or a run of train.py, to the Hugging Face Hub."""
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
from huggingface_hub import HfApi, get_token
from huggingface_hub.utils import validate_repo_id

from .cards import PLACEHOLDER
from .publish import ALL_FILES, FILES, check_finite, export_run
from .train_run import errors_name, read_args, read_checkpoint, write_args


def is_run(folder: str | Path) -> bool:
    """True if a folder is the output of train.py, and not an export of it."""
    return Path(folder, 'args.yaml').is_file() and not Path(folder, 'config.json').is_file()


def _check_access(repo_id: str) -> None:
    validate_repo_id(repo_id)
    if '/' not in repo_id:
        raise ValueError(f'{repo_id!r} has no owner: it must be OWNER/NAME.')
    if get_token() is None:
        raise PermissionError('There is no Hugging Face token: run `hf auth login`, or set HF_TOKEN.')


def _copy(folder: Path, target: Path, repo_id: str) -> None:
    """Copies what is published, and raises an error if timm cannot load it or its card cannot be read."""
    for name in FILES:
        if not (folder / name).is_file():
            raise FileNotFoundError(f'{folder} has no {name}: push a folder that `timm-ela export` wrote, or a run.')
        shutil.copy(folder / name, target)
    check_finite(read_checkpoint(folder / 'model.safetensors')[0])
    with errors_name(f'timm cannot load {folder}'):
        timm.create_model(f'local-dir:{target}', pretrained=True)
    with errors_name(folder / 'README.md'):
        card = (folder / 'README.md').read_text(encoding='utf-8')
    (target / 'README.md').write_text(card.replace(PLACEHOLDER, f'hf-hub:{repo_id}'), encoding='utf-8')
    if (folder / 'args.yaml').is_file():
        write_args(read_args(folder), target / 'args.yaml')


def push_run(run_dir: str | Path, repo_id: str, *, private: bool = False, **options: Any) -> str:
    """Exports a run of train.py with options of `export_run` into a temporary folder, and pushes that folder.

    The other arguments, the result and the errors are those of `push_folder` and `export_run`.
    """
    # before the export, which takes longer
    _check_access(repo_id)
    with TemporaryDirectory() as temporary:
        return push_folder(export_run(run_dir, Path(temporary, 'export'), **options), repo_id, private=private)


def push_folder(folder: str | Path, repo_id: str, *, private: bool = False) -> str:
    """Uploads a folder in one commit.

    Args:
        folder: What `export_run` or `convert_checkpoint` wrote.
        repo_id: 'OWNER/NAME' on the Hub; created if it does not exist.
        private: Whether the repository must be private. If not, the owner's settings decide for a new one.

    Returns:
        Address of the commit.

    Raises:
        FileNotFoundError: If the folder does not exist or lacks a file.
        ValueError: If repo_id is not OWNER/NAME, or timm could not load the folder.
        PermissionError: If there is no token, or the repository is public and should be private.
        RuntimeError: If the Hub refuses the upload or it breaks off. A repository that was created for it stays, empty.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f'There is no folder {folder}.')
    _check_access(repo_id)
    with TemporaryDirectory() as temporary:
        _copy(Path(folder), Path(temporary), repo_id)
        api = HfApi(library_name='timm_ela')
        try:
            # without private, the owner's settings decide
            api.create_repo(repo_id, private=private or None, exist_ok=True)
            if not private or api.model_info(repo_id).private:
                # of these files, what an earlier push left and the folder does not hold goes
                return api.upload_folder(
                    repo_id=repo_id, folder_path=temporary, delete_patterns=list(ALL_FILES),
                    commit_message='Upload with timm_ela').commit_url
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt('all files were uploaded, or none') from error
        except Exception as error:
            # of the Hub, of its HTTP client or of its Xet store; the cause may have the same text
            reasons = dict.fromkeys(str(e) for e in (error, error.__cause__) if e)
            reason = ' '.join(' '.join(reasons).split()).rstrip('.')
            raise RuntimeError(f'{repo_id} on {api.endpoint}: {reason}; all files were uploaded, or none.') from error
    raise PermissionError(f'{repo_id} exists and is public: make it private on the Hub first, or drop --private.')
