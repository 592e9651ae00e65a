"""A plain loop on one process, which saves and resumes.

    python examples/plain.py
    python examples/plain.py --epochs 8 --resume    # two epochs more

It prints the mean loss of each epoch with the last mean τ, then zero-shot accuracy.
"""

import torch
from emoji_pairs import BATCH, Emoji, TwoTowers, arguments, epoch_line, zero_shot
from torch.utils.data import DataLoader

from disttempnet import Features, build_loss


def main() -> None:
    args = arguments(__doc__).parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)

    # Data, towers, loss. The loss keeps a normaliser for every sample, so it asks how many there are.
    data, model = Emoji(args.samples), TwoTowers().to(device)
    loss = build_loss(args.objective, num_samples=len(data), embed_dim=model.embed_dim).to(device)

    # One optimizer for both. The temperature network has a learning rate of its own, and no weight decay.
    groups = [{"params": model.parameters()}, *loss.parameter_groups()]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1)

    # Go on from a checkpoint. The loss's state is a part of it: normalisers, temperatures, step and epoch.
    checkpoint, start = args.out / "plain.pt", 0
    if args.resume:
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        loss.load_state_dict(saved["loss"])
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["epochs"]

    for epoch in range(start, args.epochs):
        # Shuffle by the epoch's number, so that a resumed run sees the order that it would have seen.
        order = torch.Generator().manual_seed(epoch)
        loader = DataLoader(data, BATCH, shuffle=True, drop_last=True, generator=order)
        loss.set_epoch(epoch)  # for γ, and for a temperature that waits
        total = 0.0
        for batch in loader:
            # Embeddings [b, D] of any norm and ids [b] → the loss.
            images, tokens, ids = (batch[name].to(device) for name in ("images", "tokens", "ids"))
            out = loss(Features.of(*model(images, tokens)), ids)
            optimizer.zero_grad()
            out.total.backward()
            optimizer.step()
            total += out.total.item()
        print(epoch_line(epoch, total / len(loader), out.metrics))

        # Save everything that the next epoch needs.
        state = {"model": model.state_dict(), "loss": loss.state_dict(), "optimizer": optimizer.state_dict()}
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        torch.save({**state, "epochs": epoch + 1}, checkpoint)

    print(zero_shot(model))


if __name__ == "__main__":
    main()
