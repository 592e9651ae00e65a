"""DistributedDataParallel: it wraps the towers, the loss stands beside it.

    torchrun --nproc_per_node 2 examples/ddp.py
    torchrun --nproc_per_node 1 examples/ddp.py --epochs 8 --resume

Two processes have the same batches and the same result as one. Any number of them resumes.
"""

import os

import torch
import torch.distributed as dist
from emoji_pairs import BATCH, Emoji, TwoTowers, arguments, epoch_line, zero_shot
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from disttempnet import Features, build_loss


def main() -> None:
    args = arguments(__doc__).parse_args()

    # Join the other processes first: the loss asks who they are.
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    main_rank, processes = dist.get_rank() == 0, dist.get_world_size()
    torch.manual_seed(0)

    # Wrap the towers, not the loss. The loss gathers the features of all processes, and averages the gradients of its
    # own parameters. DDP's mean over the processes is the gradient of the whole batch: multiply by nothing.
    data, towers = Emoji(args.samples), TwoTowers().to(device)
    loss = build_loss(args.objective, num_samples=len(data), embed_dim=towers.embed_dim).to(device)
    groups = [{"params": towers.parameters()}, *loss.parameter_groups()]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1)
    model = DistributedDataParallel(towers, device_ids=[device.index] if cuda else None)

    # Every process needs as many rows as the others: the sampler gives each its share, the loader drops a short batch.
    sampler = DistributedSampler(data, seed=0)
    loader = DataLoader(data, BATCH // processes, sampler=sampler, drop_last=True)

    # Every process loads the checkpoint: all of them hold the loss's complete state.
    checkpoint, start = args.out / "ddp.pt", 0
    if args.resume:
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        towers.load_state_dict(saved["model"])
        loss.load_state_dict(saved["loss"])
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["epochs"]

    for epoch in range(start, args.epochs):
        sampler.set_epoch(epoch)  # else every epoch has the order of the first
        loss.set_epoch(epoch)
        total = 0.0
        for batch in loader:
            images, tokens, ids = (batch[name].to(device) for name in ("images", "tokens", "ids"))
            out = loss(Features.of(*model(images, tokens)), ids)
            optimizer.zero_grad()
            out.total.backward()
            optimizer.step()
            total += out.total.item()  # the loss of the whole batch, on every process

        # One process prints and saves for all.
        if main_rank:
            print(epoch_line(epoch, total / len(loader), out.metrics))
            state = {"model": towers.state_dict(), "loss": loss.state_dict(), "optimizer": optimizer.state_dict()}
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            torch.save({**state, "epochs": epoch + 1}, checkpoint)

    # All processes evaluate together.
    result = zero_shot(towers)
    if main_rank:
        print(result)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
