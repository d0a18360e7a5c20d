"""Tables of results: configurations, means with intervals over seeds, and where they come from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from bitstack_nb.results.frames import COLUMNS, SYNTHETIC, averages, frame, settings_of
from bitstack_nb.results.result import Result

if TYPE_CHECKING:
    import pandas as pd


def shown(runs: pd.DataFrame) -> pd.DataFrame:
    """The settings that tell configurations apart, one row for each, sorted.

    Always strategy, sparsity and budget; then by name every setting that differs, but not one that
    only other strategies have; ``published`` where there are such numbers, ``data`` where it is
    synthetic.
    """
    always = ["strategy", "sparsity", "budget"]
    of_kind = runs.groupby([n for n in ("strategy", "published") if n in runs], dropna=False)
    further = [
        name
        for name in settings_of(runs)
        if name == "published"
        or (name == "data" and runs[name].eq(SYNTHETIC).any())
        or runs[name].nunique() > 1
        or (of_kind[name].nunique(dropna=False) > 1).any()
    ]
    names = always + sorted({*further} - {*always})
    rows = runs.drop_duplicates("configuration").set_index("configuration")
    return rows.reindex(columns=names).sort_values(names, na_position="first", kind="stable")


def table(results: Iterable[Result]) -> pd.DataFrame:
    """One row per configuration: means and intervals over its seeds.

    Columns: what ``shown`` gives; ``seeds`` (how many); then each of ``frames.COLUMNS`` and, as
    ``<column>_interval``, the half width of its 95 % Student interval, NaN for one seed. A mean is
    NaN where a seed lacks it, but for time per step, which is of the seeds that have recorded it.
    Storage is left out where no run has recorded it, time unless all configurations have: some of
    them would compare nothing. Raises ResultError as ``frames.frame`` does.
    """
    return by_configuration(frame(results)).reset_index(drop=True)


def by_configuration(runs: pd.DataFrame) -> pd.DataFrame:
    """``table`` of ``frames.frame``, with ``configuration`` as its index."""
    groups = runs.groupby("configuration")
    found = averages(runs, COLUMNS)
    for name in [*COLUMNS][:-1]:
        # A seed that is left out would change what an accuracy is the mean of; a time it does not.
        lacking = groups[name].count() < groups.size()
        found.loc[lacking, [name, f"{name}_interval"]] = float("nan")
    unknown = ["storage_per_task"] if found["storage_per_task"].isna().all() else []
    unknown += ["time_per_step"] if found["time_per_step"].isna().any() else []
    found = found.drop(columns=[f"{name}{end}" for name in unknown for end in ("", "_interval")])
    return shown(runs).assign(seeds=groups.size()).join(found)


def readable(frame: pd.DataFrame) -> pd.DataFrame:
    """``table``'s frame (or one like it) as text under headings: mean ± half width."""
    import pandas as pd

    kept = [name for name in frame.columns if not name.endswith("_interval")]
    rows = [
        [_cell(n, row[n], row.get(f"{n}_interval"), f"{n}_interval" in row) for n in kept]
        for row in frame.to_dict("records")
    ]
    return pd.DataFrame(rows, columns=[COLUMNS.get(n, n.replace("_", " ")) for n in kept])


def format_table(frame: pd.DataFrame) -> str:
    """Markdown of ``table``'s frame (or one like it): mean ± half width."""
    return markdown(readable(frame))


def markdown(shown: pd.DataFrame) -> str:
    """Markdown of a frame of text, aligned to be read as plain text too."""
    lines = [list(shown.columns), *shown.to_numpy().tolist()]
    lines = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def provenance_table(results: Iterable[Result]) -> pd.DataFrame:
    """What the results were made on and with: a column per origin, with how many runs it made.

    Published numbers, which say only where they were published, are left out.
    """
    import pandas as pd

    rows = []
    for result in results:
        origin, protocol = result.provenance, result.protocol
        if origin.get("published"):
            continue
        places = [origin]
        for resumed in origin.get("resumed", []):
            places.append({**places[-1], **resumed})
        rows.append(
            {
                "data": protocol["data"],
                "model": protocol["model"],
                "hardware": _then(map(_hardware, places)),
                "commit": _then(map(_commit, places)),
                **{
                    name: _then(str(at["packages"].get(name, "-")) for at in places)
                    for name in origin["packages"]
                },
                "date": origin["date"][:10],
                "seed": protocol["seed"],
            }
        )
    if not rows:
        return pd.DataFrame()
    found = pd.DataFrame(rows).fillna("-")
    origins = found.groupby([n for n in found if n not in ("date", "seed")], sort=False)
    listed = {"dates": ("date", _listed), "seeds": ("seed", _listed)}
    return origins.agg(runs=("seed", "size"), **listed).reset_index().T


def _then(values: Iterable[str]) -> str:
    """The environments of a run: one, or those that it was resumed in after it."""
    return "; then ".join(dict.fromkeys(values))


def _hardware(origin: dict[str, Any]) -> str:
    return ", ".join(origin["gpus"]) or "{cpu}, {cores} cores".format(**origin)


def _commit(origin: dict[str, Any]) -> str:
    git = origin["git"] or {"commit": None, "dirty": None}
    return (git["commit"] or "unknown")[:10] + " + changes" * bool(git["dirty"])


def _listed(values: pd.Series) -> str:
    return ", ".join(map(str, sorted(values.unique())))


def _cell(name: str, value: Any, half: float | None, is_metric: bool) -> str:
    if value is None or value != value:  # NaN
        return "–"
    if name.split("_")[0] == "p":  # of a test
        return f"{value:.4f}" if value >= 1e-4 else "< 0.0001"
    if is_metric:
        return f"{value:.1f}" if half != half else f"{value:.1f} ± {half:.1f}"
    return f"{value:.10g}" if isinstance(value, float) else str(value)
