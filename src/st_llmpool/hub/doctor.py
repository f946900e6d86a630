"""The doctor: check the files, code, attention and vectors of a saved or loaded model, with one table of findings."""

from __future__ import annotations

import ast
import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError, safe_open
from sentence_transformers import SentenceTransformer
from transformers import AutoModel

from ..attention_proof import verify_attention
from ..base_tokenizer import special_tokens_around
from ..fast_inference import optimized_inference
from ..modules.errors import StLlmpoolError
from ..modules.seal import UNFINISHED
from ..utils.parameters import count_parameters
from ..utils.reading import check_no_pipes, is_folder, read_json, read_json_object
from .folder_code import find_code
from .loading import load_model
from .seal_checks import SEAL_CHECKS, Finding, Status, probe_finding, replacing_seal, seal_findings

_STYLES = {"ok": "green", "warning": "yellow", "failed": "bold red", "skipped": "dim"}
_UNSAFE_SUFFIXES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}


@dataclass(frozen=True)
class Diagnosis:
    """Findings of the doctor on one model.

    Attributes:
        model: Name or folder.
        findings: The lines of the table.
    """

    model: str
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """True if every check ran and none failed; warnings are allowed."""
        return not self.failed and self.complete

    @property
    def failed(self) -> bool:
        """True if anything failed."""
        return any(finding.status == "failed" for finding in self.findings)

    @property
    def complete(self) -> bool:
        """False if the model was not loaded because it needs untrusted code."""
        return not any((finding.check, finding.status) == ("code", "skipped") for finding in self.findings)

    def to_rich(self) -> Table:
        """Return a table for the terminal."""
        table = Table(title=f"doctor: {self.model}", title_justify="left")
        table.add_column("check", no_wrap=True)
        table.add_column("status", no_wrap=True)
        table.add_column("finding", overflow="fold")
        for finding in self.findings:
            table.add_row(finding.check, Text(finding.status, _STYLES[finding.status]), Text(finding.detail))
        return table


def doctor(
    model: str | Path | SentenceTransformer,
    *,
    trust_remote_code: bool = False,
    token: str | None = None,
    device: str | None = None,
    seal: bool = False,
) -> Diagnosis:
    """Check a model: first its files, without running any of them, then the loaded model.

    A model whose code equals the installed package's is loaded with the installed classes. Other code is run only with
    `trust_remote_code`; without it, the checks end before the model is loaded.

    Args:
        model: A folder, a Hub id, or a loaded model.
        trust_remote_code: Run code of the folder or repository.
        token: Hub token.
        device: Device to load the model on.
        seal: Seal the folder as it is now if every other check passes, and report the changes since its last seal.

    Returns:
        The findings; ``.ok`` is True if every check ran and none failed.

    Example:
        >>> from st_llmpool import build_embedder
        >>> from st_llmpool.data import builtin_backbone
        >>> doctor(build_embedder(builtin_backbone(), pooling="mean", verify=False)).ok
        True
    """
    if isinstance(model, SentenceTransformer):
        return Diagnosis("loaded model", tuple(_check_loaded(model)))
    is_local = Path(model).is_dir()
    try:
        folder = Path(model) if is_local else Path(snapshot_download(str(model), token=token))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        missing = f"no such folder, and the Hub says: {error}"
        return Diagnosis(str(model), (Finding("files", "failed", missing),))
    if seal and not is_local:
        return Diagnosis(str(model), (Finding("seal", "failed", f"{model} is not a local folder: download it first."),))
    findings = [finding for finding in check_files(folder) if not (seal and finding.check in SEAL_CHECKS)]
    findings.append(_check_code(folder, trusted=trust_remote_code))
    found = Diagnosis(str(model), tuple(findings))
    if found.failed or not found.complete:
        return found
    with replacing_seal(folder) if seal else nullcontext() as write:
        try:
            loaded = load_model(folder, trust_remote_code=trust_remote_code, device=device)
        except StLlmpoolError as error:
            findings.append(Finding("loading", "failed", str(error)))
        else:
            if (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
                findings.append(_weights_of_config(folder, trusted=trust_remote_code))
            findings.extend(_check_loaded(loaded))
            if write is None:
                findings.append(probe_finding(folder, loaded))
            elif all(finding.status != "failed" for finding in findings):
                findings.append(write(loaded))
    return Diagnosis(str(model), tuple(findings))


def check_files(folder: Path) -> Iterator[Finding]:
    """Yield the findings on a folder's files, without running any; an unreadable file is one too.

    Args:
        folder: A saved model.
    """
    try:
        check_no_pipes(folder)
        yield from _check_files(folder)
    except StLlmpoolError as error:
        yield Finding("files", "failed", f"{error} Save or download the model again.")


def _check_files(folder: Path) -> Iterator[Finding]:
    yield _module_list(folder)
    yield from seal_findings(folder)
    weights = sorted(folder.rglob("*.safetensors"))
    damaged = [f"{file.relative_to(folder)} ({error})" for file in weights if (error := _header_error(file))]
    size = sum(file.stat().st_size for file in weights) / 2**20
    if damaged:
        yield Finding("weights", "failed", f"damaged: {', '.join(damaged)}. Save or download the model again.")
    elif not weights:
        yield Finding("weights", "failed", "no .safetensors file. Save the model again with save_pretrained.")
    else:
        yield Finding("weights", "ok", f"{len(weights)} safetensors, {size:,.1f} MiB")
    unsafe = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.suffix in _UNSAFE_SUFFIXES]
    if unsafe:
        yield Finding(
            "pickle", "warning", f"{', '.join(unsafe)} can run code when loaded. Remove, or do not load them."
        )
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        yield _adapter_base(adapter)


