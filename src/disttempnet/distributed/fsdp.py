"""Towers that outgrow a GPU: their parameters, gradients and moments shared out over the ranks (FSDP2).

Every parameter becomes a DTensor of which a rank holds some rows. A block's parameters are whole on every rank while
it computes, forward and again backward, and its gradient is reduced to each rank's rows. What a rank keeps between
steps, parameters and both moments of AdamW, is 12 bytes a parameter divided by the number of ranks.

In one process nothing is shared out, and every function here is the identity.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from disttempnet import distributed
from disttempnet.errors import UserError

# all that a checkpoint's list of contents may call up when it is read, beside names of dtypes
PLAIN = {("torch", "Size"), ("torch.serialization", "_get_layout")}
PATHS = {("pathlib", "PosixPath"), ("pathlib._local", "PosixPath")}  # the second is what Python 3.13 calls it
CONTENTS = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
HOLLOW = "_hollow"  # attribute of a module that is shared out: its plain copy, without parameters
CALLED = ("encode_image", "encode_text")  # what is called of open_clip's models, beside forward


def shard(module: nn.Module, device: torch.device) -> None:
    """Share the parameters of both towers out over all ranks, in place, and move them to this rank's device.

    Every rank holds the same parameters before. They come to the device a block at a time: no GPU ever holds all of
    them. Scalars (open_clip's own logit scale and bias, which are not trained) stay whole.

    Parameters are gathered in their own precision, and autocast rounds them as in any run. Gathering in bf16
    (MixedPrecisionPolicy) would move half the bytes, but also round the gains of norms.

    Args:
        module: open_clip's model on the CPU, locked and prepared; its optimizers are built afterwards.

    Raises:
        UserError: a scalar of it is trained: it has no rows to share out, and nobody would average its gradient.
    """
    if distributed.world_size() == 1:
        module.to(device)
        return
    scalars = {p for p in module.parameters() if p.ndim == 0}
    if trained := [name for name, p in module.named_parameters() if p in scalars and p.requires_grad]:
        raise UserError(f"train.shard: the towers train single numbers ({trained[0]}), which cannot be shared out")
    module.__dict__[HOLLOW] = _hollow(module)
    mesh = init_device_mesh(device.type, (distributed.world_size(),))
    shared = partial(fully_shard, mesh=mesh, reshard_after_forward=True, ignored_params=scalars)
    for part in (*blocks(module), *_rest(module)):
        part.register_forward_hook(_own_memory)
        shared(part)
    for name in CALLED:
        register_fsdp_forward_method(module, name)
    if device.type == "cpu":  # gloo has learnt to take means late
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.set_force_sum_reduction_for_comms(True)
    for scalar in scalars:
        scalar.data = scalar.data.to(device)


def _own_memory(module: nn.Module, inputs: Any, output: Any) -> Any:
    """Features that are a view of something else are copied: an operation in place on a view would lose the hook that
    gathers the parameters for the backward pass."""
    return output.clone() if isinstance(output, Tensor) and output._is_view() else output


def blocks(module: nn.Module) -> list[nn.Module]:
    """The layers that towers repeat, inner ones first: members of a list or sequence that are all of one class.

    Residual blocks of transformers and of ResNets, stages and their blocks in timm's towers, layers of Hugging Face's.
    Single operators in a row are none.
    """
    found = []
    for parent in module.modules():
        members = list(parent.children()) if isinstance(parent, (nn.ModuleList, nn.Sequential)) else []
        if len({type(member) for member in members}) == 1 and next(members[0].children(), None) is not None:
            found += members
    return found[::-1]


def _rest(module: nn.Module) -> list[nn.Module]:
    """What is shared out beside the blocks, inner ones first: the table of tokens, each tower, the root."""
    tables = [part for part in module.modules() if isinstance(part, nn.Embedding)]
    table = [max(tables, key=lambda part: part.num_embeddings)] if tables else []
    towers = [getattr(module, name, None) for name in ("visual", "text")]
    return [*table, *(tower for tower in towers if isinstance(tower, nn.Module)), module]


def _hollow(module: nn.Module) -> nn.Module:
    """A copy with parameters that have a shape only; its buffers are real."""
    shapes = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in module.parameters()}
    return copy.deepcopy(module, shapes)


def full_module(module: nn.Module, device: torch.device, everywhere: bool = True) -> nn.Module | None:
    """A plain module with all of the parameters as they are now; every rank calls this.

    Args:
        module: returned itself where nothing of it is shared out.
        device: where the copy's parameters are put, one by one.
        everywhere: whether all ranks need it; else rank 0 alone gets it, the others None.
    """
    if HOLLOW not in module.__dict__:
        return module
    state = {}
    for name, value in module.state_dict().items():
        value = full_tensor(value)  # of all ranks, also where it is not kept
        if everywhere or distributed.is_main():
            state[name] = value.to(device)
    if not state:
        return None
    result: nn.Module = copy.deepcopy(module.__dict__[HOLLOW])
    result.load_state_dict(state, assign=True)
    return result.to(device)  # buffers that no state_dict has


def full_tensor(tensor: Tensor) -> Tensor:
    """All rows of a tensor that is shared out, without a gradient, on every rank; another as it is."""
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor


def is_part(tensor: object) -> bool:
    """Whether each rank holds a part of this tensor only."""
    return isinstance(tensor, DTensor)


def as_parameter(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, equal on all ranks, shared out as a parameter is of the same shape."""
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    tensor = tensor.to(parameter.device)
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


def save_parts(parts: dict[str, Tensor], folder: Path) -> None:
    """Write tensors that are shared out, each rank its part, to a folder of torch.distributed.checkpoint.

    Every rank calls this with the same names; everything is on disk afterwards, the folder's entries too.

    Raises:
        OSError, RuntimeError, …: what the first rank met that failed. Every rank raises it.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    try:
        save(parts, storage_writer=FileSystemWriter(folder, sync_files=True))
    except CheckpointException as error:  # of anything, an interruption too
        cause, _ = error.failures[min(error.failures)]
        raise cause from None


def load_parts(parts: dict[str, Tensor], folder: Path) -> None:
    """Fill tensors, whole ones or parts, from a folder that `save_parts` wrote at any world size; every rank calls it.

    Raises:
        UserError: the folder is not whole, or is damaged. Every rank raises.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_loader import load

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is meant
            load(parts, storage_reader=_reader(folder))
    except (CheckpointException, OSError) as error:
        raise UserError(f"{folder}: cannot be read as a checkpoint: {_first_failure(error)}") from None


def _first_failure(error: BaseException) -> str:
    for rank, (cause, _) in getattr(error, "failures", {}).items():
        return f"rank {rank}: {str(cause).partition(chr(10))[0][:160] or type(cause).__name__}"
    return str(error).partition("\n")[0][:160]


def _reader(folder: Path) -> Any:
    """A reader that unpickles nothing of the folder's list of contents but what such a list is made of."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
            with (folder / ".metadata").open("rb") as file:
                found: Metadata = _Contents(file).load()
            found.storage_meta = found.storage_meta or StorageMeta()
            found.storage_meta.load_id = self.load_id
            return found

    return Reader(folder)


class _Contents(pickle.Unpickler):
    """Of classes and functions, those that describe tensors and files."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in PATHS:
            return Path
        if (module, name) in PLAIN or module in (*CONTENTS, "torch"):  # of others not even the module is imported
            found = super().find_class(module, name)
            if (
                (module, name) in PLAIN
                or (module in CONTENTS and isinstance(found, type) and found.__module__ == module)
                or (module == "torch" and isinstance(found, torch.dtype))
            ):
                return found
        raise pickle.UnpicklingError(f"{module}.{name} does not belong into a list of contents")
