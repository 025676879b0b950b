"""Uploads a folder that publish.py wrote, or a run of train.py, to the Hugging Face Hub."""
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import validate_repo_id

from .cards import PLACEHOLDER
from .publish import FILES, check_finite, export_run
from .train_run import errors_name, read_args, read_checkpoint, write_args

_AS_BEFORE = 'the repository is unchanged, unless the upload was already complete'


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
        timm.create_model(f'local-dir:{folder}', pretrained=True)
    with errors_name(folder / 'README.md'):
        card = (folder / 'README.md').read_text(encoding='utf-8')
    (target / 'README.md').write_text(card.replace(PLACEHOLDER, f'hf-hub:{repo_id}'), encoding='utf-8')
    if (folder / 'args.yaml').is_file():
        write_args(read_args(folder), target / 'args.yaml')


def _create_repo(api: HfApi, repo_id: str, private: bool) -> bool:
    """Creates a repository unless it exists. Returns True if it was created."""
    # with None, the owner's settings decide
    try:
        api.create_repo(repo_id, private=private or None)
        return True
    except HfHubHTTPError:
        # it exists, or the token may write to it but not create others
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        return False


def _delete_if_empty(api: HfApi, repo_id: str) -> str:
    """Deletes a repository unless it has a commit, whose answer may have been lost. Says what is left."""
    try:
        if set(api.list_repo_files(repo_id)) <= {'.gitattributes'}:
            api.delete_repo(repo_id)
    except Exception as error:
        # errors of the Hub and of its HTTP client have no common base
        return f'the repository was created and may be empty, since it cannot be deleted ({error})'
    return _AS_BEFORE


def push_run(run_dir: str | Path, repo_id: str, *, private: bool = False, **options: Any) -> str:
    """Exports a run of train.py into a temporary folder, and pushes that folder.

    Args:
        run_dir: Output folder of train.py.
        repo_id, private: As in `push_folder`.
        **options: Options of `export_run`.

    Returns:
        Address of the commit.

    Raises:
        Exception: As in `export_run` and `push_folder`.
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
        RuntimeError: If the Hub refuses the upload or it breaks off. A repository that was created for it is deleted.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f'There is no folder {folder}.')
    _check_access(repo_id)
    with TemporaryDirectory() as temporary:
        _copy(Path(folder), Path(temporary), repo_id)
        api, created = HfApi(library_name='timm_ela'), False
        try:
            created = _create_repo(api, repo_id, private)
            public = private and not api.model_info(repo_id).private
            if not public:
                return api.upload_folder(
                    repo_id=repo_id, folder_path=temporary, commit_message='Upload with timm_ela').commit_url
        except BaseException as error:
            # an interruption, or an error of the Hub, of its HTTP client or of its Xet store
            left = _delete_if_empty(api, repo_id) if created else _AS_BEFORE
            if not isinstance(error, Exception):
                raise KeyboardInterrupt(left) from error
            # the cause may have the same text
            reasons = dict.fromkeys(str(e) for e in (error, error.__cause__) if e)
            reason = ' '.join(' '.join(reasons).split()).rstrip('.')
            raise RuntimeError(
                f'{repo_id} on {api.endpoint}: {reason}; {left}. Run the same command again: it uploads only what is '
                'missing.') from error
    raise PermissionError(f'{repo_id} exists and is public: make it private on the Hub first, or drop --private.')