def _module_list(folder: Path) -> Finding:
    file = folder / "modules.json"
    try:
        modules = read_json(file)
        paths = [PurePosixPath(module["path"]) for module in modules]
        types = [module["type"] for module in modules]
        if not all(isinstance(reference, str) for reference in types):
            raise TypeError("a type is not text")
    except (ValueError, KeyError, TypeError) as error:
        return Finding("modules.json", "failed", f"{file} cannot be read ({error!r}). Save the model again.")
    faults = ["the model was saved incompletely. Save it again."] if UNFINISHED in types else []
    for path, reference in zip(paths, types, strict=True):
        source = folder / f"{reference.split('.')[0]}.py"
        if path.is_absolute() or ".." in path.parts:
            faults.append(f"path {str(path)!r} points outside the folder: do not load this model.")
        # A Normalize without settings has an empty folder, which git does not keep.
        elif not is_folder(folder / path) and not reference.endswith(".Normalize"):
            faults.append(f"folder {str(path)!r} is missing. Copy the complete folder.")
        elif not all(part.isidentifier() for part in reference.split(".")):
            faults.append(f"{reference!r} does not name a class of this folder: do not load this model.")
        elif not reference.startswith("sentence_transformers.") and not _defines(source, reference.rpartition(".")[2]):
            faults.append(f"{reference} is not defined in {source.name}. Save again.")
    if faults:
        return Finding("modules.json", "failed", faults[0])
    native = all(reference.startswith("sentence_transformers.") for reference in types)
    kind = (
        "native: loads without trust_remote_code" if native else "portable: loads anywhere with trust_remote_code=True"
    )
    return Finding("modules.json", "ok", f"{kind}; {', '.join(reference.rpartition('.')[2] for reference in types)}")


