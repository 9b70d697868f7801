"""What a gateway costs, measured side by side with the others; see docs/benchmarks/README.md."""
