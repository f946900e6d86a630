"""The pretrained language model that comes with the package, so that everything can be tried without a network."""

from __future__ import annotations

from importlib.resources import files

from ..modules.errors import DataError


def builtin_backbone() -> str:
    """Return the folder of the built-in backbone, for `build_embedder` or any `from_pretrained`.

    A Llama-type causal language model of 3.9 million parameters (6 layers, hidden size 192, RoPE, RMSNorm,
    grouped-query attention, tied embeddings, byte-level BPE of 8,192 tokens), pretrained on English Wikipedia
    paragraphs and docstrings by `scripts/pretrain_backbone.py`. The weights are stored in float16 and load as
    float32. Its card, with data, loss curve and limits, is `model_cards/builtin-backbone`. It is a stand-in that
    shows that things work, not a model that embeds well.

    Raises:
        DataError: If the package was installed without its data files.

    Example:
        >>> from transformers import AutoConfig
        >>> AutoConfig.from_pretrained(builtin_backbone()).model_type
        'llama'
    """
    folder = files(__package__) / "builtin"
    if not (folder / "model.safetensors").is_file():
        raise DataError(
            f"The built-in backbone is missing from {folder}. Reinstall st-llmpool from a wheel, or write it with "
            "scripts/pretrain_backbone.py."
        )
    return str(folder)
