"""Sequential training, the paper's asynchronous variant (Asy-InfoPro): the modules are trained in turn.

The authors' code for it was not released. Here a trained module is frozen in eval mode (running statistics),
so that its output is a function of the image. The next module is trained on that output, for as many epochs,
by the same schedule, on the same augmented images. Outputs are cached on the disk, or computed again for each
batch; a cache of all epochs changes no bit (`TrainConfig.cached_epochs`). In training, only one module is in
memory.

A run folder has the finished modules in ``trained``, the last one's outputs in ``cache``, and in
``checkpoints`` a folder for the module in progress. A killed run continues from these.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from infopro_fast import data, modules, whole_files
from infopro_fast.plan_file import for_people

from . import checkpoint, run_folder, setup
from .feature_cache import CacheFile, Features, check_space
from .loop import Training
from .processes.connect import Processes
from .processes.layout import Layout
from .processes.wire import Packet
from .settings.config import TrainConfig
from .share import Images, Share, test_counts
from .stopping import StopRequest

TRAINED, CACHE = "trained", "cache"


class Sequence:
    """Trains the modules one after the other; ``here.run`` is the run folder once training begins."""

    def __init__(self, config: TrainConfig, images: Any, here: Processes):
        self.config, self.images, self.here = config, images, here
        self.inlet = Images(config, images)
        self.features = self._measure()

    @property
    def run(self) -> Path:
        return self.here.run or self.config.out or Path("runs")

    def run_to_end(self, previous: bool = False) -> None:
        """Train what is left and write the weights. previous: use the checkpoint before the last."""
        for folder in (self.run / TRAINED, *(self.run / run_folder.CHECKPOINTS).glob("module*")):
            checkpoint.clean(folder)
        print(self.check_space(), flush=True)
        for k in range(self.config.modules):
            if not self.trained(k).is_dir():
                self._train(k, previous)
                previous = False
        self.here.watch.at("putting the modules together", slow=True)
        net = setup.first_network(self.config, self.images)
        for k in range(self.config.modules):
            net.part(range(k, k + 1)).load_state_dict(checkpoint.load(self.trained(k))["net"])
        last = run_folder.read_metrics(self.run, "epoch")[-1]
        accuracy = last["test"]["accuracy"]
        about = {"arch": self.config.arch, "epoch": self.config.epochs, "test_accuracy": accuracy}
        about |= self.images.about()
        self.here.watch.at("writing the weights")
        run_folder.write_weights(self.run, net.released_state_dict(), about, self.here.watch.moved)
        whole_files.remove(self.run / CACHE)

    def _train(self, k: int, previous: bool) -> None:
        """Train module k (from 0), from its checkpoint if it has one."""
        with StopRequest(self.run) as stop:
            after = self.cached if self.config.cache else self._frozen
            inlet = self.inlet if k == 0 else after(k - 1, stop)
        self.here.watch.at(f"building module {k + 1}", slow=True)
        share = OneModule(self.config, self.images, self._module(k), self.here, k, inlet)
        training = Training(self.config, self.run, self.images, share)
        if checkpoint.list_checkpoints(training.checkpoints):
            training.load(*checkpoint.load_latest(training.checkpoints, previous))
        else:
            torch.manual_seed(data.image_set.epoch_seed(self.config.seed, -1 - k))
            if k > 0:  # where the training of the module before ended
                before = checkpoint.load(self.trained(k - 1))
                training.seconds, training.metrics = before["seconds"], run_folder.counted_on(before)
        training.run_to_end()
        content = {"net": training.net.state_dict(), "seconds": training.clock.seconds, **training.metrics}
        self.here.watch.at(f"writing module {k + 1}")
        checkpoint.save(self.run / TRAINED, self.trained(k).name, content, self.here.watch.moved)
        whole_files.remove(training.checkpoints)

    def trained(self, k: int) -> Path:
        """Return the folder of module k's weights, which is there once it is trained."""
        return self.run / TRAINED / f"module{k + 1:03d}"

    def _module(self, k: int) -> modules.LocalNetwork:
        return setup.first_network(self.config, self.images).part(range(k, k + 1))

    def _load_trained(self, k: int) -> modules.LocalNetwork:
        part = self._module(k)
        part.load_state_dict(checkpoint.load(self.trained(k))["net"])
        return part.eval().requires_grad_(False)

    def _frozen(self, k: int, _: StopRequest) -> Frozen:
        """Return the inlet after module k, without a cache."""
        return Frozen(self.inlet, [self._load_trained(i) for i in range(k + 1)], self.config)

    # ----------------------------------------------------------------------------------------------------
    # The cache

    @property
    def cached_epochs(self) -> int:
        return min(self.config.cached_epochs or self.config.epochs, self.config.epochs)

    def _measure(self) -> list[Features]:
        """Return what each module gives for an image."""
        net, found = setup.first_network(self.config, self.images).eval(), []
        h = next(iter(self.inlet.test())).features[:2]
        with torch.inference_mode(), setup.autocast(self.config):
            for stage in net.stages:
                h = stage(h)
                found.append(Features.of(h))
        return found

    def files(self, k: int) -> tuple[list[CacheFile], CacheFile]:
        """Return the files of module k's outputs: one for each cached epoch, and one for the test images."""
        config, images, folder = self.config, self.images, self.run / CACHE / f"module{k + 1:03d}"
        size, batches = config.batch_size, images.batches(config.batch_size, config.drop_last)
        counts = [min(size, images.train_count - i * size) for i in range(batches)]
        paths = [folder / f"epoch{epoch + 1:04d}.bin" for epoch in range(self.cached_epochs)]
        train = [CacheFile(path, self.features[k], counts) for path in paths]
        return train, CacheFile(folder / "test.bin", self.features[k], test_counts(images, size))

    def check_space(self) -> str:
        """Return, as text, what the cache takes. Raises RunError if the disk has less."""
        if not self.config.cache:
            return "nothing is cached"
        files = [self.files(k) for k in range(self.config.modules - 1)]
        sizes = [sum(file.nbytes for file in (*train, test)) for train, test in files]
        # A module's outputs are made from those of the module before.
        most = max(sum(sizes[max(0, k - 1) : k + 1]) for k in range(len(sizes)))
        what = f"the cache of {self.cached_epochs} epoch{'s' * (self.cached_epochs > 1)}"
        check_space(self.run / CACHE, most, what)
        each = ", ".join(for_people(size) for size in sizes)
        return f"{what} takes up to {for_people(most)} in {self.run / CACHE} (module by module {each})"

    def cached(self, k: int, stop: StopRequest) -> Cached:
        """Return the inlet after module k; makes its outputs if they are missing, and removes the last."""
        train, test = self.files(k)
        if not all(file.is_complete for file in (*train, test)):
            inlet = self.cached(k - 1, stop) if k > 0 else self.inlet
            self.here.watch.at(f"building module {k + 1}", slow=True)
            after = Frozen(inlet, [self._load_trained(k)], self.config)
            what = f"caching the outputs of module {k + 1}"
            for epoch, file in enumerate(train):
                packets = after.train(epoch, len(file.sums), len(file.counts))
                self._write(file, stop.watch(packets), f"{what}, epoch {epoch + 1}")
            packets = itertools.islice(after.test(), len(test.sums), None)
            self._write(test, stop.watch(packets), f"{what}, test images")
        if k > 0:
            whole_files.remove(self.files(k - 1)[1].path.parent)
        return Cached(self.inlet, train, test)

    def _write(self, file: CacheFile, packets: Iterator[Packet], place: str) -> None:
        self.here.watch.at(f"taking the disk's space, {place}", slow=True)
        file.reserve()
        self.here.watch.at(place, pulse=self.images.images_read)
        file.write((packet.features for packet in packets), self.here.watch.moved)


