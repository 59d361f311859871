"""The method: losses, mixing, anchors, traces, alpha. Arrays in, values out; no files, no network."""
