"""Train a torchvision network on a folder of images, continue the run, load it and predict."""

from pathlib import Path

import torch
from torchvision.io import write_png

import infopro_fast

for part, count in (("train", 8), ("val", 2)):  # your own: images/train/CLASS/* and images/val/CLASS/*
    for label, name in enumerate(("dark", "light")):
        folder = Path("images") / part / name
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = torch.randint(120 * label, 120 * label + 120, (3, 40, 40), dtype=torch.uint8)
            write_png(pixels, str(folder / f"{i}.png"))

run = infopro_fast.trainer.fit(
    infopro_fast.trainer.TrainConfig(
        dataset="imagefolder", data_root=Path("images"), crop=(32, 32), workers=0,
        arch="torchvision:resnet18", modules=2, local_loss="softmax",
        epochs=1, warmup=0, batch_size=8, out=Path("run"),
    )
)  # fmt: skip
print(infopro_fast.trainer.evaluate_run(run)["accuracy"])

trained = infopro_fast.load(run)
images = torch.randint(0, 120, (2, 3, *trained.image_size), dtype=torch.uint8)
for row in trained.predict(images):
    print(trained.classes[row.argmax()], f"{row.max():.2f}")
