"""A tape of the probe's that follows random numbers beyond the uses of parameters: where do they meet the samples?"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_gradtrace.capture.forward.functions import METADATA, facts, tensors_among
from lightning_gradtrace.capture.forward.tape import Tape
from lightning_gradtrace.capture.placing.batch_axis import candidates
from lightning_gradtrace.capture.placing.settling import SMALL
from lightning_gradtrace.capture.probing.draws import DrawSite


class InfluenceTape(Tape):
    """Keeps every result of floating point in which random numbers have met the samples, see `Tape`.

    Attributes:
        results: copies of the smaller of these results that have room for the samples, by function and how often it
            was called before with random numbers.
        sites: where the numbers were drawn that have come to them.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.results: dict[tuple[str, int], Tensor] = {}
        self.sites: dict[tuple[str, int], frozenset[DrawSite]] = {}
        self._reached: dict[int, tuple[Callable[[], Tensor | None], frozenset[DrawSite]]] = {}
        self._calls = Counter[str]()

    @override
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types_: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = super().__torch_function__(func, types_, args, kwargs)
        if not torch.compiler.is_compiling() and func not in METADATA:
            self._follow(func, args, kwargs or {}, result)
        return result

    def _follow(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        known = facts(func)
        read = (*args, *kwargs.values()) if not known.fresh else ()
        sites = frozenset[DrawSite]().union(*map(self._sites, tensors_among(read)))
        if not sites:
            return
        made = [args[0]] if known.in_place else list(tensors_among((result,)))
        for tensor in (*made, *(t._base for t in made if known.in_place)):
            if tensor is not None:
                self._reached[id(tensor)] = weakref.ref(tensor), sites
        for tensor in made:
            key = known.name, self._calls[known.name]
            self._calls[known.name] += 1
            if tensor.is_floating_point() and tensor.numel() <= SMALL and self._holds_samples(tensor):
                self.results[key], self.sites[key] = tensor.detach().clone(), sites

    def _holds_samples(self, tensor: Tensor) -> bool:
        strided = tensor.layout is torch.strided
        return strided and self.taint(tensor) and bool(candidates(tensor.shape, self._n_samples or 1))

    def _sites(self, tensor: Tensor) -> frozenset[DrawSite]:
        found = self._reached.get(id(tensor))
        reached = found[1] if found is not None and found[0]() is tensor else frozenset()
        return reached | self.taint.draws(tensor)
