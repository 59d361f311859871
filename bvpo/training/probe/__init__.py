"""Looks at gradients: samples of them, their noise, and what alpha that asks for."""
