"""YOLO of ultralytics (pip install ultralytics): fewer channels at 70 % of the MACs, certified as every cut.

python examples/yolo.py
"""

import torch
from ultralytics import YOLO

import secateur as sc


def main(name: str = "yolov8n.yaml", size: int = 160) -> tuple[float, float]:
    """Return the share of the multiply-accumulates that is left, and the largest error of the certificate."""
    torch.manual_seed(0)
    yolo = YOLO(name)  # "yolov8n.pt" brings trained weights
    model = yolo.model.float().eval()
    image = torch.rand(1, 3, size, size)

    plan = sc.plan(model, image, criterion="l2", target={"macs": 0.7}, round_to=8)
    small = plan.apply(model)  # a DetectionModel like the one before: names, strides and hooks stay
    before, after = plan.cost["macs"]
    print(f"{after / before:.1%} of the MACs, largest error {plan.certificate.max_abs_error:.1e}")

    yolo.model = small  # train on: yolo.train(data=..., epochs=...); then yolo.export(format="onnx")
    assert yolo.model(torch.rand(2, 3, 2 * size, size))[0].shape[0] == 2
    return after / before, plan.certificate.max_abs_error


if __name__ == "__main__":
    main()
