"""One table of several studies: mean score and spread over seeds, and what each design gained.

    python scripts/table_of_studies.py STUDY... FILE...

STUDY are folders that `st-llmpool study` wrote, FILE tables with the scores of one more model each, named as a study
would, such as "5 (soup)". The gain of an option is over its plain design, that of a design over mean-bidirectional:
over the same seeds, or over all of them for a model that is made of several.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from st_llmpool.stats.readers import read_results

KEY = ["design", "option", "seed", "task_type", "task"]
BASELINE = "mean-bidirectional"


def load(given: str) -> pd.DataFrame:
    """Returns the main scores with the columns of KEY."""
    if Path(given).is_dir():
        scores = pd.read_parquet(Path(given) / "results.parquet").astype({"seed": str})
    else:
        scores = read_results([given]).scores
        names = scores["design"].str.removesuffix(")").str.split(" (", n=1, expand=True, regex=False)
        scores = scores.assign(design=names[0], option=names[1], seed="several")
    return scores[scores["metric"] == "main_score"]


def main(arguments: list[str]) -> None:
    """Prints the table as Markdown."""
    scores = pd.concat([load(given) for given in arguments]).drop_duplicates(KEY)
    means = scores.groupby(["design", "option", "seed", "task_type"])["score"].mean().unstack()
    print("| design | seeds | " + " | ".join(f"{kind} | gain" for kind in means.columns) + " |")
    print("|---" * (2 + 2 * len(means.columns)) + "|")
    for (design, option), rows in means.groupby(level=["design", "option"]):
        reference = means.loc[(design, "") if option else (BASELINE, "")]
        rows = rows.droplevel(["design", "option"])
        shared = reference.index.intersection(rows.index)
        gains = rows.mean() - (reference.loc[shared] if len(shared) else reference).mean()
        cells = [f"{design} ({option})" if option else design, "several" if "several" in rows.index else str(len(rows))]
        for kind in means.columns:
            spread = f" ± {rows[kind].std():.4f}" if len(rows) > 1 else ""
            gain = "" if (design, option) == (BASELINE, "") else f"{gains[kind]:+.4f}"
            cells += [f"{rows[kind].mean():.4f}{spread}", gain]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main(sys.argv[1:])
