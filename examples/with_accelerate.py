"""Hugging Face accelerate: prepare the model, the optimizer and the loader; the loss needs no preparing.

    pip install accelerate
    torchrun --nproc_per_node 2 examples/with_accelerate.py             # or accelerate launch
    python examples/with_accelerate.py --epochs 8 --resume

Two processes have the same batches and the same result as one.
"""

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from emoji_pairs import BATCH, Emoji, TwoTowers, arguments, epoch_line, zero_shot
from torch.utils.data import DataLoader

from disttempnet import Features, build_loss


def main() -> None:
    args = arguments(__doc__).parse_args()

    # split_batches: BATCH is that of all processes together. A seedable sampler shuffles alike on all of them.
    loading = DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True)
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), dataloader_config=loading)
    set_seed(0)

    # The loss is built after the Accelerator, which has joined the processes.
    data, towers = Emoji(args.samples), TwoTowers()
    loss = build_loss(args.objective, num_samples=len(data), embed_dim=towers.embed_dim).to(accelerator.device)
    groups = [{"params": towers.parameters()}, *loss.parameter_groups()]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1)

    # drop_last: else `even_batches` fills the last batch with samples of the first.
    loader = DataLoader(data, BATCH, shuffle=True, drop_last=True)
    model, optimizer, loader = accelerator.prepare(towers, optimizer, loader)

    # Register what save_state does not know: the loss, and how far we are.
    progress = Progress()
    accelerator.register_for_checkpointing(loss, progress)
    if args.resume:
        accelerator.load_state(str(args.out / "accelerate"))

    for epoch in range(progress.epochs, args.epochs):
        loader.set_epoch(epoch)  # it counts from 0 by itself, after a resume too
        loss.set_epoch(epoch)
        total = 0.0
        for batch in loader:
            out = loss(Features.of(*model(batch["images"], batch["tokens"])), batch["ids"])
            optimizer.zero_grad()
            accelerator.backward(out.total)
            optimizer.step()
            total += out.total.item()
        accelerator.print(epoch_line(epoch, total / len(loader), out.metrics))
        progress.epochs = epoch + 1
        accelerator.save_state(str(args.out / "accelerate"))

    accelerator.print(zero_shot(towers))
    accelerator.end_training()


class Progress:
    """Number of epochs that are done, as accelerate saves it."""

    epochs = 0

    def state_dict(self) -> dict[str, int]:
        return {"epochs": self.epochs}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epochs = state["epochs"]


if __name__ == "__main__":
    main()
