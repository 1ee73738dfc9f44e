"""Any network as a chain of blocks: a local module can end wherever exactly one tensor goes on.

torch.fx traces the network, and its containers in turn. It can be cut between two operations if what follows
uses the last value alone. The stretches between such places are the links of the chain. Their layers are the
network's own, so training the chain trains the network. A block ends where the value is a map (`features`).
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import fx, nn

from . import features
from .backbones import Unit
from .features import BATCH, Features


class Link(typing.NamedTuple):
    """A stretch of a network from one tensor to one tensor."""

    name: str
    module: nn.Module  # its layers
    prefix: str  # of the layers' names in the network
    call: Call | None = None  # of one layer, which may be entered
    features: Features | None = None  # its output as a map; None: it is no map
    shape: tuple[int, ...] = ()  # of its output


class Call(typing.NamedTuple):
    """A layer, and the constants that its forward gets after the tensor."""

    module: nn.Module
    args: tuple = ()
    kwargs: Mapping[str, object] = MappingProxyType({})


class NotAChain(ValueError):
    """A network, or a place in it, cannot be cut; the message names the module and the reason."""


class _Tracer(fx.Tracer):
    """Traces one call: its first argument is the input, all others are constants. Enters no child."""

    def __init__(self, call: Call):
        super().__init__()
        self.call = call

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return True

    def create_args_for_root(self, root_fn, is_module, concrete_args=None):
        given = self.create_proxy("placeholder", "given", (), {})
        return functools.partial(root_fn, **self.call.kwargs), [self.root, given, *self.call.args]


class Traced(typing.NamedTuple):
    """The links of a network, and why it cannot be cut elsewhere: {module: reason}."""

    links: list[Link]
    reasons: dict[str, str]


def trace(net: nn.Module) -> Traced:
    """Return the finest chain of ``net``. Raises NotAChain if there is none, or the trace fails."""
    reasons: dict[str, str] = {}
    links = _links(Call(net), "", reasons)
    return Traced(links, reasons)


def _links(call: Call, name: str, reasons: dict[str, str]) -> list[Link]:
    links = []
    for link in _stretches(call, name, reasons):
        inner = None
        if link.call and any(True for _ in link.call.module.children()) and not _changed(link.call.module):
            found: dict[str, str] = {}
            try:
                inner = _links(link.call, link.name, found)
                reasons |= found
            except NotAChain as error:
                reasons[f"a layer of {link.name}"] = str(error)
        # A block with one weighted layer (convolution, norm, activation), or a residual sum, stays whole.
        links += inner if inner is not None and len(_blocks(inner)) > 1 else [link]
    return links


def _stretches(call: Call, name: str, reasons: dict[str, str]) -> list[Link]:
    """Return the stretches of one module; between any two of them a single tensor goes on."""
    graph = _graph(call, name or type(call.module).__name__)
    (image,) = (node for node in graph.nodes if node.op == "placeholder")
    constants = _constants(graph, call.module, image)
    nodes = [n for n in graph.nodes if n.op not in ("placeholder", "output") and n not in constants]
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
            links.append(_link(call.module, name, nodes[first : i + 1], given, constants))
            first, given = i + 1, node
    return links


def _constants(graph: fx.Graph, module: nn.Module, image: fx.Node) -> set[fx.Node]:
    """Return what depends on neither the input nor a weight: each stretch computes it anew."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node is image or node.op == "output" or not found.issuperset(node.all_input_nodes):
            continue
        if node.op == "call_module":
            weighted = any(True for _ in module.get_submodule(node.target).parameters())
        else:
            weighted = node.op == "get_attr" and node.target in dict(module.named_parameters())
        if not weighted:
            found.add(node)
    return found


def _graph(call: Call, name: str) -> fx.Graph:
    """Return the graph of a forward, which must be the same in training and in evaluation."""
    module = call.module
    if what := _changed(module):
        raise NotAChain(f"{name}: has {what}, which a split network would not run")
    try:
        inspect.signature(module.forward).bind(None, *call.args, **call.kwargs)
    except TypeError as error:
        raise NotAChain(f"{name}: expected a forward of one tensor: {error}") from error
    graphs, training = [], module.training
    try:
        for mode in (False, True):
            module.training = mode
            graphs.append(_Tracer(call).trace(module))
    except Exception as error:  # whatever a forward does with a proxy
        raise NotAChain(f"{name}: its forward cannot be traced ({_first_line(error)})") from error
    finally:
        module.training = training
    _read_mode(graphs)
    if str(graphs[0]) != str(graphs[1]):
        raise NotAChain(f"{name}: its forward is not the same in training and in evaluation")
    (output,) = (node for node in graphs[0].nodes if node.op == "output")
    if not isinstance(output.args[0], fx.Node):
        got = type(output.args[0]).__name__
        raise NotAChain(f"{name}: expected one tensor as its output, got {got} of several")
    return graphs[0]


