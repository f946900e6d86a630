"""Check a model and upload it to the Hub in a single, atomic commit.

`model.push_to_hub` works too, but does not check the model, keeps the files of an earlier push, and may split a large
or failing upload into several commits, each of which people can load.
"""

from __future__ import annotations

import fnmatch
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from sentence_transformers import SentenceTransformer

from ..model_card.card import PLACEHOLDER
from ..modules.errors import ConfigurationError, DataError, InputError, StLlmpoolError
from ..modules.seal import MANIFEST
from ..utils.files import slug
from ..utils.reading import read_json
from .doctor import doctor
from .export import adapter_base, export, foreign_types, has_native_form, is_repo_id, refuse_local_base

# Training state next to a model: useless to a recipient, and partly pickled.
_TRAINING_STATE = ("optimizer*", "scheduler.pt", "scaler.pt", "rng_state*", "training_args.bin", "trainer_state.json")
# Files that may be loaded in place of the new model's.
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.onnx", "adapter_config.json")
_CARD_PLACEHOLDERS = (PLACEHOLDER, "sentence_transformers_model_id")


class PushError(StLlmpoolError, RuntimeError):
    """The Hub refused, or could not be reached."""


@dataclass(frozen=True)
class Pushed:
    """A finished push.

    Attributes:
        repo_id: The repository, `user/name`.
        revision: The branch, or `refs/pr/N` of a pull request.
        commit: The commit, to pin this version of the model.
        url: Page of the branch or the pull request.
        private: True if only its owner can load it.
        native: True if it loads without `trust_remote_code`.
        adapter_base: Hub id of the base that a recipient also downloads; None if the model is complete.
        removed: Files of an earlier push, listed in its manifest, that this push deleted.
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
        """Return the line of Python that loads the model, and its requirements as a comment."""
        arguments = [f'"{self.repo_id}"']
        arguments += [f'revision="{self.revision}"'] if self.revision != "main" else []
        arguments += [] if self.native else ["trust_remote_code=True"]
        kind = "native: needs no flag and no package" if self.native else "portable: includes its code"
        needs = f"; adapter: needs peft, also downloads {self.adapter_base}" if self.adapter_base else ""
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
    progress: Callable[[str], None] = lambda line: None,
) -> Pushed:
    """Check a model and upload it in one commit.

    Args:
        model: Folder of a saved model, or a loaded model.
        repo_id: `user/name`, or a name in the token owner's namespace. None is the folder's name, or the run's name
            if the folder is the ``model`` of a run.
        private: Create the repository as private.
        revision: Branch to push to, created from main if it does not exist, or `refs/pr/N`; None is main.
        create_pr: Open a pull request instead, also in repositories of others.
        native: Push the native form, see `export`. None pushes it if the design has one with the same vectors, and the
            portable form otherwise.
        merge: Merge the adapter first, see `export`.
        check: False pushes even if a check of the doctor fails.
        trust_remote_code: Run code in the folder that is not the installed package's, to check the model.
        commit_message: Title of the commit or pull request.
        token: Hub token with write access; None uses `hf auth login` or HF_TOKEN.
        progress: Called with one line of text at each step.

    Returns:
        The location of the model, and how to load it.

    Raises:
        ConfigurationError: If names or settings contradict each other, the base of an adapter is a local path, or
            there is no token.
        InputError: If a check of the doctor fails, or an export gives other vectors.
        PushError: If the Hub refuses or cannot be reached. The repository is then unchanged.

    Example:
        >>> push("runs/mine/model", "me/my-embedder", private=True).how_to_load()  # doctest: +SKIP
        'SentenceTransformer("me/my-embedder", trust_remote_code=True)  # portable: includes its code; ...'
    """
    if create_pr and revision is not None:
        raise ConfigurationError(
            f"create_pr opens its own branch, so it cannot be combined with revision={revision!r}. Leave one out."
        )
    api = HfApi(token=token)
    proposes = create_pr or (revision or "").startswith("refs/pr/")
    repo_id = _repository_name(api, repo_id, model, proposes=proposes)
    if private:
        _refuse_public(api, repo_id)
    with tempfile.TemporaryDirectory() as scratch:
        folder = _as_folder(model, Path(scratch) / "model", repo_id)
        if not merge:
            refuse_local_base(folder)
        if check:
            progress("Checking the model")
            _require_healthy(folder, trust_remote_code, progress)
        if native is None and has_native_form(folder, merge=merge):
            progress("This design has a native form, which needs no flag: comparing its vectors in a fresh process")
            try:
                folder = export(
                    folder, Path(scratch) / "native", native=True, merge=merge, trust_remote_code=trust_remote_code
                )
                merge = False
            except (ConfigurationError, InputError) as error:
                progress(f"Pushing the portable form. {error}")
        if native or merge:
            progress("Exporting, and comparing vectors in a fresh process")
            folder = export(
                folder, Path(scratch) / "export", native=bool(native), merge=merge, trust_remote_code=trust_remote_code
            )
        return _commit(api, folder, repo_id, private, revision, create_pr, commit_message, progress)


def _repository_name(
    api: HfApi, repo_id: str | None, model: SentenceTransformer | str | Path, *, proposes: bool
) -> str:
    """Return `user/name`; a missing token or a namespace of others is an error before anything is computed."""
    if repo_id is None and isinstance(model, SentenceTransformer):
        raise ConfigurationError("A loaded model has no folder name to use. Pass repo_id='user/name'.")
    name = repo_id or _default_name(Path(str(model)).resolve())
    if not (api.token or get_token()):
        raise ConfigurationError(
            "No Hub token found. Log in with `hf auth login`, or set HF_TOKEN to a token with write access "
            "(https://huggingface.co/settings/tokens)."
        )
    with _explained("Asking the Hub whose token this is"):
        who = api.whoami()
    own = [who["name"], *(organisation["name"] for organisation in who.get("orgs", []))]
    name = name if "/" in name else f"{own[0]}/{name}"
    if not is_repo_id(name):
        raise ConfigurationError(
            f"{name!r} is not a valid repository name: use at most 96 letters, digits, '.', '_' and single '-'."
        )
    if name.split("/")[0] not in own and not proposes:
        raise ConfigurationError(
            f"{name!r} is not in a namespace of this token ({', '.join(own)}). Push to one of these, or open a pull "
            f"request (--create-pr)."
        )
    return name


def _default_name(folder: Path) -> str:
    """Return the folder's name, or the run's for the folder ``model`` of a run."""
    is_run = any((folder.parent / file).is_file() for file in ("training.json", "recipe.yaml"))
    named_after = folder.parent if folder.name == "model" and is_run else folder
    if named_after.name == "model" or not slug(named_after.name):
        raise ConfigurationError(f"{folder} gives no usable repository name. Pass one (user/name).")
    return slug(named_after.name)


def _refuse_public(api: HfApi, repo_id: str) -> None:
    """Refuse a public repository, which would stay public: creating one that exists changes nothing."""
    with _explained(f"Looking for {repo_id}"):
        public = api.repo_exists(repo_id) and not api.model_info(repo_id).private
    if public:
        raise ConfigurationError(
            f"{repo_id} exists and is public, which --private cannot change. Make it private in its settings on the "
            f"Hub, or push to another name."
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


def _require_healthy(folder: Path, trust_remote_code: bool, progress: Callable[[str], None]) -> None:
    diagnosis = doctor(folder, trust_remote_code=trust_remote_code)
    for finding in diagnosis.findings:
        if finding.status == "warning":
            progress(f"Warning, {finding.check}: {finding.detail}")
    faults = [f"{found.check}: {found.detail}" for found in diagnosis.findings if found.status == "failed"]
    if faults:
        raise InputError(
            f"{folder} fails these checks:\n  "
            + "\n  ".join(faults)
            + "\nFix them, or push it as it is with --no-check."
        )
    if not diagnosis.complete:
        unseen = [f"{found.check}: {found.detail}" for found in diagnosis.findings if found.status == "skipped"]
        raise InputError(f"{folder} could not be checked. {'; '.join(unseen)} Or push it unchecked with --no-check.")


def _commit(
    api: HfApi,
    folder: Path,
    repo_id: str,
    private: bool,
    revision: str | None,
    create_pr: bool,
    message: str | None,
    progress: Callable[[str], None],
) -> Pushed:
    """Create the repository if needed and commit on exactly the state that the deletions were computed from."""
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
        progress(f"Kept in {repo_id}, as no earlier push lists them: {', '.join(left)}. Delete those of an old model.")
    size = sum(addition.upload_info.size for addition in additions) / 2**20
    progress(f"Uploading {len(additions)} files, {size:,.1f} MiB, to {repo_id}")
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
        progress(f"Nothing has changed: {repo_id} already holds this model")
    where = done.pr_revision or revision or "main"
    return Pushed(
        repo_id=repo_id,
        revision=where,
        commit=done.oid,
        url=done.pr_url or f"{api.endpoint}/{repo_id}" + ("" if where == "main" else f"/tree/{quote(where, safe='')}"),
        private=bool(before.private),
        native=native,
        adapter_base=adapter_base(folder),
        removed=tuple(removed),
    )


def _model_files(folder: Path) -> Iterator[Path]:
    """Yield the files to upload: all but hidden files, caches, checkpoints and training state."""
    for file in sorted(folder.rglob("*")):
        parts = file.relative_to(folder).parts
        skipped = any(part.startswith((".", "checkpoint-")) or part == "__pycache__" for part in parts)
        if file.is_file() and not skipped and not _matches(file.name, _TRAINING_STATE):
            yield file


def _listed_files(api: HfApi, repo_id: str, commit: str | None) -> set[str]:
    """Return the files in the manifest of an earlier push; manifests of early versions list code only."""
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
    card = file.read_text(encoding="utf-8")
    for placeholder in _CARD_PLACEHOLDERS:
        card = card.replace(placeholder, repo_id)
    return CommitOperationAdd(path_in_repo=path, path_or_fileobj=card.encode())


@contextmanager
def _explained(doing: str) -> Iterator[None]:
    """Re-raises errors of the client and its libraries as a `PushError` that says what to do."""
    try:
        yield
    except StLlmpoolError:
        raise
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        way_out = _way_out(status, sends=doing.startswith("Uploading"))
        raise PushError(f"{doing} failed ({type(error).__name__}: {_cause(error)}). {way_out}") from error


def _cause(error: BaseException) -> str:
    """Return the message of the error and, unless that is an HTTP status, of its cause."""
    first = " ".join(str(error).split())[:300]
    cause = error.__cause__
    if cause is None or hasattr(error, "response") or (further := _cause(cause)) in first:
        return first
    return f"{first} {further}"


def _way_out(status: int | None, *, sends: bool) -> str:
    if status in (401, 403):
        return (
            "The token has no write access there: use one that has "
            "(https://huggingface.co/settings/tokens, then `hf auth login`), or push to your own namespace."
        )
    if status == 404:
        return "Check the names of repository and revision, and the token's access."
    if status == 412:
        return "Somebody else pushed in the meantime; nothing was changed. Push again to replace their model."
    if status == 400:
        return "Nothing was changed. Fix what the Hub reports, and push again."
    if not sends:
        return "Nothing was sent. Check the network, and push again."
    return "The repository holds either all or nothing of this push. Push again; uploaded files are not sent twice."
