"""What a recipe brings: the one place where it is planned, recovered and measured, to be compared with others."""
