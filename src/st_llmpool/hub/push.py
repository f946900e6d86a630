"""Push: an examined model becomes one commit of a Hub repository, whole or not at all.

`model.push_to_hub` works too, but it uploads unexamined, keeps files of whatever was pushed before, and may spread a
large or a failing upload over several commits, each of which people can load.
"""

from __future__ import annotations

import fnmatch
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from sentence_transformers import SentenceTransformer

from ..modules.errors import ConfigurationError, DataError, InputError, StLlmpoolError
from ..modules.seal import MANIFEST
from ..utils.files import slug
from ..utils.reading import read_json
from .doctor import examine
from .export import export, foreign_types, has_native_form

# What a trainer leaves beside a model: of no use to a recipient, and partly pickled.
_TRAINING_STATE = ("optimizer*", "scheduler.pt", "scaler.pt", "rng_state*", "training_args.bin", "trainer_state.json")
# What may be loaded in place of a new model's files.
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.onnx", "adapter_config.json")
_CARD_PLACEHOLDER = "sentence_transformers_model_id"


class PushError(StLlmpoolError, RuntimeError):
    """The Hub refused, or could not be reached."""


@dataclass(frozen=True)
class Pushed:
    """What is on the Hub now.

    Attributes:
        repo_id: The repository, `user/name`.
        revision: Where in it: a branch, or `refs/pr/N` of a pull request.
        commit: The commit, to pin this very model.
        url: Page of the branch or of the pull request.
        private: True if only its owner can load it.
        native: True if it loads without `trust_remote_code`.
        adapter_base: Hub id of the base that a recipient downloads too; None if the model is complete.
        removed: Files that an earlier push listed in its manifest, and that this one does not have.
    """

    repo_id: str
    revision: str
    commit: str
    url: str
    private: bool
    native: bool
    adapter_base: str | None
    removed: tuple[str, ...]

    def how_to_load(self) -> str:
        """Returns the line that loads the model anywhere, with what it needs."""
        arguments = [f'"{self.repo_id}"']
        arguments += [f'revision="{self.revision}"'] if self.revision != "main" else []
        arguments += [] if self.native else ["trust_remote_code=True"]
        kind = "native: neither flag nor package needed" if self.native else "portable: its code comes along"
        needs = f"; an adapter: needs peft, and {self.adapter_base} is downloaded too" if self.adapter_base else ""
        private = "; private: needs a token" if self.private else ""
        return f"SentenceTransformer({', '.join(arguments)})  # {kind}{needs}{private}"


