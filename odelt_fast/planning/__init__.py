"""What sampling costs on a machine, and the best within a budget."""
