"""The benchmark: `python -m bench` verifies every op of fastops against torch, then times the two side by side."""
