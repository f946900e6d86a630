"""Continue a saved embedder: load its modules, prompts and settings to train or change it further.

The Transformer of sentence-transformers becomes an :class:`LLMTransformer` with its settings.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.base.modules.module import Module
from sentence_transformers.sentence_transformer.modules import Pooling
from sentence_transformers.util import is_sentence_transformer_model, load_file_path
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import find_adapter_config_file

from .attention_proof import config_attention
from .hub.loading import load_model
from .modules.errors import ConfigurationError, DataError
from .modules.llm_transformer import LLMTransformer, resolve_layers
from .modules.seal import MANIFEST

logger = logging.getLogger(__name__)

#: Settings of the backbone that the weights of a saved embedder were trained with.
_TRAINED_WITH = ("attention", "layers", "layer_readout", "add_eos_token")


def is_saved_embedder(base: str, *, revision: str | None = None, token: bool | str | None = None) -> bool:
    """Return whether a folder or Hub id is a sentence-transformers model; DataError if it lost its modules.json."""
    found: bool = is_sentence_transformer_model(base, token=token, revision=revision)
    if not found and load_file_path(base, MANIFEST, token=token, revision=revision) is not None:
        raise DataError(f"{base} has a {MANIFEST} and no modules.json: save or download it again.")
    return found


def read_architecture(base: str, **hub: Any) -> PreTrainedConfig:
    """Return the backbone's config of a base model, a saved embedder or an adapter; `hub` as in from_pretrained."""
    try:
        location = {key: hub[key] for key in ("revision", "token") if key in hub}
        adapter = find_adapter_config_file(base, **location)
        if adapter is not None:
            with open(adapter, encoding="utf-8") as file:
                base = json.load(file)["base_model_name_or_path"]
            hub.pop("revision", None)  # the adapter's
        return AutoConfig.from_pretrained(base, **hub)
    except Exception as error:  # whatever transformers raises over the values of a config
        reason = " ".join(str(error).split())[:300]
        hint = "" if Path(base).is_dir() else " Name a folder with a model, a Hub id, or builtin."
        raise ConfigurationError(f"The base {base!r} cannot be read: {reason}{hint}") from error


@dataclass(frozen=True)
class SavedEmbedder:
    """The settings of a saved embedder, read without its weights.

    Attributes:
        base: Hub id or folder.
        hub: ``trust_remote_code``, ``revision`` and ``token``.
        modules: The entries of ``modules.json``.
    """

    base: str
    hub: Mapping[str, Any]
    modules: tuple[Mapping[str, Any], ...]

    @classmethod
    def read(cls, base: str, **hub: Any) -> SavedEmbedder:
        """Read ``modules.json``."""
        saved = cls(base, hub, ())
        try:
            modules = tuple(saved._json("modules.json"))
            first = _class_name(modules[0])
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ConfigurationError(f"{base}/modules.json cannot be read: {error!r}. Save the model again.") from error
        if first not in ("Transformer", LLMTransformer.__name__):
            raise ConfigurationError(
                f"{base!r} is a saved embedder that starts with {first}, not a Transformer. Name its base."
            )
        return cls(base, hub, modules)

    @property
    def is_ours(self) -> bool:
        """Whether the backbone was saved by st_llmpool."""
        return _class_name(self.modules[0]) == LLMTransformer.__name__

    @property
    def poolings(self) -> dict[str, dict[str, Any]]:
        """Class name -> config of the modules after the backbone."""
        return {_class_name(entry): self._json(f"{entry['path']}/config.json") or {} for entry in self.modules[1:]}

    def check_pooling(
        self, name: str | None, module: Callable[..., Module], options: Mapping[str, Any], given: bool
    ) -> None:
        """Check that the saved pooling is the one called `name`, with its `options` if the user `given` any."""
        if name is None:
            raise ConfigurationError(
                f"{self.base!r} is a saved embedder: pooling_kwargs need the name of its pooling, which is kept."
            )
        saved = self.poolings.get(getattr(module, "__name__", ""))
        differences: list[str] = []
        if saved is not None and module is Pooling:
            found = Pooling(**{"embedding_dimension": 1, **saved}).pooling_mode
            differences = [] if found == options["pooling_mode"] else [f"pooling_mode={found!r}"]
        elif saved is not None and given:
            sizes = {key: saved[key] for key in ("embedding_dimension", "num_layers") if key in saved}
            with torch.device("meta"):
                wanted = module(**sizes, **options).get_config_dict()
            differences = [f"{key}={saved.get(key)!r}" for key in wanted if wanted[key] != saved.get(key)]
        if saved is None or differences:
            described = ", ".join(differences) if saved is not None else " and ".join(self.poolings) or "no pooling"
            raise ConfigurationError(
                f"{self.base!r} is a saved embedder with {described}, which the requested pooling={name!r} would "
                f"replace. Leave pooling out to keep it, or set pooling_init='new' to start with a new one."
            )

    def load(self, settings: Mapping[str, Any], *, keep: bool, **kwargs: Any) -> SentenceTransformer:
        """Load the embedder with all its modules.

        Args:
            settings: Settings of :class:`LLMTransformer`; None keeps what was saved.
            keep: Refuse settings that differ from those of the training.
            **kwargs: ``prompts``, ``device``, ``model_kwargs`` and ``processor_kwargs`` of ``SentenceTransformer``.
        """
        wanted = {key: value for key, value in settings.items() if value is not None}
        backbone = {self.modules[0]["type"]: _BackboneLoader(self, wanted, keep)}
        model = load_model(self.base, module_classes=backbone, **self.hub, **kwargs)
        if not self.is_ours and not model[0].include_prompt:
            _name_prompts_of_other_lengths(model)
        return model

    def _json(self, name: str) -> Any:
        location = {key: self.hub[key] for key in ("revision", "token") if key in self.hub}
        path = load_file_path(self.base, name, **location)
        if path is None:
            return None
        with open(path, encoding="utf-8") as file:
            return json.load(file)


