"""Sequential training, the paper's asynchronous one (Asy-InfoPro): a module is trained to its end, then the next on what it gives.

The paper's code for it was not released. Here a trained module is frozen in eval mode (running statistics), so that its output is a
function of the image; the next one is trained for as many epochs, by the same schedule, on the same augmented images. Their outputs
are cached on the disk for every epoch (no bit depends on it, only disk and time: `TrainConfig.cached_epochs`), or computed again by
the frozen modules for every batch. Of the modules, one is in memory, but for the moments when the network is made and written.

A run folder has in ``trained`` the modules that are done, in ``cache`` the outputs of the last of them, in ``checkpoints`` a folder for
the module in progress: whatever is killed, continues from what these say.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from infopro_fast import data, modules
from infopro_fast.plan import for_people

from . import checkpoint, loop, run_folder
from .feature_cache import CacheFile, Features, check_space
from .processes.layout import Layout, Processes
from .processes.reduction import modules_of
from .processes.watch import Unwatched, Watch
from .processes.wire import Packet
from .settings.config import TrainConfig
from .setup import amp_dtype, first_network
from .share import Images, Share, test_counts
from .stopping import StopRequest

TRAINED, CACHE = "trained", "cache"


class Sequence:
    """The modules' training, one after the other; ``here.run`` is the run folder by the time that something is trained."""

    def __init__(self, config: TrainConfig, images: Any, here: Processes):
        self.config, self.images, self.here = config, images, here
        self.device, self.dtype = torch.device(config.device), getattr(torch, config.dtype)
        self.features = self._measure()

    @property
    def run(self) -> Path:
        return self.here.run or self.config.out or Path("runs")

    @property
    def watch(self) -> Watch | Unwatched:
        return self.here.watch

    def run_to_end(self, previous: bool = False) -> None:
        self._clean()
        print(self.check_space(), flush=True)
        for k in range(self.config.modules):
            if not self.trained(k).is_dir():
                self._train(k, previous)
                previous = False
        self.watch.at("putting the modules together", slow=True)
        net = first_network(self.config, self.images)
        for k in range(self.config.modules):
            modules_of(net, range(k, k + 1)).load_state_dict(checkpoint.load(self.trained(k))["net"])
        last = run_folder.read_metrics(self.run, "epoch")[-1]
        about = {"arch": self.config.arch, "epoch": self.config.epochs, "test_accuracy": last["test"]["accuracy"]}
        self.watch.at("writing the weights")
        run_folder.write_weights(self.run, net.released_state_dict(), about, self.watch.moved)
        checkpoint._remove(self.run / CACHE)

    def _train(self, k: int, previous: bool) -> None:
        stop = StopRequest(self.run)
        source = None
        if k > 0:
            with stop:
                source = self.cache(k - 1, stop) if self.config.cache else self._frozen(k)
        self.watch.at(f"building module {k + 1}", slow=True)
        training = loop.Training(self.config, self.run, self.images, OneModule(self.config, self.images, self._module(k), self.here, k, source))
        training.checkpoints = self.run / run_folder.CHECKPOINTS / f"module{k + 1:03d}"
        if checkpoint.list_checkpoints(training.checkpoints):
            training.load(*checkpoint.load_latest(training.checkpoints, previous))
        else:
            torch.manual_seed(data.image_set.epoch_seed(self.config.seed, -1 - k))
            if k > 0:  # where the training of the module before ended
                before = checkpoint.load(self.trained(k - 1))
                training.seconds, training.metrics_bytes = before["seconds"], before["metrics_bytes"]
        training.run_to_end()
        size = (self.run / run_folder.METRICS).stat().st_size
        content = {"net": training.net.state_dict(), "seconds": training.clock.seconds, "metrics_bytes": size}
        self.watch.at(f"writing module {k + 1}")
        checkpoint.save(self.run / TRAINED, self.trained(k).name, content, self.watch.moved)
        checkpoint._remove(training.checkpoints)

    def _module(self, k: int) -> modules.LocalNetwork:
        return modules_of(first_network(self.config, self.images), range(k, k + 1))

    def trained(self, k: int) -> Path:
        return self.run / TRAINED / f"module{k + 1:03d}"

    def _clean(self) -> None:
        """What a killed process left half-written."""
        for folder in (self.run / TRAINED, *(self.run / run_folder.CHECKPOINTS).glob("module*")):
            checkpoint.clean(folder)

    def _load_trained(self, k: int) -> modules.LocalNetwork:
        part = self._module(k)
        part.load_state_dict(checkpoint.load(self.trained(k))["net"])
        return part.eval().requires_grad_(False)

    def _frozen(self, k: int) -> _Frozen:
        return _Frozen([self._load_trained(i) for i in range(k)], self._autocast)

    def _autocast(self) -> contextlib.AbstractContextManager:
        amp = amp_dtype(self.config)
        return contextlib.nullcontext() if amp is None else torch.autocast(self.device.type, amp)

    # -----------------------------------------------------------------------------------------------------------------
    # The cache

    @property
    def cached_epochs(self) -> int:
        return min(self.config.cached_epochs or self.config.epochs, self.config.epochs)

    def _measure(self) -> list[Features]:
        """What each module gives of an image."""
        net, found = first_network(self.config, self.images).eval(), []
        h, _ = next(iter(self.images.test_batches(2, self.dtype, self.device)))
        with torch.inference_mode(), self._autocast():
            for stage in net.stages:
                h = stage(h)
                found.append(Features.of(h))
        return found

    def files(self, k: int) -> tuple[list[CacheFile], CacheFile]:
        """Of module k's outputs: of the cached epochs, and of the test images."""
        config, images, folder = self.config, self.images, self.run / CACHE / f"module{k + 1:03d}"
        counts = [
            min(config.batch_size, images.train_count - i * config.batch_size)
            for i in range(images.batches(config.batch_size, config.drop_last))
        ]
        train = [CacheFile(folder / f"epoch{e + 1:04d}.bin", self.features[k], counts) for e in range(self.cached_epochs)]
        return train, CacheFile(folder / "test.bin", self.features[k], test_counts(images, config.batch_size))

    def _bytes(self, k: int) -> int:
        train, test = self.files(k)
        return sum(file.nbytes for file in (*train, test))

    def check_space(self) -> str:
        """What the cache takes, for people. Raises RunError if the disk has not so much."""
        if not self.config.cache:
            return "nothing is cached"
        sizes = [self._bytes(k) for k in range(self.config.modules - 1)]
        most = max(sum(sizes[max(0, k - 1) : k + 1]) for k in range(len(sizes)))  # a module's outputs are made from the last one's
        what = f"the cache of {self.cached_epochs} epoch{'s' * (self.cached_epochs > 1)}"
        check_space(self.run / CACHE, most, what)
        each = ", ".join(for_people(size) for size in sizes)
        return f"{what} takes up to {for_people(most)} in {self.run / CACHE} (module by module {each})"

    def cache(self, k: int, stop: StopRequest) -> _Cached:
        """The outputs of module k, which are made if they are not there; those of the modules before it are then removed."""
        train, test = self.files(k)
        if not all(file.is_complete for file in (*train, test)):
            source = self.cache(k - 1, stop) if k > 0 else None
            self.watch.at(f"building module {k + 1}", slow=True)
            part = self._load_trained(k)
            for epoch, file in enumerate(train):
                first = len(file.sums)
                batches = self.images.train_epoch(
                    self.config.batch_size, seed=self.config.seed, epoch=epoch, first=first, drop_last=self.config.drop_last,
                    augmented=self.config.augment, dtype=self.dtype, device=self.device,
                )  # fmt: skip
                given = batches if source is None else source.train(epoch, first, batches)
                self._write(file, self._outputs(part, stop.watch(given)), f"caching the outputs of module {k + 1}, epoch {epoch + 1}")
            batches = self.images.test_batches(self.config.batch_size, self.dtype, self.device)
            batches = batches if source is None else source.test(batches)
            first = len(test.sums)
            missing = self._outputs(part, stop.watch(b for i, b in enumerate(batches) if i >= first))
            self._write(test, missing, f"caching the outputs of module {k + 1}, test images")
        if k > 0:
            checkpoint._remove(self.files(k - 1)[1].path.parent)
        return _Cached(train, test, self.device)

    def _write(self, file: CacheFile, batches: Iterator[torch.Tensor], place: str) -> None:
        self.watch.at(f"taking the disk's space, {place}", slow=True)
        file.reserve()
        self.watch.at(place, pulse=self.images.images_read)
        file.write(batches, self.watch.moved)

    def _outputs(self, part: modules.LocalNetwork, batches: Iterator[tuple[torch.Tensor, ...]]) -> Iterator[torch.Tensor]:
        with torch.inference_mode(), self._autocast():
            for h, *_ in batches:
                for stage in part.stages:
                    h = stage(h)
                yield h


Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]


