"""Quality, latency and memory over depths, steps and solvers."""
