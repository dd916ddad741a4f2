"""The picture of the gradient paths: it shows the graph's ways, and nothing in it covers anything else."""

from functools import partial
from itertools import combinations, pairwise

import pytest
from jax import lax

from bnn_jax.analysis.gradient_paths import BinaryOperation, Edge, PathGraph, path_graph, smallest
from bnn_jax.analysis.path_diagram import BOX, END, JOIN, Node, cheapest, diagram_of, draw_gradient_paths, place
from bnn_jax.layers import BinaryConv
from bnn_jax.models.fractal import FractalBlock
from bnn_jax.quantizers import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS, make_quantizer

CONV = partial(
    BinaryConv,
    padding=1,
    input_quantizer=make_quantizer(ACTIVATION_QUANTIZERS, "approx_sign"),
    kernel_quantizer=make_quantizer(WEIGHT_QUANTIZERS, "xnor"),
)
INPUT, OUTPUT = Node(END, "input"), Node(END, "output")


class Wires:
    """Builds a PathGraph by hand: value 0 is the input, each call returns the id of a new value."""

    def __init__(self):
        self.edges, self.operations, self.count = [], [], 0

    def value(self, sources, primitive, operation=None):
        self.count += 1
        self.edges += [Edge(source, self.count, operation, primitive) for source in sources]
        return self.count

    def conv(self, x, cost=5, name=None):
        name = name or f"Net/block/conv{len(self.operations) + 1}"
        self.operations.append(BinaryOperation(name, cost))
        normed = self.value([x], "mul")
        statistic = self.value([normed], "reduce_sum")
        y = self.value([self.value([normed, statistic], "sub")], "conv_general_dilated", len(self.operations) - 1)
        return self.value([y], "add")

    def graph(self, output):
        return PathGraph(0, output, tuple(self.edges), tuple(self.operations))


def wired(build):
    wires = Wires()
    return wires.graph(build(wires, 0))


def bireal(wires, x):
    y = wires.value([x, wires.conv(x)], "add")
    return wires.value([y, wires.conv(y)], "add")


def igp_dense(wires, x):
    a, b = wires.conv(x, 7), wires.conv(x, 7)
    joined = wires.value([wires.value([a, wires.conv(a, 2)], "add"), b], "add")
    return wires.value([x, wires.value([joined], "div")], "concatenate")


def fractal(columns):
    def build(wires, x):
        y = wires.conv(x)
        short = wires.value([x, y], "add")
        if columns == 1:
            return short
        below = fractal(columns - 1)
        return wires.value([below(wires, below(wires, x)), short], "add")

    return build


def dense(layers):
    def build(wires, x):
        values = [x]
        for _ in range(layers):
            joined = wires.value(values, "concatenate") if len(values) > 1 else x
            values.append(wires.conv(joined, 3 + len(values)))
        return wires.value(values, "concatenate")

    return build


def plain(wires, x):
    return wires.conv(wires.conv(x, 4), 3)


BLOCKS = {
    "plain": plain,
    "Bi-Real": bireal,
    "IGP-DenseNet": igp_dense,
    "dense of 6": dense(6),
    "IGP c3": fractal(3),
    "IGP c4": fractal(4),
    "IGP c5": fractal(5),
}


def test_bireal_diagram():
    diagram = diagram_of(wired(bireal))
    assert diagram.nodes == (
        INPUT,
        Node(BOX, "conv1", 5),
        Node(JOIN, "+"),
        Node(BOX, "conv2", 5),
        Node(JOIN, "+"),
        OUTPUT,
    )
    assert set(diagram.arrows) == {(0, 1), (0, 2), (1, 2), (2, 3), (2, 4), (3, 4), (4, 5)}
    assert cheapest(diagram) == ((0, 2), (2, 4), (4, 5))


def test_igp_dense_diagram_has_one_join_of_three_ways():
    diagram = diagram_of(wired(igp_dense))
    assert sorted(node.label for node in diagram.nodes) == ["+", "concat", "conv1", "conv2", "conv3", "input", "output"]
    at = {node.label: index for index, node in enumerate(diagram.nodes)}
    into = {source for source, target in diagram.arrows if target == at["+"]}
    assert into == {at["conv1"], at["conv2"], at["conv3"]}
    assert cheapest(diagram) == ((0, at["concat"]), (at["concat"], at["output"]))


def test_the_cheapest_path_prefers_cost_to_length():
    def build(wires, x):
        return wires.value([wires.conv(x, 9), wires.conv(wires.conv(x, 4), 4)], "add")

    diagram = diagram_of(wired(build))
    labels = [diagram.nodes[target].label for _, target in cheapest(diagram)]
    assert labels == ["conv2", "conv3", "+", "output"]


def listed(diagram, node=0):
    """(cost, length) of every way from a node to the output, one by one."""
    if node == len(diagram.nodes) - 1:
        return {(0, 0)}
    return {
        (cost + diagram.nodes[target].cost, length + (diagram.nodes[target].kind == BOX))
        for source, target in diagram.arrows
        if source == node
        for cost, length in listed(diagram, target)
    }


