"""Sweeps every decoder-only type that the installed transformers knows, and writes what holds for each.

`make architectures` runs `python -m tests.architectures`. Every type is built small and random, proven causal, switched
to bidirectional, proven again, and switched back. Beside the proof runs a check that shares no code with it; the sweep
fails if the two ever contradict each other, if too few types are built, or if too few are proven.
"""

from __future__ import annotations

import argparse
import inspect
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from st_llmpool.attention_proof import AttentionReport, verify_attention
from st_llmpool.modules.attention import decoder_layers, is_encoder, set_attention, text_config
from st_llmpool.modules.errors import AttentionError, ConfigurationError
from tests.architecture_zoo import VARIANTS, build, decoder_types

LEAST_BUILT, LEAST_PROVEN = 150, 115
FLEX = ("llama", "mistral", "gemma2", "doge")
# What padding moves by less is rounding: left against right padding reaches 3e-5 (beam).
MOVED = 1e-4
# The first token hardly feels the last one where most of a layer is recurrent (zamba); in causal models it feels 3e-7.
FELT = 2e-6
# Built at their default sizes by classes that ignore the small ones, these take minutes and gigabytes.
TOO_LARGE = ("blt", "florence2", "inkling_mm_model", "janus", "kosmos-2", "kosmos-2.5")

log = logging.getLogger("architectures")


