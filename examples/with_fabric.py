"""Lightning Fabric: set up model and optimizer; the loss is only moved to the device.

    pip install lightning-fabric
    python examples/with_fabric.py --devices 2
    python examples/with_fabric.py --epochs 8 --resume

Two processes have the same batches and the same result as one.
"""

import torch
from emoji_pairs import BATCH, Emoji, TwoTowers, arguments, epoch_line, zero_shot
from lightning_fabric import Fabric
from torch.utils.data import DataLoader, DistributedSampler

from disttempnet import Features, build_loss


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--devices", type=int, default=1)
    args = parser.parse_args()

    # The loss is built after launch, which joins the processes.
    fabric = Fabric(devices=args.devices)
    fabric.launch()
    fabric.seed_everything(0, verbose=False)
    data, towers = Emoji(args.samples), TwoTowers()
    loss = build_loss(args.objective, num_samples=len(data), embed_dim=towers.embed_dim).to(fabric.device)
    groups = [{"params": towers.parameters()}, *loss.parameter_groups()]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1)
    model, optimizer = fabric.setup(towers, optimizer)

    # Without fabric.setup_dataloaders: that sets the sampler's epoch by a count which begins at 0 again after a resume.
    sampler = DistributedSampler(data, fabric.world_size, fabric.global_rank, seed=0)
    loader = DataLoader(data, BATCH // fabric.world_size, sampler=sampler, drop_last=True)

    # fabric.load fills everything in place, on every process.
    state = {"model": model, "optimizer": optimizer, "loss": loss, "epochs": 0}
    if args.resume:
        fabric.load(args.out / "fabric.ckpt", state)

    for epoch in range(state["epochs"], args.epochs):
        sampler.set_epoch(epoch)
        loss.set_epoch(epoch)
        total = 0.0
        for batch in map(fabric.to_device, loader):
            out = loss(Features.of(*model(batch["images"], batch["tokens"])), batch["ids"])
            optimizer.zero_grad()
            fabric.backward(out.total)
            optimizer.step()
            total += out.total.item()
        fabric.print(epoch_line(epoch, total / len(loader), out.metrics))
        state["epochs"] = epoch + 1
        fabric.save(args.out / "fabric.ckpt", state)

    fabric.print(zero_shot(towers))


if __name__ == "__main__":
    main()
