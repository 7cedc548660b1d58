"""One-shot pruning block by block: every block is fed by what the pruned blocks before it hand on."""
