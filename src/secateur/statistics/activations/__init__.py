"""What the units see and give: streams of activations, second moments, input norms."""