@pytest.mark.parametrize("build", [BLOCKS[name] for name in BLOCKS if name not in ("IGP c4", "IGP c5")])
def test_the_diagram_has_the_paths_of_the_graph(build):
    graph = wired(build)
    diagram = diagram_of(graph)
    costs, lengths = (tuple(sorted(set(values))) for values in zip(*listed(diagram)))
    assert smallest(graph, 1000) == (costs, lengths)
    marked = cheapest(diagram)
    assert [marked[0][0], marked[-1][1]] == [0, len(diagram.nodes) - 1]
    assert all(before[1] == after[0] for before, after in pairwise(marked))
    assert sum(diagram.nodes[target].cost for _, target in marked) == costs[0]


@pytest.mark.parametrize(
    "names, labels",
    [
        (["Net/a/conv", "Net/b/conv"], ["a", "b"]),
        (["Net/a/conv1", "Net/a/conv2"], ["conv1", "conv2"]),
        (["conv", "block/conv"], ["conv", "block/conv"]),
        (["Net/conv", "Net/conv"], ["conv", "conv"]),
        (["", ""], ["product 1", "product 2"]),
        (["Net/a_very_long_name_of_a_module/conv1", "Net/b"], ["…ng_name_of_a_module/conv1", "b"]),
    ],
)
def test_labels(names, labels):
    graph = wired(lambda wires, x: wires.conv(wires.conv(x)))
    graph = graph._replace(operations=tuple(BinaryOperation(name, 5) for name in names))
    assert [node.label for node in diagram_of(graph).nodes if node.kind == BOX] == labels


@pytest.mark.parametrize("build", BLOCKS.values(), ids=BLOCKS)
def test_nothing_overlaps(build):
    diagram = diagram_of(wired(build))
    placement = place(diagram)
    boxes = list(zip(placement.points, placement.widths))
    for ((x0, y0), width0), ((x1, y1), width1) in combinations(boxes, 2):
        assert abs(x0 - x1) > (width0 + width1) / 2 or abs(y0 - y1) > 0.5
    for (source, target), way in zip(diagram.arrows, placement.ways):
        assert (way[0], way[-1]) == (placement.points[source], placement.points[target])
        assert all(lower > upper for (_, upper), (_, lower) in pairwise(way))
        for x, y in way[1:-1]:
            beside = [(abs(x - node_x), width / 2) for (node_x, node_y), width in boxes if abs(node_y - y) < 0.5]
            assert all(distance > half for distance, half in beside)


def test_the_ways_of_a_fractal_do_not_cross():
    """Series and parallel parts alone: there is an order without a crossing, and it is found."""
    for columns in (2, 3, 4, 5):
        diagram = diagram_of(wired(fractal(columns)))
        pieces = [piece for way in place(diagram).ways for piece in pairwise(way)]
        for ((a, top), (b, bottom)), ((c, other_top), (d, other_bottom)) in combinations(pieces, 2):
            if (top, bottom) == (other_top, other_bottom):
                assert (a - c) * (b - d) >= 0


def texts_of(axes):
    return [text.get_text() for text in axes.texts]


def test_the_picture_of_a_module(tmp_path, figures):
    from PIL import Image

    path = tmp_path / "block.png"
    assert draw_gradient_paths(FractalBlock(2, conv=CONV), (1, 56, 56, 53), path, train=False) == path
    with Image.open(path) as image:
        assert image.format == "PNG"
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 20)}
    assert (0xD5, 0x5E, 0x00) in colours
    (axes,) = figures[0].axes
    assert {"input", "output", "+", "first/conv\nN = 79.3 M", "second/conv\nN = 79.3 M"} <= set(texts_of(axes))
    title = axes.get_title(loc="left")
    assert title == "costs N: 0, 79.3 M, 159 M\nlengths L: 0, 1, 2"


def test_the_text_fits_into_its_box(tmp_path, figures):
    draw_gradient_paths(FractalBlock(3, conv=CONV), (1, 8, 8, 8), tmp_path / "block.png")
    (axes,) = figures[0].axes
    renderer = figures[0].canvas.get_renderer()
    texts = [text.get_window_extent(renderer) for text in axes.texts]
    for one, other in combinations(texts, 2):
        assert not one.overlaps(other)
    boxes = [patch.get_window_extent(renderer) for patch in axes.patches if hasattr(patch, "get_boxstyle")]
    assert len(boxes) == len(texts) > 9
    for text, box in zip(texts, boxes):
        assert box.x0 <= text.x0 and text.x1 <= box.x1 and box.y0 <= text.y0 and text.y1 <= box.y1


def test_without_a_path_the_picture_says_so(tmp_path, figures):
    draw_gradient_paths(lax.stop_gradient, (1, 4), tmp_path / "block.png")
    (axes,) = figures[0].axes
    assert axes.get_title(loc="left") == "no gradient path"
    assert texts_of(axes) == ["input", "output"]
    assert diagram_of(path_graph(lax.stop_gradient, (1, 4))).arrows == ()
