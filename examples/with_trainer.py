"""Hugging Face's Trainer: the loss is a part of the model, so that it is saved, resumed and moved with it.

    pip install 'transformers>=5' accelerate
    torchrun --nproc_per_node 2 examples/with_trainer.py
    python examples/with_trainer.py --epochs 8 --resume

Two processes have the same batches and the same result as one.
"""

import os

import torch
from emoji_pairs import BATCH, Emoji, TwoTowers, arguments, zero_shot
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from disttempnet import Features, build_loss


class Contrastive(nn.Module):
    """Towers and loss as one module.

    Trainer drops every column that `forward` does not name: `ids` must be one of them. It takes no **kwargs: with
    them Trainer expects a loss that is divided by `num_items_in_batch`, and leaves accumulation to it.
    """

    def __init__(self, objective: str, samples: int, steps_per_epoch: int) -> None:
        super().__init__()
        self.towers = TwoTowers()
        # With steps_per_epoch the loss counts its epochs, after a resume too: nobody calls set_epoch here.
        sizes = {"num_samples": samples, "embed_dim": self.towers.embed_dim, "steps_per_epoch": steps_per_epoch}
        self.loss = build_loss(objective, **sizes)

    def forward(self, images: Tensor, tokens: Tensor, ids: Tensor) -> dict[str, Tensor]:
        return {"loss": self.loss(Features.of(*self.towers(images, tokens)), ids).total}


class ZeroShot(TrainerCallback):
    """Zero-shot accuracy after training, by all processes together."""

    def on_train_end(self, args, state, control, model, **kwargs) -> None:
        result = zero_shot(model.towers)
        if state.is_world_process_zero:
            print(f"\n{result}")  # below the progress bar


def main() -> None:
    args = arguments(__doc__).parse_args()

    # Start one process a GPU: in a single process Trainer copies the model to all GPUs, which the loss refuses. Without
    # a GPU, use_cpu lets the processes work together.
    processes, cuda = int(os.environ.get("WORLD_SIZE", 1)), torch.cuda.is_available()
    settings = TrainingArguments(
        str(args.out / "trainer"), num_train_epochs=args.epochs, per_device_train_batch_size=BATCH // processes,
        dataloader_drop_last=True, lr_scheduler_type="constant", save_strategy="epoch", save_total_limit=1,
        logging_strategy="epoch", report_to=[], seed=0, use_cpu=not cuda, dataloader_pin_memory=cuda,
        ddp_find_unused_parameters=False,
    )  # fmt: skip

    # The Trainer's own optimizer would give the temperature the towers' rate and weight decay: bring one.
    data = Emoji(args.samples)
    torch.manual_seed(0)
    model = Contrastive(args.objective, len(data), len(data) // BATCH)
    groups = [{"params": model.towers.parameters()}, *model.loss.parameter_groups()]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1)

    trainer = Trainer(model, settings, train_dataset=data, optimizers=(optimizer, None), callbacks=[ZeroShot()])
    trainer.train(resume_from_checkpoint=args.resume or None)


if __name__ == "__main__":
    main()
