"""Parameters that FSDP2 swaps: modules hold pieces, and whole tensors only while they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

from lightning_gradtrace.capture.forward.tape import Tape
from lightning_gradtrace.capture.intake.batch import tensors

_SETTINGS = frozenset(
    ("reduce_grads", "all_reduce_grads", "reshard_after_backward", "post_forward_mesh_info", "is_last_backward")
)


def bring_to_rest(module: nn.Module) -> None:
    """Let modules hold their pieces again; after a validation the outermost one still holds whole tensors."""
    for part in module.modules():
        if _is_fsdp(part):
            part.reshard()  # type: ignore[operator]


def is_spread(module: nn.Module) -> bool:
    """Say whether FSDP2 holds the parameters of a module or of a part of it."""
    return any(_is_fsdp(part) for part in module.modules())


def _is_fsdp(module: nn.Module) -> bool:
    return hasattr(module, "set_requires_gradient_sync") and hasattr(module, "reshard")


def watch_unsharding(module: nn.Module, names: Sequence[str]) -> list[Any]:
    """Tell the active tape which whole tensor stands for which parameter, whenever modules gather theirs.

    Args:
        module: the model; some of its modules are FSDP modules.
        names: the tracked parameters.

    Returns:
        Handles of hooks, to be removed after the training.
    """
    wrapped = {path: part for path, part in module.named_modules() if _is_fsdp(part)}
    own: dict[str, list[str]] = {path: [] for path in wrapped}
    for name in names:
        # A parameter belongs to the innermost FSDP module around it, and is whole when that one begins to run.
        around = [path for path in wrapped if not path or name.startswith(f"{path}.")]
        if around:
            own[max(around, key=len)].append(name)
    # Behind FSDP2's own hook, which gathers the parameters.
    hooks = [wrapped[path].register_forward_pre_hook(_hook(module, found)) for path, found in own.items() if found]
    # Before FSDP2's own hook, which lets a backward pass gather them again when it comes to these outputs.
    return hooks + [part.register_forward_hook(_outputs, prepend=True) for part in wrapped.values()]


def _hook(module: nn.Module, names: Sequence[str]) -> Callable[..., None]:
    def tell(*_: Any) -> None:
        tapes = [mode for mode in _get_current_function_mode_stack() if isinstance(mode, Tape)]
        for tape in tapes:
            for name in names:
                tape.meet(name, module.get_parameter(name))

    return tell


def _outputs(_: nn.Module, args: Any, output: Any) -> None:
    """Let passes of the package's own come to every module that the real one comes to, as the other ranks' do."""
    for mode in _get_current_function_mode_stack():
        if isinstance(mode, Tape):
            for tensor in tensors(output):
                mode.watch(tensor)


def waiting_gradients(module: nn.Module) -> dict[int, Tensor]:
    """Return the gradients that backward passes have left whole, for a later one to reduce.

    FSDP2 keeps them away from ``.grad`` where it was told not to reduce them (`set_requires_gradient_sync(False)`); no
    optimizer zeroes them.

    Args:
        module: the model.

    Returns:
        The gradients of this rank, by the identity of the parameter of which modules hold a piece at rest.
    """
    found = {}
    for part in module.modules():
        for held in (p for group in _groups(part) for p in group.fsdp_params) if _is_fsdp(part) else ():
            gradient = held.unsharded_accumulated_grad
            if gradient is None and hasattr(held, "_unsharded_param"):
                gradient = held._unsharded_param.grad
            if gradient is not None:
                found[id(held.sharded_param)] = gradient
    return found


@contextmanager
def set_apart(module: nn.Module) -> Iterator[None]:
    """Let backward passes leave FSDP2 as they found it; all ranks enter and leave together.

    At the end of a pass FSDP2 reduces whatever gradients its parameters have, also those that micro-batches before
    have left, frees what it had gathered, and forgets in which order to gather again.
    """
    parts = [part for part in module.modules() if _is_fsdp(part)]
    groups = [group for part in parts for group in _groups(part)]
    reduces = [group.reduce_grads for group in groups]
    gathered = [part for part in parts if any(group._sharded_state.name == "UNSHARDED" for group in _groups(part))]
    orders = [group._post_forward_indices for group in groups]
    orders += [getattr(group.comm_ctx, "post_forward_order", []) for group in groups]
    known = [list(order) for order in orders]
    for group in groups:
        group.reduce_grads = False
    try:
        yield
        for part in gathered:
            part.unshard()  # type: ignore[operator]
    finally:
        for part in parts:
            _finish_pass(part)
        for group, reduce in zip(groups, reduces, strict=True):
            group.reduce_grads = reduce
        for order, entries in zip(orders, known, strict=True):
            order[:] = entries


class GradientSettings:
    """What FSDP2 is to do with gradients and weights in the passes to come, which a training step may set.

    Args:
        module: the model.
    """

    def __init__(self, module: nn.Module) -> None:
        parts = [part for part in module.modules() if _is_fsdp(part)]
        owners = [*(group for part in parts for group in _groups(part)), *(_state(part)._state_ctx for part in parts)]
        self._kept = [(owner, {n: v for n, v in vars(owner).items() if n in _SETTINGS}) for owner in owners]

    def restore(self) -> None:
        """Put the settings back."""
        for owner, values in self._kept:
            for name, value in values.items():
                setattr(owner, name, value)


def _state(part: nn.Module) -> Any:
    return part._get_fsdp_state()  # type: ignore[operator]


def _groups(part: nn.Module) -> list[Any]:
    """Return the groups of parameters that a module gathers; older versions of torch have one, or none."""
    state = _state(part)
    groups = getattr(state, "_fsdp_param_groups", None)
    return [group for group in ([state._fsdp_param_group] if groups is None else groups) if group is not None]


def _finish_pass(part: nn.Module) -> None:
    """End a pass that an error has interrupted; FSDP2 would take the next one for its continuation."""
    state = _state(part)
    if state._state_ctx.post_backward_final_callback_queued:
        state._root_post_backward_final_callback()
