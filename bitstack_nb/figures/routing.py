"""Which task a bank chose for texts that came without one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from bitstack_nb.figures.style import Figure, heatmap, styled

UNKNOWN = "no task"


@styled
def chosen_tasks(chosen: Mapping[str, Sequence[str | None]]) -> Figure:
    """The share of texts that went to each task, in %: a row for each kind of text.

    Args:
        chosen: by kind of text (its task, if it has one), the tasks that ``TaskBank.route`` or
            ``predict`` chose; None is no task.

    Raises:
        ValueError: there are no texts of some kind.
    """
    if not chosen or not all(map(len, chosen.values())):
        raise ValueError("chosen_tasks needs the chosen task of one text or more of each kind")
    shares = {
        kind: pd.Series([task or UNKNOWN for task in tasks]).value_counts(normalize=True)
        for kind, tasks in chosen.items()
    }
    percent = 100 * pd.DataFrame(shares).T.fillna(0)
    # The rows' tasks first, in their order, then others.
    columns = sorted(percent, key=[*chosen, *sorted({*percent} - {UNKNOWN}), UNKNOWN].index)
    figure = Figure(1.3 + 0.5 * len(chosen), width=6.5)
    ax = figure.subplots()
    heatmap(ax, percent.loc[list(chosen), columns])
    ax.tick_params("x", rotation=0)
    ax.set(xlabel="the bank chose", ylabel="texts")
    figure.suptitle("The task that the bank chose, in % of each kind of text")
    return figure
