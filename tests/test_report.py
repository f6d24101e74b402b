"""The report's numbers against a count in plain numpy; the page and the pictures; what is refused."""

import json
import os
import subprocess
import sys
from html.parser import HTMLParser

import keras
import numpy as np
import pytest
from _helpers import ROOT, value_of
from keras import layers
from matplotlib.figure import Figure

import keras_blocksparse as kbs
from keras_blocksparse.plots import block_pixels, mask_image


def make_model(**kwargs):
    """A GRU with ragged blocks, and a head that is smaller than one block, pruned in one shot."""
    model = keras.Sequential(
        [keras.Input((5, 20)), layers.GRU(24, name="gru"), layers.Dense(40, name="mid"), layers.Dense(3, name="head")]
    )
    schedule = kbs.ConstantSparsity(target_sparsity=0.7)
    with pytest.warns(UserWarning, match=r"head.*not pruned"):
        kbs.prune_low_magnitude_block(model, schedule, block_size=(8, 8), **kwargs)
    kbs.Pruner(model).prune_now(0.7)
    return model


def count(matrix, rows, cols):
    """Zero share, kept blocks, blocks, dead inputs and dead outputs of a matrix, by loops."""
    kept = np.array(
        [
            [np.any(matrix[top : top + rows, left : left + cols]) for left in range(0, matrix.shape[1], cols)]
            for top in range(0, matrix.shape[0], rows)
        ]
    )
    full = np.kron(kept, np.ones((rows, cols), bool))[: matrix.shape[0], : matrix.shape[1]]
    dead = [int((~full.any(axis=axis)).sum()) for axis in (1, 0)]
    return [float(np.mean(matrix == 0)), int(kept.sum()), kept.size, *dead]


def numbers(row):
    return [row.sparsity, row.kept_blocks, row.blocks, row.dead_inputs, row.dead_outputs]


def gates_of(model):
    """The gate matrices of a model by `make_model`, in the report's order."""
    cell = model.get_layer("gru").cell
    for weight, name in ((cell.kernel, "kernel"), (cell.recurrent_kernel, "recurrent_kernel")):
        for gate, matrix in zip("zrh", np.split(value_of(weight), 3, axis=1), strict=True):
            yield ("gru", name, gate), matrix
    yield ("mid", "kernel", ""), value_of(model.get_layer("mid").kernel)


@pytest.mark.parametrize("stripped", [False, True])
def test_each_gate_is_counted_as_numpy_counts_it(stripped):
    model = make_model()
    if stripped:
        kbs.strip_pruning(model)
    rows = {(row.layer, row.weight, row.gate): row for row in kbs.sparsity_report(model).rows}
    for key, matrix in gates_of(model):
        row = rows.pop(key)
        assert numbers(row) == pytest.approx(count(matrix, 8, 8)), key
        assert (row.shape, row.block_size) == (matrix.shape, (8, 8))
        assert (row.parameters, row.kept_parameters) == (matrix.size, np.count_nonzero(matrix))
    assert list(rows) == [("head", "kernel", "")]


def test_totals_of_pruned_weights_and_of_the_model():
    model = make_model()
    report = kbs.sparsity_report(model)
    pruned = [matrix for _, matrix in gates_of(model)]
    size, kept = sum(m.size for m in pruned), sum(np.count_nonzero(m) for m in pruned)
    assert (report.pruned.parameters, report.pruned.kept_parameters) == (size, kept)
    assert report.pruned.sparsity == pytest.approx(kbs.sparsity(model))
    assert report.model.parameters == model.count_params()
    assert report.model.parameters - report.model.kept_parameters == size - kept  # biases are not zeros of ours
    kbs.strip_pruning(model)
    assert kbs.sparsity_report(model).pruned == report.pruned


def test_a_whole_weight_is_dead_where_all_its_gates_are():
    model = make_model()
    weight = kbs.sparsity_report(model).weights[1]
    kernel = value_of(model.get_layer("gru").cell.recurrent_kernel)
    assert weight.total.gate == "all"
    assert weight.total.shape == kernel.shape
    assert weight.total.dead_inputs == int((~kernel.any(axis=1)).sum())
    assert weight.total.dead_outputs == int((~kernel.reshape(24, 3, 24).any(axis=(0, 1))).sum())


