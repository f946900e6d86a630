"""Model soups: the average of the weights of several embedding models, or of several adapted bases."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from ..adapters import merge_adapter
from ..data.training_data import DatasetSettings, load_pairs
from ..evaluation import SuiteEvaluator
from ..hub.loading import check_code, checked_code, load_model
from ..model_card.card import EmbedderCardData
from ..modules.attention import set_attention
from ..modules.errors import ConfigurationError
from ..saved_embedder import is_saved_embedder
from ..training.held_out import held_out_evaluator
from ..utils.files import atomic_folder, check_new_folder
from ..utils.random_state import preserve_rng_state

logger = logging.getLogger(__name__)

# Fields of a backbone's config that do not affect what it computes.
_NOT_COMPARED = {"architectures", "transformers_version", "torch_dtype", "dtype", "use_cache"}

Weights = dict[str, Tensor]
Score = Callable[[SentenceTransformer], float]


@dataclass
class _Ingredient:
    """A model with its adapter merged, and the settings that must agree in all models of a soup."""

    name: str
    model: Any
    settings: dict[str, Any]
    tokenizer: Any
    weights: Weights


@dataclass(frozen=True)
class Soup:
    """The result of :func:`soup`.

    Attributes:
        model_dir: Folder of the averaged model.
        ingredients: The models in the average, in the order in which they were added.
        scores: Score of each model alone, for a greedy soup.
        score: Score of the average, for a greedy soup.
    """

    model_dir: Path
    ingredients: list[str]
    scores: dict[str, float]
    score: float | None


def soup(
    models: Sequence[str | Path],
    output_dir: str | Path,
    *,
    validation: DatasetSettings | None = None,
    suite: str | None = None,
    data_dir: Path | None = None,
    batch_size: int = 32,
    trust_remote_code: bool = False,
    token: str | None = None,
) -> Soup:
    """Average models, backbone and pooling (Wortsman et al. 2022, arXiv 2203.05482).

    Without `validation` and `suite` the soup is uniform: the mean of all models. With one of them it is greedy (recipe
    1 of the paper): starting from the best model, each next one is kept if the score of the average does not drop.
    The models may also be base language models, such as the result of :func:`adapt`; their soup is always uniform.
    Adapters are merged into their bases first. The average is computed in float32 with equal weights.
    ``SentenceTransformer.merge`` of sentence-transformers offers many more ways to merge models, with mergekit.

    Args:
        models: Folders or Hub ids of at least two models with the same base and design; or folders of bases.
        output_dir: A folder that does not exist yet, for the model (with the first one's prompts) and ``soup.json``.
        validation: Pairs that score a greedy soup, by nDCG@10.
        suite: A suite of local tasks that scores a greedy soup, by the mean of its scores.
        data_dir: Folder of the suite's data.
        batch_size: Batch size of the evaluation.
        trust_remote_code: Run code of the models that is not the installed package's.
        token: Hub token.

    Raises:
        ConfigurationError: If `output_dir` exists, there are fewer than two models, they differ in kind, design,
            tokenizer or the shapes of their weights, or they cannot be loaded without their own code.
        DataError: If the validation pairs cannot be read.

    Example:
        >>> soup(["runs/seed-0/model", "runs/seed-1/model"], "runs/soup")  # doctest: +SKIP
    """
    out = Path(output_dir)
    check_new_folder(out)
    names = [str(model) for model in models]
    if len(names) < 2 or len(set(names)) < len(names):
        raise ConfigurationError(f"models={names}: a soup needs at least two different models.")
    if validation is not None and suite is not None:
        raise ConfigurationError("A greedy soup is scored on validation pairs or on a suite; give only one of them.")
    folders = {name: _folder(name, token) for name in names}
    for folder in folders.values():
        check_code(folder, trust_remote_code=trust_remote_code)
    kinds = {is_saved_embedder(str(folder)) for folder in folders.values()}
    if len(kinds) > 1:
        kind = {
            name: "an embedding model" if is_saved_embedder(str(folder)) else "a base"
            for name, folder in folders.items()
        }
        raise ConfigurationError(
            f"Embedding models and base language models cannot be averaged with each other: {kind}."
        )
    load = _load_embedder if kinds == {True} else _load_base
    if load is _load_base and (validation is not None or suite is not None):
        raise ConfigurationError(
            f"models={names} are base language models, which validation cannot score: leave it out for their mean."
        )
    score = _score(validation, suite, data_dir, batch_size)

    first = load(names[0], folders[names[0]], trust_remote_code)
    weights = {first.name: first.weights}
    for name in names[1:]:
        other = load(name, folders[name], trust_remote_code)
        _check_agreement(first, other)
        weights[name] = other.weights
        if load is _load_embedder and other.model.prompts != first.model.prompts:
            logger.warning("%s has other prompts than %s; the soup gets the prompts of the latter.", name, first.name)
    chosen, scores, final = (names, {}, None) if score is None else _greedy(first.model, weights, score)
    first.model.load_state_dict(average([weights[name] for name in chosen]))
    if load is _load_embedder:
        # The first model's card is of its training and results, which are not the soup's.
        first.model._model_card_text = None
        card = EmbedderCardData(model_name=f"Average of {len(chosen)} models", local_files_only=True)
        first.model.model_card_data = card
        card.register_model(first.model)
    _save(first, out, chosen, scores, final)
    return Soup(out, list(chosen), scores, final)


def average(weights: Sequence[Mapping[str, Tensor]]) -> Weights:
    """Return the mean of state dicts, computed in at least float32 and returned in the first one's dtypes.

    Tensors that are not floating point are those of the first.
    """
    mean = {}
    for name, tensor in weights[0].items():
        if not tensor.is_floating_point():
            mean[name] = tensor
            continue
        computed = torch.promote_types(tensor.dtype, torch.float32)
        total = sum((other[name].to(computed) for other in weights[1:]), start=tensor.to(computed))
        mean[name] = (total / len(weights)).to(tensor.dtype)
    return mean


def _score(
    validation: DatasetSettings | None, suite: str | None, data_dir: Path | None, batch_size: int
) -> Score | None:
    if validation is not None:
        evaluator: Any = held_out_evaluator(
            validation.label, load_pairs(validation), query_prompt=validation.instruction, batch_size=batch_size
        )
        metric = f"{validation.label}_cosine_ndcg@10"
    elif suite is not None:
        evaluator = SuiteEvaluator(suite, data_dir, batch_size=batch_size)
        metric = evaluator.primary_metric
    else:
        return None

    def score(model: SentenceTransformer) -> float:
        with preserve_rng_state():
            return float(evaluator(model)[metric])

    return score


def _folder(name: str, token: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        folder = Path(name) if Path(name).is_dir() else Path(snapshot_download(name, token=token))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigurationError(
            f"{name} is neither a folder nor a readable repository on the Hub: {reason}"
        ) from error
    if not any((folder / file).is_file() for file in ("modules.json", "config.json")):
        raise ConfigurationError(f"{name} is not a saved model: it has neither modules.json nor config.json.")
    return folder


def _load_embedder(name: str, folder: Path, trust_remote_code: bool) -> _Ingredient:
    model = load_model(folder, trust_remote_code=trust_remote_code, device="cpu")
    if (folder / "adapter_config.json").is_file():
        merge_adapter(model, folder)
        if hasattr(model[0], "attention"):
            set_attention(model, model[0].attention)  # the base was reloaded, and its config is compared below
    settings: dict[str, Any] = {"modules": [type(module).__name__ for module in model]}
    settings |= {"max_seq_length": model.max_seq_length}
    for place, module in enumerate(model):
        label, kept = f"{place} {type(module).__name__}", module.get_config_dict().items()
        settings |= {f"{label}.{key}": value for key, value in kept if key != "model_kwargs"}  # how to load it
    settings |= _config(model[0].model)
    return _Ingredient(name, model.eval(), settings, model.tokenizer, _weights(model))


def _load_base(name: str, folder: Path, trust_remote_code: bool) -> _Ingredient:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    code = {"trust_remote_code": trust_remote_code}
    with checked_code(name, None if trust_remote_code else folder):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **code)
        tokenizer = AutoTokenizer.from_pretrained(folder, **code)
    return _Ingredient(name, model, _config(model), tokenizer, _weights(model))


def _weights(model: nn.Module) -> Weights:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _greedy(
    model: SentenceTransformer, weights: Mapping[str, Weights], score: Score
) -> tuple[list[str], dict[str, float], float]:
    def score_of(names: Sequence[str]) -> float:
        model.load_state_dict(average([weights[name] for name in names]))
        return score(model)

    scores = {name: score_of([name]) for name in weights}
    best_first = sorted(scores, key=lambda name: -scores[name])
    chosen, best = best_first[:1], scores[best_first[0]]
    for name in best_first[1:]:
        found = score_of([*chosen, name])
        if found >= best:
            chosen, best = [*chosen, name], found
    return chosen, scores, best


def _check_agreement(first: _Ingredient, other: _Ingredient) -> None:
    ours, theirs = first.settings, other.settings
    for key in dict.fromkeys([*ours, *theirs]):
        if ours.get(key) != theirs.get(key):
            raise ConfigurationError(
                f"{key} is {theirs.get(key)!r} in {other.name} and {ours.get(key)!r} in {first.name}: designs differ."
            )
    if _rules(first.tokenizer) != _rules(other.tokenizer):
        raise ConfigurationError(
            f"{other.name} and {first.name} have different tokenizers (vocabulary, special tokens or rules)."
        )
    for key in dict.fromkeys([*first.weights, *other.weights]):
        mine, yours = (tuple(kept[key].shape) if key in kept else None for kept in (first.weights, other.weights))
        if mine != yours:
            raise ConfigurationError(f"The weight {key!r} is {yours} in {other.name} and {mine} in {first.name}.")


def _config(model: Any) -> dict[str, Any]:
    """Return the fields of the backbone's config that affect the embeddings."""
    settings = model.config.to_dict().items()
    return {f"config.{key}": value for key, value in settings if key not in _NOT_COMPARED and not key.startswith("_")}


def _rules(tokenizer: Any) -> list[Any]:
    rules = json.loads(tokenizer.backend_tokenizer.to_str()) if hasattr(tokenizer, "backend_tokenizer") else {}
    rules = {key: value for key, value in rules.items() if key not in ("truncation", "padding")}  # set by the last call
    return [tokenizer.get_vocab(), tokenizer.special_tokens_map, rules]


def _save(
    first: _Ingredient, out: Path, chosen: Sequence[str], scores: Mapping[str, float], final: float | None
) -> None:
    short = {name: "/".join(Path(name).parts[-2:]) for name in (*scores, *chosen)}  # without local paths
    facts = {
        "ingredients": [short[name] for name in chosen],
        "scores": {short[name]: score for name, score in scores.items()},
        "score": final,
    }
    with atomic_folder(out) as folder:
        first.model.save_pretrained(str(folder))
        if not isinstance(first.model, SentenceTransformer):
            first.tokenizer.save_pretrained(str(folder))
        (folder / "soup.json").write_text(json.dumps(facts, indent=2), encoding="utf-8")
