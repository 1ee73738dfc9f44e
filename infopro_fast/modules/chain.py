"""Any network as a chain of blocks: where exactly one tensor goes on, a local module can end.

A network is traced (torch.fx) as deep as its containers go. Between two operations it can be cut if nothing but the last value is
used by what follows; the stretches between such places, kept whole, are the chain. The layers stay the network's own, so training
the chain trains the network.
"""

from __future__ import annotations

import contextlib
import typing
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import torch
from torch import fx, nn

from .backbones import Unit


class Link(typing.NamedTuple):
    """A stretch of a network that takes one tensor and gives one: its name, its layers, the prefix of their names in the network."""

    name: str
    module: nn.Module
    prefix: str
    shape: tuple[int, ...] = ()  # of its output


class NotAChain(ValueError):
    """A network, or a place in it, that cannot be cut; the message names the module and why."""


# ---------------------------------------------------------------------------------------------------------------------
# Tracing


class _Tracer(fx.Tracer):
    """Children of the traced module are not entered."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return True


class Traced(typing.NamedTuple):
    """The links of a network, and why it cannot be cut elsewhere: {module: reason} of the places in between."""

    links: list[Link]
    reasons: dict[str, str]


def trace(net: nn.Module) -> Traced:
    """The finest chain of ``net``. Raises NotAChain for a forward that is no chain at all: several inputs or outputs, or untraceable."""
    reasons: dict[str, str] = {}
    links = _links(net, "", reasons)
    return Traced(links, reasons)


def _links(module: nn.Module, name: str, reasons: dict[str, str]) -> list[Link]:
    links = []
    for link in _stretches(module, name, reasons):
        inner = None
        if any(True for _ in link.module.children()) and not isinstance(link.module, fx.GraphModule) and not _hooked(link.module):
            found: dict[str, str] = {}
            with contextlib.suppress(NotAChain):
                inner = _links(link.module, link.name, found)
                reasons |= found
        # A block of one weighted layer (convolution, norm, activation) or of a residual sum stays whole.
        links += inner if inner is not None and len(_blocks(inner)) > 1 else [link]
    return links


def _stretches(module: nn.Module, name: str, reasons: dict[str, str]) -> list[Link]:
    """Between any two of them, one tensor alone goes on."""
    graph = _graph(module, name or type(module).__name__)
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    (image,) = (node for node in graph.nodes if node.op == "placeholder")
    last_use = {node: index for index, user in enumerate(graph.nodes) for node in user.all_input_nodes}
    place = {node: index for index, node in enumerate(graph.nodes)}
    links, first, given = [], 0, image
    for i, node in enumerate(nodes):
        alive = [other for other in (image, *nodes[:i]) if last_use.get(other, -1) > place[node]]
        if alive:
            user = next(user for user in graph.nodes if alive[0] in user.all_input_nodes and place[user] > place[node])
            reasons[_qualified(name, _label(node))] = (
                f"{_qualified(name, _label(alive[0])) if alive[0] is not image else 'its input'} is needed later, "
                f"by {_qualified(name, _label(user))}"
            )
        elif node in last_use:
            links.append(_link(module, name, nodes[first : i + 1], given))
            first, given = i + 1, node
    return links


def _graph(module: nn.Module, name: str) -> fx.Graph:
    """Traced in training and in evaluation; both must be the same operations."""
    if _hooked(module):
        raise NotAChain(f"{name}: has forward hooks, which a split network would not run: remove them")
    graphs, training = [], module.training
    try:
        for mode in (False, True):
            module.training = mode
            graphs.append(_Tracer().trace(module))
    except Exception as error:  # whatever a forward does with a proxy
        raise NotAChain(f"{name}: its forward cannot be traced ({type(error).__name__}: {str(error).splitlines()[0]})") from error
    finally:
        module.training = training
    if str(graphs[0]) != str(graphs[1]):
        raise NotAChain(f"{name}: its forward is not the same in training and in evaluation")
    inputs = [node for node in graphs[0].nodes if node.op == "placeholder" and (node.users or not node.args)]
    if len(inputs) != 1:
        raise NotAChain(f"{name}: expected a forward of one tensor, got {len(inputs)} inputs: {', '.join(n.name for n in inputs)}")
    (output,) = (node for node in graphs[0].nodes if node.op == "output")
    if not isinstance(output.args[0], fx.Node):
        raise NotAChain(f"{name}: expected one tensor as its output, got {type(output.args[0]).__name__} of several")
    for node in list(graphs[0].nodes):  # arguments that are never used
        if node.op == "placeholder" and node not in inputs:
            graphs[0].erase_node(node)
    return graphs[0]


def _link(module: nn.Module, name: str, nodes: Sequence[fx.Node], given: fx.Node) -> Link:
    """The layer itself where the stretch is one, else a module that runs these operations on the network's layers."""
    label = _qualified(name, _label(nodes[-1]))
    if len(nodes) == 1 and nodes[0].op == "call_module" and nodes[0].args == (given,) and not nodes[0].kwargs:
        return Link(label, module.get_submodule(nodes[0].target), label + ".")
    graph, copies = fx.Graph(), {}
    copies[given] = graph.placeholder("x")
    for node in nodes:
        copies[node] = graph.node_copy(node, lambda n: copies[n])
    graph.output(copies[nodes[-1]])
    graph.lint()
    return Link(label, fx.GraphModule(module, graph, type(module).__name__), f"{name}." if name else "")


