"""What the looks that a probe takes at a model leave of the places that sizes allow in its uses."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress

from lightning_gradtrace.capture.forward.use import Site, Use
from lightning_gradtrace.capture.placing.batch_axis import SampleAxis
from lightning_gradtrace.capture.placing.cotangents import AnyAxis
from lightning_gradtrace.capture.placing.settling import Options, Place, Probe, Questions, are_alike, routes_of, settle
from lightning_gradtrace.capture.routes.rows import CERTAIN


def followed(use: Use, sources: Mapping[Place, SampleAxis]) -> dict[Place, AnyAxis]:
    """Return what routes tell of places, given the places of the samples in their sources."""
    found = {place: route.place(sources.get(place.source, CERTAIN)) for place, route in routes_of(use).items()}
    return {place: axis for place, axis in found.items() if axis is not None}


def certain(
    use: Use, options: Options
) -> tuple[dict[Place, SampleAxis], dict[Place, SampleAxis], dict[Place, AnyAxis]]:
    """Return the places that are left alone: in sources, in tensors of the use, and in those that routes follow."""
    alone = {place: found[0] for place, found in options.items() if len(found) == 1}
    sources = {place: axis for place, axis in alone.items() if place.of_source}
    routed = followed(use, sources)
    own = {place: axis for place, axis in alone.items() if not place.of_source and place not in routed}
    return sources, own, routed


def open_places(use: Use, options: Options) -> list[Place]:
    """Return the places that are needed and that no option, or more than one, is left for."""
    _, own, routed = certain(use, options)
    bound = use.bound()
    source = None if bound is None else bound.place
    needed = [Place(False, i) for i in use.cotangents] if source is None else [Place(True, source)]
    return [place for place in needed if place not in routed and place not in own]


def settled_by(
    real: Mapping[Site, Use], options: Mapping[Site, Options], probe: Probe, strictly: Collection[Site]
) -> tuple[dict[Site, Options], set[Site]]:
    """Return the places that a probe leaves, at some sites only where it has seen the samples; and sites it came to.

    Raises:
        Exception: the model can't be run again.
    """
    first, second, order = probe()
    permuted = {use.site: use for use in second}
    settled: dict[Site, Options] = {s: {p: [] for p in of} if s in strictly else of for s, of in options.items()}
    ask, alike = Questions(probe), are_alike(real, first)
    for use in first:
        site = use.site
        if site in options:
            of = (options[site], order, site in strictly, alike, ask)
            settled[site] = settle(real[site], use, permuted.get(site), *of)
    return settled, {use.site for use in first}


def seen_otherwise(
    real: Mapping[Site, Use], options: Mapping[Site, Options], probe: Probe, refuted: Collection[Site]
) -> dict[Site, Options]:
    """Return the places where other looks at the model have seen the samples: in training, and in evaluation mode.

    What was refuted in training is not believed of evaluation. Two samples are swapped in training, as any shift of
    them would do, and seen in another order in evaluation; what was refuted has to be seen in both.
    """
    looks: list[dict[Site, Options]] = []
    other = probe.otherwise()
    while other is not None:
        looks.append({})
        with suppress(Exception):  # then it stays open
            looks[-1] = settled_by(real, options, other, strictly=options.keys())[0]
        other = other.otherwise()
    found: dict[Site, Options] = {site: {} for site in options}
    for site, by_place in options.items():
        for place in by_place:
            seen = [look.get(site, {}).get(place, []) for look in looks]
            if site in refuted and probe.n_samples > 2:
                seen = seen[:1]
            alone = [places[0] for places in seen if len(places) == 1]
            if alone and len(set(alone)) == 1 and (site not in refuted or len(alone) == len(seen)):
                found[site][place] = alone[:1]
    return found
