"""Data-parallel local training in a loop of your own: torchrun --nproc-per-node 2 torchrun.py

Started without torchrun, it is the only process.
"""

import os

import torch
import torch.distributed as dist

import infopro_fast

several = "WORLD_SIZE" in os.environ
if several:
    dist.init_process_group("gloo")
rank, count = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)

torch.manual_seed(0)  # equal weights everywhere
net = infopro_fast.build("resnet20", modules=2, local_loss="softmax", image_size=16)
group = dist.group.WORLD if several else None
trainer = infopro_fast.LocalTrainer(
    net, lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9), group=group
)
images, labels = torch.randn(32, 3, 16, 16), torch.arange(32) % 10
for _ in range(2):
    metrics = trainer.step(images[rank::count], labels[rank::count])
print(f"process {rank} of {count}: loss {metrics['loss'].item():.4f}")
if several:
    dist.destroy_process_group()
