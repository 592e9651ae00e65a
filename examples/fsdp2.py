"""FSDP2 shards the towers over the processes, the loss beside them stays whole. Any number of processes resumes.

Commands:
    torchrun --nproc_per_node 2 examples/fsdp2.py
    torchrun --nproc_per_node 1 examples/fsdp2.py --epochs 8 --resume
"""

import os

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from emoji_pairs import BATCH, Emoji, TwoTowers, arguments, epoch_line, zero_shot
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler

from disttempnet import Features, build_loss


def main() -> None:
    args = arguments(__doc__).parse_args()
    device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else "cpu")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.manual_seed(0)

    # Shard the blocks, then what is around them. FSDP2 takes no scalars, such as the logit scale that is not trained.
    data, model = Emoji(args.samples), TwoTowers().to(device)
    for part in (*model.both.visual.transformer.resblocks, *model.both.transformer.resblocks, model):
        fully_shard(part, ignored_params={model.both.logit_scale})
        part.set_force_sum_reduction_for_comms(device.type == "cpu")  # gloo of older versions cannot average

    # The loss is not sharded: it averages the gradients of its own parameters. The optimizer comes after fully_shard.
    loss = build_loss(args.objective, num_samples=len(data), embed_dim=model.embed_dim).to(device)
    optimizer = torch.optim.AdamW([{"params": model.parameters()}, *loss.parameter_groups()], lr=1e-3, weight_decay=0.1)
    sampler = DistributedSampler(data, seed=0)
    loader = DataLoader(data, BATCH // dist.get_world_size(), sampler=sampler, drop_last=True)

    # The optimizer holds parameters of both, so both are saved as one module. Its moments are loaded after the loss,
    # which then knows whether its temperature has started: one that waits has no moments, hence strict=False.
    both, start = torch.nn.ModuleDict({"model": model, "loss": loss}), 0
    if args.resume:
        checkpoint = max(args.out.glob("fsdp2-*"))
        saved = {"weights": states.get_model_state_dict(both), "epochs": 0}
        dcp.load(saved, checkpoint_id=checkpoint)
        states.set_model_state_dict(both, saved["weights"])
        moments, start = {"optimizer": states.get_optimizer_state_dict(both, optimizer)}, saved["epochs"]
        dcp.load(moments, checkpoint_id=checkpoint)
        some = states.StateDictOptions(strict=False)
        states.set_optimizer_state_dict(both, optimizer, moments["optimizer"], options=some)

    for epoch in range(start, args.epochs):
        sampler.set_epoch(epoch)
        loss.set_epoch(epoch)
        total = 0.0
        for batch in loader:
            images, tokens, ids = (batch[name].to(device) for name in ("images", "tokens", "ids"))
            out = loss(Features.of(*model(images, tokens)), ids)
            optimizer.zero_grad()
            out.total.backward()
            optimizer.step()
            total += out.total.item()
        if dist.get_rank() == 0:
            print(epoch_line(epoch, total / len(loader), out.metrics))
        weights, moments = states.get_state_dict(both, optimizer)
        saved = {"weights": weights, "optimizer": moments, "epochs": epoch + 1}
        dcp.save(saved, checkpoint_id=args.out / f"fsdp2-{epoch + 1:03}")

    # Evaluate a plain copy: processes embed different numbers of batches, which sharded towers would wait for.
    plain, full = TwoTowers().to(device), states.StateDictOptions(full_state_dict=True)
    plain.load_state_dict(states.get_model_state_dict(model, options=full))
    result = zero_shot(plain)
    if dist.get_rank() == 0:
        print(result)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
