"""Every figure reads well, and depends on nothing but the results."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from functools import cache

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import seaborn as sns
import toy_figures as toy
from matplotlib.image import imread
from matplotlib.text import Text

from bitstack_nb.figures import accuracy, locks
from bitstack_nb.figures.routing import chosen_tasks
from bitstack_nb.figures.style import Figure, png
from bitstack_nb.results.result import ResultError

FIGURES = {draw.__name__: (draw, toy.ALL) for draw in toy.OF_RESULTS}
FIGURES |= {draw.__name__: (draw, toy.BITSTACK[0]) for draw in toy.OF_A_RUN}
for draw in (
    accuracy.accuracy_matrices,
    accuracy.forgetting_per_task,
    accuracy.task_differences,
    locks.capacity,
):
    FIGURES[f"{draw.__name__}, 20 tasks"] = (draw, toy.MANY_TASKS)
FIGURES["chosen_tasks"] = (chosen_tasks, {"reviews": ["reviews", None], "questions": ["news"]})
FIGURES["lock_heatmaps, 20 tasks"] = (locks.lock_heatmaps, toy.MANY_TASKS[0])
every_figure = pytest.mark.parametrize("name", FIGURES)


@cache
def drawn(name: str) -> tuple[Figure, bytes]:
    """A figure and its picture, made once for the tests that only look at it."""
    draw, data = FIGURES[name]
    figure = draw(data)
    return figure, png(figure)


def out_of_view(figure: Figure) -> set[Text]:
    """The labels of ticks beyond an axis's ends, which are there but not drawn."""
    hidden = set()
    for axis in (axis for ax in figure.axes for axis in (ax.xaxis, ax.yaxis)):
        low, high = sorted(axis.get_view_interval())
        ticks = axis.get_major_ticks()
        hidden |= {tick.label1 for tick in ticks if not low <= tick.get_loc() <= high}
    return hidden


@every_figure
def test_a_figure_has_a_title_units_and_nothing_small_cut_off_or_overlapping(name):
    figure, picture = drawn(name)
    assert figure.get_suptitle()
    words = " ".join(text.get_text() for text in figure.findobj(Text))
    assert any(unit in words for unit in ("%", "points", "kB"))
    width, height = figure.bbox.size
    hidden = out_of_view(figure)
    for text in set(figure.findobj(Text)) - hidden:
        if text.get_visible() and text.get_text():
            assert text.get_fontsize() >= 9, text
            box = text.get_window_extent()
            assert min(box.x0, box.y0) >= 0 and box.x1 <= width and box.y1 <= height, text
    headings = [ax.title for ax in figure.axes if ax.get_title()]
    for texts in (headings, *(ax.get_yticklabels() for ax in figure.axes)):
        boxes = [text.get_window_extent() for text in texts if text not in hidden]
        assert not any(box.count_overlaps(boxes[at + 1 :]) for at, box in enumerate(boxes))
    assert (imread(io.BytesIO(picture))[0, 0, :3] == 1).all()  # white, on a dark page too


@pytest.mark.parametrize("name", [name for name in FIGURES if "20 tasks" not in name])
def test_the_picture_depends_on_no_setting_of_the_user_and_no_order_of_the_results(name):
    figure, expected = drawn(name)
    draw, data = FIGURES[name]
    if isinstance(data, list):
        data = [data[at] for at in np.random.default_rng(0).permutation(len(data))]
    with mpl.rc_context():
        sns.set_theme(style="darkgrid", font_scale=2, palette="husl")
        plt.style.use("dark_background")
        mpl.rcParams |= {"savefig.dpi": 30, "font.family": "serif", "savefig.transparent": True}
        before = dict(mpl.rcParams)
        assert png(draw(data)) == png(figure) == expected
        assert dict(mpl.rcParams) == before
    assert not plt.get_fignums()


@pytest.mark.parametrize("draw", toy.OF_RESULTS)
def test_synthetic_tasks_are_called_so(draw):
    embedded = [toy.run(name, data="embedded") for name in ("bitstack", "finetune", "single")]
    embedded += [toy.run(data="embedded", sparsity=sparsity) for sparsity in (0.05, 0.4)]
    assert "synthetic" in draw(embedded).get_suptitle()
    assert "synthetic" not in drawn(draw.__name__)[0].get_suptitle()


NOTHING = [(draw, [], "no results") for draw in toy.OF_RESULTS] + [
    (accuracy.accuracy_matrices, toy.PAPER, "no result has an accuracy matrix"),
    (accuracy.forgetting_per_task, [*toy.JOINT, *toy.PAPER], "no result has .*Forgetting"),
    (accuracy.forgetting_per_task, toy.runs(tasks=["imdb"]), "no result has .*Forgetting"),
    (accuracy.comparison, [replace(toy.PAPER[0], metrics={})], "no result has .*Accuracy"),
    (accuracy.paired_differences, toy.BITSTACK, "nothing to pair: no run of 'finetune'"),
    (accuracy.task_differences, toy.FINETUNE, "nothing to pair: no run of 'single'"),
    (accuracy.accuracy_for_storage, [*toy.JOINT, *toy.PAPER], "has recorded its storage"),
    (accuracy.drift_attribution, toy.SINGLE, "no result has recorded its drift"),
    (locks.ablation, toy.FINETUNE, "no configuration has three sparsities.*bitstack"),
    (locks.capacity, toy.FINETUNE, "no result has locks.*bitstack"),
    (locks.lock_heatmaps, toy.FINETUNE[0], "no locks of strategy 'finetune'.*bitstack"),
    (locks.task_overlap, toy.FINETUNE[0], "'finetune' has no recorded importance"),
    (locks.mask_weight, toy.FINETUNE[0], "'finetune' has no masks"),
]


@pytest.mark.parametrize(("draw", "results", "message"), NOTHING)
def test_without_anything_to_draw_the_error_says_what_is_missing(draw, results, message):
    with pytest.raises(ResultError, match=message):
        draw(results)


def test_a_notebook_shows_a_returned_figure_as_one_png_of_twice_its_width_on_the_page():
    """Also where pyplot has registered a printer of its own."""
    shell = pytest.importorskip("IPython.core.interactiveshell").InteractiveShell.instance()
    capture = pytest.importorskip("IPython.utils.capture").capture_output
    formatter = shell.display_formatter.formatters["image/png"]
    formatter.for_type(mpl.figure.Figure, lambda figure: b"cropped")
    with capture() as captured:
        assert shell.display_formatter.format(accuracy.comparison(toy.BITSTACK)) == ({}, {})
    formatter.pop(mpl.figure.Figure)
    (shown,) = captured.outputs
    picture = imread(io.BytesIO(base64.b64decode(shown.data["image/png"])))
    metadata = shown.metadata["image/png"]
    assert picture.shape[1] == 2 * metadata["width"]
    assert "Accuracy" in metadata["alt"] == shown.data["text/plain"]