def test_a_skipped_weight_is_listed_with_the_reason():
    report = kbs.sparsity_report(make_model())
    head = report.rows[-1]
    assert (head.layer, head.sparsity, head.kept_blocks, head.block_size) == ("head", 0.0, None, None)
    (note,) = report.notes
    assert note.startswith("head/kernel is not in blocks: The block is larger than the weight, 40 x 3")
    assert note in str(report)


def test_block_size_overrides_what_a_weight_was_pruned_in():
    model = make_model()
    rows = kbs.sparsity_report(model, block_size=(4, 3)).rows
    assert {row.block_size for row in rows} == {(4, 3)}
    for (_, matrix), row in zip(gates_of(model), rows, strict=False):
        assert numbers(row) == pytest.approx(count(matrix, 4, 3))


def test_a_dense_model_is_reported_as_dense():
    model = keras.Sequential([keras.Input((8,)), layers.Dense(8, name="only")])
    report = kbs.sparsity_report(model)
    assert report.pruned == kbs.report.Total(0, 0)
    assert report.pruned.sparsity == 0
    assert report.model.sparsity == 0
    assert report.notes == ("only/kernel is not in blocks: it is dense",)
    assert "pruned weights" in str(report)


def test_other_ranks_wrappers_and_layers_by_themselves():
    einsum = layers.EinsumDense("abc,cde->abde", output_shape=(None, 4, 6), name="einsum")
    einsum.build((None, 5, 16))
    kernel = value_of(einsum.kernel)
    kernel[:8] = 0
    einsum.kernel.assign(kernel)
    (row,) = kbs.sparsity_report(einsum, block_size=(8, 8)).rows
    assert numbers(row) == pytest.approx(count(kernel.reshape(16, 24), 8, 8))
    assert row.shape == (16, 4, 6)

    both = keras.Sequential([keras.Input((5, 16)), layers.Bidirectional(layers.LSTM(16), name="both")])
    rows = kbs.sparsity_report([both, einsum]).rows
    assert [row.layer for row in rows] == ["both/forward_lstm"] * 2 + ["both/backward_lstm"] * 2 + ["einsum"]
    assert kbs.sparsity_report([both, einsum]).model.parameters == both.count_params() + einsum.count_params()


def test_the_table_is_aligned_and_whole():
    report = kbs.sparsity_report(make_model())
    lines = str(report).splitlines()
    head, rule = lines[0], lines[1]
    assert set(rule) == {"-"}
    assert len(head) <= len(rule)
    for line in lines[2:-1]:
        assert len(line) <= len(rule)
    assert [line.split()[0] for line in lines if line.startswith(("gru", "mid", "head/kernel  "))] == [
        "gru/kernel", "gru/recurrent_kernel", "mid/kernel", "head/kernel",
    ]  # fmt: skip
    assert lines[-3].startswith("pruned weights")
    assert lines[-2].startswith("whole model")
    ends = {line.index("%") for line in lines if "%" in line}
    assert len(ends) == 1  # the sparsities stand below each other
    assert repr(report) == str(report)


def test_to_dict_is_json_and_says_the_same():
    report = kbs.sparsity_report(make_model())
    content = json.loads(json.dumps(report.to_dict()))
    assert [row["gate"] for row in content["rows"]] == [row.gate for row in report.rows]
    assert content["rows"][0]["block_size"] == [8, 8]
    assert content["pruned"]["sparsity"] == report.pruned.sparsity
    assert content["notes"] == list(report.notes)


class Tags(HTMLParser):
    """Collects images and text, and sees that every tag that opens also closes."""

    def __init__(self, page):
        super().__init__()
        self.open, self.images, self.text = [], {}, ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.images[dict(attrs)["alt"]] = dict(attrs)["src"]
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_holds_table_and_a_picture_for_each_weight(tmp_path):
    report = kbs.sparsity_report(make_model())
    path = tmp_path / "report.html"
    page = report.to_html(path)
    assert path.read_text(encoding="utf-8") == page
    assert os.listdir(tmp_path) == ["report.html"]
    tags = Tags(page)
    assert not tags.open
    assert list(tags.images) == [f"Blocks of {w.path}" for w in report.weights if w.grid]
    assert all(source.startswith("data:image/png;base64,iVBOR") for source in tags.images.values())
    assert "http" not in page
    for weight in report.weights:
        assert weight.path in tags.text

    table = Tags(report._repr_html_())
    assert not table.open
    assert not table.images
    assert "gru/recurrent_kernel" in table.text


