"""Cut every model of torchvision and every family of timm, without any per-model code.

    python benchmarks/zoo.py torchvision [--match PATTERN] [--csv FILE] [--seconds 120]
    python benchmarks/zoo.py timm

Each model has random weights and runs in a process of its own: plan 30 % of the units of every free group,
cut with certificate, forward, backward, one optimizer step, save and load the plan. A row says what happened:
"cut" with the share of parameters removed and the certificate's error, "refused" with the reason, or "ERROR".
A suite whose package is not installed is skipped.
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import importlib.util
import multiprocessing as mp
import sys
import tempfile
import time
from pathlib import Path
from queue import Empty
from typing import Any

SMALL = ("test_", "_atto", "_femto", "_pico", "_nano", "_xxs", "_xxtiny", "_xs", "_xtiny", "_tiny", "_small", "_s")
DETECTION = ("rcnn", "retinanet", "fcos", "ssd")


def torchvision_names() -> list[str]:
    """Every model of torchvision that is not quantised."""
    import torchvision

    return [n for n in torchvision.models.list_models() if not n.startswith("quantized")]


def timm_names() -> list[str]:
    """The smallest-named model of every family of timm."""
    import timm

    names = []
    for family in timm.list_modules():
        models = timm.list_models(module=family)
        if models:
            names.append(min(models, key=lambda n: (next((i for i, s in enumerate(SMALL) if s in n), 99), len(n))))
    return names


def build(suite: str, name: str) -> tuple[Any, Any]:
    """Model and example inputs."""
    import torch

    if suite == "timm":
        import timm

        model = timm.create_model(name, pretrained=False)
        size = model.default_cfg.get("test_input_size") or model.default_cfg["input_size"]
        return model, torch.randn(2, *size)
    import torchvision

    extra = {"weights_backbone": None} if any(word in name for word in (*DETECTION, "lab", "fcn", "lraspp")) else {}
    model = torchvision.models.get_model(name, weights=None, **extra)
    if any(word in name for word in DETECTION):
        return model, ([torch.rand(3, 320, 320)],)
    if name.startswith("raft"):
        return model, (torch.randn(1, 3, 128, 128), torch.randn(1, 3, 128, 128))
    if any(word in name for word in ("r3d", "mc3", "r2plus1d", "s3d", "swin3d", "mvit")):
        frames = 16
        side = 224 if "mvit" in name else 112
        return model, torch.randn(1, 3, frames, side, side)
    return model, torch.randn(2, 3, 299 if "inception" in name else 224, 299 if "inception" in name else 224)


def attempt(suite: str, name: str, queue: Any) -> None:
    """Plan, cut, certify, train one step, save and load; put one row into the queue."""
    import torch

    import secateur as sc
    from secateur.measure import num_params
    from secateur.model.call import call, outputs

    torch.set_num_threads(2)
    torch.manual_seed(0)
    try:
        model, example = build(suite, name)
        model.eval()
    except Exception as error:
        queue.put({"status": "not built", "detail": f"{type(error).__name__}: {error}"[:200]})
        return
    started = time.perf_counter()
    try:
        plan = sc.plan(model, example, target={"sparsity": 0.3}, scope="local")
        cut = plan.apply(model)
        seconds = time.perf_counter() - started
        loss = sum(t.float().square().mean() for t in outputs(call(cut, example)) if t.is_floating_point())
        if isinstance(loss, torch.Tensor) and loss.requires_grad:
            loss.backward()
            torch.optim.SGD(cut.parameters(), lr=1e-3).step()
        with tempfile.TemporaryDirectory() as folder:
            plan.save(Path(folder) / "plan.json")
            sc.Plan.load(Path(folder) / "plan.json").validate(model)
        share = 1 - num_params(cut) / num_params(model)
        proof = plan.certificate
        queue.put(
            {
                "status": "cut",
                "share": f"{share:.3f}",
                "error": f"{proof.max_abs_error:.1e}" if proof else "",
                "seconds": f"{seconds:.1f}",
                "detail": "",
            }
        )
    except sc.SecateurError as error:
        status = "ERROR" if type(error).__name__ == "CertificateError" else "refused"
        queue.put({"status": status, "detail": f"{type(error).__name__}: {error}".replace("\n", " ")[:300]})
    except Exception as error:
        queue.put({"status": "ERROR", "detail": f"{type(error).__name__}: {error}".replace("\n", " ")[:300]})


def run(suite: str, name: str, seconds: float) -> dict[str, str]:
    """One model in a process of its own, ended when it takes too long."""
    context = mp.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=attempt, args=(suite, name, queue))
    process.start()
    try:
        row = queue.get(timeout=seconds)
    except Empty:
        row = {"status": "ERROR", "detail": f"no result within {seconds:.0f} s"}
    process.kill()
    process.join()
    return {"model": name, **row}


def main() -> None:
    """Run a suite and print a row per model and the totals."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=["torchvision", "timm"])
    parser.add_argument("--match", default="*")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--seconds", type=float, default=180)
    args = parser.parse_args()
    if importlib.util.find_spec(args.suite) is None:
        print(f"{args.suite} is not installed: skipped")
        return
    try:
        names = torchvision_names() if args.suite == "torchvision" else timm_names()
    except Exception as error:
        print(f"{args.suite} does not import here: skipped ({type(error).__name__}: {error})")
        return
    rows = []
    for name in fnmatch.filter(names, args.match):
        rows.append(run(args.suite, name, args.seconds))
        row = rows[-1]
        print(
            f"{name:<40} {row['status']:<10} {row.get('share', ''):<6} {row.get('error', ''):<8} {row['detail']}",
            flush=True,
        )
    counts = {status: sum(r["status"] == status for r in rows) for status in sorted({r["status"] for r in rows})}
    enough = sum(r["status"] == "cut" and float(r["share"]) >= 0.1 for r in rows)
    print(f"{len(rows)} models: {counts}; cut by at least 10 % of the parameters: {enough}")
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["model", "status", "share", "error", "seconds", "detail"])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())
