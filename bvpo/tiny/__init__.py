"""The tiny reasoning model: two tasks, a tokenizer, a corpus of noisy traces, supervised training, and a reward.

A real Qwen2 of about 100,000 parameters that thinks before it answers, made on the spot without any download, so that the
whole pipeline can be run and measured on two CPU cores. ``bvpo tiny`` (:mod:`bvpo.stages.tiny`) makes it.
"""
