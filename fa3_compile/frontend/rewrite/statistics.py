"""Which log-sum-exps, or sums of weights, a region takes over.

Those that the program needs, unless it keeps the scores too: exp(s - LSE) is as near as eager's
only if both have the roundings that eager's scores have.
"""

from __future__ import annotations

from collections.abc import Sequence

import sympy
from torch import fx

from fa3_compile.errors import Decline
from fa3_compile.frontend.detect.logsumexp import Lse
from fa3_compile.frontend.dynamo.liveness import live_nodes
from fa3_compile.frontend.lift.placeholders import ROW_SUM
from fa3_compile.frontend.region import Region
from fa3_compile.frontend.shadow.same import same_value
from fa3_compile.spec.expr import S


def keep_statistics(
    graph: fx.Graph, regions: Sequence[Region], read: list[fx.Node], dropouts: list[fx.Node]
) -> set[fx.Node]:
    """Leaves the regions the statistics that they take over; returns what is live then.

    read      what the regions read
    dropouts  the random nodes whose effect they take over
    """
    while True:
        statistics = [x for region in regions for x in region.statistics]
        without = (regions[0].output, *(x.node for x in statistics))
        live = live_nodes(graph, without, read, dropouts, by_values=True)
        kept = [x for x in statistics if x.node in live and not _beside_scores(x, live)]
        if len(kept) == len(statistics):
            return live
        for region in regions:
            left = [x for x in region.statistics if x not in kept]
            if any(x.node in live for x in left):
                _check_divided_by_its_own(region)
            region.statistics = [x for x in region.statistics if x in kept]


def _beside_scores(statistic: Lse, live: set[fx.Node]) -> bool:
    """Whether scores that it is taken of are kept, or computed by themselves once more."""
    targets = {x.target for x in statistic.scores}
    alike = [n for n in live if n.target in targets]
    return any(same_value(n, x) for x in statistic.scores for n in alike)


def _check_divided_by_its_own(region: Region) -> None:
    """`Decline` where the output, of exponentials, is divided by the sum of those that are kept:
    their roundings are large, and cancel only in a quotient of both."""
    exponentials = any(S in x.free_symbols for x in region.spec.score.atoms(sympy.exp))
    divides = ROW_SUM not in region.coefficient.free_symbols
    if exponentials and divides and not region.spec.normalized:
        raise Decline(
            "weights-used",
            region.output,
            "Divide the weights by their sum before the product with V, or do not return them.",
            message="the output is divided by the sum of weights that are also kept",
        )
