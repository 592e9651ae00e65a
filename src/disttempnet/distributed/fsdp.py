"""Sharded towers (FSDP2): parameters, gradients and moments are divided over the ranks, for towers that outgrow a GPU.

Every parameter becomes a DTensor of which a rank holds some rows. A block's parameters are gathered on every rank while
it computes, forward and again backward; its gradient is reduced to each rank's rows. Between steps a rank keeps
parameters and both moments of AdamW: 12 bytes a parameter, divided by the number of ranks.

In one process nothing is sharded, and every function here is the identity.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Mapping
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

# Everything that a checkpoint's metadata may import when it is unpickled, besides names of dtypes.
ALLOWED_GLOBALS = {("torch", "Size"), ("torch.serialization", "_get_layout")}
PATHS = {("pathlib", "PosixPath"), ("pathlib._local", "PosixPath")}  # the second is what Python 3.13 calls it
METADATA_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
SKELETON = "_skeleton"  # attribute of a sharded module: its plain copy, without parameters
FORWARD_METHODS = ("encode_image", "encode_text")  # called on open_clip's models, besides forward


def shard(module: nn.Module, device: torch.device) -> None:
    """Shard the parameters of both towers over all ranks, in place, and move them to this rank's device.

    All ranks hold the same parameters before. Blocks are moved to the device one by one: no GPU ever holds all of them.
    Scalars (open_clip's own logit scale and bias, which are not trained) are not sharded.

    Parameters are gathered in their own precision, and autocast rounds them as in any run. Gathering in bf16
    (MixedPrecisionPolicy) would move half the bytes, but also round the gains of norms.

    Args:
        module: open_clip's model on the CPU, locked and prepared; its optimizers are built afterwards.
        device: of this rank.

    Raises:
        UserError: a scalar is trained: it cannot be sharded, and its gradient would not be averaged.
    """
    if distributed.world_size() == 1:
        module.to(device)
        return

    # Leave scalars out.
    scalars = {p for p in module.parameters() if p.ndim == 0}
    if trained := [name for name, p in module.named_parameters() if p in scalars and p.requires_grad]:
        raise UserError(f"train.shard: the towers train a scalar ({trained[0]}), which cannot be sharded")

    # Keep a copy without parameters, then shard the blocks and what is around them, inner ones first.
    module.__dict__[SKELETON] = _skeleton(module)
    mesh = init_device_mesh(device.type, (distributed.world_size(),))
    fully = partial(fully_shard, mesh=mesh, reshard_after_forward=True, ignored_params=scalars)
    for part in (*repeated_blocks(module), *_rest(module)):
        part.register_forward_hook(_own_memory)
        fully(part)
    for name in FORWARD_METHODS:
        register_fsdp_forward_method(module, name)

    # Older versions of gloo cannot average; sum and divide instead.
    if device.type == "cpu":
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.set_force_sum_reduction_for_comms(True)
    for scalar in scalars:
        scalar.data = scalar.data.to(device)


def _own_memory(module: nn.Module, inputs: Any, output: Any) -> Any:
    """Copy an output that is a view: an in-place operation would lose the hook that gathers parameters."""
    return output.clone() if isinstance(output, Tensor) and output._is_view() else output


def repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """Return the blocks that towers repeat, inner ones first: members of a list or sequence, all of one class.

    These are residual blocks of transformers and ResNets, stages and their blocks in timm's towers, and layers of
    Hugging Face encoders. Sequences of single operators are not.
    """
    found = []
    for parent in module.modules():
        members = list(parent.children()) if isinstance(parent, (nn.ModuleList, nn.Sequential)) else []
        if len({type(member) for member in members}) == 1 and next(members[0].children(), None) is not None:
            found += members
    return found[::-1]


def _rest(module: nn.Module) -> list[nn.Module]:
    """Return the modules to shard besides the blocks, inner ones first: token table, each tower, the root."""
    tables = [part for part in module.modules() if isinstance(part, nn.Embedding)]
    table = [max(tables, key=lambda part: part.num_embeddings)] if tables else []
    towers = [getattr(module, name, None) for name in ("visual", "text")]
    return [*table, *(tower for tower in towers if isinstance(tower, nn.Module)), module]


def _skeleton(module: nn.Module) -> nn.Module:
    """Return a copy whose parameters are on the meta device; its buffers are real."""
    shapes = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in module.parameters()}
    return copy.deepcopy(module, shapes)


def full_module(module: nn.Module, device: torch.device, everywhere: bool = True) -> nn.Module | None:
    """Gather a sharded module into a plain one, with its current parameters; every rank calls this.

    Args:
        module: returned as it is if it is not sharded.
        device: of the copy's parameters, which are moved one by one.
        everywhere: return it on all ranks; else on rank 0 alone, and None on the others.
    """
    if SKELETON not in module.__dict__:
        return module
    state = {}
    for name, value in module.state_dict().items():
        value = full_tensor(value)  # a collective: on all ranks, also if the result is not kept
        if everywhere or distributed.is_main():
            state[name] = value.to(device)
    if not state:
        return None
    result: nn.Module = copy.deepcopy(module.__dict__[SKELETON])
    result.load_state_dict(state, assign=True)
    return result.to(device)  # buffers that no state_dict has


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather all rows of a sharded tensor on every rank, without gradient; another is returned as it is."""
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor


def full_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gather named tensors on the CPU of rank 0; other ranks get none of them. Every rank calls this."""
    found = {}
    for name, value in state.items():
        value = full_tensor(value)  # a collective
        if distributed.is_main():
            found[name] = value.detach().cpu()
    return found


def is_sharded(tensor: object) -> bool:
    """Return whether each rank holds only its rows of this tensor."""
    return isinstance(tensor, DTensor)


def sharded_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Shard a full tensor, equal on all ranks, like a parameter of the same shape; else return it as it is."""
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    tensor = tensor.to(parameter.device)
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


def save_parts(parts: dict[str, Tensor], folder: Path) -> None:
    """Write sharded tensors to a folder of torch.distributed.checkpoint, each rank its rows.

    Every rank calls this with the same names. Afterwards everything is flushed to disk.

    Raises:
        OSError, RuntimeError, …: the error of the first rank that failed; every rank raises it.
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
    """Fill tensors, full or sharded, from a folder that `save_parts` wrote at any world size; every rank calls this.

    Raises:
        UserError: the folder is incomplete or damaged; every rank raises.
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
    """Return a reader that unpickles only plain metadata of a folder."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
            with (folder / ".metadata").open("rb") as file:
                found: Metadata = _Metadata(file).load()
            found.storage_meta = found.storage_meta or StorageMeta()
            found.storage_meta.load_id = self.load_id
            return found

    return Reader(folder)


class _Metadata(pickle.Unpickler):
    """Unpickler that allows only the classes and functions that describe tensors and files."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in PATHS:
            return Path
        if (module, name) in ALLOWED_GLOBALS or module in (
            *METADATA_MODULES,
            "torch",
        ):  # other modules are not even imported
            found = super().find_class(module, name)
            if (
                (module, name) in ALLOWED_GLOBALS
                or (module in METADATA_MODULES and isinstance(found, type) and found.__module__ == module)
                or (module == "torch" and isinstance(found, torch.dtype))
            ):
                return found
        raise pickle.UnpicklingError(f"{module}.{name} does not belong into the metadata of a checkpoint")
