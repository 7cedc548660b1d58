"""A vision transformer of transformers, with fewer hidden units in its blocks, that from_pretrained loads.

python examples/vit.py
"""

import tempfile

import torch
from transformers import ViTConfig, ViTForImageClassification

import secateur as sc


def batches(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Images whose class is the quarter that is bright."""
    random = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        images = torch.rand(32, 3, 32, 32, generator=random) - 0.5
        labels = torch.randint(0, 4, (32,), generator=random)
        for image, label in zip(images, labels.tolist(), strict=True):
            image[:, 16 * (label // 2) :, 16 * (label % 2) :][:, :16, :16] += 2
        found.append({"pixel_values": images, "labels": labels})
    return found


def main(steps: int = 80) -> tuple[float, float, int]:
    """Return the accuracy before and after, and the width of the feed-forward layers that is left."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, num_labels=4, **sizes))
    train, test = batches(steps, 1), batches(4, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for batch in train:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()

    result = sc.prune(
        model.eval(),
        {"pixel_values": test[0]["pixel_values"][:2]},
        data=train,
        test=test,
        criterion="taylor",
        granularity="neuron",
        target={"params": 0.7},
        expressible=True,  # equally many in every layer, so that the config can say it
        recover={"method": "finetune", "epochs": 1, "optimizer": {"name": "adamw", "lr": 5e-4}},
    )
    folder = result.save(tempfile.mkdtemp() + "/vit")
    again = ViTForImageClassification.from_pretrained(folder).eval()
    images = test[0]["pixel_values"]
    assert torch.equal(again(images).logits, result.model.eval()(images).logits)
    print(repr(result))
    before, after = result.report.before.quality, result.report.after.quality
    return before["accuracy"], after["accuracy"], again.config.intermediate_size


if __name__ == "__main__":
    main()
