"""Any network as a chain of blocks: a local module can end wherever exactly one tensor goes on.

torch.fx traces the network, and its containers in turn. It can be cut between two operations if what follows
uses the last value alone. The stretches between such places are the links of the chain. Their layers are the
network's own, so training the chain trains the network.
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
    """A stretch of a network from one tensor to one tensor."""

    name: str
    module: nn.Module  # its layers
    prefix: str  # of the layers' names in the network
    shape: tuple[int, ...] = ()  # of its output


class NotAChain(ValueError):
    """A network, or a place in it, cannot be cut; the message names the module and the reason."""


class _Tracer(fx.Tracer):
    """Does not enter the children of the traced module."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return True


class Traced(typing.NamedTuple):
    """The links of a network, and why it cannot be cut elsewhere: {module: reason}."""

    links: list[Link]
    reasons: dict[str, str]


def trace(net: nn.Module) -> Traced:
    """Return the finest chain of ``net``. Raises NotAChain if there is none, or the trace fails."""
    reasons: dict[str, str] = {}
    links = _links(net, "", reasons)
    return Traced(links, reasons)


def _links(module: nn.Module, name: str, reasons: dict[str, str]) -> list[Link]:
    links = []
    for link in _stretches(module, name, reasons):
        inner = None
        container = any(True for _ in link.module.children()) and not isinstance(link.module, fx.GraphModule)
        if container and not _hooked(link.module):
            found: dict[str, str] = {}
            with contextlib.suppress(NotAChain):
                inner = _links(link.module, link.name, found)
                reasons |= found
        # A block with one weighted layer (convolution, norm, activation), or a residual sum, stays whole.
        links += inner if inner is not None and len(_blocks(inner)) > 1 else [link]
    return links


def _stretches(module: nn.Module, name: str, reasons: dict[str, str]) -> list[Link]:
    """Return the stretches of one module; between any two of them a single tensor goes on."""
    graph = _graph(module, name or type(module).__name__)
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    (image,) = (node for node in graph.nodes if node.op == "placeholder")
    last_use = {node: index for index, user in enumerate(graph.nodes) for node in user.all_input_nodes}
    place = {node: index for index, node in enumerate(graph.nodes)}
    links, first, given = [], 0, image
    for i, node in enumerate(nodes):
        alive = [other for other in (image, *nodes[:i]) if last_use.get(other, -1) > place[node]]
        if alive:
            users = (user for user in graph.nodes if alive[0] in user.all_input_nodes)
            user = next(user for user in users if place[user] > place[node])
            what = "its input" if alive[0] is image else _qualified(name, _label(alive[0]))
            later = _qualified(name, _label(user))
            reasons[_qualified(name, _label(node))] = f"{what} is needed later, by {later}"
        elif node in last_use:
            links.append(_link(module, name, nodes[first : i + 1], given))
            first, given = i + 1, node
    return links


def _graph(module: nn.Module, name: str) -> fx.Graph:
    """Return the graph of a forward, which must be the same in training and in evaluation."""
    if _hooked(module):
        raise NotAChain(f"{name}: has forward hooks, which a split network would not run: remove them")
    graphs, training = [], module.training
    try:
        for mode in (False, True):
            module.training = mode
            graphs.append(_Tracer().trace(module))
    except Exception as error:  # whatever a forward does with a proxy
        raise NotAChain(f"{name}: its forward cannot be traced ({_first_line(error)})") from error
    finally:
        module.training = training
    if str(graphs[0]) != str(graphs[1]):
        raise NotAChain(f"{name}: its forward is not the same in training and in evaluation")
    inputs = [node for node in graphs[0].nodes if node.op == "placeholder" and (node.users or not node.args)]
    if len(inputs) != 1:
        names = ", ".join(node.name for node in inputs)
        raise NotAChain(f"{name}: expected a forward of one tensor, got {len(inputs)} inputs: {names}")
    (output,) = (node for node in graphs[0].nodes if node.op == "output")
    if not isinstance(output.args[0], fx.Node):
        got = type(output.args[0]).__name__
        raise NotAChain(f"{name}: expected one tensor as its output, got {got} of several")
    for node in list(graphs[0].nodes):  # unused arguments
        if node.op == "placeholder" and node not in inputs:
            graphs[0].erase_node(node)
    return graphs[0]


