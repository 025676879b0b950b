"""A folder that publish.py wrote, or a run of train.py -> a repository on the Hugging Face Hub."""
import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
from huggingface_hub import HfApi, get_token
from huggingface_hub.utils import validate_repo_id

from .cards import PLACEHOLDER
from .publish import FILES, check_finite, export_run
from .train_run import read_checkpoint


def is_run(folder: str | Path) -> bool:
    """True if a folder is a run of train.py that is not exported."""
    return Path(folder, 'args.yaml').is_file() and not Path(folder, 'config.json').is_file()


def _check_access(repo_id: str) -> None:
    validate_repo_id(repo_id)
    if '/' not in repo_id:
        raise ValueError(f'{repo_id!r} has no owner: it must be OWNER/NAME.')
    if get_token() is None:
        raise PermissionError('There is no Hugging Face token: run `hf auth login`, or set HF_TOKEN.')


def _check_loads(folder: Path) -> None:
    """Raises an error unless timm can load the folder, and its card can be read."""
    for name in FILES:
        if not (folder / name).is_file():
            raise FileNotFoundError(f'{folder} has no {name}: push a folder that `timm-ela export` wrote, or a run.')
    for name, read in (('README.md', str), ('config.json', json.loads)):
        try:
            read((folder / name).read_text(encoding='utf-8'))
        except ValueError as error:  # of UTF-8 or JSON
            raise ValueError(f'{folder / name} cannot be read: {error}') from error
    check_finite(read_checkpoint(folder / 'model.safetensors')['state_dict'])
    try:
        timm.create_model(f'local-dir:{folder}', pretrained=True)
    except Exception as error:  # what the files hold goes to timm and to the model, which can raise anything
        raise ValueError(f'timm cannot load {folder}: {" ".join(str(error).split())[:300]}') from error


def push_run(run_dir: str | Path, repo_id: str, *, private: bool = False, **options: Any) -> str:
    """Exports a run of train.py into a temporary folder and uploads it.

    Args:
        run_dir: Folder of the run.
        repo_id: 'OWNER/NAME' on the Hub; created if it does not exist.
        private: Whether the repository is private.
        **options: Keyword arguments of `export_run`.

    Returns:
        The commit's address.

    Raises:
        Exception: As `export_run` and `push_folder` do.
    """
    _check_access(repo_id)  # before the export, which takes longer
    with TemporaryDirectory() as temporary:
        return push_folder(export_run(run_dir, Path(temporary, 'export'), **options), repo_id, private=private)


def push_folder(folder: str | Path, repo_id: str, *, private: bool = False) -> str:
    """Uploads a folder that `export_run` or `convert_checkpoint` wrote, in one commit.

    Args:
        folder: The folder.
        repo_id: 'OWNER/NAME' on the Hub; created if it does not exist.
        private: Whether the repository is private.

    Returns:
        The commit's address.

    Raises:
        FileNotFoundError: If the folder lacks one of the three files.
        ValueError: If repo_id is not OWNER/NAME, or timm could not load the folder.
        PermissionError: If there is no token, or the repository is public and should be private.
        RuntimeError: If the Hub refuses or breaks off. The repository is then as it was: a commit is atomic.
    """
    folder = Path(folder)
    _check_access(repo_id)
    _check_loads(folder)
    api = HfApi(library_name='timm_ela')
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        public = private and not api.model_info(repo_id).private
        if not public:
            with TemporaryDirectory() as temporary:
                for name in FILES:
                    shutil.copy(folder / name, temporary)
                card = Path(temporary, 'README.md')
                text = card.read_text(encoding='utf-8').replace(PLACEHOLDER, f'hf-hub:{repo_id}')
                card.write_text(text, encoding='utf-8')
                commit = api.upload_folder(
                    repo_id=repo_id, folder_path=temporary, commit_message='Upload with timm_ela')
            return commit.commit_url
    except Exception as error:  # the Hub's errors, its HTTP client's and its Xet store's have no common base
        reasons = dict.fromkeys(str(e) for e in (error, error.__cause__) if e)  # the cause may say the same
        reason = ' '.join(' '.join(reasons).split()).rstrip('.')
        raise RuntimeError(
            f'{repo_id} on {api.endpoint}: {reason}. The repository is as it was before, or complete: run the same '
            'command again, which uploads only what is missing.') from error
    raise PermissionError(f'{repo_id} exists and is public: make it private on the Hub first, or drop --private.')