def push(
    model: SentenceTransformer | str | Path,
    repo_id: str | None = None,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    native: bool | None = None,
    merge: bool = False,
    check: bool = True,
    trust_remote_code: bool = False,
    commit_message: str | None = None,
    token: str | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Pushed:
    """Examines a model and uploads it in one commit.

    Args:
        model: The folder of a saved model, or a loaded one.
        repo_id: `user/name`, or `name` below the token's user; None takes the folder's name, or that of the run for a
            run's folder ``model``.
        private: Create the repository as private.
        revision: Branch to push to, created from main if it is new, or `refs/pr/N`; None is main.
        create_pr: Open a pull request instead, for repositories of others too.
        native: Push the native form, see `export`; None does where the design has one and its vectors are the same,
            and the portable form elsewhere.
        merge: Push with the adapter merged, see `export`.
        check: False pushes whatever the doctor says.
        trust_remote_code: Allow code in the folder that is not the installed st_llmpool's to run for the examination.
        commit_message: Title of the commit or pull request.
        token: Hub token with the right to write; None takes the one of `hf auth login` or HF_TOKEN.
        tell: Called with a line at every step.

    Returns:
        Where it is, and how to load it.

    Raises:
        ConfigurationError: If names or settings do not fit, the base of an adapter is a local path, or no token is
            found.
        InputError: If the doctor finds a fault, or an export gives other vectors.
        PushError: If the Hub refuses or cannot be reached. The repository then holds what it held before.

    Example:
        >>> push("runs/mine/model", "me/my-embedder", private=True).how_to_load()  # doctest: +SKIP
        'SentenceTransformer("me/my-embedder", trust_remote_code=True)  # portable: its code comes along; ...'
    """
    if create_pr and revision is not None:
        raise ConfigurationError(
            f"create_pr opens a branch of its own, so revision={revision!r} cannot hold too. Leave one of them out."
        )
    api = HfApi(token=token)
    proposes = create_pr or (revision or "").startswith("refs/pr/")
    repo_id = _repository_name(api, repo_id, model, proposes=proposes)
    if private:
        _refuse_public(api, repo_id)
    with tempfile.TemporaryDirectory() as scratch:
        folder = _as_folder(model, Path(scratch) / "model", repo_id)
        if not merge:
            _refuse_local_base(folder)
        if check:
            tell("Examining the model")
            _require_sound(folder, trust_remote_code, tell)
        if native is None and has_native_form(folder, merge=merge):
            tell("This design has a native form, which needs no flag: comparing its vectors in a fresh process")
            try:
                folder = export(
                    folder, Path(scratch) / "native", native=True, merge=merge, trust_remote_code=trust_remote_code
                )
                merge = False
            except (ConfigurationError, InputError) as error:
                tell(f"It stays portable. {error}")
        if native or merge:
            tell("Exporting, and comparing vectors in a fresh process")
            folder = export(
                folder, Path(scratch) / "export", native=bool(native), merge=merge, trust_remote_code=trust_remote_code
            )
        return _commit(api, folder, repo_id, private, revision, create_pr, commit_message, tell)


def _repository_name(
    api: HfApi, repo_id: str | None, model: SentenceTransformer | str | Path, *, proposes: bool
) -> str:
    """Returns `user/name`, and so finds a missing token or a foreign name before anything is computed."""
    if repo_id is None and isinstance(model, SentenceTransformer):
        raise ConfigurationError("A model in memory has no folder to be named after. Pass repo_id='user/name'.")
    name = repo_id or _default_name(Path(str(model)).resolve())
    if not (api.token or get_token()):
        raise ConfigurationError(
            "No Hub token found. Log in with `hf auth login`, or set HF_TOKEN to one that may write "
            "(https://huggingface.co/settings/tokens)."
        )
    with _explained("Asking the Hub whose token this is"):
        who = api.whoami()
    own = [who["name"], *(organisation["name"] for organisation in who.get("orgs", []))]
    name = name if "/" in name else f"{own[0]}/{name}"
    if not _is_repo_id(name):
        raise ConfigurationError(
            f"{name!r} cannot name a repository: letters, digits, '.', '_' and single '-', at most 96 of them."
        )
    if name.split("/")[0] not in own and not proposes:
        raise ConfigurationError(
            f"{name!r} is not below a name of this token's ({', '.join(own)}). Push to one of these, or propose it "
            f"(--create-pr)."
        )
    return name


def _default_name(folder: Path) -> str:
    """Returns the folder's name; every run's model is in a folder of the same name, so there it is the run's."""
    is_run = any((folder.parent / file).is_file() for file in ("training.json", "recipe.yaml"))
    named_after = folder.parent if folder.name == "model" and is_run else folder
    if named_after.name == "model" or not slug(named_after.name):
        raise ConfigurationError(f"{folder} says too little to name a repository after. Pass a name (user/name).")
    return slug(named_after.name)


def _refuse_public(api: HfApi, repo_id: str) -> None:
    """Creating a repository that exists changes nothing, so a public one would stay public."""
    with _explained(f"Looking for {repo_id}"):
        public = api.repo_exists(repo_id) and not api.model_info(repo_id).private
    if public:
        raise ConfigurationError(
            f"{repo_id} exists and is public, so --private cannot hold. Make it private in its settings on the Hub, "
            f"or push to another name."
        )


def _as_folder(model: SentenceTransformer | str | Path, target: Path, repo_id: str) -> Path:
    if isinstance(model, SentenceTransformer):
        model.save_pretrained(str(target), model_name=repo_id)
        return target
    folder = Path(model)
    if not (folder / "modules.json").is_file():
        raise ConfigurationError(
            f"{folder} is not a saved model: it has no modules.json. Name the folder that save_pretrained wrote."
        )
    return folder


def _refuse_local_base(folder: Path) -> None:
    base = _adapter_base(folder)
    if base is not None and (Path(base).exists() or not _is_repo_id(base)):
        raise ConfigurationError(
            f"The adapter in {folder} names its base by a path of this machine, {base!r}: nobody else could load it. "
            f"Push it merged (--merge), or train from the base's Hub id."
        )


def _adapter_base(folder: Path) -> str | None:
    file = folder / "adapter_config.json"
    return json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"] if file.is_file() else None


def _is_repo_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _require_sound(folder: Path, trust_remote_code: bool, tell: Callable[[str], None]) -> None:
    findings = examine(folder, trust_remote_code=trust_remote_code).findings
    for finding in findings:
        if finding.status == "warning":
            tell(f"Warning, {finding.check}: {finding.detail}")
    faults = [f"{found.check}: {found.detail}" for found in findings if found.status == "failed"]
    if faults:
        raise InputError(
            f"{folder} is not sound, and whoever loads it would meet this:\n  "
            + "\n  ".join(faults)
            + "\nMend it, or push it as it is with --no-check."
        )
    unseen = [f"{found.check}: {found.detail}" for found in findings if found.status == "skipped"]
    if unseen:
        raise InputError(f"{folder} was not examined. {'; '.join(unseen)} Or push it unexamined with --no-check.")


def _commit(
    api: HfApi,
    folder: Path,
    repo_id: str,
    private: bool,
    revision: str | None,
    create_pr: bool,
    message: str | None,
    tell: Callable[[str], None],
) -> Pushed:
    """Opens the repository and makes the commit, on exactly the state that its deletions were worked out from."""
    with _explained(f"Opening {repo_id}"):
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        before = api.model_info(repo_id, revision=revision)
    additions = [_addition(folder, file, repo_id) for file in _model_files(folder)]
    brought = {addition.path_in_repo for addition in additions}
    there = [sibling.rfilename for sibling in before.siblings or []]
    native = not foreign_types(folder)
    listed = _listed_files(api, repo_id, before.sha) if MANIFEST in there else set()
    removed = sorted(path for path in there if path not in brought and path in listed)
    if left := sorted(path for path in {*there} - brought - listed if _matches(path, _WEIGHTS)):
        tell(f"Left in {repo_id}, since no earlier push lists them: {', '.join(left)}. Remove what is of an old model.")
    size = sum(addition.upload_info.size for addition in additions) / 2**20
    tell(f"Uploading {len(additions)} files, {size:,.1f} MiB, to {repo_id}")
    with _explained(f"Uploading to {repo_id}"):
        done = api.create_commit(
            repo_id,
            # A single commit, unlike `upload_folder`: people can load every commit, so none may hold half a model.
            operations=[*additions, *(CommitOperationDelete(path_in_repo=path) for path in removed)],
            commit_message=message or f"Add {'native' if native else 'portable'} embedding model",
            revision=revision,
            create_pr=create_pr,
            parent_commit=before.sha,
        )
    if done.oid == before.sha:
        tell(f"Nothing has changed: {repo_id} holds this very model")
    where = done.pr_revision or revision or "main"
    return Pushed(
        repo_id=repo_id,
        revision=where,
        commit=done.oid,
        url=done.pr_url or f"{api.endpoint}/{repo_id}" + ("" if where == "main" else f"/tree/{quote(where, safe='')}"),
        private=bool(before.private),
        native=native,
        adapter_base=_adapter_base(folder),
        removed=tuple(removed),
    )


def _model_files(folder: Path) -> Iterator[Path]:
    """Yields the files to upload: all of the folder but hidden ones, caches, checkpoints and training state."""
    for file in sorted(folder.rglob("*")):
        parts = file.relative_to(folder).parts
        skipped = any(part.startswith((".", "checkpoint-")) or part == "__pycache__" for part in parts)
        if file.is_file() and not skipped and not _matches(file.name, _TRAINING_STATE):
            yield file


def _listed_files(api: HfApi, repo_id: str, commit: str | None) -> set[str]:
    """Returns the files that the manifest of an earlier push lists; early ones list code only."""
    with _explained(f"Reading {MANIFEST} of {repo_id}"):
        file = api.hf_hub_download(repo_id, MANIFEST, revision=commit)
    try:
        manifest = read_json(file)
    except DataError:
        return set()
    parts = (manifest.get(part) for part in ("files", "code")) if isinstance(manifest, dict) else ()
    return {name for part in parts if isinstance(part, dict) for name in part} | {MANIFEST}


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _addition(folder: Path, file: Path, repo_id: str) -> CommitOperationAdd:
    path = file.relative_to(folder).as_posix()
    if path != "README.md":
        return CommitOperationAdd(path_in_repo=path, path_or_fileobj=str(file))
    # A card that was written before the model had a name says how to load a placeholder.
    card = file.read_text(encoding="utf-8").replace(_CARD_PLACEHOLDER, repo_id)
    return CommitOperationAdd(path_in_repo=path, path_or_fileobj=card.encode())


@contextmanager
def _explained(doing: str) -> Iterator[None]:
    """Turns whatever the client raises, which comes from several libraries, into one message with the way out."""
    try:
        yield
    except StLlmpoolError:
        raise
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        raise PushError(f"{doing} failed ({type(error).__name__}: {_cause(error)}). {_way_out(status)}") from error


def _cause(error: BaseException) -> str:
    """Returns the first words of the error, and of what it was raised from if that is not an HTTP status."""
    first = " ".join(str(error).split())[:300]
    cause = error.__cause__
    return first if cause is None or hasattr(error, "response") else f"{first} {_cause(cause)}"


def _way_out(status: int | None) -> str:
    if status in (401, 403):
        return (
            "The token may not do this: use one with the right to write there "
            "(https://huggingface.co/settings/tokens, then `hf auth login`), or name a repository of your own."
        )
    if status == 404:
        return "Check the names of repository and revision, and that the token may see them."
    if status == 412:
        return "Somebody else has pushed meanwhile; nothing was changed. Push again if yours should replace theirs."
    if status == 400:
        return "Nothing was changed. Mend what the Hub names, and push again."
    return "The repository holds all of this push or none of it. Push again; what is there already is not sent twice."