def _defines(source: Path, name: str) -> bool:
    try:
        tree = ast.parse(source.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return False
    return any(isinstance(node, ast.ClassDef) and node.name == name for node in tree.body)


def _header_error(file: Path) -> str | None:
    try:
        with safe_open(file, framework="pt") as tensors:
            tensors.keys()
    except (SafetensorError, OSError) as error:
        return str(error)
    return None


def _weights_of_config(folder: Path, *, trusted: bool) -> Finding:
    """Compare names and shapes of the backbone's weights with its config.

    transformers initialises missing weights at random, and drops layers beyond the config's number.
    """
    quantized = "quantization_config" in read_json_object(folder / "config.json")
    place = {"device_map": "cpu" if quantized else "meta"} if find_spec("accelerate") else {}  # the train extra has it
    options = {"local_files_only": True, "trust_remote_code": trusted, **place}
    loaded: Any = AutoModel.from_pretrained(folder, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    report = loaded[1]
    wrong = [f"{name} has another shape" for name, *_ in report["mismatched_keys"]]
    wrong += [f"{name} is missing" for name in report["missing_keys"] if "pooler" not in name]
    wrong += [f"{name} is not in the config" for name in report["unexpected_keys"] if re.search(r"\.\d+\.", name)]
    if wrong:
        detail = f"{len(wrong)} weights differ from config.json, such as: {min(wrong)}. Save or download it again."
        return Finding("weights of the config", "failed", detail)
    return Finding("weights of the config", "ok", "names and shapes match config.json")


def _adapter_base(file: Path) -> Finding:
    base = str(read_json_object(file).get("base_model_name_or_path") or "")
    if not base:
        return Finding(
            "adapter base", "failed", f"{file.name} does not name a base model. Save or download the model again."
        )
    if Path(base).is_absolute() or base.startswith("."):
        status: Status = "warning" if os.path.isdir(base) else "failed"
        detail = f"{base!r} is a local path, so nobody else can load this adapter. Merge it, or train from a Hub id."
        return Finding("adapter base", status, detail)
    try:
        HfApi().model_info(base)
    except (RepositoryNotFoundError, HFValidationError):
        return Finding(
            "adapter base", "failed", f"{base!r} is not on the Hub, or you have no access to it. Merge the adapter."
        )
    except Exception as error:  # without a network it raises what its HTTP library does
        return Finding("adapter base", "warning", f"{base}; not checked, since the Hub cannot be reached ({error})")
    return Finding("adapter base", "ok", f"{base}, on the Hub")


def _check_code(folder: Path, *, trusted: bool) -> Finding:
    """Compare the folder's code, and every reference to code, with the installed package."""
    code = find_code(folder)
    idle = f"; nothing refers to {', '.join(code.idle)}, so loading does not run it" if code.idle else ""
    if not code.to_trust:
        same = f"{len(code.same)} files, identical to the installed st_llmpool's" if code.same else "none"
        return Finding("code", "ok", same + idle)
    differs = f"differs from the installed st_llmpool: {'; '.join(code.to_trust)}{idle}"
    if trusted:
        return Finding("code", "warning", f"trusted by you, {differs}")
    return Finding("code", "skipped", f"not loaded: {differs}. Review it, then use --trust-remote-code.")


def _check_loaded(model: SentenceTransformer) -> Iterator[Finding]:
    """Check of the model in memory; a check that raises one of our errors is a failed finding."""
    for name, check in _LOADED_CHECKS.items():
        try:
            yield check(model)
        except StLlmpoolError as error:
            yield Finding(name, "failed", str(error))


def _attention(model: SentenceTransformer) -> Finding:
    report = verify_attention(model)
    recorded = getattr(model[0], "attention", None)
    known = getattr(model[0], "causal_layers", [])
    detail = f"recorded {recorded or 'nothing'}, measured {report.verdict}"
    if report.ok or (report.verdict == "partial" and known):
        return Finding("attention", "ok", detail + (f"; causal by design: layers {known}" if known else ""))
    return Finding("attention", "failed", f"{detail}. {report}")


def _eos(model: SentenceTransformer) -> Finding:
    tokenizer = model.tokenizer
    limit = model.max_seq_length
    wanted = getattr(model[0], "add_eos_token", None)
    long_text = "word " * (min(limit or 512, 4096) + 8)
    ending = special_tokens_around(tokenizer)[1]
    tokens = [model.preprocess([text])["input_ids"][0].tolist() for text in ("a", long_text)]
    ends = [bool(ending) and ids[-len(ending) :] == ending for ids in tokens]
    named = repr(tokenizer.decode(ending)) if ending else "a special token"
    detail = f"texts end in {named}: {ends[0]}; truncated texts at {limit} tokens: {ends[1]}"
    detail += f"; pad {tokenizer.pad_token!r}"
    return Finding("EOS and truncation", "failed" if wanted and not all(ends) else "ok", detail)


def _padding(model: SentenceTransformer) -> Finding:
    short, long = "a short text", "a text that is a good deal longer than the other one, so that it must be padded"
    alone = model.encode([short], convert_to_tensor=True)[0].float()
    tokenizer, side = model.tokenizer, model.tokenizer.padding_side
    worst = 0.0
    try:
        for tokenizer.padding_side in ("left", "right"):
            batched = model.encode([short, long], convert_to_tensor=True)[0].float()
            worst = max(worst, (batched - alone).abs().max().item())
    finally:
        tokenizer.padding_side = side
    limit = 1e-4 if model.dtype == torch.float32 else 5e-2
    return Finding(
        "padding",
        "ok" if worst <= limit else "failed",
        f"alone, left- and right-padded: largest difference {worst:.1e}",
    )


def _weights(model: SentenceTransformer) -> Finding:
    broken = [name for name, parameter in model.named_parameters() if not torch.isfinite(parameter).all()]
    if broken:
        return Finding("finite weights", "failed", f"NaN or infinity in {', '.join(broken[:5])}. Retrain or reload.")
    counts = count_parameters(model)
    total = sum(counts.values())
    return Finding("finite weights", "ok", f"{total:,} parameters, {counts['pooling']:,} of them in the pooling")


def _embedding(model: SentenceTransformer) -> Finding:
    vectors = model.encode(["a cat sat on the mat", "interest rates rose", ""], convert_to_tensor=True).float()
    similarity = torch.nn.functional.cosine_similarity(vectors[0], vectors[1], dim=0).item()
    if not torch.isfinite(vectors).all() or math.isnan(similarity):
        return Finding("embedding", "failed", "an embedding holds NaN or infinity.")
    if similarity > 0.9999:
        return Finding("embedding", "failed", "different texts give the same vector: the model is untrained or broken.")
    return Finding("embedding", "ok", f"{vectors.shape[1]} dimensions; two unrelated texts: cosine {similarity:.3f}")


def _prompts(model: SentenceTransformer) -> Finding:
    prompts: dict[str, Any] = {name: prompt for name, prompt in model.prompts.items() if prompt}
    included = getattr(model[0], "include_prompt", True)
    detail = ", ".join(f"{name}: {prompt!r}" for name, prompt in prompts.items()) or "none"
    return Finding("prompts", "ok", f"{detail}; pooled: {included}")


def _fast_inference(model: SentenceTransformer) -> Finding:
    """Compare the fast paths with the plain forward, and report which the model may use."""
    with optimized_inference(model) as used:
        return Finding("fast inference", "ok", str(used))


_LOADED_CHECKS: dict[str, Callable[[SentenceTransformer], Finding]] = {
    "attention": _attention,
    "EOS and truncation": _eos,
    "padding": _padding,
    "fast inference": _fast_inference,
    "finite weights": _weights,
    "embedding": _embedding,
    "prompts": _prompts,
}
