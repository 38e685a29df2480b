"""Where a model comes from: a local directory, or a name on the Hugging Face hub."""

from pathlib import Path

from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id


def find_folder(path: str) -> str | None:
    """The directory that a path names, or None for a name that the hub may have; asks nobody.

    Raises `ValueError` for what can be neither, and for a directory that is no model's.
    """
    folder = Path(path).expanduser()
    if path.startswith(("/", ".", "~")) and not folder.is_dir():
        raise ValueError(f"model path {path!r} is not a directory")
    if folder.exists():
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"model path {path!r} holds no config.json; give a Hugging Face model directory"
            )
        return str(folder)
    try:
        validate_repo_id(path)
    except HFValidationError as error:
        raise ValueError(
            f"model {path!r} is not a directory, and not how names on the Hugging Face hub look: "
            f"{error}"
        ) from None
    return None


def find_model(path: str) -> str:
    """The directory or hub id for `from_pretrained`, known to be there before anything is loaded.

    Where the hub does not answer (or with `HF_HUB_OFFLINE=1`) a hub id becomes its directory in the
    hub's cache. The hub is asked once, for at most `HF_HUB_ETAG_TIMEOUT` seconds (10): its own
    functions go on trying, file by file, for minutes. Raises `ValueError` for a directory that is
    no model's, and for a name that neither the hub nor its cache has.
    """
    folder = find_folder(path)
    if folder is not None:
        return folder
    try:
        get_hf_file_metadata(hf_hub_url(path, "config.json"))
    except RepositoryNotFoundError:
        raise ValueError(
            f"model {path!r} is not a directory, and the Hugging Face hub has none of that name, "
            "or none that may be read without `hf auth login`"
        ) from None
    except EntryNotFoundError:  # a tokenizer's alone, perhaps
        pass
    except Exception as error:  # of the HTTP library; the hub is at its third
        cached = try_to_load_from_cache(path, "config.json")
        if isinstance(cached, str):
            return str(Path(cached).parent)
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"model {path!r} is neither a directory nor in the Hugging Face hub's cache, and the "
            f"hub cannot be asked: {why}. Give a directory with a model: where the hub can be "
            f"reached, `hf download {path} --local-dir FOLDER` makes one. Recipes with "
            "model.architecture, such as arithmetic, make their model themselves"
        ) from error
    return path
