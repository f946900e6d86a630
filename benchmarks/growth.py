"""Time and memory of design 5 as functions of batch, length, layers and latents, beside plain mean pooling.

Draws a picture for each axis into `benchmarks/results/`. Run it as

    python benchmarks/growth.py [--device cuda] [--out benchmarks/results]
"""

from __future__ import annotations

import statistics
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from harness import (
    SHAPES,
    arguments,
    in_fresh_process,
    machine,
    our_model,
    peak_memory,
    plain_model,
    random_backbone,
    random_batch,
    seconds,
)

#: Axis -> values; the others stay at the middle.
AXES = {
    "batch": (2, 4, 8, 16, 32),
    "length": (16, 32, 64, 128, 256),
    "layers": (2, 4, 8, 12),
    "latents": (1, 8, 64, 256),
}
MIDDLE = {"batch": 8, "length": 64, "layers": 8, "latents": 8}
Point = tuple[float, float]


def point(folders: dict[int, str], variant: str, axis: str, value: int, args: Namespace) -> Point:
    """Returns the median seconds and the peak memory in MiB; called in a process of its own."""
    sizes = MIDDLE | {axis: value}
    folder = folders[sizes["layers"]]
    if variant == "plain":
        model = plain_model(folder, "bidirectional", "mean", args.device)
    else:
        model = our_model(folder, "5", args.device, pooling_kwargs={"num_latents": sizes["latents"]})
    batch = random_batch(model, sizes["batch"], sizes["length"])
    with torch.inference_mode():
        model(dict(batch))
        with peak_memory(args.device) as peak:
            times = [seconds(partial(model, dict(batch)), args.device) for _ in range(args.repetitions)]
    return statistics.median(times), peak[0]


def draw(file: Path, axis: str, values: Sequence[int], curves: dict[str, list[Point]], title: str) -> None:
    """Draws time and memory beside each other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, index, unit in zip(figure.subplots(1, 2), (0, 1), ("ms", "MiB"), strict=True):
        for name, curve in curves.items():
            scale = 1e3 if index == 0 else 1
            axes.plot(values, [scale * point[index] for point in curve], marker="o", label=name)
        axes.set(xlabel=axis, ylabel=unit, ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title, fontsize=8)
    figure.savefig(file, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and draws."""
    options = {"type": Path, "default": Path(__file__).parent / "results"}
    axes = {"nargs": "+", "choices": sorted(AXES), "default": sorted(AXES)}
    args = arguments(__doc__, argv, ("--out", options), ("--axes", axes))
    args.out.mkdir(parents=True, exist_ok=True)
    shape = "tiny" if args.quick else "small"
    about = machine(args.device)
    with tempfile.TemporaryDirectory() as scratch:
        depths = {MIDDLE["layers"], *AXES["layers"]} if not args.quick else {MIDDLE["layers"]}
        folders = {depth: random_backbone(shape, Path(scratch), args.device, layers=depth) for depth in sorted(depths)}
        for axis in args.axes:
            chosen = (MIDDLE[axis],) if args.quick else AXES[axis]
            curves = {
                name: [in_fresh_process(point, folders, name, axis, value, args, quick=args.quick) for value in chosen]
                for name in ("design 5", "plain")
            }
            rest = ", ".join(f"{name} {value}" for name, value in MIDDLE.items() if name != axis)
            title = f"width {SHAPES[shape][1]}, {rest}; {about.get('gpu', about['cpu'])}, {about['threads']} threads"
            draw(args.out / f"growth_{axis}.png", axis, chosen, curves, title)
            print(f"{axis} {list(chosen)}: {curves}")


if __name__ == "__main__":
    main()