class _BackboneLoader:
    """Loads the first module as an LLMTransformer with given settings; replaces its class in loading."""

    def __init__(self, saved: SavedEmbedder, wanted: Mapping[str, Any], keep: bool) -> None:
        self.saved, self.wanted, self.keep = saved, wanted, keep

    def load(self, model_name_or_path: str, **kwargs: Any) -> LLMTransformer:
        settings = LLMTransformer._load_init_kwargs(model_name_or_path, **kwargs)
        if not self.saved.is_ours:
            settings = self._translated(settings)
        if self.keep:
            self._check_kept(settings)
        if "max_seq_length" in self.wanted:
            settings["processor_kwargs"].pop("model_max_length", None)
        return LLMTransformer(model_name_or_path, **settings | dict(self.wanted))

    def _translated(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Convert the settings of a Transformer of sentence-transformers to those of an LLMTransformer."""
        read = settings["modality_config"]
        if set(read) - {"text", "message"} or read.get("text", {}).get("method_output_name") != "last_hidden_state":
            raise ConfigurationError(
                f"{self.saved.base!r} is a saved embedder whose Transformer reads {read}; only text, read at the last "
                f"layer, can be continued. Use pooling_init='new' on its language model instead."
            )
        attention = config_attention(read_architecture(self.saved.base, **self.saved.hub))
        own = {"attention": attention, "layers": [], "add_eos_token": False}
        own["include_prompt"] = all(config.get("include_prompt", True) for config in self.saved.poolings.values())
        return {**settings, "modality_config": {"text": read["text"]}, **own}

    def _check_kept(self, settings: dict[str, Any]) -> None:
        for name in set(_TRAINED_WITH) & set(self.wanted):
            saved, wanted = settings.get(name), self.wanted[name]
            if name == "layers":
                text = read_architecture(self.saved.base, **self.saved.hub).get_text_config(decoder=True)
                wanted = resolve_layers(wanted, text.num_hidden_layers)
            if wanted != saved and not (name == "layers" and not saved):
                raise ConfigurationError(
                    f"{self.saved.base!r} is a saved embedder with {name}={saved!r}, not {self.wanted[name]!r}. Leave "
                    f"it out to keep the saved setting, or set pooling_init='new' to start with a new pooling."
                )


def _name_prompts_of_other_lengths(model: SentenceTransformer) -> None:
    """Warn of prompts with which sentence-transformers excludes a token of the text too."""
    for name, prompt in model.prompts.items():
        before, now = (
            kind._get_prompt_length(model[0], prompt) if prompt else 0 for kind in (Transformer, type(model[0]))
        )
        if before != now:
            logger.warning(
                "With the prompt %r, sentence-transformers left out %s tokens, the last of them joined to the text; "
                "now %s are left out, so its vectors differ from the saved embedder's.",
                *(name, before, now),
            )


def _class_name(entry: Mapping[str, Any]) -> str:
    return str(entry["type"]).rpartition(".")[2]