def _read_mode(graphs: Sequence[fx.Graph]) -> None:
    """Read ``self.training`` in graphs of both modes where it is an argument, as dropout's often is."""
    for nodes in list(zip(*(graph.nodes for graph in graphs))):
        given = [dict(enumerate(node.args)) | node.kwargs for node in nodes]
        asked = [key for key in given[0] if given[0][key] is False and given[1].get(key) is True]
        for graph, node in zip(graphs, nodes):
            for key in asked:
                with graph.inserting_before(node):
                    mode = graph.get_attr("training")
                (node.update_arg if isinstance(key, int) else node.update_kwarg)(key, mode)


def _link(
    module: nn.Module, name: str, nodes: Sequence[fx.Node], given: fx.Node, constants: set[fx.Node]
) -> Link:
    """Return the layer itself if the stretch is one layer, else a module that runs its operations."""
    label, first, call = _qualified(name, _label(nodes[-1])), nodes[0], None
    if len(nodes) == 1 and first.op == "call_module" and first.args[:1] == (given,):
        if first.all_input_nodes == [given]:
            call = Call(module.get_submodule(first.target), first.args[1:], first.kwargs)
        if call and first.args == (given,) and not first.kwargs:
            return Link(label, call.module, label + ".", call)
    graph, copies = fx.Graph(), {}
    copies[given] = graph.placeholder("x")

    def copied(node: fx.Node) -> fx.Node:
        if node not in copies:
            copies[node] = graph.node_copy(node, copied)
        return copies[node]

    for node in nodes:
        copied(node)
    graph.output(copies[nodes[-1]])
    graph.lint()
    whole = fx.GraphModule(module, graph, type(module).__name__)
    return Link(label, whole, f"{name}." if name else "", call)


def _label(node: fx.Node) -> str:
    return str(node.target) if node.op in ("call_module", "get_attr") else node.name


def _qualified(name: str, label: str) -> str:
    return f"{name}.{label}" if name else label


def _changed(module: nn.Module) -> str | None:
    """Return what a call does beside the forward of the module's class, which alone is traced, or None."""
    if module._forward_hooks or module._forward_pre_hooks:
        return "forward hooks"
    if module._backward_hooks or module._backward_pre_hooks:
        return "backward hooks"
    return "a forward in place of its class's" if "forward" in vars(module) else None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0]}"


def with_shapes(links: Sequence[Link], image_size: tuple[int, int]) -> list[Link]:
    """Return the links with the shapes of their outputs for two images, computed on the meta device."""
    dtypes = (p.dtype for link in links for p in link.module.parameters() if p.is_floating_point())
    found, x = [], torch.empty(BATCH, 3, *image_size, dtype=next(dtypes, torch.float32), device="meta")
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


def without_end(
    net: nn.Module, links: Sequence[Link], image_size: tuple[int, int]
) -> tuple[list[Link], list[Link], dict[str, str]]:
    """Return the links of ``net`` up to the last whose output is a map; the rest; why others are no maps.

    The rest is pooling, the choice of the class token, the classifier. The reasons are by name.
    """
    outputs = [(link.name, link.shape) for link in links]
    maps, reasons = features.found(net, outputs, image_size)
    if not any(maps):
        why = max(reasons.items(), key=lambda reason: features.AMBIGUOUS in reason[1])
        raise NotAChain(f"no block gives a map; {': '.join(why)}")
    links = [link._replace(features=one) for link, one in zip(links, maps)]
    end = 1 + max(i for i, one in enumerate(maps) if one)
    several = [link.name for link in links if len(link.shape) > 2 and max(link.shape[2:]) > 1]
    return links[:end], links[end:], {name: why for name, why in reasons.items() if name in several}


def _weighted(link: Link) -> bool:
    """Return whether the link has more parameters than a norm, an activation or positions (1, L, C) have."""
    return any(p.dim() > 1 and len(p) > 1 for p in link.module.parameters())


def _blocks(links: Sequence[Link]) -> list[list[Link]]:
    """Group each weighted link with the links up to the next one; the first group takes what precedes it."""
    groups: list[list[Link]] = []
    for link in links:
        if not groups or (_weighted(link) and any(_weighted(other) for other in groups[-1])):
            groups.append([])
        groups[-1].append(link)
    return groups


def units_of(links: Sequence[Link], image_size: tuple[int, int]) -> list[Unit]:
    """Return blocks with positions (stage, block). A container is a stage: ResNet's "layer2.0" is (2, 0).

    A block whose output is no map is one with the next block.
    """
    units, stage, block, parent = [], -1, 0, None
    group: list[Link] = []
    for more in _blocks(links):
        group += more
        found = group[-1].features
        if found is None:
            continue
        head = next((link for link in group if _weighted(link)), group[0])
        container = head.name.rpartition(".")[0]
        stage, block = (stage, block + 1) if container == parent else (stage + 1, 0)
        parent = container
        module, prefix = _joined(group)
        downscale = image_size[0] / found.size[0]
        unit = Unit((stage, block), prefix, module, found.channels, downscale, head.name, found.size, found)
        units.append(unit)
        group = []
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
