"""How a pass finds taps and parameters, and takes notice when backward reaches them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from backpack._torch import current_node, has_values, static_graphs
from backpack.engine import certificate
from backpack.engine.alone import OwnUse, own_uses
from backpack.engine.collect import Leaf, form_of_zeros
from backpack.engine.debug import print_forms, print_outputs, print_taps
from backpack.engine.pass_state import NOTHING, Gradients
from backpack.engine.reducing import Reducing
from backpack.engine.refusals import Names, check, parameters_of
from backpack.engine.state import Nested
from backpack.graph.forwards import (
    groups_below,
    number_further,
    refuse_open,
    several_forwards,
    unseen_group,
)
from backpack.graph.survey import Graph, survey
from backpack.graph.taps import Source, Tap


class Listening(Reducing):
    """Surveys the graph, certifies it, and listens at taps and parameters."""

    def _due(self, graph: Graph) -> bool:
        """Whether it is to be tried out that samples are apart, which some quantity asks for."""
        if graph.mixing or not (self.first_order or self.by_source):
            return False
        if not all(has_values(gradient) for _, gradient in self.block.roots or ()):
            return False
        return certificate.due(graph, self.block.owner.certify)

    def _certify(self, graph: Graph) -> None:
        names = Names(graph.recordings)
        with Nested(self.block), self.watch("certificate that samples are apart"):
            untold = certificate.certify(graph, names.of)
        certificate.remember(graph, bool(untold))

    def _survey(self, roots: list[Node]) -> Graph:
        self.block.wrappers = static_graphs(roots) or self.block.wrappers
        exts = self.block.owner.extensions
        curvature = any(ext.source.second_order for ext in exts)
        numbered = False
        with Nested(self.block):
            anew = self.block.owner.certify == "always"
            if self.block.owner.forwards == "further":
                self.groups = groups_below(roots)
                numbered = sum(bool(each.taps) for group in self.groups for each in group) > 1
                if numbered:
                    number_further(self.groups)
            graph = survey(roots, curvature, anew)
            if numbered and not graph.transformed:
                return graph
            several = several_forwards(graph) or bool(graph.transformed)
            if self.block.owner.forwards != "same" and several:
                self.groups = groups_below(roots)
                if self.block.owner.forwards == "further":
                    self.groups += unseen_group(graph)
                    number_further(self.groups)
                    return survey(roots, curvature, anew)
                if any(ext.per_sample for ext in exts):
                    refuse_open(roots, self.groups, graph)
            return graph

    def listen(self, graph: Graph) -> None:
        """Add taps of ``graph`` that are not yet known."""
        if self.block.roots is not None:
            self.graph, fresh = graph, graph.taps  # there is no other
        else:
            self.graph = Graph() if self.graph is NOTHING else self.graph
            fresh = self.graph.take(graph)
        names = Names(graph.recordings)
        extensions, rooted = self.block.owner.extensions, self.block.roots is not None
        self._expect(graph, names)
        check(graph, fresh, names, extensions, rooted, self.refuse)
        nodes: dict[Node, list[Tap]] = {}
        everything = self.block.wanted is None and self.block.complete
        for node, tap in fresh:
            nodes.setdefault(node, []).append(tap)
            for source in tap.sources:
                for parameter in parameters_of(source):
                    if everything or self._executes(parameter):
                        self._use(parameter, node, tap, source, names)
        for node, taps in nodes.items() if self.task is not None else ():
            self._listen_at_node(node, taps)
        if self.block.owner.extension_hook is not None:
            self._own_modules(fresh)
        if self.block.owner.debug:
            print_outputs(graph)
            print_taps((tap for _, tap in fresh), names)
            forms = [(p, form_of_zeros(self.block, leaf)) for p, leaf in self.leaves.items()]
            print_forms(forms, extensions, names)

    def _expect(self, graph: Graph, names: Names) -> None:
        """Parameters that take part, whose values are this block's at its end, or gone."""
        wanted, found = self.block.wanted, list[Tensor]()
        if wanted is None and not self.block.complete:
            for _, tap in graph.taps:
                found += _parameters(tap, self._executes)
        else:
            for recording in {id(r): r for r in graph.recordings}.values():
                found += [
                    p for p in _parameters_in(recording.module()) if wanted is None or p in wanted
                ]
            found += graph.outside if wanted is None else graph.outside & wanted
        taken = self.block.expect(map(self.part, found))
        if taken is not None:
            raise RuntimeError(
                f"parameter {names(taken)} takes part in a backward pass of another thread, whose "
                "block of backpack(...) is open and saves to the same fields: each thread would find "
                "values of the other's batch. Give each thread a model of its own (copy.deepcopy), or "
                "hold a lock around the block and whatever reads the fields"
            )

    def _use(self, parameter: Tensor, node: Node, tap: Tap, source: Source, names: Names) -> None:
        if self.dropped and parameter in self.dropped:
            return
        leaf = self.leaves.get(parameter)
        if leaf is None and parameter.is_complex():
            real_only = [ext for ext in self.block.owner.extensions if ext.of_complex is None]
            if real_only:
                self.refuse(names.complex(parameter, real_only[0]), [parameter], real_only)
        if leaf is None:
            leaf = self.leaves[parameter] = Leaf(parameter, tap.samples, self._refuse_one)
            if self.without:
                self._leave_out(leaf)
            for field, reason in self.without.get(None, {}).items() if self.without else ():
                self.block.owner.left_out.note(self.part(parameter), names(parameter), [field], reason)
            if not self.saves_without_gradient or not parameter.numel():
                self._save_on_gradient(leaf)
            for field in self.frees_previous:
                self.part(parameter).__dict__.pop(field, None)
        if leaf.samples != tap.samples:
            return self.refuse(names.sizes(parameter, leaf.samples, tap.samples), [parameter])
        if leaf.contracted:
            raise RuntimeError(
                f"parameter {names(parameter)} is reached by several losses of one backward call; add "
                "them up and call backward on the sum"
            )
        leaf.places.append((node, tap, source))
        if not parameter.numel():
            return  # its quantities are those of a parameter that no column reaches
        leaf.uses.append((node, tap, source))
        self.uses.setdefault(tap, []).append((leaf, source))
        leaf.waiting.add(tap)

    def _listen_at_node(self, node: Node, taps: list[Tap]) -> None:
        """Take notice when backward reaches a node with taps."""
        if node is current_node():
            self.at_current_node = taps  # whose hooks are being called already
        elif (uses := self._own_uses(node, taps)) is not None:
            self.handles.append(node.register_hook(partial(self.used, taps[0], uses)))
        else:
            self.handles.append(node.register_prehook(partial(self.tap, taps)))

    def _own_uses(self, node: Node, taps: list[Tap]) -> list[OwnUse] | None:
        """Where autograd computes what is wanted of one sample's use, if nothing else is."""
        if len(taps) > 1 or not self.own_uses_do or self.keeps or torch.is_grad_enabled():
            return None
        if self.shards is not None:
            return None
        return own_uses(node, taps[0], self.uses.get(taps[0], ()), self.own_budget)

    def taps_at_current_node(self, grads: Gradients) -> None:
        """Backward began, or was first seen, at a node with taps."""
        here, self.at_current_node = self.at_current_node, []
        if here:
            self.tap(here, grads)

    def _own_modules(self, fresh: Iterable[tuple[Node, Tap]]) -> None:
        known = {id(module) for module, _ in self.modules}
        for _, tap in fresh:
            root = tap.recording.module()
            if root is None or id(root) in known:
                continue
            for module in root.modules():
                own: set[Tensor] = {p for p in module.parameters(recurse=False) if p in self.leaves}
                if own and id(module) not in known:
                    self.modules.append((module, own))
                known.add(id(module))


def _parameters(tap: Tap, executes: Callable[[Tensor], bool]) -> list[Tensor]:
    return [p for source in tap.sources for p in parameters_of(source) if executes(p)]


def _parameters_in(module: nn.Module | None) -> Iterator[Tensor]:
    """The parameters of a module and all modules in it; ``module.parameters()``, in less time."""
    modules = [module] if module is not None else []
    seen = set(map(id, modules))
    for each in modules:
        for parameter in each._parameters.values():
            if parameter is not None:
                yield parameter
        for child in each._modules.values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                modules.append(child)
