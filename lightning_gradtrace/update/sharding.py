"""Parameters of which every rank holds a piece, as FSDP2 leaves them (DTensor): what of them is here.

Gradients, weights and the optimizer's memory are divided alike, so that all of update works on the pieces.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def is_sharded(tensor: Any) -> bool:
    """Say whether a tensor is spread over ranks."""
    return hasattr(tensor, "to_local") and hasattr(tensor, "placements")


def local(tensor: Tensor) -> Tensor:
    """Return the piece of a tensor that this rank holds, without a copy; of an ordinary tensor, itself."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        piece: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return piece


def local_state(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return an optimizer's state of one parameter with pieces in place of tensors that are spread."""
    if not any(is_sharded(value) for value in state.values()):
        return state
    return {name: local(value) if isinstance(value, Tensor) else value for name, value in state.items()}


@dataclass(frozen=True)
class Piece:
    """Where the piece of this rank lies in a parameter.

    Attributes:
        shape: shape of the whole parameter.
        region: the piece, one slice for each axis.
    """

    shape: torch.Size
    region: tuple[slice, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Piece:
        """Return the piece of a parameter that this rank holds; of an ordinary one all of it."""
        if not is_sharded(tensor):
            return cls(tensor.shape, tuple(slice(None) for _ in tensor.shape))
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        sizes, offsets = compute_local_shape_and_global_offset(
            tensor.shape,
            tensor.device_mesh,  # type: ignore[attr-defined]
            tensor.placements,  # type: ignore[attr-defined]
        )
        return cls(tensor.shape, tuple(slice(at, at + n) for at, n in zip(offsets, sizes, strict=True)))

    def take(self, whole: Tensor) -> Tensor:
        """Cut the piece out of a whole tensor."""
        return whole[self.region]

    def place(self, piece: float | Tensor, dtype: torch.dtype) -> Tensor:
        """Return a whole tensor, on the CPU, that is zero outside of the piece; those of all ranks add up to it."""
        whole = torch.zeros(self.shape, dtype=dtype, device="cpu")
        whole[self.region] = piece.detach().to("cpu", dtype) if isinstance(piece, Tensor) else piece
        return whole


def check_sharding(parameters: Mapping[str, Tensor], n_ranks: int) -> None:
    """Refuse parameters that are spread over ranks in a way that isn't known, or not spread at all among others.

    Args:
        parameters: all trainable parameters by name.
        n_ranks: number of processes.

    Raises:
        ValueError: names a parameter, what was found and what is expected.
    """
    for name, p in parameters.items():
        found = "is not sharded, so that its gradients are not averaged"
        if is_sharded(p):
            mesh: Any = p.device_mesh  # type: ignore[attr-defined]
            placements: Any = p.placements  # type: ignore[attr-defined]
            if mesh.ndim == 1 and mesh.size() == n_ranks and type(placements[0]).__name__ == "Shard":
                continue
            found = f"has placements {tuple(placements)} on a mesh of shape {tuple(mesh.shape)}"
        raise ValueError(
            f"GradTrace: `{name}` {found}; expected every trainable parameter to be sharded by `fully_shard` over all "
            f'{n_ranks} processes: call `fully_shard(self, mesh=self.device_mesh["data_parallel"])` in '
            "`configure_model`, with tensor_parallel_size=1."
        )
