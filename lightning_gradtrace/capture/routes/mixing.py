"""Says whether a function may have mixed or moved the samples: a product, a reduction, a transform over their axis.

Such a result may still have an axis as long as the batch - the slots of an expert, the columns of a matrix - and that
axis must not be taken for the samples. So the result counts as *lost* (`routing.py`), and only the permutation probe
can show that samples are where sizes say.

The axes of all tensors get letters, as in `torch.einsum`. The samples are safe if a letter that can hold them stands
in every batched operand and in the result, and no letter that is summed over is more likely to hold them.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import Tensor

from lightning_gradtrace.capture.forward.functions import names_of
from lightning_gradtrace.capture.placing.batch_axis import candidates
from lightning_gradtrace.capture.rules.matmul import letters

Terms = list[tuple[Tensor, str]]

_MATRIX = {
    **dict.fromkeys(names_of("matmul __matmul__ mm bmm mv"), 0),
    **dict.fromkeys(("addmm", "addmv", "baddbmm"), 1),
}
REDUCTIONS = {
    **dict.fromkeys(names_of("sum mean amax amin max min prod logsumexp std var median nansum nanmean nanmedian"), 1),
    **dict.fromkeys(names_of("var_mean std_mean aminmax mode count_nonzero"), 1),
    **dict.fromkeys(names_of("norm linalg_vector_norm quantile nanquantile kthvalue"), 2),
}
"""Functions that sum up along axes, and the place of these among their arguments."""
TRANSFORMS = {
    **dict.fromkeys(names_of("fft_fft fft_ifft fft_rfft fft_irfft fft_hfft fft_ihfft"), (2, -1)),
    **dict.fromkeys(names_of("fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2 fft_hfft2 fft_ihfft2"), (2, (-2, -1))),
    **dict.fromkeys(names_of("fft_fftn fft_ifftn fft_rfftn fft_irfftn fft_hfftn fft_ihfftn"), (2, None)),
    **dict.fromkeys(names_of("fft_fftshift fft_ifftshift"), (1, None)),
}
"""Fourier transforms, the place of their axes among their arguments, and which they are if none are given."""
_LOOK_UPS = names_of("embedding take")
PRODUCTS = frozenset({*_MATRIX, "__rmatmul__", "einsum", "tensordot"}) - {"baddbmm"}
"""Functions that sum up products of entries of two tensors."""
LAYERS = {"linear": 0, "conv1d": 1, "conv2d": 2, "conv3d": 3}
"""Functions that mix features with weights that nobody learns, and how many axes of positions come after these."""
MIXERS = frozenset(
    {*_MATRIX, *REDUCTIONS, *TRANSFORMS, *_LOOK_UPS}
    | names_of("__rmatmul__ einsum tensordot grid_sample grid_sampler as_strided")
)


def mixes_samples(
    name: str,
    args: Sequence[Any],
    kwargs: Any,
    result: Any,
    is_batched: Callable[[Tensor], bool],
    n_samples: int,
    features: Callable[[Tensor], Collection[int]] = lambda tensor: (),
) -> bool:
    """Say whether the samples may be mixed in a result that has room for them.

    Args:
        name: name of the function, one of `MIXERS` or `LAYERS`.
        args: its positional arguments.
        kwargs: its named arguments.
        result: what it returned.
        is_batched: says whether a tensor comes from the batch.
        n_samples: number of samples.
        features: returns axes of a tensor that are known to hold no samples.

    Returns:
        False as well for a call that can't be read.
    """
    output = result if isinstance(result, Tensor) else result[0] if isinstance(result, tuple) and result else None
    if not isinstance(output, Tensor) or not candidates(output.shape, n_samples):
        return False
    read = terms_of(name, args, kwargs)
    if read is None:
        return False
    terms, kept = read
    batched = [(tensor, term) for tensor, term in terms if is_batched(tensor)]
    if not batched:
        return False
    of_features = {term[axis] for tensor, term in batched for axis in features(tensor)}
    return _may_mix(batched, kept, of_features, n_samples)


def _may_mix(batched: Terms, kept: str, of_features: Collection[str], n_samples: int) -> bool:
    """Say whether a letter that is gone may have held the samples, other than those of features."""
    sizes = {letter: size for tensor, term in batched for letter, size in zip(term, tensor.shape, strict=True)}
    sizes = {letter: size for letter, size in sizes.items() if letter not in of_features}
    common = sizes.keys() & set(kept).intersection(*(term for _, term in batched))
    safe, lost = _likely(common, sizes, n_samples), _likely(sizes.keys() - set(kept), sizes, n_samples)
    if lost == safe == 2 and not any(t.is_floating_point() or t.is_complex() for t, _ in batched):
        return True  # counts of what samples hold, or of what each holds
    return lost > safe or (not safe and _likely(sizes, sizes, n_samples) > 0)


def _likely(found: Collection[str], sizes: dict[str, int], n_samples: int) -> int:
    """Return 2 if a letter has as many entries as there are samples, 1 if one has a multiple of that, else 0."""
    return max((2 if sizes[a] == n_samples else int(sizes[a] % n_samples == 0) for a in found if sizes[a]), default=0)


def terms_of(name: str, args: Sequence[Any], kwargs: Any) -> tuple[Terms, str] | None:
    """Return the operands with their letters, and the letters of the result; None for what can't be read.

    Args:
        name: name of the function, one of `MIXERS` or `LAYERS`.
        args: its positional arguments.
        kwargs: its named arguments.
    """
    if name == "einsum":
        return _of_einsum(args)
    if name in REDUCTIONS or name in TRANSFORMS:
        place, usual = TRANSFORMS[name] if name in TRANSFORMS else (REDUCTIONS[name], ())
        dims = args[place] if len(args) > place else kwargs.get("dim", kwargs.get("axis", usual))
        dims = range(args[0].dim()) if dims is None and name in TRANSFORMS else dims
        dims = (dims,) if isinstance(dims, int) else dims
        if not isinstance(dims, (tuple, list, range)) or not dims:
            return None
        own = string.ascii_letters[: args[0].dim()]
        gone = {own[dim] for dim in dims}
        return [(args[0], own)], "".join(a for a in own if a not in gone)
    if name.startswith("grid_sampler") or name == "grid_sample":  # of pixels; samples and channels stay
        own, of = string.ascii_lowercase[: args[0].dim()], string.ascii_uppercase[: args[1].dim()]
        return [(args[0], own), (args[1], own[0] + of[1:])], own[:2] + of[1:-1]
    if name == "as_strided":
        return [(args[0], string.ascii_letters[: args[0].dim()])], ""
    if name in LAYERS:
        own = string.ascii_lowercase[: args[0].dim()]
        return [(args[0], own)], own.replace(own[-1 - LAYERS[name]], "Z")
    if name in _LOOK_UPS:  # of rows, or of entries, in any order
        table = next(t for t in args if t.is_floating_point())
        own = string.ascii_letters[: table.dim()]
        return [(table, own)], own[1:] if name == "embedding" else ""
    if name == "tensordot":
        dims = args[2] if len(args) > 2 else kwargs.get("dims", 2)
        return _of_tensordot(args[0], args[1], dims)
    first = _MATRIX.get(name, 0)
    operands = list(args[first : first + 2])
    if name == "__rmatmul__":
        operands.reverse()
    if len(operands) < 2 or not all(isinstance(t, Tensor) for t in operands):
        return None
    one, two, product = letters(operands[0], operands[1])
    return [(operands[0], one), (operands[1], two)], product


def _of_einsum(args: Sequence[Any]) -> tuple[Terms, str] | None:
    equation, *operands = args
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = list(operands[0])
    if not isinstance(equation, str) or not all(isinstance(t, Tensor) for t in operands):
        return None
    given, arrow, result = equation.replace(" ", "").partition("->")
    terms = given.split(",")
    spare = [a for a in string.ascii_letters if a not in equation]
    widest = max(t.dim() - len(term.replace("...", "")) for t, term in zip(operands, terms, strict=True))
    ahead = "".join(spare[:widest])

    def full(term: str, n_axes: int) -> str:
        n = n_axes - len(term.replace("...", ""))
        return term.replace("...", ahead[len(ahead) - n :] if n else "")

    filled = [full(term, t.dim()) for t, term in zip(operands, terms, strict=True)]
    joined = "".join(filled)
    if arrow:
        result = result.replace("...", ahead)
    else:
        result = ahead + "".join(sorted(a for a in joined if joined.count(a) == 1 and a not in ahead))
    return list(zip(operands, filled, strict=True)), result


def _of_tensordot(first: Tensor, second: Tensor, dims: Any) -> tuple[Terms, str] | None:
    if isinstance(dims, int):
        dims = (range(first.dim() - dims, first.dim()), range(dims))
    elif isinstance(dims, Tensor):
        dims = dims.tolist()
    one = list(string.ascii_lowercase[: first.dim()])
    two = list(string.ascii_uppercase[: second.dim()])
    for a, b in zip(*dims, strict=True):
        two[b] = one[a]
    result = [a for a in one if a not in two] + [a for a in two if a not in one]
    return [(first, "".join(one)), (second, "".join(two))], "".join(result)
