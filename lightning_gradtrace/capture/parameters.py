"""Which parameters are tracked, and what they are."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from lightning_gradtrace.capture.compiled import check_not_scripted

ParameterFilter = str | Sequence[str] | Callable[[str, Tensor], bool] | None

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


@dataclass(frozen=True)
class TrackedParameter:
    """A parameter whose shifts are recorded.

    Attributes:
        name: name in ``named_parameters()``.
        tensor: the parameter.
        kind: "embedding", "head", "attention.in", "attention.out", "linear", "norm", "bias" or "other".
        module: dotted name of the module that owns it, "" for the root.
    """

    name: str
    tensor: nn.Parameter
    kind: str
    module: str


def describe_parameters(module: nn.Module, frozen: bool = False) -> list[TrackedParameter]:
    """List the parameters of a module in the order of ``named_parameters()``, frozen ones only if asked for.

    The output head is a matrix of the shape of the largest embedding, the vocabulary, or one that is tied to it. A
    model without embeddings has no head in this sense.
    """
    shapes = [tuple(m.weight.shape) for m in module.modules() if isinstance(m, _EMBEDDINGS)]
    vocabulary = max(shapes, default=None)
    owners = dict(module.named_modules())
    found = []
    for name, tensor in module.named_parameters():
        if tensor.requires_grad or frozen:
            owner, _, leaf = name.rpartition(".")
            found.append(TrackedParameter(name, tensor, _kind(owners[owner], leaf, tensor, vocabulary), owner))
    return found


def _kind(owner: nn.Module, leaf: str, tensor: Tensor, vocabulary: tuple[int, ...] | None) -> str:
    if isinstance(owner, _EMBEDDINGS):
        return "embedding"
    if isinstance(owner, _NORMS):
        return "norm"
    if tensor.dim() < 2:
        return "bias" if "bias" in leaf else "other"
    if isinstance(owner, nn.MultiheadAttention):
        return "attention.in"
    if isinstance(owner, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "attention.out"
    if tuple(tensor.shape) == vocabulary:
        return "head"
    return "linear" if isinstance(owner, nn.Linear) else "other"


def select_parameters(
    module: nn.Module, params: ParameterFilter, thawing: bool = False, taped: bool = False
) -> list[TrackedParameter]:
    """Return the parameters to track.

    Args:
        module: the model.
        params: None for matrices (two or more axes) outside embeddings and the output head; a glob or several on the
            names; or a predicate ``(name, parameter) -> bool``. A frozen parameter is tracked if a glob or a
            predicate names it; its shifts are zero until it is unfrozen.
        thawing: frozen parameters will be unfrozen, so None takes them too.
        taped: whether the uses of the parameters must be seen.

    Returns:
        The tracked parameters, at least one.

    Raises:
        ValueError: nothing is left, and the message lists what there is; or uses of a parameter can't be seen.
    """
    described = describe_parameters(module, frozen=thawing or params is not None)
    if params is None:
        chosen = [p for p in described if p.tensor.dim() >= 2 and p.kind not in ("embedding", "head")]
    elif callable(params):
        chosen = [p for p in described if params(p.name, p.tensor)]
    else:
        globs = [params] if isinstance(params, str) else list(params)
        chosen = [p for p in described if any(fnmatch.fnmatchcase(p.name, glob) for glob in globs)]
    if not chosen:
        names = ", ".join(f"`{p.name}` {tuple(p.tensor.shape)}" for p in described[:8]) or "none"
        more = f" and {len(described) - 8} more" if len(described) > 8 else ""
        raise ValueError(
            f"GradTrace: `params={params!r}` matches no parameter of `{type(module).__name__}`. It has {names}{more}. "
            "Give a glob or a list of globs on these names, a predicate(name, parameter), or None for all matrices "
            "outside embeddings and the output head."
        )
    if taped:
        check_not_scripted(module, {p.name: p.tensor for p in chosen})
    return chosen
