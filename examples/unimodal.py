"""Images alone: two random views of each image take the places of image and text, with a temperature for each image.

    python examples/unimodal.py

It prints how often an emoji of an unseen artist lies nearest to one of its own kind, before training and after.
"""

import torch
from emoji_pairs import BATCH, MODEL, arguments, epoch_line
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from disttempnet import Features, build_loss, encode_images, load_model
from disttempnet.config import SourceConfig
from disttempnet.data import decode, eval_transform, open_source, train_transform
from disttempnet.models import Towers


class TwoViews(Dataset):
    """Two random crops of an image, uint8 [2, 3, 32, 32], and the id that both have."""

    def __init__(self, samples: int | None) -> None:
        self.source = open_source([SourceConfig(path="embedded:emoji/train")])
        self.augment, self.samples = train_transform("tempnet", 32), samples or len(self.source)

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        data, seeds = self.source.image_bytes(i), torch.randint(2**31, (2,)).tolist()
        return torch.stack([self.augment(data, seed) for seed in seeds]), i


@torch.no_grad()
def nearest(towers: Towers, samples: int | None) -> str:
    """Return how often the nearest training image of an image of `emoji/val` shows the same concept."""
    features, concepts = [], []
    for split in ("train", "val"):
        source = open_source([SourceConfig(path=f"embedded:emoji/{split}")])
        ids, resize = range(len(source))[:samples], eval_transform(towers.image_size)
        pixels = torch.stack([resize(decode(source.image_bytes(i))) for i in ids]).to(towers.module.logit_scale.device)
        features.append(torch.cat([encode_images(towers, part) for part in pixels.split(512)]))
        concepts.append([source.metadata(i)["concept"] for i in ids])
    found = (features[1] @ features[0].T).argmax(1).tolist()
    right = [concepts[0][i] == concept for i, concept in zip(found, concepts[1], strict=True)]
    chance = sum(map(concepts[0].count, concepts[1])) / len(concepts[0])
    return f"same concept {100 * sum(right) / len(right):.1f} % (chance {100 * chance / len(right):.2f} %)"


def main() -> None:
    args = arguments(__doc__, epochs=3, pairs=False).parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    data, towers = TwoViews(args.samples), load_model(MODEL)
    towers.module.to(device)
    print(f"nearest neighbours before training: {nearest(towers, args.samples)}")

    # Train the image tower alone.
    loss = build_loss("disttempnet-v1", num_samples=len(data), embed_dim=towers.embed_dim).to(device)
    groups = [{"params": towers.module.visual.parameters()}, *loss.parameter_groups()]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1)
    loader = DataLoader(data, BATCH, shuffle=True, drop_last=True)
    for epoch in range(args.epochs):
        loss.set_epoch(epoch)
        total = 0.0
        for views, ids in loader:
            # Features of both views, [b, D] each. Stacked crosswise, their 2 b rows compare every view with both views
            # of all other images: equal ids are no negatives. (They are in `clip`, `siglip` and `cyclip`.)
            first, second = encode_images(towers, views.transpose(0, 1).flatten(0, 1).to(device)).chunk(2)
            out = loss(Features.unit(torch.cat([first, second]), torch.cat([second, first])), ids.repeat(2))
            optimizer.zero_grad()
            out.total.backward()
            optimizer.step()
            total += out.total.item()
        print(epoch_line(epoch, total / len(loader), out.metrics))
    print(f"nearest neighbours after training: {nearest(towers, args.samples)}")


if __name__ == "__main__":
    main()