def _label(node: fx.Node) -> str:
    return str(node.target) if node.op in ("call_module", "get_attr") else node.name


def _qualified(name: str, label: str) -> str:
    return f"{name}.{label}" if name else label


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


# ---------------------------------------------------------------------------------------------------------------------
# Shapes and blocks


def with_shapes(links: Sequence[Link], image_size: tuple[int, int]) -> list[Link]:
    """The same links with the shapes of their outputs for two images, from the meta device: nothing runs and nothing is changed."""
    dtype = next((p.dtype for link in links for p in link.module.parameters() if p.is_floating_point()), torch.float32)
    found, x = [], torch.empty(2, 3, *image_size, dtype=dtype, device="meta")
    for link in links:
        tensors = {**dict(link.module.named_parameters()), **dict(link.module.named_buffers())}
        like = {name: torch.empty_like(t, device="meta") for name, t in tensors.items()}
        try:
            with torch.no_grad():
                x = torch.func.functional_call(link.module, like, (x,))
        except Exception as error:  # the user's own code
            raise NotAChain(f"{link.name}: failed on {tuple(x.shape)}: {type(error).__name__}: {str(error).splitlines()[0]}") from error
        if not isinstance(x, torch.Tensor):
            raise NotAChain(f"{link.name}: expected one tensor as its output, got {type(x).__name__}")
        found.append(link._replace(shape=tuple(x.shape)))
    return found


def _is_map(shape: Sequence[int]) -> bool:
    return len(shape) == 4 and shape[2] * shape[3] > 1


def without_end(links: Sequence[Link]) -> tuple[list[Link], list[Link]]:
    """The links up to the last that gives a map, and those after it: pooling, flattening, the classifier."""
    maps = [i for i, link in enumerate(links) if _is_map(link.shape)]
    if not maps:
        raise NotAChain("expected a network on maps (N, C, h, w), and none of its blocks gives one")
    return list(links[: maps[-1] + 1]), list(links[maps[-1] + 1 :])


def _weighted(link: Link) -> bool:
    """Has more than a norm's or an activation's parameters."""
    return any(p.dim() > 1 for p in link.module.parameters())


def _blocks(links: Sequence[Link]) -> list[list[Link]]:
    """Links in groups: a weighted one and what follows it up to the next; what comes before the first goes with the first."""
    groups: list[list[Link]] = []
    for link in links:
        if not groups or (_weighted(link) and any(_weighted(other) for other in groups[-1])):
            groups.append([])
        groups[-1].append(link)
    return groups


def units_of(links: Sequence[Link], image_size: tuple[int, int]) -> list[Unit]:
    """Blocks with positions (stage, block): those in the same container are a stage, in order, as in "layer2.0" = (2, 0) of a ResNet."""
    units, stage, block, parent = [], -1, 0, None
    for group in _blocks(links):
        head, shape = next((link for link in group if _weighted(link)), group[0]), group[-1].shape
        container = head.name.rpartition(".")[0]
        stage, block = (stage, block + 1) if container == parent else (stage + 1, 0)
        parent = container
        module, prefix = _joined(group)
        size = tuple(shape[2:]) if len(shape) == 4 else (0, 0)
        channels = shape[1] if len(shape) > 1 else 0
        units.append(Unit((stage, block), prefix, module, channels, image_size[0] / size[0] if size[0] else 0, head.name, size))
    return units


def _joined(group: Sequence[Link]) -> tuple[nn.Module, str]:
    """One module of a group's links, and the prefix that its layers' names need."""
    if len(group) == 1:
        return group[0].module, group[0].prefix
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, link in enumerate(group):
        whole = link.prefix == link.name + "."
        layers[link.name.replace(".", "_") if whole else f"operations{i}"] = link.module
    return Joined(layers, [link.prefix for link in group]), ""


class Joined(nn.Sequential):
    """Links one after the other. `state_dict` has the names of this module; `original` gives the layers by their names before."""

    def __init__(self, layers: OrderedDict[str, nn.Module], prefixes: Sequence[str]):
        super().__init__(layers)
        self._prefixes = tuple(prefixes)

    def original(self) -> Iterator[tuple[str, nn.Module]]:
        yield from zip(self._prefixes, self)