def _link(module: nn.Module, name: str, nodes: Sequence[fx.Node], given: fx.Node) -> Link:
    """Return the layer itself if the stretch is one layer, else a module that runs its operations."""
    label, first = _qualified(name, _label(nodes[-1])), nodes[0]
    if len(nodes) == 1 and first.op == "call_module" and first.args == (given,) and not first.kwargs:
        return Link(label, module.get_submodule(first.target), label + ".")
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


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0]}"


def with_shapes(links: Sequence[Link], image_size: tuple[int, int]) -> list[Link]:
    """Return the links with the shapes of their outputs for two images, computed on the meta device."""
    dtypes = (p.dtype for link in links for p in link.module.parameters() if p.is_floating_point())
    found, x = [], torch.empty(2, 3, *image_size, dtype=next(dtypes, torch.float32), device="meta")
    for link in links:
        tensors = {**dict(link.module.named_parameters()), **dict(link.module.named_buffers())}
        like = {name: torch.empty_like(t, device="meta") for name, t in tensors.items()}
        try:
            with torch.no_grad():
                x = torch.func.functional_call(link.module, like, (x,))
        except Exception as error:  # the user's own code
            raise NotAChain(f"{link.name}: failed on {tuple(x.shape)}: {_first_line(error)}") from error
        if not isinstance(x, torch.Tensor):
            raise NotAChain(f"{link.name}: expected one tensor as its output, got {type(x).__name__}")
        found.append(link._replace(shape=tuple(x.shape)))
    return found


def _is_map(shape: Sequence[int]) -> bool:
    return len(shape) == 4 and shape[2] * shape[3] > 1


def without_end(links: Sequence[Link]) -> tuple[list[Link], list[Link]]:
    """Return the links up to the last with a map as output, and the rest: pooling, flattening, classifier."""
    maps = [i for i, link in enumerate(links) if _is_map(link.shape)]
    if not maps:
        raise NotAChain("expected a network on maps (N, C, h, w), and none of its blocks gives one")
    return list(links[: maps[-1] + 1]), list(links[maps[-1] + 1 :])


def _weighted(link: Link) -> bool:
    """Return whether the link has more parameters than a norm or an activation has."""
    return any(p.dim() > 1 for p in link.module.parameters())


def _blocks(links: Sequence[Link]) -> list[list[Link]]:
    """Group each weighted link with the links up to the next one; the first group takes what precedes it."""
    groups: list[list[Link]] = []
    for link in links:
        if not groups or (_weighted(link) and any(_weighted(other) for other in groups[-1])):
            groups.append([])
        groups[-1].append(link)
    return groups


def units_of(links: Sequence[Link], image_size: tuple[int, int]) -> list[Unit]:
    """Return blocks with positions (stage, block). A container is a stage: ResNet's "layer2.0" is (2, 0)."""
    units, stage, block, parent = [], -1, 0, None
    for group in _blocks(links):
        head, shape = next((link for link in group if _weighted(link)), group[0]), group[-1].shape
        container = head.name.rpartition(".")[0]
        stage, block = (stage, block + 1) if container == parent else (stage + 1, 0)
        parent = container
        module, prefix = _joined(group)
        size = (shape[2], shape[3]) if len(shape) == 4 else (0, 0)
        channels, downscale = shape[1] if len(shape) > 1 else 0, image_size[0] / size[0] if size[0] else 0
        units.append(Unit((stage, block), prefix, module, channels, downscale, head.name, size))
    return units


def _joined(group: Sequence[Link]) -> tuple[nn.Module, str]:
    """Return one module for a group of links, and the prefix of its layers' names."""
    if len(group) == 1:
        return group[0].module, group[0].prefix
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, link in enumerate(group):
        whole = link.prefix == link.name + "."
        layers[link.name.replace(".", "_") if whole else f"operations{i}"] = link.module
    return Joined(layers, [link.prefix for link in group]), ""


class Joined(nn.Sequential):
    """Links in order. `state_dict` has the names of this module, `original` those of the layers' network."""

    def __init__(self, layers: OrderedDict[str, nn.Module], prefixes: Sequence[str]):
        super().__init__(layers)
        self._prefixes = tuple(prefixes)

    def original(self) -> Iterator[tuple[str, nn.Module]]:
        yield from zip(self._prefixes, self)
