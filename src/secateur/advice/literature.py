"""What the rules of the advice rest on, each with its origin. Figures are the authors' unless it says otherwise."""

from __future__ import annotations

BENCH = (
    "PruningBench, ResNet-50 on CIFAR-100: at 2x OBD-C 78.68, Taylor 78.51, L2 78.32, BN scale 78.30, random 77.97; "
    "scoring 7.6, 3.7 and 0.1 s"
)
RANKS = "PruningBench: rankings at 2x and 8x agree with Kendall's tau 0.33 only (ViT-S 2x and 4x: 0.11)"
RETRAIN = (
    "Renda et al. 2020, ResNet-50 at 10.7 % density, the same scores: fine-tuning 71.9, learning-rate rewinding "
    "74.0; iterative 75.7"
)
STATIONARY = (
    "exact: at an optimum with weight decay the mean gradient gives |g w| = lambda w^2, which is magnitude; "
    "per-sample products do not degenerate"
)
COLLAPSE = (
    "network slimming, CIFAR-10 VGG-19, 70 % of the channels: 32.5 % right after the cut, 93.8 % after fine-tuning"
)
SCALE = (
    "exact: scaling a filter before a batch norm leaves the network unchanged, so raw norms of layers differ by chance"
)
GLOBAL_T5 = "JaxPruner, T5-base: loss 2.58 dense, 2.95 with magnitude per layer, 5.44 with one global ranking"
ELEMENT = "JaxPruner, ResNet-50: magnitude 75.5, in one global ranking 75.5, saliency (gradient) 74.9, random 70.2"
ZEROS = "zeros in dense tensors bring neither speed nor size (pytorch#36214, pytorch#32928)"
IDENTITY = (
    "exact: in networks of ReLU, max-pooling and eval batch norm the Hessian diagonal equals the Gauss-Newton one"
)
TRIM = "Network Trimming, VGG-16: 1.96x fewer parameters by APoZ: 68.4 to 71.1 % top-1, much of it by training longer"
WANDA = "SmolLM2-135M at 50 %, WikiText-2 perplexity: magnitude 501.8, Wanda 41.2, dense 21.3 (measured, CPU)"
SPARSE_GPU = "sparse tensor cores pay from about 256 channels on (TensorRT#4065)"
REFRESH = "batch-norm statistics belong to the uncut network; new ones need samples, no labels (Wu and Johnson 2021)"
REFIT = (
    "He et al. 2017 refit the next layer in closed form, without labels: VGG-16 at 4x loses 1.0 points of top-5 with "
    "fine-tuning after it"
)
GLOBAL_TAYLOR = (
    "measured, Taylor after the same short recovery, equal shares per layer against one global ranking: demo:convnet "
    "on MNIST 0.87 and 0.41 with half of the multiply-accumulates gone; ResNet-20 on CIFAR-10 0.67 and 0.70 with half "
    "and 0.50 and 0.47 with three quarters gone (three seeds each): the safer of the two, and worth comparing"
)
SAME_UNIT = "exact: a change of the loss has the same unit in every layer"
EXPERTS = "less memory at the same work per token, as the router uses as many experts as before (REAP, 2025)"
LONG = (
    "PruningBench, ViT-S at 2x: 78.6 to 69.3 with the best of 12 criteria, 68.8 with random: the budget was too short"
)
