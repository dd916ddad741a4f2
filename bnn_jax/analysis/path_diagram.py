"""A picture of the ways that a gradient has through a block: its binary convolutions, shortcuts and joins."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from graphlib import TopologicalSorter
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from bnn_jax.analysis.figures import COLOURS, drawing
from bnn_jax.analysis.gradient_paths import Edge, PathGraph, path_graph, smallest
from bnn_jax.paths import local_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BOX, JOIN, END = "operation", "join", "end"
_SIGNS = {"add": "+", "add_any": "+", "sub": "−", "mul": "×", "div": "÷", "concatenate": "concat", "select_n": "select"}
_SIGNS |= {"chosen gradient": "function", "branch_join": "branch"}
_FONT = {BOX: 8, JOIN: 9, END: 9}
# Inches.
_LAYER, _GAP, _BEND, _CHARACTER, _BOX_HEIGHT, _MARGIN = 0.72, 0.22, 0.12, 0.073, 0.36, 0.25
_LONGEST_LABEL, _ORDERING, _STRAIGHTENING = 26, 16, 120


class Node(NamedTuple):
    """What is drawn: a binary operation, a join of several ways, or an end of the graph."""

    kind: str
    label: str
    cost: int = 0


class Diagram(NamedTuple):
    """A graph of gradient paths without the operations that neither join ways nor cost anything.

    Attributes:
      nodes: the first is the input, the last the output.
      arrows: pairs of positions in `nodes`, from the input on.
    """

    nodes: tuple[Node, ...]
    arrows: tuple[tuple[int, int], ...]


class Placement(NamedTuple):
    """Where the nodes of a diagram stand.

    Attributes:
      points: of each node (x, y), in inches, y downwards.
      ways: of each arrow the points that it passes, its ends included.
      widths: of each node.
    """

    points: tuple[tuple[float, float], ...]
    ways: tuple[tuple[tuple[float, float], ...], ...]
    widths: tuple[float, ...]


def draw_gradient_paths(function_or_module: Any, x: Any, path: str | Path, **call_options: Any) -> Path:
    """Draw the gradient paths of a block or a network, from its input at the top to its output, to a PNG at `path`.

    A box is a binary convolution with its cost N, a small round one the place where ways meet.  The arrows point as the
    activations go; gradients pass against them.  The cheapest path is coloured.

    Args:
      function_or_module, x, **call_options: as of :func:`bnn_jax.analysis.gradient_paths.path_graph`.
      path: of the file.

    Returns:
      The path of the file.
    """
    path = local_path("path", path)
    graph = path_graph(function_or_module, x, **call_options)
    diagram = diagram_of(graph)
    placement = place(diagram)
    left, right, top, bottom = _edges_of(placement)
    with drawing(path, (max(right - left, 3.0), bottom - top + 0.85)) as (_, (axes,)):
        _draw(axes, graph, diagram, placement)
    return path


def diagram_of(graph: PathGraph) -> Diagram:
    """The diagram of a graph: values between which a gradient passes one way alone are one node."""
    incoming = _incoming(graph)
    labels = _labels([operation.path for operation in graph.operations])
    nodes, arrows = [Node(END, "input")], []
    node_of = {graph.inputs: 0}

    def add(node: Node, sources: Iterable[int]) -> int:
        nodes.append(node)
        arrows.extend((source, len(nodes) - 1) for source in sources)
        return len(nodes) - 1

    order = TopologicalSorter({value: [edge.source for edge in edges] for value, edges in incoming.items()})
    for value in order.static_order():
        if value == graph.inputs:
            continue
        edges = incoming[value]
        sources = list(dict.fromkeys(node_of[edge.source] for edge in edges))
        if edges[0].operation is not None:
            label, cost = labels[edges[0].operation], graph.operations[edges[0].operation].cost
            node_of[value] = add(Node(BOX, label, cost), sources)
        elif len(sources) > 1:
            node_of[value] = add(Node(JOIN, _SIGNS.get(edges[0].primitive, edges[0].primitive)), sources)
        else:
            node_of[value] = sources[0]
    add(Node(END, "output"), [node_of[graph.outputs]] if graph.outputs in node_of else [])
    return _merge_joins(Diagram(tuple(nodes), tuple(arrows)))


def _incoming(graph: PathGraph) -> dict[int, list[Edge]]:
    """value -> the edges that lead to it, of the values between input and output."""
    ahead, behind = {graph.inputs}, {graph.outputs}
    for edge in graph.edges:
        if edge.source in ahead:
            ahead.add(edge.target)
    for edge in reversed(graph.edges):
        if edge.target in behind:
            behind.add(edge.source)
    incoming = defaultdict(list)
    for edge in graph.edges:
        if edge.source in ahead and edge.target in behind:
            incoming[edge.target].append(edge)
    return incoming


def _merge_joins(diagram: Diagram) -> Diagram:
    """A join whose only way on is a join of the same kind becomes part of it."""
    following, into = defaultdict(list), {}
    for source, target in diagram.arrows:
        following[source].append(target)
    for index in reversed(range(len(diagram.nodes))):
        onward = following[index][0] if len(following[index]) == 1 else index
        same = diagram.nodes[index] == diagram.nodes[onward] and diagram.nodes[index].kind == JOIN
        into[index] = into[onward] if same and onward != index else index
    kept = [index for index in range(len(diagram.nodes)) if into[index] == index]
    position = {index: new for new, index in enumerate(kept)}
    arrows = dict.fromkeys((position[into[a]], position[into[b]]) for a, b in diagram.arrows if into[a] != into[b])
    return Diagram(tuple(diagram.nodes[index] for index in kept), tuple(arrows))


def _labels(paths: Sequence[str]) -> list[str]:
    """The paths without the modules that all of them begin and end with, and not too long."""
    parts = [path.split("/") for path in paths]
    shortest = min(map(len, parts), default=0)
    first = next((i for i in range(shortest) if len({part[i] for part in parts}) > 1), shortest - 1)
    most = shortest - first - 1
    last = next((i for i in range(most) if len({part[-1 - i] for part in parts}) > 1), most)
    labels = ["/".join(part[first : len(part) - last]) or f"product {i + 1}" for i, part in enumerate(parts)]
    return [label if len(label) <= _LONGEST_LABEL else "…" + label[1 - _LONGEST_LABEL :] for label in labels]


def cheapest(diagram: Diagram) -> tuple[tuple[int, int], ...]:
    """The arrows of the path of the lowest cost; among equal ones the one with the fewest binary operations."""
    best: dict[int, tuple[int, int, int, tuple[tuple[int, int], ...]]] = {0: (0, 0, 0, ())}
    for source, target in sorted(diagram.arrows, key=lambda arrow: arrow[1]):
        if source in best:
            node = diagram.nodes[target]
            cost, length, hops, arrows = best[source]
            found = (cost + node.cost, length + (node.kind == BOX), hops + 1, (*arrows, (source, target)))
            best[target] = min(best.get(target, found), found)
    return best[len(diagram.nodes) - 1][-1] if len(diagram.nodes) - 1 in best else ()


def place(diagram: Diagram) -> Placement:
    """Positions in layers from top to bottom, with few crossings and no arrow through a node.

    A node's layer lies half-way between the first and the last that its neighbours leave to it; an arrow over several
    layers keeps a place free in each.  The order in a layer follows the mean position of the neighbours, swept down and
    up (Sugiyama, Tagawa, Toda, Methods for Visual Understanding of Hierarchical System Structures, 1981).
    """
    layers = _layers(diagram)
    widths = [_width(node) for node in diagram.nodes]
    chains, below = [], [[] for _ in range(max(layers) + 1)]
    for node, layer in enumerate(layers):
        below[layer].append(node)
    for source, target in diagram.arrows:
        bends = range(len(widths), len(widths) + layers[target] - layers[source] - 1)
        for layer, bend in enumerate(bends, layers[source] + 1):
            below[layer].append(bend)
        widths += [_BEND] * len(bends)
        chains.append((source, *bends, target))
    x = _swept(below, widths, _neighbours(chains))
    depth = {node: _LAYER * layer for layer, members in enumerate(below) for node in members}
    points = tuple((x[node], depth[node]) for node in range(len(diagram.nodes)))
    ways = tuple(tuple((x[node], depth[node]) for node in chain) for chain in chains)
    return Placement(points, ways, tuple(widths[: len(diagram.nodes)]))


def _layers(diagram: Diagram) -> list[int]:
    """The layer of each node; positions in `nodes` rise along the arrows."""
    first = [0] * len(diagram.nodes)
    for source, target in sorted(diagram.arrows, key=lambda arrow: arrow[1]):
        first[target] = max(first[target], first[source] + 1)
    first[-1] = max(first[-1], 1)
    last = [first[-1]] * len(diagram.nodes)
    for source, target in sorted(diagram.arrows, reverse=True):
        last[source] = min(last[source], last[target] - 1)
    return [0, *((low + high) // 2 for low, high in zip(first[1:], last[1:]))]


def _width(node: Node) -> float:
    longest = max(map(len, _text(node).split("\n")))
    return longest * _CHARACTER + 0.2 if node.kind == BOX else max(longest * _CHARACTER + 0.12, 0.26)


def _text(node: Node) -> str:
    return f"{node.label}\nN = {short(node.cost)}" if node.kind == BOX else node.label


def short(number: int) -> str:
    """Three significant digits with a suffix.

    >>> short(0), short(27_123_264), short(115_605_504), short(18_432)
    ('0', '27.1 M', '116 M', '18.4 k')
    """
    if number < 1000:
        return str(number)
    exponent = min(len(f"{float(f'{number:.2e}'):.0f}") - 1, 14) // 3
    return f"{number / 1000**exponent:.3g} {' kMGT'[exponent]}"


def _neighbours(chains: Iterable[Sequence[int]]) -> dict[int, tuple[list[int], list[int]]]:
    """node -> its neighbours in the layer above and in the layer below; the inside of a long arrow counts as more."""
    neighbours: dict[int, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for chain in chains:
        for position, (upper, lower) in enumerate(pairwise(chain)):
            # So that it is straight (Gansner et al., 1993).
            times = 8 if 0 < position < len(chain) - 2 else 2 if len(chain) > 2 else 1
            neighbours[lower][0].extend([upper] * times)
            neighbours[upper][1].extend([lower] * times)
    return neighbours


def _swept(below: list[list[int]], widths: list[float], neighbours: dict) -> dict[int, float]:
    """The horizontal position of each node after sweeping over the layers, of which the order is changed in place."""
    x: dict[int, float] = {}

    def move(members: list[int], sides: tuple[int, ...], ordering: bool) -> None:
        near = {node: [other for side in sides for other in neighbours[node][side]] for node in members}
        wanted = {node: fmean(x[other] for other in near[node]) if near[node] else x[node] for node in members}
        if ordering:
            members.sort(key=wanted.__getitem__)
        weights = [len(near[node]) or 1 for node in members]
        x.update(zip(members, _apart([wanted[node] for node in members], [widths[node] for node in members], weights)))

    for members in below:
        x.update(zip(members, _apart([0.0] * len(members), [widths[node] for node in members], [1] * len(members))))
    for sweep in range(_ORDERING + _STRAIGHTENING):
        down, ordering = sweep % 2 == 0, sweep < _ORDERING
        sides = ((0,) if down else (1,)) if ordering else (0, 1)
        for members in below if down else reversed(below):
            move(members, sides, ordering)
    return x


def _apart(wanted: Sequence[float], widths: Sequence[float], weights: Sequence[int]) -> list[float]:
    """Positions in the given order at which the widths do not overlap, nearest to the wanted ones in weighted squares.

    >>> _apart([0.0, 0.0], [1.0, 0.56], [1, 1])
    [-0.5, 0.5]
    """
    offsets = [0.0]
    for left, right in pairwise(widths):
        offsets.append(offsets[-1] + (left + right) / 2 + _GAP)
    # Isotonic regression: neighbours that would cross share their mean.
    pools: list[tuple[float, int, int]] = []
    for want, offset, weight in zip(wanted, offsets, weights):
        pools.append((want - offset, weight, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (b, w, m), (a, v, n) = pools.pop(), pools.pop()
            pools.append(((a * v + b * w) / (v + w), v + w, n + m))
    pooled = [value for value, _, count in pools for _ in range(count)]
    return [value + offset for value, offset in zip(pooled, offsets)]


def _edges_of(placement: Placement) -> tuple[float, float, float, float]:
    """The left, right, top and bottom end of the picture."""
    sides = [(x - width / 2, x + width / 2) for (x, _), width in zip(placement.points, placement.widths)]
    bends = [x for way in placement.ways for x, _ in way]
    left, right = min(*(low for low, _ in sides), *bends), max(*(high for _, high in sides), *bends)
    depth = max(y for _, y in placement.points)
    return left - _MARGIN, right + _MARGIN, -_MARGIN, depth + _MARGIN


def _draw(axes: "Axes", graph: PathGraph, diagram: Diagram, placement: Placement) -> None:
    from matplotlib.lines import Line2D

    marked = set(cheapest(diagram))
    looks = {True: {"color": COLOURS[1], "linewidth": 2.2, "zorder": 2}, False: {"color": "#777777", "linewidth": 1.0}}
    for arrow, way in zip(diagram.arrows, placement.ways):
        _draw_way(axes, way, diagram.nodes[arrow[1]], looks[arrow in marked])
    on_path = {node for arrow in marked for node in arrow}
    for index, (node, point) in enumerate(zip(diagram.nodes, placement.points)):
        _draw_node(axes, node, point, placement.widths[index], COLOURS[1] if index in on_path else "#444444")
    left, right, top, bottom = _edges_of(placement)
    axes.set(xlim=(left, right), ylim=(bottom, top), aspect="equal")
    axes.set_axis_off()
    paths = smallest(graph)
    costs, lengths = ", ".join(map(short, paths.costs)), ", ".join(map(str, paths.lengths))
    axes.set_title(
        f"costs N: {costs}\nlengths L: {lengths}" if paths.costs else "no gradient path", fontsize=9, loc="left"
    )
    if marked:
        handles = [Line2D([], [], **looks[True], label="cheapest gradient path")]
        axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(0, 0), frameon=False, fontsize=8)


def _draw_way(axes: "Axes", way: Sequence[tuple[float, float]], end: Node, look: dict[str, Any]) -> None:
    """Straight past the nodes of each layer, curved between the layers alone."""
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.path import Path as Curve

    half = _BOX_HEIGHT / 2
    vertices, codes = [way[0]], [Curve.MOVETO]
    for (x0, y0), (x1, y1) in pairwise(way):
        middle = (y0 + y1) / 2
        vertices += [(x0, y0 + half), (x0, middle), (x1, middle), (x1, y1 - half)]
        codes += [Curve.LINETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4]
    tip = (way[-1][0], way[-1][1] - _half_height(end))
    # An arrow's head takes its direction from the last piece, so that must have a length.
    vertices[-1] = (tip[0], min(vertices[-1][1], tip[1] - 0.05))
    style = {"arrowstyle": "-|>", "mutation_scale": 8, "shrinkA": 0, "shrinkB": 0, "capstyle": "butt"}
    curve = Curve([*vertices, tip], [*codes, Curve.LINETO])
    axes.add_patch(FancyArrowPatch(path=curve, **style, **({"zorder": 1} | look)))


def _half_height(node: Node) -> float:
    return _BOX_HEIGHT / 2 if node.kind == BOX else 0.13


def _draw_node(axes: "Axes", node: Node, point: tuple[float, float], width: float, colour: str) -> None:
    from matplotlib.patches import FancyBboxPatch

    half = _half_height(node)
    corner = 0.05 if node.kind == BOX else half
    shape = f"round,pad=0,rounding_size={corner}"
    look = {"facecolor": "#E8F1F8" if node.kind == BOX else "white", "edgecolor": colour, "zorder": 3}
    axes.add_patch(FancyBboxPatch((point[0] - width / 2, point[1] - half), width, 2 * half, boxstyle=shape, **look))
    centred = {"ha": "center", "va": "center", "multialignment": "center"}
    axes.text(*point, _text(node), fontsize=_FONT[node.kind], zorder=4, parse_math=False, **centred)
