"""Local training in Lightning, with manual optimisation."""

import torch

try:
    import lightning
except ImportError:
    raise SystemExit("this example needs Lightning: pip install lightning") from None

import infopro_fast


class Local(lightning.LightningModule):
    """`LocalTrainer` has the optimizers and calls backward itself."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.net = infopro_fast.build("resnet20", modules=2, local_loss="softmax", image_size=16)

    def configure_optimizers(self):
        def make_optimizer(params):
            return torch.optim.SGD(params, lr=0.05, momentum=0.9)

        self.local = infopro_fast.LocalTrainer(self.net, make_optimizer)
        return self.local.optimizers

    def training_step(self, batch, _):
        metrics = self.local.step(*batch)
        self.log_dict({name: value for name, value in metrics.items() if not name.endswith("correct")})

    def validation_step(self, batch, _):
        image, label = batch
        self.log("accuracy", (self.net(image).argmax(1) == label).float().mean())


images, labels = torch.randn(64, 3, 16, 16), torch.arange(64) % 10
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=16)
trainer = lightning.Trainer(
    max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
)
trainer.fit(Local(), loader, loader)
print({name: round(value.item(), 3) for name, value in trainer.callback_metrics.items()})
