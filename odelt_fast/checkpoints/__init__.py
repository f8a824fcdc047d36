"""Model folders, the Hub, and other projects' checkpoints."""