def test_names_are_escaped_in_html():
    model = keras.Sequential([keras.Input((8,)), layers.Dense(8, name="a<b&c")])
    page = kbs.sparsity_report(model).to_html()
    assert "a&lt;b&amp;c/kernel" in page
    assert "a<b" not in page


def test_pixels_are_white_where_blocks_are_zero_and_darker_for_larger_scores():
    for weight in kbs.sparsity_report(make_model()).weights[:3]:
        pixels = block_pixels(weight)
        np.testing.assert_array_equal((pixels == 255).all(axis=-1), ~weight.kept)
        order = np.argsort(weight.scores[weight.kept])
        brightness = pixels[weight.kept].sum(axis=-1)[order].astype(int)
        assert (np.diff(brightness) <= 1).all()


def test_many_blocks_are_averaged_into_few_pixels():
    grid = kbs.BlockGrid((40, 90), (1, 1), gates=3)
    kept = np.zeros(grid.grid_shape, bool)
    kept[0] = True
    kept[1, :20] = True
    weight = kbs.report.WeightSparsity(
        "l", "w", ("a", "b", "c"), (40, 90), (1200, 600, 0), grid, kept, np.ones(kept.shape)
    )
    pixels = block_pixels(weight, limit=7)
    assert pixels.shape == (3, 7, 6, 3)
    assert len(np.unique(pixels[0].reshape(-1, 3), axis=0)) == 1
    np.testing.assert_array_equal(pixels[1, :3], pixels[0, :3])
    assert (pixels[1, 3] > pixels[0, 3]).any()  # half full
    assert (pixels[2] == 255).all()