@dataclasses.dataclass
class _Cached:
    """Features from the disk: (features, image, label) for (image, label)."""

    epochs: list[CacheFile]
    tests: CacheFile
    device: torch.device

    def train(self, epoch: int, first: int, batches: Batches) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        file = self.epochs[epoch]
        for i, (image, label) in enumerate(batches, first):
            yield file.read(i).to(self.device), image, label

    def test(self, batches: Batches) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        for i, (image, label) in enumerate(batches):
            yield self.tests.read(i).to(self.device), image, label

    @property
    def different_epochs(self) -> int:
        return len(self.epochs)


class _Frozen:
    """Features by the trained modules themselves."""

    different_epochs = None

    def __init__(self, parts: list[modules.LocalNetwork], autocast):
        self.parts, self.autocast = parts, autocast

    def train(self, epoch: int, first: int, batches: Batches) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        for image, label in batches:
            with torch.no_grad(), self.autocast():
                h = image
                for part in self.parts:
                    for stage in part.stages:
                        h = stage(h)
            yield h, image, label

    def test(self, batches: Batches) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        return self.train(0, 0, batches)


class After:
    """Inlet of module k: the images, and what the modules before make of them (``source``)."""

    def __init__(self, images: Images, source: _Cached | _Frozen):
        self.images, self.source = images, source

    def train(self, epoch: int, first: int, last: int) -> Iterator[Packet]:
        epoch %= self.source.different_epochs or epoch + 1
        batches = ((p.image, p.label) for p in self.images.train(epoch, first, last))
        return (Packet(None, {}, label, image, h) for h, image, label in self.source.train(epoch, first, batches))

    def test(self) -> Iterator[Packet]:
        batches = ((p.image, p.label) for p in self.images.test())
        return (Packet(None, {}, label, image, h) for h, image, label in self.source.test(batches))


class OneModule(Share):
    """Module k (from 0) on what the trained ones before it make of the images."""

    def __init__(self, config: TrainConfig, images: Any, net: modules.LocalNetwork, here: Processes, k: int, source: _Cached | _Frozen | None):
        super().__init__(config, images, net, here)
        self.layout = Layout(0, 1, (range(k, k + 1),))
        self.prefix, self.evaluates, self.tells_recipe = f"module {k + 1}", k == config.modules - 1, k == 0
        if source is not None:
            self.inlet = After(self.inlet, source)

    evaluates = True

    def about_epoch(self) -> dict[str, Any]:
        return {"module": self.layout.modules.start + 1}

    def whole(self, own: dict[str, Any]) -> dict[str, Any]:
        return own

    own = whole

    def weights(self, net: modules.LocalNetwork, saved: dict[str, Any]) -> None:
        """Those of the network, when all modules are trained."""