def main() -> int:
    """Runs the sweep, writes docs/architectures.json and .md, and returns 1 if anything that must hold does not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="types to sweep; all by default")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder for the table")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    names = arguments.names or [*decoder_types(), *VARIANTS]
    jobs = [(name, None) for name in names] + [(name, "flex_attention") for name in FLEX if not arguments.names]
    rows: list[dict[str, Any]] = []
    arguments.out.mkdir(parents=True, exist_ok=True)
    for number, (name, implementation) in enumerate(jobs, start=1):
        started = time.perf_counter()
        rows.append(_examined_or_crashed(name, implementation))
        outcome = rows[-1].get("bidirectional") or rows[-1]["kind"]
        log.info("%3d/%d %-28s %-18s %.1f s", number, len(jobs), name, outcome, time.perf_counter() - started)
        (arguments.out / "architectures.json").write_text(compact(rows))
    failures = failures_of(rows, complete=not arguments.names)
    (arguments.out / "architectures.md").write_text(table(rows))
    for failure in failures:
        log.error("FAILED %s", failure)
    return 1 if failures else 0


def examine(name: str, implementation: str | None = None) -> dict[str, Any]:
    """Returns one row: what was built, what the proof says in both modes, and what the independent check says.

    Args:
        name: A model type, or a variant of one.
        implementation: By default sdpa, or eager where the type has no sdpa.
    """
    row: dict[str, Any] = {"type": name, "kind": "skipped"}
    if name in TOO_LARGE:
        return {**row, "reason": "cannot be built small: its configuration fixes sizes"}
    try:
        model = _build(name, implementation)
    except Exception as error:
        return {**row, "reason": _short(error)}
    row |= {"architecture": type(model).__name__, "implementation": model.config._attn_implementation}
    try:
        set_attention(model, "causal")
    except ConfigurationError as error:
        if model.config.is_encoder_decoder:
            return {**row, "kind": "encoder-decoder", "reason": _short(error)}
        if not is_encoder(text_config(model)):
            return {**row, "kind": "refused", "reason": _short(error)}
        row["kind"] = "encoder"
        return row | _bidirectional(model)
    row["kind"] = "decoder"
    try:
        before = _states(model, _text(7))
        row |= _described("causal", verify_attention(model, "causal"), truth_of(model))
    except AttentionError as error:
        return {**row, "kind": "refused", "reason": _short(error)}
    except Exception as error:
        return {**row, "kind": "skipped", "reason": _short(error)}
    row["layers"] = len(decoder_layers(model))
    row |= _bidirectional(model)
    set_attention(model, "causal")
    row["causal_again"] = bool(torch.equal(before, _states(model, _text(7))))
    return row


def truth_of(model: PreTrainedModel) -> dict[str, float]:
    """Measures with whole forwards what the proof measures layer by layer; shares no code with it.

    Every value is the largest change of a vector of the last hidden state, over the largest value in it: of the first
    token when the last one changes (alone, and padded), of the real tokens when ids in the padding change, between
    padded and alone, and between left and right padding.
    """
    text, changed = _text(7), _text(7)
    changed[0, -1] = _text(8)[0, -1]
    pad = getattr(model.config.get_text_config(decoder=True), "pad_token_id", None) or 0
    padding, junk = torch.full((1, 3), pad), _text(3)
    right, left = torch.tensor([[1] * 7 + [0] * 3]), torch.tensor([[0] * 3 + [1] * 7])
    alone = _states(model, text)
    padded = _states(model, torch.cat([text, padding], 1), right)[:, :7]
    left_padded = _states(model, torch.cat([padding, text], 1), left)[:, 3:]
    return {
        "ahead": _change(alone[:, 0], _states(model, changed)[:, 0]),
        "ahead_padded": _change(padded[:, 0], _states(model, torch.cat([changed, padding], 1), right)[:, 0]),
        "leak": _change(padded, _states(model, torch.cat([text, junk], 1), right)[:, :7]),
        "batch": _change(alone, padded),
        "side": _change(padded, left_padded),
    }


def contradiction(verdict: str, truth: dict[str, float]) -> str | None:
    """Returns how the independent check contradicts a verdict, or None."""
    ahead, ahead_padded = truth["ahead"] > FELT, truth["ahead_padded"] > FELT
    disturbed = [name for name in ("leak", "batch", "side") if truth[name] > MOVED]
    if verdict in ("causal", "bidirectional", "partial"):
        if disturbed:
            return f"the proof says {verdict}, but padding changes vectors: {', '.join(disturbed)}"
        if (ahead, ahead_padded) != (verdict != "causal",) * 2:
            return f"the proof says {verdict}, but tokens see ahead alone: {ahead}, padded: {ahead_padded}"
    elif not disturbed and ahead == ahead_padded:
        return f"the proof says {verdict}, but padding changes nothing"
    return None


def failures_of(rows: list[dict[str, Any]], *, complete: bool) -> list[str]:
    """Returns what must hold and does not."""
    failures = []
    for row in rows:
        for mode in ("causal", "bidirectional"):
            if f"{mode}_truth" in row and (found := contradiction(row[mode], row[f"{mode}_truth"])):
                failures.append(f"{row['type']} set to {mode}: {found}")
        if row["kind"] == "crashed":
            failures.append(f"{row['type']}: {row['reason']}")
        if row.get("causal_again") is False:
            failures.append(f"{row['type']}: set back to causal it gives other vectors than before")
    if complete:
        built, proven = len(_built(rows)), len(_proven(rows, "sdpa"))
        if built < LEAST_BUILT:
            failures.append(f"{built} decoder-only types built, at least {LEAST_BUILT} must be")
        if proven < LEAST_PROVEN:
            failures.append(f"{proven} types proven bidirectional on sdpa, at least {LEAST_PROVEN} must be")
    return failures


def compact(rows: list[dict[str, Any]]) -> str:
    """Returns what the table is made from as JSON, a line for each row."""
    lines = []
    for row in rows:
        kept = {
            name: row[name] for name in ("type", "kind", "implementation", "causal", "bidirectional") if name in row
        }
        for name, value in row.get("bidirectional_measured", {}).items():
            if name in ("signal", "noise"):
                kept.setdefault("bidirectional_measured", {})[name] = float(f"{value:.1e}")
        lines.append(json.dumps(kept | ({"reason": row["reason"]} if "reason" in row else {})))
    return "[\n" + ",\n".join(lines) + "\n]\n"


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the page that users read, from all that is measured or from what `compact` keeps of it."""
    lines = [
        "# Architectures",
        "",
        f"Generated by `make architectures` with transformers {transformers.__version__} and torch "
        f"{torch.__version__.split('+')[0]}; do not edit. Small random models in float32 on a CPU. The table as data: "
        "`architectures.json`.",
        "",
        f"- decoder-only types built: {len(_built(rows))}",
        *(
            f"- proven bidirectional on {implementation}: {len(_proven(rows, implementation))}"
            for implementation in ("sdpa", "eager", "flex_attention")
        ),
        "",
        '`bidirectional` is proven: `set_attention(model, "bidirectional")` is enough. Anything else is refused by '
        '`build_embedder(attention="bidirectional")`; `partial` is accepted with `allow_partial=True`. A sparse or '
        "compressed attention is built with a selection shorter than the probe's text, which is where it shows.",
        "",
        "| type | implementation | set to causal | set to bidirectional | signal | noise | note |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in sorted((row for row in rows if row["kind"] in ("decoder", "encoder")), key=lambda row: row["type"]):
        measured = row.get("bidirectional_measured", {})
        cells = [
            row["type"],
            row["implementation"],
            row.get("causal", "refused (encoder)"),
            row["bidirectional"],
            f"{measured['signal']:.1e}" if measured else "",
            f"{measured['noise']:.1e}" if measured else "",
            row.get("reason", ""),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "## Not examined", "", "| type | what | why |", "| --- | --- | --- |"]
    for row in sorted((row for row in rows if row["kind"] not in ("decoder", "encoder")), key=lambda row: row["type"]):
        lines.append(f"| {row['type']} | {row['kind']} | {row['reason']} |")
    return "\n".join(lines) + "\n"


def _examined_or_crashed(name: str, implementation: str | None) -> dict[str, Any]:
    # Compiled flex_attention is a matter of torch and the processor; on a CPU it sometimes gives NaN.
    stance = "force_eager" if implementation == "flex_attention" else "default"
    try:
        with torch.compiler.set_stance(stance):
            return examine(name, implementation)
    except Exception as error:
        return {"type": name, "kind": "crashed", "reason": _short(error)}


def _built(rows: list[dict[str, Any]]) -> set[str]:
    return {row["type"] for row in rows if row["kind"] == "decoder" and row["type"] not in VARIANTS}


def _proven(rows: list[dict[str, Any]], implementation: str) -> set[str]:
    return {
        row["type"]
        for row in rows
        if row["type"] in _built(rows)
        and row["implementation"] == implementation
        and row["bidirectional"] == "bidirectional"
    }


def _build(name: str, implementation: str | None) -> PreTrainedModel:
    if implementation is not None:
        return build(name, implementation)
    try:
        return build(name, "sdpa")
    except ValueError as error:
        if "scaled_dot_product_attention" not in str(error):
            raise
        return build(name, "eager")


def _bidirectional(model: PreTrainedModel) -> dict[str, Any]:
    try:
        set_attention(model, "bidirectional")
    except AttentionError as error:
        pull = _pull_of_alibi(model)
        reason = (
            f"ALiBi: forced, the farthest of 7 tokens moves the first {pull:.1f} times as much as its neighbour does"
        )
        return {"bidirectional": "refused", "reason": reason, "far_over_near": pull, "error": _short(error)}
    try:
        report = verify_attention(model, "bidirectional")
    except AttentionError as error:
        return {"bidirectional": "refused", "reason": _short(error)}
    row = _described("bidirectional", report, truth_of(model))
    return row if report.ok else {**row, "reason": _measured_reason(report)}


def _measured_reason(report: AttentionReport) -> str:
    if report.verdict in ("causal", "partial"):
        parts = sorted({part for layer in report.layers for part in layer.causal_parts})
        causal = f"causal layers {', '.join(map(str, report.causal_layers))} of {len(report.layers)}"
        return f"{causal} (parts: {', '.join(parts)})" if parts else causal
    leak = max(report.leak, *(layer.leak for layer in report.layers))
    return f"vectors change by: padding {leak:.0e}, batch {report.batch:.0e}, padding side {report.side:.0e}"


def _described(mode: str, report: AttentionReport, truth: dict[str, float]) -> dict[str, Any]:
    measured = {name: getattr(report, name) for name in ("signal", "noise", "batch", "side", "leak")}
    measured["layer_noise"] = max(layer.noise for layer in report.layers)
    measured["layer_leak"] = max(layer.leak for layer in report.layers)
    return {
        mode: report.verdict,
        f"{mode}_layers": [layer.direction for layer in report.layers],
        f"{mode}_measured": measured,
        f"{mode}_truth": truth,
    }


def _pull_of_alibi(model: PreTrainedModel) -> float:
    """How much more the farthest of 7 tokens moves the first one than its neighbour does, with the flags forced."""
    text_config = model.config.get_text_config(decoder=True)
    flagged = [module for module in model.modules() if hasattr(module, "is_causal")]
    text_config.is_causal = False
    for module in flagged:
        module.is_causal = False
    text, near, far = _text(10), _text(10), _text(10)
    near[0, 1] = far[0, 6] = _text(11)[0, -1]
    # Padded, because mpt cannot do without a mask.
    mask = torch.tensor([[1] * 7 + [0] * 3])
    first, first_near, first_far = (_states(model, ids, mask)[:, 0] for ids in (text, near, far))
    del text_config.is_causal
    for module in flagged:
        module.is_causal = True
    return ((first_far - first).norm() / (first_near - first).norm()).item()


def _text(length: int) -> Tensor:
    """Ids (1, length) that no small configuration uses for anything special."""
    return (torch.arange(length) * 37 % 200 + 20)[None]


@torch.no_grad()
def _states(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    mask = torch.ones_like(ids) if mask is None else mask
    optional = {"use_cache": False, "output_hidden_states": True}
    accepted = inspect.signature(model.forward).parameters
    extra = {name: value for name, value in optional.items() if name in accepted or "kwargs" in accepted}
    output = model(input_ids=ids, attention_mask=mask, **extra)
    last = getattr(output, "last_hidden_state", None)
    return last if last is not None else output.hidden_states[-1]


def _change(one: Tensor, other: Tensor) -> float:
    return ((one - other).abs().max() / one.abs().max()).item()


def _short(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split()).replace("|", "/")[:240]


if __name__ == "__main__":
    sys.exit(main())