def test_the_image_for_tensorboard_separates_gates_by_a_grey_line():
    weight = kbs.sparsity_report(make_model()).weights[1]
    image = mask_image(weight, size=90)
    gates, down, across = weight.kept.shape
    scale = 90 // (gates * across)
    assert image.dtype == np.uint8
    assert image.shape == (down * scale + 4, gates * (across * scale + 4), 3)
    assert (image[:2] == 140).all()
    for gate in range(1, gates):
        start = gate * (across * scale + 4)
        assert (image[:, start - 2 : start + 2] == 140).all()
    centres = image[2 + scale // 2 : -2 : scale, 2 + scale // 2 : across * scale + 2 : scale]
    np.testing.assert_array_equal((centres == 255).all(axis=-1), ~weight.kept[0])


def test_broken_weights_still_have_a_picture():
    model = make_model()
    kernel = value_of(model.get_layer("mid").kernel)
    kernel[0] = np.nan
    model.get_layer("mid").kernel.assign(kernel)
    kbs.plot_masks(model, weights="mid").canvas.draw()


def test_plot_masks_draws_every_gate_of_what_was_asked(tmp_path):
    model = make_model()
    figure = kbs.plot_masks(model, path=tmp_path / "masks.png")
    assert isinstance(figure, Figure)
    assert (tmp_path / "masks.png").read_bytes().startswith(b"\x89PNG")
    assert os.listdir(tmp_path) == ["masks.png"]
    assert sum(len(axes.images) == 1 for axes in figure.axes) == 3 + 3 + 1
    texts = [text.get_text() for text in figure.texts]
    assert texts[::2] == ["gru/kernel", "gru/recurrent_kernel", "mid/kernel"]
    total = kbs.sparsity_report(model).weights[1].total
    assert texts[3] == (
        f"24\N{MULTIPLICATION SIGN}72 in 8\N{MULTIPLICATION SIGN}8 blocks, {total.sparsity:.1%} zero, "
        f"{total.kept_blocks} of 27 blocks kept"
    )
    titles = [axes.get_title() for axes in figure.axes]
    for gate in "zrh":
        assert sum(title.startswith(f"gate {gate}, ") for title in titles) == 2
    assert f"{total.dead_inputs} of 24 inputs dead" in titles

    one = kbs.plot_masks(model, weights="recurrent")
    assert [text.get_text() for text in one.texts][::2] == ["gru/recurrent_kernel"]
    dense = kbs.plot_masks(model, weights="head", block_size=(2, 2))
    assert [text.get_text() for text in dense.texts][::2] == ["head/kernel"]


def test_the_histogram_counts_inputs_and_outputs():
    model = make_model()
    figure = kbs.plot_masks(model, weights="mid")
    kernel = value_of(model.get_layer("mid").kernel)
    for axes, axis, side in zip([a for a in figure.axes if a.patches], (1, 0), kernel.shape, strict=True):
        heights = [bar.get_height() for bar in axes.patches]
        assert sum(heights) == side
        assert heights[0] == (~kernel.any(axis=axis)).sum()


def test_a_model_that_is_not_built_says_how_to_build():
    model = keras.Sequential([layers.GRU(8)])
    with pytest.raises(
        ValueError, match=r"not built|No weight is built yet.*call it on a batch.*Received: <Sequential"
    ):
        kbs.sparsity_report(model)
    with pytest.raises(ValueError, match="No weight is built yet"):
        kbs.plot_masks(model)


def test_a_layer_that_is_not_built_is_noted():
    built = layers.Dense(8, name="built")
    built.build((None, 8))
    report = kbs.sparsity_report([built, layers.Dense(8, name="later")])
    assert report.notes[-1] == "later is left out: it is not built yet"


@pytest.mark.parametrize("wrong", ["model", None, 3])
def test_what_is_not_a_model_is_quoted(wrong):
    with pytest.raises(TypeError, match=f"Received: {wrong!r}"):
        kbs.sparsity_report(wrong)


def test_a_model_with_nothing_to_prune_is_refused():
    model = keras.Sequential([keras.Input((4,)), layers.ReLU()])
    with pytest.raises(ValueError, match="no prunable layer in <Sequential"):
        kbs.sparsity_report(model)
    dense = keras.Sequential([keras.Input((8,)), layers.Dense(8, name="only")])
    with pytest.raises(ValueError, match=r"no weight holds zero blocks.*\n.*only/kernel: it is dense"):
        kbs.plot_masks(dense)
    with pytest.raises(ValueError, match=r"weights='gru' matches no weight"):
        kbs.plot_masks(dense, weights="gru")
    with pytest.raises(TypeError, match=r"Received: weights=\['only'\]"):
        kbs.plot_masks(dense, weights=["only"])


@pytest.mark.parametrize("block_size", [(0, 4), (4,), (2.5, 4), "44"])
def test_bad_block_sizes_are_quoted(block_size):
    with pytest.raises((ValueError, TypeError), match="Received: block_size="):
        kbs.sparsity_report(make_model(), block_size=block_size)


def test_paths_that_cannot_be_written_are_refused_before_any_work(tmp_path, monkeypatch):
    model = make_model()
    report = kbs.sparsity_report(model)
    (tmp_path / "file").write_text("old")

    def no_work(*args):
        raise AssertionError("drew before looking at the path")

    monkeypatch.setattr("keras_blocksparse.plots.draw", no_work)
    for path in (tmp_path / "none" / "x.png", tmp_path / "file" / "x.png", tmp_path):
        for write in (report.to_html, lambda path: kbs.plot_masks(model, path=path)):
            with pytest.raises(ValueError, match=r"`path`.*Received: path='"):
                write(path)
    with pytest.raises(TypeError, match="Received: path=3"):
        report.to_html(3)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"must end in one of \[.*'png'.*Received: path=.*masks.xyz"):
        kbs.plot_masks(model, path=tmp_path / "masks.xyz")
    assert os.listdir(tmp_path) == ["file"]


def test_a_page_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")
    monkeypatch.setattr("keras_blocksparse.plots.draw", lambda weights: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        kbs.sparsity_report(make_model()).to_html(path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.html"]


def test_without_matplotlib_the_table_works_and_pictures_say_what_to_install():
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "import keras, keras_blocksparse as kbs\n"
        "dense = keras.layers.Dense(8); dense.build((None, 8)); dense.kernel.assign(keras.ops.tril(dense.kernel))\n"
        "report = kbs.sparsity_report(dense); print(report)\n"
        "for draw in (report.to_html, lambda: kbs.plot_masks(dense)):\n"
        "    try: draw()\n"
        "    except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "dense/kernel" in done.stdout
    assert done.stdout.count('pip install "keras_blocksparse[plot]"') == 2