@dataclasses.dataclass
class Cached:
    """Inlet: the images, with features from the disk. Epochs repeat where fewer are cached."""

    images: Images
    epochs: list[CacheFile]
    tests: CacheFile

    def train(self, epoch: int, first: int, last: int) -> Iterator[Packet]:
        epoch %= len(self.epochs)
        return self._read(self.epochs[epoch], first, self.images.train(epoch, first, last))

    def test(self) -> Iterator[Packet]:
        return self._read(self.tests, 0, self.images.test())

    def _read(self, file: CacheFile, first: int, packets: Iterator[Packet]) -> Iterator[Packet]:
        for i, packet in enumerate(packets, first):
            yield packet._replace(features=file.read(i).to(self.images.device))


@dataclasses.dataclass
class Frozen:
    """Inlet: another one, whose features go through trained modules."""

    before: Any
    parts: list[modules.LocalNetwork]
    config: TrainConfig

    def train(self, epoch: int, first: int, last: int) -> Iterator[Packet]:
        return self._run(self.before.train(epoch, first, last))

    def test(self) -> Iterator[Packet]:
        return self._run(self.before.test())

    def _run(self, packets: Iterator[Packet]) -> Iterator[Packet]:
        for packet in packets:
            h = packet.features
            with torch.no_grad(), setup.autocast(self.config):
                for part in self.parts:
                    for stage in part.stages:
                        h = stage(h)
            yield packet._replace(features=h)


class OneModule(Share):
    """Module k (from 0), trained on the output of the trained modules before it."""

    evaluates = True

    def __init__(
        self, config: TrainConfig, images: Any, net: modules.LocalNetwork, here: Processes, k: int, inlet: Any
    ):
        super().__init__(config, images, net, here, inlet)
        self.layout = Layout(0, 1, (range(k, k + 1),))
        self.prefix, self.checkpoints = f"module {k + 1}", f"{run_folder.CHECKPOINTS}/module{k + 1:03d}"
        self.evaluates, self.tells_recipe = k == config.modules - 1, k == 0

    def about_epoch(self) -> dict[str, Any]:
        return {"module": self.layout.modules.start + 1}

    def whole(self, own: dict[str, Any]) -> dict[str, Any]:
        return own

    def own(self, whole: dict[str, Any]) -> dict[str, Any]:
        return whole

    def weights(self, net: modules.LocalNetwork, saved: dict[str, Any]) -> None:
        """Return None: the network is written when all modules are trained."""
